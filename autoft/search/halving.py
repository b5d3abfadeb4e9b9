"""Successive halving: who goes on at a rung, decided when a trial gets there (ASHA).

Source: Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning".
"""

from __future__ import annotations

from collections.abc import Sequence

REDUCTION = 3


def rungs(epochs: int) -> tuple[int, ...]:
    """Return the epochs after which trials of `epochs` are compared: a third, a ninth, ..."""
    marks: list[int] = []
    mark = epochs // REDUCTION
    while mark >= 1:
        marks.append(mark)
        mark //= REDUCTION
    return tuple(reversed(marks))


def goes_on(score: float, others: Sequence[float]) -> bool:
    """Tell whether `score` is among the best third of all that reached the rung.

    The first trials to reach it always go on: there is nothing yet to compare them with.
    """
    if len(others) < REDUCTION - 1:
        return True
    better = sum(other > score for other in others)
    return better < max(1, (len(others) + 1) // REDUCTION)
