"""What is particular to torchvision: names, stages, weights files, and the networks themselves."""

from __future__ import annotations

from importlib.metadata import entry_points

import autoft_torchvision
import pytest
import torch
from autoft_torchvision.weights import cached, fit
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VisionTransformer, get_model, get_model_weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn

from autoft import DataError, MachineError, UsageError
from autoft.network.weights import load_weights
from autoft.testing.probes import blocked_network, one_thread

NAMES = sorted(
    entry.name
    for entry in entry_points(group="autoft.backbones")
    if entry.dist and entry.dist.name == "autoft-torchvision"
)

STAGES = {
    "tv_resnet50_coco": "conv1 bn1 | layer1 | layer2 | layer3 | layer4",
    "tv_squeezenet1_0": (
        "features.0 | features.3 features.4 features.5 | "
        "features.7 features.8 features.9 features.10 | features.12"
    ),
    "tv_vgg16": (
        "features.0 features.2 | features.5 features.7 | features.10 features.12 features.14 | "
        "features.17 features.19 features.21 | features.24 features.26 features.28"
    ),
    "tv_mobilenet_v3_small": (
        "features.0 | features.1 | features.2 features.3 | "
        "features.4 features.5 features.6 features.7 features.8 | "
        "features.9 features.10 features.11 features.12"
    ),
    "tv_efficientnet_b0": (
        "features.0 features.1 | features.2 | features.3 | features.4 features.5 | "
        "features.6 features.7 features.8"
    ),
    "tv_swin_t": (
        "features.0 | features.1 | features.2 features.3 | features.4 features.5 | "
        "features.6 features.7 norm"
    ),
}

# The submodule of torchvision's classifier whose input are the features, before pooling or after.
CLASSIFIERS = {
    "resnet18": "fc",
    "squeezenet1_1": "classifier",
    "mobilenet_v2": "classifier",
    "mobilenet_v3_small": "classifier",
    "convnext_tiny": "classifier.2",
    "swin_t": "head",
    "vgg16_bn": "avgpool",
}


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Give torch an empty cache of weights, and no switch that forbids the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("AUTOFT_OFFLINE", raising=False)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def shuffled(module: nn.Module) -> nn.Module:
    """Give batch norms statistics that a fresh network does not have."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(generator=generator)
            part.running_var.uniform_(0.5, 2.0, generator=generator)
    return module.eval()


def test_every_entry_point_is_a_function_of_its_own_name():
    assert len(NAMES) == 21
    functions = {name: getattr(autoft_torchvision, name) for name in NAMES}
    assert {name: function.__name__ for name, function in functions.items()} == {
        name: name for name in NAMES
    }


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_these(name):
    backbone = getattr(autoft_torchvision, name)(pretrained=False)
    assert " | ".join(" ".join(stage) for stage in backbone.stages) == STAGES[name]


@pytest.mark.parametrize(("name", "classifier"), CLASSIFIERS.items())
def test_file_of_torchvision_gives_the_features_of_torchvision(name, classifier, tmp_path):
    torch.manual_seed(0)
    original = shuffled(get_model(name, weights=None))
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    backbone = getattr(autoft_torchvision, f"tv_{name}")(pretrained=False)

    left_out = load_weights(backbone.module, tmp_path / "model.safetensors")

    assert {key.partition(".")[0] for key in left_out} <= {"classifier", "fc", "head"}
    seen = []
    original.get_submodule(classifier).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        original(images)
        features = backbone.module.eval()(images)
    expected = seen[0].mean((2, 3)) if seen[0].ndim == 4 else seen[0]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_preprocessing_is_that_of_the_weights():
    backbone = autoft_torchvision.tv_efficientnet_b0(pretrained=False)
    assert (backbone.image_size, backbone.crop) == (224, 224 / 256)
    assert (backbone.interpolation, backbone.source) == ("bicubic", "in1k")
    assert backbone.mean == (0.485, 0.456, 0.406)
    assert autoft_torchvision.tv_swin_v2_t(pretrained=False).image_size == 256


def test_pretrained_takes_the_file_in_the_cache_without_network(cache):
    original = get_model("squeezenet1_1", weights=None)
    torch.save(original.state_dict(), cached(get_model_weights("squeezenet1_1").DEFAULT))
    with blocked_network():
        module = autoft_torchvision.tv_squeezenet1_1().module
    assert torch.equal(module.features[0].weight, original.features[0].weight)


def test_coco_body_computes_what_the_detector_computes(cache):
    torch.manual_seed(0)
    detector = shuffled(fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None))
    # The published file comes from frozen batch norms, which count no batches.
    state = {k: v for k, v in detector.state_dict().items() if "num_batches" not in k}
    torch.save(state, cached(FasterRCNN_ResNet50_FPN_Weights.COCO_V1))

    backbone = autoft_torchvision.tv_resnet50_coco()

    assert backbone.source == "coco"
    assert isinstance(backbone.module.bn1, nn.BatchNorm2d)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = detector.backbone.body(images)["3"].mean((2, 3))
        torch.testing.assert_close(backbone.module.eval()(images), expected)


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "AUTOFT_OFFLINE"])
def test_offline_names_the_file_and_tries_no_network(cache, monkeypatch, switch):
    monkeypatch.setenv(switch, "1")
    with blocked_network() as attempts, pytest.raises(MachineError) as caught:
        autoft_torchvision.tv_resnet18()
    assert not attempts
    assert f"{switch}=1 forbids the network" in str(caught.value)
    assert "'tv_resnet18'" in str(caught.value)
    assert str(cache / "resnet18-f37072fd.pth") in str(caught.value)


def test_damaged_file_in_the_cache_is_named(cache):
    (cache / "resnet18-f37072fd.pth").write_bytes(b"half a file")
    with pytest.raises(MachineError, match=r"resnet18-f37072fd\.pth: it cannot be read"):
        autoft_torchvision.tv_resnet18()


def test_position_embeddings_are_interpolated_to_the_image_size():
    def transformer(image_size: int) -> nn.Module:
        return VisionTransformer(image_size, 16, 1, 2, 8, 16)

    state = transformer(64).state_dict()
    state["encoder.pos_embedding"].normal_()
    module = transformer(32)
    module.heads = nn.Identity()

    module.load_state_dict(fit(state, module, 32))

    positions, original = module.encoder.pos_embedding[0], state["encoder.pos_embedding"][0]
    assert positions.shape == (1 + 2 * 2, 8)
    # The class token and the four corners of the 4 x 4 grid keep their embeddings.
    torch.testing.assert_close(positions.detach(), original[[0, 1, 4, 13, 16]])


def test_vit_takes_the_image_size_that_it_is_asked_for():
    backbone = autoft_torchvision.tv_vit_b_16(pretrained=False, image_size=32)
    assert backbone.image_size == 32
    with torch.no_grad():
        assert backbone.module(torch.randn(1, 3, 32, 32)).shape == (1, 768)
    with pytest.raises(UsageError, match=r"image_size=90 is no multiple of 16\. Choose 96"):
        autoft_torchvision.tv_vit_b_16(pretrained=False, image_size=90)


def test_file_of_another_architecture_is_refused(tmp_path):
    save_file(get_model("squeezenet1_1").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="do not fit this backbone"):
        load_weights(
            autoft_torchvision.tv_squeezenet1_0(pretrained=False).module,
            tmp_path / "model.safetensors",
        )
