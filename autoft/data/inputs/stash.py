"""Datasets that come packed or from elsewhere: made files once, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from filelock import FileLock

from autoft.data.cache.entries import building, make_room, publish
from autoft.data.cache.files import cache_root, machine_errors, write_json_atomic
from autoft.data.cache.holding import hold
from autoft.data.pixels.decode import Progress
from autoft.data.reading import PartName

DATASETS: Final = "datasets"
MANIFEST: Final = "manifest.jsonl"
_DONE: Final = "done.json"
_FILES: Final = "files"
_EVERY: Final = 256  # files between two calls of a progress function

Fill = Callable[[Path], Mapping[str, int]]
"""Writes a dataset into an empty folder and returns what it noticed, as `Listing.counts`."""


@dataclass(frozen=True)
class Stashed:
    """A dataset in the cache: its files, and what was noticed when they were written."""

    files: Path
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Fetched:
    """An encoded image from elsewhere, its label and part, and the suffix for its file."""

    data: bytes
    label: str
    part: PartName
    suffix: str


def stash(name: str, identity: object, fill: Fill, expected: int = 0) -> Stashed:
    """Return the files of `identity` (anything that JSON knows), written by `fill` if need be.

    An entry is a folder of the cache; it appears there whole, by a rename, so that neither a
    crash nor a second process ever meets half of one, and is held while this process lives.
    `name` is for people; `expected` bytes are made room for.

    Raises:
        MachineError: the cache cannot be written, or has no room.
    """
    digest = hashlib.sha256(json.dumps([name, identity]).encode("ascii")).hexdigest()[:16]
    entry = cache_root() / DATASETS / f"{_slug(name)}-{digest}"
    hold(entry)
    with _locked(entry):
        if not (entry / _DONE).is_file():
            _write(entry, fill, expected)
    counts: dict[str, int] = json.loads((entry / _DONE).read_text(encoding="ascii"))
    return Stashed(entry / _FILES, counts)


def write_images(
    folder: Path, images: Iterable[Fetched], total: int, progress: Progress | None = None
) -> int:
    """Write images and a manifest that names them into `folder`; return how many there were.

    `progress` is called with (written, total).

    Raises:
        MachineError: the folder cannot be written.
    """
    written = 0
    with machine_errors(folder), (folder / MANIFEST).open("x", encoding="ascii") as manifest:
        for written, image in enumerate(images, 1):
            # A thousand files a folder, which every file system and every person can list.
            path = f"{written // 1000:04d}/{written:07d}{image.suffix}"
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(image.data)
            row = {"path": path, "label": image.label, "split": image.part}
            manifest.write(json.dumps(row) + "\n")
            if progress and written % _EVERY == 0:
                progress(written, total)
    if progress:
        progress(written, total)
    return written


def _write(entry: Path, fill: Fill, expected: int) -> None:
    """Fill a new folder and move it to `entry`; the lock is held."""
    make_room(expected)
    with building(DATASETS) as folder:
        with machine_errors(entry):
            (folder / _FILES).mkdir()
        write_json_atomic(folder / _DONE, dict(fill(folder / _FILES)))
        if hasattr(os, "sync"):  # or a power cut could keep the name and lose the bytes
            os.sync()
        publish(folder, entry, (entry / _DONE).is_file)


@contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """Keep other processes from writing the same entry."""
    lock = FileLock(entry.with_name(f".{entry.name}.lock"))
    with machine_errors(entry):
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _slug(name: str) -> str:
    """Return `name` as a short folder name that any shell and disk takes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:40] or "dataset"
