"""The goals P1 to P17 as rows of a table: what was measured, and what it had to be.

Each benchmark writes its rows into a file of its own; `summary.py` makes one table of all.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from timing import middle


@dataclass
class Spent:
    """Seconds of the processor and by the clock of one kind of work, a number a round.

    The first round warms up and is dropped.
    """

    processor: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    warm: bool = False

    def add(self, processor: float, clock: float) -> None:
        """Take in what a round took."""
        if self.warm:
            self.processor.append(processor)
            self.clock.append(clock)
        self.warm = True

    def __str__(self) -> str:
        """Return the median of the processor's seconds, and the range."""
        return middle(self.processor, 2)


@dataclass
class Line:
    """A row of the table: a goal, what was measured, and what it had to be."""

    goal: str
    what: str
    value: float
    must: float
    stretch: float
    unit: str = "x"
    less: bool = False
    detail: dict[str, Any] = field(default_factory=dict)
    part: str = ""

    @property
    def verdict(self) -> str:
        """Return which of the two columns is reached."""
        reached = [
            self.value <= bound if self.less else self.value >= bound
            for bound in (self.must, self.stretch)
        ]
        return "stretch" if reached[1] else "must" if reached[0] else "**missed**"


@contextmanager
def spending(spent: Spent) -> Iterator[None]:
    """Note what the block takes of the processor and by the clock."""
    clock, processor = time.perf_counter(), time.process_time()
    yield
    spent.add(time.process_time() - processor, time.perf_counter() - clock)


def where(load: float) -> str:
    """Return what machine this is, and its load: `load` was that before the measurement."""
    return (
        f"{len(os.sched_getaffinity(0))} {platform.machine()} cores, torch {version('torch')}. "
        f"Load {load:.1f} before and {os.getloadavg()[0]:.1f} after."
    )


def write_results(path: Path, about: str, lines: Sequence[Line], **measured: object) -> None:
    """Write rows, what was measured where, and the numbers behind them."""
    told = [asdict(each) | {"verdict": each.verdict} for each in lines]
    whole = {"about": about, "lines": told, **measured}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def read_lines(path: Path) -> list[Line]:
    """Return the rows that a benchmark wrote."""
    names = [each.name for each in fields(Line)]
    lines = json.loads(path.read_text("utf-8"))["lines"]
    return [Line(**{name: line[name] for name in names}) for line in lines]


def table(found: Sequence[Line]) -> str:
    """Return a Markdown table, a row a goal."""
    head = ["| Goal | What | Measured | Must | Stretch | Reached |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *map(row, found)])


def row(line: Line) -> str:
    """Return a row of the table."""
    sign, unit = "<=" if line.less else ">=", f" {line.unit}" if line.unit else ""
    return (
        f"| {line.goal} | {line.what} | **{line.value:.3g}{unit}** | {sign} {line.must:g} | "
        f"{sign} {line.stretch:g} | {line.verdict} |"
    )
