"""Measure what the controlling process takes for a trial (goals P12 and P13).

    PYTHONPATH=benchmarks python benchmarks/speed/controller.py [--json FILE] [--sharing FILE]

A search of the product's own space is conducted without training: the director is asked for
trials, told of every epoch and of how each ended, with scores that are drawn at random, and
writes its run folder. What that takes of the processor is divided by the trials, `--rounds` times
after one that warms up. P13 sets it against the processor time of P1 and P8, as `sharing.py`
measured them (`--sharing`).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from goals import Line, read_lines, table, where, write_results
from sharing_heads import HEADS

from autoft.search import prepare
from autoft.search.budget import Budget
from autoft.search.configs import Space
from autoft.search.director import Director
from autoft.search.engines.tasks import describe
from autoft.search.folder import RunFolder
from autoft.search.session import Session
from autoft.search.settings import Settings
from autoft.search.stop import Stop
from autoft.search.study import Study
from autoft.training.job import Costs, Outcome, Ranked, Report, TrialJob
from autoft.training.plan import Room

STAGES = 5
COSTS = Costs(
    prefix=(0.0, 1e-3, 2e-3, 4e-3, 7e-3, 8e-3),
    tail=(24e-3, 20e-3, 16e-3, 10e-3, 3e-3, 1e-5),
    score=(8e-3, 7e-3, 6e-3, 4e-3, 1e-3, 0.0),
    bytes=(0, 400_000, 200_000, 100_000, 30_000, 1_000),
    view=3e-4,
)
MANY = 200  # trials of a search whose middle is told


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sharing", type=Path, help="what sharing.py wrote")
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    given = describe(prepare.names(Settings(dataset="-"))).space
    found = list(measured(given, asked.rounds))
    trained = read_lines(asked.sharing) if asked.sharing else []
    lines = [*found, *against(found[0].value / 1000, found[1].value / 1000, trained)]
    sys.stderr.write(f"{table(lines)}\n")
    if asked.json:
        about = f"{asked.rounds} rounds after one that warms up. {where(load)}"
        write_results(asked.json, about, lines)


def measured(space: Space, rounds: int) -> Iterator[Line]:
    """Yield what a head in a pack takes, and a trial that trains its backbone."""
    for what, strategies in (
        ("a head in a pack", ["head_only"]),
        ("a trial that trains its backbone, of 20 epochs", ["head_only", "freeze", "full"]),
    ):
        taken = []
        for number in range(rounds + 1):
            with tempfile.TemporaryDirectory() as folder:
                taken.append(milliseconds(Path(folder), space, strategies, seed=number))
        taken = taken[1:]
        told = f"{what}: {median(taken):.2f} [{min(taken):.2f}, {max(taken):.2f}] ms"
        detail = {"milliseconds": taken, "trials": MANY}
        yield Line("P12", told, median(taken), 5, 1, "ms", less=True, detail=detail)


def milliseconds(folder: Path, space: Space, strategies: Sequence[str], seed: int) -> float:
    """Return what the controlling process takes for each trial of `MANY`, in processor time.

    Where a backbone is trained heads are not counted, neither the time nor the trials.
    """
    (folder / "trials").mkdir()
    director = _director(folder, space, strategies, seed)
    draw, spent, trials = random.Random(seed), 0.0, 0
    while trials < MANY:
        began = time.process_time()
        jobs = director.next_jobs()
        took = time.process_time() - began
        if not jobs:
            break
        took += _told(director, jobs, draw)
        if len(strategies) == 1 or jobs[0].config.strategy.name != "head_only":
            spent, trials = spent + took, trials + len(jobs)
    return 1000 * spent / trials


def _told(director: Director, jobs: Sequence[TrialJob], draw: random.Random) -> float:
    """Have the director told how trials went; return the processor time that it took."""
    began = time.process_time()
    for job in jobs:
        scores = []
        for epoch in range(1, job.epochs + 1):
            scores.append(draw.random())
            report = Report(job.number, epoch, scores[-1], 1.0, 1.0, float(epoch))
            if not director.on_report(report):
                break
        status = "done" if len(scores) == job.epochs else "stopped"
        outcome = Outcome(job.number, status, tuple(scores), scores[-1], 1.0, 0.2)
        director.on_outcome(outcome)
    return time.process_time() - began


def _director(folder: Path, given: Space, strategies: Sequence[str], seed: int) -> Director:
    ranked = Ranked(
        "photos",
        0.9,
        images_per_second=125.0,
        trained_per_second=40.0,
        num_stages=STAGES,
        batch_norms=10,
        costs=COSTS,
    )
    chosen = {name: given.strategies[name] for name in strategies}
    space = prepare.of_backbones(given, [ranked])
    space = replace(space, strategies=chosen)
    room = Room(10**10, 10**10, 0, 1e9)
    budget = Budget(time.time() + 1e6, None, {ranked.label: ranked}, 2000, 500, room)
    run = RunFolder(folder)
    emit = Session(Settings(dataset="-"), run, lambda _: None, Stop(), 0.0).emit
    director = Director(run, space, Study(space, seed), budget, seed, (), emit, folds=5)
    director.resume()
    return director


def against(head: float, tail: float, trained: Sequence[Line]) -> Iterator[Line]:
    """Yield which share of all processor time of P1 and P8 the controlling process is.

    `head` and `tail` are its seconds for a head in a pack, and for what trains a backbone.
    """
    heads, tails = HEADS * head, 100 * head + 11 * tail  # the trials of P1, of P8
    parts = {"P1": (heads, "cold", 15, 5), "P8": (tails, "shared", 5, 1)}
    for line in trained:
        if line.goal in parts:
            asked, of, must, stretch = parts[line.goal]
            worked = median(line.detail[of]["processor"])
            share = 100 * asked / (asked + worked)
            what = f"share of {line.goal}: {asked:.2f} s of {asked + worked:.1f} s"
            if "profile" in line.detail:
                profile = median(line.detail["profile"]["processor"])
                what = (
                    f"{what} ({line.what.partition(':')[0]}); measuring what the planner goes by, "
                    f"once a day for a network, {profile:.1f} s of these"
                )
            yield Line("P13", what, share, must, stretch, "%", less=True)


if __name__ == "__main__":
    main()
