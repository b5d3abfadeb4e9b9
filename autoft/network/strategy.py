"""A strategy with its choices bound, checked before anything is trained with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoft import plugins
from autoft.errors import PluginError
from autoft.network.rates import check_rates, is_frozen, leading_frozen
from autoft.space import check_choices, read_signature
from autoft.values import Part, Rate, Rates

STEPS_LOOKED_AT = 100


@dataclass(frozen=True)
class Treatment:
    """What is left alone by a strategy, by which the costs of its trials are known.

    `frozen` leading stages all the time; all but norms and biases, if `vectors_alone`.
    """

    frozen: int = 0
    vectors_alone: bool = False


@dataclass(frozen=True)
class BoundStrategy:
    """A freezing strategy for a backbone of `num_stages`, and what it asks of the core.

    `pretrained` is False for one that starts from random weights. One that `wants_gradients` is
    to be given a relative gradient norm per stage. `adapter` names the function that adds its
    parameters to the backbone, "package.module:function", or is empty.
    """

    function: Callable[..., Sequence[Rate]]
    part: Part
    num_stages: int
    pretrained: bool = True
    wants_gradients: bool = False
    adapter: str = ""

    @property
    def choices(self) -> Mapping[str, Any]:
        """Return every keyword-only parameter: the value chosen, or else the default."""
        usual = {p.name: p.default for p in read_signature(self.function)}
        return usual | dict(self.part.params)

    def rates(self, progress: float, gradient_norms: Sequence[float] = ()) -> tuple[Rates, ...]:
        """Return the rates at `progress` in [0, 1).

        `gradient_norms` are the latest, one per stage; empty before anything was measured, and of
        no concern to a strategy that does not ask for them.

        Raises:
            PluginError: not one rate per stage, or a rate is negative or not finite.
        """
        measured = {"gradient_norms": tuple(gradient_norms)} if self.wants_gradients else {}
        returned = self.function(self.num_stages, progress, **{**self.part.params, **measured})
        return check_rates(returned, self.num_stages)

    def trains_backbone(self) -> bool:
        """Tell whether any stage is ever thawed, or has adapters that are trained."""
        return any(not is_frozen(rates) for at in _moments() for rates in self.rates(at))

    def trains_vectors_alone(self) -> bool:
        """Tell whether norms and biases are all that it ever trains, as far as can be known.

        It is not of a strategy that decides by gradients, or that adds parameters.
        """
        if self.wants_gradients or self.adapter:
            return False
        every = [rates for at in _moments() for rates in self.rates(at)]
        only = not any(each.weights or each.adapters for each in every)
        return only and not all(map(is_frozen, every))

    def frozen_prefix(self) -> int:
        """Return how many stages, from the first on, are frozen all the time.

        None are for a strategy that decides by gradients, or that adds parameters.
        """
        if self.wants_gradients or self.adapter:
            return 0
        return min(leading_frozen(self.rates(at)) for at in _moments())

    def treatment(self) -> Treatment:
        """Return what is left alone."""
        return Treatment(self.frozen_prefix(), self.trains_vectors_alone())


def _moments() -> Iterator[float]:
    return (step / STEPS_LOOKED_AT for step in range(STEPS_LOOKED_AT))


def bind(part: Part, num_stages: int) -> BoundStrategy:
    """Load the strategy of `part` and bind its choices.

    Raises:
        PluginError: it is missing or broken.
        UsageError: a choice is unknown or out of range.
    """
    return bind_function(plugins.load("strategy", part.name), part, num_stages)


def bind_function(function: Callable[..., Any], part: Part, num_stages: int) -> BoundStrategy:
    """Bind the choices of `part` to a strategy that is at hand.

    Raises:
        PluginError: its signature cannot be read, or its `adapter` is no text.
        UsageError: a choice is unknown or out of range.
    """
    parameters = read_signature(function)
    check_choices(f"The strategy '{part.name}'", parameters, part.params)
    options = {parameter.name: parameter.default for parameter in parameters} | dict(part.params)
    adapter = options.get("adapter", "")
    if not isinstance(adapter, str):
        raise PluginError(
            f"The strategy '{part.name}' has adapter={adapter!r}; the name of a function was "
            f"expected, 'package.module:function'."
        )
    return BoundStrategy(
        function=function,
        part=part,
        num_stages=num_stages,
        pretrained=bool(options.get("pretrained", True)),
        wants_gradients="gradient_norms" in options,
        adapter=adapter,
    )
