"""An AutoML tuner that fine-tunes pre-trained image models; the one door, opened lazily.

Importing autoft imports nothing else: each name below is fetched when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoft.api import Run, load, search
    from autoft.errors import (
        AutoftError,
        DataError,
        Interrupted,
        MachineError,
        NoUsableTrial,
        PluginError,
        UsageError,
    )
    from autoft.space import Choice, Float, Int
    from autoft.values import Backbone, Part, Rates
    from autoft.weights import Weights, published

    __version__: str

__all__ = [
    "AutoftError",
    "Backbone",
    "Choice",
    "DataError",
    "Float",
    "Int",
    "Interrupted",
    "MachineError",
    "NoUsableTrial",
    "Part",
    "PluginError",
    "Rates",
    "Run",
    "UsageError",
    "Weights",
    "__version__",
    "load",
    "published",
    "search",
]

_HOMES = {
    "autoft.api": ("Run", "load", "search"),
    "autoft.space": ("Choice", "Float", "Int"),
    "autoft.values": ("Backbone", "Part", "Rates"),
    "autoft.weights": ("Weights", "published"),
}


def __getattr__(name: str) -> Any:
    """Fetch a public name from the module that defines it (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'autoft' has no attribute '{name}'")
    if name == "__version__":
        from importlib.metadata import version

        return version("autoft")
    home = next((home for home, names in _HOMES.items() if name in names), "autoft.errors")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    """Name what can be fetched."""
    return sorted(__all__)


class _Callable(ModuleType):
    """The package `autoft.search`, which can be called like the function of that name."""

    def __call__(self, dataset: Any, **settings: Any) -> Run:
        """Do what `autoft.api.search` does."""
        from autoft.api import search

        return search(dataset, **settings)


class _Door(ModuleType):
    """This module. Python sets a sub-package as an attribute of it when that is imported.

    `autoft.search(...)` must go on working once the sub-package `autoft.search` has taken the
    place of the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "search" and isinstance(value, ModuleType):
            value.__class__ = _Callable
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door
