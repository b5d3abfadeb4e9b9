"""Rendered images that are kept for a while, so that one drawing serves several steps.

The oldest are replaced at the pace at which images are used, so that each is used `uses` times on
average, every time cut out and coloured anew.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from drawing import Draw
from rendering import TASKS, UNKNOWN, Families, Rendered, render
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

CHUNK = 256  # images rendered together
MARGIN = 1.125  # of a rendered image to what is cut out of it
SMALLEST = 0.6  # share of the sides that is cut out
FADED = 0.1  # share of the views without colours
COLOURS = [list(TASKS).index(name) for name in ("ground_colour", "colour")]


@dataclass
class Pool:
    """Images as bytes, with their answers; `uses` 0: those of the beginning stay for good."""

    draw: Draw
    capacity: int
    size: int
    uses: float
    families: Families = field(default_factory=Families)
    rendered: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Fill the pool."""
        parts = [self._render(min(CHUNK, self.capacity - n)) for n in self._starts()]
        self.images = torch.cat([_bytes(each.images) for each in parts])
        self.answers = torch.cat([each.answers for each in parts])
        self.present = torch.cat([each.present.to(torch.uint8) for each in parts])
        self._oldest, self._owed = 0, 0.0

    def _starts(self) -> range:
        return range(0, self.capacity, CHUNK)

    def _render(self, count: int) -> Rendered:
        began = time.perf_counter()
        found = render(self.draw, count, round(self.size * MARGIN), self.families)
        self.seconds += time.perf_counter() - began
        self.rendered += count
        return found

    def batch(self, count: int, views: int = 1) -> Rendered:
        """Draw `count` images, each in `views` views: views of one image lie `count` apart."""
        self._refresh(count * views)
        rows = self.draw.integers(len(self.images), count).repeat(views)
        images = self.images[rows].float() / 255
        answers = self.answers[rows]
        faded = self.draw.happens(FADED, len(rows))
        for task in COLOURS:
            answers[:, task] = torch.where(faded, UNKNOWN, answers[:, task])
        return Rendered(
            _viewed(self.draw, images, faded, self.size), answers, self.present[rows].float()
        )

    def _refresh(self, used: int) -> None:
        """Replace as many of the oldest as `used` images owe."""
        self._owed += used / self.uses if self.uses else 0.0
        while self._owed >= CHUNK:
            self._owed -= CHUNK
            new = self._render(CHUNK)
            at = torch.arange(self._oldest, self._oldest + CHUNK, device=self.draw.device)
            at = at.remainder(len(self.images))
            self.images[at], self.answers[at] = _bytes(new.images), new.answers
            self.present[at] = new.present.to(torch.uint8)
            self._oldest = int(at[-1]) + 1


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def _viewed(draw: Draw, images: Tensor, faded: Tensor, size: int) -> Tensor:
    """Cut a random part out of each image and change its light; `faded` ones lose colour."""
    count = len(images)
    side = draw.uniform(SMALLEST, 1.0, count)
    stretch = draw.log_uniform(0.85, 1.18, count)
    wide, tall = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    place = draw.uniform(-1, 1, 2, count)
    zero = torch.zeros_like(side)
    rows = (
        torch.stack([wide, zero, place[0] * (1 - wide)], dim=1),
        torch.stack([zero, tall, place[1] * (1 - tall)], dim=1),
    )
    where = F.affine_grid(torch.stack(rows, dim=1), [count, 3, size, size], align_corners=False)
    seen = F.grid_sample(images, where, align_corners=False, padding_mode="reflection")
    seen = torch.where(faded.view(-1, 1, 1, 1), seen.mean(1, keepdim=True), seen)
    contrast = draw.uniform(0.7, 1.3, count, 1, 1, 1)
    bright = draw.uniform(-0.1, 0.1, count, 1, 1, 1)
    return ((seen - 0.5) * contrast + 0.5 + bright).clamp(0, 1)
