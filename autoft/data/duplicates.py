"""Images that are the same, or nearly: what must not be separated, and what contradicts itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from autoft.data.pixels.decode import Pixels, Progress
from autoft.data.reading import NO_GROUP, PARTS

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

SIDE: Final = 32  # of the thumbnail that the perceptual hash looks at
KEPT: Final = 8  # frequencies kept in each direction, 64 bits in all
BATCH: Final = 256
BLOCK_BYTES: Final = 32_000_000  # of hashes compared with all others at once
LISTED: Final = 1000  # pairs of look-alikes that are named
FLAT: Final = 0.01 * 255  # coefficients below are rounding, not what an image shows
_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True, eq=False)
class NearDuplicates:
    """Rows that look the same: `leader` (rows,) is the first of those each is joined with.

    `pairs` are (row, later row, bits that differ), the first `LISTED` of `count`.
    """

    leader: Integers
    pairs: tuple[tuple[int, int, int], ...]
    count: int


class Readable(Protocol):
    """A store of `rows` decoded images, read as uint8 (B, R, R, 3)."""

    @property
    def rows(self) -> int:
        """Return the number of images."""
        ...

    def read(self, rows: Integers, /) -> Pixels:
        """Return the images at `rows`."""
        ...


def join_groups(rows: Integers, parts: npt.NDArray[np.int8], given: Integers) -> Integers:
    """Return the group of every image, (N,), numbered 0..G-1 in order of first appearance.

    Images of one row (the same bytes) are one group, and so are images of one number of `given`
    (`NO_GROUP`: none), transitively. The same bytes in two given parts are not joined: whether
    that may be is decided by `rules.check_leak`.
    """
    # An image in no part is trained on, as far as a given part is concerned.
    groups = dense(rows * len(PARTS) + np.maximum(parts, PARTS.index("train")))
    named = given != NO_GROUP
    if not named.any():
        return groups
    # Both kinds of tie pull an image to the smallest number it is tied to, until nothing moves.
    ties = dense(given[named])
    same = groups.copy()
    while True:
        before = groups
        smallest = np.full(ties.max() + 1, len(groups), np.int64)
        np.minimum.at(smallest, ties, groups[named])
        groups = groups.copy()
        groups[named] = smallest[ties]
        smallest = np.full(same.max() + 1, len(groups), np.int64)
        np.minimum.at(smallest, same, groups)
        groups = smallest[same]
        if np.array_equal(before, groups):
            return dense(groups)


def first_of_row(rows: Integers) -> Integers:
    """Return for every image the position of the first image with the same bytes, (N,)."""
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], dtype=np.int64)


def contradicted(rows: Integers, labels: Integers) -> Flags:
    """Return which images have the bytes of another image that has another label, (N,)."""
    return _differ(rows, labels)


def leaked(rows: Integers, parts: npt.NDArray[np.int8]) -> Flags:
    """Return which images have the bytes of an image in another given part, (N,)."""
    return _differ(rows, parts.astype(np.int64))


def perceptual_hashes(store: Readable, progress: Progress | None = None) -> npt.NDArray[np.uint64]:
    """Return 64 bits a row, (rows,), that resizing and re-encoding hardly change (pHash).

    The signs of the lowest frequencies of a grey thumbnail's cosine transform about their median:
    Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010).
    """
    transform = _cosines()
    hashes = np.zeros(store.rows, np.uint64)
    for start in range(0, store.rows, BATCH):
        chosen = np.arange(start, min(start + BATCH, store.rows))
        grey = _thumbnails(store.read(chosen))
        low = (transform @ grey @ transform.T).reshape(len(chosen), -1)
        low[np.abs(low) < FLAT] = 0
        # The first coefficient is the brightness: above the median, which is taken without it.
        low[:, 0] = np.inf
        bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
        hashes[chosen] = np.packbits(bits, axis=1).view(">u8")[:, 0]
        if progress:
            progress(int(chosen[-1]) + 1, store.rows)
    return hashes


def near_duplicates(
    hashes: npt.NDArray[np.uint64], distance: int, progress: Progress | None = None
) -> NearDuplicates:
    """Return which rows are within `distance` bits of each other, directly or by others."""
    leader = np.arange(len(hashes))
    pairs: list[tuple[int, int, int]] = []
    count = 0
    for row, later, apart in _near(hashes, distance, progress):
        _join(leader, row, later)
        count += len(later)
        room = LISTED - len(pairs)
        pairs += zip([row] * room, later[:room].tolist(), apart[:room].tolist(), strict=False)
    while not np.array_equal(leader, leader[leader]):
        leader = leader[leader]
    return NearDuplicates(leader, tuple(pairs), count)


def _near(
    hashes: npt.NDArray[np.uint64], distance: int, progress: Progress | None
) -> Iterator[tuple[int, Integers, npt.NDArray[np.uint8]]]:
    """Yield every row with near later ones, these, and by how many bits they differ."""
    size = max(1, BLOCK_BYTES // (8 * max(1, len(hashes))))
    for start in range(0, len(hashes), size):
        block = hashes[start : start + size, None]
        apart = np.bitwise_count(block ^ hashes[None, start:])
        close = apart <= distance
        for place in np.flatnonzero(np.count_nonzero(close, axis=1) > 1).tolist():
            later = place + 1 + np.flatnonzero(close[place, place + 1 :])
            if len(later):
                yield start + place, start + later, apart[place, later]
        if progress:
            progress(min(start + size, len(hashes)), len(hashes))


def _join(leader: Integers, row: int, later: Integers) -> None:
    """Make one set of the sets of `row` and of `later`; `leader` points to earlier rows."""

    def find(member: int) -> int:
        while leader[member] != member:
            leader[member] = leader[leader[member]]
            member = int(leader[member])
        return member

    tops = {find(member) for member in np.unique(leader[later]).tolist()} | {find(row)}
    top = min(tops)
    # Straight to the top: next time these have one leader, however many they are.
    leader[list(tops)] = leader[later] = leader[row] = top


def _differ(rows: Integers, values: Integers) -> Flags:
    """Return which entries share their row with an entry of another value, (N,)."""
    count = int(rows.max()) + 1 if len(rows) else 0
    low = np.full(count, np.iinfo(np.int64).max)
    high = np.full(count, np.iinfo(np.int64).min)
    np.minimum.at(low, rows, values)
    np.maximum.at(high, rows, values)
    return np.asarray(low[rows] != high[rows])


def dense(numbers: Integers) -> Integers:
    """Number the values 0.. in order of first appearance."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _thumbnails(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Return grey means of areas, (B, SIDE, SIDE), of uint8 (B, R, R, 3)."""
    grey = pixels @ _LUMA
    edges = np.linspace(0, grey.shape[1], SIDE + 1).astype(np.int64)
    if grey.shape[1] < SIDE:
        grey = grey.repeat(SIDE, axis=1).repeat(SIDE, axis=2)
        edges = np.linspace(0, grey.shape[1], SIDE + 1).astype(np.int64)
    sums = np.add.reduceat(np.add.reduceat(grey, edges[:-1], axis=1), edges[:-1], axis=2)
    spans = np.diff(edges)
    return np.asarray(sums / (spans[:, None] * spans[None, :]), dtype=np.float32)


def _cosines() -> npt.NDArray[np.float32]:
    """Return the KEPT lowest rows of the cosine transform of SIDE values."""
    steps = (2 * np.arange(SIDE) + 1) * np.pi / (2 * SIDE)
    return np.cos(np.arange(KEPT)[:, None] * steps[None, :]).astype(np.float32)
