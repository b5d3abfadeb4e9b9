"""The profile of a data set: what regime it is in, and which labels look wrong; trains nothing."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoft.data.splits.split import TEST
from autoft.search import images, prepare
from autoft.search.engines import tasks
from autoft.search.engines.worker import Worker
from autoft.search.events import Listener
from autoft.search.folder import RunFolder
from autoft.search.images import Data
from autoft.search.portfolio import first_strategies
from autoft.search.sampling import repeats_for, sample_of
from autoft.search.session import Session, a_worker
from autoft.search.settings import Settings
from autoft.search.stop import listen_for_stop
from autoft.selection.regime import Profile, judge
from autoft.training.job import Setup
from autoft.training.measures import Measured, OutOfFold, Sample
from autoft.values import PROCEDURAL


@dataclass(frozen=True)
class Suspect:
    """An image whose label is doubted: `confidence` is the probability of the label it has."""

    path: str
    label: str
    predicted: str
    confidence: float


@dataclass(frozen=True)
class Profiled:
    """What was found: the regime, the strategies that it puts first, and the doubted labels.

    `ranking` holds every image that was looked at, the most doubted first; `judge` says by what.
    """

    profile: Profile
    first: tuple[str, ...]
    ranking: tuple[Suspect, ...]
    judge: str

    @property
    def suspects(self) -> tuple[Suspect, ...]:
        """Return the images for which another class is likelier than their own."""
        return tuple(each for each in self.ranking if each.predicted != each.label)


def run_profile(settings: Settings, listen: Listener, limit: int) -> Profiled:
    """Measure at most about `limit` images with every backbone that can be had.

    Nothing is written but the cache. The test part is not looked at.

    Raises:
        AutoftError: the data cannot be read, or a backbone that was asked for cannot be had.
    """
    began = time.monotonic()
    with listen_for_stop() as stop, tempfile.TemporaryDirectory() as folder:
        session = Session(settings, RunFolder(Path(folder)), listen, stop, began)
        allowed = prepare.wants_network(settings, session.emit)
        with prepare.network(allowed=allowed), a_worker() as worker:
            return _profile(session, worker, limit)


def _profile(session: Session, worker: Worker, limit: int) -> Profiled:
    settings = session.settings
    local, left_out = prepare.local_sources(settings)
    asked = prepare.asked_sources(settings, local)
    prepare.ask_to_begin(worker, settings, asked)
    data = images.read_data(settings, session.emit)
    begun = prepare.begun_by(session, worker, local)
    for reason in left_out:
        session.emit("note", text=f"Left out: {reason}")
    device = begun.devices[0]
    sources = asked or prepare.default_sources(settings, local, begun.described, device)
    sources = prepare.provide(
        settings, sources, lambda *asked: session.call(worker, *asked), session.emit
    )
    setup = images.setup_of(settings, session.folder.path, data, sources, device)
    sample = sample_of(data, limit)
    labels = data.catalog.labels[data.split.fold != TEST]
    if not len(sample):
        weak = all(each.trained_on == PROCEDURAL for each in sources.values())
        return _result(data, sample, judge(labels, None, (), weights=True, weak=weak), {})
    pixels, found = _measure(session, worker, setup, sample)
    profile = judge(labels, pixels, found)
    (probes,) = (e.probes for e in (pixels, *found) if e.label == profile.backbones[0].backbone)
    return _result(data, sample, profile, probes)


def _measure(
    session: Session, worker: Worker, setup: Setup, sample: Sample
) -> tuple[Measured, list[Measured]]:
    """Measure pixels and every backbone; one that was asked for and fails, or all, is an error."""
    repeats = repeats_for(sample)
    session.emit("phase", name="profile", text=f"profiling {len(sample):,} images: pixels")
    pixels: Measured = session.call(worker, tasks.measure_pixels, setup, sample, repeats)
    found: list[Measured] = []
    for label in setup.sources:
        session.emit("phase", name="profile", text=f"profiling {len(sample):,} images: {label}")
        each: Measured = session.call(
            worker, tasks.measure_backbone, setup, label, sample, repeats
        )
        if each.error and session.settings.backbones:
            raise prepare.error_of(each.exit_code, each.error)
        if each.error:
            session.emit("note", text=f"Left out: {each.error}")
        found.append(each)
    if all(each.error for each in found):
        raise prepare.error_of(found[0].exit_code, found[0].error)  # the embedded one is last
    return pixels, found


def _result(
    data: Data, sample: Sample, profile: Profile, probes: Mapping[str, OutOfFold]
) -> Profiled:
    """Rank the labels by what knows the classes best."""
    catalog = data.catalog
    useful = {name: probe for name, probe in probes.items() if name not in ("majority", "random")}
    name, best = max(useful.items(), key=lambda pair: pair[1].mean, default=("", None))
    ranking: list[Suspect] = []
    if best is not None:
        order: list[Any] = best.confidence.argsort(kind="stable").tolist()
        ranking = [
            Suspect(
                catalog.paths[sample.positions[index]],
                catalog.classes[sample.labels[index]],
                catalog.classes[best.predicted[index]],
                float(best.confidence[index]),
            )
            for index in order
        ]
    return Profiled(profile, first_strategies(profile.name), tuple(ranking), name)
