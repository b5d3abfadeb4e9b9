"""Losses: what each does about uneven classes, and that they agree where classes are even."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoft.errors import UsageError
from autoft.training.losses import (
    class_weights,
    focal,
    log_prior,
    make_loss,
    weighted_cross_entropy,
)
from autoft.training.recipe import BALANCES

COUNTS = np.array([950, 50])


def batch(classes: int = 5, rows: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, mixed targets and uneven weights."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    hard = functional.one_hot(torch.arange(rows) % classes, classes).float()
    share = torch.rand(rows, 1, generator=generator)
    return logits, share * hard + (1 - share) * hard.flip(0), 2 * torch.rand(rows) + 0.1


def per_class_recall(loss_name: str, weights: bool = True) -> list[float]:
    """Train a linear layer on two overlapping clouds, 950 and 50, and return what it recalls."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 950 + [1] * 50)
    features = torch.randn(1000, 4, generator=generator) + 1.5 * labels[:, None] * torch.eye(4)[0]
    layer = nn.Linear(4, 2)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    loss_of = make_loss(loss_name, 0.0, COUNTS)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(300):
        optimizer.zero_grad()
        loss_of(
            layer(features), functional.one_hot(labels, 2).float(), torch.ones(1000)
        ).backward()
        optimizer.step()
    found = layer(features).argmax(dim=1)
    return [float((found[labels == label] == label).float().mean()) for label in (0, 1)]


def test_plain_loss_ignores_the_rare_class_and_balanced_ones_do_not() -> None:
    plain = per_class_recall("none")
    assert plain[1] < 0.3
    for name in ("logit_adjust", "class_balanced"):
        better = per_class_recall(name)
        assert better[1] > 0.6, name
        assert sum(better) > sum(plain) + 0.3, name


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_even_classes_is_the_cross_entropy(balance, smoothing) -> None:
    logits, targets, weights = batch()
    expected = weighted_cross_entropy(logits, targets, weights, smoothing)
    if balance == "focal":
        got = focal(logits, targets, weights, smoothing, gamma=0.0)
    else:
        got = make_loss(balance, smoothing, np.full(5, 70))(logits, targets, weights)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("balance", BALANCES)
def test_loss_stands_empty_classes_extreme_logits_and_mixed_targets(balance) -> None:
    logits, targets, weights = batch()
    loss_of = make_loss(balance, 0.1, torch.tensor([100_000, 1, 0, 0, 30]))
    for scale in (1.0, 1e4):
        leaf = (scale * logits).requires_grad_()
        loss = loss_of(leaf, targets, weights)
        loss.backward()
        assert loss.shape == ()
        assert loss.isfinite()
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()
    certain = functional.one_hot(targets.argmax(1), 5).float()
    leaf = (1e3 * certain).requires_grad_()
    loss_of(leaf, certain, weights).backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("balance", BALANCES)
def test_image_of_weight_zero_does_not_count_and_weights_scale(balance) -> None:
    logits, targets, _ = batch()
    loss_of = make_loss(balance, 0.05, np.array([500, 40, 30, 20, 4]))
    ones = torch.ones(64)
    half = (torch.arange(64) < 32).float()
    torch.testing.assert_close(
        loss_of(logits, targets, half), loss_of(logits[:32], targets[:32], ones[:32]) / 2
    )
    torch.testing.assert_close(
        loss_of(logits, targets, 3 * ones), 3 * loss_of(logits, targets, ones)
    )


def test_focal_loss_turns_to_what_is_not_known_yet() -> None:
    logits = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    one = torch.ones(1)
    known, unknown = (
        focal(logits[i : i + 1], targets[i : i + 1], one, 0.0)
        / weighted_cross_entropy(logits[i : i + 1], targets[i : i + 1], one, 0.0)
        for i in (0, 1)
    )
    shares = logits.softmax(dim=1)[:, 0]
    torch.testing.assert_close(known, (1 - shares[0]) ** 2)
    torch.testing.assert_close(unknown, (1 - shares[1]) ** 2)


def test_weights_of_classes_have_mean_one_over_images_and_favour_the_rare() -> None:
    counts = np.array([5000, 500, 5, 0])
    weights = class_weights(counts)
    assert float((weights * torch.tensor(counts)).sum() / counts.sum()) == pytest.approx(1.0)
    assert weights[0] < weights[1] < weights[2] < weights[3] < 10_000
    # Beyond about a thousand images, more of them hardly add: not in proportion to counts.
    assert float(weights[1] / weights[0]) < 3


def test_prior_is_the_share_of_images_and_finite_for_empty_classes() -> None:
    torch.testing.assert_close(log_prior(COUNTS).exp(), torch.tensor([0.95, 0.05]))
    assert log_prior(torch.tensor([10, 0])).isfinite().all()


def test_adjusted_logits_predict_as_if_classes_were_even() -> None:
    """At logits 0 the loss is that of guessing by the prior: nothing is left to learn of it."""
    loss_of = make_loss("logit_adjust", 0.0, COUNTS)
    logits = torch.zeros(1000, 2, requires_grad=True)
    labels = functional.one_hot(torch.tensor([0] * 950 + [1] * 50), 2).float()
    loss_of(logits, labels, torch.ones(1000)).backward()
    torch.testing.assert_close(logits.grad.sum(dim=0), torch.zeros(2), atol=1e-6, rtol=0)


def test_unknown_balance_is_refused_with_a_hint() -> None:
    with pytest.raises(UsageError, match=r"no balance 'focl'\. Did you mean 'focal'"):
        make_loss("focl", 0.0, COUNTS)
