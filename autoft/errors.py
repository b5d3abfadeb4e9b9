"""The exceptions a user can meet; each carries the exit code that the command line returns.

    AutoftError
    ├── UsageError            2   a flag, a name or a setting that cannot be
    │   └── PluginError       2   a plugin that was asked for and is missing, broken or ambiguous
    ├── DataError             3   the images or their labels
    ├── MachineError          4   device, disk, network, a missing package
    ├── NoUsableTrial         5   the search ended without a model
    └── Interrupted         130   Ctrl-C or SIGTERM; the best so far is kept

A message says what happened with the values, what was expected and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutoftError(Exception):
    """Root of everything that is the user's to mend and not a bug of autoft."""

    exit_code = 1


class UsageError(AutoftError):
    """A flag, a name or a setting that cannot be."""

    exit_code = 2


class PluginError(UsageError):
    """A plugin that was asked for and is missing, broken or ambiguous."""


class DataError(AutoftError):
    """The images or their labels cannot be used."""

    exit_code = 3


class MachineError(AutoftError):
    """Device, disk, network or an optional package is missing."""

    exit_code = 4


class NoUsableTrial(AutoftError):
    """The search ended and no trial produced a model."""

    exit_code = 5


class Interrupted(AutoftError):
    """The user stopped the run; what was finished is kept."""

    exit_code = 130


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
