"""Arrays by row, kept in the cache for all processes: features, and what frozen stages give.

An entry is a chunk of rows under one key. Rows are read into memory of the caller's own, not
through a map: a file that another process cut short would kill the reader of a map (SIGBUS).
Every row has a checksum, which its number is part of, and is proven when a process first reads it.

<cache>/<kind>/<key>-<hash of the rows>/   rows.i64, values, sums.u64, and about.json last
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from autoft.data.cache.entries import NoRoom, building, discard, make_room, publish
from autoft.data.cache.files import DISK_FULL, cache_root, machine_errors
from autoft.data.cache.holding import hold, release
from autoft.errors import MachineError

VERSION: Final = 1
CHECKED_ROWS: Final = 16  # of a chunk, when it is opened
CHECKED_SECONDS: Final = 0.1
HALF_MOST: Final = 65504.0
HALF_LEAST: Final = 2.0**-14  # below it fp16 has fewer digits
ROW_BYTES: Final = 16  # beside its values: its number and its checksum
ABOUT_BYTES: Final = 512
_ROWS, _VALUES, _SUMS, _ABOUT = "rows.i64", "values", "sums.u64", "about.json"
# The last: of a disk, or a user, that allows no file as large.
_FULL: Final = (*DISK_FULL, errno.EFBIG)
# What keeps this process from opening a file that may well be whole.
_OURS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)

Rows = NDArray[np.int64]
Values = NDArray[np.floating[Any]]
Number = Literal["float16", "float32"]


@dataclass(frozen=True)
class Layout:
    """What a row is: tensors of these shapes, one after the other, in one number format."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: Number

    @property
    def widths(self) -> tuple[int, ...]:
        """Return how many numbers each tensor has."""
        return tuple(map(prod, self.shapes))

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row."""
        return sum(self.widths) * np.dtype(self.dtype).itemsize


class Damaged(Exception):
    """Says what is wrong with kept rows, which have been set aside: compute them again."""


def fits_half(array: Values) -> bool:
    """Tell whether fp16 holds numbers to 3 digits of the largest; those not finite are no matter.

    Beyond 65,504 they would become infinite, and where the largest is below 6e-5 all are coarse.
    """
    return half_holds(largest_of(array))


def largest_of(array: Values) -> float:
    """Return the largest absolute value of those that are finite, 0 if none is."""
    largest = max(-float(array.min(initial=0.0)), float(array.max(initial=0.0)))
    if np.isfinite(largest):
        return largest
    return float(np.abs(array[np.isfinite(array)]).max(initial=0.0))


def half_holds(largest: float) -> bool:
    """Tell whether fp16 holds numbers of which this is the largest."""
    return largest == 0 or HALF_LEAST <= largest <= HALF_MOST


class RowReader:
    """The open chunks of one key; what they hold is not evicted as long as this lives.

    `rows` are those it has, ascending. Where chunks differ in number format, `layout` has the
    wider one.
    """

    def __init__(self, chunks: list[_Chunk]) -> None:
        self._chunks = chunks
        dtype: Number = "float16"
        if any(chunk.layout.dtype == "float32" for chunk in chunks):
            dtype = "float32"
        self.layout = Layout(chunks[0].layout.shapes, dtype)
        joined = np.concatenate([chunk.rows for chunk in chunks])
        self.rows, first = np.unique(joined, return_index=True)
        lengths = [len(chunk.rows) for chunk in chunks]
        starts = np.cumsum([0, *lengths[:-1]])
        self._owner = np.repeat(np.arange(len(chunks)), lengths)[first]
        self._place = first - starts[self._owner]

    def read(self, rows: Rows) -> tuple[Values, ...]:
        """Return each tensor of `rows` (B,), which may be in any order: (B, *shape).

        Raises:
            Damaged: what is read is not what was written.
            KeyError: a row is none of `self.rows`.
        """
        found = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        if not np.array_equal(self.rows[found], rows):
            raise KeyError(f"rows {np.setdiff1d(rows, self.rows)[:3].tolist()} are not kept")
        widths = self.layout.widths
        values = np.empty((len(rows), sum(widths)), self.layout.dtype)
        for owner, place, start, stop in _runs(self._owner[found], self._place[found]):
            self._chunks[owner].read_into(values[start:stop], place)
        ends = np.cumsum(widths).tolist()
        return tuple(
            values[:, end - width : end].reshape(len(rows), *shape)
            for end, width, shape in zip(ends, widths, self.layout.shapes, strict=True)
        )


class _Chunk:
    """An open entry, proven bit by bit."""

    def __init__(self, entry: Path, rows: Rows, sums: NDArray[np.uint64], about: Any) -> None:
        """Open the file of values.

        Raises:
            Damaged: it has another size.
            OSError: it cannot be opened.
        """
        self.entry = entry
        self.rows = rows
        shapes = tuple(tuple(map(int, shape)) for shape in about["shapes"])
        self.layout = Layout(shapes, about["dtype"])
        self._sums = sums
        self._proven = np.zeros(len(rows), np.bool_)
        self._file = os.open(entry / _VALUES, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, _let_go, entry, self._file)
        if os.fstat(self._file).st_size != self.layout.row_bytes * len(rows):
            raise Damaged("the file of values has another size")

    def is_at_its_name(self) -> bool:
        """Tell whether what is kept under this name is still what is open here."""
        with contextlib.suppress(OSError):
            if (self.entry / _ABOUT).exists():
                named = (self.entry / _VALUES).stat()
                return os.path.samestat(named, os.fstat(self._file))
        return False

    def read_into(self, room: Values, place: int) -> None:
        """Fill `room` (B, W) with the rows at `place` and after it.

        Raises:
            Damaged: they are not what was written; the entry has been set aside.
        """
        same = room.dtype == self.layout.dtype
        values = room if same else np.empty(room.shape, self.layout.dtype)
        try:
            self._fill(values, place)
            self._prove(values, place)
        except (Damaged, OSError) as error:
            _set_aside(self.entry)
            raise Damaged(str(error)) from error
        if not same:
            room[:] = values

    def prove_some(self) -> None:
        """Read rows spread over the chunk, as long as that is quick.

        Raises:
            Damaged: they are not what was written.
        """
        deadline = time.monotonic() + CHECKED_SECONDS
        room = np.empty((1, sum(self.layout.widths)), self.layout.dtype)
        count = min(len(self.rows), CHECKED_ROWS)
        for place in np.linspace(0, len(self.rows) - 1, count).astype(int).tolist():
            self._fill(room, place)
            self._prove(room, place)
            if time.monotonic() > deadline:
                return

    def _fill(self, values: Values, place: int) -> None:
        room = values.reshape(-1).view(np.uint8).data
        offset = place * self.layout.row_bytes
        while room:
            count = os.preadv(self._file, [room], offset)
            if not count:
                raise Damaged(f"the file ends before row {self.rows[place]} does")
            room, offset = room[count:], offset + count

    def _prove(self, values: Values, place: int) -> None:
        proven = self._proven[place : place + len(values)]
        for at in np.flatnonzero(~proven).tolist():
            row = int(self.rows[place + at])
            if _sum_of(values[at], row) != self._sums[place + at]:
                raise Damaged(f"row {row} is not what was written")
        proven[:] = True


_open: weakref.WeakValueDictionary[Path, _Chunk] = weakref.WeakValueDictionary()
"""The open chunks of this process: what was proven for one reader is for the next."""
_dropped: deque[Path] = deque()
"""Chunks that nobody has open any more; only noted where they end, which may be anywhere."""
_written: list[_Chunk] = []
"""What this process wrote last under one key: it stays until another key is written."""
_lock = threading.RLock()


def find_rows(kind: str, key: str) -> RowReader | None:
    """Open what is kept under `key`; None where that is nothing.

    Damaged chunks, and those of other shapes than the first, are set aside.
    """
    chunks = list[_Chunk]()
    with _lock:
        _release_dropped()
        for entry in _entries(kind, key):
            chunk = _opened(entry, key)
            if chunk is None:
                continue
            if chunks and chunk.layout.shapes != chunks[0].layout.shapes:
                _set_aside(entry)
                continue
            chunks.append(chunk)
    return RowReader(chunks) if chunks else None


def drop_rows(kind: str, key: str) -> None:
    """Set aside all that is kept under `key`."""
    for entry in _entries(kind, key):
        _set_aside(entry)


@dataclass
class RowWriter:
    """Writes the rows of one chunk; see `writing`."""

    kind: str
    key: str
    rows: Rows
    layout: Layout
    held: bool = True
    full: bool = False
    _folder: Path | None = None
    _file: BinaryIO | None = None
    _sums: list[int] = field(default_factory=list)

    def add(self, *arrays: Values) -> None:
        """Append the next rows: each of their tensors, (B, *shape).

        Raises:
            MachineError: the cache cannot be written.
            ValueError: they are of other shapes, or more than there are rows.
        """
        if (shapes := tuple(each.shape[1:] for each in arrays)) != self.layout.shapes:
            raise ValueError(f"arrays of shapes {shapes}, expected {self.layout.shapes}")
        flat = [
            each.reshape(len(each), width).astype(self.layout.dtype)
            for each, width in zip(arrays, self.layout.widths, strict=True)
        ]
        values = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)
        values = np.ascontiguousarray(values)
        numbers = self.rows[len(self._sums) : len(self._sums) + len(values)].tolist()
        self._sums += [_sum_of(each, row) for each, row in zip(values, numbers, strict=True)]
        if self._file is None or self._folder is None:
            return
        room = values.reshape(-1).view(np.uint8).data
        with self._until_full():
            while room and not self.full:
                room = room[self._file.write(room) :]

    def publish(self) -> bool:
        """Make what was written durable and known; False where there is no room for it.

        Raises:
            MachineError: the cache cannot be written.
            ValueError: rows are missing.
        """
        if len(self._sums) != len(self.rows):
            raise ValueError(f"{len(self._sums)} of {len(self.rows)} rows were added")
        if self._file is None or self._folder is None or self.full:
            return False
        sums = np.array(self._sums, np.uint64)
        with self._until_full():
            os.fsync(self._file.fileno())
            _write(self._folder / _ROWS, self.rows.tobytes())
            _write(self._folder / _SUMS, sums.tobytes())
            about = _about(self.key, self.rows, sums, self.layout)
            _write(self._folder / _ABOUT, json.dumps(about).encode("ascii"))
            entry = _entry(self.kind, self.key, self.rows)
            publish(self._folder, entry, lambda: _is_whole(entry, self.key))
            if self.held:
                self._keep(entry)
            else:
                _dropped.append(entry)
                _release_dropped()
        return not self.full

    def _keep(self, entry: Path) -> None:
        """Hold what was written until another key is written: its readers come afterwards."""
        with _lock:
            _release_dropped()
            if _written and not _written[0].entry.name.startswith(f"{self.key}-"):
                _written.clear()
            if chunk := _opened(entry, self.key):
                _written.append(chunk)

    @contextlib.contextmanager
    def _until_full(self) -> Iterator[None]:
        assert self._folder is not None
        assert self._file is not None
        try:
            with machine_errors(self._folder):
                yield
        except MachineError as error:
            if not _is_full(error):
                raise
            self.full = True
            self._file.truncate(0)


@contextlib.contextmanager
def writing(
    kind: str, key: str, rows: Rows, layout: Layout, *, held: bool = True
) -> Iterator[RowWriter]:
    """Give a writer of `rows`, ascending, under `key`; what is not published leaves nothing.

    Where there is no room, the writer takes the rows all the same, and `publish` tells. What is
    not `held` is for later: it may be evicted before anybody here has read it.

    Raises:
        MachineError: the cache cannot be written.
        ValueError: the rows are none, or not ascending.
    """
    rows = np.ascontiguousarray(rows, np.int64)
    if not len(rows) or (np.diff(rows) <= 0).any():
        raise ValueError("rows have to be ascending, and one at least")
    writer = RowWriter(kind, key, rows, layout, held)
    with ExitStack() as stack:
        try:
            make_room((layout.row_bytes + ROW_BYTES) * len(rows) + ABOUT_BYTES)
            folder = stack.enter_context(building(kind))
            with machine_errors(folder):
                # Not through a map either: there a full disk would kill the process.
                file = stack.enter_context((folder / _VALUES).open("wb", buffering=0))
                writer._folder, writer._file = folder, file
                file.truncate(layout.row_bytes * len(rows))  # tells others what is to come
        except MachineError as error:
            if not _is_full(error):
                raise
            writer.full = True
        yield writer


def _opened(entry: Path, key: str) -> _Chunk | None:
    """Return an entry open and held; None where it is gone, damaged or closed to this process."""
    known = _open.get(entry)
    if known is not None and known.is_at_its_name():
        return known
    with contextlib.suppress(MachineError):  # a cache that this process can only read
        hold(entry)
    try:
        chunk = _read(entry, key)
        _open[entry] = chunk
        chunk.prove_some()
    except OSError as error:
        if error.errno not in _OURS:
            _set_aside(entry)
    except (Damaged, ValueError, LookupError, TypeError):
        _set_aside(entry)
    else:
        return chunk
    _dropped.append(entry)
    return None


def _read(entry: Path, key: str) -> _Chunk:
    about = json.loads((entry / _ABOUT).read_bytes())
    rows = np.fromfile(entry / _ROWS, np.int64)
    sums = np.fromfile(entry / _SUMS, np.uint64)
    if about["dtype"] not in ("float16", "float32"):
        raise Damaged(f"its numbers are {about['dtype']!r}")
    chunk = _Chunk(entry, rows, sums, about)
    if about != _about(key, rows, sums, chunk.layout) or entry.name != _name(key, rows):
        raise Damaged("its description is not what was written")
    return chunk


def _is_whole(entry: Path, key: str) -> bool:
    with _lock:
        return _opened(entry, key) is not None


def _about(key: str, rows: Rows, sums: NDArray[np.uint64], layout: Layout) -> dict[str, object]:
    """Return the description of a chunk, which proves itself and the files beside the values."""
    about: dict[str, object] = {
        "version": VERSION,
        "key": key,
        "shapes": [list(shape) for shape in layout.shapes],
        "dtype": layout.dtype,
        "rows": len(rows),
        "rows_sum": xxhash.xxh3_64_hexdigest(rows.tobytes()),
        "sums_sum": xxhash.xxh3_64_hexdigest(sums.tobytes()),
    }
    return {**about, "sum": xxhash.xxh3_64_hexdigest(json.dumps(about).encode())}


def _sum_of(values: Values, row: int) -> int:
    return xxhash.xxh3_64_intdigest(values.data, row)


def _runs(owners: Rows, places: Rows) -> Iterator[tuple[int, int, int, int]]:
    """Yield (owner, place, start, stop) of stretches that lie in a file as they are asked for."""
    if not len(owners):
        return
    breaks = np.flatnonzero((np.diff(owners) != 0) | (np.diff(places) != 1)) + 1
    starts = np.concatenate([[0], breaks])
    stops = [*breaks.tolist(), len(owners)]
    firsts = owners[starts].tolist(), places[starts].tolist()
    yield from zip(*firsts, starts.tolist(), stops, strict=True)


def _entry(kind: str, key: str, rows: Rows) -> Path:
    return cache_root() / kind / _name(key, rows)


def _name(key: str, rows: Rows) -> str:
    return f"{key}-{xxhash.xxh3_128_hexdigest(rows.tobytes())}"


def _entries(kind: str, key: str) -> list[Path]:
    try:
        with os.scandir(cache_root() / kind) as found:
            return sorted(Path(each.path) for each in found if each.name.startswith(f"{key}-"))
    except OSError:
        return []


def _set_aside(entry: Path) -> None:
    with contextlib.suppress(MachineError):  # a cache that this process can only read
        discard(entry)


def _let_go(entry: Path, file: int) -> None:
    os.close(file)
    _dropped.append(entry)


def _release_dropped() -> None:
    """Let go of what nobody has open any more."""
    while _dropped:
        if (entry := _dropped.popleft()) not in _open:
            with contextlib.suppress(MachineError):
                release(entry)


def _is_full(error: MachineError) -> bool:
    cause = error.__cause__
    return isinstance(error, NoRoom) or (isinstance(cause, OSError) and cause.errno in _FULL)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
