"""A whole search: from a data set and a time to a proven artifact and an honest number.

Read `run_search` first. Nothing heavy is imported in this process: workers do what needs torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoft.errors import AutoftError, Interrupted, MachineError, UsageError
from autoft.report.tables import write_leaderboard, write_predictions
from autoft.search import prepare
from autoft.search.budget import Budget
from autoft.search.configs import Space
from autoft.search.director import Director
from autoft.search.engines import tasks
from autoft.search.engines.local import Seat, run_trials
from autoft.search.engines.worker import Message, Worker
from autoft.search.events import Event, Listener
from autoft.search.folder import RunFolder, claim, open_run
from autoft.search.jobs import Finished, FinishJob
from autoft.search.portfolio import portfolio
from autoft.search.prepare import Data
from autoft.search.settings import Settings
from autoft.search.stop import Stop, listen_for_stop
from autoft.search.study import Study, write_view
from autoft.selection import winner
from autoft.selection.regime import Regime
from autoft.training.job import Part, Ranked, Setup
from autoft.values import TrialResult

FORMAT = 1  # of the run folder
RESULT = "result.json"
NOT_WRITTEN = {"progress"}  # events that only a live view needs
FINISH_SECONDS = 30.0  # for exports, before what grows with the images
LEAST_SHARE = 0.4  # of the time goes to trials at least, whatever the finish may need


@dataclass
class Session:
    """One command at work on a run folder."""

    settings: Settings
    folder: RunFolder
    listen: Listener
    stop: Stop
    began: float
    spent: float = 0.0  # seconds of earlier commands on the same run

    def emit(self, kind: Any, **data: Any) -> None:
        """Tell the listener and the run folder what happened."""
        event = Event(kind, time.monotonic() - self.began, data)
        if kind not in NOT_WRITTEN:
            self.folder.append_event(event)
        self.listen(event)

    def call(self, worker: Worker, task: Any, *arguments: Any) -> Any:
        """Have a worker do something and wait for it.

        Raises:
            AutoftError: what the task raised; Interrupted if the user asked to stop meanwhile.
        """
        worker.send(task, *arguments)
        while True:
            message = worker.receive(0.25)
            if self.stop.asked:
                worker.kill()
                self.stop.check()
            if message is None:
                continue
            if message.kind == "progress":
                text, done, total = message.content
                self.emit("progress", text=text, done=done, total=total)
            else:
                return _content(message)


def _content(message: Message) -> Any:
    if message.kind == "result":
        return message.content
    if message.kind == "error":
        kind, text = message.content
        raise kind(text)
    if message.kind == "died":
        raise MachineError(
            f"A worker could not go on: {message.content}. If it was killed for memory, choose "
            f"smaller --backbones or a smaller --image-size, and repeat the command."
        )
    raise RuntimeError(message.content)


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
        if settings.offline:
            prepare.go_offline()
        _begin(session)
        with _worker() as worker:
            _search(session, worker, settings.time - session.spent)
    return path


def _search(session: Session, first: Worker, seconds: float) -> None:
    """Do everything, with `first` as the worker that is there from the beginning."""
    settings = session.settings

    def call(task: Any, *arguments: Any) -> Any:
        return session.call(first, task, *arguments)

    devices = call(tasks.devices, settings.device)
    described = call(tasks.describe, prepare.names(settings))
    for reason in described.broken:
        session.emit("note", text=f"Left out: {reason}")
    sources = prepare.choose_sources(settings, described, devices[0])
    prepare.check_asked(settings, sources, settings.image_size or 0, call)
    data = prepare.read_data(settings, session.folder, session.emit)
    session.stop.check()
    setup = _setup(session, data, sources, devices[0])
    setup, ranked = prepare.rank(settings, setup, call, session.emit)
    regime = prepare.measure_regime(setup, ranked, call, session.emit)
    space = _space(described.space, settings, setup, ranked)
    deadline = time.time() + _time_for_trials(session, seconds, setup, data, ranked)
    director = _director(session, space, setup, ranked, regime, deadline)
    session.emit("phase", name="search", text="searching")
    seats = _run_trials(session, director, setup, devices, first)
    try:
        _end(session, director, seats[0].worker, setup, data, regime)
    finally:
        for seat in seats:
            seat.worker.close()


def _begin(session: Session) -> None:
    folder, settings = session.folder, session.settings
    if folder.read_json("run.json") is None:
        meaning = {"format": FORMAT, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        folder.write_json("run.json", meaning | {"settings": settings.meaning()})
    folder.write_settings(settings.model_copy(update={"out": str(folder.path)}))
    session.emit("phase", name="start", text="starting")


@contextmanager
def _worker() -> Iterator[Worker]:
    worker = Worker()
    try:
        yield worker
    finally:
        worker.close()


def _setup(session: Session, data: Data, sources: Any, device: str) -> Setup:
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


def _time_for_trials(
    session: Session, seconds: float, setup: Setup, data: Data, ranked: Sequence[Ranked]
) -> float:
    """Return the seconds for trials: what is left, less what the finish will need."""
    slowest = min(each.fp32_images_per_second for each in ranked)
    formats = len(session.settings.export) + 2
    images = formats * len(setup.validation) + 2 * len(data.split.test)
    finish = FINISH_SECONDS + 1.2 * images / slowest
    left = seconds - (time.monotonic() - session.began)
    return max(left - finish, LEAST_SHARE * left)


def _director(
    session: Session,
    space: Space,
    setup: Setup,
    ranked: Sequence[Ranked],
    regime: Regime,
    deadline: float,
) -> Director:
    budget = Budget(
        deadline,
        session.settings.trials,
        {each.label: each for each in ranked},
        space,
        len(setup.train),
        len(setup.validation),
    )
    director = Director(
        session.folder,
        space,
        Study(space, session.settings.seed),
        budget,
        session.settings.seed,
        portfolio(space, regime, ranked),
        session.emit,
    )
    director.resume()
    return director


def _run_trials(
    session: Session, director: Director, setup: Setup, devices: Sequence[str], first: Worker
) -> list[Seat]:
    def cancel() -> None:
        director.cancelled = True

    session.stop.then = cancel
    if session.stop.asked:
        cancel()
    count = session.settings.workers or len(devices)
    seats = [Seat(first, devices[0])]
    seats += [Seat(Worker(), devices[i % len(devices)]) for i in range(1, count)]
    run_trials(director, setup, seats)
    return seats


def _end(
    session: Session,
    director: Director,
    worker: Worker,
    setup: Setup,
    data: Data,
    regime: Regime,
) -> None:
    """Choose the winner, finish it, and write what the run found."""
    write_leaderboard(session.folder.path / "leaderboard.csv", director.results)
    if director.cancelled:
        best = winner.usable(director.results)
        kept = f"the best so far is trial {best[0].number}" if best else "no trial had ended"
        raise Interrupted(
            f"Stopped; {kept}. `autoft resume {session.folder.path}` goes on, `autoft export "
            f"{session.folder.path}` writes the best so far."
        )
    best_trial = winner.choose(director.results)
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
    view = session.folder.path / "study.db"
    write_view(view, director.space, director.results, session.folder.path.name)
    result = _result(session, director, data, regime, job, finished)
    session.folder.write_json(RESULT, result)
    session.emit("finish", again=False, **result)


def _write_predictions(folder: RunFolder, data: Data, finished: Finished) -> None:
    from autoft.training.metrics import probabilities

    parts = {
        "validation": (data.split.validation, finished.validation_logits),
        "test": (data.split.test, finished.test_logits),
    }
    for name, (indices, logits) in parts.items():
        if logits is not None:
            items = [data.catalog.items[index] for index in indices]
            write_predictions(
                folder.path / "predictions" / f"{name}.csv",
                [item.path for item in items],
                [item.label for item in items],
                data.catalog.classes,
                probabilities(logits),
            )


def _result(
    session: Session,
    director: Director,
    data: Data,
    regime: Regime,
    job: FinishJob,
    finished: Finished,
) -> dict[str, Any]:
    """Return what `result.json` holds; its keys are documented in docs/run-folder.md."""
    statuses = [result.status for result in director.results]
    config = job.winner.config
    return {
        "metric": session.settings.metric,
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
        "seconds": round(session.spent + time.monotonic() - session.began, 1),
        "regime": {**asdict(regime), "text": regime.text},
        "backbones": _considered(session.folder),
        "classes": list(data.catalog.classes),
        "artifact": "best",
        "parity": list(finished.parity),
        "split": data.split.hash,
        "versions": json.loads((job.out / "model.json").read_text("utf-8"))["versions"],
    }


def _baseline(baseline: TrialResult | None, finished: Finished) -> dict[str, Any] | None:
    if baseline is None:
        return None
    config = baseline.config
    test = asdict(finished.baseline_test) if finished.baseline_test else None
    name = f"{config.strategy.name} + {config.head.name} on {config.backbone.name}"
    return {"name": name, "trial": baseline.number, "score": baseline.score, "test": test}


def _considered(folder: RunFolder) -> dict[str, float | None]:
    """Return the probe score of every backbone that was considered; None: it could not be had."""
    seen = [event for event in folder.events() if event["kind"] == "backbone"]
    return {event["name"]: event["score"] for event in seen}


# --- run folders: which one, and whether a run may go on ----------------------------------------


def choose_folder(settings: Settings) -> Path:
    """Return the run folder: --out, or runs/<dataset>, taken up again if it is this search's.

    Without --out, a finished run is never touched: the next one gets the next number.
    """
    if settings.out:
        return Path(settings.out)
    name = settings.dataset.rpartition(":")[2].rstrip("/") or "data"
    stem = Path("runs") / (Path(name).resolve().name or "data")
    number = 1
    while True:
        path = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        run = path / "run.json"
        if not run.exists():
            return path
        known = json.loads(run.read_text(encoding="utf-8"))["settings"]
        if known == settings.meaning() and not (path / RESULT).exists():
            return path
        number += 1


def check_resumable(settings: Settings, folder: RunFolder) -> float:
    """Return the seconds that the run has already spent; 0 for a new one.

    Raises:
        UsageError: the folder holds a run that means something else (says what), or of a format
            that this version does not know, or files that are not a run's.
    """
    known = folder.read_json("run.json")
    if known is None:
        others = {p.name for p in folder.path.iterdir()} - {"trials", "run.lock", "run.pid"}
        if others:
            raise UsageError(
                f"{folder.path} holds other files ({', '.join(sorted(others)[:3])}) and is no run "
                f"folder. Choose another --out."
            )
        return 0.0
    if known["format"] != FORMAT:
        raise UsageError(
            f"{folder.path} was written by another version of autoft (format {known['format']}, "
            f"this one knows {FORMAT}). Use that version, or another --out."
        )
    before, now = known["settings"], settings.meaning()
    changed = [f"{k} was {before.get(k)!r}, is {now[k]!r}" for k in now if before.get(k) != now[k]]
    if changed:
        raise UsageError(
            f"{folder.path} holds a run with other settings: {'; '.join(changed)}. Repeat the "
            f"settings to resume it, or choose another --out."
        )
    return _spent(folder)


def _spent(folder: RunFolder) -> float:
    """Return the seconds of all earlier commands, each up to its last event."""
    total = last = 0.0
    for event in folder.events():
        if event["kind"] == "phase" and event.get("name") == "start":
            total, last = total + last, 0.0
        last = max(last, float(event["seconds"]))
    return total + last


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
    from autoft.search.settings import read_settings

    settings = read_settings({}, run / "config.toml")
    place = out or (run / "exports" / f"{trial:04d}" if chosen else folder.best)
    with listen_for_stop() as stop, claim(run) as held, _worker() as worker:
        session = Session(settings, held, listen, stop, time.monotonic())
        data = prepare.read_data(settings, held, session.emit)
        described = session.call(worker, tasks.describe, prepare.names(settings))
        sources = prepare.choose_sources(settings, described, "cpu")
        setup = _setup(session, data, sources, "cpu")
        nothing = Part(data.part(()).rows, data.part(()).labels)
        best = chosen[0] if chosen else winner.choose(results)
        job = FinishJob(best, None, nothing, tuple(formats), place.resolve(), data.split.hash)
        finished: Finished = session.call(worker, tasks.finish, setup, job)
        if finished.notes:
            raise MachineError(" ".join(finished.notes))
    return place


__all__ = ["AutoftError", "choose_folder", "dry_run", "export_trial", "run_search"]
