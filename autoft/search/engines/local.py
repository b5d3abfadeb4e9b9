"""Trials on this machine: one long-lived worker process per device, or several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait

from autoft.search.director import Director
from autoft.search.engines import tasks
from autoft.search.engines.worker import Message, Worker
from autoft.training.job import Outcome, Report, Setup, TrialJob

LOOK_EVERY = 0.25  # seconds between looks at deadlines and at Ctrl-C
GRACE = 20.0  # seconds past its deadline that a trial gets to end by itself
RETRIES = 1  # of a trial whose worker died; it goes on from its last epoch


@dataclass
class Seat:
    """A place where trials run: a worker, its device, and the jobs that it works on together."""

    worker: Worker
    device: str
    threads: int
    jobs: tuple[TrialJob, ...] = ()


@dataclass
class Desk:
    """What the seats have in common: who is asked, and what was told of which trial.

    `deaths` is how often a worker died of a trial, `told` the last epoch that it reported and
    what was answered.
    """

    director: Director
    setup: Setup
    deaths: dict[int, int] = field(default_factory=dict)
    told: dict[int, tuple[int, bool]] = field(default_factory=dict)


def run_trials(director: Director, setup: Setup, seats: Sequence[Seat]) -> None:
    """Run the director's trials until it has no more, or was told to stop.

    A trial whose worker died is tried once more, and by itself. A worker that dies again costs
    that trial and no more. One that hangs ends with what it had reached.
    """
    desk = Desk(director, setup)
    while not director.cancelled:
        for seat in seats:
            if not seat.jobs:
                seat.jobs = director.next_jobs()
                _send(desk, seat)
        busy = [seat for seat in seats if seat.jobs]
        if not busy:
            return
        wait([seat.worker.pipe for seat in busy], LOOK_EVERY)
        for seat in busy:
            _look(desk, seat)
    for seat in seats:
        if seat.jobs:
            seat.jobs = ()
            seat.worker.kill()


def _send(desk: Desk, seat: Seat) -> None:
    if seat.jobs:
        setup = replace(desk.setup, device=seat.device, threads=seat.threads)
        seat.worker.send(tasks.train, setup, seat.jobs)


def _look(desk: Desk, seat: Seat) -> None:
    jobs = seat.jobs
    message = seat.worker.receive(0.0)
    while message is not None and seat.jobs is jobs:
        _handle(desk, seat, message)
        message = seat.worker.receive(0.0) if seat.jobs is jobs else None
    if seat.jobs is jobs and time.time() > max(job.deadline for job in jobs) + GRACE:
        seat.worker.restart()
        why = "it hung past its deadline"
        _end(desk, seat, [desk.director.given_up(job.number, why) for job in jobs])


def _handle(desk: Desk, seat: Seat, message: Message) -> None:
    if message.kind == "report":
        seat.worker.answer(_goes_on(desk, message.content))
    elif message.kind == "result":
        _end(desk, seat, message.content)
    elif message.kind == "died":
        _bury(desk, seat, str(message.content))
    elif message.kind in {"error", "bug"}:
        _fail(desk, seat, str(message.content)[-500:])


def _goes_on(desk: Desk, report: Report) -> bool:
    """Pass a report on, unless a worker that died since had sent it already."""
    epoch, goes_on = desk.told.get(report.number, (0, True))
    if report.epoch > epoch:
        goes_on = desk.director.on_report(report)
        desk.told[report.number] = report.epoch, goes_on
    return goes_on


def _bury(desk: Desk, seat: Seat, cause: str) -> None:
    """Put another worker in the place of one that died, and try its trials again or give up."""
    seat.worker.restart()
    jobs = seat.jobs
    if len(jobs) > 1:
        which, again = f"Trials {jobs[0].number} to {jobs[-1].number}", "Each is tried by itself."
        desk.director.emit("note", text=f"{which}: {cause}. {again}")
        desk.deaths |= {job.number: 1 for job in jobs}
        seat.jobs = ()
        desk.director.take_back(jobs)
        return
    number = jobs[0].number
    deaths = desk.deaths[number] = desk.deaths.get(number, 0) + 1
    if deaths > RETRIES:
        _fail(desk, seat, f"it was tried {deaths} times, the last time {cause}")
        return
    again = "It is tried once more, from the last epoch that it finished."
    desk.director.emit("note", text=f"Trial {number}: {cause}. {again}")
    _send(desk, seat)


def _fail(desk: Desk, seat: Seat, why: str) -> None:
    _end(desk, seat, [Outcome(job.number, "failed", error=why) for job in seat.jobs])


def _end(desk: Desk, seat: Seat, outcomes: Sequence[Outcome]) -> None:
    seat.jobs = ()
    for outcome in outcomes:
        desk.director.on_outcome(outcome)
