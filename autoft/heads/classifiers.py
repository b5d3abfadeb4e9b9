"""Heads: features (N, num_features) to logits (N, num_classes).

Output layers start at zero, so that training starts at the loss ln(num_classes) and the first step
sends no noise into the backbone (the practice of BiT and big_vision).
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoft.space import Float, Int


def linear(num_features: int, num_classes: int) -> nn.Module:
    """Map features to logits by one linear layer."""
    return _zero(nn.Linear(num_features, num_classes))


def norm_linear(
    num_features: int,
    num_classes: int,
    *,
    dropout: Annotated[float, Float(0.0, 0.5)] = 0.0,
) -> nn.Module:
    """Standardise every feature, then one linear layer: one learning rate fits all backbones."""
    return nn.Sequential(
        nn.BatchNorm1d(num_features, affine=False),
        nn.Dropout(dropout),
        _zero(nn.Linear(num_features, num_classes)),
    )


def cosine(
    num_features: int,
    num_classes: int,
    *,
    scale: Annotated[float, Float(8.0, 32.0)] = 16.0,
) -> nn.Module:
    """Compare features with one direction per class by angle: good for few or uneven classes."""
    return _Cosine(num_features, num_classes, scale)


def mlp(
    num_features: int,
    num_classes: int,
    *,
    hidden: Annotated[int, Int(64, 1024, log=True)] = 256,
    dropout: Annotated[float, Float(0.0, 0.5)] = 0.2,
) -> nn.Module:
    """Put one hidden layer between standardised features and logits."""
    return nn.Sequential(
        nn.BatchNorm1d(num_features, affine=False),
        nn.Linear(num_features, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        _zero(nn.Linear(hidden, num_classes)),
    )


def multilayer(
    num_features: int,
    num_classes: int,
    *,
    dropout: Annotated[float, Float(0.0, 0.8)] = 0.2,
    features: str = "stages",  # read by the core: it gives those of all stages
) -> nn.Module:
    """Standardise the features of all stages, each by itself, then one linear layer.

    What a task needs may lie below the last stage, the more so the less it is like what the
    weights were trained on (Head2Toe, Evci et al. 2022, arXiv 2201.03529; here without its choice
    of features).
    """
    return norm_linear(num_features, num_classes, dropout=dropout)


class _Cosine(nn.Module):
    """Scaled cosine similarity with a learnable scale."""

    def __init__(self, num_features: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        nn.init.normal_(self.weight, std=num_features**-0.5)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (N, F) to logits (N, C)."""
        directions = functional.normalize(self.weight, dim=1)
        logits: Tensor = self.scale * functional.normalize(features, dim=1) @ directions.T
        return logits


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
