"""Features by row, kept in the cache: known ones are read, the others are computed and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autoft.training.job import Rows
from autoft.training.rowstore import Damaged, Layout, drop_rows, find_rows, fits_half, writing

Features = NDArray[np.float32]
Halves = NDArray[np.floating[Any]]
"""Features as they are kept: fp16, or fp32 where that does not hold them."""
Kinds = Mapping[str, Features]
"""Features (N, F) of the same images by their key."""
Progress = Callable[[int, int], None]
Agrees = Callable[[Rows, Features], bool]
"""Computes the features of a few rows anew, and tells whether those given are right."""
FEATURES = "features"
CHUNK = 2048  # images to an entry: what a crash can cost
SPOT = 8  # images that are computed anew before what is kept is believed

_checked: set[str] = set()
"""The keys whose features this process has looked at, or made."""


def remembered(
    key: str,
    rows: Rows,
    compute: Callable[[Rows], Iterator[Kinds]],
    progress: Progress | None = None,
    agrees: Agrees | None = None,
) -> Features:
    """Return the features (N, F) of `rows`: known ones from the cache, the others by `compute`.

    `compute` yields batches in the order of the rows that it is given: features by their key,
    `key` and others that come with them. All are kept, in chunks of `CHUNK` images, so that what
    is cut off is not lost. `agrees` is asked once a process of each key; where it says no,
    nothing that was kept under the key is used.
    """
    table = _known(key, rows, agrees)
    missing = table.missing()
    done = len(rows) - len(missing)
    for start in range(0, len(missing), CHUNK):
        chunk, parts = missing[start : start + CHUNK], dict[str, list[Halves]]()
        for batch in compute(chunk):
            for name, features in batch.items():
                parts.setdefault(name, []).append(_as_kept(features))
            done += len(batch[key])
            if progress:
                progress(done, len(rows))
        table.fill(chunk, np.concatenate(parts[key]))
        for name in sorted(parts, key=lambda name: name != key):  # what was asked for is first
            _write(name, chunk, np.concatenate(parts.pop(name)))
    return table.features()


def _known(key: str, rows: Rows, agrees: Agrees | None) -> _Table:
    """Return a table of `rows` with what is kept of them, if it can be believed."""
    table = _Table(rows)
    table.read(key)
    if agrees is None or key in _checked or 0 < table.known() <= SPOT:
        return table  # of few images, the check would cost what computing them does
    _checked.add(key)
    if not table.known() or agrees(*table.some(SPOT)):
        return table
    drop_rows(FEATURES, key)
    return _Table(rows)


def _as_kept(features: Features) -> Halves:
    """Round features to fp16, or leave them where that does not hold them."""
    return features.astype(np.float16) if fits_half(features) else features


def _write(key: str, rows: Rows, features: Halves) -> None:
    """Keep features (N, F) of `rows`; those that are kept already, or have no room, are not."""
    reader = find_rows(FEATURES, key)
    if reader is None:
        _checked.add(key)  # all that there is of it was made here
    elif np.isin(rows, reader.rows).all():
        return
    dtype: Literal["float16", "float32"] = "float16" if features.itemsize == 2 else "float32"
    with writing(FEATURES, key, rows, Layout((features.shape[1:],), dtype)) as writer:
        writer.add(features)
        writer.publish()


class _Table:
    """Features by row, filled bit by bit; holds each once, however many there are."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self._places = np.unique(rows, return_inverse=True)
        self._filled = np.zeros(len(self._rows), np.bool_)
        self._features: Features = np.zeros((len(self._rows), 0), np.float32)

    def read(self, key: str) -> None:
        """Fill in what is kept under `key`."""
        reader = find_rows(FEATURES, key)
        if reader is None:
            return
        kept = np.intersect1d(self._rows, reader.rows)
        for start in range(0, len(kept), CHUNK):
            rows = kept[start : start + CHUNK]
            with suppress(Damaged):  # it can be made again
                self.fill(rows, *reader.read(rows))

    def fill(self, rows: Rows, features: Halves) -> None:
        """Take in features (N, F) of `rows`, some of those asked for."""
        if not self._filled.any():
            self._features = np.zeros((len(self._rows), features.shape[1]), np.float32)
        places = np.searchsorted(self._rows, rows)
        self._features[places] = features
        self._filled[places] = True

    def known(self) -> int:
        """Return how many rows are filled in."""
        return int(self._filled.sum())

    def some(self, count: int) -> tuple[Rows, Features]:
        """Return `count` rows that are filled in, from all over, and their features (N, F)."""
        filled = np.flatnonzero(self._filled)
        places = filled[np.linspace(0, len(filled) - 1, count).astype(int)]
        return self._rows[places], self._features[places]

    def missing(self) -> Rows:
        """Return the rows that are not filled in, ascending."""
        return self._rows[~self._filled]

    def features(self) -> Features:
        """Return the features in the order in which the rows were asked for."""
        if np.array_equal(self._places, np.arange(len(self._rows))):
            return self._features
        ordered: Features = self._features[self._places]
        return ordered
