"""The last phase: the best trials are scored again with other folds held out.

A small part held out chooses among many trials by luck as much as by merit. Those within its noise
of the best are trained again on other folds, all of them on the same, for as many folds as there
is time; what they reach on the average decides (`selection/winner.py`). The weights stay those of
the first fold.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from autoft.search.budget import Budget
from autoft.search.configs import Space
from autoft.search.folder import RunFolder
from autoft.search.policy import KEPT
from autoft.selection.winner import usable
from autoft.training.job import TrialJob
from autoft.values import TrialResult

SHARE = 0.25  # of the time for trials: the most that it may take
NEAR = 2.0  # standard errors of the best score: what is nearer may as well be better
START_SECONDS = 2.0  # to build a network again, beside what the trial took

Pair = tuple[int, int]
"""A trial and the fold that is held out when it is scored again."""


@dataclass(frozen=True)
class Call:
    """Which trials are scored again, on how many other folds, and the seconds of each round."""

    finalists: tuple[int, ...] = ()
    rounds: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        """Say who is called, and why."""
        folds = f"{self.rounds} other {'fold' if self.rounds == 1 else 'folds'}"
        return (
            f"Trials {', '.join(map(str, self.finalists))} are as good as the best by what chance "
            f"may do: each is scored again with {folds} held out."
        )


@dataclass
class Finals:
    """Calls trials to the finals, and has what became `again` of them.

    The split has so many `folds`, and `images` are held out in one.
    """

    folder: RunFolder
    space: Space
    budget: Budget
    folds: int = 1
    images: int = 1
    again: list[TrialResult] = field(default_factory=list)
    _tried: set[Pair] = field(default_factory=set)

    def note(self, result: TrialResult) -> None:
        """Learn how a trial did with another fold held out."""
        assert result.of is not None  # else it is a trial of its own
        self.again.append(result)
        self._tried.add((result.of, result.fold))

    def reserve(self, results: Sequence[TrialResult], baseline: TrialResult | None) -> None:
        """Leave the finals the time that they need."""
        call = self._call(results, baseline, SHARE * self.budget.whole())
        self.budget.reserved = call.rounds * call.seconds if self._left(call) else 0.0

    def next_job(
        self, results: Sequence[TrialResult], baseline: TrialResult | None, number: int
    ) -> tuple[TrialJob, Call] | None:
        """Return a finalist to be scored again, as trial `number`; None where there is none.

        It begins as it began first.
        """
        took = time.time() - self.budget.began
        most = min(SHARE * self.budget.whole(), SHARE / (1 - SHARE) * took)
        call = self._call(results, baseline, most)
        for of, fold in self._left(call):
            self._tried.add((of, fold))
            if before := self.folder.begun(of):
                job = self.budget.job(number, before.config, before.epochs, before.precision)
                return replace(job, head_start=before.head_start, fold=fold, of=of), call
        return None

    def expected(self, result: TrialResult) -> float:
        """Return the seconds that a trial is expected to take again."""
        trains, epochs = self.space.trains_backbone(result.config), max(1, len(result.scores))
        if result.config.backbone.name not in self.budget.ranked:
            return result.seconds
        return max(result.seconds, self.budget.expected(result.config, epochs, trains))

    def _call(
        self, results: Sequence[TrialResult], baseline: TrialResult | None, most: float
    ) -> Call:
        """Call the trials that come as near to the best as noise, to take `most` seconds in all.

        What takes longest is left out until one round fits, but never the best; one trial alone
        is not called.
        """
        before = sum(each.seconds for each in self.again)
        allowed = before + min(most - before, self.budget.remaining())
        near = self._near(results, baseline)
        while len(near) > 1:
            seconds = sum(START_SECONDS + self.expected(each) for each in near)
            if rounds := min(self.folds - 1, int(max(0.0, allowed) / seconds)):
                return Call(tuple(each.number for each in near), rounds, seconds)
            near.remove(max(near[1:], key=self.expected))
        return Call()

    def _left(self, call: Call) -> list[Pair]:
        """Return who still has a turn, fold by fold."""
        pairs = [(n, fold) for fold in range(1, call.rounds + 1) for n in call.finalists]
        return [pair for pair in pairs if pair not in self._tried]

    def _near(
        self, results: Sequence[TrialResult], baseline: TrialResult | None
    ) -> list[TrialResult]:
        """Return the best trial, and those whose score is within the noise of its own.

        They are among those whose weights are kept.
        """
        best = usable(results)
        if self.folds < 2 or not best:
            return []
        top = best[0].score or 0.0
        least = top - NEAR * standard_error(top, self.images)
        others = [each for each in best[1:] if each in best[:KEPT] or each is baseline]
        close = (each for each in others if each.status == "done" and (each.score or 0.0) >= least)
        return [best[0], *close]


def standard_error(score: float, images: int) -> float:
    """Return how far a share of `images` is off by chance; two right and two wrong are added.

    So that all being right does not count as certain (Agresti and Coull 1998).
    """
    share = (score * images + 2) / (images + 4)
    return math.sqrt(share * (1 - share) / (images + 4))
