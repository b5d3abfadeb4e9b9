"""Checks of what every plugin function has: words for its user, and a signature to search."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from autoft.errors import AutoftError
from autoft.space import read_signature


def check_has_docstring(plugin: Callable[..., object]) -> None:
    """A plugin says in the first line of its docstring what it is."""
    first_line = (inspect.getdoc(plugin) or "").partition("\n")[0].strip()
    if not first_line:
        raise AssertionError(
            f"{_label(plugin)} has no docstring. Begin it with one line that says what it is, "
            f"for those who meet its name in a result."
        )


def check_annotations_resolve(plugin: Callable[..., object]) -> None:
    """Every annotation can be evaluated, because ranges are read from annotations at run time."""
    try:
        inspect.signature(plugin, eval_str=True)
    except Exception as error:  # evaluating an annotation may raise anything
        raise AssertionError(
            f"The annotations of {_label(plugin)} cannot be evaluated: {error!r}. Import what "
            f"they name at the top of the module, outside `if TYPE_CHECKING:`."
        ) from error


def check_defaults_lie_in_range(plugin: Callable[..., object]) -> None:
    """Every searched parameter has a default, and it lies in the parameter's range."""
    try:
        read_signature(plugin)
    except AutoftError as error:
        raise AssertionError(str(error)) from error


def _label(plugin: Callable[..., object]) -> str:
    return f"'{getattr(plugin, '__name__', plugin)}'"


SIGNATURE_CHECKS = (check_has_docstring, check_annotations_resolve, check_defaults_lie_in_range)
