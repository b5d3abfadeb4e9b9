"""What a label may be: the text of one class, as it is written."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from autoft.data.inputs.complaints import Complaints, Refused

NO_LABEL: Final = "no label"
SEVERAL: Final = "several labels for one image (expected one: autoft tells classes apart)"
FRACTION: Final = (
    "a number that is not whole as the label, which looks like regression (expected classes: put "
    "a letter before them if they are names)"
)
_BETWEEN: Final = "|;"


def label_text(value: object) -> str:
    """Return a label as text: strings as they are, whole numbers and truth values as written.

    Raises:
        Refused: there is none, or it is not one class.
    """
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        raise Refused(NO_LABEL)
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not value.is_integer():
        raise Refused(FRACTION, str(value))
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple | dict):
        raise Refused(SEVERAL, repr(value)[:40])
    raise Refused(f"a label of the type {type(value).__name__} (expected text)")


def check_labels(
    names: Sequence[str],
    codes: npt.NDArray[np.int32],
    lines: npt.NDArray[np.int64],
    complaints: Complaints,
) -> None:
    """Complain of labels that only all of them together show to be no classes.

    `codes` (N,) are positions in `names`, `lines` (N,) the rows they come from.
    """
    for kind, wrong in ((SEVERAL, _several(names)), (FRACTION, _fractions(names))):
        for row in np.flatnonzero(np.isin(codes, sorted(wrong))) if wrong else ():
            complaints.add(kind, int(lines[row]), repr(names[codes[row]])[:40])


def _several(names: Sequence[str]) -> set[int]:
    """Return which names are lists, or joined by `|` or `;` from pieces used elsewhere."""
    wrong = {code for code, name in enumerate(names) if _is_list(name)}
    for between in _BETWEEN:
        joined = {
            code: [piece.strip() for piece in name.split(between)]
            for code, name in enumerate(names)
            if between in name
        }
        known = {name for code, name in enumerate(names) if code not in joined} if joined else {}
        uses: dict[str, int] = {}
        for pieces in joined.values():
            for piece in set(pieces):
                uses[piece] = uses.get(piece, 0) + 1
        wrong |= {
            code
            for code, pieces in joined.items()
            if all(piece in known or uses[piece] > 1 for piece in pieces)
        }
    return wrong


def _is_list(name: str) -> bool:
    text = name.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return False
    try:
        return isinstance(ast.literal_eval(text), list)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _fractions(names: Sequence[str]) -> set[int]:
    """Return which names are no whole numbers, where all of them are numbers."""
    wrong = set()
    for code, name in enumerate(names):
        try:
            value = float(name)
        except ValueError:
            return set()
        if not math.isfinite(value):
            return set()
        if not value.is_integer():
            wrong.add(code)
    return wrong
