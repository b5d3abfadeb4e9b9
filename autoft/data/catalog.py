"""The catalog: which images a dataset has, their labels, and what was excluded and why."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from autoft.data.decode import BadImage, Progress, in_threads, read_size
from autoft.data.sample import (
    SAMPLE_PREFIX,
    SAMPLE_SIDE,
    SAMPLE_VERSION,
    open_sample,
    read_sample,
)
from autoft.data.scan import Found, PartName, Placed, better_root, class_folders, place, walk
from autoft.errors import DataError

MAX_BAD: Final = 0.05
EMPTY_CLASS: Final = "empty class"
_SHOWN: Final = 5  # files named in a message


@dataclass(frozen=True)
class Item:
    """One image: its path below the root with `/`, and the part its folder gives ("" = none).

    `row` is its place in every pixel store of the dataset and survives `Catalog.without`; `size`
    in bytes and `mtime_ns` tell when the file changes.
    """

    path: str
    label: str
    part: PartName = ""
    row: int = 0
    size: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True, order=True)
class Excluded:
    """A file or class folder that is not used, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Catalog:
    """The images of one dataset; `short_side` is the median shorter side in pixels."""

    name: str
    root: str
    classes: tuple[str, ...]
    items: tuple[Item, ...]
    excluded: tuple[Excluded, ...] = ()
    short_side: int = 0

    def labels(self) -> npt.NDArray[np.int64]:
        """Return the class index of every item, (N,)."""
        index = {name: number for number, name in enumerate(self.classes)}
        return np.array([index[item.label] for item in self.items], dtype=np.int64)

    def rows(self) -> npt.NDArray[np.int64]:
        """Return the pixel store row of every item, (N,)."""
        return np.array([item.row for item in self.items], dtype=np.int64)

    def fingerprint(self) -> str:
        """Return the SHA-256 of every path, label, part, size and time; of a sample its version.

        The root is left out: a dataset that moves, times kept, stays the same.
        """
        sample = (self.root, SAMPLE_VERSION) if self.root.startswith(SAMPLE_PREFIX) else ()
        known = sorted((i.path, i.label, i.part, i.size, i.mtime_ns) for i in self.items)
        return hashlib.sha256(json.dumps([sample, known]).encode("ascii")).hexdigest()

    def open(self, item: Item) -> Path | BinaryIO:
        """Return what `decode` reads the image from."""
        if self.root.startswith(SAMPLE_PREFIX):
            return open_sample(self.root.removeprefix(SAMPLE_PREFIX), item.path)
        return Path(self.root, item.path)

    def without(self, bad: Sequence[Excluded]) -> Catalog:
        """Return the catalog with the paths of `bad` moved from the items to the excluded."""
        gone = {entry.path for entry in bad}
        kept = tuple(item for item in self.items if item.path not in gone)
        return replace(self, items=kept, excluded=(*self.excluded, *bad))

    def to_json(self) -> dict[str, Any]:
        """Return plain data, one list an item in the order of `columns`; see `from_json`."""
        return {
            "name": self.name,
            "root": self.root,
            "classes": list(self.classes),
            "short_side": self.short_side,
            "excluded": [list(astuple(entry)) for entry in self.excluded],
            "columns": [column.name for column in fields(Item)],
            "items": [[getattr(i, c.name) for c in fields(Item)] for i in self.items],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Catalog:
        """Rebuild a catalog from what `to_json` returned."""
        return cls(
            name=data["name"],
            root=data["root"],
            classes=tuple(data["classes"]),
            items=tuple(
                Item(**dict(zip(data["columns"], row, strict=True))) for row in data["items"]
            ),
            excluded=tuple(Excluded(*entry) for entry in data["excluded"]),
            short_side=data["short_side"],
        )


def read_catalog(dataset: str, progress: Progress | None = None) -> Catalog:
    """Read `root/<class>/**` or `root/{train,val,test}/<class>/**`, or `sample:digits`.

    Reads only headers and writes nothing. `progress` is called with (headers read, images).

    Raises:
        DataError: the folder or its classes cannot be used; the sentence says what to do.
        UsageError: an unknown sample.
    """
    if dataset.startswith(SAMPLE_PREFIX):
        return _sample_catalog(dataset)
    root = Path(dataset).expanduser().resolve()
    _check_root(root)
    found = walk(root)
    placed, loose = place(root, found)
    _check_several(root, found, {image.label for image in placed})
    items, bad, short_side = _read_headers(root, placed, progress)
    catalog = Catalog(
        name=root.name,
        root=str(root),
        classes=tuple(sorted({item.label for item in items})),
        items=items,
        excluded=tuple(sorted(Excluded(*entry) for entry in [*found.unusable, *loose, *bad])),
        short_side=short_side,
    )
    check_bad(catalog)
    folders = class_folders(found, has_parts=any(image.part for image in placed))
    catalog = replace(catalog, excluded=(*catalog.excluded, *_empty_classes(folders, items)))
    _check_several(root, found, catalog.classes)
    check_classes(catalog)
    return catalog


def check_bad(catalog: Catalog) -> None:
    """Refuse a dataset of which more than `MAX_BAD` of the files could not be used.

    Raises:
        DataError: with the count and the first few.
    """
    bad = [entry for entry in catalog.excluded if entry.reason != EMPTY_CLASS]
    total = len(bad) + len(catalog.items)
    if len(bad) <= MAX_BAD * total:
        return
    shown = "; ".join(f"{entry.path!r}: {entry.reason}" for entry in bad[:_SHOWN])
    raise DataError(
        f"{len(bad)} of {total} files in {catalog.root!r} cannot be used ({shown}"
        f"{'; ...' if len(bad) > _SHOWN else ''}); expected at most {MAX_BAD:.0%}: replace or "
        "remove them."
    )


def check_classes(catalog: Catalog) -> None:
    """Refuse parts with different classes, and classes too small to be split.

    Raises:
        DataError: naming the classes.
    """
    counts = Counter((item.part or "train", item.label) for item in catalog.items)
    parts = {part for part, _ in counts}
    if "train" not in parts:
        raise DataError(
            f"{catalog.root!r} has no images to train on, only the parts {sorted(parts)}; "
            "expected a folder 'train' beside them, or a dataset of class folders."
        )
    for part in sorted(parts - {"train"}):
        there = {label for of, label in counts if of == part}
        here = {label for of, label in counts if of == "train"}
        if there != here:
            raise DataError(
                f"The classes of 'train' and {part!r} in {catalog.root!r} differ: only in "
                f"'train': {sorted(here - there)}; only in {part!r}: {sorted(there - here)}; "
                "expected the same class folders in both: rename, add or remove some."
            )
    needed = 1 + ("val" not in parts) + ("test" not in parts)
    small = {c: counts["train", c] for c in catalog.classes if counts["train", c] < needed}
    if small:
        listed = ", ".join(f"{name!r} has {count}" for name, count in small.items())
        raise DataError(
            f"Classes with too few images in {catalog.root!r}: {listed}; expected at least "
            f"{needed}, so that each class is in every part: add images or remove the folder."
        )


def _sample_catalog(dataset: str) -> Catalog:
    name = dataset.removeprefix(SAMPLE_PREFIX)
    items = tuple(
        Item(path, label, row=row) for row, (path, label) in enumerate(read_sample(name))
    )
    classes = tuple(sorted({item.label for item in items}))
    return Catalog(name, dataset, classes, items, short_side=SAMPLE_SIDE)


def _check_root(root: Path) -> None:
    if not root.exists():
        raise DataError(
            f"The dataset {str(root)!r} does not exist; expected a folder with one folder of "
            "images per class: check the path, or try --dataset sample:digits."
        )
    if not root.is_dir():
        raise DataError(
            f"The dataset {str(root)!r} is a file; expected a folder with one folder of images "
            "per class: unpack it if it is an archive, and give the folder."
        )


def _check_several(root: Path, found: Found, classes: Collection[str]) -> None:
    if len(classes) < 2:
        raise DataError(
            f"{str(root)!r} has one class with images, {', '.join(classes)!r}; expected at least "
            f"2 classes, one folder each.{better_root(root, found.images)}"
        )


def _read_headers(
    root: Path, placed: Sequence[Placed], progress: Progress | None
) -> tuple[tuple[Item, ...], list[tuple[str, str]], int]:
    """Return the usable images, (path, reason) of the others, and the median shorter side."""
    items: list[Item] = []
    bad: list[tuple[str, str]] = []
    sides: list[int] = []

    def read(image: Placed) -> tuple[os.stat_result, int] | str:
        path = root / image.path
        try:
            side = min(read_size(path))
            return path.stat(), side
        except BadImage as error:
            return error.reason

    # A generator of threads keeps the order, so that rows follow the sorted paths.
    for image, header in zip(placed, in_threads(read, placed, progress=progress), strict=True):
        if isinstance(header, str):
            bad.append((image.path, header))
            continue
        status, side = header
        file = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        items.append(Item(image.path, image.label, image.part, len(items), **file))
        sides.append(side)
    return tuple(items), bad, int(np.median(sides)) if sides else 0


def _empty_classes(folders: Iterable[str], items: Iterable[Item]) -> list[Excluded]:
    used = {str(parent) for item in items for parent in PurePosixPath(item.path).parents}
    return [Excluded(folder, EMPTY_CLASS) for folder in folders if folder not in used]
