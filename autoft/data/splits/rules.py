"""What a dataset must have so that it can be split, and what its given parts may not do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from autoft.data.reading import PARTS
from autoft.errors import DataError

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

TRAIN: Final = PARTS.index("train")
VAL: Final = PARTS.index("val")
TEST_PART: Final = PARTS.index("test")
SHOWN: Final = 5  # classes, images or groups named in a message


class Splittable(Protocol):
    """What a split is made of: N images with label, given part and group.

    `labels` are positions in `classes`, `parts` in `reading.PARTS`. Images of one number of
    `groups` must not be separated; those that are `pinned` may only be trained on.
    """

    @property
    def name(self) -> str:
        """Return the name of the dataset."""
        ...

    @property
    def root(self) -> str:
        """Return where the dataset is, for messages."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes."""
        ...

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the path of every image below the root."""
        ...

    @property
    def labels(self) -> Integers:
        """Return the class of every image, (N,)."""
        ...

    @property
    def parts(self) -> npt.NDArray[np.int8]:
        """Return the given part of every image, (N,)."""
        ...

    @property
    def groups(self) -> Integers:
        """Return the group of every image, (N,)."""
        ...

    @property
    def pinned(self) -> Flags:
        """Return which images may only be trained on, (N,)."""
        ...


def check_given(catalog: Splittable) -> None:
    """Refuse a group that is in two given parts; an image in no part would be trained on.

    Raises:
        DataError: naming images of the first few groups.
    """
    parts = np.maximum(catalog.parts, TRAIN)
    number, pairs = torn_groups(catalog.groups, parts)
    if not number:
        return
    shown = "; ".join(
        f"{catalog.paths[one]!r} in {_part(catalog, one)}, {catalog.paths[other]!r} in "
        f"{_part(catalog, other)}"
        for one, other in pairs
    )
    raise DataError(
        f"{amount(number, 'group')} of images in {catalog.root!r} in two parts ({shown}"
        f"{'; ...' if number > len(pairs) else ''}); expected each group in one, or the test "
        "score is too good: move the images, or go on with --allow-leak."
    )


def torn_groups(
    groups: Integers, codes: npt.NDArray[np.int8]
) -> tuple[int, list[tuple[int, int]]]:
    """Return how many groups have images of two codes, and two such images of the first few."""
    low = np.full(int(groups.max(initial=-1)) + 1, np.iinfo(np.int8).max, np.int8)
    high = np.full(len(low), np.iinfo(np.int8).min, np.int8)
    np.minimum.at(low, groups, codes)
    np.maximum.at(high, groups, codes)
    torn = np.flatnonzero(low < high)
    pairs = []
    for group in torn[:SHOWN]:
        members = np.flatnonzero(groups == group)
        other = members[codes[members] != codes[members[0]]][0]
        pairs.append((int(members[0]), int(other)))
    return len(torn), pairs


def check_classes(catalog: Splittable) -> None:
    """Refuse given parts with different classes, and classes too small to be in every part.

    Classes without any image are no part of this: they were kept on request.

    Raises:
        DataError: naming the classes.
    """
    there = _classes_of_parts(catalog)
    if not there[TRAIN].any():
        given = [PARTS[part] for part in (VAL, TEST_PART) if there[part].any()]
        raise DataError(
            f"{catalog.root!r} has no images to train on, only the parts {given}; expected "
            "a part 'train' as well, or a dataset without parts: add one."
        )
    for part in (VAL, TEST_PART):
        if there[part].any() and (there[part] != there[TRAIN]).any():
            raise DataError(
                f"The classes of 'train' and {PARTS[part]!r} in {catalog.root!r} differ: only in "
                f"'train': {_names(catalog, there[TRAIN] & ~there[part])}; only in "
                f"{PARTS[part]!r}: {_names(catalog, there[part] & ~there[TRAIN])}; expected the "
                "same classes in both: rename, add or remove some."
            )
    needed, units = needed_groups(catalog)
    small = np.flatnonzero(there[TRAIN] & (units < needed))
    if len(small):
        cut = [
            name
            for name, part in (("validation", VAL), ("test", TEST_PART))
            if not there[part].any()
        ]
        raise DataError(
            f"Classes with too few images in {catalog.root!r}: {shown_classes(catalog, small)}; "
            f"expected at least {needed[small].max()}, so that each class is in every part "
            f"({', '.join(['train', *cut])}): add images, remove the class, or leave it out with "
            "--min-per-class drop."
        )


def needed_groups(catalog: Splittable) -> tuple[Integers, Integers]:
    """Return of how many groups each class needs images that can be moved, and has, (C,) each."""
    classes = len(catalog.classes)
    given = np.unique(catalog.parts)
    needed = np.full(classes, (VAL not in given) + (TEST_PART not in given))
    # A pinned image is trained on: then no other has to be.
    needed += np.bincount(catalog.labels[pinned_groups(catalog)], minlength=classes) == 0
    return needed, count_groups(catalog, movable(catalog))


def movable(catalog: Splittable) -> Flags:
    """Return which images may be put into any part: in none but train, and not pinned, (N,)."""
    return (catalog.parts <= TRAIN) & ~pinned_groups(catalog)


def pinned_groups(catalog: Splittable) -> Flags:
    """Return which images that are free to be placed are in a group with a pinned one, (N,)."""
    held = np.zeros(int(catalog.groups.max(initial=-1)) + 1, bool)
    held[catalog.groups[catalog.pinned]] = True
    return held[catalog.groups] & (catalog.parts <= TRAIN)


def count_groups(catalog: Splittable, chosen: Flags) -> Integers:
    """Return of how many groups the chosen images of every class are, (C,)."""
    classes = len(catalog.classes)
    pairs = np.unique(catalog.groups[chosen] * classes + catalog.labels[chosen])
    return np.bincount(pairs % classes, minlength=classes)


def shown_classes(
    catalog: Splittable, classes: Sequence[int] | Integers, chosen: Flags | None = None
) -> str:
    """Name the first few of `classes` with their images among `chosen` and the groups of these."""
    chosen = movable(catalog) if chosen is None else chosen
    images = np.bincount(catalog.labels[chosen], minlength=len(catalog.classes))
    held = np.bincount(catalog.labels[pinned_groups(catalog)], minlength=len(catalog.classes))
    groups = count_groups(catalog, chosen)
    texts = [
        f"{catalog.classes[index]!r} has {images[index]}"
        + (f" in {amount(groups[index], 'group')}" if groups[index] < images[index] else "")
        + (f" beside {held[index]} that may only be trained on" if held[index] else "")
        for index in classes[:SHOWN]
    ]
    more = [f"and {len(classes) - SHOWN} more"] if len(classes) > SHOWN else []
    return ", ".join([*texts, *more])


def amount(count: int, noun: str) -> str:
    """Return `count` and `noun`, in the plural where there is not one."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _classes_of_parts(catalog: Splittable) -> Flags:
    """Return which classes have images in which part, (4, C); none counts as train."""
    there = np.zeros((len(PARTS), len(catalog.classes)), bool)
    there[np.maximum(catalog.parts, TRAIN), catalog.labels] = True
    return there


def _names(catalog: Splittable, chosen: Iterable[bool] | Flags) -> list[str]:
    return [name for name, is_chosen in zip(catalog.classes, chosen, strict=True) if is_chosen]


def _part(catalog: Splittable, index: int) -> str:
    return repr(PARTS[catalog.parts[index]]) if catalog.parts[index] else "no part"
