"""The space of configurations: who may be combined with whom, and which questions that raises.

Conditional by construction: `head.mlp.hidden` is asked only under `head=mlp`, and learning rates
of the backbone only where the strategy trains it. One name always means one range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoft.errors import UsageError, did_you_mean
from autoft.space import Choice, Int, Parameter, Range, defaults, searched
from autoft.training.recipe import EXPERT
from autoft.values import Part, TrialConfig, Value

EVEN = "logit_adjust"  # what is done about uneven classes unless the search finds better
Ask = Callable[[str, Range, Value], Value]
"""Answers a question by name, range and default."""


@dataclass(frozen=True)
class StrategyInfo:
    """What the search knows of a strategy without calling it.

    `keeps_prefix` tells whether at its defaults the first stages stay frozen throughout.
    """

    parameters: tuple[Parameter, ...]
    trains_backbone: bool
    pretrained: bool
    builtin: bool
    keeps_prefix: bool = False


@dataclass(frozen=True)
class Space:
    """Backbones by label, strategies and heads with their parameters, and the recipes'.

    `batch_norms` are the backbones that have some, `blank` those with random weights, `mapless`
    those that show no map to pool, `rigid` those that take images of one size; `usual` holds by
    backbone the answers that are its defaults in place of the recipes'. `imbalanced` and `large`
    say what the data is, `metric` what is maximised; `fixed` answers are given by the user and
    not asked.
    """

    backbones: tuple[str, ...]
    strategies: Mapping[str, StrategyInfo]
    heads: Mapping[str, tuple[Parameter, ...]]
    tuning: tuple[Parameter, ...]
    probing: tuple[Parameter, ...]
    augments: tuple[str, ...] = ()
    third_party_heads: frozenset[str] = field(default_factory=frozenset)
    batch_norms: frozenset[str] = field(default_factory=frozenset)
    blank: frozenset[str] = field(default_factory=frozenset)
    mapless: frozenset[str] = field(default_factory=frozenset)
    rigid: frozenset[str] = field(default_factory=frozenset)
    usual: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    imbalanced: bool = False
    large: bool = False
    metric: str = "accuracy"
    fixed: Mapping[str, Value] = field(default_factory=dict)

    def recipe(self, backbone: str, strategy: str, head: str) -> tuple[Parameter, ...]:
        """Return the parameters of the recipe that make a difference for these three."""
        how = self.strategies[strategy]
        chosen = self.tuning if how.trains_backbone else self.probing
        pretrained = how.pretrained and backbone not in self.blank
        pointless = {
            "norm_mode": backbone not in self.batch_norms or not pretrained,
            "l2sp": not pretrained,
            "head_first": not pretrained,
            "balance": not self.imbalanced and "train.balance" not in self.fixed,
            "train_scale": backbone in self.rigid,
            "pool": backbone in self.mapless or wants_stages(self.heads[head]),
        }
        expert = {name for name in EXPERT if f"train.{name}" not in self.fixed}
        usual = self.usual.get(backbone, {})
        return tuple(
            self._narrowed(parameter, usual.get(f"train.{parameter.name}"))
            for parameter in chosen
            if not pointless.get(parameter.name, False) and parameter.name not in expert
        )

    def _narrowed(self, parameter: Parameter, usual: Value | None) -> Parameter:
        """Return a parameter as this data wants it, and with the default that is `usual`, if any.

        Augmentations that were found to change labels, such as mirrored digits, are left out.
        Uneven classes are evened out unless the search finds better, where all classes count
        the same: plain accuracy wants the prior. Much data may teach batch norms.
        """
        if parameter.name == "augment" and self.augments:
            known = parameter.default in self.augments
            fallback = parameter.default if known else self.augments[-1]
            return Parameter("augment", Choice(*self.augments), fallback)
        if usual is not None:
            return replace(parameter, default=usual)
        if parameter.name == "balance" and self.metric != "accuracy":
            return replace(parameter, default=EVEN)
        if parameter.name == "norm_mode" and self.large:
            return replace(parameter, default="train")
        return parameter

    def trains_backbone(self, config: TrialConfig) -> bool:
        """Tell whether a trial trains its backbone, which a strategy that is gone did."""
        known = self.strategies.get(config.strategy.name)
        return known is None or known.trains_backbone

    def configure(self, ask: Ask, seed: int) -> TrialConfig:
        """Ask for everything that one configuration needs and that is not fixed."""

        def answer(name: str, range_: Range, default: Value) -> Value:
            return self.fixed[name] if name in self.fixed else ask(name, range_, default)

        backbone = str(answer("backbone", Choice(*self.backbones), self.backbones[0]))
        strategy = str(answer("strategy", Choice(*self.strategies), next(iter(self.strategies))))
        head = str(answer("head", Choice(*self.heads), next(iter(self.heads))))
        how = self.strategies[strategy]
        return TrialConfig(
            backbone=Part(backbone),
            strategy=Part(strategy, _answers(answer, f"strategy.{strategy}", how.parameters)),
            head=Part(head, _answers(answer, f"head.{head}", self.heads[head])),
            train=_answers(answer, "train", self.recipe(backbone, strategy, head)),
            seed=seed,
        )

    def default(self, given: Mapping[str, Value], seed: int) -> TrialConfig:
        """Return the configuration of `given` answers, every other at its default."""
        return self.configure(lambda name, _, default: given.get(name, default), seed)


def wants_stages(head: tuple[Parameter, ...]) -> bool:
    """Tell whether a head takes the features of all stages, by its parameters."""
    return any(p.name == "features" and p.default == "stages" for p in head)


def read_fixed(space: Space, texts: Sequence[str]) -> dict[str, Value]:
    """Return the answers that `texts` such as `train.sam=0.05` give, by name.

    Raises:
        UsageError: a text is no answer, or `space` has no such question or not this answer to it.
    """
    ranges = _questions(space)
    fixed: dict[str, Value] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--fix {text} has no value. Write NAME=VALUE, as train.sam=0.05.")
        if name not in ranges:
            hint = did_you_mean(name, ranges)
            raise UsageError(
                f"--fix {text}: a search has no question '{name}'.{hint} Its questions are the "
                f"columns of leaderboard.csv that have a dot; --backbones, --strategies and "
                f"--heads choose the parts."
            )
        fixed[name] = _typed(text, ranges[name], value)
    return fixed


def _questions(space: Space) -> dict[str, Range]:
    """Return every question that a configuration may raise, with its range."""
    owned = {f"strategy.{name}": info.parameters for name, info in space.strategies.items()}
    owned |= {f"head.{name}": parameters for name, parameters in space.heads.items()}
    owned |= {"train": (*space.probing, *space.tuning)}
    return {
        f"{owner}.{name}": range_
        for owner, parameters in owned.items()
        for name, range_ in searched(parameters).items()
    }


def _typed(text: str, range_: Range, value: str) -> Value:
    options: Sequence[Value] = range_.options if isinstance(range_, Choice) else ()
    by_text: dict[str, Value] = {str(option).lower(): option for option in options}
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    whole = isinstance(range_, Int) and number.is_integer()
    found = by_text.get(value.lower(), int(number) if whole else number)
    if not range_.holds(found):
        raise UsageError(f"--fix {text}: the value is none of {range_}.")
    return next((option for option in options if option == found), found)


def _answers(ask: Ask, prefix: str, parameters: tuple[Parameter, ...]) -> dict[str, Value]:
    default = defaults(parameters)
    ranges = searched(parameters).items()
    return {name: ask(f"{prefix}.{name}", range_, default[name]) for name, range_ in ranges}
