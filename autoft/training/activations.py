"""What a frozen prefix gives of images, by row: computed once, kept on disk, in memory, on a GPU.

On disk it is shared by all trials and processes, now and later, and read through the one page
cache; where there is no room it stays in memory. What is damaged is computed again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoft.errors import MachineError
from autoft.training import plan
from autoft.training.job import Mode, Rows
from autoft.training.memory import is_out_of_memory
from autoft.training.rowstore import (
    HALF_MOST,
    Damaged,
    Layout,
    Number,
    RowReader,
    RowWriter,
    Values,
    find_rows,
    fits_half,
    half_holds,
    largest_of,
    writing,
)

KIND = "activations"
CHUNK = 2048  # images that are computed and written at once, at the most ...
CHUNK_BYTES = 512_000_000  # ... and what they give: while it is written it is in memory thrice
CHUNK_LEAST = 64  # images
LATE = 10.0  # seconds by which what was begun in time may end late, so that a score is not lost
SPARED = 0.5  # of the free memory is left alone
OPEN = 2  # views are open on disk at once: the one that trains and the images held out

Read = Callable[[Rows], Tensor]
"""Returns (B, W) of rows (B,), as they are kept."""


class OutOfTime(Exception):
    """It is too late to compute a view."""


class NoPlace(Exception):
    """Neither the cache nor the memory has room for a view."""


@dataclass(frozen=True)
class View:
    """Which view of the images: how they are augmented, and which of the views that gives."""

    augment: str = "none"
    number: int = 0


Computed = tuple[NDArray[np.float32], Sequence[NDArray[np.float32]]]
"""What crosses the cut of a batch, and what crosses each cut on the way."""
Compute = Callable[[Rows, View], Iterator[Computed]]
Key = Callable[[View, Number], str]


def is_kept(key: str, rows: Rows) -> bool:
    """Tell whether all of `rows` are in the cache under `key`."""
    return not len(_missing(rows, find_rows(KIND, key)))


def _missing(rows: Rows, reader: RowReader | None) -> Rows:
    return rows if reader is None else np.setdiff1d(rows, reader.rows)


class Activations:
    """What one prefix gives, of several views; `note` says what went wrong ("": nothing).

    `compute` yields fp32 (B, W) of rows (N,) in a view, batch by batch, and with it (B, W') of
    each earlier cut that `others` are the keys of: what crosses there is kept by the way. It may
    be called from another thread. `key` names what it yields for a view and a number format. With
    `exact` numbers stay fp32. Nothing more is computed after the time `until` (seconds since
    1970). `row_bytes` are those of an image in fp16, where they are known.
    """

    row_bytes = 0

    def __init__(
        self,
        compute: Compute,
        key: Key,
        mode: Mode,
        device: torch.device,
        *,
        exact: bool,
        until: float,
        others: Sequence[Key] = (),
    ) -> None:
        self._compute = compute
        self._key = key
        self._others = tuple(others)
        self._mode = mode
        self._device = device
        self.exact = exact
        self._until = until
        self._opened: dict[tuple[View, bytes], Read] = {}
        self._read = (0, 0.0)
        self.note = ""

    def ready(self, rows: Rows, view: View) -> Read:
        """Have all of `rows` computed, and return what reads them.

        Raises:
            NoPlace: there is no room for them.
            OutOfTime: it is too late to compute them.
        """
        rows = np.unique(rows)
        if (known := self._opened.pop((view, rows.tobytes()), None)) is not None:
            self._opened[view, rows.tobytes()] = known  # the latest is last
            return self._timed(known) if self._mode == "disk" else known
        try:
            read = self._open(rows, view)
        except _TooLarge:
            self.exact = True  # fp16 does not hold these numbers
            read = self._open(rows, view)
        if self._mode == "disk" and len(self._opened) >= OPEN:
            del self._opened[next(iter(self._opened))]  # files of a view that is read no more
        self._opened[view, rows.tobytes()] = read
        return read

    def bandwidth(self) -> float:
        """Return how many bytes a second were read from the disk since this was last asked.

        0.0 where nothing was. The first pass over what was just opened is left out: it proves
        every row.
        """
        (size, seconds), self._read = self._read, (0, 0.0)
        return size / seconds if seconds else 0.0

    def close(self) -> None:
        """Let go of files and memory."""
        self._opened.clear()

    def _open(self, rows: Rows, view: View) -> Read:
        fresh = self._fill(rows, view)
        reader = self._reader(view)
        if self._mode == "disk" and reader and not fresh and not len(_missing(rows, reader)):
            return self._read_with(reader, view)
        return self._gathered(rows, view, reader, fresh).read

    def _reader(self, view: View) -> RowReader | None:
        return find_rows(KIND, self._key(view, self._dtype))

    @property
    def _dtype(self) -> Number:
        return "float32" if self.exact else "float16"

    def _fill(self, rows: Rows, view: View) -> list[_Held]:
        """Compute what of `rows` is missing; return what is to be held, or is not on disk."""
        missing = _missing(rows, self._reader(view))
        fresh, written = list[_Held](), self._mode != "ram"
        for chunk in _cut_up(missing, self._chunk()):
            if time.time() > self._until:
                raise OutOfTime
            until = self._until + LATE
            values = self._computed(chunk, view, keys=self._keys(view), until=until)
            written = written and self._write(chunk, values, view)
            if not written or self._mode != "disk":
                self._check_memory(values.nbytes)
                fresh.append(_Held(chunk, torch.from_numpy(values)))
        return fresh

    def _chunk(self) -> int:
        """Return how many images are computed at once, so that the memory holds what they give."""
        size = max(1, self.row_bytes) * (2 if self.exact else 1)
        return max(CHUNK_LEAST, min(CHUNK, CHUNK_BYTES // size))

    def _keys(self, view: View) -> list[str]:
        """Return the keys of what crosses other cuts; where one needs fp32 others may, too."""
        return [] if self.exact else [key(view, "float16") for key in self._others]

    def _computed(
        self, rows: Rows, view: View, *, keys: Sequence[str] = (), until: float = math.inf
    ) -> Values:
        """Compute `rows` as they are kept; what crosses other cuts is kept under `keys`.

        Raises:
            OutOfTime: it was not done by the time `until`.
        """
        own, largest = list[Values](), 0.0
        with ExitStack() as stack:
            asides = [_Aside(stack, key, rows) for key in keys]
            for values, others in self._compute(rows, view):
                if time.time() > until:
                    raise OutOfTime
                largest = max(largest, largest_of(values))
                if not self.exact and largest > HALF_MOST:
                    raise _TooLarge
                # A copy: what crosses several cuts lies in one block.
                own.append(values.astype(self._dtype, copy=bool(others)))
                for aside, crossing in zip(asides, others, strict=False):
                    aside.add(crossing)
            for aside in asides:
                aside.publish()
        if not self.exact and not half_holds(largest):
            raise _TooLarge
        return np.concatenate(own)

    def _write(self, rows: Rows, values: Values, view: View) -> bool:
        layout = Layout((values.shape[1:],), self._dtype)
        try:
            with writing(KIND, self._key(view, self._dtype), rows, layout) as writer:
                writer.add(values)
                written, why = writer.publish(), "has no room"
        except MachineError as error:
            written, why = False, f"cannot be written ({error})"
        if not written:
            self.note = f"the cache {why}: what its frozen stages give stays in memory"
        return written

    def _check_memory(self, size: int) -> None:
        if size > (1 - SPARED) * plan.free_memory():
            raise NoPlace("neither the cache nor the memory has room for it")

    def _read_with(self, reader: RowReader, view: View) -> Read:
        """Return what reads rows that were kept, and computes again what is damaged."""

        def read(rows: Rows) -> Tensor:
            try:
                (values,) = reader.read(rows)
            except Damaged as error:
                self.note = f"kept activations were damaged ({error}) and are computed again"
                return self._again(rows, view)
            return torch.from_numpy(values)

        return read

    def _timed(self, read: Read) -> Read:
        """Return `read`, which notes how fast it was."""

        def timed(rows: Rows) -> Tensor:
            began = time.perf_counter()
            values = read(rows)
            size, seconds = self._read
            self._read = size + values.nbytes, seconds + time.perf_counter() - began
            return values

        return timed

    def _again(self, rows: Rows, view: View) -> Tensor:
        return torch.from_numpy(self._computed(rows, view))

    def _gathered(
        self, rows: Rows, view: View, reader: RowReader | None, fresh: list[_Held]
    ) -> _Held:
        """Return all of `rows` in one place in memory, or on the device that trains."""
        rest = np.setdiff1d(rows, np.concatenate([rows[:0], *(each.rows for each in fresh)]))
        gone = _missing(rest, reader)  # it was evicted or damaged since
        parts: list[tuple[Rows, Read]] = [(each.rows, each.read) for each in fresh]
        parts += [(p, partial(self._again, view=view)) for p in _cut_up(gone, self._chunk())]
        if reader:
            read = self._read_with(reader, view)
            there = np.setdiff1d(rest, gone)
            parts += [(part, read) for part in _cut_up(there, self._chunk())]
        whole = None
        for chunk, read_part in parts:
            values = read_part(chunk)
            if whole is None:
                self._check_memory(len(rows) * values[0].nbytes)
                whole = values.new_empty((len(rows), values.shape[1]))
            whole[torch.from_numpy(np.searchsorted(rows, chunk))] = values
        assert whole is not None  # a part has images
        device = self._device if self._mode == "device" else torch.device("cpu")
        try:
            return _Held(rows, whole.to(device))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise NoPlace("the device has no room for it") from error


class _Aside:
    """Writes what crosses an earlier cut, in fp16, where it is not there and there is room."""

    def __init__(self, stack: ExitStack, key: str, rows: Rows) -> None:
        self._stack, self._key, self._rows = stack, key, rows
        self._writer: RowWriter | None = None
        self._wanted = bool(len(_missing(rows, find_rows(KIND, key))))

    def add(self, values: NDArray[np.float32]) -> None:
        """Take the next rows (B, W); where they cannot be kept no more are taken."""
        self._wanted = self._wanted and fits_half(values)
        if not self._wanted:
            return
        try:
            if self._writer is None:
                layout = Layout((values.shape[1:],), "float16")
                writing_it = writing(KIND, self._key, self._rows, layout, held=False)
                self._writer = self._stack.enter_context(writing_it)
            self._writer.add(values)
            self._wanted = not self._writer.full
        except MachineError:  # what is wrong with the cache is told of what the trial needs
            self._wanted = False

    def publish(self) -> None:
        """Make known what was written, if it is whole."""
        if self._wanted and self._writer:
            with suppress(MachineError):
                self._writer.publish()


def _cut_up(rows: Rows, most: int) -> list[Rows]:
    return [rows[start : start + most] for start in range(0, len(rows), most)]


class _TooLarge(Exception):
    """A number is beyond fp16."""


@dataclass(frozen=True)
class _Held:
    """Values (N, W) of `rows` (N,), ascending, in memory."""

    rows: Rows
    values: Tensor

    def read(self, rows: Rows) -> Tensor:
        places = torch.from_numpy(np.searchsorted(self.rows, rows))
        return self.values[places.to(self.values.device)]
