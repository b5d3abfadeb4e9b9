"""The end of a search: the winner is finished by a worker, and what the run found is written."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from autoft.errors import Interrupted
from autoft.report.tables import write_leaderboard, write_predictions
from autoft.search.director import Director
from autoft.search.engines import tasks
from autoft.search.engines.worker import Worker
from autoft.search.folder import RESULT, RunFolder
from autoft.search.images import Data
from autoft.search.jobs import Finished, FinishJob
from autoft.search.policy import shares_json
from autoft.search.portfolio import first_strategies
from autoft.search.session import Session
from autoft.search.study import write_view
from autoft.selection import leaderboard, winner
from autoft.selection.regime import Profile
from autoft.training.job import Setup
from autoft.training.metrics import probabilities
from autoft.values import TrialResult


def end(
    session: Session,
    director: Director,
    worker: Worker,
    setup: Setup,
    data: Data,
    regime: Profile,
) -> None:
    """Choose the winner, finish it, and write what the run found."""
    results = [*director.results, *director.finals.again]
    rows = leaderboard.leaderboard(results)
    write_leaderboard(session.folder.path / "leaderboard.csv", rows, leaderboard.COLUMNS)
    if director.cancelled:
        best = winner.usable(results)
        kept = f"the best so far is trial {best[0].number}" if best else "no trial had ended"
        raise Interrupted(
            f"Stopped; {kept}. `autoft resume {session.folder.path}` goes on, `autoft export "
            f"{session.folder.path}` writes the best so far."
        )
    best_trial = winner.choose(results)
    finals = winner.finals(results)
    if finals:
        session.emit("note", text=_told_of(finals))
    session.emit("phase", name="finish", text=f"finishing trial {best_trial.number}")
    job = FinishJob(
        best_trial,
        director.baseline(),
        data.part(data.split.test),
        tuple(session.settings.export),
        session.folder.best.resolve(),
        data.split.hash,
    )
    finished: Finished = session.call(worker, tasks.finish, setup, job)
    for note in finished.notes:
        session.emit("note", text=note)
    _write_predictions(session.folder, data, finished)
    result = _result(session, director, setup, data, regime, job, finished)
    result["finals"] = [asdict(each) | {"mean": each.mean} for each in finals]
    session.folder.write_json(RESULT, result)
    try:
        view = session.folder.path / "study.db"
        write_view(view, director.space, director.results, session.folder.path.name)
    except Exception as error:  # noqa: BLE001 - only a view: the result is already safe
        session.emit("note", text=f"study.db could not be written: {error}")
    session.emit("finish", again=False, **result)


def _write_predictions(folder: RunFolder, data: Data, finished: Finished) -> None:
    parts = {
        "validation": (data.split.validation(), finished.validation_logits),
        "test": (data.split.test, finished.test_logits),
    }
    for name, (indices, logits) in parts.items():
        if logits is not None:
            write_predictions(
                folder.path / "predictions" / f"{name}.csv",
                [data.catalog.paths[index] for index in indices],
                [data.catalog.label_of(index) for index in indices],
                data.catalog.classes,
                probabilities(logits),
            )


def _result(
    session: Session,
    director: Director,
    setup: Setup,
    data: Data,
    regime: Profile,
    job: FinishJob,
    finished: Finished,
) -> dict[str, Any]:
    """Return what `result.json` holds; its keys are documented in docs/run-folder.md."""
    statuses = [result.status for result in director.results]
    config = job.winner.config
    ranking = _ranking(session.folder, director.space.backbones)
    return {
        "metric": setup.metric,
        "score": finished.validation.value,
        "validation": asdict(finished.validation),
        "test": asdict(finished.test) if finished.test else None,
        "baseline": _baseline(job.baseline, finished),
        "winner": {
            "trial": job.winner.number,
            "backbone": config.backbone.name,
            "strategy": config.strategy.name,
            "head": config.head.name,
            "params": config.answers(),
        },
        "trials": {status: statuses.count(status) for status in ("done", "stopped", "failed")},
        "phases": shares_json(director.results, director.space, director.finals.again),
        "seconds": round(session.spent + time.monotonic() - session.began, 1),
        "regime": _regime(regime, director.results, job.winner),
        "backbones": {each["backbone"]: each["probe"] for each in ranking},
        "ranking": ranking,
        "classes": list(data.catalog.classes),
        "artifact": "best",
        "parity": list(finished.parity),
        "split": data.split.hash,
        "versions": json.loads((job.out / "model.json").read_text("utf-8"))["versions"],
    }


def _told_of(finals: Sequence[winner.Final]) -> str:
    """Say what the finals found."""
    means = ", ".join(f"trial {each.trial} {each.mean:.4f}" for each in finals)
    return f"Over {len(finals[0].folds)} folds: {means}. Trial {finals[0].trial} wins."


def _baseline(baseline: TrialResult | None, finished: Finished) -> dict[str, Any] | None:
    if baseline is None:
        return None
    config = baseline.config
    test = asdict(finished.baseline_test) if finished.baseline_test else None
    name = f"{config.strategy.name} + {config.head.name} on {config.backbone.name}"
    return {"name": name, "trial": baseline.number, "score": baseline.score, "test": test}


def _regime(regime: Profile, results: Sequence[TrialResult], won: TrialResult) -> dict[str, Any]:
    """Return the regime, and what became of the strategies that it puts first.

    One that was begun was tried, however it ended.
    """
    first = first_strategies(regime.name)
    return {
        **regime.to_json(),
        "first": first,
        "tried": any(each.config.strategy.name in first for each in results),
        "agreed": won.config.strategy.name in first,
    }


def _ranking(folder: RunFolder, searched: Collection[str]) -> list[dict[str, Any]]:
    """Return all that were ranked, highest probe first; probe None: it could not be used."""
    seen = {event["name"]: event for event in folder.events() if event["kind"] == "backbone"}
    rows = [
        {
            "backbone": name,
            "probe": event["score"],
            "source": event["measured"]["source"],
            "license": event["measured"]["license"],
            "searched": name in searched,
        }
        for name, event in seen.items()
    ]
    return sorted(rows, key=lambda row: (row["probe"] is None, -(row["probe"] or 0.0)))
