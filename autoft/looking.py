"""Looking at what a network does, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def noise(module: nn.Module, count: int, image_size: int, seed: int = 0) -> Tensor:
    """Return fixed random images (count, 3, S, S) where the network is, in its number format."""
    like = next((each for each in module.parameters() if each.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, image_size, image_size, generator=generator)
    return images.to(like.device, like.dtype)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have `module` in eval mode in the block, and every part in its own mode afterwards."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode
