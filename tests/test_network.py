"""Freezing is provably what it says: bit-equal weights and buffers, exact rates, no decay."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from autoft.errors import PluginError
from autoft.network.assemble import Network
from autoft.network.build import build
from autoft.network.sources import Source
from autoft.network.stages import stage_of_modules, stage_of_parameters
from autoft.network.strategy import bind
from autoft.training.optim import HEAD, make_optimizer, set_learning_rates
from autoft.training.recipe import TRANSFORMER_FACTOR, tuning
from autoft.values import Backbone, Part, Rates

SMALL = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet"]


def source(model: str) -> Source:
    return Source(model, "timm", {"model": model})


def network(model: str) -> Network:
    torch.manual_seed(0)
    backbone = build(source(model), pretrained=False)
    return Network(backbone, nn.Linear(backbone.num_features, 3))


def images(of: Network, model: str) -> torch.Tensor:
    size = timm.create_model(model).pretrained_cfg["input_size"][-1]
    return torch.randn(4, 3, size, size)


def train_a_little(net: Network, batch: torch.Tensor, optimizer_name: str = "adamw") -> None:
    how = tuning(lr=1e-2, weight_decay=0.3, optimizer=optimizer_name)
    optimizer = make_optimizer(net, how)
    for step in range(3):
        set_learning_rates(optimizer, net, how, 0.2 + step / 10)
        net.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_stages_and_their_buffers_stay_bit_equal(model, optimizer) -> None:
    net = network(model)
    batch = images(net, model)
    cut = net.num_stages // 2
    net.set_rates([1.0] * net.num_stages)
    train_a_little(net, batch, optimizer)  # so that momentum exists before the freeze
    before = {name: tensor.clone() for name, tensor in net.backbone.state_dict().items()}
    net.set_rates([0.0] * cut + [1.0] * (net.num_stages - cut))
    train_a_little(net, batch, optimizer)
    frozen = {n for n, s in net._stage_of_parameter.items() if s < cut}
    modules = {n for n, s in net._stage_of_module.items() if s < cut}
    moved = {n for n, t in net.backbone.state_dict().items() if not torch.equal(t, before[n])}
    buffers = {n for n in before if n.rpartition(".")[0] in modules}
    assert not moved & (frozen | buffers)
    thawed = set(net._stage_of_parameter) - frozen
    assert len(moved & thawed) > 0.9 * len(thawed)


def test_momentum_of_a_stage_frozen_in_mid_run_does_not_move_it() -> None:
    net = network("test_resnet")
    batch = images(net, "test_resnet")
    how = tuning(lr=1e-2, weight_decay=0.3, optimizer="sgd")
    optimizer = make_optimizer(net, how)

    def step() -> None:
        set_learning_rates(optimizer, net, how, 0.2)
        optimizer.zero_grad()
        net.train()
        nn.functional.cross_entropy(net(batch), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()

    step()
    net.set_rates([0.0] * net.num_stages)
    before = {name: tensor.clone() for name, tensor in net.backbone.state_dict().items()}
    step()
    assert all(torch.equal(t, before[n]) for n, t in net.backbone.state_dict().items())


def test_fixed_norm_statistics_stay_while_their_scales_train() -> None:
    net = network("test_resnet")
    net.set_rates([1.0] * net.num_stages, norm_mode="affine")
    before = {name: tensor.clone() for name, tensor in net.backbone.state_dict().items()}
    train_a_little(net, images(net, "test_resnet"))
    after = net.backbone.state_dict()
    assert torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])
    assert not torch.equal(after["bn1.weight"], before["bn1.weight"])


def test_norm_bias_moves_norms_and_biases_alone() -> None:
    net = network("test_vit")
    before = {name: tensor.clone() for name, tensor in net.backbone.state_dict().items()}
    net.set_rates([Rates(0.0, 1.0, 1.0)] * net.num_stages)
    train_a_little(net, images(net, "test_vit"))
    moved = {n for n, t in net.backbone.state_dict().items() if not torch.equal(t, before[n])}
    assert moved
    assert {net._kind[name] for name in moved} == {"norms", "biases"}


@pytest.mark.parametrize("model", SMALL)
def test_rates_reach_exactly_the_declared_parameters(model) -> None:
    net = network(model)
    rates = [0.0, *(1 / 2**i for i in range(net.num_stages - 1))]
    net.set_rates(rates)
    how = tuning(lr=1e-3, head_lr=5e-3, weight_decay=0.1)
    optimizer = make_optimizer(net, how)
    set_learning_rates(optimizer, net, how, 0.1)  # warm-up is over: the factor is 1
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(net.parameters()))
    of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in net.backbone.named_parameters():
        group = of[id(parameter)]
        stage = net._stage_of_parameter[name]
        family = TRANSFORMER_FACTOR if net.transformer else 1.0
        assert group["lr"] == pytest.approx(1e-3 * rates[stage] * family)
        assert parameter.requires_grad == (rates[stage] > 0)
        assert group["weight_decay"] == (0.1 if net._kind[name] == "weights" else 0.0)
    for parameter in net.head.parameters():
        assert of[id(parameter)]["stage"] == HEAD
        assert of[id(parameter)]["lr"] == pytest.approx(5e-3)


def test_a_module_that_spans_stages_belongs_to_none() -> None:
    module = nn.Module()
    module.shared = nn.Linear(2, 2)
    module.a = nn.Sequential(module.shared, nn.ReLU())
    module.b = nn.Sequential(nn.Linear(2, 2), nn.Sequential(module.shared, nn.Dropout()))
    stages = {"shared.weight": 0, "shared.bias": 0, "b.0.weight": 1, "b.0.bias": 1}
    owned = stage_of_modules(Backbone(module, (("shared",), ("b.0",)), 2), stages)
    assert owned == {"shared": 0, "a": 0, "a.1": 0, "b.0": 1, "b.1": 0, "b.1.1": 0}


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([["conv1", "bn1"], ["layer1", "layer2", "layer3"]], "No stage names"),
        ([["conv1", "bn1", "layer1"], ["layer1", "layer2", "layer3", "layer4"]], "two stages"),
        ([["conv1", "bn1", "layr1"], ["layer1", "layer2", "layer3", "layer4"]], "neither"),
        ([["conv1", "bn1"], [], ["layer1", "layer2", "layer3", "layer4"]], "hold no parameter"),
    ],
)
def test_stages_that_are_no_partition_are_refused(stages, words) -> None:
    module = timm.create_model("resnet18", num_classes=0)
    with pytest.raises(PluginError, match=words):
        stage_of_parameters(Backbone(module, stages, 512))


@pytest.mark.parametrize("rates", [[1.0], [1.0] * 9, [-1.0] * 5, [float("nan")] * 5])
def test_impossible_rates_are_refused(rates) -> None:
    with pytest.raises(PluginError):
        network("test_resnet").set_rates(rates)


def test_a_strategy_is_known_to_train_the_backbone_or_not() -> None:
    assert not bind(Part("head_only"), 5).trains_backbone()
    assert bind(Part("probe_then_tune"), 5).trains_backbone()
    assert not bind(Part("scratch"), 5).pretrained


def test_scales_outside_of_norms_are_treated_as_norms() -> None:
    kinds = network("test_convnext")._kind
    gammas = [name for name in kinds if name.endswith("gamma")]
    assert gammas
    assert {kinds[name] for name in gammas} == {"norms"}
    assert kinds["stages.0.blocks.0.conv_dw.bias"] == "biases"
    assert kinds["stages.0.blocks.0.norm.bias"] == "norms"
