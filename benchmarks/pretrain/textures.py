"""Textures without objects: noise, stripes, checks, dots, bricks, cells, rings, marble, leaves.

1/f noise and dead leaves (overlapping discs and squares whose sizes follow a power law) have the
statistics of natural images (arXiv 2106.05963); the regular ones have what these lack, long
edges and repeated forms. Every family is one function of warped, turned and scaled coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from drawing import Draw, column, grid, smooth, spread
from torch import Tensor

LOWEST, HIGHEST = 0.7, 7.0  # periods in half an image
FINEST = 6.0  # pixels of a period: what is finer cannot be seen
BANDS: Final = 6  # of frequency, to be told apart
LEAVES, SCRATCHES = 26, 14


@dataclass(frozen=True)
class Textures:
    """Maps (N, H, W) from 0 to 1, and of each the family and the band of its frequency (N,)."""

    values: Tensor
    family: Tensor
    band: Tensor


def textures(draw: Draw, count: int, size: int, names: Sequence[str] = ()) -> Textures:
    """Draw `count` textures, evenly from the families (only those in `names`, if given)."""
    allowed = torch.tensor([FAMILIES.index(name) for name in names or FAMILIES])
    family = allowed.to(draw.device)[draw.integers(len(allowed), count)]
    frequency = draw.log_uniform(LOWEST, min(HIGHEST, size / 2 / FINEST), count)
    u, v = _coordinates(draw, frequency, size)
    values = torch.empty(count, size, size, device=draw.device)
    for index, name in enumerate(FAMILIES):
        chosen = (family == index).nonzero()[:, 0]
        if len(chosen):
            own = FUNCTIONS[name](draw, u[chosen], v[chosen], frequency[chosen])
            values[chosen] = spread(own)
    share = (frequency / LOWEST).log() / math.log(HIGHEST / LOWEST)
    band = (share * BANDS).long().clamp(0, BANDS - 1)
    return Textures(_sharpened(draw, values), family, band)


def _coordinates(draw: Draw, frequency: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return coordinates that are turned, stretched, warped and shifted; one unit is a period."""
    count = len(frequency)
    x, y = grid(size, draw.device)
    angle = column(draw.uniform(0, math.pi, count))
    stretch = column(draw.log_uniform(0.6, 1.6, count))
    warp = column(draw.uniform(0, 0.25, count) * draw.happens(0.6, count))
    x = x + warp * smooth(draw, count, 4, size)
    y = y + warp * smooth(draw, count, 4, size)
    u = x * angle.cos() + y * angle.sin()
    v = (y * angle.cos() - x * angle.sin()) * stretch
    shift = draw.uniform(0, 10, 2, count)
    return u * column(frequency) + column(shift[0]), v * column(frequency) + column(shift[1])


def _sharpened(draw: Draw, values: Tensor) -> Tensor:
    """Make the change from dark to light steep in some, and turn some upside down."""
    gain = column(draw.log_uniform(1.0, 24.0, len(values)))
    middle = column(draw.uniform(0.35, 0.65, len(values)))
    steep = spread(torch.sigmoid(gain * (values - middle)))
    turned = column(draw.happens(0.5, len(values)))
    return torch.where(turned, 1 - steep, steep)


def noise(draw: Draw, u: Tensor, v: Tensor, frequency: Tensor) -> Tensor:
    """Filter white noise to the spectrum 1/f^a, in some more in one direction than across."""
    count, size = u.shape[:2]
    spectrum = torch.fft.rfft2(draw.normal(count, size, size))
    fy = torch.fft.fftfreq(size, 1 / size, device=u.device).view(1, size, 1)
    fx = torch.fft.rfftfreq(size, 1 / size, device=u.device).view(1, 1, -1)
    angle = column(draw.uniform(0, math.pi, count))
    across = column(draw.log_uniform(1.0, 5.0, count))
    along = fx * angle.cos() + fy * angle.sin()
    radius = (along.square() + (across * (fy * angle.cos() - fx * angle.sin())).square()).sqrt()
    knee = column(frequency)  # below it the spectrum is flat
    slope = column(draw.uniform(0.9, 2.2, count))
    return torch.fft.irfft2(spectrum * (radius + knee) ** -slope, s=(size, size))


def stripes(draw: Draw, u: Tensor, v: Tensor, frequency: Tensor) -> Tensor:
    """Draw parallel waves."""
    return (2 * math.pi * u).sin()


def checks(draw: Draw, u: Tensor, v: Tensor, frequency: Tensor) -> Tensor:
    """Draw the product of waves in two directions."""
    return (2 * math.pi * u).sin() * (2 * math.pi * v).sin()


def dots(draw: Draw, u: Tensor, v: Tensor, frequency: Tensor) -> Tensor:
    """Draw a lattice of discs."""
    return -torch.hypot(u.frac().abs() - 0.5, v.frac().abs() - 0.5)


def bricks(draw: Draw, u: Tensor, v: Tensor, frequency: Tensor) -> Tensor:
    """Draw rows of rectangles with joints, every other row moved by half of one."""
    row = v.floor()
    x = (u + 0.5 * row).remainder(1.0)
    edge = torch.minimum((x - 0.5).abs().neg() + 0.5, (v - row - 0.5).abs().neg() + 0.5)
    tone = ((u + 0.5 * row).floor() * 12.9898 + row * 78.233).sin() * 43758.5453
    return (edge * 8).clamp(max=1.0) + 0.4 * tone.frac()


def cells(draw: Draw, u: Tensor, v: Tensor, frequency: Tensor) -> Tensor:
    """Draw Worley's cells: the distance to the nearest of scattered points, or to the border."""
    nearest = torch.full_like(u, 9.0)
    second = torch.full_like(u, 9.0)
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            cx, cy = u.floor() + dx, v.floor() + dy
            hashed = (cx * 127.1 + cy * 311.7).sin() * 43758.5453
            px, py = cx + hashed.frac().abs(), cy + (hashed * 1.37).frac().abs()
            away = torch.hypot(u - px, v - py)
            second = torch.minimum(second, torch.maximum(nearest, away))
            nearest = torch.minimum(nearest, away)
    border = column(draw.happens(0.5, len(u)))
    return torch.where(border, second - nearest, nearest)


def rings(draw: Draw, u: Tensor, v: Tensor, frequency: Tensor) -> Tensor:
    """Draw waves around one or two centres."""
    place = draw.uniform(-1.5, 1.5, 4, len(u)) * frequency
    middle_u, middle_v = u.mean((1, 2)), v.mean((1, 2))
    one, two = (
        torch.hypot(u - column(middle_u + place[i]), v - column(middle_v + place[i + 1]))
        for i in (0, 2)
    )
    both = column(draw.happens(0.4, len(u)))
    return (2 * math.pi * one).sin() + both * (2 * math.pi * two).sin()


def marble(draw: Draw, u: Tensor, v: Tensor, frequency: Tensor) -> Tensor:
    """Draw waves that noise bends, or ridges of noise alone."""
    size = u.shape[-1]
    rough = sum(smooth(draw, len(u), knots, size) / weight for knots, weight in _OCTAVES)
    ridged = column(draw.happens(0.4, len(u)))
    return torch.where(ridged, -rough.abs(), (2 * math.pi * (0.5 * u + 0.5 * rough)).sin())


def leaves(draw: Draw, u: Tensor, v: Tensor, frequency: Tensor) -> Tensor:
    """Paint discs and squares over each other, few large ones and many small ones."""
    count, size = u.shape[:2]
    x, y = grid(size, u.device)
    values = column(draw.uniform(0, 1, count)).expand(-1, size, size)
    least = 0.5 / frequency
    for _ in range(LEAVES):
        px, py = (column(each) for each in draw.uniform(-1.1, 1.1, 2, count))
        radius = column(least * draw.uniform(0.02, 1, count) ** -0.45)
        dx, dy = (x - px).abs(), (y - py).abs()
        square = column(draw.happens(0.35, count))
        away = torch.where(square, torch.maximum(dx, dy), torch.hypot(dx, dy))
        values = torch.where(away < radius, column(draw.uniform(0, 1, count)), values)
    return values


def scratches(draw: Draw, u: Tensor, v: Tensor, frequency: Tensor) -> Tensor:
    """Draw straight strokes, each with its tone."""
    count, size = u.shape[:2]
    x, y = grid(size, u.device)
    values = column(draw.uniform(0, 1, count)).expand(-1, size, size)
    for _ in range(SCRATCHES):
        px, py = (column(each) for each in draw.uniform(-1, 1, 2, count))
        angle = column(draw.uniform(0, math.pi, count))
        along = (x - px) * angle.cos() + (y - py) * angle.sin()
        across = (y - py) * angle.cos() - (x - px) * angle.sin()
        half, thick = column(draw.uniform(0.2, 1.0, count)), column(0.15 / frequency)
        hit = (along.abs() < half) & (across.abs() < thick)
        values = torch.where(hit, column(draw.uniform(0, 1, count)), values)
    return values


_OCTAVES: Final = ((3, 1.0), (6, 2.0), (12, 4.0))
Function = Callable[[Draw, Tensor, Tensor, Tensor], Tensor]
FUNCTIONS: Final[dict[str, Function]] = {
    "noise": noise,
    "stripes": stripes,
    "checks": checks,
    "dots": dots,
    "bricks": bricks,
    "cells": cells,
    "rings": rings,
    "marble": marble,
    "leaves": leaves,
    "scratches": scratches,
}
FAMILIES: Final = tuple(FUNCTIONS)
