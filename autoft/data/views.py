"""Batches for networks, from the pixel store: plain views to score, augmented ones to train."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from autoft.data.augment import AUGMENTS, MIXES, mixed, random_views
from autoft.data.pixels.decode import Pixels, centre_crop
from autoft.data.pixels.store import Store
from autoft.errors import UsageError, did_you_mean
from autoft.values import Preprocess, is_of_images

AHEAD: Final = 2  # batches prepared while the consumer works

Rows = npt.NDArray[np.int64]
_Job = TypeVar("_Job")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Batch:
    """Images to train on, float32 (B, 3, S, S) in channels-last memory, and what they should be.

    Where what a network makes of them is kept, `images` are that instead, (B, ...). `targets` are
    shares of classes, float32 (B, C), each row of sum 1; `weights`, float32 (B,), scale the loss
    of each image.
    """

    images: Tensor
    targets: Tensor
    weights: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)


def evaluation_batches(
    store: Store, rows: Rows, pre: Preprocess, batch_size: int, flip: bool = False
) -> Generator[Tensor, None, None]:
    """Yield float32 (B, 3, S, S) of `rows` in order, equal to `decode.normalise` bit for bit.

    They are in channels-last memory. With `flip` each image is mirrored left to right.

    Raises:
        UsageError: `pre.image_size` is larger than the stored images.
    """

    def make(chosen: Rows) -> Tensor:
        images = torch.from_numpy(centre_crop(store.read(chosen), pre.image_size))
        views = (image.flip(1) for image in images) if flip else images
        return _normalised(views, len(chosen), pre).permute(0, 3, 1, 2)

    starts = range(0, len(rows), batch_size)
    return _ahead(make, (rows[start : start + batch_size] for start in starts))


def view_batches(
    store: Store, rows: Rows, pre: Preprocess, augment: str, view: int, batch_size: int
) -> Generator[Tensor, None, None]:
    """Yield float32 (B, 3, S, S) of `rows` in order: an augmented view of each.

    A view is a function of `augment`, its number and the image alone, whatever batch it is in: it
    can be made anew, and what a network makes of it can be kept.

    Raises:
        UsageError: `augment` is unknown, or `pre.image_size` larger than the stored images.
    """
    _check("augmentation", augment, AUGMENTS)

    def make(chosen: Rows) -> Tensor:
        views = _views(store.read(chosen), chosen, pre, augment, view)
        return _normalised(views, len(chosen), pre).permute(0, 3, 1, 2)

    starts = range(0, len(rows), batch_size)
    return _ahead(make, (rows[start : start + batch_size] for start in starts))


def _views(
    pixels: Pixels, rows: Rows, pre: Preprocess, augment: str, view: int, size: int = 0
) -> Generator[Tensor, None, None]:
    """Yield `view` of each image of `pixels` (B, R, R, 3), which are those of `rows` (B,).

    Views are of `size` pixels (0: as `pre` says), and show what they would at the size of `pre`.
    """
    size = size or pre.image_size
    for place, row in enumerate(rows.tolist()):
        rng, own = np.random.default_rng((view, row)), pixels[place : place + 1]
        yield from random_views(own, size, augment, rng, _fill(pre), pre.image_size)


def _fill(pre: Preprocess) -> list[float]:
    """Return the colour of what an image leaves empty when it is moved: the mean of all."""
    return [255 * value for value in pre.mean]


def training_batches(  # noqa: PLR0913 (each is a choice that a trial makes by name)
    store: Store,
    rows: Rows,
    labels: npt.NDArray[np.int64],
    pre: Preprocess,
    *,
    num_classes: int,
    weights: npt.NDArray[np.float32],
    augment: str,
    mix: str,
    batch_size: int,
    seed: int,
    epoch: int,
    views: int = 0,
    kept: Callable[[Rows], Tensor] | None = None,
    size: int = 0,
) -> Generator[Batch, None, None]:
    """Yield one epoch of batches; `augment` and `mix` are explained in `autoft.data.augment`.

    `labels[i]`, of 0 to `num_classes` - 1, and `weights[i]`, of mean 1, belong to `rows[i]`. Order
    and augmentation are a function of `seed` and `epoch` alone. A last batch of one image is
    dropped: BatchNorm cannot train on it.

    With `views` the images are those of `view_batches`, view `epoch` modulo `views`. `kept`
    returns what is kept of the images of some rows, which is then given in their place; the mix
    `manifold` is of that then. Images have `size` pixels a side (0: as `pre` says), and show what
    they would at the size of `pre`.

    Raises:
        UsageError: `augment` or `mix` is unknown, or `pre.image_size` larger than the stored
            images.
    """
    _check("augmentation", augment, AUGMENTS)
    _check("mix", mix, MIXES)
    if kept is not None and is_of_images(mix):
        raise ValueError(f"mix={mix!r} is of images, and there are none")
    order = np.random.default_rng((seed, epoch)).permutation(len(rows))
    small = replace(pre, image_size=size or pre.image_size)

    def make(job: tuple[int, npt.NDArray[np.intp]]) -> Batch:
        number, chosen = job
        # Its own generator, so that a batch is the same whatever was made before it.
        rng = np.random.default_rng((seed, epoch, number))
        targets = functional.one_hot(torch.from_numpy(labels[chosen]), num_classes).float()
        scales = torch.from_numpy(weights[chosen])
        if kept is not None:
            given = kept(rows[chosen])
            given = given if mix == "none" else given.float()
            return Batch(*mixed(given, targets, scales, mix, rng))
        pixels = store.read(rows[chosen])
        images = _normalised(
            _views(pixels, rows[chosen], pre, augment, epoch % views, small.image_size)
            if views
            else random_views(pixels, small.image_size, augment, rng, _fill(pre), pre.image_size),
            len(chosen),
            small,
        )
        images, shares, scales = mixed(images, targets, scales, mix, rng)
        return Batch(images.permute(0, 3, 1, 2), shares, scales)

    parts = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    # From 1: to numpy (seed, epoch, 0) is the same seed as (seed, epoch), which gave the order.
    return _ahead(make, enumerate((chosen for chosen in parts if len(chosen) > 1), start=1))


def _check(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise UsageError(
            f"Unknown {what} {name!r}; expected one of {', '.join(known)}."
            f"{did_you_mean(name, known)}"
        )


def _ahead(make: Callable[[_Job], _Made], jobs: Iterable[_Job]) -> Generator[_Made, None, None]:
    """Yield `make(job)` in order, made by one thread up to `AHEAD` jobs before they are needed."""
    waiting: deque[Future[_Made]] = deque()
    # With threads of its own it would take turns with those that compute, at each of their steps.
    pool = ThreadPoolExecutor(1, "autoft-views", torch.set_num_threads, (1,))
    try:
        for job in jobs:
            waiting.append(pool.submit(make, job))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when the consumer abandons the generator
        pool.shutdown(cancel_futures=True)


def _normalised(images: Iterable[Tensor], count: int, pre: Preprocess) -> Tensor:
    """Return float32 (count, S, S, 3) of `count` images (S, S, 3) of 0..255.

    The operations are those of `decode.normalise`, in their order: the bits are the same. One
    image at a time passes through all of them while it is in the cache of its core, which is
    twice as fast as batch by batch, and a row of pixels is one vector.
    """
    size = pre.image_size
    mean = torch.tensor(pre.mean, dtype=torch.float32).repeat(size)
    std = torch.tensor(pre.std, dtype=torch.float32).repeat(size)
    # numpy asks the system for large pages, torch does not; small ones cost more than all above.
    batch = torch.from_numpy(np.empty((count, size, size, 3), np.float32))
    for place, image in zip(batch, images, strict=True):
        place.copy_(image).view(size, 3 * size).div_(255).sub_(mean).div_(std)
    return batch
