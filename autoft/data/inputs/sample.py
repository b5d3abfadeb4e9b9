"""Samples that come with the installed packages, so that a first search needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from autoft.data.cache.files import machine_errors
from autoft.data.inputs.stash import Stashed, stash
from autoft.errors import UsageError, did_you_mean

SAMPLE_PREFIX: Final = "sample:"
SAMPLES: Final = ("digits",)
_SIDE: Final = 32
_VERSION: Final = 1  # raise it when what is written changes


def stash_sample(name: str) -> Stashed:
    """Return the files of a sample in the cache, one folder a class.

    Raises:
        UsageError: there is no sample `name`.
        MachineError: the cache cannot be written.
    """
    _check_name(name)
    return stash(name, [SAMPLE_PREFIX, _VERSION], lambda folder: _fill(name, folder))


def write_sample(name: str, folder: Path, limit: int | None = None) -> list[Path]:
    """Write a sample as `folder`/<class>/<number>.png and return the files written.

    Only the first `limit` images where given; the first ten of `digits` are one of each class.

    Raises:
        UsageError: there is no sample `name`.
        MachineError: the folder cannot be written.
    """
    _check_name(name)
    from sklearn.datasets import load_digits  # here, because importing it takes seconds

    digits = load_digits()
    grey = np.rint(digits.images[:limit] * (255 / 16)).astype(np.uint8)
    times = _SIDE // grey.shape[1]
    large = grey.repeat(times, axis=1).repeat(times, axis=2)
    written = []
    for number, (pixels, label) in enumerate(zip(large, digits.target[:limit], strict=True)):
        target = folder / str(label) / f"{number:04d}.png"
        with machine_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.repeat(pixels[..., None], 3, axis=2)).save(target)
        written.append(target)
    return written


def _fill(name: str, folder: Path) -> dict[str, int]:
    write_sample(name, folder)
    return {}


def _check_name(name: str) -> None:
    if name not in SAMPLES:
        raise UsageError(
            f"There is no sample {name!r}; expected {SAMPLE_PREFIX}<name> with one of "
            f"{', '.join(SAMPLES)}.{did_you_mean(name, SAMPLES)}"
        )
