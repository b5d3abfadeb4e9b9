"""Packages that autoft uses where they are installed, and asks for where they are not."""

from __future__ import annotations

import importlib
from typing import Any

from autoft.errors import MachineError


def import_extra(module: str, extra: str, what: str) -> Any:
    """Return an optional module; `what` needs it and the extra `autoft[extra]` brings it.

    Raises:
        MachineError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MachineError(
            f"{what} needs the package {package!r}, which cannot be imported ({error}); "
            f"install it: pip install 'autoft[{extra}]'"
        ) from error
