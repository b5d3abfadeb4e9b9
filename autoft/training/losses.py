"""The loss that everything is trained with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


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
