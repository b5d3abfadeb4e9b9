"""The goals of sharing as rows of a table: what was measured, and what it had to be."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from precision import middle


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


def heading(about: dict[str, Any]) -> str:
    """Return what was measured where."""
    return (
        f"In the last call {about['rounds']} rounds in turns after one that warms up; "
        f"{about['threads']} thread(s) of {about['processors']} {about['machine']} cores, "
        f"torch {about['torch']}. Load {about['load'][0]} before and {about['load'][1]} after."
    )


def table(found: list[Line]) -> str:
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
