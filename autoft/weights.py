"""Published weights as values: which file a backbone is built from, and where it is or would be.

A backbone's function may tell this before it is built, by `@published`. Its weights are then
listed, fetched with progress, hashed and filtered by licence; those of other backbones are fetched
when they are built.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from autoft.errors import AutoftError, PluginError
from autoft.values import Value

OFFLINE: Final = ("AUTOFT_OFFLINE", "HF_HUB_OFFLINE")
"""Variables that forbid the network where they are 1."""

Told = Callable[[int, int], None]
"""How a download tells of its bytes: those that are here, and all of them (0: not known)."""
Function = TypeVar("Function", bound=Callable[..., Any])
_LOCATE: Final = "locate_weights"


@dataclass(frozen=True)
class Weights:
    """A file of published weights.

    `origin` is its address, `place` the folder where it is looked for, `path` the file itself,
    empty while it is not here. `source` says what it was trained on. `sha256` is what its
    publisher says of it, or how that begins. `config` is what timm keeps beside a file of its own.
    `get(told, again)` fetches it and returns its path; `again` also where it is here already.
    """

    origin: str
    place: str
    path: str = ""
    source: str = ""
    license: str = ""
    sha256: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    get: Callable[[Told, bool], Path] | None = None


def published(locate: Callable[..., Weights]) -> Callable[[Function], Function]:
    """Return a decorator that lets a backbone's function tell the file that it is built from.

    `locate` is called with those options of the function that it has parameters for. It touches no
    network.
    """

    def mark(function: Function) -> Function:
        setattr(function, _LOCATE, locate)
        return function

    return mark


def find_weights(function: Callable[..., Any], options: Mapping[str, Value]) -> Weights | None:
    """Return the file that `function`, called with `options`, loads; None if it does not tell.

    Raises:
        UsageError: the options name nothing that is published.
        PluginError: what it tells by fails.
    """
    locate: Callable[..., Weights] | None = getattr(function, _LOCATE, None)
    if locate is None:
        return None
    parameters = inspect.signature(function).parameters
    known = {name: each.default for name, each in parameters.items()} | dict(options)
    try:
        return locate(**{name: known[name] for name in inspect.signature(locate).parameters})
    except AutoftError:
        raise
    except Exception as error:  # a plugin may fail in any way
        raise PluginError(
            f"{locate!r} cannot tell where weights are: {type(error).__name__}: {error}. Tell the "
            f"author of the plugin."
        ) from error


def offline() -> str:
    """Return the variable that forbids the network, or nothing."""
    return next((name for name in OFFLINE if os.environ.get(name) == "1"), "")


def quiet(done: int, total: int) -> None:
    """Tell nobody."""
