"""How a trial is trained: the ranges and defaults of everything that is no plugin's own choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from autoft.space import Choice, Float
from autoft.values import NormMode

HeadRate = Annotated[float, Float(1e-4, 3e-2, log=True)]
Decay = Annotated[float, Float(1e-4, 3e-1, log=True)]
Smoothing = Annotated[float, Choice(0.0, 0.05, 0.1)]
Pool = Annotated[str, Choice("native", "avgmax", "gem")]

BALANCES = ("none", "logit_adjust", "class_balanced", "focal")
"""What a loss does about classes of uneven size."""

Balance = Annotated[str, Choice(*BALANCES)]

AUGMENTS = ("none", "crop", "shift_flip", "crop_flip", "strong", "trivial")
UPRIGHT = ("none", "crop")  # those that neither mirror nor turn: for images such as digits
EXPERT = (
    "ema",
    "sam",
    "head_first",
)  # at their defaults unless they are fixed by name: they seldom pay

SMALLER = 0.7  # of the side: half of the pixels
LAST_SHARE = 0.2  # of the epochs, and one at least, sees images whole: scores are of such
MULTIPLE = 32  # pixels: what most networks take a side to be
LEAST_SIDE = 64  # pixels: below, the last map of most networks has one position
SGD_FACTOR = 30.0  # SGD wants about 30 times AdamW's rate, so that one range serves both
TRANSFORMER_FACTOR = 0.25  # and transformers a quarter of what convolutions take


@dataclass(frozen=True)
class Recipe:
    """Learning rates are of AdamW on convolutions: for the last stage (`lr`), for the head.

    `balance` is what is done about uneven classes, `pool` what the head is given of the last
    stage, `norm_mode` what pre-trained batch norms do. `l2sp` draws weights to where they began,
    `ema` scores an average of the latest weights, `sam` is the radius in which the loss shall be
    flat (0: off), `head_first` begins with a head that was fitted on the frozen features (LP-FT).
    `train_scale` is the share of the side at which images are trained on until the last epochs:
    progressive resizing, as of fastai; Touvron et al. 2019, arXiv 1906.06423, on why the last are
    not.
    """

    head_lr: float
    weight_decay: float
    smoothing: float
    balance: str
    pool: str
    lr: float = 0.0
    augment: str = "none"
    mix: str = "none"
    batch_size: int = 64
    optimizer: str = "adamw"
    schedule: str = "cosine"
    norm_mode: NormMode = "affine"
    l2sp: float = 0.0
    ema: bool = False
    sam: float = 0.0
    head_first: bool = True
    train_scale: float = 1.0


def tuning(  # noqa: PLR0913 (the signature is the search space)
    *,
    lr: Annotated[float, Float(2e-5, 3e-3, log=True)] = 2e-4,
    head_lr: HeadRate = 1e-3,
    weight_decay: Decay = 0.02,
    smoothing: Smoothing = 0.05,
    balance: Balance = "none",
    pool: Pool = "native",
    augment: Annotated[str, Choice(*AUGMENTS)] = "crop_flip",
    mix: Annotated[str, Choice("none", "mixup", "manifold", "cutmix")] = "none",
    batch_size: Annotated[int, Choice(16, 32, 64)] = 32,
    optimizer: Annotated[str, Choice("adamw", "sgd")] = "adamw",
    schedule: Annotated[str, Choice("cosine", "wsd")] = "cosine",
    norm_mode: Annotated[NormMode, Choice("frozen", "affine", "train")] = "affine",
    l2sp: Annotated[float, Choice(0.0, 1e-3, 1e-2, 1e-1)] = 0.0,
    ema: Annotated[bool, Choice(False, True)] = False,
    sam: Annotated[float, Choice(0.0, 0.02, 0.05, 0.1)] = 0.0,
    head_first: Annotated[bool, Choice(False, True)] = True,
    train_scale: Annotated[float, Choice(1.0, SMALLER)] = 1.0,
) -> Recipe:
    """Return the recipe of a trial that trains the backbone."""
    return Recipe(
        head_lr,
        weight_decay,
        smoothing,
        balance,
        pool,
        lr,
        augment,
        mix,
        batch_size,
        optimizer,
        schedule,
        norm_mode,
        l2sp,
        ema,
        sam,
        head_first,
        train_scale,
    )


def probing(
    *,
    head_lr: HeadRate = 3e-3,
    weight_decay: Decay = 0.1,
    smoothing: Smoothing = 0.0,
    balance: Balance = "none",
    pool: Pool = "native",
) -> Recipe:
    """Return the recipe of a trial that trains the head alone, on cached features."""
    return Recipe(head_lr, weight_decay, smoothing, balance, pool)


def size_in(image_size: int, scale: float, epoch: int, epochs: int) -> int:
    """Return the side in pixels of the images of `epoch`, of 0 to `epochs` - 1."""
    if scale == 1 or epoch >= epochs - whole_epochs(epochs):
        return image_size
    return smaller(image_size, scale)


def whole_epochs(epochs: int) -> int:
    """Return how many of the last `epochs` see images whole, whatever the others see."""
    return max(1, round(LAST_SHARE * epochs))


def smaller(image_size: int, scale: float) -> int:
    """Return the multiple of 32, of 64 at least, that is nearest to `scale` of the side.

    It is no more than the side itself.
    """
    return min(image_size, max(LEAST_SIDE, round(scale * image_size / MULTIPLE) * MULTIPLE))


def area(scale: float) -> float:
    """Return the share of the pixels that a trial is trained on, about."""
    return (1 - LAST_SHARE) * scale**2 + LAST_SHARE
