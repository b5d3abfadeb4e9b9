"""Random numbers, coordinates and smooth noise: what everything that is rendered is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name


@dataclass(frozen=True)
class Draw:
    """A seeded source of random tensors, on the device of its generator."""

    generator: torch.Generator

    @classmethod
    def seeded(cls, seed: int, device: torch.device | str = "cpu") -> Draw:
        """Return the source that `seed` begins."""
        return cls(torch.Generator(device).manual_seed(seed))

    @property
    def device(self) -> torch.device:
        """Return the device of everything that is drawn."""
        return self.generator.device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw numbers between `low` and `high`."""
        drawn = torch.rand(shape, generator=self.generator, device=self.device)
        return low + (high - low) * drawn

    def log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw numbers between `low` and `high`, as many in each octave."""
        return self.uniform(math.log(low), math.log(high), *shape).exp()

    def normal(self, *shape: int) -> Tensor:
        """Draw from the normal distribution of variance 1."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def integers(self, below: int, *shape: int) -> Tensor:
        """Draw whole numbers from 0 on."""
        return torch.randint(below, shape, generator=self.generator, device=self.device)

    def happens(self, probability: float, *shape: int) -> Tensor:
        """Draw what is true with a probability."""
        return torch.rand(shape, generator=self.generator, device=self.device) < probability


def grid(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return x and y (1, size, size) of the centres of pixels, from -1 to 1."""
    line = (torch.arange(size, device=device) + 0.5) * (2 / size) - 1
    return line.view(1, 1, size), line.view(1, size, 1)


def column(values: Tensor) -> Tensor:
    """Return one number an image (N,) so that it meets maps (N, H, W)."""
    return values[:, None, None]


def smooth(draw: Draw, count: int, knots: int, size: int) -> Tensor:
    """Draw smooth noise (count, size, size) of about unit variance, of `knots` bumps a side."""
    coarse = draw.normal(count, 1, knots, knots)
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)[:, 0]


def spread(values: Tensor) -> Tensor:
    """Stretch each map (N, H, W) to the range from 0 to 1."""
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    return (values - low) / (high - low).clamp(min=1e-6)
