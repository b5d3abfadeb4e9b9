"""A number format is chosen where it wins clearly, and the network is otherwise left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from autoft.network.pooling import Pooling
from autoft.training import precision, rank, speeds
from autoft.training.job import Precision, Setup
from autoft.training.precision import PLAIN, Timed, _Lane, _Span, choose, name_of

CPU = torch.device("cpu")
LAST, BF16 = Precision(channels_last=True), Precision(bf16=True, channels_last=True)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Flatten())


def lane(how: Precision, step: float, forward: float = 1.0, processors: float = 0.0) -> _Lane:
    """A lane whose first run, which warms up, took long."""
    made = _Lane(nn.Identity(), how, torch.zeros(8, 3, 4, 4))
    spent = _Span(step, processors or step)
    made.steps, made.forwards = [_Span(99, 99), spent], [_Span(99, 99), _Span(forward, forward)]
    return made


@pytest.mark.parametrize(
    ("lanes", "wanted"),
    [
        ([lane(PLAIN, 1.0), lane(LAST, 0.97), lane(BF16, 0.95)], PLAIN),
        ([lane(PLAIN, 1.0), lane(LAST, 0.90), lane(BF16, 0.95)], LAST),
        ([lane(PLAIN, 1.0), lane(LAST, 0.90), lane(BF16, 0.60)], BF16),
        ([lane(PLAIN, 1.0), lane(LAST, 0.90), lane(BF16, 0.60, forward=1.2)], LAST),
        ([lane(PLAIN, 1.0), lane(LAST, 0.70, processors=1.0)], PLAIN),
        ([lane(PLAIN, 1.0), lane(LAST, 1.5), lane(BF16, 3.0)], PLAIN),
        ([lane(PLAIN, 1.0)], PLAIN),
    ],
    ids=["close", "clear", "bf16", "slow-forward", "by-chance", "slower", "alone"],
)
def test_another_format_must_win_clearly(lanes, wanted) -> None:
    assert precision._fastest(lanes).precision == wanted


def test_what_is_chosen_is_the_layout_of_the_network_and_nothing_else_changes() -> None:
    module = small().train()
    module[1].eval()
    module[0].weight.requires_grad_(False)
    module[1].weight.grad = torch.ones(8)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.manual_seed(7)
    timed = choose(module, 16, CPU)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert all(torch.equal(before[name], now) for name, now in module.state_dict().items())
    assert [each.training for each in module] == [True, False, True, True, True, True]
    assert not module[0].weight.requires_grad
    assert module[0].bias.requires_grad
    assert torch.equal(module[1].weight.grad, torch.ones(8))
    assert module[0].bias.grad is None
    assert module[0].weight.is_contiguous(memory_format=precision.memory_format(timed.precision))
    assert timed.trained_per_second == pytest.approx(
        timed.timings[name_of(timed.precision)], abs=0.01
    )
    assert set(timed.timings) <= {"fp32", "fp32 channels_last", "bf16 channels_last"}
    module[0].bias.requires_grad_(True)
    module(torch.zeros(2, 3, 16, 16)).sum().backward()  # it can still be trained


@pytest.mark.parametrize("wanted", [PLAIN, LAST, BF16], ids=name_of)
def test_the_network_is_left_in_each_format(wanted, monkeypatch) -> None:
    monkeypatch.setattr(
        precision, "_fastest", lambda lanes: next(e for e in lanes if e.precision == wanted)
    )
    module = small()
    assert choose(module, 16, CPU).precision == wanted
    weight = module[0].weight
    assert weight.is_contiguous(memory_format=precision.memory_format(wanted))
    assert weight.is_contiguous() == (not wanted.channels_last)


class OnlyFp32(nn.Module):
    """A network that has an operation without bf16, as some have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("\"an_operation\" not implemented for 'BFloat16'")
        return self.inner(images)


def test_a_format_that_the_network_cannot_run_in_is_left_out() -> None:
    assert set(choose(OnlyFp32(), 16, CPU).timings) == {"fp32", "fp32 channels_last"}


class Hungry(nn.Module):
    """A network that needs more memory than there is for more than two images."""

    def __init__(self, error: str) -> None:
        super().__init__()
        self.inner, self.error = small(), error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 2:
            raise RuntimeError(self.error)
        return self.inner(images)


def test_t06_a_batch_that_does_not_fit_is_timed_smaller() -> None:
    told = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    assert choose(Hungry(told), 16, CPU).trained_per_second > 0
    with pytest.raises(RuntimeError, match="shapes differ"):
        choose(Hungry("shapes differ"), 16, CPU)


@pytest.fixture
def setup(photos, tiny_sources, setup_in, tmp_path, monkeypatch) -> Setup:
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))
    return setup_in(photos, tiny_sources, tmp_path)


def test_a_second_data_set_does_not_time_again(setup, monkeypatch) -> None:
    name = "test_resnet.fixed"
    first = rank.rank_backbone(setup, name, lambda *_: None)
    assert first.error == ""
    assert first.timings["fp32"] > 0

    def again(*_: object, **__: object) -> Timed:
        raise AssertionError("it was timed again")

    monkeypatch.setattr(speeds, "choose", again)
    monkeypatch.setattr(speeds, "forward_per_second", lambda *_: first.images_per_second)
    fewer = replace(setup, train=setup.train.take(slice(0, 30)))
    second = rank.rank_backbone(fewer, name, lambda *_: None)
    assert second.error == ""
    assert second.precision == first.precision
    assert second.timings == first.timings
    assert second.trained_per_second == first.trained_per_second
    larger = replace(setup, threads=2)
    assert "it was timed again" in rank.rank_backbone(larger, name, lambda *_: None).error


def test_ranking_leaves_the_statistics_of_the_network_as_they_were(setup, monkeypatch) -> None:
    seen: dict[str, torch.Tensor] = {}
    plain = rank.pooled_features

    def watched(module: Pooling, *arguments: object, **more: object) -> object:
        seen.update({name: t.clone() for name, t in module.backbone.state_dict().items()})
        return plain(module, *arguments, **more)

    monkeypatch.setattr(rank, "pooled_features", watched)
    rank.rank_backbone(setup, "test_resnet.fixed", lambda *_: None)
    original = rank.built(setup, "test_resnet.fixed").module.state_dict()
    assert all(torch.equal(seen[name], tensor) for name, tensor in original.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_compiling_is_tried_for_long_trials_alone() -> None:
    device = torch.device("cuda:0")
    short = choose(small().to(device), 32, device, images_in_a_trial=10)
    assert not any("compiled" in name for name in short.timings)
    long = choose(small().to(device), 32, device, images_in_a_trial=10**12)
    assert long.trained_per_second > 0
