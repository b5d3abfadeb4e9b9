"""The pixel store: every image decoded once into one file that all trials and processes share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import weakref
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import numpy as np
import numpy.typing as npt
import PIL
import xxhash

from autoft.data.cache.entries import publish
from autoft.data.cache.files import DISK_FULL, cache_root, machine_errors, write_json_atomic
from autoft.data.cache.holding import hold, release
from autoft.data.pixels.decode import Pixels
from autoft.errors import MachineError

STORE_VERSION: Final = 2
PIXELS: Final = "pixels"
CHECKED_BYTES: Final = 2**30
CHECKED_SECONDS: Final = 2.0  # on a slow disk; what is not proven then is when it is first read
_ROWS: Final = "pixels.u8"
_SUMS: Final = "sums.u64"
_STORE: Final = "store.json"

Rows = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint8]


class Store(Protocol):
    """Decoded images by row; `key` names their content: equal keys, equal pixels in every row."""

    @property
    def rows(self) -> int:
        """Return the number of images."""

    @property
    def resize(self) -> int:
        """Return their side in pixels."""

    @property
    def key(self) -> str:
        """Return the name of their content."""

    def read(self, rows: Rows) -> Pixels:
        """Return a copy of `rows`, uint8 (B, resize, resize, 3)."""


@dataclass(frozen=True)
class PixelStore:
    """A `Store` in the file `path`, which all processes read through the one page cache."""

    path: str
    rows: int
    resize: int
    key: str

    def read(self, rows: Rows) -> Pixels:
        """Return a copy of `rows`, uint8 (B, resize, resize, 3), each proven once a process.

        Raises:
            MachineError: the file is damaged or gone; the next command decodes anew.
        """
        return self._reader.read(np.asarray(rows, np.int64))

    @cached_property
    def _reader(self) -> _Reader:
        return _Reader(self)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the path, never the pixels."""
        return {column.name: getattr(self, column.name) for column in fields(self)}


class _Reader:
    """The open file of a store in this process, and which of its rows were proven to be whole.

    Not a memory map: of a file that another process cut short a map kills the reader (SIGBUS).
    """

    def __init__(self, store: PixelStore) -> None:
        self._folder = Path(store.path).parent  # not the store: that would be a circle
        self._rows = store.rows
        self._shape = (store.resize, store.resize, 3)
        self._bytes = store.resize * store.resize * 3
        with contextlib.suppress(MachineError):  # a cache that this process can only read
            hold(self._folder)
        try:
            self._sums = np.fromfile(self._folder / _SUMS, np.uint64)
            self._file = os.open(store.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from error
        weakref.finalize(self, os.close, self._file)
        self._proven = np.zeros(store.rows, np.bool_)

    def read(self, rows: Rows) -> Pixels:
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._rows:
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a store of {self._rows}")
        pixels = np.empty((len(rows), *self._shape), np.uint8)
        flat = pixels.reshape(-1).data
        for place, row in enumerate(rows.tolist()):
            self._fill(flat[place * self._bytes : (place + 1) * self._bytes], row)
        self._prove(rows, pixels)
        return pixels

    def _fill(self, room: memoryview, row: int) -> None:
        offset = row * self._bytes
        while room:
            try:
                count = os.preadv(self._file, [room], offset)
            except OSError as error:
                raise self._damaged(error.strerror or str(error)) from error
            if not count:
                raise self._damaged(f"it ends before row {row}")
            room, offset = room[count:], offset + count

    def _prove(self, rows: Rows, pixels: Pixels) -> None:
        fresh = np.flatnonzero(~self._proven[rows])
        for place in fresh.tolist():
            row = int(rows[place])
            if row >= len(self._sums) or checksum(pixels[place]) != self._sums[row]:
                raise self._damaged(f"row {row} is not what was written")
        self._proven[rows[fresh]] = True

    def _damaged(self, what: str) -> MachineError:
        """Set the store aside, so that the next command decodes anew, and say so."""
        with contextlib.suppress(OSError):
            (self._folder / _STORE).unlink()
        return MachineError(
            f"The decoded images in {str(self._folder)!r} were damaged ({what}) and have been set "
            "aside; repeat the command, which decodes them anew, and check the disk if it happens "
            "again."
        )


class StoreWriter:
    """Writes rows into a folder of `building`; `publish` gives the store its name."""

    def __init__(self, folder: Path, rows: int, resize: int) -> None:
        """Open the file at the size of `rows` images, which tells others what is to come."""
        self.rows = 0
        self._folder = folder
        self._resize = resize
        self._sums = array("Q")
        self._full = False
        # Written as a file, not through a map: there a full disk would kill the process.
        self._file = (folder / _ROWS).open("wb", buffering=0)
        self._file.truncate(rows * row_bytes(resize))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, pixels: Pixels, total: int) -> None:
        """Append one image (resize, resize, 3) with its `checksum`.

        A full disk ends the writing and gives back what was taken, but not the pass: `publish`
        tells.

        Raises:
            MachineError: the cache cannot be written.
        """
        self.rows += 1
        self._sums.append(total)
        room = pixels.reshape(-1).data
        with machine_errors(self._folder), self._until_full():
            while room and not self._full:
                room = room[self._file.write(room) :]

    def publish(self, key: str) -> PixelStore | None:
        """Make what was written durable and give it the name `key`; None if the disk is full.

        Raises:
            MachineError: the cache cannot be written.
        """
        with machine_errors(self._folder), self._until_full():
            self._file.truncate(self.rows * row_bytes(self._resize))
            os.fsync(self._file.fileno())
            with (self._folder / _SUMS).open("wb") as sums:
                np.array(self._sums, np.uint64).tofile(sums)
                os.fsync(sums.fileno())
        if self._full:
            return None
        about = {"version": STORE_VERSION, "key": key, "rows": self.rows, "resize": self._resize}
        write_json_atomic(self._folder / _STORE, about)
        store = PixelStore(str(_entry(key) / _ROWS), self.rows, self._resize, key)
        publish(self._folder, _entry(key), lambda: _is_whole(store, _entry(key)))
        return store

    @contextlib.contextmanager
    def _until_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self._full = True
            self._file.truncate(0)


def row_bytes(resize: int) -> int:
    """Return the bytes of one image."""
    return resize * resize * 3


def checksum(pixels: Pixels) -> int:
    """Return the 64 bits by which a row is recognised."""
    return xxhash.xxh3_64_intdigest(pixels.data)


def store_key(digests: Digests, resize: int, interpolation: str) -> str:
    """Return the key of the images with `digests` (rows, 32), the SHA-256 of their files.

    Another version of Pillow may decode the same files to other pixels: it has other keys.
    """
    made = [STORE_VERSION, PIL.__version__, resize, interpolation]
    name = hashlib.sha256(json.dumps(made).encode("ascii"))
    name.update(np.ascontiguousarray(digests).data)
    return name.hexdigest()[:32]


def find_store(key: str, rows: int, resize: int) -> PixelStore | None:
    """Return the whole store of this content, held, or None where it has to be made.

    Up to `CHECKED_BYTES` of rows all over it are proven.

    Raises:
        MachineError: the cache cannot be written.
    """
    entry = _entry(key)
    hold(entry)
    store = PixelStore(str(entry / _ROWS), rows, resize, key)
    if _is_whole(store, entry):
        return store
    release(entry)
    return None


def _entry(key: str) -> Path:
    return cache_root() / PIXELS / key


def _is_whole(store: PixelStore, entry: Path) -> bool:
    about = {"version": STORE_VERSION, "key": store.key, "rows": store.rows}
    try:
        if json.loads((entry / _STORE).read_bytes()) != {**about, "resize": store.resize}:
            return False
        size = row_bytes(store.resize)
        if Path(store.path).stat().st_size != store.rows * size:
            return False
        _prove_some(store, min(store.rows, max(1, CHECKED_BYTES // size)))
    except (OSError, ValueError, MachineError):
        return False  # absent or damaged: it can be made again
    return True


def _prove_some(store: PixelStore, count: int) -> None:
    """Read `count` rows spread over the file, coarsely first, as long as that is quick."""
    deadline = time.monotonic() + CHECKED_SECONDS
    spread = np.linspace(0, store.rows - 1, count).astype(np.int64)
    for start in (0, 4, 2, 6, 1, 5, 3, 7):
        for row in spread[start::8]:
            store.read(row[None])
            if time.monotonic() > deadline:
                return
