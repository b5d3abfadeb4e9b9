"""Successive halving: who goes on at a rung, decided when a trial gets there (ASHA).

Source: Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning". Few epochs have
one early rung and keep a quarter; many begin later, as a low learning rate looks bad early on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LEAST = 3  # epochs that have a rung
ONE_RUNG, LATE_RUNGS = 6, 30  # epochs below and from which there are others than (2, 6)
ALIKE = 0.25  # of the epochs: until then only trials that freeze alike are compared
UNIT_STEPS = 50  # optimiser steps that count as an epoch where one has fewer


def rungs(epochs: int, unit: int = 1) -> tuple[int, ...]:
    """Return the epochs after which trials of `epochs` are compared.

    `unit` epochs count as one where they are short. A rung leaves at least a third to be saved.
    """
    units = epochs // unit
    if units < LEAST:
        return ()
    marks = (1,) if units < ONE_RUNG else (2, 6) if units < LATE_RUNGS else (3, 12)
    return tuple(mark * unit for mark in marks if 3 * mark <= 2 * units)


def reduction(epochs: int, unit: int = 1) -> int:
    """Return n where the best 1 of n go on: 4 where there is one early rung or late ones."""
    return 3 if ONE_RUNG <= epochs // unit < LATE_RUNGS else 4


def races_alike(epoch: int, epochs: int) -> bool:
    """Tell whether at `epoch` only trials that freeze alike are compared.

    Deep freezing leads early and is overtaken: it must not end what learns more slowly.
    """
    return epoch < ALIKE * epochs


def goes_on(score: float, others: Sequence[float], reduced: int = 3) -> bool:
    """Tell whether `score` is among the best 1 of `reduced` of all that reached the rung.

    The first trials to reach it always go on: there is nothing yet to compare them with.
    """
    if len(others) < reduced - 1:
        return True
    better = sum(other > score for other in others)
    return better < max(1, (len(others) + 1) // reduced)


def unit_of(steps: int) -> int:
    """Return how many epochs of so many optimiser steps count as one."""
    return max(1, -(-UNIT_STEPS // max(1, steps)))


@dataclass
class Race:
    """The scores that were reached at rungs; `unit` epochs count as one.

    Trials of other lengths meet at a rung: what counts is how much they were trained.
    """

    unit: int = 1
    _reached: dict[tuple[int, str], dict[int, float]] = field(default_factory=dict)

    def goes_on(self, number: int, phase: str, epochs: int, epoch: int, score: float) -> bool:
        """Note the score of a trial at `epoch` of `epochs`; tell whether it goes on."""
        if epoch not in rungs(epochs, self.unit):
            return True
        reached = self._at(phase, epochs, epoch)
        others = [other for trial, other in reached.items() if trial != number]
        reached[number] = score  # again, of one that goes on after a crash
        return goes_on(score, others, reduction(epochs, self.unit))

    def note(self, number: int, phase: str, epochs: int, scores: Sequence[float]) -> None:
        """Take in the curve of a trial of an earlier command."""
        for mark in rungs(epochs, self.unit):
            if len(scores) >= mark:
                self._at(phase, epochs, mark)[number] = scores[mark - 1]

    def _at(self, phase: str, epochs: int, epoch: int) -> dict[int, float]:
        alike = phase if races_alike(epoch, epochs) else ""
        return self._reached.setdefault((epoch, alike), {})
