"""The losses of many heads on one batch, and their gradients by the logits, without autograd.

They are those of `training/losses.py`, written for logits (M, C, B): M heads, C classes, B images.
Images come last, so that the softmax of a few classes runs over long rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from autoft.training.losses import GAMMA, class_weights, log_prior
from autoft.training.recipe import Recipe


class Criteria:
    """What each head minimises: by its `balance` and `smoothing`."""

    def __init__(self, recipes: Sequence[Recipe], counts: Tensor, device: torch.device) -> None:
        """Prepare the losses for classes with `counts` (C,) images in training."""
        balances = [each.balance for each in recipes]
        smoothing = [[each.smoothing] for each in recipes]  # (M, 1)
        self._smoothing = torch.tensor(smoothing, dtype=torch.float32, device=device)
        self._prior = _rows(balances, "logit_adjust", log_prior(counts), 0.0, device)
        self._of_class = _rows(balances, "class_balanced", class_weights(counts), 1.0, device)
        focal = [each == "focal" for each in balances]
        self._focal = torch.tensor(focal, device=device)
        self._any_focal = any(focal)
        self._smooth = bool((self._smoothing > 0).any())

    def keep(self, kept: Tensor) -> None:
        """Go on with the heads of `kept` (M,) alone."""
        self._smoothing = self._smoothing[kept]
        self._prior = None if self._prior is None else self._prior[kept]
        self._of_class = None if self._of_class is None else self._of_class[kept]
        self._focal = self._focal[kept]
        self._any_focal = bool(self._focal.any())

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses (M,) and their gradients (M, C, B) by `logits` (M, C, B).

        `labels` (B,) and `weights` (B,) are of the images.
        """
        logits = logits if self._prior is None else logits + self._prior[:, :, None]
        logs = torch.log_softmax(logits, dim=1)
        count, classes = len(labels), logits.shape[1]
        own = labels.expand(len(logits), 1, count)
        at_own = logs.gather(1, own).squeeze(1)
        losses = at_own.mul(self._smoothing - 1)
        slopes = logs.exp()
        slopes.scatter_add_(1, own, (self._smoothing - 1)[:, :, None].expand(-1, 1, count))
        if self._smooth:
            share = self._smoothing / classes
            losses -= share * logs.sum(dim=1)
            slopes -= share[:, :, None]
        if self._any_focal:
            some = self._focal
            losses[some], slopes[some] = _focal(logs[some], labels, self._smoothing[some])
        by_image = weights if self._of_class is None else weights * self._of_class[:, labels]
        slopes *= (by_image / count).expand(len(logits), count)[:, None]
        return (losses * by_image).mean(dim=1), slopes


def _focal(logs: Tensor, labels: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor]:
    """Return the focal losses (M, B) of log-probabilities (M, C, B), and their gradients."""
    classes = logs.shape[1]
    hot = functional.one_hot(labels, classes).T.to(logs.dtype)
    shares = hot * (1 - smoothing)[:, :, None] + (smoothing / classes)[:, :, None]
    known = logs.exp()
    unknown = -torch.expm1(logs)
    losses = -(shares * unknown.pow(GAMMA) * logs).sum(dim=1)
    by_logs = shares * unknown.pow(GAMMA - 1) * (GAMMA * known * logs - unknown)
    return losses, by_logs - known * by_logs.sum(dim=1, keepdim=True)


def _rows(
    balances: Sequence[str], balance: str, row: Tensor, otherwise: float, device: torch.device
) -> Tensor | None:
    """Return (M, C): `row` (C,) for heads of `balance`, `otherwise` for others; None for none."""
    if balance not in balances:
        return None
    rows = [row if each == balance else torch.full_like(row, otherwise) for each in balances]
    return torch.stack(rows).to(device)
