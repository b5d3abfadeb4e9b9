"""The losses that networks are trained with, for even and for uneven classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from autoft.errors import UsageError, did_you_mean
from autoft.training.recipe import BALANCES

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits (B, C), targets (B, C) as shares of classes and weights (B,) to the loss of a batch."""

Counts = Tensor | NDArray[Any]

BETA: Final = 0.999
GAMMA: Final = 2.0


def make_loss(balance: str, smoothing: float, counts: Counts) -> Loss:
    """Return the loss that treats classes as `balance` says.

    `counts` (C,) are the images of each class in the training part; a class without any counts as
    one with a single image. Everything is computed on the device of the logits; counts that are
    there already save a copy in every step.

    Raises:
        UsageError: there is no such balance.
    """
    counts = torch.as_tensor(counts)
    if balance == "none":
        return partial(weighted_cross_entropy, smoothing=smoothing)
    if balance == "logit_adjust":
        return partial(_adjusted, smoothing=smoothing, prior=log_prior(counts))
    if balance == "class_balanced":
        return partial(_balanced, smoothing=smoothing, of_class=class_weights(counts))
    if balance == "focal":
        return partial(focal, smoothing=smoothing)
    raise UsageError(
        f"There is no balance '{balance}'.{did_you_mean(balance, BALANCES)} Choose one of: "
        f"{', '.join(BALANCES)}."
    )


def weighted_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float
) -> Tensor:
    """Return the mean over a batch of weight x cross-entropy of the softmax, in nats.

    `logits` and `targets` (shares of classes) are (B, C), `weights` (B,). `smoothing` spreads that
    share of each target evenly over all classes (Szegedy et al. 2016, arXiv 1512.00567). The sum
    is divided by B, not by the weights of the batch: these have a mean of 1 over all images, so
    that a light batch takes a small step.
    """
    losses = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return (losses * weights).mean()


def focal(
    logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float, gamma: float = GAMMA
) -> Tensor:
    """Return the focal loss of a batch: what is known already counts little.

    Each class's part of the cross-entropy is multiplied by (1 - p)^`gamma`, p its probability
    (Lin et al. 2017, arXiv 1708.02002), so that soft targets work as well.
    """
    logs = functional.log_softmax(logits, dim=1)
    shares = targets * (1 - smoothing) + smoothing / logits.shape[1]
    unknown = -torch.expm1(logs)  # 1 - p, exact where p is near 1
    losses = -(shares * unknown.pow(gamma) * logs).sum(dim=1)
    return (losses * weights).mean()


def log_prior(counts: Counts) -> Tensor:
    """Return the logarithm of each class's share of images, (C,), fp32; 0 images count as 1."""
    images = torch.as_tensor(counts).float().clamp(min=1)
    return (images / images.sum()).log()


def class_weights(counts: Counts) -> Tensor:
    """Return the weight of an image of each class, (C,), fp32, of mean 1 over all images.

    A class counts by its effective number of images, (1 - b^n) / (1 - b) with b = 0.999: the more
    there are, the less another adds (Cui et al. 2019, arXiv 1901.05555).
    """
    images = torch.as_tensor(counts).double()
    weights = (1 - BETA) / (1 - BETA ** images.clamp(min=1))
    return (weights * images.sum() / (weights * images).sum()).float()


def _adjusted(
    logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float, prior: Tensor
) -> Tensor:
    """Return the cross-entropy of logits + log prior (Menon et al. 2021, arXiv 2007.07314).

    The prior is learnt by the added part, and is missing where the logits alone predict: these
    are made for equally frequent classes.
    """
    return weighted_cross_entropy(logits + prior.to(logits), targets, weights, smoothing)


def _balanced(
    logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float, of_class: Tensor
) -> Tensor:
    """Return the cross-entropy where each image weighs what its classes do, by their shares."""
    return weighted_cross_entropy(
        logits, targets, weights * (targets @ of_class.to(targets)), smoothing
    )
