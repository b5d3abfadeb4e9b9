"""Epochs that end in time: a schedule that is cut off has not come to its end.

A trial whose learning rate never came down is worth less than one of fewer epochs. So one that
turns out slower than was expected has fewer of them, and all of its schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Final

from autoft.training.recipe import size_in

LEAST: Final = 2  # epochs that must be known: one alone may be a busy moment


@dataclass
class Pace:
    """What epochs of a trial have taken; most of them see images at `scale` of their `side`.

    Epochs differ in how large images are: training goes by their pixels, scoring sees them whole.
    What counts is the median, as an epoch in a busy moment says nothing of the others.
    """

    side: int
    scale: float
    _training: list[float] = field(default_factory=list)  # seconds, for whole images
    _scoring: list[float] = field(default_factory=list)

    def note(self, epoch: int, of: int, training: float, scoring: float) -> None:
        """Take in what the epoch of that number, from 0, took of a trial `of` so many."""
        self._training.append(training / self._pixels(epoch, of))
        self._scoring.append(scoring)

    def epochs_within(self, seconds: float, done: int, most: int) -> int:
        """Return how many epochs there may be in all, `most` at most, to end within `seconds`.

        Of these `done` are over; where there is no time for another it is as many. As long as too
        little is known it is `most`.
        """
        if len(self._training) < LEAST:
            return most
        fit = (n for n in range(most, done, -1) if self._rest(done, n) <= seconds)
        return next(fit, done)

    def _rest(self, done: int, of: int) -> float:
        """Return the seconds that what is left of a trial `of` so many epochs takes."""
        pixels = sum(self._pixels(epoch, of) for epoch in range(done, of))
        return median(self._training) * pixels + (of - done) * median(self._scoring)

    def _pixels(self, epoch: int, of: int) -> float:
        return (size_in(self.side, self.scale, epoch, of) / self.side) ** 2
