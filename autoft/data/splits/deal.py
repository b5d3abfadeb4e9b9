"""Deal images to parts: by class as exactly as can be, groups whole, no class missing in a part.

NumPy alone: scikit-learn's StratifiedGroupKFold takes seconds to import in the process that
answers the user, has no parts of unequal size, and may leave a class out of a part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_STEPS: Final = 2_000  # moves that mending may take before it gives up
_STRAY: Final = (
    0.3  # how often a move that does harm is drawn by chance, so as not to go in circles
)


@dataclass(frozen=True)
class _Units:
    """What is dealt: U groups of images, with E entries (unit, class, images), by unit."""

    unit: Integers
    label: Integers
    count: Integers
    starts: Integers  # (U + 1,): the entries of unit u are starts[u] to starts[u + 1]
    sizes: Integers  # (U,) images
    totals: Integers  # (C,) images

    def entries(self, unit: int) -> slice:
        """Return where the entries of `unit` are."""
        return slice(int(self.starts[unit]), int(self.starts[unit + 1]))


def share_quota(counts: Integers, share: float, keep: Integers) -> Integers:
    """Return how many of `counts` (C,) a part of `share` gets of each class.

    At least one, leaving at least `keep` (C,). The total is rounded once, by largest remainder, so
    that small classes do not add up errors.
    """
    exact = counts * share
    take = np.floor(exact).astype(np.int64)
    missing = round(share * int(counts.sum())) - int(take.sum())
    take[np.argsort(take - exact, kind="stable")[:missing]] += 1
    return np.asarray(np.clip(take, 1, counts - keep))


def even_quota(counts: Integers, parts: int) -> Integers:
    """Return how many of `counts` (C,) each of `parts` equal parts gets, (parts, C).

    What is left of a class begins where the last one's ended, so that no two parts differ by more
    than one image.
    """
    starts = np.cumsum(counts) - counts
    turn = (np.arange(parts)[:, None] - starts) % parts
    return counts // parts + (turn < counts % parts)


def deal(
    labels: Integers, groups: Integers, quota: Integers, required: Flags, rng: np.random.Generator
) -> npt.NDArray[np.int8] | None:
    """Return the part of every image, (N,); None: no way was found that covers `required`.

    `labels` and `groups` are (N,), numbered from 0 without gaps; `quota` (P, C) says how many
    images of a class a part should get, `required` (P, C) where there must be one at least.

    Large groups go first, each to the part that lacks its classes most; single images fill up
    what is lacking, exactly, unless the groups already gave too much. Then groups are moved until
    each part has what is required. A class of which no two groups differ in their classes ends
    within the size of its largest group of its quota.
    """
    units = _units(labels, groups, quota.shape[1])
    if (required.sum(axis=0) > np.bincount(units.label, minlength=quota.shape[1])).any():
        return None
    parts, lack = _by_lack(units, quota, rng)
    if not _mend(units, parts, lack, required, rng):
        return None
    return parts[groups]


def _units(labels: Integers, groups: Integers, classes: int) -> _Units:
    entries, count = np.unique(groups * classes + labels, return_counts=True)
    unit, label = np.divmod(entries, classes)
    sizes = np.bincount(groups)
    starts = np.searchsorted(unit, np.arange(len(sizes) + 1))
    return _Units(unit, label, count, starts, sizes, np.bincount(labels, minlength=classes))


def _by_lack(
    units: _Units, quota: Integers, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int8], Integers]:
    """Return the part of every unit, (U,), and what each part still lacks of its quota, (P, C)."""
    parts = np.empty(len(units.sizes), np.int8)
    lack = quota.copy()
    for members in _alike(units, rng):
        entries = units.entries(members[0])
        label, count = units.label[entries], units.count[entries]
        if len(label) == 1:
            number = _fill(lack[:, label[0]], int(count[0]), len(members))
            parts[members] = np.repeat(np.arange(len(quota)), number)
            lack[:, label[0]] -= number * count[0]
        else:
            # The part for which the squared distance to the quota, in shares, shrinks most.
            part = int((lack[:, label] @ (count / units.totals[label])).argmax())
            parts[members] = part
            lack[part, label] -= count
    return parts, lack


def _alike(units: _Units, rng: np.random.Generator) -> Iterator[Integers]:
    """Yield units in random order, largest first; those of one class and size come together."""
    order = rng.permutation(len(units.sizes))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    kind = units.label[units.starts[:-1]]
    mixed = np.diff(units.starts) > 1
    kind[mixed] = len(units.totals) + place[mixed]
    order = order[np.lexsort((kind[order], -units.sizes[order]))]
    changes = (np.diff(kind[order]) != 0) | (np.diff(units.sizes[order]) != 0)
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(order)]
    for start, stop in itertools.pairwise(bounds):
        yield order[start:stop]


def _fill(lack: Integers, size: int, number: int) -> Integers:
    """Deal `number` groups of `size` images, one by one, to the part that lacks most.

    Returns how many each part gets, as if they were dealt in turn, in one step.
    """
    order = np.argsort(-lack, kind="stable")
    # `above[j]`: how far the lacks of the first j + 1 parts stand over their common level, which
    # is reached when they alone share all that is dealt; times j + 1, to stay with whole numbers.
    ranks = np.arange(1, len(lack) + 1)
    level = np.cumsum(lack[order]) - size * number
    above = lack[order] * ranks - level
    active = int(np.flatnonzero(above > 0)[-1]) + 1
    got = np.zeros_like(lack)
    got[order[:active]] = (lack[order[:active]] * active - level[active - 1]) // (size * active)
    for _ in range(number - int(got.sum())):
        got[np.argmax(lack - size * got)] += 1
    return got


def _mend(
    units: _Units,
    parts: npt.NDArray[np.int8],
    lack: Integers,
    required: Flags,
    rng: np.random.Generator,
) -> bool:
    """Move units, in place, until every part has every class that is required of it.

    A search in the manner of WalkSAT (Selman, Kautz, Cohen 1994): a class that a part misses is
    drawn, and the unit moved there that takes least away elsewhere. Returns whether it succeeded.
    """
    cover = np.zeros_like(lack)
    np.add.at(cover, (parts[units.unit], units.label), 1)
    if not (required & (cover == 0)).any():
        return True
    by_label = np.argsort(units.label, kind="stable")
    starts = np.searchsorted(units.label[by_label], np.arange(len(units.totals) + 1))
    for _ in range(_STEPS):
        missing = np.argwhere(required & (cover == 0))
        if not len(missing):
            return True
        part, label = missing[rng.integers(len(missing))]
        candidates = units.unit[by_label[starts[label] : starts[label + 1]]]
        # Where nothing is required nothing can be lost or won: as good as covered twice.
        counted = np.where(required, cover, 2)
        lost, cost = _losses(units, parts, lack, counted, candidates, int(part))
        best = int(np.lexsort((cost, lost))[0])
        if lost[best] >= 0 and rng.random() < _STRAY:
            best = int(rng.integers(len(candidates)))
        moved = candidates[best]
        entries = units.entries(moved)
        for whose, sign in ((parts[moved], -1), (part, 1)):
            cover[whose, units.label[entries]] += sign
            lack[whose, units.label[entries]] -= sign * units.count[entries]
        parts[moved] = part
    return False


def _losses(
    units: _Units,
    parts: npt.NDArray[np.int8],
    lack: Integers,
    cover: Integers,
    candidates: Integers,
    part: int,
) -> tuple[Integers, npt.NDArray[np.float64]]:
    """Return what moving each candidate to `part` would do, (K,) each.

    First by how many there are then more places where a class is missing; second by how much the
    squared distance to the quota, in shares, grows.
    """
    lengths = np.diff(units.starts)[candidates]
    first = np.cumsum(lengths) - lengths
    flat = np.arange(lengths.sum()) + np.repeat(units.starts[candidates] - first, lengths)
    donor, label, count = parts[units.unit[flat]], units.label[flat], units.count[flat]
    lost = (cover[donor, label] == 1).astype(np.int64) - (cover[part, label] == 0)
    grown = 2 * count * (lack[donor, label] - lack[part, label] + count) / units.totals[label]
    return np.add.reduceat(lost, first), np.add.reduceat(grown, first)
