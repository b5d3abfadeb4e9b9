"""Objects as heights over the plane: contours, limbs, glyphs and fractals, by class.

A contour is a radius as a function of the angle: sums of two waves (as in VisualAtom, arXiv
2303.01112), polygons, stars, roses and gears. Limbs are capsules around a disc, glyphs a few
curved strokes, fractals attractors of random affine maps (iterated function systems, their
singular values drawn as in arXiv 2110.03091). What an object is called is its class; everything
else about it varies from one to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Final

import torch
from drawing import Draw, column
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

ANGLES: Final = 128  # at which a contour is known
WAVES: Final = tuple(combinations(range(2, 9), 2))
CONTOURS: Final = (
    *(("wave", pair) for pair in WAVES),
    *(("polygon", n) for n in range(3, 9)),
    *(("star", n) for n in range(4, 10)),
    *(("rose", n) for n in range(3, 9)),
    *(("gear", n) for n in (6, 8, 10, 12)),
    ("disc", 0),
    ("squircle", 0),
)
LIMBS: Final = 6  # at most; in a fan or all around
GLYPHS: Final = 96
STROKES, POINTS = 3, 14
FRACTALS: Final = 96
MAPS, PARTICLES, STEPS, WARM_UP = 4, 96, 70, 8
BANK_SEED: Final = 20261124  # of the glyphs and fractals that classes are named after


def heights(draw: Draw, family: str, kinds: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return heights (N, H, W), positive inside, of objects of a family and of `kinds` (N,).

    `x` and `y` (N, H, W) are coordinates in which an object has about radius 1.
    """
    return FUNCTIONS[family](draw, kinds, x, y)


def contours(draw: Draw, kinds: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return radius of the contour less distance from the middle."""
    count = len(kinds)
    theta = torch.arange(ANGLES, device=x.device) * (2 * math.pi / ANGLES)
    radius = torch.ones(count, ANGLES, device=x.device)
    for kind, (form, number) in enumerate(CONTOURS):
        chosen = (kinds == kind).nonzero()[:, 0]
        if len(chosen):
            radius[chosen] = _radius(draw, form, number, theta, len(chosen))
    place = (torch.atan2(y, x) / (2 * math.pi)).remainder(1.0) * ANGLES
    below = place.floor()
    flat = below.long().remainder(ANGLES).flatten(1)
    first = radius.gather(1, flat).view_as(x)
    second = radius.gather(1, (flat + 1).remainder(ANGLES)).view_as(x)
    return torch.lerp(first, second, place - below) - torch.hypot(x, y)


def _radius(draw: Draw, form: str, number: object, theta: Tensor, count: int) -> Tensor:
    """Return radii (count, ANGLES) of one form; its proportions vary."""
    if form == "wave":
        low, high = WAVES[WAVES.index(number)]  # type: ignore[arg-type]  # a pair by its form
        size = draw.uniform(0.14, 0.36, 2, count, 1)
        turn = draw.uniform(0, 2 * math.pi, 2, count, 1)
        waves = size[0] * (low * theta + turn[0]).cos() + size[1] * (high * theta + turn[1]).cos()
        return 0.85 + waves
    if form in ("disc", "squircle"):
        power = 2.0 if form == "disc" else 5.0
        total = theta.cos().abs() ** power + theta.sin().abs() ** power
        return (total ** (-1 / power)).expand(count, -1)
    corners = int(number)  # type: ignore[call-overload]  # one number by its form
    phase = (theta * corners / (2 * math.pi)).remainder(1.0)  # from one corner to the next
    if form == "polygon":
        half = math.pi / corners
        return (math.cos(half) / ((phase * 2 - 1) * half).cos()).expand(count, -1)
    if form == "star":
        inner = draw.uniform(0.35, 0.65, count, 1)
        return inner + (1 - inner) * (phase * 2 - 1).abs()
    if form == "gear":
        return 1 - draw.uniform(0.15, 0.3, count, 1) * (phase > 0.5)
    return 1 - draw.uniform(0.4, 0.8, count, 1) * (math.pi * phase).sin().square()  # a rose


def limbs(draw: Draw, kinds: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return a disc with one to six capsules: in a fan, as fingers of a hand, or all around."""
    count = len(kinds)
    number, around = kinds.remainder(LIMBS) + 1, kinds >= LIMBS
    palm = column(draw.uniform(0.25, 0.42, count))
    height = palm - torch.hypot(x, y)
    wide = draw.uniform(0.09, 0.15, count)
    opening = torch.where(around, 2 * math.pi / number, draw.uniform(0.3, 0.55, count))
    for limb in range(LIMBS):
        wobble = draw.uniform(-0.1, 0.1, count)
        angle = (limb - (number - 1) / 2) * opening + wobble
        length = draw.uniform(0.7, 1.05, count)
        dx, dy = column(angle.sin()), column(-angle.cos())
        along = (x * dx + y * dy).clamp(min=0).minimum(column(length))
        away = torch.hypot(x - along * dx, y - along * dy)
        own = column(wide) - away
        height = torch.where(column(limb < number), torch.maximum(height, own), height)
    return height


def glyphs(draw: Draw, kinds: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return curved strokes about the control points of each class, as a hand would write them."""
    bank = Draw.seeded(BANK_SEED).uniform(-0.85, 0.85, GLYPHS, STROKES, 3, 2).to(x.device)
    count = len(kinds)
    control = bank[kinds] + 0.09 * draw.normal(count, STROKES, 3, 2)
    t = torch.linspace(0, 1, POINTS, device=x.device).view(1, 1, POINTS, 1)
    a, b, c = (control[:, :, None, i] for i in range(3))
    points = ((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c).flatten(1, 2)
    used = 2 + kinds.remainder(2)  # strokes of this class
    points = torch.where(
        (torch.arange(STROKES * POINTS, device=x.device) < (used * POINTS)[:, None])[..., None],
        points,
        points[:, :1],
    )
    best = torch.full_like(x, 99.0)
    for at in range(STROKES * POINTS):
        px, py = points[:, at, 0, None, None], points[:, at, 1, None, None]
        best = torch.minimum(best, (x - px).square() + (y - py).square())
    return column(draw.uniform(0.09, 0.2, count)) - best.sqrt()


def fractals(draw: Draw, kinds: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the density of the attractor of each class, its maps a little changed."""
    matrix, shift = (each.to(x.device)[kinds] for each in _systems())
    count, size = len(kinds), x.shape[-1]
    matrix = matrix + 0.03 * draw.normal(*matrix.shape)
    shift = shift + 0.05 * draw.normal(*shift.shape)
    weight = torch.linalg.det(matrix).abs() + 0.02
    which = torch.multinomial(
        weight, STEPS * PARTICLES, replacement=True, generator=draw.generator
    ).view(count, STEPS, PARTICLES)
    row = torch.arange(count, device=x.device)[:, None]
    points = draw.uniform(-1, 1, count, PARTICLES, 2)
    seen = []
    for step in range(STEPS):
        chosen = which[:, step]
        moved = matrix[row, chosen] @ points[..., None]
        points = (moved[..., 0] + shift[row, chosen]).clamp(-9, 9)
        if step >= WARM_UP:
            seen.append(points)
    return _density(torch.cat(seen, dim=1), x, y, size)


def _density(points: Tensor, x: Tensor, y: Tensor, size: int) -> Tensor:
    """Return how many points (N, P, 2) lie at the coordinates, as a height."""
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    unit = (points - low) / (high - low).amax(2, keepdim=True).clamp(min=1e-3)
    cells = size // 2
    at = (unit * (cells - 1)).round().long().clamp(0, cells - 1)
    hits = torch.zeros(len(x), cells * cells, device=x.device)
    hits.scatter_add_(1, at[..., 1] * cells + at[..., 0], torch.ones_like(at[..., 0]).float())
    tall = hits.view(-1, 1, cells, cells).clamp(max=3.0) / 3.0
    seen = F.grid_sample(tall, torch.stack([x, y], dim=-1), align_corners=False)
    return seen[:, 0] - 0.2


def _systems() -> tuple[Tensor, Tensor]:
    """Return maps (FRACTALS, MAPS, 2, 2) and shifts (FRACTALS, MAPS, 2) of all classes."""
    draw = Draw.seeded(BANK_SEED + 1)
    turn = draw.uniform(0, 2 * math.pi, 2, FRACTALS, MAPS)
    first, second = (
        torch.stack([t.cos(), -t.sin(), t.sin(), t.cos()], -1).view(FRACTALS, MAPS, 2, 2)
        for t in turn
    )
    large = draw.uniform(0.35, 0.85, FRACTALS, MAPS)
    small = large * draw.uniform(0.2, 0.95, FRACTALS, MAPS)
    sign = draw.happens(0.5, FRACTALS, MAPS) * 2.0 - 1
    scale = torch.diag_embed(torch.stack([large, small * sign], -1))
    return first @ scale @ second, draw.uniform(-1, 1, FRACTALS, MAPS, 2)


Function = Callable[[Draw, Tensor, Tensor, Tensor], Tensor]
FUNCTIONS: Final[dict[str, Function]] = {
    "contours": contours,
    "limbs": limbs,
    "glyphs": glyphs,
    "fractals": fractals,
}
SIZES: Final = {
    "contours": len(CONTOURS),
    "limbs": 2 * LIMBS,
    "glyphs": GLYPHS,
    "fractals": FRACTALS,
}
FAMILIES: Final = tuple(FUNCTIONS)
NOTHING: Final = "nothing"
NUM_CLASSES: Final = sum(SIZES.values())


def first_class(family: str) -> int:
    """Return where the classes of a family begin among all."""
    return sum(SIZES[name] for name in FAMILIES[: FAMILIES.index(family)])


def families_of(names: Sequence[str]) -> list[str]:
    """Return the families in `names`; all where none is named, none where NOTHING is."""
    return [name for name in FAMILIES if not names or name in names]
