"""Cells of CSV files that people open in spreadsheets, where text must not become a formula."""

from __future__ import annotations

from typing import Final

_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "'")


def inert(cell: str) -> str:
    """Return `cell` with an apostrophe in front of what a spreadsheet would run.

    What begins with an apostrophe gets another, so that `as_written` is the inverse.
    """
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def as_written(cell: str) -> str:
    """Return what `inert` was given."""
    return cell.removeprefix("'")
