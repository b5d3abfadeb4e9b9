from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import pytest

from autoft.errors import PluginError, UsageError
from autoft.search.configs import Space, StrategyInfo, read_fixed
from autoft.space import (
    Choice,
    Float,
    Int,
    Parameter,
    check_choices,
    defaults,
    read_signature,
    searched,
)
from autoft.training import recipe
from autoft.values import TrialConfig


def plugin(
    first: int,
    *,
    width: Annotated[int, Int(8, 64, log=True)] = 16,
    drop: Annotated[float, Float(0.0, 0.5)] = 0.1,
    act: Annotated[str, Choice("relu", "gelu")] = "gelu",
    bias: bool = True,
) -> None: ...


def test_a_callable_that_has_no_hash_is_read_as_well() -> None:
    class Plugin:
        __hash__ = None

        def __call__(self, *, width: Annotated[int, Int(8, 64)] = 16) -> None: ...

    assert read_signature(Plugin()) == (Parameter("width", Int(8, 64), 16),)


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


# --- which questions make a difference --------------------------------------------------


def whole(**known) -> Space:
    strategies = {
        "still": StrategyInfo((), trains_backbone=False, pretrained=True, builtin=True),
        "moving": StrategyInfo((), trains_backbone=True, pretrained=True, builtin=True),
        "blank": StrategyInfo((), trains_backbone=True, pretrained=False, builtin=True),
    }
    deep = (Parameter("features", None, "stages"),)
    return Space(
        backbones=("normed", "plain"),
        strategies=strategies,
        heads={"last": (), "deep": deep},
        tuning=read_signature(recipe.tuning),
        probing=read_signature(recipe.probing),
        batch_norms=frozenset({"normed"}),
        **known,
    )


def asked(space: Space, backbone: str, strategy: str, head: str) -> set[str]:
    return {parameter.name for parameter in space.recipe(backbone, strategy, head)}


@pytest.mark.parametrize(
    ("question", "where", "elsewhere"),
    [
        ("norm_mode", ("normed", "moving", "last"), ("plain", "moving", "last")),
        ("norm_mode", ("normed", "moving", "last"), ("normed", "blank", "last")),
        ("l2sp", ("plain", "moving", "last"), ("plain", "blank", "last")),
        ("pool", ("plain", "moving", "last"), ("plain", "moving", "deep")),
        ("pool", ("plain", "still", "last"), ("plain", "still", "deep")),
        ("lr", ("plain", "moving", "last"), ("plain", "still", "last")),
    ],
)
def test_a_question_is_asked_only_where_it_makes_a_difference(question, where, elsewhere) -> None:
    space = whole()
    assert question in asked(space, *where)
    assert question not in asked(space, *elsewhere)


def test_uneven_classes_are_evened_out_where_all_count_the_same() -> None:
    assert "balance" not in asked(whole(), "plain", "still", "last")
    for metric, default in (("balanced_accuracy", "logit_adjust"), ("accuracy", "none")):
        space = whole(imbalanced=True, metric=metric)
        for strategy in ("still", "moving"):
            config = space.default({"strategy": strategy}, 0)
            assert config.train["balance"] == default


def test_much_data_may_teach_batch_norms() -> None:
    modes = [whole(large=large).default({"strategy": "moving"}, 0) for large in (False, True)]
    assert [config.train["norm_mode"] for config in modes] == ["affine", "train"]


def test_answers_that_are_fixed_are_not_asked_and_experts_only_then() -> None:
    plain = whole()
    assert not {"sam", "ema"} & asked(plain, "plain", "moving", "last")
    texts = ["train.sam=0.05", "train.ema=true", "train.lr=1e-3", "train.optimizer=sgd"]
    space = replace(plain, fixed=read_fixed(plain, texts))
    questions: list[str] = []

    def ask(name, range_, default):
        questions.append(name)
        return "moving" if name == "strategy" else default

    train = space.configure(ask, 0).train
    given = [train[name] for name in ("sam", "ema", "lr", "optimizer")]
    assert given == [0.05, True, 1e-3, "sgd"]
    assert given[1] is True
    assert not {"train.sam", "train.ema", "train.lr", "train.optimizer"} & set(questions)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.sma=0.05", "Did you mean 'train.sam'"),
        ("train.sam", "has no value. Write NAME=VALUE"),
        ("train.sam=0.3", "the value is none of"),
        ("train.lr=fast", "the value is none of"),
        ("train.lr=nan", "the value is none of"),
        ("train.optimizer=adam", "the value is none of"),
        ("head.last.width=3", "no question"),
    ],
)
def test_an_answer_that_there_is_not_is_one_sentence(text, words) -> None:
    with pytest.raises(UsageError, match=words):
        read_fixed(whole(), [text])
