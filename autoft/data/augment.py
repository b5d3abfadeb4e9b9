"""Random views of stored images, and mixtures of two: every draw from a generator that is given.

Torch's and numpy's own generators are never touched, so a view is a function of its seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from autoft.data.pixels.decode import Pixels, centre_crop

AUGMENTS: Final = ("none", "crop", "shift_flip", "crop_flip", "strong", "trivial")
MIXES: Final = ("none", "mixup", "manifold", "cutmix")
RATIO: Final = (3 / 4, 4 / 3)
JITTER: Final = 0.3
LEVELS: Final = 31
_SMALLEST_AREA: Final = {"crop": 0.5, "crop_flip": 0.5, "strong": 0.25, "trivial": 0.5}
_LUMA: Final = (0.299, 0.587, 0.114)
_BETA: Final = {"mixup": 0.2, "manifold": 0.2, "cutmix": 1.0}
_BILINEAR: Final = InterpolationMode.BILINEAR
_SHEAR, _TURN, _COLOUR, _SHIFT = 0.99, 135.0, 0.99, 32 / 224

Fill = list[float]
"""The colour of what an image leaves empty when it is moved: three numbers of 0..255."""
_Operation = Callable[[Tensor, float, Fill], Tensor]


def random_views(
    pixels: Pixels, size: int, name: str, rng: np.random.Generator, fill: Fill, window: int = 0
) -> Iterator[Tensor]:
    """Yield (size, size, 3) of 0..255, uint8 or float32, of each image of uint8 (B, R, R, 3).

    `none` is the middle. `shift_flip` moves the square, `crop` and `crop_flip` also resize a part
    of it (antialiased), `strong` takes smaller parts and changes colours; `trivial` is
    TrivialAugment after `crop_flip`. All but `none` and `crop` mirror half of the images. Where
    `window` is given, the middle and the square that is moved have that side and are resized.

    Raises:
        UsageError: `size` or `window` is larger than R.
    """
    window = window or size
    middle = torch.from_numpy(centre_crop(pixels, max(size, window)))  # refuses one too large
    count, side = len(pixels), pixels.shape[1]
    if name == "none":
        whole = np.tile([0, 0, window, window], (count, 1))
        yield from _cut(middle, whole, np.zeros(count, bool), size)
        return
    if name == "shift_flip":
        boxes = _shifts(count, side, window, rng)
    else:
        boxes = _parts(count, side, _SMALLEST_AREA[name], rng)
    mirrored = rng.random(count) < (0.0 if name == "crop" else 0.5)
    cut = _cut(torch.from_numpy(pixels), boxes, mirrored, size)
    if name == "strong":
        cut = _jittered(cut, count, rng)
    elif name == "trivial":
        cut = _trivial(cut, count, rng, fill)
    yield from cut


def mixed(
    images: Tensor, targets: Tensor, weights: Tensor, name: str, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix a batch with itself in another order: images (B, S, S, 3), targets (B, C), weights (B,).

    `manifold` (Verma et al. 2019, arXiv 1806.05236) is `mixup` that may also be of what frozen
    stages make of the images, (B, W).
    `mixup` (Zhang et al. 2018, arXiv 1710.09412) adds two images in the shares Beta(0.2, 0.2);
    `cutmix` (Yun et al. 2019, arXiv 1905.04899) pastes a box of one into the other, whose area is
    Beta(1, 1) of the image before it is cut at the border. One share a batch, as in both papers.
    Each label keeps the weight of its image: the mixture's loss is the sum of both, by share.
    """
    if name == "none":
        return images, targets, weights
    order = torch.from_numpy(rng.permutation(len(images)))
    share = float(rng.beta(_BETA[name], _BETA[name]))  # of the image itself
    if name in ("mixup", "manifold"):
        images = images.lerp_(images[order], 1 - share)
    else:
        share = _paste(images, order, share, rng)
    weighted = targets * weights[:, None]
    both = weighted.lerp(weighted[order], 1 - share)
    weights = both.sum(1)
    return images, both / weights.clamp_min(torch.finfo(both.dtype).tiny)[:, None], weights


def _paste(images: Tensor, order: Tensor, share: float, rng: np.random.Generator) -> float:
    """Paste a box of the others into `images`, in place; return the share of area that stays."""
    size = images.shape[1]
    half = size * math.sqrt(1 - share) / 2
    centre = rng.integers(0, size, 2)
    (top, left), (bottom, right) = (
        np.clip(np.rint(centre + move), 0, size).astype(int) for move in (-half, half)
    )
    images[:, top:bottom, left:right] = images[order, top:bottom, left:right]
    return 1 - float((bottom - top) * (right - left)) / size**2


# --- where the image is cut ---------------------------------------------------------------------


def _shifts(count: int, side: int, size: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw squares of `size` in a square of `side`: (count, 4) of top, left, height, width."""
    corners = rng.integers(0, side - size + 1, (count, 2))
    return np.concatenate([corners, np.full((count, 2), size)], axis=1)


def _parts(
    count: int, side: int, smallest: float, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw boxes of `smallest` to all of the area, as torchvision's RandomResizedCrop: (count, 4).

    One that is too long for the square is as long as the square.
    """
    area = rng.uniform(smallest, 1.0, count)
    ratio = np.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1]), count))
    sides = np.sqrt([area / ratio, area * ratio]) * side
    sides = np.clip(np.rint(sides), 1, side).astype(np.int64)
    corners = (rng.random((2, count)) * (side - sides + 1)).astype(np.int64)
    return np.concatenate([corners, sides]).T


def _cut(
    pixels: Tensor, boxes: npt.NDArray[np.int64], mirrored: npt.NDArray[np.bool_], size: int
) -> Iterator[Tensor]:
    """Yield uint8 (size, size, 3): the box of each image, resized where it has another size."""
    boxes_flips = zip(boxes.tolist(), mirrored.tolist(), strict=True)
    for index, ((top, left, height, width), mirror) in enumerate(boxes_flips):
        # A batch of one, not an image: only so does torch see that the channels are last, and
        # 8-bit pixels in that order are resized three times as fast.
        part = pixels[index : index + 1, top : top + height, left : left + width]
        if (height, width) != (size, size):
            part = functional.interpolate(
                part.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True
            ).permute(0, 2, 3, 1)
        part = part[0]
        yield part.flip(1) if mirror else part


# --- what is done to its colours, and more ------------------------------------------------------


def _jittered(images: Iterator[Tensor], count: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Scale brightness, contrast and saturation of each image by 1 - JITTER to 1 + JITTER."""
    for image, factors in zip(
        images, rng.uniform(1 - JITTER, 1 + JITTER, (count, 3)), strict=True
    ):
        yield jitter(image, *factors.tolist())


def jitter(image: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Return float32 (H, W, 3) of 0..255: `image` brightened, then contrasted, then saturated.

    The three in a row are one linear map of a pixel, its luma and the image's mean luma.
    """
    image = image.to(torch.float32)
    luma = image @ torch.tensor(_LUMA)
    shift = luma.mean() * ((1 - contrast) * brightness)
    shift = luma.mul_((1 - saturation) * contrast * brightness).add_(shift)
    return image.mul_(saturation * contrast * brightness).add_(shift[..., None]).clamp_(0, 255)


def _trivial(
    images: Iterator[Tensor], count: int, rng: np.random.Generator, fill: Fill
) -> Iterator[Tensor]:
    """Apply one drawn operation at one drawn strength to each image: TrivialAugment, wide.

    Mueller & Hutter 2021, arXiv 2103.10158, with the strengths of torchvision; a shift is in
    proportion to the image, and what becomes empty is filled by `fill`, not by black.
    """
    chosen = rng.integers(0, len(_OPERATIONS), count)
    levels = rng.integers(0, LEVELS, count) / (LEVELS - 1) * rng.choice([-1.0, 1.0], count)
    for image, which, level in zip(images, chosen.tolist(), levels.tolist(), strict=True):
        planes = image.permute(2, 0, 1).contiguous()  # where these operations are quickest
        yield _OPERATIONS[which](planes, level, fill).permute(1, 2, 0)


def _moved(
    image: Tensor,
    fill: Fill,
    *,
    shift: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """Shift by shares of the side, shear by slopes from the top left."""
    moved: Tensor = vision.affine(
        image,
        angle=0.0,
        translate=[round(part * image.shape[-1]) for part in shift],
        scale=1.0,
        shear=[math.degrees(math.atan(slope)) for slope in shear],
        interpolation=_BILINEAR,
        fill=fill,
        center=[0.0, 0.0] if any(shear) else None,
    )
    return moved


_OPERATIONS: Final[tuple[_Operation, ...]] = (
    lambda image, level, fill: image,
    lambda image, level, fill: _moved(image, fill, shear=(_SHEAR * level, 0.0)),
    lambda image, level, fill: _moved(image, fill, shear=(0.0, _SHEAR * level)),
    lambda image, level, fill: _moved(image, fill, shift=(_SHIFT * level, 0.0)),
    lambda image, level, fill: _moved(image, fill, shift=(0.0, _SHIFT * level)),
    lambda image, level, fill: vision.rotate(image, _TURN * level, _BILINEAR, fill=fill),
    lambda image, level, fill: vision.adjust_brightness(image, 1 + _COLOUR * level),
    lambda image, level, fill: vision.adjust_saturation(image, 1 + _COLOUR * level),
    lambda image, level, fill: vision.adjust_contrast(image, 1 + _COLOUR * level),
    lambda image, level, fill: vision.adjust_sharpness(image, 1 + _COLOUR * level),
    lambda image, level, fill: vision.posterize(image, 8 - round(6 * abs(level))),
    lambda image, level, fill: vision.solarize(image, 255 * (1 - abs(level))),
    lambda image, level, fill: vision.autocontrast(image),
    lambda image, level, fill: vision.equalize(image),
)
