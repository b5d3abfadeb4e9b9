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
    """A place where a trial runs: a worker, its device, and the job that it works on.

    `deaths` is how often a worker died of that job, `epoch` the last that it reported, and
    `goes_on` what was answered.
    """

    worker: Worker
    device: str
    threads: int
    job: TrialJob | None = field(default=None)
    deaths: int = 0
    epoch: int = 0
    goes_on: bool = True


def run_trials(director: Director, setup: Setup, seats: Sequence[Seat]) -> None:
    """Run the director's trials until it has no more, or was told to stop.

    A trial whose worker died is tried once more. A worker that dies again, and a trial that
    hangs, cost that trial and no more.
    """
    while not director.cancelled:
        for seat in seats:
            if seat.job is None:
                _give(director, seat, setup)
        busy = [seat for seat in seats if seat.job is not None]
        if not busy:
            return
        wait([seat.worker.pipe for seat in busy], LOOK_EVERY)
        for seat in busy:
            _look(director, seat, setup)
    for seat in seats:
        if seat.job is not None:
            seat.job = None
            seat.worker.kill()


def _give(director: Director, seat: Seat, setup: Setup) -> None:
    seat.job, seat.deaths, seat.epoch, seat.goes_on = director.next_job(), 0, 0, True
    if seat.job is not None:
        _send(seat, setup, seat.job)


def _send(seat: Seat, setup: Setup, job: TrialJob) -> None:
    seat.worker.send(tasks.train, replace(setup, device=seat.device, threads=seat.threads), job)


def _look(director: Director, seat: Seat, setup: Setup) -> None:
    job = seat.job
    assert job is not None
    message = seat.worker.receive(0.0)
    while message is not None and seat.job is job:
        _handle(director, seat, setup, message)
        message = seat.worker.receive(0.0) if seat.job is job else None
    if seat.job is job and time.time() > job.deadline + GRACE:
        seat.worker.restart()
        _end(director, seat, Outcome(job.number, "failed", error="it hung past its deadline"))


def _handle(director: Director, seat: Seat, setup: Setup, message: Message) -> None:
    job = seat.job
    assert job is not None
    if message.kind == "report":
        seat.worker.answer(_goes_on(director, seat, message.content))
    elif message.kind == "result":
        _end(director, seat, message.content)
    elif message.kind == "died":
        _bury(director, seat, setup, job, str(message.content))
    elif message.kind in {"error", "bug"}:
        _end(director, seat, Outcome(job.number, "failed", error=str(message.content)[-500:]))


def _goes_on(director: Director, seat: Seat, report: Report) -> bool:
    """Pass a report on, unless a worker that died since had sent it already."""
    if report.epoch > seat.epoch:
        seat.epoch, seat.goes_on = report.epoch, director.on_report(report)
    return seat.goes_on


def _bury(director: Director, seat: Seat, setup: Setup, job: TrialJob, cause: str) -> None:
    """Put another worker in the place of one that died, and try its trial again or give it up."""
    seat.worker.restart()
    seat.deaths += 1
    if seat.deaths > RETRIES:
        twice = f"it was tried {seat.deaths} times, the last time {cause}"
        _end(director, seat, Outcome(job.number, "failed", error=twice))
        return
    again = "It is tried once more, from the last epoch that it finished."
    director.emit("note", text=f"Trial {job.number}: {cause}. {again}")
    _send(seat, setup, job)


def _end(director: Director, seat: Seat, outcome: Outcome) -> None:
    seat.job = None
    director.on_outcome(outcome)
