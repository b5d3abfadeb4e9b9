"""The trials of a run as rows, best first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from autoft.selection import winner
from autoft.values import TrialResult

NUMBERS = ("rank", "trial", "score", "folds", "mean", "loss", "status", "epochs", "seconds")
COLUMNS = (*NUMBERS, "backbone", "strategy", "head")  # and every choice that a trial faced


def leaderboard(results: Iterable[TrialResult]) -> list[dict[str, Any]]:
    """Return one row per trial, best first, with every choice as a column of its own.

    Finalists have the number of `folds` that they were scored on, and the `mean` over these.
    """
    known = list(results)
    finals = {final.trial: final for final in winner.finals(known)}
    return [
        {
            "rank": rank,
            "trial": result.number,
            "score": result.score,
            "folds": len(finals[result.number].folds) if result.number in finals else None,
            "mean": finals[result.number].mean if result.number in finals else None,
            "loss": result.loss,
            "status": result.status,
            "epochs": len(result.scores),
            "seconds": result.seconds,
            **result.config.answers(),
        }
        for rank, result in enumerate(winner.in_order(known), start=1)
    ]
