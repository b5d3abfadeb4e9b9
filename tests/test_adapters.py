"""Adapters start as nothing, train alone, and are merged away without a trace."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

from autoft.errors import PluginError, UsageError
from autoft.network.adapters import LowRank, adapt, low_rank, merged_state
from autoft.network.assemble import Network
from autoft.network.build import build
from autoft.network.parametrized import is_adapter, plain_name
from autoft.network.sources import Source, in_folder
from autoft.network.stages import stage_of_parameters
from autoft.network.strategy import BoundStrategy, bind, bind_function
from autoft.testing.samples import samples
from autoft.testing.strategies import check_adapter_keeps_features_and_merges
from autoft.training.optim import make_optimizer, set_learning_rates
from autoft.training.recipe import tuning
from autoft.values import Backbone, Part, Rates

MODELS = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"]
SIZE = 64


def plain(model: str) -> Backbone:
    torch.manual_seed(0)
    return build(Source(model, "timm", {"model": model}), pretrained=False, image_size=SIZE)


def lora(backbone: Backbone, **choices) -> BoundStrategy:
    return bind(Part("lora", {"rank": 4, **choices}), len(backbone.stages))


def features(backbone: Backbone, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return backbone.module.eval()(batch)


def images(count: int = 2, size: int = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def perturb(module: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_adapter(name):
                parameter.add_(0.1 * torch.randn(parameter.shape))


def train_a_little(net: Network, batch: torch.Tensor) -> None:
    how = tuning(lr=1e-2, weight_decay=0.3)
    optimizer = make_optimizer(net, how)
    for step in range(3):
        set_learning_rates(optimizer, net, how, 0.2 + step / 10)
        net.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()


@pytest.mark.parametrize("model", MODELS)
def test_features_are_bit_equal_at_the_start(model) -> None:
    backbone = plain(model)
    before = features(backbone, images())
    adapted = adapt(backbone, lora(backbone), image_size=SIZE)
    assert torch.equal(features(adapted, images()), before)
    added = {n for n, _ in adapted.module.named_parameters() if is_adapter(n)}
    assert len(added) >= 20
    assert added <= set(stage_of_parameters(adapted))


@pytest.mark.parametrize("model", MODELS)
def test_adapters_lie_in_the_stage_of_the_weight_that_they_change(model) -> None:
    before = stage_of_parameters(plain(model))
    backbone = plain(model)
    after = stage_of_parameters(adapt(backbone, lora(backbone), image_size=SIZE))
    for name, stage in after.items():
        weight = re.sub(r"\.\d+\.(up|down)$", ".original", name)
        assert before[plain_name(weight)] == stage


@pytest.mark.parametrize("model", MODELS)
def test_only_adapters_move_and_the_rest_is_bit_equal(model) -> None:
    backbone = plain(model)
    for part in backbone.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)  # some start at 0, and let no gradient through
    strategy = lora(backbone, depth=0.5)
    net = Network(adapt(backbone, strategy, image_size=SIZE), nn.Linear(backbone.num_features, 3))
    before = {name: tensor.clone() for name, tensor in net.backbone.state_dict().items()}
    net.set_rates(strategy.rates(0.0), norm_mode="affine")
    train_a_little(net, images(4))
    moved = {n for n, t in net.backbone.state_dict().items() if not torch.equal(t, before[n])}
    live = {n for n, p in net.backbone.named_parameters() if p.requires_grad}
    assert live
    assert moved == live
    assert all(is_adapter(name) for name in moved)
    frozen = sum(rates == Rates(0, 0, 0, 0) for rates in strategy.rates(0.0))
    assert frozen > 0
    assert min(net._stage_of_parameter[name] for name in moved) >= frozen


@pytest.mark.parametrize("model", MODELS)
def test_merged_state_loads_into_a_plain_build(model) -> None:
    backbone = plain(model)
    adapted = adapt(backbone, lora(backbone), image_size=SIZE)
    start = features(adapted, images())
    perturb(adapted.module)
    moved = features(adapted, images())
    assert not torch.allclose(moved, start, rtol=1e-2)
    fresh = plain(model)
    fresh.module.load_state_dict(merged_state(adapted.module))
    assert float((features(fresh, images()) - moved).abs().max()) <= 1e-5 * float(
        moved.abs().max()
    )


def test_merged_values_are_those_of_the_forward_pass_bit_for_bit_also_under_autocast() -> None:
    backbone = plain("test_vit")
    adapted = adapt(backbone, lora(backbone), image_size=SIZE)
    perturb(adapted.module)
    layer = adapted.module.get_submodule("blocks.0.attn.qkv")
    merged = merged_state(adapted.module)["blocks.0.attn.qkv.weight"]
    assert not merged.requires_grad
    assert torch.equal(layer.weight, merged)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, merged)


def test_merged_state_of_what_has_no_adapters_is_its_state() -> None:
    module = nn.Sequential(weight_norm(nn.Linear(32, 32)), nn.BatchNorm1d(32))
    state = module.state_dict()
    merged = merged_state(module)
    assert list(merged) == list(state)
    assert all(torch.equal(merged[name], state[name]) for name in state)


def test_merged_state_reaches_through_a_whole_network() -> None:
    backbone = plain("test_resnet")
    names = set(Network(plain("test_resnet"), nn.Linear(backbone.num_features, 3)).state_dict())
    adapted = adapt(backbone, lora(backbone), image_size=SIZE)
    net = Network(adapted, nn.Linear(backbone.num_features, 3))
    assert set(merged_state(net)) == names


def test_copies_and_channels_last_compute_the_same() -> None:
    backbone = plain("test_resnet")
    adapted = adapt(backbone, lora(backbone), image_size=SIZE)
    perturb(adapted.module)
    expected = features(adapted, images())
    twin = copy.deepcopy(adapted.module).eval()
    perturb(adapted.module)
    with torch.no_grad():
        assert torch.equal(twin(images()), expected)
        twin.to(memory_format=torch.channels_last)
        again = twin(images().contiguous(memory_format=torch.channels_last))
    assert torch.allclose(again, expected, rtol=1e-4, atol=1e-5)
    wide = [m for m in twin.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    last = torch.channels_last
    assert all(layer.weight.is_contiguous(memory_format=last) for layer in wide)


def test_one_seed_gives_one_set_of_adapters_and_the_check_draws_nothing() -> None:
    def build_once() -> dict[str, torch.Tensor]:
        backbone = plain("test_resnet")
        torch.manual_seed(7)
        return adapt(backbone, lora(backbone), image_size=SIZE).module.state_dict()

    first, second = build_once(), build_once()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(7)
    direct = low_rank(plain_kept_seed(), rank=4).module.state_dict()
    assert all(torch.equal(first[name], direct[name]) for name in first)


def plain_kept_seed() -> Backbone:
    with torch.random.fork_rng(devices=[]):
        return plain("test_resnet")


def test_alpha_scales_the_change_by_alpha_over_rank() -> None:
    weight = torch.zeros(32, 16, 3, 3)
    change = LowRank(weight, 4, 10.0 / 4)
    with torch.no_grad():
        change.up.normal_()
    expected = 2.5 * (change.up @ change.down).view(32, 16, 3, 3)
    assert torch.allclose(change(weight), expected, atol=1e-6)


def test_depthwise_tiny_tied_and_parametrized_weights_are_left_alone() -> None:
    module = nn.Module()
    module.usual = nn.Conv2d(32, 32, 3)
    module.depthwise = nn.Conv2d(32, 32, 3, groups=32)
    module.tiny = nn.Linear(4, 32)
    module.tied, module.twin = nn.Linear(32, 32), nn.Linear(32, 32)
    module.twin.weight = module.tied.weight
    module.own = weight_norm(nn.Linear(32, 32))
    low_rank(Backbone(module, [["usual"]], num_features=1), rank=4)
    added = {name for name, _ in module.named_parameters() if is_adapter(name)}
    assert added == {f"usual.parametrizations.weight.0.{which}" for which in ("down", "up")}


def test_attention_of_torch_is_adapted_in_its_joint_projection() -> None:
    _, transformer = samples()
    low_rank(transformer, rank=4)
    names = {name for name, _ in transformer.module.named_parameters()}
    assert "layers.0.self_attn.parametrizations.in_proj_weight.0.up" in names
    assert "layers.0.self_attn.out_proj.parametrizations.weight.0.up" in names


def test_rank_that_no_layer_can_hold_is_the_users_to_change() -> None:
    backbone = Backbone(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), [["0"]], num_features=4)
    with pytest.raises(UsageError, match=r"large enough for adapters of rank 16. Choose a small"):
        low_rank(backbone, rank=16)


def test_strategy_without_adapter_leaves_the_backbone_as_it_is() -> None:
    backbone = plain("test_resnet")
    assert adapt(backbone, bind(Part("full"), len(backbone.stages))) is backbone


def test_modes_are_kept() -> None:
    backbone = plain("test_resnet")
    backbone.module.train()
    backbone.module.bn1.eval()
    adapted = adapt(backbone, lora(backbone), image_size=SIZE)
    assert adapted.module.training
    assert not adapted.module.bn1.training


@pytest.mark.parametrize(
    ("name", "added", "plainly"),
    [
        ("conv.parametrizations.weight.original", False, "conv.weight"),
        ("conv.parametrizations.weight.0.up", True, "conv.parametrizations.weight.0.up"),
        ("parametrizations.cls_token.original", False, "cls_token"),
        ("parametrizations.cls_token.0.scale", True, "parametrizations.cls_token.0.scale"),
        ("a.parametrizations.weight.original0", False, "a.parametrizations.weight.original0"),
        ("conv.weight", False, "conv.weight"),
    ],
)
def test_names_of_parametrized_tensors(name, added, plainly) -> None:
    assert (is_adapter(name), plain_name(name)) == (added, plainly)


# --- adapters of others, and broken ones --------------------------------------------------------


class Scale(nn.Module):
    """Multiply a tensor by a number that starts at `at`."""

    def __init__(self, at: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(at))

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.scale


class Idle(Scale):
    """Have a parameter and do nothing with it."""

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()


def on_every_norm(backbone: Backbone, change=Scale) -> Backbone:
    for part in list(backbone.module.modules()):
        if isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
            register_parametrization(part, "weight", change())
            register_parametrization(part, "bias", change())
    return backbone


def on_the_root(backbone: Backbone) -> Backbone:
    tensors = ("cls_token", "positions")
    on_every_norm(backbone)
    for name in tensors:
        if hasattr(backbone.module, name):
            register_parametrization(backbone.module, name, Scale())
    return backbone


def shouting(backbone: Backbone) -> Backbone:
    return on_every_norm(backbone, lambda: Scale(1.5))


def idle(backbone: Backbone) -> Backbone:
    return on_every_norm(backbone, Idle)


def nothing(backbone: Backbone) -> Backbone:
    return backbone


def extra_module(backbone: Backbone) -> Backbone:
    backbone.module.extra = nn.Linear(2, 2)
    backbone = Backbone(backbone.module, [*backbone.stages, ["extra"]], backbone.num_features)
    return on_every_norm(backbone)


def by_hook(backbone: Backbone) -> Backbone:
    on_every_norm(backbone)
    scales = [p for n, p in backbone.module.named_parameters() if is_adapter(n)]
    backbone.module.register_forward_hook(lambda module, args, out: out * scales[0])
    return backbone


def falls_over(backbone: Backbone) -> Backbone:
    raise ValueError("no such layer")


def returns_module(backbone: Backbone) -> nn.Module:
    return backbone.module


def unsuited(backbone: Backbone) -> Backbone:
    raise UsageError("No layer is large enough. Choose a smaller rank.")


not_a_function = 3


def using(adapter: str, rates: float = 1.0):
    """Return a strategy that states `adapter`, by the name it has in this module."""

    def strategy(num_stages, progress, *, adapter=f"{__name__}:{adapter}"):
        return [Rates(0.0, 0.0, 0.0, rates)] * num_stages

    return strategy


@pytest.mark.parametrize("adapter", [on_every_norm, on_the_root])
def test_adapter_of_others_is_any_parametrization(adapter) -> None:
    check_adapter_keeps_features_and_merges(using(adapter.__name__))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("shouting", "changes the features of the backbone at the start"),
        ("idle", "do not depend on what the adapter"),
        ("nothing", "added no parameter to this backbone by torch.nn.utils"),
        ("extra_module", r"cannot be merged away: it added, .*\['extra.bias', 'extra.weight'\]"),
        ("by_hook", "Merged into a plain network, .* gives other features"),
        ("falls_over", "failed: ValueError: no such layer"),
        ("returns_module", "returned a (Sequential|Transformer); an autoft.Backbone was expected"),
        ("unsuited", "No layer is large enough"),
        ("not_a_function", "is a int; a function was expected"),
        ("missing", "cannot be imported: AttributeError"),
    ],
)
def test_check_of_adapters_fails_for_a_broken_one(adapter, message) -> None:
    with pytest.raises(AssertionError, match=message):
        check_adapter_keeps_features_and_merges(using(adapter))


def test_check_of_adapters_fails_where_they_are_never_trained() -> None:
    with pytest.raises(AssertionError, match=r"adds the adapter .* and never trains it"):
        check_adapter_keeps_features_and_merges(using("on_every_norm", rates=0.0))


@pytest.mark.parametrize("name", ["no_such_package.adapters:low_rank", "nonsense", ":", "os:nope"])
def test_adapter_that_is_nowhere_is_one_sentence(name) -> None:
    backbone = plain("test_resnet")

    def strategy(num_stages, progress, *, adapter=name):
        return [1.0] * num_stages

    bound = bind_function(strategy, Part("mine"), len(backbone.stages))
    with pytest.raises(
        PluginError, match=r"'package.module:function'|function was expect"
    ) as info:
        adapt(backbone, bound, image_size=SIZE)
    assert f"The adapter '{name}' of the strategy 'mine'" in str(info.value)
    assert "\n" not in str(info.value)


def test_adapter_on_what_is_parametrized_already_is_refused() -> None:
    module = nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(48, 8)))
    backbone = Backbone(module, [["1"]], num_features=8, image_size=4)

    def strategy(num_stages, progress, *, adapter=f"{__name__}:twice"):
        return [1.0] * num_stages

    with pytest.raises(PluginError, match="to tensors that have none yet"):
        adapt(backbone, bind_function(strategy, Part("mine"), 1))


def twice(backbone: Backbone) -> Backbone:
    register_parametrization(backbone.module[1], "weight", Scale())
    return backbone


def test_adapter_of_the_plugin_page_conforms(tmp_path, monkeypatch) -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "plugins.md"
    blocks = re.findall(
        r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    (text,) = (block for block in blocks if "def scale_rows(" in block)
    (tmp_path / "page_adapters.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def strategy(num_stages, progress, *, adapter="page_adapters:scale_rows"):
        return [Rates(0.0, 0.0, 0.0, 1.0)] * num_stages

    check_adapter_keeps_features_and_merges(strategy)


@pytest.mark.shared
def test_lora_on_real_weights(shared_root) -> None:
    source = in_folder(shared_root / "weights")[0]["mobilenetv2_100.in1k"]
    backbone = build(source, image_size=96)
    before = features(backbone, images(size=96))
    strategy = bind(Part("lora"), len(backbone.stages))
    adapted = adapt(backbone, strategy, image_size=96)
    assert torch.equal(features(adapted, images(size=96)), before)
    net = Network(adapted, nn.Linear(backbone.num_features, 3))
    net.set_rates(strategy.rates(0.0), norm_mode="affine")
    base = {n: t.clone() for n, t in net.backbone.state_dict().items() if not is_adapter(n)}
    train_a_little(net, images(4, size=96))
    moved = features(adapted, images(size=96))
    assert all(torch.equal(net.backbone.state_dict()[name], base[name]) for name in base)
    fresh = build(source, image_size=96)
    fresh.module.load_state_dict(merged_state(net.backbone))
    difference = float((features(fresh, images(size=96)) - moved).abs().max())
    assert difference <= 1e-5 * float(moved.abs().max())
    assert not torch.allclose(moved, before)
