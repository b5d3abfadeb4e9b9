"""Pooling: what each kind gives of each layout, and that exports and copies give the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from autoft import plugins
from autoft.errors import PluginError, UsageError
from autoft.export.onnx import to_onnx
from autoft.export.torchscript import to_torchscript
from autoft.network.build import build
from autoft.network.pooling import KINDS, POOLS, Pooling, generalised_mean
from autoft.network.sources import Source, in_folder
from autoft.training.features import pooled_features
from autoft.training.job import Images, Precision, Setup
from autoft.training.precision import autocast
from autoft.values import Backbone, Part, Preprocess

SIZE = 64
NETWORKS = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet")


class ChannelsLast(nn.Module):
    """Three stages; the first two give (N, H, W, C), as Swin's do, the second after a free act."""

    num_prefix_tokens = 0

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 7, 4, stride=4)
        self.deep = nn.Linear(7, 16)  # on a map of 16 x 16: all three sizes are equal
        self.wide = nn.Linear(16, 9)
        self.act = nn.ReLU()
        self.scale = nn.Parameter(torch.ones(9))
        self.kept: tuple[Tensor, Tensor]

    def forward(self, images: Tensor) -> Tensor:
        deep = self.deep(self.patch(images).permute(0, 2, 3, 1))
        self.kept = deep, self.act(self.wide(deep))
        return self.kept[1].mean(dim=(1, 2)) * self.scale


class Whole(nn.Module):
    """Backbone, head and pooling, as a trial joins them."""

    def __init__(self, backbone: Backbone, kind: str, size: int = SIZE) -> None:
        super().__init__()
        self.backbone = backbone.module
        self.pool = Pooling(backbone, kind, size)
        self.head = nn.Linear(self.pool.num_features, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(images))


def channels_last() -> Backbone:
    torch.manual_seed(0)
    return Backbone(ChannelsLast().eval(), (("patch", "deep"), ("wide",), ("scale",)), 9)


def timm(name: str) -> Backbone:
    torch.manual_seed(0)
    options = {"model": name}
    backbone = build(Source(name, "timm", options, pretrained=False), image_size=SIZE)
    backbone.module.eval()
    return backbone


def images(count: int = 3, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


# --- what each kind computes --------------------------------------------------------------------


@pytest.mark.parametrize("kind", POOLS)
def test_pooled_channels_last_map_is_as_made_by_hand(kind) -> None:
    backbone = channels_last()
    pool = Pooling(backbone, kind, SIZE)
    features = pool(images())
    shown = backbone.module.kept[1]
    flat = shown.flatten(1, 2)
    expected = {
        "native": flat.mean(1),
        "avgmax": torch.cat([flat.mean(1), flat.amax(1)], dim=1),
        "gem": flat.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3),
    }[kind]
    torch.testing.assert_close(features, expected)
    assert pool.num_features == features.shape[1]


def test_stages_are_pooled_where_each_ends_whatever_the_layout() -> None:
    backbone = channels_last()
    pool = Pooling(backbone, "stages", SIZE)
    nn.init.constant_(backbone.module.scale, 2.0)
    features = pool(images())
    deep, wide = (kept.mean(dim=(1, 2)) for kept in backbone.module.kept)
    # A bare parameter returns nothing: the last stage is what the backbone returns.
    torch.testing.assert_close(features, torch.cat([deep, wide, 2 * wide], dim=1))
    assert pool.unseen == (2,)
    assert pool.num_features == 16 + 9 + 9


def test_pooled_map_of_a_resnet_is_that_of_its_last_stage() -> None:
    backbone = timm("test_resnet")
    shown = backbone.module.forward_features(images())
    both = Pooling(backbone, "avgmax", SIZE)
    torch.testing.assert_close(
        both(images()), torch.cat([shown.mean((2, 3)), shown.amax((2, 3))], dim=1)
    )
    gem = Pooling(backbone, "gem", SIZE)
    torch.testing.assert_close(gem(images()), shown.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3))
    assert gem.map_stage == len(backbone.stages) - 1


def test_tokens_are_pooled_without_the_class_token() -> None:
    backbone = timm("test_vit")
    shown = backbone.module.forward_features(images())[:, 1:]
    expected = torch.cat([shown.mean(1), shown.amax(1)], dim=1)
    torch.testing.assert_close(Pooling(backbone, "avgmax", SIZE)(images()), expected)


def test_map_before_a_norm_that_follows_the_pooling_is_taken() -> None:
    stages = (("stem",), ("stages",), ("head",))
    backbone = replace(timm("test_convnext"), stages=stages)
    shown = backbone.module.forward_features(images())
    pool = Pooling(backbone, "avgmax", SIZE)
    expected = torch.cat([shown.mean((2, 3)), shown.amax((2, 3))], dim=1)
    torch.testing.assert_close(pool(images()), expected)
    assert pool.map_stage == 1  # the head, which holds the norm, takes no part


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_fits_its_width_and_leaves_the_backbone_as_it_was(name, kind) -> None:
    backbone = timm(name)
    backbone.module.train()
    before = copy.deepcopy(backbone.module.state_dict())
    pool = Pooling(backbone, kind, SIZE)
    assert all(each.training for each in backbone.module.modules())
    backbone.module.eval()
    features = pool(images())
    assert features.shape == (3, pool.num_features)
    assert features.isfinite().all()
    after = backbone.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if kind == "native":
        assert torch.equal(features, backbone.module(images()))
    if kind == "stages":
        assert pool.unseen == ()
        final = features[:, -backbone.num_features :]
        torch.testing.assert_close(final, backbone.module(images()), rtol=1e-3, atol=1e-4)


def test_final_features_are_joined_once() -> None:
    for name, widths in {"test_resnet": 96, "test_convnext": 64}.items():
        backbone = timm(name)
        pool = Pooling(backbone, "stages", SIZE)
        ends = pool(images())
        assert not torch.allclose(ends[:, -2 * widths : -widths], ends[:, -widths:], atol=1e-3)


def test_generalised_mean_goes_from_the_mean_to_the_maximum() -> None:
    activations = images().abs() + 0.1
    at = {p: generalised_mean(activations, torch.tensor(p), (2, 3)) for p in (0.5, 1.0, 3.0, 1e4)}
    torch.testing.assert_close(at[1.0], activations.mean((2, 3)))
    torch.testing.assert_close(at[0.5], at[1.0])  # lower ones count as 1
    assert (at[3.0] > at[1.0]).all()
    torch.testing.assert_close(at[1e4], activations.amax((2, 3)), rtol=2e-3, atol=0)
    large = generalised_mean(1e20 * activations, torch.tensor(50.0), (2, 3))
    assert large.isfinite().all()


def test_exponent_is_trained_by_an_exact_gradient() -> None:
    p = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    activations = (images(2, 4).double().abs() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, p: generalised_mean(x, p, (2, 3)), (activations, p), atol=1e-6
    )
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    generalised_mean(dead, (q := torch.tensor(3.0, requires_grad=True)), (2, 3)).sum().backward()
    assert dead.grad.isfinite().all()
    assert q.grad.isfinite()


def test_gradients_pass_through_pooling_into_backbone_and_exponent() -> None:
    for kind in KINDS:
        whole = Whole(timm("test_resnet"), kind).train()
        whole(images()).square().sum().backward()
        assert whole.backbone.conv1[0].weight.grad.any()
        assert (whole.pool.p is None) == (kind != "gem")
        if whole.pool.p is not None:
            assert whole.pool.p.grad.any()


def test_unknown_kinds_and_backbones_without_a_map_are_refused() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 4))
    backbone = Backbone(flat, (("1",),), 4)
    with pytest.raises(UsageError, match=r"no pooling 'gme'\. Did you mean 'gem'"):
        Pooling(backbone, "gme", SIZE)
    with pytest.raises(PluginError, match=r"shows no map .* or the pooling 'native'"):
        Pooling(backbone, "gem", SIZE)
    assert Pooling(backbone, "stages", SIZE).num_features == 4


# --- states, copies, number formats, compilation and exports ------------------------------------


def test_state_holds_the_backbone_once_and_the_exponent() -> None:
    backbone = timm("test_resnet")
    own = {f"backbone.{name}" for name in backbone.module.state_dict()}
    for kind in KINDS:
        state = Whole(backbone, kind).state_dict()
        exponent = {"pool.p"} if kind == "gem" else set()
        assert set(state) == own | {"head.weight", "head.bias"} | exponent


@pytest.mark.parametrize("kind", KINDS)
def test_copy_pools_its_own_backbone(kind) -> None:
    whole = Whole(timm("test_resnet"), kind).eval()
    whole(images())  # with a graph, that nothing may hold on to
    twin = copy.deepcopy(whole)
    assert twin.pool.backbone is twin.backbone
    before = whole(images())
    with torch.no_grad():
        for parameter in twin.backbone.parameters():
            parameter.mul_(0.5)
    assert torch.equal(whole(images()), before)
    assert not torch.allclose(twin(images()), before)


def test_nothing_of_a_pass_is_kept_also_where_it_fails() -> None:
    whole = Whole(timm("test_resnet"), "avgmax")
    taps = whole.pool._taps
    whole(images())
    assert taps.map is None
    with pytest.raises(RuntimeError):
        whole(torch.zeros(2, 5, SIZE, SIZE))
    whole.backbone(images())  # nobody listens
    assert taps.map is None


@pytest.mark.parametrize("kind", KINDS)
def test_pooling_in_bf16_channels_last_and_inference_mode_is_near_fp32(kind) -> None:
    whole = Whole(timm("test_resnet"), kind).eval()
    expected = whole(images())
    whole.to(memory_format=torch.channels_last)
    laid = images().to(memory_format=torch.channels_last)
    with torch.inference_mode(), autocast(Precision(bf16=True), torch.device("cpu")):
        got = whole(laid)
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_network_gives_the_same_from_one_graph(kind) -> None:
    whole = Whole(timm("test_resnet"), kind).eval()
    torch._dynamo.reset()
    compiled = torch.compile(whole, backend="eager", fullgraph=True)
    with torch.no_grad():
        for seed in (2, 3):
            torch.testing.assert_close(compiled(images(seed)), whole(images(seed)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("test_resnet", "avgmax"),
        ("test_resnet", "gem"),
        ("test_resnet", "stages"),
        ("test_vit", "gem"),
        ("test_vit", "stages"),
        ("test_convnext", "avgmax"),
        ("test_efficientnet", "gem"),
        ("channels last", "gem"),
        ("channels last", "stages"),
    ],
)
def test_exports_give_what_the_network_gives(name, kind, tmp_path) -> None:
    whole = Whole(channels_last() if name == "channels last" else timm(name), kind).eval()
    if whole.pool.p is not None:
        nn.init.constant_(whole.pool.p, 2.5)
    pre = Preprocess(SIZE, SIZE, (0.5,) * 3, (0.5,) * 3)
    to_onnx(whole, tmp_path / "model.onnx", pre, {})
    to_torchscript(whole, tmp_path / "model.ts", pre)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    script = torch.jit.load(tmp_path / "model.ts")
    for count in (1, 3):
        with torch.no_grad():
            expected = whole(images(count))
            torch.testing.assert_close(script(images(count)), expected, rtol=1e-4, atol=1e-5)
        (logits,) = session.run(None, {"images": images(count).numpy()})
        np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-3, atol=1e-4)


# --- features that are kept ---------------------------------------------------------------------


@pytest.fixture
def setup(photos, tiny_sources, setup_in, tmp_path, monkeypatch) -> Setup:
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "own-cache"))
    return setup_in(photos, tiny_sources, tmp_path)


def test_features_of_each_kind_are_kept_apart_and_found_again(setup) -> None:
    backbone = build(setup.sources["test_resnet.fixed"])
    pre, part = setup.preprocess(backbone), setup.validation
    fresh = {}
    for kind in KINDS:
        pool = Pooling(backbone, kind, setup.image_size)
        fresh[kind] = pooled_features(pool, setup, part, pre, Precision())
        assert fresh[kind].shape == (len(part), pool.num_features)
    native = pooled_features(backbone.module, setup, part, pre, Precision())
    assert np.array_equal(native, fresh["native"])
    gone = replace(setup, store=Gone(setup.store.key))
    for kind in KINDS:
        pool = Pooling(backbone, kind, setup.image_size)
        assert np.array_equal(pooled_features(pool, gone, part, pre, Precision()), fresh[kind])
    moved = Pooling(backbone, "gem", setup.image_size)
    nn.init.constant_(moved.p, 1.0)
    assert not np.allclose(pooled_features(moved, setup, part, pre, Precision()), fresh["gem"])


class Gone:
    """A store whose images cannot be read any more."""

    def __init__(self, key: str) -> None:
        self.key = key


def test_profile_and_trials_share_the_features_of_all_stages(setup) -> None:
    from autoft.training import profile
    from autoft.training.features import fingerprint
    from autoft.training.measures import Sample

    backbone = build(setup.sources["test_resnet.fixed"])
    network = fingerprint(backbone.module, setup)
    part: Images = setup.train
    places = np.arange(len(part))
    sample = Sample(part.rows, part.labels, places, places)
    final, stages, unseen = profile._staged(setup, backbone, network, sample, lambda *_: None)
    pool = Pooling(backbone, "stages", setup.image_size)
    gone = replace(setup, store=Gone(setup.store.key))
    pre = setup.preprocess(backbone)
    assert np.array_equal(pooled_features(pool, gone, part, pre, Precision()), stages)
    native = pooled_features(backbone.module, setup, part, pre, Precision())
    np.testing.assert_allclose(final, native, rtol=1e-3, atol=1e-4)
    assert unseen == ()


# --- real weights -------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_on_a_network_with_real_weights(kind, shared_root: Path) -> None:
    sources = in_folder(shared_root / "weights")[0]
    backbone = build(sources["mobilenetv2_100.in1k"])
    backbone.module.eval()
    pool = Pooling(backbone, kind, 96)
    with torch.no_grad():
        features = pool(images(4, 96))
    assert features.isfinite().all()
    assert features.std(dim=0).mean() > 0
    if kind == "stages":
        assert pool.num_features >= backbone.num_features + len(backbone.stages) - 1
        head = plugins.load("head", Part("linear", {}).name)(pool.num_features, 5)
        assert head(features).shape == (4, 5)
    else:
        assert pool.num_features == backbone.num_features * (2 if kind == "avgmax" else 1)
