"""The catalog: which images a dataset has, their labels and groups, what was left out and why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from autoft.data import duplicates, rules
from autoft.data.pixels.decode import NOTICED_WORDS
from autoft.data.pixels.examine import Examined
from autoft.data.reading import PARTS, Excluded, Listing, Reading
from autoft.data.splits.rules import needed_groups

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

EMPTY_CLASS: Final = "empty class"


@dataclass(frozen=True)
class Near:
    """Two images that look the same, and how many of the 64 bits of their hashes differ."""

    path: str
    like: str
    distance: int


@dataclass(frozen=True, eq=False)
class Catalog:
    """The usable images of one dataset; columns have one entry an image, (N,).

    `labels` are positions in `classes`, `parts` in `PARTS`, `rows` places in the pixel store:
    images of the same bytes share one. Images of one number of `groups` must not be separated;
    those that are `pinned` may only be trained on, since their label is in doubt. `noticed` says
    in words what was seen in how many files; `fingerprint` changes with any path, label or byte.
    `near` names the first of the `near_count` pairs of look-alikes.
    """

    name: str
    root: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: Integers
    parts: npt.NDArray[np.int8]
    rows: Integers
    groups: Integers
    weights: npt.NDArray[np.float32]
    pinned: Flags
    fingerprint: str = ""
    excluded: tuple[Excluded, ...] = ()
    near: tuple[Near, ...] = ()
    near_count: int = 0
    noticed: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of usable images."""
        return len(self.paths)

    @property
    def counts(self) -> Integers:
        """Return the number of images of every class, (C,)."""
        return np.bincount(self.labels, minlength=len(self.classes)).astype(np.int64)

    @property
    def imbalance(self) -> float:
        """Return how many times larger the largest class is than the smallest that has images."""
        counts = self.counts[self.counts > 0]
        return float(counts.max() / counts.min())

    def label_of(self, index: int) -> str:
        """Return the class of the image at `index` by name."""
        return self.classes[int(self.labels[index])]


def make_catalog(
    listing: Listing,
    examined: Examined,
    reading: Reading,
    near: duplicates.NearDuplicates | None = None,
) -> Catalog:
    """Join what was named and what was seen; leave out what cannot be used, and say so.

    `near` tells which rows look the same; None: that was not asked for.

    Raises:
        DataError: more than `max_bad` of the files are unusable, fewer than two classes are
            left, or the same image is in two given parts.
    """
    kept, conflict, excluded = _usable(listing, examined, reading)
    classes, labels = _classes(listing, kept, reading)
    if not reading.keep_empty:
        excluded += [Excluded(name, EMPTY_CLASS) for name in listing.empty]
    rows, parts = examined.rows[kept], listing.parts[kept]
    paths = tuple(listing.paths[index] for index in kept)
    alike, reported = _look_alikes(rows, paths, near)
    catalog = Catalog(
        name=listing.name,
        root=listing.root,
        classes=classes,
        paths=paths,
        labels=labels,
        parts=parts,
        rows=rows,
        groups=duplicates.join_groups(alike, parts, listing.groups[kept]),
        weights=listing.weights[kept],
        pinned=conflict[kept],
        excluded=tuple(sorted(excluded)),
        near=reported,
        near_count=near.count if near else 0,
        noticed=_noticed(listing, examined.noticed[kept], _torn(rows, alike, parts)),
    )
    digests = examined.digests[kept]
    if reading.min_per_class == "drop":
        catalog, digests = _without_small_classes(catalog, digests)
    return replace(catalog, fingerprint=_fingerprint(catalog, digests))


def _usable(
    listing: Listing, examined: Examined, reading: Reading
) -> tuple[Integers, Flags, list[Excluded]]:
    """Return which images are kept, whose label is in doubt (N,), and what is left out.

    Raises:
        DataError: too much is unusable, or the same image is in two given parts.
    """
    reasons = {**dict(examined.reasons), **_too_small(examined, reading)}
    excluded = [_left_out(listing, index, why) for index, why in reasons.items()]
    excluded += listing.excluded
    rules.check_bad(listing, excluded, reading)
    usable = np.ones(len(listing), bool)
    usable[list(reasons)] = False
    rules.check_leak(listing, examined.rows, usable, reading)
    conflict = _conflicts(listing, examined, usable)
    # A held-out image whose label is in doubt would measure the doubt, not the network.
    out = conflict & (listing.parts > PARTS.index("train"))
    excluded += [_left_out(listing, i, rules.IN_CONFLICT) for i in np.flatnonzero(out).tolist()]
    return np.flatnonzero(usable & ~out), conflict, excluded


def _left_out(listing: Listing, index: int, why: str) -> Excluded:
    line = "" if listing.lines is None else f" (line {listing.lines[index]})"
    return Excluded(listing.paths[index], f"{why}{line}")


def _without_small_classes(
    catalog: Catalog, digests: npt.NDArray[np.uint8]
) -> tuple[Catalog, npt.NDArray[np.uint8]]:
    """Leave out classes of too few images, or groups of them, to be in every part."""
    while True:
        needed, there = needed_groups(catalog)
        small = (there < needed) & (catalog.counts > 0)
        if not small.any():
            return catalog, digests
        keep = ~small[catalog.labels]
        gone = [Excluded(catalog.paths[i], rules.FEW_IMAGES) for i in np.flatnonzero(~keep)]
        catalog, digests = _take(catalog, keep, ~small, gone), digests[keep]


def _take(catalog: Catalog, keep: Flags, classes: Flags, gone: list[Excluded]) -> Catalog:
    """Return the catalog of the images to keep, with the classes to keep."""
    names = tuple(name for name, kept in zip(catalog.classes, classes, strict=True) if kept)
    paths = tuple(path for path, kept in zip(catalog.paths, keep, strict=True) if kept)
    labels = (np.cumsum(classes) - 1)[catalog.labels[keep]]
    rules.check_several(catalog.root, [names[label] for label in np.unique(labels)], paths)
    return replace(
        catalog,
        classes=names,
        paths=paths,
        labels=labels,
        parts=catalog.parts[keep],
        rows=catalog.rows[keep],
        groups=duplicates.dense(catalog.groups[keep]),
        weights=catalog.weights[keep],
        pinned=catalog.pinned[keep],
        excluded=tuple(sorted([*catalog.excluded, *gone])),
    )


def _too_small(examined: Examined, reading: Reading) -> dict[int, str]:
    small = (examined.sizes.min(axis=1) < reading.min_side) & (examined.rows >= 0)
    return {
        int(index): "{} ({} x {} pixels; see --min-side)".format(
            rules.TOO_SMALL, *examined.sizes[index]
        )
        for index in np.flatnonzero(small)
    }


def _conflicts(listing: Listing, examined: Examined, usable: Flags) -> Flags:
    conflict = np.zeros(len(listing), bool)
    labels = listing.labels[usable].astype(np.int64)
    conflict[usable] = duplicates.contradicted(examined.rows[usable], labels)
    return conflict


def _classes(
    listing: Listing, kept: Integers, reading: Reading
) -> tuple[tuple[str, ...], Integers]:
    """Return the classes in the order of their names, and the class of every kept image."""
    present = np.unique(listing.labels[kept]).tolist()
    names = [listing.label_names[index] for index in present]
    rules.check_several(listing.root, names, [listing.paths[index] for index in kept])
    classes = sorted([*names, *(listing.empty if reading.keep_empty else ())])
    position = {name: index for index, name in enumerate(classes)}
    table = np.full(len(listing.label_names), -1, np.int64)
    table[present] = [position[name] for name in names]
    return tuple(classes), table[listing.labels[kept]]


def _look_alikes(
    rows: Integers, paths: Sequence[str], near: duplicates.NearDuplicates | None
) -> tuple[Integers, tuple[Near, ...]]:
    """Return rows with look-alikes joined to one number, (N,), and what there is to report."""
    if near is None:
        return rows, ()
    used, first = np.unique(rows, return_index=True)
    path_of = {int(row): paths[index] for row, index in zip(used, first, strict=True)}
    pairs = [(a, b, bits) for a, b, bits in near.pairs if a in path_of and b in path_of]
    return near.leader[rows], tuple(Near(path_of[b], path_of[a], bits) for a, b, bits in pairs)


def _torn(rows: Integers, alike: Integers, parts: npt.NDArray[np.int8]) -> dict[str, int]:
    """Count images that are in two given parts with the same bytes, or looking alike."""
    given = np.maximum(parts, PARTS.index("train"))
    same = duplicates.leaked(rows, given)
    similar = duplicates.leaked(alike, given) & ~same
    return {rules.LEAKED: int(same.sum()), rules.ALIKE: int(similar.sum())}


def _noticed(
    listing: Listing, seen: npt.NDArray[np.uint16], torn: Mapping[str, int]
) -> dict[str, int]:
    noticed = {words: int(np.count_nonzero(seen & kind)) for kind, words in NOTICED_WORDS.items()}
    noticed = {**listing.counts, **noticed, **torn}
    return {words: count for words, count in noticed.items() if count}


def _fingerprint(catalog: Catalog, digests: npt.NDArray[np.uint8]) -> str:
    """Return the SHA-256 of path, label, part, weight, group and content of all images."""
    digest = hashlib.sha256()
    numbers: dict[int, int] = {}
    for index in sorted(range(len(catalog)), key=catalog.paths.__getitem__):
        part, weight = int(catalog.parts[index]), float(catalog.weights[index])
        group = numbers.setdefault(int(catalog.groups[index]), len(numbers))
        line = [catalog.paths[index], catalog.label_of(index), part, weight, group]
        digest.update(json.dumps(line).encode("ascii"))
        digest.update(digests[index].tobytes())
    return digest.hexdigest()
