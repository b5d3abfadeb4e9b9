"""A whole search: from a data set and a time to a proven artifact and an honest number.

Read `run_search` first. Nothing heavy is imported in this process: workers do what needs torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autoft import plugins
from autoft.data import doctor
from autoft.errors import MachineError, UsageError
from autoft.search import images, prepare
from autoft.search.budget import Budget
from autoft.search.configs import Space, read_fixed
from autoft.search.director import Director
from autoft.search.ending import end
from autoft.search.engines import ray, tasks
from autoft.search.engines.local import Seat, run_trials
from autoft.search.engines.strategist import Strategist
from autoft.search.engines.worker import Worker
from autoft.search.events import Listener
from autoft.search.folder import FORMAT, RESULT, RunFolder, claim, open_run
from autoft.search.images import Data
from autoft.search.jobs import Finished, FinishJob
from autoft.search.portfolio import portfolio
from autoft.search.resuming import check_resumable, choose_folder
from autoft.search.session import Session, a_worker
from autoft.search.settings import FORMATS, Settings, check_formats, read_saved
from autoft.search.stop import listen_for_stop
from autoft.search.study import Study
from autoft.selection import winner
from autoft.selection.intervals import effective_images
from autoft.selection.regime import Profile
from autoft.training.job import Ranked, Setup
from autoft.training.plan import Room
from autoft.values import Estimate, TrialResult

FINISH_SECONDS = 30.0  # for exports, before what grows with the images
RANKING_SHARE = 0.4  # of the time is the most that ranking backbones may take
LEAST_SHARE = 0.4  # of the time goes to trials at least, whatever the finish may need


def run_search(settings: Settings, listen: Listener) -> Path:
    """Search, or go on with a search that was cut off, and return its run folder.

    Raises:
        AutoftError: one of its kinds; Interrupted keeps what was found.
    """
    began = time.monotonic()
    path = choose_folder(settings)
    with listen_for_stop() as stop, claim(path) as folder:
        session = Session(settings, folder, listen, stop, began, check_resumable(settings, folder))
        if (result := folder.read_json(RESULT)) is not None:
            session.emit("finish", again=True, **result)
            return path
        if settings.engine == "ray":
            ray.check_installed()
        session.emit("phase", name="start", text="starting", left=settings.time - session.spent)
        allowed = prepare.wants_network(settings, session.emit)
        with prepare.network(allowed=allowed), a_worker() as worker:
            _search(session, worker)
    return path


def _search(session: Session, first: Worker) -> None:
    """Do everything, with `first` as the worker that is there from the beginning."""
    settings = session.settings
    local, left_out = prepare.local_sources(settings)
    asked = prepare.asked_sources(settings, local)
    prepare.ask_to_begin(first, settings, asked)
    listing = images.list_images(settings, session.emit)
    begun = prepare.begun_by(session, first, local)
    for reason in (*begun.described.broken, *left_out):
        session.emit("note", text=f"Left out: {reason}")
    fixed = read_fixed(begun.described.space, settings.fix)  # wrong ones end it here
    device = begun.devices[0]
    sources = asked or prepare.default_sources(settings, local, begun.described, device)

    def call(task: Any, *arguments: Any) -> Any:
        return session.call(first, task, *arguments)

    if any(each.pretrained for each in begun.described.space.strategies.values()):
        sources = prepare.provide(settings, sources, call, session.emit)
    else:
        sources = {name: replace(each, pretrained=False) for name, each in sources.items()}
    data = images.decode(
        settings, session.folder, listing, session.emit, lambda: _write_run(session)
    )
    setup = images.setup_of(settings, session.folder.path, data, sources, device)
    ranking = RANKING_SHARE * session.left()
    prior = prepare.best_prior(setup, begun.described.priors)
    setup, ranked = prepare.rank(settings, setup, call, session.emit, ranking, prior)
    regime = prepare.measure_regime(settings, setup, data, ranked, call, session.emit)
    augments = prepare.augmentations(setup, ranked[0], call)
    described = replace(begun.described.space, fixed=fixed)
    space = prepare.narrowed(described, settings, setup, ranked, regime.imbalance, augments)
    budget = _budget(session, setup, data, ranked, call(tasks.room, device))
    with Strategist(session.stop, session.note) as strategist:
        budget.ask = strategist.ask
        director = _director(session, space, budget, setup, data, regime, len(begun.devices))
        _run_trials(session, director, setup, begun.devices, first)
    end(session, director, first, setup, data, regime)


def _write_run(session: Session) -> None:
    """Make the folder a run, once it is clear that the search can be made."""
    folder, settings = session.folder, session.settings
    if folder.read_json("run.json") is None:
        meaning = {"format": FORMAT, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        folder.write_json("run.json", meaning | {"settings": settings.meaning()})
    folder.write_settings(settings.resolved().model_copy(update={"out": str(folder.path)}))


def _budget(
    session: Session, setup: Setup, data: Data, ranked: Sequence[Ranked], room: Room
) -> Budget:
    return Budget(
        deadline=time.time() + _time_for_trials(session, setup, data, ranked),
        max_trials=session.settings.trials,
        ranked={each.label: each for each in ranked},
        train_images=len(setup.train),
        validation_images=len(setup.validation),
        room=room,
    )


def _director(
    session: Session,
    space: Space,
    budget: Budget,
    setup: Setup,
    data: Data,
    regime: Profile,
    devices: int,
) -> Director:
    space = prepare.hurried(space, budget)
    seed = session.settings.seed
    director = Director(
        session.folder,
        space,
        Study(space, seed),
        budget,
        seed,
        portfolio(space, regime, tuple(budget.ranked.values())),
        session.emit,
        folds=data.split.folds,
        images=effective_images(setup.metric, setup.validation.labels),
        seats=session.settings.workers or devices,
    )
    director.lockstep = session.settings.engine == "local"  # Ray ends all of them or none
    director.resume()
    return director


def _time_for_trials(
    session: Session, setup: Setup, data: Data, ranked: Sequence[Ranked]
) -> float:
    """Return the seconds for trials: what is left, less what the finish will need."""
    finish = finish_seconds(session.settings, setup, data, ranked)
    return max(session.left() - finish, LEAST_SHARE * session.left())


def finish_seconds(
    settings: Settings, setup: Setup, data: Data, ranked: Sequence[Ranked]
) -> float:
    """Return the seconds that exports, their proof and the reading of the test part may take."""
    slowest = min(each.fp32_images_per_second for each in ranked)
    passes = len(settings.export) + 2
    passed = passes * len(setup.validation) + 2 * len(data.split.test)
    return FINISH_SECONDS + 1.2 * passed / slowest


def _run_trials(
    session: Session, director: Director, setup: Setup, devices: Sequence[str], first: Worker
) -> None:
    def cancel() -> None:
        director.cancelled = True

    session.stop.then = cancel
    session.stop.check()
    session.emit("phase", name="search", text="searching")
    count = session.settings.workers or len(devices)
    threads = max(1, setup.threads // count)
    if session.settings.engine == "ray":
        allow_gpu = session.settings.device != "cpu"
        ray.run_trials(director, replace(setup, threads=threads), count, allow_gpu)
        director.end()
        return
    seats = [Seat(first, devices[0], threads)]
    seats += [Seat(Worker(), devices[i % len(devices)], threads) for i in range(1, count)]
    try:
        run_trials(director, setup, seats)
        director.end()
    finally:
        for seat in seats[1:]:
            seat.worker.close()


def dry_run(settings: Settings) -> list[str]:
    """Return what a search would do, in sentences; decodes for the search to come, trains nothing.

    Raises:
        AutoftError: what the search itself would refuse at once.
    """
    path = choose_folder(settings)
    if path.exists():
        check_resumable(settings, RunFolder(path))
    asked = prepare.names(settings)
    for kind, names in (("strategy", asked.strategies), ("head", asked.heads)):
        for name in names:
            plugins.find(kind, name)
    notes: list[str] = []

    def emit(kind: str, **data: Any) -> None:
        if kind == "note":
            notes.append(f"Note: {data['text']}")

    data = images.read_data(settings, emit)
    first, *more = what_there_is(settings, data)
    return [first, *notes, *more, f"Run folder: {path}."]


def what_there_is(settings: Settings, data: Data) -> list[str]:
    """Return what a search has to work with, in sentences; nothing is measured for it."""
    asked = prepare.names(settings)
    local, _ = prepare.local_sources(settings)
    chosen = prepare.asked_sources(settings, local) or (local and prepare.with_embedded(local))
    fitting = f"those of the size that fits device and time, and {prepare.EMBEDDED}"
    known, size, store = doctor.report(data.catalog), data.image_size, data.store
    return [
        f"{doctor.headline(known)}; {len(data.catalog.excluded)} excluded; {size} pixels a side, "
        f"{store.rows * store.resize**2 * 3 / 1e6:.0f} MB decoded.",
        f"{len(data.split.train())} to train, {len(data.split.validation())} to validate, "
        f"{len(data.split.test)} to test; {data.split.folds} fold(s).",
        f"Backbones: {', '.join(chosen) or fitting}.",
        f"Strategies: {', '.join(asked.strategies)}.",
        f"Heads: {', '.join(asked.heads)}.",
        f"Time: {settings.time:g} s in all, exports ({', '.join(settings.export)}) included; "
        f"trials: {settings.trials or 'as many as fit'}.",
    ]


def export_trial(
    run: Path, *, formats: Sequence[str], trial: int | None, out: Path | None, listen: Listener
) -> Path:
    """Export the winner of a run, or another trial whose weights are kept; return the folder.

    The locked test part is not read again: what was read of it stays with the winner. In the
    run's own `best/` the formats that are there are made and proven anew with the others.

    Raises:
        UsageError: no such run, trial or format.
        DataError: its weights are not kept.
    """
    folder = open_run(run)
    try:
        check_formats(tuple(formats))
    except ValueError as error:
        raise UsageError(f"--formats cannot be used: {error}.") from error
    best, result = _trial_to_export(folder, trial), folder.read_json(RESULT)
    wins = result is not None and result["winner"]["trial"] == best.number
    place = out or (folder.best if trial is None else run / "exports" / f"{trial:04d}")
    if place.resolve() == folder.best.resolve():
        formats = [name for name in FORMATS if name in formats or _exported(place, name)]
    settings = read_saved(run)
    with listen_for_stop() as stop, claim(run) as held, a_worker() as worker:
        session = Session(settings, held, listen, stop, time.monotonic())
        listing = images.list_images(settings, session.emit)
        data = images.decode(settings, held, listing, session.emit)
        job = FinishJob(
            best,
            None,
            data.part(np.empty(0, np.int64)),
            tuple(formats),
            place.resolve(),
            data.split.hash,
            Estimate(**result["test"]) if wins and result and result["test"] else None,
        )
        sources = prepare.known_sources(held)
        setup = images.setup_of(settings, held.path, data, sources, "cpu")
        finished: Finished = session.call(worker, tasks.finish, setup, job)
        if finished.notes:
            raise MachineError(" ".join(finished.notes))
    return place


def _exported(place: Path, name: str) -> bool:
    proofs = RunFolder(place).read_json("model.json") or {}
    return name in {proof["format"] for proof in proofs.get("parity", [])}


def _trial_to_export(folder: RunFolder, trial: int | None) -> TrialResult:
    results = folder.trials()
    if trial is None:
        return winner.choose(results)
    chosen = [result for result in results if result.number == trial and result.of is None]
    if not chosen:
        numbers = ", ".join(str(result.number) for result in winner.usable(results)[:10])
        raise UsageError(f"{folder.path} has no finished trial {trial}. The best are: {numbers}.")
    return chosen[0]
