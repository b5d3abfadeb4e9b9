"""Which trial wins.

The best trials may be scored again with other folds held out: each such score is a result of its
own, `of` the trial. Finalists are compared on the folds that all of them have, and come before
the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from autoft.errors import NoUsableTrial
from autoft.values import TrialResult


@dataclass(frozen=True)
class Final:
    """Scores of a trial, with each of the `folds` held out that all finalists have."""

    trial: int
    folds: tuple[int, ...]
    scores: tuple[float, ...]
    loss: float

    @property
    def mean(self) -> float:
        """Return the mean over the folds."""
        return fmean(self.scores)


def usable(results: Iterable[TrialResult]) -> list[TrialResult]:
    """Return the trials that have a score, best first.

    Finalists come first, by their mean over the folds. Equal scores (likely on a small validation
    part) are ordered by log-loss, which is less noisy; equal ones again by cost.
    """
    known = list(results)
    places = {final.trial: place for place, final in enumerate(finals(known))}
    trials = [each for each in known if each.of is None and each.status != "failed"]
    return sorted(trials, key=lambda each: (places.get(each.number, len(places)), _merit(each)))


def finals(results: Iterable[TrialResult]) -> list[Final]:
    """Return what finalists reached on the folds that all of them have, best first.

    Empty where fewer than two trials were scored again, or the best by the first fold was not: it
    must not lose to others for want of time.
    """
    known = list(results)
    trials = {each.number: each for each in known if each.of is None}
    again: dict[int, dict[int, TrialResult]] = {}
    for each in known:
        if each.of in trials and each.status == "done":
            again.setdefault(each.of, {})[each.fold] = each
    scored = [each for each in trials.values() if each.status != "failed"]
    if len(again) < 2 or min(scored, key=_merit).number not in again:
        return []
    common = set.intersection(*(set(found) for found in again.values()))
    if not common:
        return []
    found = {number: {0: trials[number], **folds} for number, folds in again.items()}
    folds = (0, *sorted(common))
    told = [_final(n, folds, [by[fold] for fold in folds]) for n, by in found.items()]
    cost = {number: trials[number].seconds for number in found}
    return sorted(told, key=lambda each: (-each.mean, each.loss, cost[each.trial]))


def _final(number: int, folds: tuple[int, ...], scored: Sequence[TrialResult]) -> Final:
    losses = [each.loss if each.loss is not None else float("inf") for each in scored]
    return Final(number, folds, tuple(each.score or 0.0 for each in scored), fmean(losses))


def in_order(results: Iterable[TrialResult]) -> list[TrialResult]:
    """Return all trials, best first, and those without a score last."""
    known = list(results)
    failed = [each for each in known if each.of is None and each.status == "failed"]
    return usable(known) + failed


def _merit(result: TrialResult) -> tuple[float, float, float]:
    score = result.score if result.score is not None else float("-inf")
    loss = result.loss if result.loss is not None else float("inf")
    return -score, loss, result.seconds


def choose(results: Iterable[TrialResult]) -> TrialResult:
    """Return the winner.

    Raises:
        NoUsableTrial: no trial has a score; quotes the most common reason.
    """
    everything = list(results)
    ordered = usable(everything)
    if ordered:
        return ordered[0]
    trials = [result for result in everything if result.of is None]
    reasons = [result.error for result in trials if result.error]
    commonest = (
        max(set(reasons), key=reasons.count) if reasons else "no trial was finished in time"
    )
    raise NoUsableTrial(
        f"None of {len(trials)} trials produced a model; most often: {commonest}. Give more "
        f"--time, another --backbones, or a smaller --image-size."
    )
