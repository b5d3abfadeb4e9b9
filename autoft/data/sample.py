"""Samples that come with the installed packages, so that a first search needs no download."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from PIL import Image

from autoft.data.cache import machine_errors
from autoft.data.decode import Pixels
from autoft.errors import UsageError, did_you_mean

SAMPLE_PREFIX: Final = "sample:"
SAMPLE_VERSION: Final = 1
SAMPLES: Final = ("digits",)
SAMPLE_SIDE: Final = 32


def read_sample(name: str) -> list[tuple[str, str]]:
    """Return (path, label) of every image of a sample, in its published order.

    Raises:
        UsageError: there is no sample `name`.
    """
    _, labels = _arrays(name)
    return [(f"{label}/{number:04d}.png", str(label)) for number, label in enumerate(labels)]


def open_sample(name: str, path: str) -> BinaryIO:
    """Return the image at `path` of a sample as the bytes of a PNG file.

    Raises:
        UsageError: there is no sample `name`.
    """
    images, _ = _arrays(name)
    file = io.BytesIO()
    Image.fromarray(images[int(Path(path).stem)]).save(file, "png")
    file.seek(0)
    return file


def write_sample(name: str, folder: Path, limit: int | None = None) -> list[Path]:
    """Write a sample as `folder`/<class>/<number>.png and return the files written.

    Only the first `limit` images where given; the first ten of `digits` are one of each class.

    Raises:
        UsageError: there is no sample `name`.
        MachineError: the folder cannot be written.
    """
    written = []
    for path, _ in read_sample(name)[:limit]:
        target = folder / path
        with machine_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(open_sample(name, path).read())
        written.append(target)
    return written


@lru_cache
def _arrays(name: str) -> tuple[Pixels, list[int]]:
    """Return uint8 (N, 32, 32, 3) and N labels of scikit-learn's handwritten digits."""
    if name not in SAMPLES:
        raise UsageError(
            f"There is no sample {name!r}; expected {SAMPLE_PREFIX}<name> with one of "
            f"{', '.join(SAMPLES)}.{did_you_mean(name, SAMPLES)}"
        )
    from sklearn.datasets import load_digits  # here, because importing it takes seconds

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    times = SAMPLE_SIDE // grey.shape[1]
    large = grey.repeat(times, axis=1).repeat(times, axis=2)
    return np.repeat(large[..., None], 3, axis=3), [int(label) for label in digits.target]
