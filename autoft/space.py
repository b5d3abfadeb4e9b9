"""Ranges, and the reader that turns a function's signature into its search space.

A keyword-only parameter annotated with a range is searched, one without is a fixed option.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

from autoft.errors import PluginError, UsageError, did_you_mean
from autoft.values import Value


@dataclass(frozen=True)
class Float:
    """Real numbers from `low` to `high`, both included; `log` draws them by their logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        """Refuse an empty or impossible range."""
        _check_bounds(self)

    def holds(self, value: object) -> bool:
        """Tell whether `value` lies in the range."""
        return isinstance(value, int | float) and self.low <= value <= self.high


@dataclass(frozen=True)
class Int:
    """Whole numbers from `low` to `high`, both included; `log` draws them by their logarithm."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        """Refuse an empty or impossible range."""
        _check_bounds(self)

    def holds(self, value: object) -> bool:
        """Tell whether `value` lies in the range."""
        return isinstance(value, int) and self.low <= value <= self.high


@dataclass(frozen=True, init=False)
class Choice:
    """One of the named options."""

    options: tuple[Value, ...]

    def __init__(self, *options: Value) -> None:
        """Take the options in the order in which they are shown."""
        if not options:
            raise UsageError("Choice() has no options; give at least one.")
        object.__setattr__(self, "options", options)

    def holds(self, value: object) -> bool:
        """Tell whether `value` is one of the options."""
        return value in self.options


Range = Float | Int | Choice


@dataclass(frozen=True)
class Parameter:
    """A keyword-only parameter of a plugin: searched if it has a range, fixed otherwise."""

    name: str
    range: Range | None
    default: Any

    @property
    def searched(self) -> bool:
        """Tell whether the search may choose this value."""
        return self.range is not None


def _check_bounds(range_: Float | Int) -> None:
    if range_.low > range_.high:
        raise UsageError(f"{range_}: low must not exceed high.")
    if range_.log and range_.low <= 0:
        raise UsageError(f"{range_}: a logarithmic range needs low > 0.")


def read_signature(function: Callable[..., object]) -> tuple[Parameter, ...]:
    """Return the keyword-only parameters of `function` with their ranges, in order.

    Raises:
        PluginError: an annotation does not resolve, a searched parameter has no default, or its
            default lies outside its range.
    """
    # To resolve annotations takes longer than a head of many takes for a step of training.
    try:
        return _read_once(function)
    except TypeError:  # a callable that cannot be hashed
        return _read(function)


def _read(function: Callable[..., object]) -> tuple[Parameter, ...]:
    label = f"{function.__module__}:{getattr(function, '__qualname__', function)}"
    try:
        signature = inspect.signature(function, eval_str=True)
    except (AttributeError, NameError, TypeError, ValueError) as error:
        raise PluginError(f"The signature of {label} cannot be read: {error}.") from error
    keyword_only = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    return tuple(_read_parameter(label, parameter) for parameter in keyword_only)


_read_once = lru_cache(maxsize=256)(_read)


def _read_parameter(label: str, parameter: inspect.Parameter) -> Parameter:
    ranges = [arg for arg in get_args(parameter.annotation)[1:] if isinstance(arg, Range)]
    if not ranges:
        default = None if parameter.default is parameter.empty else parameter.default
        return Parameter(parameter.name, None, default)
    if parameter.default is parameter.empty:
        raise PluginError(f"{label}: '{parameter.name}' is searched and needs a default.")
    if not ranges[0].holds(parameter.default):
        raise PluginError(
            f"{label}: the default {parameter.default!r} of '{parameter.name}' lies outside "
            f"{ranges[0]}."
        )
    return Parameter(parameter.name, ranges[0], parameter.default)


def searched(parameters: tuple[Parameter, ...]) -> dict[str, Range]:
    """Return the ranges of the searched parameters by name."""
    return {p.name: p.range for p in parameters if p.range is not None}


def defaults(parameters: tuple[Parameter, ...]) -> dict[str, Value]:
    """Return the default of every searched parameter by name."""
    return {p.name: p.default for p in parameters if p.searched}


def check_choices(owner: str, parameters: tuple[Parameter, ...], given: Mapping[str, Any]) -> None:
    """Refuse a value that `owner` does not have or that lies outside its range.

    Raises:
        UsageError: names the value, the range and the closest known name.
    """
    known = {parameter.name: parameter for parameter in parameters}
    for name, value in given.items():
        if name not in known:
            hint = did_you_mean(name, known)
            raise UsageError(
                f"{owner} has no parameter '{name}'.{hint} It has: {', '.join(known)}."
            )
        range_ = known[name].range
        if range_ is not None and not range_.holds(value):
            raise UsageError(f"{owner}: {name}={value!r} lies outside {range_}.")
