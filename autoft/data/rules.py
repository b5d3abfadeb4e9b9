"""What a dataset may not be: names that clash, too much that is unusable, the same image twice."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from autoft.data import duplicates
from autoft.data.inputs.folders import better_root
from autoft.data.reading import PARTS, Excluded, Listing, Reading
from autoft.errors import DataError

Flags = npt.NDArray[np.bool_]

SHOWN: Final = 5  # files named in a message
TOO_SMALL: Final = "too small"
FEW_IMAGES: Final = "in a class with too few images"
IN_CONFLICT: Final = "labelled otherwise elsewhere"
ALIKE: Final = "in two parts looking alike"
LEAKED: Final = "in two parts with the same bytes"


def settle_names(listing: Listing, reading: Reading) -> Listing:
    """Refuse, or with `merge_classes` join, names that differ only in case, form or spaces.

    Raises:
        DataError: naming both and an image of each; or there is one class only.
    """
    twins: dict[str, list[str]] = {}
    for name in (*listing.label_names, *listing.empty):
        twins.setdefault(_folded(name), []).append(name)
    doubled = [group for group in twins.values() if len(group) > 1]
    if doubled and not reading.merge_classes:
        raise DataError(_twins_message(listing, doubled))
    if doubled:
        listing = _merged(listing, doubled)
    check_several(listing.root, listing.label_names, listing.paths)
    return listing


def check_several(root: str, names: Sequence[str], paths: Iterable[str]) -> None:
    """Refuse a dataset that has no two classes.

    Raises:
        DataError: with a folder that may have been meant.
    """
    if len(names) < 2:
        raise DataError(
            f"{root!r} has one class with images, {', '.join(names)!r}; expected at least "
            f"2 classes, one folder each.{better_root(Path(root), paths)}"
        )


def check_bad(listing: Listing, excluded: Sequence[Excluded], reading: Reading) -> None:
    """Refuse a dataset of which more than `max_bad` of the files could not be used.

    Raises:
        DataError: with the count and the first few.
    """
    total = len(listing) + len(listing.excluded)
    if len(excluded) <= reading.max_bad * total:
        return
    shown = "; ".join(f"{entry.path!r}: {entry.reason}" for entry in excluded[:SHOWN])
    more = f"; and {len(excluded) - SHOWN} more" if len(excluded) > SHOWN else ""
    raise DataError(
        f"{len(excluded)} of {total} files in {listing.root!r} cannot be used ({shown}{more}); "
        f"expected at most {reading.max_bad:.0%}: replace or remove them, or allow more with "
        "--max-bad."
    )


def check_leak(
    listing: Listing, rows: npt.NDArray[np.int64], usable: Flags, reading: Reading
) -> None:
    """Refuse the same bytes in two given parts: the number at the end would be a lie.

    Raises:
        DataError: naming some, unless `allow_leak` was asked for.
    """
    kept = np.flatnonzero(usable)
    # An image in no part is trained on, as far as a given part is concerned.
    parts = np.maximum(listing.parts[kept], PARTS.index("train"))
    leaks = kept[duplicates.leaked(rows[kept], parts)]
    if not len(leaks) or reading.allow_leak:
        return
    order = leaks[np.argsort(rows[leaks], kind="stable")]
    shown = ", ".join(repr(listing.paths[index]) for index in order[: 2 * SHOWN])
    raise DataError(
        f"{len(leaks)} images of {listing.root!r} are {LEAKED} ({shown}"
        f"{', ...' if len(leaks) > 2 * SHOWN else ''}); expected each image in one part, or the "
        "test score is too good: remove them from one, or go on with --allow-leak."
    )


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def _twins_message(listing: Listing, doubled: Sequence[Sequence[str]]) -> str:
    shown = [
        " and ".join(f"{name!a} ({_example(listing, name)})" for name in group)
        for group in doubled[:SHOWN]
    ]
    return (
        f"Classes of {listing.root!r} differ only in case, Unicode form or spaces: "
        f"{'; '.join(shown)}; expected one name for one class: rename one, or join them with "
        "--merge-classes."
    )


def _example(listing: Listing, name: str) -> str:
    if name not in listing.label_names:
        return "an empty folder"
    first = np.flatnonzero(listing.labels == listing.label_names.index(name))[0]
    return ascii(listing.paths[first])


def _merged(listing: Listing, doubled: Sequence[Sequence[str]]) -> Listing:
    """Give the twins the name that most of their images have."""
    counts = np.bincount(listing.labels, minlength=len(listing.label_names))
    count_of = dict(zip(listing.label_names, counts.tolist(), strict=True))
    chosen: dict[str, str] = {}
    for group in doubled:
        best = max(group, key=lambda name: (count_of.get(name, 0), name))
        chosen |= dict.fromkeys(group, best)
    old = listing.label_names
    new = sorted({chosen.get(name, name) for name in old})
    position = {name: index for index, name in enumerate(new)}
    table = np.array([position[chosen.get(name, name)] for name in old], np.int32)
    return replace(
        listing,
        label_names=tuple(new),
        labels=table[listing.labels],
        empty=tuple(name for name in listing.empty if chosen.get(name, name) not in position),
        counts={**listing.counts, "class names joined": len(chosen)},
    )
