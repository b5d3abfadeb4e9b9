"""Which trial wins."""

from __future__ import annotations

from collections.abc import Iterable

from autoft.errors import NoUsableTrial
from autoft.values import TrialResult


def usable(results: Iterable[TrialResult]) -> list[TrialResult]:
    """Return the trials that have a score, best first.

    Equal scores (likely on a small validation part) are ordered by log-loss, which is less noisy;
    equal ones again by cost.
    """
    scored = [result for result in results if result.status != "failed"]
    return sorted(scored, key=_merit)


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
    reasons = [result.error for result in everything if result.error]
    commonest = (
        max(set(reasons), key=reasons.count) if reasons else "no trial was finished in time"
    )
    raise NoUsableTrial(
        f"None of {len(everything)} trials produced a model; most often: {commonest}. Give more "
        f"--time, another --backbones, or a smaller --image-size."
    )
