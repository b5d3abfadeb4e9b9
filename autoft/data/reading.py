"""How a dataset is read: what may be asked of the reader, and what it names before looking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

PartName = Literal["", "train", "val", "test"]
PARTS: Final[tuple[PartName, ...]] = ("", "train", "val", "test")
"""The parts that a dataset may name itself; `Listing.parts` holds positions in this tuple."""

PART_WORDS: Final[Mapping[str, PartName]] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
"""What people call the parts, in folders and in manifests, in lower case."""

NO_GROUP: Final = -1

SCHEMES: Final = ("sample:", "hf://", "torchvision:")
"""How the name of a dataset begins that is no path."""


@dataclass(frozen=True)
class Reading:
    """What is accepted, left out or refused; every field is a flag of the same name.

    `max_bad` is the largest share of files that may be unusable, `min_side` the smallest shorter
    side in pixels, `near_dup` the largest distance in bits (of 64) at which two images count as
    near-duplicates (None: they are not looked for).
    """

    max_bad: float = 0.05
    min_side: int = 8
    min_per_class: Literal["error", "drop"] = "error"
    near_dup: int | None = None
    allow_leak: bool = False
    merge_classes: bool = False
    keep_empty: bool = False
    follow_outside: bool = False


@dataclass(frozen=True, order=True)
class Excluded:
    """A file or class folder that is not used, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """What a dataset names, before an image is opened; columns have one entry an image, (N,).

    `paths` are below `root`, with `/`. `labels` are positions in `label_names` (strings, sorted),
    `parts` in `PARTS`. Images that share a number of `groups` must not be separated (`NO_GROUP`:
    in none). `stats` is (N, 4): size in bytes, mtime in ns, device and inode, which tell when a
    file has changed and which paths are one file. `lines` are the rows of a manifest in its own
    counting (None: the dataset is no manifest). `empty` are classes without an image; `counts`
    says how many files were noticed for what, in words, such as "ignored".
    """

    name: str
    root: str
    paths: tuple[str, ...]
    label_names: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    parts: npt.NDArray[np.int8]
    groups: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    stats: npt.NDArray[np.int64]
    lines: npt.NDArray[np.int64] | None = None
    empty: tuple[str, ...] = ()
    excluded: tuple[Excluded, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of images named."""
        return len(self.paths)


def file_stat(status: Any) -> tuple[int, int, int, int]:
    """Return the entry of `Listing.stats` for an `os.stat_result`."""
    # Device numbers are unsigned; the column is signed, so that all four share one array.
    return status.st_size, status.st_mtime_ns, status.st_dev & (2**63 - 1), status.st_ino
