"""A whole search: from a data set and a time to a proven artifact and an honest number.

Read `run_search` first. Nothing heavy is imported in this process: workers do what needs torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoft.errors import MachineError, UsageError
from autoft.network.sources import Source
from autoft.search import prepare
from autoft.search.budget import Budget
from autoft.search.configs import Space
from autoft.search.director import Director
from autoft.search.ending import end
from autoft.search.engines import ray, tasks
from autoft.search.engines.local import Seat, run_trials
from autoft.search.engines.tasks import Begun
from autoft.search.engines.worker import Worker
from autoft.search.events import Listener
from autoft.search.folder import FORMAT, RESULT, claim, open_run
from autoft.search.jobs import Finished, FinishJob
from autoft.search.portfolio import portfolio
from autoft.search.prepare import Data
from autoft.search.resuming import check_resumable, choose_folder
from autoft.search.session import Session, a_worker
from autoft.search.settings import Settings, read_settings
from autoft.search.stop import listen_for_stop
from autoft.search.study import Study
from autoft.selection import winner
from autoft.selection.regime import Regime
from autoft.training.job import Ranked, Setup

FINISH_SECONDS = 30.0  # for exports, before what grows with the images
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
        if settings.offline:
            prepare.go_offline()
        _begin(session)
        with a_worker() as worker:
            _search(session, worker)
    return path


def _search(session: Session, first: Worker) -> None:
    """Do everything, with `first` as the worker that is there from the beginning."""
    settings = session.settings
    local, left_out = prepare.local_sources(settings)
    asked = prepare.asked_sources(settings, local)
    first.send(
        tasks.begin,
        settings.device,
        prepare.names(settings),
        tuple(asked.values()),
        settings.image_size or 0,
    )
    catalog = prepare.read_headers(settings, session.emit)
    try:
        begun: Begun = session.wait(first)
    except UsageError as error:
        raise prepare.with_hint(error, settings, local) from error
    for reason in (*begun.described.broken, *left_out):
        session.emit("note", text=f"Left out: {reason}")
    device = begun.devices[0]
    sources = asked or local or prepare.tier_sources(begun.described, device, settings.time)
    data = prepare.decode(settings, session.folder, catalog, session.emit)
    setup = _setup(session, data, sources, device)

    def call(task: Any, *arguments: Any) -> Any:
        return session.call(first, task, *arguments)

    setup, ranked = prepare.rank(settings, setup, call, session.emit)
    regime = prepare.measure_regime(setup, ranked, call, session.emit)
    space = _space(begun.described.space, settings, setup, ranked)
    director = _director(session, space, setup, data, ranked, regime)
    _run_trials(session, director, setup, begun.devices, first)
    end(session, director, first, setup, data, regime)


def _begin(session: Session) -> None:
    folder, settings = session.folder, session.settings
    if folder.read_json("run.json") is None:
        meaning = {"format": FORMAT, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        folder.write_json("run.json", meaning | {"settings": settings.meaning()})
    folder.write_settings(settings.resolved().model_copy(update={"out": str(folder.path)}))
    session.emit("phase", name="start", text="starting")


def _setup(session: Session, data: Data, sources: Mapping[str, Source], device: str) -> Setup:
    cores = len(os.sched_getaffinity(0))
    return Setup(
        folder=session.folder.path.resolve(),
        store=data.store,
        classes=data.catalog.classes,
        train=data.part(data.split.train),
        validation=data.part(data.split.validation),
        sources=sources,
        image_size=data.image_size,
        metric=session.settings.metric,
        device=device,
        threads=max(1, cores // (session.settings.workers or 1)),
    )


def _space(space: Space, settings: Settings, setup: Setup, ranked: Sequence[Ranked]) -> Space:
    """Narrow what is installed to what fits: scratch only where it can win, or was asked for."""
    pretrained = any(each.pretrained for each in ranked)
    large = len(setup.train) >= 20_000
    strategies = {
        name: info
        for name, info in space.strategies.items()
        if settings.strategies
        or (info.pretrained and pretrained)
        or (not info.pretrained and (large or not pretrained))
        or not info.trains_backbone
    }
    return replace(
        space,
        backbones=tuple(each.label for each in ranked),
        strategies=strategies,
        augments=prepare.augmentations(ranked),
    )


def _director(
    session: Session,
    space: Space,
    setup: Setup,
    data: Data,
    ranked: Sequence[Ranked],
    regime: Regime,
) -> Director:
    budget = Budget(
        deadline=time.time() + _time_for_trials(session, setup, data, ranked),
        max_trials=session.settings.trials,
        ranked={each.label: each for each in ranked},
        train_images=len(setup.train),
        validation_images=len(setup.validation),
    )
    seed = session.settings.seed
    first = portfolio(space, regime, ranked)
    director = Director(
        session.folder, space, Study(space, seed), budget, seed, first, session.emit
    )
    director.resume()
    return director


def _time_for_trials(
    session: Session, setup: Setup, data: Data, ranked: Sequence[Ranked]
) -> float:
    """Return the seconds for trials: what is left, less what the finish will need."""
    slowest = min(each.fp32_images_per_second for each in ranked)
    passes = len(session.settings.export) + 2
    images = passes * len(setup.validation) + 2 * len(data.split.test)
    finish = FINISH_SECONDS + 1.2 * images / slowest
    left = session.settings.time - session.spent - (time.monotonic() - session.began)
    return max(left - finish, LEAST_SHARE * left)


def _run_trials(
    session: Session, director: Director, setup: Setup, devices: Sequence[str], first: Worker
) -> None:
    def cancel() -> None:
        director.cancelled = True

    session.stop.then = cancel
    session.stop.check()
    session.emit("phase", name="search", text="searching")
    count = session.settings.workers or len(devices)
    if session.settings.engine == "ray":
        gpus = sum(device.startswith("cuda") for device in devices)
        ray.run_trials(director, setup, count, gpus)
        return
    seats = [Seat(first, devices[0])]
    seats += [Seat(Worker(), devices[i % len(devices)]) for i in range(1, count)]
    try:
        run_trials(director, setup, seats)
    finally:
        for seat in seats[1:]:
            seat.worker.close()


def dry_run(settings: Settings) -> list[str]:
    """Return what a search would do, in sentences; reads headers, trains nothing."""
    from autoft.data.catalog import read_catalog

    catalog = read_catalog(settings.dataset)
    size = settings.image_size or prepare.default_image_size(catalog)
    asked = prepare.names(settings)
    weights = f"those in {settings.weights}" if settings.weights else "the default tier's"
    return [
        f"{len(catalog.items)} images of {len(catalog.classes)} classes, "
        f"{len(catalog.excluded)} excluded; {size} pixels a side.",
        f"Backbones: {', '.join(settings.backbones) or weights}.",
        f"Strategies: {', '.join(asked.strategies)}.",
        f"Heads: {', '.join(asked.heads)}.",
        f"Time: {settings.time:g} s in all, exports ({', '.join(settings.export)}) included; "
        f"trials: {settings.trials or 'as many as fit'}.",
        f"Run folder: {choose_folder(settings)}.",
    ]


def export_trial(
    run: Path, *, formats: Sequence[str], trial: int | None, out: Path | None, listen: Listener
) -> Path:
    """Export the winner of a run, or another trial whose weights are kept; return the folder.

    The locked test part is not read again.

    Raises:
        UsageError: no such run or trial.
        DataError: its weights are not kept.
    """
    folder = open_run(run)
    results = folder.trials()
    chosen = [result for result in results if result.number == trial] if trial is not None else []
    if trial is not None and not chosen:
        numbers = ", ".join(str(result.number) for result in winner.usable(results)[:10])
        raise UsageError(f"{run} has no finished trial {trial}. The best are: {numbers}.")
    settings = read_settings({}, run / "config.toml")
    place = out or (run / "exports" / f"{trial:04d}" if chosen else folder.best)
    with listen_for_stop() as stop, claim(run) as held, a_worker() as worker:
        session = Session(settings, held, listen, stop, time.monotonic())
        catalog = prepare.read_headers(settings, session.emit)
        data = prepare.decode(settings, held, catalog, session.emit)
        best = chosen[0] if chosen else winner.choose(results)
        sources = prepare.known_sources(held)
        setup = _setup(session, data, sources, "cpu")
        job = FinishJob(
            best, None, data.part(()), tuple(formats), place.resolve(), data.split.hash
        )
        finished: Finished = session.call(worker, tasks.finish, setup, job)
        if finished.notes:
            raise MachineError(" ".join(finished.notes))
    return place
