"""The rates that a strategy returns: checked, in full form, and what they freeze; no torch."""

from __future__ import annotations

from collections.abc import Sequence

from autoft.errors import PluginError
from autoft.values import Rate, Rates

KINDS = ("weights", "norms", "biases", "adapters")


def check_rates(rates: Sequence[Rate], num_stages: int) -> tuple[Rates, ...]:
    """Return `rates` in full form, one per stage.

    Raises:
        PluginError: not one rate per stage, or a rate is negative or not finite.
    """
    if len(rates) != num_stages:
        raise PluginError(
            f"The strategy returned {len(rates)} rates for {num_stages} stages. Return one each."
        )
    full = tuple(r if isinstance(r, Rates) else Rates(r, r, r, r) for r in rates)
    for index, each in enumerate(full):
        values = [getattr(each, kind) for kind in KINDS]
        if not all(0 <= value < float("inf") for value in values):
            raise PluginError(
                f"The strategy returned {each} for stage {index}. A rate is finite and at least 0."
            )
    return full


def is_frozen(rates: Rates) -> bool:
    """Tell whether nothing of a stage with these rates is trained."""
    return not any(getattr(rates, kind) for kind in KINDS)


def leading_frozen(rates: Sequence[Rates]) -> int:
    """Return how many stages, from the first on, have nothing that is trained."""
    return next((k for k, each in enumerate(rates) if not is_frozen(each)), len(rates))
