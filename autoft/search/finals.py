"""The last phase: the best trials are scored again with other folds held out.

A small part held out chooses among many trials by luck as much as by merit. Those within its noise
of the best are trained again on other folds, all of them on the same, for as many folds as there
is time; what they reach on the average decides (`selection/winner.py`). The weights stay those of
the first fold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from autoft.search.budget import Budget
from autoft.search.configs import Space
from autoft.search.folder import RunFolder
from autoft.search.policy import KEPT, TOGETHER
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

    def pairs(self) -> Iterator[Pair]:
        """Yield trials and folds, fold by fold and the best first."""
        for fold in range(1, self.rounds + 1):
            for number in self.finalists:
                yield number, fold


@dataclass
class Finals:
    """Calls trials to the finals, and has what became `again` of them.

    The split has so many `folds`; a score in one is as noisy as that of so many `images`. `seats`
    trials are trained at the same time.
    """

    folder: RunFolder
    space: Space
    budget: Budget
    folds: int = 1
    images: int = 1
    seats: int = 1
    again: list[TrialResult] = field(default_factory=list)
    _tried: set[Pair] = field(default_factory=set)
    _called: Call | None = None

    def note(self, result: TrialResult) -> None:
        """Learn how a trial did with another fold held out."""
        assert result.of is not None  # else it is a trial of its own
        self.again.append(result)
        self._tried.add((result.of, result.fold))

    def reserve(self, ordered: Sequence[TrialResult], baseline: TrialResult | None) -> None:
        """Leave the finals the time that they need; trials come best first."""
        self._called = None
        if self._waits(ordered):
            self.budget.reserved = 0.0
            return
        call = self._call(ordered, baseline, SHARE * self._whole(ordered))
        left = any(pair not in self._tried for pair in call.pairs())
        self.budget.reserved = call.rounds * call.seconds if left else 0.0

    def next_job(
        self, ordered: Sequence[TrialResult], baseline: TrialResult | None, number: int
    ) -> tuple[TrialJob, Call] | None:
        """Return a finalist to be scored again, as trial `number`; None where there is none.

        It begins as it began first. Who is called stays as it is until another trial ends.
        """
        if self._called is None:
            self._called = self._call(ordered, baseline, self._most(ordered))
        known = {each.number: each for each in ordered}
        failed = {each.of for each in self.again if each.status != "done"}
        for of, fold in self._called.pairs():
            if (of, fold) in self._tried or of in failed:
                continue
            first = self._called.finalists[0]
            if first in failed or not self.folder.begun(first):
                return None  # the others would have nothing to be compared with
            if self.expected(known[of]) > self.budget.remaining():
                return None
            self._tried.add((of, fold))
            if before := self.folder.begun(of):
                epochs = len(known[of].scores)  # that it had, which may be fewer than planned
                job = self.budget.job(number, before.config, epochs, before.precision)
                job = replace(job, head_start=before.head_start, fold=fold, of=of)
                return job, self._called
        return None

    def expected(self, result: TrialResult) -> float:
        """Return the seconds that a trial is expected to take again."""
        mine = (each for each in self.again if each.of == result.number)
        took = [each.seconds for each in mine if each.status == "done"]
        if took or result.config.backbone.name not in self.budget.ranked:
            return max(took, default=result.seconds)
        if not self.space.trains_backbone(result.config):
            return TOGETHER * result.seconds  # it was one of many in a pack
        epochs = max(1, len(result.scores))
        return max(result.seconds, self.budget.expected(result.config, epochs, True))

    def _waits(self, results: Sequence[TrialResult]) -> bool:
        """Tell whether heads alone have ended: what trains a backbone comes first."""
        trained = any(self.space.trains_backbone(each.config) for each in results)
        return not trained and any(each.trains_backbone for each in self.space.strategies.values())

    def _most(self, results: Sequence[TrialResult]) -> float:
        """Return the seconds that the finals may take: a share of the time.

        Where much of it is left, as no more trials were wanted, it is a share of what they took.
        """
        whole = self._whole(results)
        if self.budget.remaining() <= 2 * SHARE * whole:
            return SHARE * whole
        return SHARE / (1 - SHARE) * self._seconds(results)

    def _seconds(self, results: Sequence[TrialResult]) -> float:
        """Return the seconds by the clock that trials took, in all commands of the run."""
        return sum(each.seconds for each in results) / self.seats

    def _whole(self, results: Sequence[TrialResult]) -> float:
        """Return the seconds of all trials, past and to come."""
        return self._seconds(results) + self._seconds(self.again) + self.budget.remaining()

    def _call(
        self, ordered: Sequence[TrialResult], baseline: TrialResult | None, most: float
    ) -> Call:
        """Call the trials that come as near to the best as noise, to take `most` seconds in all.

        What takes longest is left out until one round fits, but never the best; one trial alone
        is not called.
        """
        before = self._seconds(self.again)
        allowed = min(most, before + self.budget.remaining())
        near = self._near(ordered, baseline)
        while len(near) > 1:
            each = [START_SECONDS + self.expected(one) for one in near]
            seconds = max(*each, sum(each) / self.seats)
            if rounds := min(self.folds - 1, int(max(0.0, allowed) / seconds)):
                return Call(tuple(one.number for one in near), rounds, seconds)
            near.remove(max(near[1:], key=self.expected))
        return Call()

    def _near(
        self, ordered: Sequence[TrialResult], baseline: TrialResult | None
    ) -> list[TrialResult]:
        """Return the best trial, and those whose score is within the noise of its own.

        They are among those whose weights are kept. A best that was stopped is not compared: it
        would not be stopped again.
        """
        if self.folds < 2 or not ordered or ordered[0].status != "done":
            return []
        best = list(ordered[:KEPT])
        if baseline is not None and all(baseline.number != each.number for each in best):
            best.append(baseline)
        top = best[0].score or 0.0
        least = top - NEAR * standard_error(top, self.images)
        return [one for one in best if one.status == "done" and (one.score or 0.0) >= least]


def standard_error(score: float, images: int) -> float:
    """Return how far a share of `images` is off by chance; two right and two wrong are added.

    So that all being right does not count as certain (Agresti and Coull 1998).
    """
    share = (score * images + 2) / (images + 4)
    return math.sqrt(share * (1 - share) / (images + 4))
