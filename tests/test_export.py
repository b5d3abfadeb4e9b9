"""The exported files: they agree with the network, they say what they are, they fail cleanly."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

from autoft.errors import DataError, MachineError, PluginError, UsageError
from autoft.export.artifact import FORMATS, load_weights, write_weights
from autoft.export.onnx import metadata_of, to_onnx
from autoft.export.parity import TOLERANCE, Parity, check_parity, write_parity
from autoft.export.pt2 import portable
from autoft.export.torchscript import to_torchscript
from autoft.values import Preprocess

ODD_CLASSES = ["猫", '"quoted"', "<script>", "new\nline", "not-utf-8-\udce9"]
NETWORKS = {
    "resnet": ("test_resnet", 64, {}),
    "vit": ("test_vit", 160, {}),
    "same_padding": ("mobilenetv2_100", 96, {"pad_type": "same"}),
}


class Tiny(nn.Sequential):
    """A network that exports in a second."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(4, classes),
        )  # fmt: skip


PRE = Preprocess(image_size=16, resize=20)


def export(model: nn.Module, folder: Path, pre: Preprocess) -> dict[str, Path]:
    metadata = metadata_of(["a", "b", "c"], pre, {})
    files = {name: folder / file for name, (file, _) in FORMATS.items()}
    for name, path in files.items():
        FORMATS[name][1](model, path, pre, metadata)
    return files


def noise(size: int, *counts: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(7)
    for count in counts:
        yield torch.randn(count, 3, size, size, generator=generator)


def tiny_files(folder: Path, seed: int = 0) -> tuple[Tiny, dict[str, Path]]:
    torch.manual_seed(seed)
    model = Tiny()
    nn.init.normal_(model[-1].weight, std=5)
    folder.mkdir(exist_ok=True)
    return model, export(model, folder, PRE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Tiny, dict[str, Path]]:
    return tiny_files(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_format_agrees_with_the_network_at_every_batch_size(network, tmp_path):
    name, size, options = NETWORKS[network]
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=3, **options)
    files = export(model, tmp_path, Preprocess(size, size))

    parities = check_parity(model, files, lambda: noise(size, 1, 3, 5))

    assert [parity.format for parity in parities] == ["onnx", "torchscript", "pt2"]
    assert all(parity.passed for parity in parities), parities
    assert {(parity.n, parity.label_agreement) for parity in parities} == {(9, 1.0)}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.onnx", "model.pt2", "model.ts",
    ]  # fmt: skip


def test_export_leaves_the_model_as_it_was(tmp_path):
    model = Tiny().to(torch.bfloat16, memory_format=torch.channels_last).train()
    before = copy.deepcopy(model.state_dict())

    export(model, tmp_path, PRE)

    assert model.training
    assert all(p.dtype is torch.bfloat16 and p.requires_grad for p in model.parameters())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_portable_copy_does_not_depend_on_how_the_model_was_trained():
    model = Tiny().to(torch.float16, memory_format=torch.channels_last).train()
    twin = portable(model)
    assert not twin.training
    for tensor in twin.parameters():
        assert tensor.dtype is torch.float32
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


def test_onnx_has_named_ports_and_a_symbolic_batch(tiny):
    session = onnxruntime.InferenceSession(tiny[1]["onnx"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == (
        "images", "tensor(float)", ["batch", 3, 16, 16],
    )  # fmt: skip
    assert (logits.name, logits.shape) == ("logits", ["batch", 3])


def test_metadata_survive_in_the_file_with_any_class_name(tmp_path):
    path = tmp_path / "model.onnx"
    model = Tiny(len(ODD_CLASSES))
    metadata = metadata_of(ODD_CLASSES, PRE, {"autoft.metric": "accuracy"})

    to_onnx(model, path, PRE, metadata)

    found = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert json.loads(found["autoft.classes"]) == ODD_CLASSES
    preprocess = json.loads(found["autoft.preprocess"])
    assert preprocess["mean"] == list(PRE.mean)
    assert (preprocess["image_size"], preprocess["resize"]) == (16, 20)
    assert "EXIF" in preprocess["rule"]
    assert "alpha" in preprocess["rule"]
    assert found["autoft.version"]
    assert found["autoft.metric"] == "accuracy"


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
def test_torchscript_and_pt2_carry_the_classes_too(tiny):
    script, program = {"autoft.classes": ""}, {"autoft.classes": ""}
    torch.jit.load(tiny[1]["torchscript"], _extra_files=script)
    torch.export.load(tiny[1]["pt2"], extra_files=program)
    assert json.loads(script["autoft.classes"]) == ["a", "b", "c"]
    assert json.loads(program["autoft.classes"]) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["onnx", "pt2"])
def test_exported_file_holds_no_path_of_this_machine(tiny, name):
    content = tiny[1][name].read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(Path(__file__).parent).encode() not in content


def test_onnx_file_passes_the_checker(tiny):
    onnx.checker.check_model(onnx.load(tiny[1]["onnx"]), full_check=True)


def test_export_and_parity_are_silent(tmp_path):
    script = """
import sys, pathlib, timm, torch
from autoft.export.artifact import FORMATS
from autoft.export.parity import check_parity
from autoft.values import Preprocess
model = timm.create_model("test_vit", num_classes=3, img_size=32)
files = {name: pathlib.Path(sys.argv[1]) / file for name, (file, _) in FORMATS.items()}
for name, path in files.items():
    FORMATS[name][1](model, path, Preprocess(32, 32), {})
proofs = check_parity(model, files, lambda: iter([torch.zeros(2, 3, 32, 32)]))
sys.exit(0 if all(proof.passed for proof in proofs) else 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Branching(nn.Module):
    """Its path depends on the values, which no exporter can follow."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class Counting(nn.Module):
    """It takes the batch size as a Python number, which a trace keeps for ever."""

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(len(images), -1)[:, :5]


@pytest.mark.parametrize(
    ("name", "model"),
    [("onnx", Branching()), ("pt2", Branching()), ("torchscript", Counting())],
    ids=["onnx", "pt2", "torchscript"],
)
def test_failed_export_says_why_and_leaves_no_file(tmp_path, name, model):
    file, function = FORMATS[name]
    with pytest.raises(PluginError, match=f"{type(model).__name__} failed with") as caught:
        function(model, tmp_path / file, PRE, {})
    assert caught.value.__cause__ is not None
    assert list(tmp_path.iterdir()) == []


def test_onnx_refuses_more_weights_than_one_file_holds(tmp_path):
    model = nn.Linear(2**15, 2**15, device="meta")  # 4 GiB, none of it allocated
    with pytest.raises(MachineError, match=r"4\.00 GiB"):
        to_onnx(model, tmp_path / "model.onnx", PRE, {})


def test_torchscript_is_refused_where_torch_does_not_support_it(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 14))
        with pytest.raises(MachineError, match=r"Python 3\.14"):
            to_torchscript(Tiny(), tmp_path / "model.ts", PRE)


def test_parity_fails_for_the_file_of_another_model(tiny, tmp_path):
    other, _ = tiny_files(tmp_path / "other", seed=1)
    right = check_parity(tiny[0], tiny[1], lambda: noise(16, 8))
    wrong = check_parity(other, tiny[1], lambda: noise(16, 8))
    assert all(parity.passed for parity in right), right
    assert not any(parity.passed for parity in wrong)
    assert all(parity.max_probability_difference > TOLERANCE for parity in wrong)
    assert all(parity.label_agreement < 1 and not parity.error for parity in wrong)


def test_parity_fails_by_probability_when_the_labels_agree(tiny):
    warmer = copy.deepcopy(tiny[0])
    with torch.no_grad():
        warmer[-1].weight *= 1.1
        warmer[-1].bias *= 1.1
    for parity in check_parity(warmer, tiny[1], lambda: noise(16, 8)):
        assert parity.label_agreement == 1
        assert not parity.passed


def test_parity_fails_by_label_when_the_probabilities_are_close(tmp_path):
    first, second = Tiny(2), Tiny(2)
    for model, bias in ((first, [0.0, 1e-4]), (second, [1e-4, 0.0])):
        nn.init.zeros_(model[-1].weight)
        model[-1].bias.data = torch.tensor(bias)
    to_torchscript(second, tmp_path / "model.ts", PRE)
    (parity,) = check_parity(first, {"torchscript": tmp_path / "model.ts"}, lambda: noise(16, 4))
    assert parity.max_probability_difference < TOLERANCE
    assert parity.label_agreement == 0
    assert not parity.passed


def test_parity_fails_where_the_network_answers_nan(tiny):
    parities = check_parity(
        tiny[0], tiny[1], lambda: iter([torch.full((2, 3, 16, 16), torch.nan)])
    )
    assert [(p.passed, p.max_probability_difference) for p in parities] == [(False, 1.0)] * 3


def test_parity_of_another_number_of_classes_is_a_failed_proof(tiny):
    for parity in check_parity(Tiny(5), tiny[1], lambda: noise(16, 2)):
        assert not parity.passed
        assert "expected (2, 5)" in parity.error


@pytest.mark.parametrize("broken", ["onnx", "torchscript", "pt2"])
def test_damaged_file_fails_alone(tiny, tmp_path, broken):
    damaged = tmp_path / "damaged"
    damaged.write_bytes(tiny[1][broken].read_bytes()[:1000])
    files: Mapping[str, Path] = tiny[1] | {broken: damaged}
    parities = {p.format: p for p in check_parity(tiny[0], files, lambda: noise(16, 2, 2))}
    assert not parities[broken].passed
    assert parities[broken].error
    assert [name for name, parity in parities.items() if not parity.passed] == [broken]


def test_parity_reads_the_batches_once(tiny):
    passes = []

    def batches() -> Iterator[Tensor]:
        passes.append(1)
        return noise(16, 1, 1)

    check_parity(tiny[0], tiny[1], batches)
    assert passes == [1]


def test_parity_without_images_or_of_an_unknown_format_is_an_error(tiny):
    with pytest.raises(DataError, match="0 images"):
        check_parity(tiny[0], tiny[1], lambda: iter([]))
    with pytest.raises(UsageError, match="Did you mean 'onnx'"):
        check_parity(tiny[0], {"onx": tiny[1]["onnx"]}, lambda: noise(16, 1))


def test_parity_is_written_as_json(tmp_path):
    parity = Parity("onnx", 4, 0.75, 0.5, passed=False)
    write_parity(tmp_path / "parity.json", [parity])
    (found,) = json.loads((tmp_path / "parity.json").read_text())
    assert Parity(**found) == parity


def test_weights_round_trip_as_float32(tmp_path):
    model = Tiny().to(torch.bfloat16, memory_format=torch.channels_last)
    model.twin = model[-1]  # shared tensors
    write_weights(model, tmp_path / "model.safetensors")
    fresh = Tiny()
    fresh.twin = fresh[-1]

    load_weights(fresh, tmp_path / "model.safetensors")

    assert {p.dtype for p in fresh.parameters()} == {torch.float32}
    assert fresh.twin.weight is fresh[-1].weight
    for name, value in model.state_dict().items():
        assert torch.equal(value.to(fresh.state_dict()[name].dtype), fresh.state_dict()[name])


def test_weights_of_another_network_are_refused_by_tensor_name(tmp_path):
    path = tmp_path / "model.safetensors"
    model = Tiny()
    write_weights(model, path)
    with pytest.raises(DataError, match=r"5\.weight is \(3, 4\), expected \(7, 4\)"):
        load_weights(Tiny(7), path)
    with pytest.raises(DataError, match=r"new\.weight is missing.*0\.bias is unknown.* 5 more"):
        load_weights(nn.ModuleDict({"new": nn.Linear(4, 3, bias=False)}), path)


def test_damaged_or_missing_weights_are_a_data_error(tmp_path):
    path = tmp_path / "model.safetensors"
    write_weights(Tiny(), path)
    path.write_bytes(path.read_bytes()[:-7])
    for file in (path, tmp_path / "none.safetensors"):
        with pytest.raises(DataError, match="cannot be read"):
            load_weights(Tiny(), file)


class Windows(nn.Module):
    """Attends within windows, in five dimensions or in three, as some networks do."""

    def __init__(self, dims: int, masked: bool) -> None:
        super().__init__()
        self.dims = dims
        self.masked = masked
        self.project = nn.Linear(48, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.project(images.unflatten(2, (-1, 16)).flatten(3)[..., :48])  # N, 3, T, 24
        query, key, value = tokens.unflatten(3, (3, 8)).unbind(3)
        mask = None
        if self.masked:
            size = query.shape[2]
            mask = torch.ones(1, size, size, dtype=torch.bool).tril()
        if self.dims == 5:
            query, key, value = (each.unsqueeze(2) for each in (query, key, value))
        if self.dims == 3:
            query, key, value = (each.flatten(0, 1) for each in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.head(out.reshape(images.shape[0], -1, 8).mean(1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dims", [3, 4, 5])
def test_attention_of_any_dimensions_is_exported(tmp_path, dims, masked) -> None:
    torch.manual_seed(0)
    model = Windows(dims, masked).eval()
    to_onnx(model, tmp_path / "m.onnx", Preprocess(64, 64), {})
    images = torch.randn(5, 3, 64, 64)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    (found,) = session.run(None, {"images": images.numpy()})
    assert torch.allclose(torch.from_numpy(found), model(images), atol=1e-5)
