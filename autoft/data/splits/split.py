"""The split: what is trained on, what selects, and the test part that stays locked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from autoft.data.splits.deal import deal, even_quota, share_quota
from autoft.data.splits.rules import (
    TEST_PART,
    VAL,
    Splittable,
    amount,
    check_classes,
    check_given,
    count_groups,
    movable,
    pinned_groups,
    shown_classes,
)
from autoft.errors import DataError, UsageError

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int8]

TEST: Final = -1
ALWAYS_TRAIN: Final = -2
MAX_FOLDS: Final = 100

LARGE: Final = 20_000  # images above which a smaller test share is precise enough
SMALL: Final = 5_000  # images below which one hold-out is too noisy to choose by
MEDIUM: Final = 1_000  # images below which a hold-out takes a larger share
USUAL_FOLDS: Final = 5
MAX_VALIDATION: Final = 10_000
_TEST_SHARES: Final = (0.20, 0.15)  # up to LARGE images, above
_HOLD_OUT_SHARES: Final = (0.25, 0.20)  # below MEDIUM images, from there on
_CHUNK: Final = 10_000  # paths hashed at a time


@dataclass(frozen=True, eq=False)
class Split:
    """Where each image of a catalog is.

    `fold` is (N,): the fold in which an image is held out, 0 to `folds` - 1; TEST where it is
    locked away, ALWAYS_TRAIN where it is never held out. One fold is a hold-out: fold 0 is the
    validation part and the rest ALWAYS_TRAIN. `hash` is 12 hex digits of every path and its fold,
    in whatever order the images are; `notes` say what is not as was asked, and are not compared.
    """

    fold: Codes
    folds: int
    hash: str
    notes: tuple[str, ...] = ()

    def train(self, fold: int = 0) -> Integers:
        """Return the positions, ascending, of what is trained on while `fold` is held out."""
        self._check(fold)
        return np.flatnonzero((self.fold != TEST) & (self.fold != fold))

    def validation(self, fold: int = 0) -> Integers:
        """Return the positions, ascending, of what is held out in `fold`."""
        self._check(fold)
        return np.flatnonzero(self.fold == fold)

    @property
    def test(self) -> Integers:
        """Return the positions, ascending, of the locked part."""
        return np.flatnonzero(self.fold == TEST)

    def __eq__(self, other: object) -> bool:
        """Whether the same images are in the same places."""
        if not isinstance(other, Split):
            return NotImplemented
        return (self.folds, self.hash) == (other.folds, other.hash) and np.array_equal(
            self.fold, other.fold
        )

    def __hash__(self) -> int:
        return hash((self.folds, self.hash))

    def _check(self, fold: int) -> None:
        # Without this a fold that is not there would train on everything.
        if not 0 <= fold < self.folds:
            raise IndexError(f"fold {fold} of a split of {self.folds}")


def make_split(
    catalog: Splittable, seed: int, *, folds: int | None = None, allow_leak: bool = False
) -> Split:
    """Split by class, groups whole; the same for the same seed in whatever order the images are.

    The test part is locked away first, from the seed alone: 20 % of the images, 15 % above
    20,000, unless the dataset gives one. A validation part that it gives is used. Otherwise fewer
    than 5,000 images beside the test part make 5 folds; more, or `folds=1`, make a hold-out of
    20 %, 25 % below 1,000 images, at most 10,000. Images in a group with one that is pinned are
    always trained on. `allow_leak`: groups may be in several given parts.

    Raises:
        DataError: a class is too small to be in every part, or a group is in two given parts.
        UsageError: a number of folds that cannot be.
    """
    _check_number(folds)
    if not allow_leak:
        check_given(catalog)
    check_classes(catalog)
    pool = _pool(catalog)
    fold = np.full(len(catalog.paths), ALWAYS_TRAIN, np.int8)
    fold[catalog.parts == TEST_PART] = TEST
    fold[catalog.parts == VAL] = 0
    _hold_out(catalog, pool, fold, np.random.default_rng([seed, 0]))
    rest = int(np.count_nonzero(fold != TEST))
    wanted = folds or (USUAL_FOLDS if rest < SMALL else 1)
    notes: tuple[str, ...] = ()
    if (catalog.parts == VAL).any():
        if folds and folds > 1:
            notes = (f"The given validation part is used in place of {folds} folds.",)
        wanted = 1
    if wanted > 1:
        dealt = _folds(catalog, pool[fold[pool] != TEST], wanted, np.random.default_rng([seed, 1]))
        if isinstance(dealt, str):
            notes, wanted = (dealt,), 1
        else:
            fold[pool[fold[pool] != TEST]] = dealt
    return located(catalog, fold, wanted, notes)


def located(catalog: Splittable, fold: Codes, folds: int, notes: tuple[str, ...] = ()) -> Split:
    """Return the split that puts the images of `catalog` where `fold` says, with its hash."""
    paths, order = catalog.paths, path_order(catalog.paths)
    digest = hashlib.sha256()
    for start in range(0, len(order), _CHUNK):
        names = "\0".join(paths[index] for index in order[start : start + _CHUNK])
        digest.update(names.encode("utf-8", "surrogateescape"))
        digest.update(b"\0" + fold[order[start : start + _CHUNK]].tobytes())
    fold.setflags(write=False)
    return Split(fold, folds, digest.hexdigest()[:12], (*_doubts(catalog, fold), *notes))


def path_order(paths: Sequence[str]) -> Integers:
    """Return the positions of `paths` in ascending order of the paths, (N,)."""
    return np.array(sorted(range(len(paths)), key=paths.__getitem__), dtype=np.int64)


def summary(catalog: Splittable, split: Split) -> list[list[str]]:
    """Return a table: a heading, each part or fold, and what is kept together.

    A line says how many images there are, and which class has the fewest of them.
    """
    if split.folds == 1:
        places = {"train": split.train(), "validation": split.validation()}
    else:
        places = {f"fold {fold}": split.validation(fold) for fold in range(split.folds)}
        places["always train"] = np.flatnonzero(split.fold == ALWAYS_TRAIN)
    places["test"] = split.test
    used = np.unique(catalog.labels)
    table = [["part", "images", "smallest class"]]
    for name, indices in places.items():
        counts = np.bincount(catalog.labels[indices], minlength=len(catalog.classes))[used]
        smallest = int(counts.argmin())
        if len(indices) or name != "always train":
            label = catalog.classes[used[smallest]]
            table.append([name, f"{len(indices):,}", f"{label} ({counts[smallest]:,})"])
    sizes = np.bincount(catalog.groups)
    sizes = sizes[sizes > 1]
    if len(sizes):
        table.append(["kept together", f"{sizes.sum():,}", f"in {len(sizes):,} groups"])
    return table


def _check_number(folds: int | None) -> None:
    if folds is not None and not 1 <= folds <= MAX_FOLDS:
        raise UsageError(
            f"A split into {folds} folds was asked for; expected 1, which is a hold-out, to "
            f"{MAX_FOLDS}: give another number of folds."
        )


def _pool(catalog: Splittable) -> Integers:
    """Return the positions of the images that may be moved, in ascending order of their paths."""
    order = path_order(catalog.paths)
    return order[movable(catalog)[order]]


def _hold_out(catalog: Splittable, pool: Integers, fold: Codes, rng: np.random.Generator) -> None:
    """Move what is not given of test and validation from `pool` into them, in `fold`.

    Both are drawn in one go, so that groups that share classes find a place in each. Nothing
    that is said about folds has a part in it: the images that are locked stay the same.
    """
    codes = [code for code, part in ((TEST, TEST_PART), (0, VAL)) if part not in catalog.parts]
    if not codes:
        return
    used, labels = np.unique(catalog.labels[pool], return_inverse=True)
    held = np.bincount(catalog.labels[pinned_groups(catalog)], minlength=len(catalog.classes))
    free = held[used] > 0  # classes that are trained on in any case
    left = np.bincount(labels)
    quota = []
    for later, code in zip(reversed(range(len(codes))), codes, strict=True):
        share = _share(code, len(catalog.paths), int(left.sum()))
        quota.append(share_quota(left, share, later + ~free))
        left = left - quota[-1]
    quota.append(left)
    required = np.ones((len(quota), len(used)), bool)
    required[-1] = ~free
    dealt = deal(labels, _numbered(catalog.groups[pool]), np.array(quota), required, rng)
    if dealt is None:
        fewest = used[np.argsort(count_groups(catalog, movable(catalog))[used], kind="stable")]
        raise DataError(
            f"The groups of {catalog.root!r} cannot be divided so that each class is in every "
            f"part ({shown_classes(catalog, fewest)}); expected classes that are in more groups, "
            "or groups of fewer classes: add images, or remove the classes with the fewest."
        )
    fold[pool] = np.array([*codes, ALWAYS_TRAIN], np.int8)[dealt]


def _share(code: int, total: int, left: int) -> float:
    if code == TEST:
        return _TEST_SHARES[total > LARGE]
    return min(_HOLD_OUT_SHARES[left >= MEDIUM], MAX_VALIDATION / left)


def _folds(
    catalog: Splittable, pool: Integers, folds: int, rng: np.random.Generator
) -> Codes | str:
    """Return the fold of every image in `pool`, or why there is a hold-out instead."""
    used, labels = np.unique(catalog.labels[pool], return_inverse=True)
    quota = even_quota(np.bincount(labels), folds)
    groups = _numbered(catalog.groups[pool])
    dealt = deal(labels, groups, quota, np.ones_like(quota, dtype=bool), rng)
    if dealt is not None:
        return dealt
    chosen = np.zeros(len(catalog.paths), bool)
    chosen[pool] = True
    counts = count_groups(catalog, chosen)[used]
    few = used[counts < folds] if (counts < folds).any() else used[np.argsort(counts)]
    return (
        f"A hold-out is used in place of {folds} folds, since each class has to be in every "
        f"fold: beside the test part {shown_classes(catalog, few, chosen)}."
    )


def _numbered(groups: Integers) -> Integers:
    """Number the groups in order of first appearance, whatever numbers they had."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _doubts(catalog: Splittable, fold: Codes) -> tuple[str, ...]:
    """Return a note where images that may only be trained on were put elsewhere by someone."""
    count = int(np.count_nonzero(catalog.pinned & (fold != ALWAYS_TRAIN)))
    if not count:
        return ()
    doubtful = amount(count, "image")
    return (f"Held out, as the given parts say, though the label is in doubt: {doubtful}.",)
