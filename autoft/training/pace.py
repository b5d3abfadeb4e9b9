"""Epochs that end in time: a schedule that is cut off has not come to its end.

A trial whose learning rate never came down is worth less than one of fewer epochs, so that a trial
that turns out slower than was expected has fewer of them, and all of its schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoft.training.recipe import size_in


@dataclass
class Pace:
    """What the epochs of a trial have taken so far; images are trained on at `scale` of `side`.

    Epochs differ in how large images are: training goes by their pixels, scoring sees them whole.
    """

    side: int
    scale: float
    training: float = 0.0  # seconds
    scoring: float = 0.0
    pixels: float = 0.0  # of whole images, for all epochs together
    epochs: int = 0

    def note(self, epoch: int, of: int, training: float, scoring: float) -> None:
        """Take in what the epoch of that number, from 0, took of a trial `of` so many."""
        self.training += training
        self.scoring += scoring
        self.pixels += self._pixels(epoch, of)
        self.epochs += 1

    def epochs_within(self, seconds: float, done: int, most: int) -> int:
        """Return how many epochs there may be in all, `most` at most, to end within `seconds`.

        Of these `done` are over; where there is no time for another it is as many. As long as
        nothing is known it is `most`.
        """
        if not self.epochs:
            return most
        fit = (n for n in range(most, done, -1) if self._rest(done, n) <= seconds)
        return next(fit, done)

    def _rest(self, done: int, of: int) -> float:
        """Return the seconds that what is left of a trial `of` so many epochs takes."""
        pixels = sum(self._pixels(epoch, of) for epoch in range(done, of))
        each = self.training / self.pixels
        return each * pixels + (of - done) * self.scoring / self.epochs

    def _pixels(self, epoch: int, of: int) -> float:
        return (size_in(self.side, self.scale, epoch, of) / self.side) ** 2
