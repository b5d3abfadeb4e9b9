"""Trials on this machine: one long-lived worker process per device, or several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait

from autoft.search.director import Director
from autoft.search.engines import tasks
from autoft.search.engines.worker import Message, Worker
from autoft.training.job import Outcome, Setup, TrialJob

LOOK_EVERY = 0.25  # seconds between looks at deadlines and at Ctrl-C
GRACE = 20.0  # seconds past its deadline that a trial gets to end by itself


@dataclass
class Seat:
    """A place where a trial runs: a worker, its device, and the job that it works on."""

    worker: Worker
    device: str
    threads: int
    job: TrialJob | None = field(default=None)


def run_trials(director: Director, setup: Setup, seats: Sequence[Seat]) -> None:
    """Run the director's trials until it has no more, or was told to stop.

    A worker that dies, and a trial that hangs, cost that trial and no more.
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
            _look(director, seat)
    for seat in seats:
        if seat.job is not None:
            seat.job = None
            seat.worker.kill()


def _give(director: Director, seat: Seat, setup: Setup) -> None:
    seat.job = director.next_job()
    if seat.job is not None:
        seat.worker.send(
            tasks.train, replace(setup, device=seat.device, threads=seat.threads), seat.job
        )


def _look(director: Director, seat: Seat) -> None:
    job = seat.job
    assert job is not None
    message = seat.worker.receive(0.0)
    while message is not None and seat.job is job:
        _handle(director, seat, job, message)
        message = seat.worker.receive(0.0) if seat.job is job else None
    if seat.job is job and time.time() > job.deadline + GRACE:
        seat.worker.restart()
        _end(director, seat, Outcome(job.number, "failed", error="it hung past its deadline"))


def _handle(director: Director, seat: Seat, job: TrialJob, message: Message) -> None:
    if message.kind == "report":
        seat.worker.answer(director.on_report(message.content))
    elif message.kind == "result":
        _end(director, seat, message.content)
    elif message.kind == "died":
        seat.worker.restart()
        _end(director, seat, Outcome(job.number, "failed", error=str(message.content)))
    elif message.kind in {"error", "bug"}:
        _end(director, seat, Outcome(job.number, "failed", error=str(message.content)[-500:]))


def _end(director: Director, seat: Seat, outcome: Outcome) -> None:
    seat.job = None
    director.on_outcome(outcome)
