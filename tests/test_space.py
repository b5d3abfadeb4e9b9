from __future__ import annotations

from typing import Annotated

import pytest

from autoft.errors import PluginError, UsageError
from autoft.search.configs import Space, StrategyInfo
from autoft.space import Choice, Float, Int, check_choices, defaults, read_signature, searched
from autoft.values import TrialConfig


def plugin(
    first: int,
    *,
    width: Annotated[int, Int(8, 64, log=True)] = 16,
    drop: Annotated[float, Float(0.0, 0.5)] = 0.1,
    act: Annotated[str, Choice("relu", "gelu")] = "gelu",
    bias: bool = True,
) -> None: ...


def test_a_signature_is_read_as_ranges_and_fixed_options() -> None:
    parameters = read_signature(plugin)
    assert searched(parameters) == {
        "width": Int(8, 64, log=True),
        "drop": Float(0.0, 0.5),
        "act": Choice("relu", "gelu"),
    }
    assert defaults(parameters) == {"width": 16, "drop": 0.1, "act": "gelu"}
    assert [p.name for p in parameters if not p.searched] == ["bias"]


def no_default(*, width: Annotated[int, Int(1, 2)]) -> None: ...


def outside(*, width: Annotated[int, Int(1, 2)] = 3) -> None: ...


def unresolved(*, width: Annotated[int, Missing(1, 2)] = 3) -> None: ...  # noqa: F821 - the point


@pytest.mark.parametrize(
    ("function", "words"),
    [(no_default, "needs a default"), (outside, "lies outside"), (unresolved, "cannot be read")],
)
def test_a_bad_signature_is_refused_with_its_name(function, words) -> None:
    with pytest.raises(PluginError, match=words) as caught:
        read_signature(function)
    assert function.__name__ in str(caught.value)


@pytest.mark.parametrize(
    "make", [lambda: Float(2, 1), lambda: Int(0, 5, log=True), lambda: Choice()]
)
def test_an_impossible_range_is_refused(make) -> None:
    with pytest.raises(UsageError):
        make()


def test_a_choice_is_checked_against_name_and_range() -> None:
    parameters = read_signature(plugin)
    with pytest.raises(UsageError, match="Did you mean 'width'"):
        check_choices("it", parameters, {"widht": 8})
    with pytest.raises(UsageError, match="lies outside"):
        check_choices("it", parameters, {"width": 7})
    check_choices("it", parameters, {"width": 64, "bias": False})


def space() -> Space:
    strategies = {
        "still": StrategyInfo((), trains_backbone=False, pretrained=True, builtin=True),
        "moving": StrategyInfo(
            read_signature(outer), trains_backbone=True, pretrained=True, builtin=True
        ),
    }
    return Space(
        backbones=("a", "b"),
        strategies=strategies,
        heads={"plain": (), "wide": read_signature(plugin)},
        tuning=read_signature(tuning),
        probing=(),
    )


def outer(*, depth: Annotated[float, Float(0, 1)] = 0.5) -> None: ...


def tuning(*, lr: Annotated[float, Float(1e-5, 1e-2, log=True)] = 1e-3) -> None: ...


def test_questions_are_conditional_by_construction() -> None:
    asked: list[str] = []

    def ask(name, range_, default):
        asked.append(name)
        return default

    config = space().configure(ask, seed=1)
    assert asked == ["backbone", "strategy", "head"]
    assert config.answers() == {"backbone": "a", "strategy": "still", "head": "plain"}
    config = space().default({"strategy": "moving", "head": "wide", "head.wide.width": 8}, 1)
    assert config.answers() == {
        "backbone": "a",
        "strategy": "moving",
        "strategy.moving.depth": 0.5,
        "head": "wide",
        "head.wide.width": 8,
        "head.wide.drop": 0.1,
        "head.wide.act": "gelu",
        "train.lr": 1e-3,
    }
    assert TrialConfig.from_json(config.to_json()) == config
