"""Averages, sharpness, anchors, schedules, rates: each does to the weights what it says."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from autoft.data.cache import files
from autoft.network.assemble import Network
from autoft.network.build import build
from autoft.network.family import is_transformer
from autoft.network.sources import Source
from autoft.training import checkpoint, recipe
from autoft.training.average import Average
from autoft.training.gradients import relative_norms
from autoft.training.job import TrialJob
from autoft.training.optim import can_fuse, make_optimizer, schedule, set_learning_rates, take
from autoft.training.recipe import SGD_FACTOR, TRANSFORMER_FACTOR, tuning
from autoft.training.sharpness import sharpness_aware
from autoft.values import Part, TrialConfig


def network(model: str = "test_resnet") -> Network:
    torch.manual_seed(0)
    backbone = build(Source(model, "timm", {"model": model}), pretrained=False)
    return Network(backbone, nn.Linear(backbone.num_features, 3))


def images(model: str = "test_resnet") -> torch.Tensor:
    return torch.randn(
        4, 3, 160 if model == "test_vit" else 64, 160 if model == "test_vit" else 64
    )


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- schedules and rates ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_a_schedule_warms_up_and_ends_at_0(name) -> None:
    curve = [schedule(name, step / 1000) for step in range(1000)]
    assert curve[0] == pytest.approx(0.1)
    assert max(curve) == pytest.approx(1.0, abs=0.02)
    assert curve[-1] < 0.01
    top = curve.index(max(curve))
    assert all(a <= b for a, b in itertools.pairwise(curve[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(curve[top:]))


def test_wsd_is_stable_until_it_decays() -> None:
    assert {schedule("wsd", step / 100) for step in range(10, 80)} == {1.0}
    assert schedule("wsd", 0.9) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("model", "transformer"),
    [
        ("test_resnet", False),
        ("test_vit", True),
        ("test_convnext", False),
        ("test_efficientnet", False),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_rate_goes_by_optimiser_and_family(model, transformer, optimizer) -> None:
    net = network(model)
    assert net.transformer is is_transformer(net.backbone) is transformer
    how = tuning(lr=1e-3, head_lr=2e-3, optimizer=optimizer)
    made = make_optimizer(net, how)
    net.set_rates([1.0] * net.num_stages)
    set_learning_rates(made, net, how, 0.1)
    factor = SGD_FACTOR if optimizer == "sgd" else 1.0
    body = {g["lr"] for g in made.param_groups if g["stage"] >= 0}
    head = {g["lr"] for g in made.param_groups if g["stage"] < 0}
    assert list(head) == [pytest.approx(2e-3 * factor)]
    family = TRANSFORMER_FACTOR if transformer else 1.0
    assert all(rate == pytest.approx(1e-3 * factor * family) for rate in body)
    if optimizer == "sgd":
        assert all(g["nesterov"] and g["momentum"] == 0.9 for g in made.param_groups)


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_is_the_same_however_weights_lie_in_memory(optimizer, tmp_path) -> None:
    how = tuning(lr=1e-2, head_lr=1e-2, optimizer=optimizer)
    nets = [network(), network().to(memory_format=torch.channels_last), network()]
    made = [make_optimizer(net, how) for net in nets]
    made[2] = _by_loops(made[2])
    for number in range(4):
        torch.manual_seed(number)
        for net, each in zip(nets, made, strict=True):
            _gradients(net, number)
            take(each)
        if number == 1:  # it goes on with what was written, which lies another way
            checkpoint.save_last(tmp_path, nets[1], made[1], checkpoint.State(2), {})
            nets[1] = network().to(memory_format=torch.channels_last)
            made[1] = make_optimizer(nets[1], how)
            checkpoint.load_last(tmp_path, nets[1], made[1])
    plain = nets[2].state_dict()
    for net in nets[:2]:
        for name, tensor in net.state_dict().items():
            torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5)


def test_weights_with_gaps_between_them_are_not_stepped_through() -> None:
    whole = torch.zeros(4, 6)
    assert can_fuse([whole, whole.T, whole.view(4, 6, 1, 1)])
    assert not can_fuse([whole, whole[:, :3]])
    assert not can_fuse([whole.to(torch.complex64)])


def test_weights_that_share_memory_are_kept_apart(tmp_path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    net[1].weight = net[0].weight
    whole = torch.arange(8.0)
    net.register_buffer("part", whole[:4])
    net.register_buffer("rest", whole[4:])
    checkpoint.save_scored(tmp_path, net)
    for name, tensor in load_file(tmp_path / checkpoint.SCORED).items():
        assert torch.equal(tensor, net.state_dict()[name]), name


def test_what_weights_are_of_is_on_the_disk_before_them(tmp_path, monkeypatch) -> None:
    synced: list[tuple[str, bool]] = []

    def sync(path) -> None:
        if path.is_file():
            synced.append((path.name, (tmp_path / checkpoint.SCORED).exists()))

    monkeypatch.setattr(checkpoint, "sync_to_disk", sync)
    monkeypatch.setattr(files.os, "fsync", lambda _: synced.append(("", False)))
    config = TrialConfig(Part("a"), Part("full"), Part("linear"), {}, seed=0)
    job = TrialJob(0, config, 1, 0.0)
    checkpoint.start(tmp_path, job, pretrained=True)
    assert synced == []
    checkpoint.save_scored(tmp_path, torch.nn.Linear(2, 2))
    assert synced[0] == ("config.json", False)
    checkpoint.save_scored(tmp_path, torch.nn.Linear(2, 2))
    assert [name for name, _ in synced if name] == ["config.json"]
    synced.clear()
    checkpoint.start(tmp_path, job, pretrained=True)  # it goes on: what was kept stays kept
    assert synced


def _by_loops(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the same optimiser in torch's plain form."""
    groups = [{**group, "fused": False} for group in optimizer.param_groups]
    return type(optimizer)(groups, lr=1e-2)


def _gradients(net: Network, seed: int) -> None:
    """Fill in gradients that are the same for all networks, however their weights lie."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


# --- norm modes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "statistics", "scales"),
    [("frozen", False, False), ("affine", False, True), ("train", True, True)],
)
def test_a_norm_mode_moves_what_it_says(mode, statistics, scales) -> None:
    net = network()
    net.set_rates([1.0] * net.num_stages, norm_mode=mode)
    net.train()
    before = state_of(net.backbone)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    nn.functional.cross_entropy(net(images()), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    after = net.backbone.state_dict()
    norms = [n for n, m in net.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        same = torch.equal(after[f"{norm}.running_mean"], before[f"{norm}.running_mean"])
        assert same is not statistics
        same = torch.equal(after[f"{norm}.weight"], before[f"{norm}.weight"])
        assert same is not scales
    assert not torch.equal(after["layer4.0.conv1.weight"], before["layer4.0.conv1.weight"])


# --- average ------------------------------------------------------------------------------------


def test_an_average_follows_its_definition_and_frozen_tensors_stay_bit_equal() -> None:
    net = network()
    average = Average(net, steps=100)  # decay 0.9 once it is warm
    weights = [net.head.weight.detach().clone()]
    expected = weights[0]
    start = state_of(net.backbone)
    for step in range(30):
        with torch.no_grad():
            net.head.weight.add_(torch.randn_like(net.head.weight))
        average.update(net)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net.head.weight.detach()
    last = net.head.weight.detach().clone()
    with average.in_place_of(net):
        assert torch.allclose(net.head.weight, expected, atol=1e-5)
        assert equal(start, net.backbone.state_dict())
    assert torch.equal(net.head.weight, last)


def test_an_average_goes_on_from_its_state() -> None:
    net = network()
    first, second = Average(net, 50), Average(net, 50)
    for _ in range(5):
        with torch.no_grad():
            net.head.weight.mul_(0.9)
        first.update(net)
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    with torch.no_grad():
        net.head.weight.mul_(0.5)
    first.update(net)
    second.update(net)
    assert equal(first.state(), second.state())


# --- sharpness ----------------------------------------------------------------------------------


def test_sharpness_takes_the_gradient_uphill_and_comes_back() -> None:
    layer = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.fill_(2.0)

    def gradients() -> torch.Tensor:
        layer.zero_grad()
        loss = (layer.weight**2).sum()  # gradient 2 w: at w + 0.1 it is 2 (w + 0.1)
        loss.backward()
        return loss.detach()

    loss = sharpness_aware(layer, 0.1, gradients)()
    assert float(loss) == pytest.approx(4.0)
    assert layer.weight.grad.item() == pytest.approx(2 * 2.1)
    assert layer.weight.item() == 2.0


def test_sharpness_updates_batch_statistics_once() -> None:
    batch, labels = images(), torch.tensor([0, 1, 2, 0])
    plain, sharp = network(), network()
    for net in (plain, sharp):
        net.set_rates([1.0] * net.num_stages, norm_mode="train")
        net.train()

        def gradients(net=net) -> torch.Tensor:
            net.zero_grad()
            loss = nn.functional.cross_entropy(net(batch), labels)
            loss.backward()
            return loss.detach()

        (sharpness_aware(net, 0.05, gradients) if net is sharp else gradients)()
    buffers = dict(plain.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in sharp.named_buffers())
    flags = [m.track_running_stats for m in sharp.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(flags)
    assert not torch.equal(plain.head.weight.grad, sharp.head.weight.grad)


# --- gradient norms -----------------------------------------------------------------------------


def test_relative_norms_are_those_of_the_gradients_and_leave_no_trace() -> None:
    net, batch, labels = network(), images(), torch.tensor([0, 1, 2, 0])
    rates = [0.0, 0.0, *[1.0] * (net.num_stages - 2)]
    net.set_rates(rates, norm_mode="frozen")
    net.train()
    before, modes = state_of(net), [m.training for m in net.modules()]

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(net(batch), labels)

    def fill() -> torch.Tensor:
        net.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    found = relative_norms(net, [fill, fill])
    assert equal(before, net.state_dict())
    assert modes == [m.training for m in net.modules()]
    assert [r.weights for r in net.rates] == rates
    assert all(p.grad is None for p in net.parameters())
    net.set_rates([1.0] * net.num_stages, norm_mode="affine")
    net.eval()
    loss().backward()
    for stage in range(net.num_stages):
        members = net.groups()[(stage, "weights")]
        gradient = torch.cat([p.grad.flatten() for p in members]).norm()
        weights = torch.cat([p.detach().flatten() for p in members]).norm()
        assert found[stage] == pytest.approx(float(gradient / weights), rel=1e-4)


# --- smaller images ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "scale", "epochs", "sizes"),
    [
        (224, 0.7, 8, [160] * 6 + [224] * 2),
        (224, 0.7, 1, [224]),
        (224, 1.0, 3, [224] * 3),
        (128, 0.7, 4, [96] * 3 + [128]),
        (64, 0.7, 2, [64, 64]),
        (32, 0.7, 2, [32, 32]),
    ],
)
def test_the_last_epochs_see_images_whole(size, scale, epochs, sizes) -> None:
    assert [recipe.size_in(size, scale, epoch, epochs) for epoch in range(epochs)] == sizes


def test_the_pixels_of_a_trial_are_known_beforehand() -> None:
    assert recipe.area(1.0) == 1.0
    sides = [recipe.size_in(224, 0.7, epoch, 10) for epoch in range(10)]
    assert recipe.area(0.7) == pytest.approx(sum(s**2 for s in sides) / 10 / 224**2, rel=0.05)
