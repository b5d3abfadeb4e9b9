"""What is wrong with the rows of a manifest, collected so that all of it is said at once."""

from __future__ import annotations

from collections import Counter
from typing import Final

SHOWN: Final = 10
"""Rows named for each kind of error; of the others the number is given."""


class Refused(Exception):
    """A row cannot be used: an error of `kind`, and what the row holds."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


class Complaints:
    """Counts errors by kind and keeps the first rows of each, whatever the manifest's length."""

    def __init__(self, unit: str = "line") -> None:
        self._unit = unit
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[str]] = {}

    def __len__(self) -> int:
        """Return the number of errors."""
        return self._counts.total()

    def add(self, kind: str, line: int, detail: str = "") -> None:
        """Note that row `line` has an error of `kind`; `detail` is what it holds."""
        self._counts[kind] += 1
        shown = self._first.setdefault(kind, [])
        if len(shown) < SHOWN:
            shown.append(f"{line} ({detail})" if detail else str(line))

    def text(self) -> str:
        """Return everything as clauses joined by `;`."""
        return "; ".join(
            f"{kind} in {self._unit}{'s' if count > 1 else ''} {', '.join(self._first[kind])}"
            f"{f' and {count - SHOWN:,} more' if count > SHOWN else ''}"
            for kind, count in self._counts.items()
        )
