"""Strategies are arithmetic: lists of numbers in, no torch."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import pytest

from autoft.errors import PluginError, UsageError
from autoft.network.strategy import bind, bind_function
from autoft.plugins import installed
from autoft.space import read_signature, searched
from autoft.strategies import adapted, freezing, measured
from autoft.testing.strategies import check_gradient_norms_may_be_anything
from autoft.values import Part, Rates

DEPTHS = range(1, 25)
BUILT_IN = sorted(plugin.name for plugin in installed("strategy") if plugin.builtin)


@pytest.mark.parametrize("name", BUILT_IN)
def test_only_norm_bias_trains_norms_and_biases_alone(name) -> None:
    assert bind(Part(name), 4).trains_vectors_alone() is (name == "norm_bias")


@pytest.mark.parametrize("module", ["freezing", "measured", "adapted"])
def test_strategies_need_no_torch(module) -> None:
    code = f"import sys, autoft.strategies.{module}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_head_only_freezes_everything() -> None:
    assert freezing.head_only(4, 0.5) == [0.0] * 4


@pytest.mark.parametrize(
    ("depth", "frozen"), [(0.1, 0), (0.25, 1), (0.5, 2), (0.75, 3), (0.95, 3)]
)
def test_freeze_depth_is_a_share_of_stages_and_leaves_one(depth, frozen) -> None:
    rates = freezing.freeze(4, 0.0, depth=depth, bottom=0.25)
    assert rates[:frozen] == [0.0] * frozen
    assert all(rates[frozen:])
    assert rates[frozen] == pytest.approx(0.25 if frozen < 3 else 1.0)
    assert rates[-1] == 1.0


@pytest.mark.parametrize("stages", DEPTHS)
def test_bottom_is_one_thing_in_every_strategy_and_at_every_depth(stages) -> None:
    """The first stage that is trained learns at `bottom` times the last one's rate."""
    for rates in (
        freezing.full(stages, 0.0, bottom=0.02),
        freezing.gradual(stages, 0.99, bottom=0.02),
        freezing.probe_then_tune(stages, 0.99, bottom=0.02),
        freezing.freeze(stages, 0.0, depth=0.5, bottom=0.02),
    ):
        trained = [rate for rate in rates if rate]
        assert trained == rates[len(rates) - len(trained) :]
        assert trained[-1] == 1.0
        assert trained[0] == pytest.approx(0.02 if len(trained) > 1 else 1.0)
        ratios = [above / below for below, above in pairwise(trained)]
        assert ratios == pytest.approx(ratios[:1] * len(ratios))


def test_bottom_has_one_range_wherever_it_is() -> None:
    ranges = [
        searched(read_signature(bind(Part(name), 4).function)).get("bottom") for name in BUILT_IN
    ]
    stated = [range_ for range_ in ranges if range_ is not None]
    assert len(stated) == 4
    assert len(set(stated)) == 1


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
    fixed = {p.name: p.default for p in read_signature(freezing.scratch)}
    assert fixed == {"pretrained": False}
    assert freezing.scratch(2, 0.9) == [1.0, 1.0]


# --- surgical: one run of stages ----------------------------------------------------------------


@pytest.mark.parametrize("stages", DEPTHS)
@pytest.mark.parametrize("width", [0.1, 0.25, 0.6])
def test_surgical_trains_one_run_that_slides_from_the_first_stage_to_the_last(
    stages, width
) -> None:
    starts = []
    for step in range(11):
        rates = freezing.surgical(stages, 0.0, where=step / 10, width=width)
        trained = [index for index, rate in enumerate(rates) if rate]
        assert len(rates) == stages
        assert trained == list(range(trained[0], trained[0] + max(1, round(width * stages))))
        starts.append(trained[0])
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert rates[-1] == 1.0


def test_surgical_reaches_every_stage() -> None:
    reached = {
        freezing.surgical(9, 0.0, where=step / 100, width=0.1).index(1.0) for step in range(101)
    }
    assert reached == set(range(9))


# --- rgn: rates from relative gradient norms ----------------------------------------------------


@pytest.mark.parametrize("stages", DEPTHS)
def test_rgn_trains_everything_alike_before_anything_is_measured(stages) -> None:
    assert measured.rgn(stages, 0.3) == [1.0] * stages


def test_rgn_is_the_share_of_the_largest_norm_whatever_the_unit() -> None:
    assert measured.rgn(3, 0.0, gradient_norms=(0.5, 2.0, 1.0)) == [0.25, 1.0, 0.5]
    assert measured.rgn(3, 0.0, gradient_norms=(5e-9, 2e-8, 1e-8)) == pytest.approx(
        [0.25, 1.0, 0.5]
    )


@pytest.mark.parametrize(
    ("norms", "rates"),
    [
        ((0.0, 0.0, 0.0), [1.0, 1.0, 1.0]),
        ((math.nan, math.nan, math.nan), [1.0, 1.0, 1.0]),
        ((math.nan, 1.0, 2.0), [0.0, 0.5, 1.0]),
        ((math.inf, 1.0, 2.0), [1.0, 0.5, 1.0]),
        ((math.inf, math.inf, math.inf), [1.0, 1.0, 1.0]),
        ((math.nan, math.inf, 0.0), [1.0, 1.0, 1.0]),
        ((0.0, 1.0, 1.0), [0.0, 1.0, 1.0]),
    ],
)
def test_rgn_stays_sane_where_norms_are_odd(norms, rates) -> None:
    assert measured.rgn(3, 0.0, gradient_norms=norms) == rates


def test_bound_strategy_passes_norms_only_to_those_that_ask() -> None:
    rgn, full = bind(Part("rgn"), 2), bind(Part("full", {"bottom": 0.5}), 2)
    assert (rgn.wants_gradients, full.wants_gradients) == (True, False)
    assert [each.weights for each in rgn.rates(0.5, (1.0, 4.0))] == [0.25, 1.0]
    assert [each.weights for each in rgn.rates(0.5)] == [1.0, 1.0]
    assert [each.weights for each in full.rates(0.5, (1.0, 4.0))] == [0.5, 1.0]


def test_norms_of_another_number_of_stages_are_an_error() -> None:
    with pytest.raises(PluginError, match="3 rates for 2 stages"):
        bind(Part("rgn"), 2).rates(0.0, (1.0, 2.0, 3.0))


def falls_over(num_stages, progress, *, gradient_norms=()):
    """Divide by what may be 0."""
    return [norm / max(gradient_norms) for norm in gradient_norms] or [1.0] * num_stages


def lets_nan_through(num_stages, progress, *, gradient_norms=()):
    """Return what was measured."""
    return list(gradient_norms) or [1.0] * num_stages


def needs_norms(num_stages, progress, *, gradient_norms=()):
    """Return nothing for nothing."""
    return [1.0 for _ in gradient_norms]


def invents_norms(num_stages, progress, *, gradient_norms=(1.0,)):
    """State norms that nobody measured."""
    return [1.0] * num_stages


def required_norms(num_stages, progress, *, gradient_norms):
    """State no default."""
    return [1.0] * num_stages


def remembers(num_stages, progress, *, gradient_norms=(), _seen=[]):  # noqa: B006
    """Grow with every call."""
    _seen.append(gradient_norms)
    return [float(len(_seen))] * num_stages


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (falls_over, "ZeroDivisionError"),
        (lets_nan_through, "nan"),
        (needs_norms, "returned 0 rates for 1 stages"),
        (invents_norms, r"default of gradient_norms is \(1.0,\)"),
        (required_norms, "default of gradient_norms is None"),
        (remembers, "and then"),
    ],
)
def test_check_of_gradient_norms_fails_for_a_broken_strategy(broken, message) -> None:
    with pytest.raises(AssertionError, match=message):
        check_gradient_norms_may_be_anything(broken)


# --- lora, and what a strategy asks for ---------------------------------------------------------


@pytest.mark.parametrize("stages", DEPTHS)
def test_lora_trains_adapters_alone_behind_its_depth(stages) -> None:
    rates = adapted.lora(stages, 0.0, depth=0.9)
    assert len(rates) == stages
    assert rates[-1] == Rates(0.0, 0.0, 0.0, 1.0)
    assert rates[: stages - 1].count(Rates(0.0, 0.0, 0.0, 0.0)) == min(
        round(0.9 * stages), stages - 1
    )
    assert adapted.lora(stages, 0.0) == [Rates(0.0, 0.0, 0.0, 1.0)] * stages
    assert adapted.lora(stages, 0.0, norms=True) == [Rates(0.0, 1.0, 0.0, 1.0)] * stages


def test_what_strategies_ask_for_is_read_from_their_signatures() -> None:
    asked = {name: bind(Part(name), 3) for name in BUILT_IN}
    assert [n for n, bound in asked.items() if not bound.trains_backbone()] == ["head_only"]
    assert [n for n, bound in asked.items() if not bound.pretrained] == ["scratch"]
    assert [n for n, bound in asked.items() if bound.wants_gradients] == ["rgn"]
    assert {n: bound.adapter for n, bound in asked.items() if bound.adapter} == {
        "lora": "autoft.network.adapters:low_rank"
    }


def test_choices_are_those_given_and_else_the_defaults() -> None:
    choices = bind(Part("lora", {"rank": 4}), 3).choices
    assert (choices["rank"], choices["alpha"]) == (4, 16.0)


def test_unknown_and_impossible_choices_are_named() -> None:
    with pytest.raises(UsageError, match="no parameter 'decay'"):
        bind(Part("freeze", {"decay": 0.7}), 3)
    with pytest.raises(UsageError, match="rank=5 lies outside"):
        bind(Part("lora", {"rank": 5}), 3)


def test_adapter_that_is_no_text_is_named() -> None:
    def odd(num_stages, progress, *, adapter=len):
        return [1.0] * num_stages

    with pytest.raises(PluginError, match="adapter=<built-in function len>"):
        bind_function(odd, Part("odd"), 2)
