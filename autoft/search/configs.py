"""The space of configurations: who may be combined with whom, and which questions that raises.

Conditional by construction: `head.mlp.hidden` is asked only under `head=mlp`, and learning rates
of the backbone only where the strategy trains it. One name always means one range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from autoft.space import Choice, Parameter, Range, defaults, searched
from autoft.values import Part, TrialConfig, Value

Ask = Callable[[str, Range, Value], Value]
"""Answers a question by name, range and default."""


@dataclass(frozen=True)
class StrategyInfo:
    """What the search knows of a strategy without calling it."""

    parameters: tuple[Parameter, ...]
    trains_backbone: bool
    pretrained: bool
    builtin: bool


@dataclass(frozen=True)
class Space:
    """Backbones by label, strategies and heads with their parameters, and the recipes'."""

    backbones: tuple[str, ...]
    strategies: Mapping[str, StrategyInfo]
    heads: Mapping[str, tuple[Parameter, ...]]
    tuning: tuple[Parameter, ...]
    probing: tuple[Parameter, ...]
    augments: tuple[str, ...] = ()
    third_party_heads: frozenset[str] = field(default_factory=frozenset)

    def recipe(self, strategy: str) -> tuple[Parameter, ...]:
        """Return the parameters of the recipe that trains under `strategy`."""
        chosen = self.tuning if self.strategies[strategy].trains_backbone else self.probing
        return tuple(self._narrowed(parameter) for parameter in chosen)

    def _narrowed(self, parameter: Parameter) -> Parameter:
        """Leave out augmentations that were found to change labels, such as mirrored digits."""
        if parameter.name != "augment" or not self.augments:
            return parameter
        fallback = parameter.default if parameter.default in self.augments else self.augments[-1]
        return Parameter("augment", Choice(*self.augments), fallback)

    def configure(self, ask: Ask, seed: int) -> TrialConfig:
        """Ask for everything that one configuration needs."""
        backbone = str(ask("backbone", Choice(*self.backbones), self.backbones[0]))
        strategy = str(ask("strategy", Choice(*self.strategies), next(iter(self.strategies))))
        head = str(ask("head", Choice(*self.heads), next(iter(self.heads))))
        how = self.strategies[strategy]
        return TrialConfig(
            backbone=Part(backbone),
            strategy=Part(strategy, _answers(ask, f"strategy.{strategy}", how.parameters)),
            head=Part(head, _answers(ask, f"head.{head}", self.heads[head])),
            train=_answers(ask, "train", self.recipe(strategy)),
            seed=seed,
        )

    def default(self, given: Mapping[str, Value], seed: int) -> TrialConfig:
        """Return the configuration of `given` answers, every other at its default."""
        return self.configure(lambda name, _, default: given.get(name, default), seed)


def _answers(ask: Ask, prefix: str, parameters: tuple[Parameter, ...]) -> dict[str, Value]:
    default = defaults(parameters)
    ranges = searched(parameters).items()
    return {name: ask(f"{prefix}.{name}", range_, default[name]) for name, range_ in ranges}
