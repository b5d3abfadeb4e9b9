"""A strategy with its choices bound, checked before anything is trained with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autoft import plugins
from autoft.network.assemble import check_rates, is_frozen
from autoft.space import check_choices, read_signature
from autoft.values import Part, Rate, Rates

STEPS_LOOKED_AT = 100


@dataclass(frozen=True)
class BoundStrategy:
    """A freezing strategy for a backbone of `num_stages`; `pretrained` is False for scratch."""

    function: Callable[..., Sequence[Rate]]
    part: Part
    num_stages: int
    pretrained: bool

    def rates(self, progress: float) -> tuple[Rates, ...]:
        """Return the rates at `progress` in [0, 1)."""
        returned = self.function(self.num_stages, progress, **self.part.params)
        return check_rates(returned, self.num_stages)

    def trains_backbone(self) -> bool:
        """Tell whether any stage is ever thawed."""
        moments = (step / STEPS_LOOKED_AT for step in range(STEPS_LOOKED_AT))
        return any(not is_frozen(rates) for at in moments for rates in self.rates(at))


def bind(part: Part, num_stages: int) -> BoundStrategy:
    """Load the strategy of `part` and bind its choices.

    Raises:
        PluginError: it is missing or broken.
        UsageError: a choice is unknown or out of range.
    """
    function: Callable[..., Any] = plugins.load("strategy", part.name)
    parameters = read_signature(function)
    check_choices(f"The strategy '{part.name}'", parameters, part.params)
    fixed = {parameter.name: parameter.default for parameter in parameters}
    return BoundStrategy(function, part, num_stages, bool(fixed.get("pretrained", True)))
