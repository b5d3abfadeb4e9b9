"""What a frozen prefix gives of images, by row: computed once, kept on disk, in memory, on a GPU.

On disk it is shared by all trials and processes, now and later, and read through the one page
cache; where there is no room it stays in memory. What is damaged is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoft.errors import MachineError
from autoft.training import plan
from autoft.training.job import Mode, Rows
from autoft.training.rowstore import (
    Damaged,
    Layout,
    Number,
    RowReader,
    Values,
    find_rows,
    fits_half,
    writing,
)

KIND = "activations"
CHUNK = 2048  # images that are computed and written at once
SPARED = 0.5  # of the free memory is left alone

Read = Callable[[Rows], Tensor]
"""Returns (B, W) of rows (B,), as they are kept."""


class NoPlace(Exception):
    """Neither the cache nor the memory has room for a view."""


@dataclass(frozen=True)
class View:
    """Which view of the images: how they are augmented, and which of the views that gives."""

    augment: str = "none"
    number: int = 0


class Activations:
    """What one prefix gives, of several views; `note` says what went wrong ("": nothing).

    `compute` returns fp32 (N, W) of rows (N,) in a view; it may be called from another thread.
    `key` names what it returns for a view and a number format. With `exact` numbers stay fp32.
    """

    def __init__(
        self,
        compute: Callable[[Rows, View], NDArray[np.float32]],
        key: Callable[[View, Number], str],
        mode: Mode,
        device: torch.device,
        *,
        exact: bool,
    ) -> None:
        self._compute = compute
        self._key = key
        self._mode = mode
        self._device = device
        self._exact = exact
        self._opened: dict[tuple[View, bytes], Read] = {}
        self.note = ""

    def is_kept(self, rows: Rows, view: View) -> bool:
        """Tell whether all of `rows` are in the cache."""
        return not len(self._missing(rows, self._reader(view)))

    def ready(self, rows: Rows, view: View) -> Read:
        """Have all of `rows` computed, and return what reads them.

        Raises:
            NoPlace: there is no room for them.
        """
        rows = np.unique(rows)
        if (known := self._opened.get((view, rows.tobytes()))) is not None:
            return known
        try:
            read = self._open(rows, view)
        except _TooLarge:
            self._exact = True  # fp16 does not hold these numbers
            read = self._open(rows, view)
        self._opened[view, rows.tobytes()] = read
        return read

    def _open(self, rows: Rows, view: View) -> Read:
        reader = self._reader(view)
        fresh, written = self._fill(rows, view, reader)
        reader = self._reader(view) if written else reader
        if self._mode == "disk" and written and reader is not None:
            return self._from_disk(reader, view)
        return self._gathered(rows, view, reader, fresh).read

    def _reader(self, view: View) -> RowReader | None:
        return find_rows(KIND, self._key(view, self._dtype))

    @property
    def _dtype(self) -> Number:
        return "float32" if self._exact else "float16"

    def _missing(self, rows: Rows, reader: RowReader | None) -> Rows:
        return np.unique(rows) if reader is None else np.setdiff1d(rows, reader.rows)

    def _fill(self, rows: Rows, view: View, reader: RowReader | None) -> tuple[list[_Held], bool]:
        """Compute what of `rows` is missing; return it, and whether all of it is on disk now."""
        missing = self._missing(rows, reader)
        fresh, written = list[_Held](), True
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            values = self._as_kept(self._compute(chunk, view))
            written = written and self._mode != "ram" and self._write(chunk, values, view)
            if not written or self._mode != "disk":
                self._check_memory(values.nbytes)
                fresh.append(_Held(chunk, torch.from_numpy(values)))
        return fresh, written

    def _as_kept(self, values: NDArray[np.float32]) -> Values:
        if self._exact:
            return values
        if not fits_half(values):
            raise _TooLarge
        return values.astype(np.float16)

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

    def _from_disk(self, reader: RowReader, view: View) -> Read:
        def read(rows: Rows) -> Tensor:
            try:
                (values,) = reader.read(rows)
            except Damaged as error:
                self.note = f"kept activations were damaged ({error}) and are computed again"
                values = self._as_kept(self._compute(rows, view))
            return torch.from_numpy(values)

        return read

    def _gathered(
        self, rows: Rows, view: View, reader: RowReader | None, fresh: list[_Held]
    ) -> _Held:
        """Return all of `rows` in one place in memory, or on the device that trains."""
        parts = list(fresh)
        known = np.concatenate([each.rows for each in fresh]) if fresh else np.empty(0, np.int64)
        stored = np.setdiff1d(rows, known)
        if len(stored):
            assert reader is not None  # or they would have been computed
            parts.append(_Held(stored, self._from_disk(reader, view)(stored)))
        order = np.concatenate([each.rows for each in parts])
        self._check_memory(sum(each.values.nbytes for each in parts))
        values = torch.cat([each.values for each in parts])[torch.from_numpy(order.argsort())]
        device = self._device if self._mode == "device" else torch.device("cpu")
        return _Held(np.sort(order), values.to(device))


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
