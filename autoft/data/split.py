"""The split: what is trained on, what selects, and the test part that stays locked."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from autoft.data.cache import write_bytes_atomic
from autoft.data.catalog import Catalog, check_classes
from autoft.errors import DataError

Indices = npt.NDArray[np.int64]

LARGE: Final = 20_000  # images above which a smaller test share is precise enough
MEDIUM: Final = 1_000  # images below which validation takes a larger share
MAX_VALIDATION: Final = 10_000
PART_NAMES: Final = ("train", "validation", "test")
_COLUMNS: Final = ["path", "label", "part"]


@dataclass(frozen=True)
class Split:
    """Positions in `catalog.items`, ascending, of the three parts."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]

    @property
    def hash(self) -> str:
        """Return 12 hex digits that differ where the split differs."""
        parts = json.dumps([self.train, self.validation, self.test])
        return hashlib.sha256(parts.encode("ascii")).hexdigest()[:12]


def make_split(catalog: Catalog, seed: int) -> Split:
    """Split by class, the same for the same seed; parts given by the folders are respected.

    A test part is locked away first: 20 % of the images, 15 % above 20,000. Validation is 20 %
    of the rest, 25 % where the rest is below 1,000, and at most 10,000 images.

    Raises:
        DataError: a class is too small to be in every part.
    """
    check_classes(catalog)
    labels = catalog.labels()
    parts = np.array([item.part for item in catalog.items])
    test, validation = np.flatnonzero(parts == "test"), np.flatnonzero(parts == "val")
    rest = np.flatnonzero((parts == "") | (parts == "train"))
    rng = np.random.default_rng(seed)
    cut_validation = not len(validation)
    if not len(test):
        share = 0.15 if len(catalog.items) > LARGE else 0.20
        test = _draw(labels, rest, share, 1 + cut_validation, rng)
        rest = np.setdiff1d(rest, test)
    if cut_validation:
        share = 0.20 if len(rest) >= MEDIUM else 0.25
        validation = _draw(labels, rest, min(share, MAX_VALIDATION / len(rest)), 1, rng)
        rest = np.setdiff1d(rest, validation)
    return Split(_positions(rest), _positions(validation), _positions(test))


def write_split(path: Path, catalog: Catalog, split: Split) -> None:
    """Write `path,label,part` atomically; names that are not UTF-8 keep their bytes.

    Raises:
        MachineError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    for part in PART_NAMES:
        for position in getattr(split, part):
            item = catalog.items[position]
            writer.writerow([item.path, item.label, part])
    write_bytes_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))


def read_split(path: Path, catalog: Catalog) -> Split:
    """Return the split that `write_split` wrote, as positions in this catalog.

    Raises:
        DataError: the file cannot be read, or names an image unknown, twice, or in no part.
    """
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise DataError(
            f"The split {str(path)!r} cannot be read ({error.strerror}); expected a CSV with "
            f"{','.join(_COLUMNS)}: check the path."
        ) from error
    position = {item.path: number for number, item in enumerate(catalog.items)}
    parts: dict[str, list[int]] = {part: [] for part in PART_NAMES}
    for line in csv.DictReader(io.StringIO(text, newline="")):
        name, part = line.get("path"), line.get("part")
        if name not in position or part not in parts:
            raise DataError(
                f"The split {str(path)!r} puts {name!r} into {part!r}; expected an image of "
                f"{catalog.root!r} that is named once, and one of {', '.join(PART_NAMES)}: "
                "restore the dataset, or start a new run with another name."
            )
        parts[part].append(position.pop(name))
    return Split(*(tuple(sorted(parts[part])) for part in PART_NAMES))


def _draw(
    labels: Indices, pool: Indices, share: float, keep: int, rng: np.random.Generator
) -> Indices:
    """Draw `share` of `pool` by class: at least one of each, leaving at least `keep`.

    The total is rounded once, by largest remainder, so that small classes do not add up errors.
    """
    order = rng.permutation(pool)
    order = order[np.argsort(labels[order], kind="stable")]
    counts = np.unique(labels[order], return_counts=True)[1]
    exact = counts * share
    take = np.floor(exact).astype(np.int64)
    missing = round(share * len(pool)) - int(take.sum())
    take[np.argsort(take - exact, kind="stable")[:missing]] += 1
    take = np.clip(take, 1, counts - keep)
    groups = np.split(order, np.cumsum(counts)[:-1])
    return np.concatenate([group[:n] for group, n in zip(groups, take, strict=True)])


def _positions(indices: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(int(index) for index in indices))
