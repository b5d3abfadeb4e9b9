"""What a pass over the files of a dataset saw, kept so that a second command reads none."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import PIL
from filelock import FileLock, Timeout

from autoft.data.cache.files import cache_root, machine_errors, write_bytes_atomic
from autoft.data.pixels.convert import DAMAGED
from autoft.data.reading import Listing

SCAN_VERSION: Final = 1
PATIENCE: Final = 2.0  # seconds of waiting for another process before it is said
_CHUNK: Final = 10_000  # paths hashed at once
_COLUMNS: Final = ("digests", "sizes", "noticed", "rows")


@dataclass(frozen=True)
class Files:
    """The distinct files behind the paths of a listing, in the order of their first paths.

    `first` (F,) is the position of a path that leads to each, `which` (N,) the file of each path.
    """

    first: npt.NDArray[np.int64]
    which: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scan:
    """What was seen of each distinct file, columns of (F,); see `examine.Examined`."""

    digests: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int32]
    noticed: npt.NDArray[np.uint16]
    rows: npt.NDArray[np.int64]
    reasons: Mapping[int, str]

    def of_rows(self) -> npt.NDArray[np.int64]:
        """Return the first file of each row, (rows,)."""
        used = np.flatnonzero(self.rows >= 0)
        first = np.unique(self.rows[used], return_index=True)[1]
        return used[first]


def distinct_files(stats: npt.NDArray[np.int64]) -> Files:
    """Tell which paths are one file by `Listing.stats` (N, 4): hard links, and links followed.

    A file without an inode number is taken for its own.
    """
    if not len(stats):
        return Files(np.zeros(0, np.int64), np.zeros(0, np.int64))
    order = np.lexsort(stats.T)  # stable: within a file by position
    ordered = stats[order]
    new = np.ones(len(stats), np.bool_)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1) | (ordered[1:, 3] == 0)
    first = order[new]
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    which = np.empty(len(stats), np.int64)
    which[order] = number[np.cumsum(new) - 1]
    return Files(np.sort(first), which)


def scan_path(listing: Listing) -> Path:
    """Return where the scan of exactly these files, in this state, is kept."""
    digest = hashlib.sha256(f"{SCAN_VERSION}\0{PIL.__version__}\0".encode())
    digest.update(listing.root.encode("utf-8", "surrogatepass"))
    for start in range(0, len(listing), _CHUNK):
        paths = "\0".join(listing.paths[start : start + _CHUNK])
        digest.update(b"\0" + paths.encode("utf-8", "surrogatepass"))
    digest.update(np.ascontiguousarray(listing.stats).data)
    return cache_root() / "scans" / f"{digest.hexdigest()[:32]}.npz"


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep other processes from making the same scan; the second finds what the first made.

    `waiting` is called once where that takes longer than `PATIENCE`.

    Raises:
        MachineError: the cache cannot be written.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with machine_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, waiting)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, waiting: Callable[[], None] | None) -> None:
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        if waiting:
            waiting()
        lock.acquire()


def save(path: Path, scan: Scan) -> None:
    """Keep a scan.

    Raises:
        MachineError: the disk is full, or the cache cannot be written.
    """
    reasons = json.dumps(list(scan.reasons.items())).encode("ascii")
    columns = {name: getattr(scan, name) for name in _COLUMNS}
    buffer = io.BytesIO()
    np.savez(buffer, **columns, reasons=np.frombuffer(reasons, np.uint8))
    write_bytes_atomic(path, buffer.getvalue())


def load(path: Path, count: int) -> Scan | None:
    """Return the kept scan of `count` files, marked as used, or None where it has to be made."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            columns = {name: kept[name] for name in _COLUMNS}
            reasons = dict(json.loads(kept["reasons"].tobytes()))
        scan = Scan(**columns, reasons=reasons)
        if not _is_sound(scan, count):
            return None
        os.utime(path)
    except (OSError, zipfile.BadZipFile, MemoryError, *DAMAGED):
        return None  # absent or damaged: it can be made again
    return scan


def _is_sound(scan: Scan, count: int) -> bool:
    shapes = [(count, 32), (count, 2), (count,), (count,)]
    types = [np.uint8, np.int32, np.uint16, np.int64]
    columns = [getattr(scan, name) for name in _COLUMNS]
    if [column.shape for column in columns] != shapes:
        return False
    if [column.dtype for column in columns] != types:
        return False
    rows = np.unique(scan.rows[scan.rows >= 0])
    bad = set(np.flatnonzero(scan.rows < 0).tolist())
    return bad == set(scan.reasons) and bool(np.array_equal(rows, np.arange(len(rows))))
