"""What a finished search found, in words."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from autoft.api import RESULT, Run
from autoft.cli.leaderboard import show as show_rows
from autoft.cli.text import clean, duration, number

BEST_ROWS = 5


def show(folder: Path, started: float) -> None:
    """Print the result of the run in `folder`; `started` is when the command began (time.time)."""
    run = Run(folder)
    result = run.result
    if (folder / RESULT).stat().st_mtime < started:
        typer.echo(
            "This search had already finished: nothing was trained, and this is its result. "
            "Another --out starts a new one."
        )
    rows = run.leaderboard()
    if rows:
        show_rows(rows[:BEST_ROWS])
    for line in _lines(folder, result):
        typer.echo(line)


def _lines(folder: Path, result: Mapping[str, Any]) -> list[str]:
    winner, trials, baseline = result["winner"], result["trials"], result["baseline"]
    metric, path = clean(result["metric"]), clean(shlex.quote(str(folder)))
    parts = (winner["backbone"], winner["strategy"], winner["head"])
    backbone, strategy, head = map(clean, parts)
    return [
        f"Winner: trial {winner['trial']}, backbone {backbone}, strategy {strategy}, head {head}.",
        f"Test {metric}: {interval(result['test'])}",
        *(
            [f"Baseline {clean(baseline['name'])}: {interval(baseline['test'])}"]
            if baseline
            else []
        ),
        f"Trials: {trials['done']} done, {trials['stopped']} stopped early, "
        f"{trials['failed']} failed, in {duration(result['seconds'])}.",
        *phase_lines(result.get("phases", {})),
        *finals_lines(result.get("finals", [])),
        *ranking_lines(result.get("ranking", [])),
        regime_line(result["regime"], winner["strategy"]),
        f"Model: {clean(folder / 'best')}",
        parity_line(folder / "best"),
        f"Predict: autoft predict {path} IMAGE...",
    ]


def phase_lines(phases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say where the time for trials went, and what each phase gained; earlier runs do not know."""
    shown = [
        f"{clean(name)} {duration(share['seconds'])} ({share['trials']}{_gain(name, share)})"
        for name, share in phases.items()
        if share["trials"]
    ]
    return [f"Time (trials, gain): {', '.join(shown)}."] if shown else []


def _gain(phase: str, share: Mapping[str, Any]) -> str:
    """Say by how much a phase raised the best score; finals choose, and raise nothing."""
    return "" if phase == "finals" else f", +{share['gained']:.3f}"


def finals_lines(finals: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what the best trials reached on the average over several folds, if they were asked."""
    if not finals:
        return []
    shown = ", ".join(f"trial {each['trial']} {number(each['mean'])}" for each in finals)
    return [f"Finals, mean of {len(finals[0]['folds'])} folds: {shown}."]


def ranking_lines(ranking: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say how much the frozen features of each backbone knew, and which were not searched.

    Runs of earlier versions have no ranking.
    """
    shown = [_ranked(row) for row in ranking if row["probe"] is not None]
    return [f"Backbones by probe: {', '.join(shown)}."] if shown else []


def _ranked(row: Mapping[str, Any]) -> str:
    told = [clean(row["source"])] if row["source"] else []
    told += [] if row["searched"] else ["not searched"]
    more = f" ({', '.join(told)})" if told else ""
    return f"{clean(row['backbone'])} {row['probe']:.3f}{more}"


def regime_line(regime: Mapping[str, Any], strategy: str) -> str:
    """Say what the data is like, and whether the search agreed with what is usual for it."""
    first = ", ".join(map(clean, regime["first"]))
    if regime["agreed"]:
        found = f"the search agreed (first there: {first})"
    elif regime.get("tried", True):  # runs of earlier versions do not say
        found = f"the search found otherwise (first there: {first}; better: {clean(strategy)})"
    else:
        found = f"what is usual for it ({first}) was not tried"
    return f"Regime: {clean(regime['text'])}; {found}."


def interval(test: Mapping[str, Any] | None) -> str:
    """Return `0.934 (95 % interval 0.914 to 0.950, 736 images)`."""
    if test is None:
        return "not measured, there is no test part"
    low, high = f"{test['low']:.3f}", f"{test['high']:.3f}"
    return f"{test['value']:.3f} (95 % interval {low} to {high}, {test['n']:,} images)"


def parity_line(artifact: Path) -> str:
    """Say for each exported format how its answers compare with the trained network's."""
    path = artifact / "parity.json"
    if not path.is_file():
        return f"Parity: not measured, there is no {clean(path)}."
    found = [_parity(proof) for proof in json.loads(path.read_text(encoding="utf-8"))]
    return "Parity: " + "; ".join(found)


def _parity(proof: Mapping[str, Any]) -> str:
    verdict = "same labels" if proof["passed"] else "NOT THE SAME"
    return (
        f"{clean(proof['format'])} {verdict} ({proof['label_agreement']:.2%} of "
        f"{proof['n']:,} images, probabilities within {proof['max_probability_difference']:.1e})"
    )
