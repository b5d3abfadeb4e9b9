"""How names from outside, numbers and times are written on the terminal."""

from __future__ import annotations

import re

_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters, which can rewrite the terminal, marks that turn the direction of writing,
and the surrogates of file names that are not UTF-8, which cannot be printed."""


def clean(text: object) -> str:
    r"""Return `text` with everything written out (`\x1b`) that a terminal would act upon."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], str(text))


def number(value: float | None) -> str:
    """Return a score with four decimals, or a dash."""
    return "-" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Return `42 s`, `3:07 min` or `2:15:00 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def columns(rows: list[list[str]]) -> list[str]:
    """Return `rows` as lines of aligned columns, for output that is not a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
