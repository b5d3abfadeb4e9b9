"""The images of a run: found, decoded once, split once; a run that goes on keeps its split."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoft.data import doctor
from autoft.data.catalog import Catalog
from autoft.data.dataset import Dataset, name_images, read_images
from autoft.data.pixels.ondemand import DecodedOnTheFly
from autoft.data.pixels.store import Store
from autoft.data.reading import Listing
from autoft.data.splits.file import read_split, write_split
from autoft.data.splits.split import TEST, Split, make_split
from autoft.errors import DataError
from autoft.network.sources import Source
from autoft.search.folder import RunFolder
from autoft.search.settings import Settings
from autoft.training.job import Images, Setup

CATALOG, SPLIT = "catalog.json", "split.csv"

Emit = Callable[..., None]


@dataclass(frozen=True)
class Data:
    """The images of a run: catalog, split and decoded store."""

    catalog: Catalog
    split: Split
    store: Store
    image_size: int

    def part(self, indices: Any) -> Images:
        """Return rows, labels, weights and folds of the images at `indices` of the catalog."""
        catalog = self.catalog
        return Images(
            catalog.rows[indices],
            catalog.labels[indices],
            weights=catalog.weights[indices],
            folds=self.split.fold[indices],
        )


def list_images(settings: Settings, emit: Emit) -> Listing:
    """Find the images and their labels, without opening one.

    Raises:
        AutoftError: there is nothing to train on, or it cannot be had.
    """
    emit("phase", name="scan", text=f"reading {settings.dataset}")
    return name_images(settings.dataset, settings.reading(), _progress(emit))


def decode(
    settings: Settings,
    folder: RunFolder,
    listing: Listing,
    emit: Emit,
    usable: Callable[[], None] = lambda: None,
) -> Data:
    """Decode every image once and split them; a split that the run has is kept.

    `usable` is called once it is clear that there is something to train on.

    Raises:
        DataError: the images cannot be used, or they changed since the run began.
    """
    dataset = read_images(listing, settings.reading(), settings.image_size, _progress(emit))
    split = _kept_split(settings, folder, dataset.catalog)
    usable()
    known = doctor.report(dataset.catalog)
    folder.write_json(CATALOG, known)
    if not (folder.path / SPLIT).exists():
        write_split(folder.path / SPLIT, dataset.catalog, split)
    return _told(dataset, split, known, emit)


def read_data(settings: Settings, emit: Emit) -> Data:
    """Find, decode and split the images, without a run folder.

    Raises:
        AutoftError: what a search would refuse.
    """
    listing = list_images(settings, emit)
    dataset = read_images(listing, settings.reading(), settings.image_size, _progress(emit))
    split = split_images(settings, dataset.catalog)
    return _told(dataset, split, doctor.report(dataset.catalog), emit)


def split_images(settings: Settings, catalog: Catalog) -> Split:
    """Return the split of `--split`, or a new one from the seed.

    Raises:
        DataError: the file does not fit the images, or a class is too small.
    """
    leaky = settings.allow_leak
    if settings.split:
        return read_split(
            Path(settings.split),
            catalog,
            seed=settings.seed,
            folds=settings.folds,
            allow_leak=leaky,
            left_out={entry.path for entry in catalog.excluded},
        )
    return make_split(catalog, settings.seed, folds=settings.folds, allow_leak=leaky)


def chosen_metric(settings: Settings, data: Data) -> str:
    """Return the metric asked for; by default accuracy, balanced where classes are imbalanced.

    The locked part has no say, and neither have classes without an image elsewhere.
    """
    if settings.metric != "auto":
        return settings.metric
    counts = np.bincount(data.catalog.labels[data.split.fold != TEST])
    counts = counts[counts > 0]
    balanced = counts.max() > doctor.IMBALANCED * counts.min()
    return "balanced_accuracy" if balanced else "accuracy"


def _kept_split(settings: Settings, folder: RunFolder, catalog: Catalog) -> Split:
    """Return the split that the run has, or that of a new run."""
    known = folder.read_json(CATALOG)
    if known is not None and known["fingerprint"] != catalog.fingerprint:
        raise DataError(
            f"{settings.dataset} changed since {folder.path} was begun. Start a new run with "
            f"another --out, or restore the images."
        )
    path = folder.path / SPLIT
    if path.exists():
        return read_split(path, catalog, allow_leak=settings.allow_leak)
    return split_images(settings, catalog)


def _told(dataset: Dataset, split: Split, known: Mapping[str, Any], emit: Emit) -> Data:
    """Join images and split, and say what there is; `known` is the report of the catalog."""
    data = Data(dataset.catalog, split, dataset.store, dataset.image_size)
    why = (data.store.why,) if isinstance(data.store, DecodedOnTheFly) else ()
    for text in (*doctor.warnings(known), *split.notes, *why):
        emit("note", text=text)
    emit(
        "scan",
        headline=doctor.headline(known),
        found=known["found"],
        excluded=len(data.catalog.excluded),
        reasons=[f"{each.path}: {each.reason}" for each in data.catalog.excluded[:5]],
        noticed=known["noticed"],
        classes=len(data.catalog.classes),
        image_size=data.image_size,
        train=len(split.train()),
        validation=len(split.validation()),
        test=len(split.test),
        folds=split.folds,
    )
    return data


def _progress(emit: Emit) -> Callable[[str, int, int], None]:
    def tell(text: str, done: int, total: int) -> None:
        emit("progress", text=text, done=done, total=total)

    return tell


def setup_of(
    settings: Settings, folder: Path, data: Data, sources: Mapping[str, Source], device: str
) -> Setup:
    """Return what workers are told of the data and of the backbones to look at."""
    return Setup(
        folder=folder.resolve(),
        store=data.store,
        classes=data.catalog.classes,
        train=data.part(data.split.train()),
        validation=data.part(data.split.validation()),
        sources=sources,
        image_size=data.image_size,
        metric=chosen_metric(settings, data),
        device=device,
        threads=len(os.sched_getaffinity(0)),
    )
