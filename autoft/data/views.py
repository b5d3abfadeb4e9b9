"""Batches for networks, from the pixel store: plain views to score, augmented ones to train."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from autoft.data.decode import Pixels, centre_crop
from autoft.data.pixels import PixelStore
from autoft.errors import UsageError, did_you_mean
from autoft.values import Preprocess, Triple

AUGMENTS: Final = ("none", "crop", "crop_flip", "strong")
RATIO: Final = (3 / 4, 4 / 3)
JITTER: Final = 0.3
AHEAD: Final = 2  # batches prepared while the consumer works
_SMALLEST_AREA: Final = {"crop": 0.5, "crop_flip": 0.5, "strong": 0.25}
_LUMA: Final = (0.299, 0.587, 0.114)

Rows = npt.NDArray[np.int64]
_Job = TypeVar("_Job")
_Made = TypeVar("_Made")


def evaluation_batches(
    store: PixelStore, rows: Rows, pre: Preprocess, batch_size: int, flip: bool = False
) -> Generator[Tensor, None, None]:
    """Yield float32 (B, 3, S, S) of `rows` in order, equal to `decode.normalise`.

    With `flip` each image is mirrored left to right.

    Raises:
        UsageError: `pre.image_size` is larger than the stored images.
    """

    def make(chosen: Rows) -> Tensor:
        images = _planes(centre_crop(_read(store, chosen), pre.image_size))
        images = images.flip(-1) if flip else images
        return _normalise(images, pre)

    starts = range(0, len(rows), batch_size)
    return _ahead(make, (rows[start : start + batch_size] for start in starts))


def training_batches(  # noqa: PLR0913 (each is a choice that a trial makes by name)
    store: PixelStore,
    rows: Rows,
    labels: npt.NDArray[np.int64],
    pre: Preprocess,
    *,
    augment: str,
    batch_size: int,
    seed: int,
    epoch: int,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield one epoch of images, float32 (B, 3, S, S), and labels, int64 (B,).

    `labels[i]` belongs to `rows[i]`. Order and augmentation are a function of `seed` and `epoch`
    alone. A last batch of one image is dropped: BatchNorm cannot train on it.

    Raises:
        UsageError: `augment` is unknown, or `pre.image_size` larger than the stored images.
    """
    if augment not in AUGMENTS:
        raise UsageError(
            f"Unknown augmentation {augment!r}; expected one of {', '.join(AUGMENTS)}."
            f"{did_you_mean(augment, AUGMENTS)}"
        )
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(rows))

    # The one thread of _ahead draws the batches in order, so `rng` gives each the same numbers.
    def make(chosen: npt.NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        images = _augment(_read(store, rows[chosen]), pre.image_size, augment, rng)
        return _normalise(images, pre), torch.from_numpy(labels[chosen])

    batches = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    return _ahead(make, (chosen for chosen in batches if len(chosen) > 1))


def _ahead(make: Callable[[_Job], _Made], jobs: Iterable[_Job]) -> Generator[_Made, None, None]:
    """Yield `make(job)` in order, made by one thread up to `AHEAD` jobs before they are needed."""
    waiting: deque[Future[_Made]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="autoft-views")
    try:
        for job in jobs:
            waiting.append(pool.submit(make, job))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when the consumer abandons the generator
        pool.shutdown(cancel_futures=True)


def _read(store: PixelStore, rows: npt.NDArray[Any]) -> Pixels:
    """Copy rows out of the map, uint8 (B, R, R, 3)."""
    return np.asarray(store.array[rows])


def _planes(pixels: Pixels) -> Tensor:
    """Return float32 (B, 3, H, W), contiguous, 0..255."""
    return (
        torch.from_numpy(pixels)
        .permute(0, 3, 1, 2)
        .to(torch.float32, memory_format=torch.contiguous_format)
    )


def _normalise(images: Tensor, pre: Preprocess) -> Tensor:
    """Map 0..255 to the network's input, as `decode.normalise` does, operation by operation."""
    return images.div_(255).sub_(_channels(pre.mean)).div_(_channels(pre.std))


def _augment(pixels: Pixels, size: int, augment: str, rng: np.random.Generator) -> Tensor:
    """Return float32 (B, 3, size, size), 0..255, of uint8 (B, R, R, 3)."""
    middle = centre_crop(pixels, size)  # first of all, since it refuses a size too large
    if augment == "none":
        return _planes(middle)
    theta = _crops(len(pixels), _SMALLEST_AREA[augment], augment != "crop", rng)
    shape = [len(pixels), 3, size, size]
    grid = functional.affine_grid(theta, shape, align_corners=False)
    images = functional.grid_sample(
        _planes(pixels), grid, padding_mode="border", align_corners=False
    )
    return _jitter(images, rng) if augment == "strong" else images


def _crops(count: int, smallest: float, mirror: bool, rng: np.random.Generator) -> Tensor:
    """Draw `count` random resized crops as affine maps (count, 2, 3), mirrored half the time."""
    area = rng.uniform(smallest, 1.0, count)
    ratio = np.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1]), count))
    sides = np.minimum(np.sqrt([area * ratio, area / ratio]), 1.0)
    # In coordinates of -1..1 a crop of side s has its centre within 1 - s of the middle.
    centres = (1.0 - sides) * rng.uniform(-1.0, 1.0, (2, count))
    signs = np.where(rng.random(count) < 0.5, -1.0, 1.0) if mirror else np.ones(count)
    theta = np.zeros((count, 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 1, 1] = sides[0] * signs, sides[1]
    theta[:, :, 2] = centres.T
    return torch.from_numpy(theta)


def _jitter(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Scale brightness, contrast and saturation of each image by 1 - JITTER to 1 + JITTER.

    The three in a row are one linear map of a pixel, its luma and the image's mean luma.
    """
    drawn = rng.uniform(1 - JITTER, 1 + JITTER, (3, len(images), 1, 1, 1)).astype(np.float32)
    brightness, contrast, saturation = torch.from_numpy(drawn)
    luma = torch.einsum("nchw,c->nhw", images, torch.tensor(_LUMA)).unsqueeze(1)
    mean = luma.mean(dim=(2, 3), keepdim=True)
    shift = luma.mul_((1 - saturation) * contrast * brightness)
    shift += mean * ((1 - contrast) * brightness)
    return images.mul_(saturation * contrast * brightness).add_(shift).clamp_(0, 255)


def _channels(values: Triple) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(3, 1, 1)
