"""Checks of a strategy: pure arithmetic from a number of stages and a progress to rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from autoft.errors import PluginError
from autoft.network.assemble import check_rates
from autoft.space import Choice, Range, defaults, read_signature, searched
from autoft.values import Rates, Value

MAX_STAGES = 24
PROGRESS = (0.0, 0.25, 0.5, 0.75, 0.99)

Strategy = Callable[..., Any]  # what it returns is what is checked


def check_returns_one_rate_per_stage(plugin: Strategy) -> None:
    """A strategy returns one rate for each stage: a float, or Rates for weights, norms, biases."""
    for num_stages, progress, choices in _situations(plugin):
        rates = plugin(num_stages, progress, **choices)
        where = _where(num_stages, progress, choices)
        if not isinstance(rates, Sequence):
            raise AssertionError(
                f"The strategy returned a {type(rates).__name__} {where}. Return a list of rates."
            )
        if len(rates) != num_stages:
            raise AssertionError(
                f"The strategy returned {len(rates)} rates {where}. Return one per stage."
            )
        for index, rate in enumerate(rates):
            if not isinstance(rate, int | float | Rates):
                raise AssertionError(
                    f"The strategy returned {rate!r}, a {type(rate).__name__}, for stage {index} "
                    f"{where}. A rate is a float or autoft.Rates."
                )


def check_rates_are_finite_and_not_negative(plugin: Strategy) -> None:
    """Every rate is finite and not below 0, whatever the choices within their ranges."""
    for num_stages, progress, choices in _situations(plugin):
        rates = plugin(num_stages, progress, **choices)
        try:
            check_rates(rates, num_stages)
        except (PluginError, TypeError) as error:
            raise AssertionError(f"{error} ({_where(num_stages, progress, choices)})") from error


def check_strategy_is_pure(plugin: Strategy) -> None:
    """The same arguments always give the same rates: nothing is remembered, nothing is drawn."""
    situations = list(_situations(plugin))
    first = [list(plugin(stages, progress, **choices)) for stages, progress, choices in situations]
    # Backwards, so that what an earlier call left behind shows.
    for expected, (num_stages, progress, choices) in zip(
        reversed(first), reversed(situations), strict=True
    ):
        again = list(plugin(num_stages, progress, **choices))
        if again != expected:
            raise AssertionError(
                f"The strategy returned {expected} and later {again} "
                f"{_where(num_stages, progress, choices)}. It must depend on its arguments alone."
            )


def _situations(plugin: Strategy) -> Iterator[tuple[int, float, dict[str, Value]]]:
    """Yield numbers of stages, progress and choices: the defaults, and the ends of every range."""
    for choices in choices_at_the_ends(plugin):
        for num_stages in range(1, MAX_STAGES + 1):
            for progress in PROGRESS:
                yield num_stages, progress, choices


def choices_at_the_ends(plugin: Callable[..., object]) -> list[dict[str, Value]]:
    """Return the defaults, and each of them with one parameter moved to an end of its range."""
    parameters = read_signature(plugin)
    usual = defaults(parameters)
    moved = [
        usual | {name: end}
        for name, range_ in searched(parameters).items()
        for end in _ends(range_)
    ]
    return [usual, *moved]


def _ends(range_: Range) -> tuple[Value, ...]:
    return range_.options if isinstance(range_, Choice) else (range_.low, range_.high)


def _where(num_stages: int, progress: float, choices: Mapping[str, Value]) -> str:
    chosen = "".join(f", {name}={value!r}" for name, value in choices.items())
    return f"for {num_stages} stages at progress {progress}{chosen}"


STRATEGY_CHECKS = (
    check_returns_one_rate_per_stage,
    check_rates_are_finite_and_not_negative,
    check_strategy_is_pure,
)
