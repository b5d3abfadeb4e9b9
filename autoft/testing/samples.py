"""Two small backbones to try adapters on: one of convolutions, one of attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from autoft.values import Backbone

IMAGE_SIZE = 32  # pixels
WIDTH = 64
PATCH = 8  # pixels


class Transformer(nn.Module):
    """Two encoder layers over patches, with a class token and positions on the root."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, (IMAGE_SIZE // PATCH) ** 2 + 1, WIDTH))
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to features (N, 64)."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = tokens + self.positions
        for layer in self.layers:
            tokens = layer(tokens)
        features: Tensor = self.norm(tokens)[:, 0]
        return features


def samples() -> Iterator[Backbone]:
    """Yield both, with random weights of their own and the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        both = (_convolutions(), _transformer())
    yield from both


def _convolutions() -> Backbone:
    module = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
        nn.BatchNorm2d(WIDTH),
        nn.Conv2d(WIDTH, WIDTH, 1),
        nn.ReLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    stages = (("0", "1"), ("3", "4", "5"), ("7", "8"))
    return Backbone(module, stages, num_features=WIDTH, image_size=IMAGE_SIZE)


def _transformer() -> Backbone:
    stages = (("cls_token", "positions", "patches"), ("layers.0",), ("layers.1", "norm"))
    return Backbone(Transformer(), stages, num_features=WIDTH, image_size=IMAGE_SIZE)
