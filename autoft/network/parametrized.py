"""The names that parametrizations of torch give to parameters, and what they were called before.

A parametrized `conv.weight` becomes `conv.parametrizations.weight.original`; what the first
parametrization on it adds lies below `conv.parametrizations.weight.0`.
"""

from __future__ import annotations

import re

_ADDED = re.compile(r"(?:^|\.)parametrizations\.[^.]+\.\d+\.")
_ORIGINAL = re.compile(r"(?P<owner>^|^.*\.)parametrizations\.(?P<tensor>[^.]+)\.original$")


def is_adapter(name: str) -> bool:
    """Tell whether a parameter of this name was added by a parametrization, as adapters are."""
    return _ADDED.search(name) is not None


def plain_name(name: str) -> str:
    """Return what the original of a parametrized tensor is called without; others keep theirs."""
    found = _ORIGINAL.match(name)
    return f"{found['owner']}{found['tensor']}" if found else name
