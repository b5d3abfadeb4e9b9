"""The random views of fastai's and timm's recipes, from stored pixels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from autoft.data.augment import jitter

Draw = Callable[[Tensor, int, torch.Generator], Tensor]
"""(uint8 pixels (B, R, R, 3), side S, generator) -> float32 (B, 3, S, S) of 0..1."""

P_AFFINE, P_LIGHTING = 0.75, 0.75
TURN, ZOOM, WARP, LIGHTING = 10.0, 1.1, 0.2, 0.2
MIN_SCALE = 0.75
RATIO = (3 / 4, 4 / 3)
TIMM_SCALE, TIMM_JITTER = (0.08, 1.0), 0.4


def fastai_views(*, flips: bool) -> Draw:
    """Return `aug_transforms(size=S, min_scale=0.75)` of fastai, on a batch as there.

    Mirroring, turning by up to 10 degrees, zooming up to 1.1, perspective of 0.2, and a random
    resized crop are one mapping of coordinates with one interpolation, mirrored at the border;
    then brightness and contrast of 0.2.
    """

    def draw(pixels: Tensor, size: int, generator: torch.Generator) -> Tensor:
        images = pixels.permute(0, 3, 1, 2).float().div_(255)
        grid = _fastai_grid(len(images), size, generator, flips=flips)
        images = functional.grid_sample(
            images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )
        return _lighting(images, generator)

    return draw


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def _sometimes(values: Tensor, share: float, usual: float, generator: torch.Generator) -> Tensor:
    """Return `values`, each with the chance `share`, else `usual`."""
    chosen = torch.rand(len(values), generator=generator) < share
    return torch.where(chosen, values, torch.full_like(values, usual))


def _fastai_grid(count: int, size: int, generator: torch.Generator, *, flips: bool) -> Tensor:
    """Return where in -1..1 each pixel of the views is taken from, (count, size, size, 2)."""
    steps = (torch.arange(size) * 2 + 1) / size - 1
    base = torch.stack([*torch.meshgrid(steps, steps, indexing="xy"), torch.ones(size, size)], -1)
    maps = _affine(count, generator, flips=flips) @ _perspective(count, generator)
    crops = _crops(count, generator)
    places = base.view(1, -1, 3) @ maps.transpose(1, 2)
    places = places[..., :2] / places[..., 2:].clamp_min(1e-3)
    places = places * crops[:, None, :2] + crops[:, None, 2:]
    return places.view(count, size, size, 2)


def _affine(count: int, generator: torch.Generator, *, flips: bool) -> Tensor:
    """Return mirroring, turning and zooming about a random point as matrices (count, 3, 3)."""
    turn = _uniform(count, -TURN, TURN, generator) * math.pi / 180
    turn = _sometimes(turn, P_AFFINE, 0.0, generator)
    zoom = _sometimes(1 / _uniform(count, 1.0, ZOOM, generator), P_AFFINE, 1.0, generator)
    mirror = torch.ones(count)
    if flips:
        mirror = _sometimes(-mirror, 0.5, 1.0, generator)
    centre = torch.rand((count, 2), generator=generator) * 2 - 1
    matrix = torch.zeros(count, 3, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = turn.cos() * zoom * mirror, -turn.sin() * zoom
    matrix[:, 1, 0], matrix[:, 1, 1] = turn.sin() * zoom * mirror, turn.cos() * zoom
    matrix[:, :2, 2] = centre * (1 - zoom[:, None])
    matrix[:, 2, 2] = 1
    return matrix


def _perspective(count: int, generator: torch.Generator) -> Tensor:
    """Return a tilt about both axes as matrices (count, 3, 3); each corner moves up to 0.2."""
    tilt = torch.stack(
        [
            _sometimes(_uniform(count, -WARP, WARP, generator), P_AFFINE, 0.0, generator)
            for _ in range(2)
        ],
        1,
    )
    matrix = torch.eye(3).repeat(count, 1, 1)
    matrix[:, 2, :2] = tilt / 2
    return matrix


def _crops(count: int, generator: torch.Generator) -> Tensor:
    """Return parts of MIN_SCALE to 1 of the area: scale and centre in x and y, (count, 4)."""
    area = _uniform(count, MIN_SCALE, 1.0, generator)
    ratio = _uniform(count, math.log(RATIO[0]), math.log(RATIO[1]), generator).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp_max(1.0)
    centres = (torch.rand((count, 2), generator=generator) * 2 - 1) * (1 - sides)
    return torch.cat([sides, centres], 1)


def _lighting(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness and contrast of 0..1 as fastai does: shift and scale in logit space."""
    count = len(images)
    change = _uniform(count, 0.5 * (1 - LIGHTING), 0.5 * (1 + LIGHTING), generator)
    shift = _sometimes(torch.logit(change), P_LIGHTING, 0.0, generator)
    low = math.log(1 - LIGHTING)
    scale = _sometimes(_uniform(count, low, -low, generator).exp(), P_LIGHTING, 1.0, generator)
    logits = torch.logit(images, eps=1e-6)
    return logits.add_(shift.view(-1, 1, 1, 1)).mul_(scale.view(-1, 1, 1, 1)).sigmoid_()


def timm_views(*, flips: bool) -> Draw:
    """Return the defaults of timm's train.py: random resized crop, mirroring, colour jitter."""

    def draw(pixels: Tensor, size: int, generator: torch.Generator) -> Tensor:
        views = torch.empty(len(pixels), 3, size, size)
        boxes = timm_boxes(len(pixels), pixels.shape[1], generator)
        factors = torch.rand((len(pixels), 3), generator=generator) * 2 - 1
        mirrored = torch.rand(len(pixels), generator=generator) < (0.5 if flips else 0.0)
        for place, (top, left, height, width) in enumerate(boxes):
            part = pixels[place : place + 1, top : top + height, left : left + width]
            part = functional.interpolate(
                part.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True
            )
            image = jitter(part[0].permute(1, 2, 0), *(1 + TIMM_JITTER * factors[place]).tolist())
            image = image.flip(1) if mirrored[place] else image
            views[place] = image.permute(2, 0, 1)
        return views.div_(255)

    return draw


def timm_boxes(count: int, side: int, generator: torch.Generator) -> list[list[int]]:
    """Return boxes (top, left, height, width) of 0.08 to 1 of a square of `side` pixels."""
    area = _uniform(count, *TIMM_SCALE, generator)
    ratio = _uniform(count, math.log(RATIO[0]), math.log(RATIO[1]), generator).exp()
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 1) * side
    sides = sides.round().clamp(1, side).long()
    corners = (torch.rand((count, 2), generator=generator) * (side - sides + 1)).long()
    boxes: list[list[int]] = torch.cat([corners, sides], 1).tolist()
    return boxes
