"""Whole images: coloured textures, and before them up to three shaded objects.

What the generator knows of an image is what the network learns to tell: which objects are seen,
how many, which texture lies behind and on the one in front, how fine it is, and the colours.
The same seed draws the same images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import shapes
import torch
from drawing import Draw, column, grid, smooth
from textures import BANDS, FAMILIES, Textures, textures
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

LAYERS: Final = 3
COUNTS: Final = (0.2, 0.5, 0.2, 0.1)  # how often an image has 0, 1, 2, 3 objects
SEEN = 0.3  # of an object, from which it must be told
HUES: Final = 8
GREYS: Final = 3
PALE = 0.15  # chroma below which a colour is a grey
UNKNOWN: Final = -1
TASKS: Final = {
    "ground": len(FAMILIES),
    "band": BANDS,
    "surface": len(FAMILIES),
    "object": len(shapes.FAMILIES) + 1,
    "count": LAYERS + 1,
    "ground_colour": HUES + GREYS,
    "colour": HUES + GREYS,
}
"""What is told of an image with one answer each: the number of answers. UNKNOWN: there is none."""


@dataclass(frozen=True)
class Families:
    """Which families to draw from; none named: all."""

    objects: Sequence[str] = ()
    grounds: Sequence[str] = ()


@dataclass(frozen=True)
class Rendered:
    """Images (N, 3, H, W) from 0 to 1, their answers by task, and which objects are seen.

    `present` (N, classes) is 1 for what must be told, 0 for what is not there or hardly seen.
    """

    images: Tensor
    answers: Tensor
    present: Tensor


@dataclass
class _Scene:
    """An image in the making: `owner` is the layer that each pixel shows, -1 the ground."""

    colours: Tensor
    owner: Tensor
    kinds: list[Tensor] = field(default_factory=list)
    areas: list[Tensor] = field(default_factory=list)
    surfaces: list[Tensor] = field(default_factory=list)


def render(draw: Draw, count: int, size: int, families: Families | None = None) -> Rendered:
    """Draw `count` images of `size` pixels a side."""
    families = families or Families()
    names = shapes.families_of(families.objects)
    ground = textures(draw, count, size, families.grounds)
    owner = torch.full((count, size, size), -1, device=draw.device)
    scene = _Scene(_coloured(draw, ground.values), owner)
    odds = torch.tensor(COUNTS, device=draw.device).expand(count, -1)
    wanted = torch.multinomial(odds, 1, generator=draw.generator)[:, 0] * bool(names)
    for layer in range(LAYERS):
        _add_object(draw, scene, layer, wanted > layer, names)
    answers, present = _told(scene, ground)
    return Rendered(_photographed(draw, scene.colours), answers, present)


def _add_object(
    draw: Draw, scene: _Scene, layer: int, there: Tensor, names: Sequence[str]
) -> None:
    """Paint one object over those images where it is wanted."""
    count, size = scene.owner.shape[:2]
    kinds = torch.full((count,), UNKNOWN, device=draw.device)
    areas = torch.zeros(count, device=draw.device)
    surfaces = torch.full((count,), UNKNOWN, device=draw.device)
    rows = there.nonzero()[:, 0]
    if len(rows):
        kind, height, slope = _objects(draw, len(rows), size, names)
        mask = torch.sigmoid(height * column(slope))
        surface = textures(draw, len(rows), size)
        paint = _lit(draw, _coloured(draw, surface.values), height)
        paint = _outlined(draw, paint, height, slope)
        below = _shadowed(draw, scene.colours[rows], mask)
        scene.colours[rows] = torch.lerp(below, paint, mask[:, None])
        scene.owner[rows] = torch.where(mask > 0.5, layer, scene.owner[rows])
        kinds[rows], surfaces[rows] = kind, surface.family
        areas[rows] = (mask > 0.5).float().sum((1, 2))
    scene.kinds.append(kinds)
    scene.areas.append(areas)
    scene.surfaces.append(surfaces)


def _objects(
    draw: Draw, count: int, size: int, names: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return class (N,), height (N, H, W) and steepness of the edge (N,) of objects."""
    family = draw.integers(len(names), count)
    scale = draw.log_uniform(0.4, 1.1, count)
    x, y = _placed(draw, count, size, scale, family, names)
    kind = torch.zeros(count, dtype=torch.long, device=draw.device)
    height = torch.empty(count, size, size, device=draw.device)
    for index, name in enumerate(names):
        chosen = (family == index).nonzero()[:, 0]
        if len(chosen):
            own = draw.integers(shapes.SIZES[name], len(chosen))
            height[chosen] = shapes.heights(draw, name, own, x[chosen], y[chosen])
            kind[chosen] = own + shapes.first_class(name)
    slope = scale * size * draw.uniform(0.7, 2.0, count)  # an edge of about a pixel
    return kind, height, slope


def _placed(
    draw: Draw, count: int, size: int, scale: Tensor, family: Tensor, names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return coordinates of objects: shifted, scaled, stretched, sheared, turned and bent."""
    x, y = grid(size, draw.device)
    room = (1.1 - 0.85 * scale).clamp(min=0.1)
    shift = draw.uniform(-1, 1, 2, count) * room
    bent = column(draw.uniform(0, 0.08, count))
    x = (x - column(shift[0])) / column(scale) + bent * smooth(draw, count, 4, size)
    y = (y - column(shift[1])) / column(scale) + bent * smooth(draw, count, 4, size)
    stretch, shear = (
        column(draw.log_uniform(0.75, 1.33, count)),
        column(draw.uniform(-0.2, 0.2, count)),
    )
    # What is written or held up has an upper end; anything else may lie as it will.
    upright = torch.zeros_like(family, dtype=torch.bool)
    for index, name in enumerate(names):
        upright |= (family == index) & (name in ("limbs", "glyphs"))
    turn = draw.uniform(-math.pi, math.pi, count) * torch.where(upright, 0.15, 1.0)
    cos, sin = column(turn.cos()), column(turn.sin())
    x, y = x * cos + y * sin, y * cos - x * sin
    return x * stretch + shear * y, y / stretch


def _coloured(draw: Draw, values: Tensor) -> Tensor:
    """Return colours (N, 3, H, W) for values from 0 to 1: between three or four of a palette."""
    count, size = values.shape[:2]
    knots = 4
    hue = draw.uniform(0, 1, count, 1) + draw.normal(count, knots) * draw.uniform(0, 0.2, count, 1)
    saturation = draw.uniform(0, 1, count, 1) * draw.uniform(0.5, 1.0, count, knots)
    middle = draw.uniform(0.15, 0.85, count, 1)
    contrast = draw.uniform(0.1, 0.6, count, 1)
    ramp = torch.linspace(-1, 1, knots, device=draw.device)
    bright = (middle + contrast * (ramp + 0.3 * draw.normal(count, knots))).clamp(0.02, 1.0)
    palette = _hsv(hue.remainder(1.0), saturation, bright)  # (N, knots, 3)
    place = values.clamp(0, 1).flatten(1) * (knots - 1)
    below = place.floor().clamp(max=knots - 2).long()
    lower, upper = (
        palette.gather(1, (below + step)[..., None].expand(-1, -1, 3)) for step in (0, 1)
    )
    mixed = torch.lerp(lower, upper, (place - below)[..., None])
    return mixed.transpose(1, 2).reshape(count, 3, size, size)


def _hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Return red, green and blue in a new last dimension."""
    third = torch.tensor([0.0, 2 / 3, 1 / 3], device=hue.device)
    wheel = ((hue[..., None] + third).remainder(1.0) * 6 - 3).abs().sub(1).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * (1 - wheel))


def _lit(draw: Draw, paint: Tensor, height: Tensor) -> Tensor:
    """Light the objects from one side, as if they were domes; some stay flat."""
    count = len(paint)
    dome = height.clamp(0.0, 0.6).sqrt()
    across = F.pad(dome, (1, 1, 1, 1), mode="replicate")
    dx = (across[:, 1:-1, 2:] - across[:, 1:-1, :-2]) * height.shape[-1] / 12
    dy = (across[:, 2:, 1:-1] - across[:, :-2, 1:-1]) * height.shape[-1] / 12
    angle = draw.uniform(0, 2 * math.pi, count)
    strength = draw.uniform(0.0, 0.7, count) * draw.happens(0.7, count)
    light = dx * column(angle.cos()) + dy * column(angle.sin())
    return paint * (1 + column(strength) * light.clamp(-1, 1))[:, None]


def _outlined(draw: Draw, paint: Tensor, height: Tensor, slope: Tensor) -> Tensor:
    """Draw a line of one colour inside the edge of some."""
    count = len(paint)
    wide = column(draw.uniform(0.03, 0.09, count))
    line = torch.sigmoid((wide - height) * column(slope)) * column(draw.happens(0.3, count))
    colour = draw.uniform(0, 1, count, 3, 1, 1).square()
    return torch.lerp(paint, colour, line[:, None])


def _shadowed(draw: Draw, below: Tensor, mask: Tensor) -> Tensor:
    """Let some objects throw a soft shadow to one side."""
    step = max(1, mask.shape[-1] // 24)
    soft = F.avg_pool2d(mask[:, None], 2 * step + 1, stride=1, padding=step)
    across, down = (int(n) for n in draw.integers(2 * step + 1, 2) - step)
    moved = torch.roll(soft, (down, across), (2, 3))
    dark = draw.uniform(0.2, 0.7, len(mask)) * draw.happens(0.4, len(mask))
    return below * (1 - dark[:, None, None, None] * moved)


def _told(scene: _Scene, ground: Textures) -> tuple[Tensor, Tensor]:
    """Return the answers (N, tasks) and the objects that are seen (N, classes)."""
    count = len(scene.owner)
    present = torch.zeros(count, shapes.NUM_CLASSES, device=scene.owner.device)
    number = torch.zeros(count, dtype=torch.long, device=scene.owner.device)
    surface = torch.full_like(number, UNKNOWN)
    family = torch.zeros_like(number)  # of the object in front; 0: there is none
    starts = [shapes.first_class(name) for name in shapes.FAMILIES]
    starts = torch.tensor(starts, device=scene.owner.device)
    colour = torch.full_like(number, UNKNOWN)
    for layer in range(LAYERS):
        visible = (scene.owner == layer).float()
        shown = visible.sum((1, 2))
        seen = (shown > SEEN * scene.areas[layer]) & (shown > 0.01 * visible[0].numel())
        rows = seen.nonzero()[:, 0]
        present[rows, scene.kinds[layer][rows]] = 1.0
        number += seen
        own = (scene.kinds[layer][:, None] >= starts).sum(1)
        family = torch.where(seen, own, family)
        surface = torch.where(seen, scene.surfaces[layer], surface)
        colour = torch.where(seen, _colour_of(scene.colours, visible), colour)
    behind = (scene.owner == UNKNOWN).float()
    empty = behind.mean((1, 2)) < 0.1  # the ground is covered: nothing can be told of it
    grounds = [ground.family, ground.band, _colour_of(scene.colours, behind)]
    texture, band, shade = (torch.where(empty, UNKNOWN, each) for each in grounds)
    answers = [texture, band, surface, family, number, shade, colour]
    return torch.stack(answers, dim=1), present


def _colour_of(colours: Tensor, mask: Tensor) -> Tensor:
    """Return the hue of the mean colour under a mask as one of HUES, or one of GREYS."""
    total = mask.sum((1, 2)).clamp(min=1.0)[:, None]
    mean = (colours.clamp(0, 1) * mask[:, None]).sum((2, 3)) / total
    high, low = mean.amax(1), mean.amin(1)
    red, green, blue = mean.unbind(1)
    angle = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
    hue = (angle / (2 * math.pi)).remainder(1.0).mul(HUES).long().clamp(max=HUES - 1)
    grey = HUES + (high * GREYS).long().clamp(max=GREYS - 1)
    return torch.where(high - low < PALE, grey, hue)


def _photographed(draw: Draw, colours: Tensor) -> Tensor:
    """Add what a camera adds: uneven light, contrast, blur and noise."""
    count, _, size = colours.shape[:3]
    light = 1 + column(draw.uniform(0, 0.3, count)) * smooth(draw, count, 3, size)
    images = (colours * light[:, None]).clamp(0, 1)
    images = images ** draw.log_uniform(0.7, 1.5, count, 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    some = draw.uniform(0, 1, count, 1, 1, 1) * draw.happens(0.4, count, 1, 1, 1)
    images = torch.lerp(images, blurred, some)
    grain = draw.uniform(0, 0.05, count, 1, 1, 1) * draw.happens(0.5, count, 1, 1, 1)
    return (images + grain * draw.normal(*images.shape)).clamp(0, 1)
