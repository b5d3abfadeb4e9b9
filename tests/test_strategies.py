"""Strategies are arithmetic: lists of numbers in, no torch."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest

from autoft.strategies import freezing
from autoft.values import Rates


def test_strategies_need_no_torch() -> None:
    code = "import sys, autoft.strategies.freezing; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_head_only_freezes_everything() -> None:
    assert freezing.head_only(4, 0.5) == [0.0] * 4


@pytest.mark.parametrize(
    ("depth", "frozen"), [(0.1, 0), (0.25, 1), (0.5, 2), (0.75, 3), (0.95, 3)]
)
def test_freeze_depth_is_a_share_of_stages_and_leaves_one(depth, frozen) -> None:
    rates = freezing.freeze(4, 0.0, depth=depth, decay=0.5)
    assert rates[:frozen] == [0.0] * frozen
    assert rates[frozen:] == [0.5 ** (3 - i) for i in range(frozen, 4)]


@pytest.mark.parametrize("stages", [1, 2, 5, 24])
def test_full_has_the_same_two_ends_at_every_depth(stages) -> None:
    rates = freezing.full(stages, 0.0)
    assert rates[-1] == 1.0
    assert rates[0] == pytest.approx(0.1 if stages > 1 else 1.0)
    ratios = [b / a for a, b in pairwise(rates)]
    assert ratios == pytest.approx(ratios[:1] * len(ratios))


def test_gradual_thaws_from_the_last_stage_down() -> None:
    frozen = [
        sum(rate == 0 for rate in freezing.gradual(4, progress / 10, until=0.6))
        for progress in range(10)
    ]
    assert frozen == sorted(frozen, reverse=True)
    assert frozen[0] == 3
    assert frozen[6] == frozen[9] == 0


def test_probe_then_tune_changes_once() -> None:
    assert freezing.probe_then_tune(3, 0.29, probe=0.3) == [0.0] * 3
    assert freezing.probe_then_tune(3, 0.3, probe=0.3) == pytest.approx([0.1, 0.1**0.5, 1.0])


def test_norm_bias_keeps_every_other_weight() -> None:
    assert freezing.norm_bias(2, 0.0) == [Rates(0.0, 1.0, 1.0)] * 2


def test_scratch_says_that_it_starts_from_random_weights() -> None:
    from autoft.space import read_signature

    fixed = {p.name: p.default for p in read_signature(freezing.scratch)}
    assert fixed == {"pretrained": False}
    assert freezing.scratch(2, 0.9) == [1.0, 1.0]
