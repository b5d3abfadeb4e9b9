"""How a trial is trained: the ranges and defaults of everything that is no plugin's own choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from autoft.space import Choice, Float

HeadRate = Annotated[float, Float(1e-4, 3e-2, log=True)]
Decay = Annotated[float, Float(1e-4, 3e-1, log=True)]
Smoothing = Annotated[float, Choice(0.0, 0.05, 0.1)]

AUGMENTS = ("none", "crop", "shift_flip", "crop_flip", "strong", "trivial")
UPRIGHT = ("none", "crop")  # those that neither mirror nor turn: for images such as digits

SGD_FACTOR = 30.0  # SGD wants about 30 times AdamW's rate, so that one range serves both


@dataclass(frozen=True)
class Recipe:
    """Learning rates are of AdamW, for the last stage (`lr`) and for the head (`head_lr`)."""

    lr: float
    head_lr: float
    weight_decay: float
    smoothing: float
    augment: str
    mix: str
    batch_size: int
    optimizer: str


def tuning(  # noqa: PLR0913 (the signature is the search space)
    *,
    lr: Annotated[float, Float(2e-5, 3e-3, log=True)] = 2e-4,
    head_lr: HeadRate = 1e-3,
    weight_decay: Decay = 0.02,
    smoothing: Smoothing = 0.05,
    augment: Annotated[str, Choice(*AUGMENTS)] = "crop_flip",
    mix: Annotated[str, Choice("none", "mixup", "cutmix")] = "none",
    batch_size: Annotated[int, Choice(16, 32, 64)] = 32,
    optimizer: Annotated[str, Choice("adamw", "sgd")] = "adamw",
) -> Recipe:
    """Return the recipe of a trial that trains the backbone."""
    return Recipe(lr, head_lr, weight_decay, smoothing, augment, mix, batch_size, optimizer)


def probing(
    *,
    head_lr: HeadRate = 3e-3,
    weight_decay: Decay = 0.1,
    smoothing: Smoothing = 0.0,
) -> Recipe:
    """Return the recipe of a trial that trains the head alone, on cached features."""
    return Recipe(0.0, head_lr, weight_decay, smoothing, "none", "none", 64, "adamw")
