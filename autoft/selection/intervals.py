"""A measured score with its 95 % interval."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoft.training import metrics
from autoft.values import Estimate

Z = 1.959964  # the normal quantile of a two-sided 95 % interval
RESAMPLES = 2000


def estimate(
    metric: str, labels: NDArray[np.int64], predicted: NDArray[np.int64], seed: int = 0
) -> Estimate:
    """Return the score of predictions (N,) with a 95 % interval.

    Accuracy gets Wilson's interval, which holds for small n and near 1; the other metrics a
    percentile bootstrap over images.
    """
    value = metrics.score(metric, labels, predicted)
    if metric == "accuracy":
        low, high = wilson(value, len(labels))
        return Estimate(value, low, high, len(labels))
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(labels), len(labels)) for _ in range(RESAMPLES)]
    scores = [metrics.score(metric, labels[draw], predicted[draw]) for draw in draws]
    low, high = (float(bound) for bound in np.percentile(scores, [2.5, 97.5]))
    return Estimate(value, low, high, len(labels))


def effective_images(metric: str, labels: NDArray[np.int64]) -> int:
    """Return of how many images an accuracy is as noisy as `metric` is on images with `labels`.

    Where every class counts the same, the smallest ones decide: C^2 / sum(1 / n_c).
    """
    if metric == "accuracy":
        return len(labels)
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    return max(1, round(len(counts) ** 2 / float((1 / counts).sum())))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share observed in `n` draws (Wilson 1927)."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    # rounding must not push a bound past the share itself
    return max(0.0, min(share, float(centre - half))), min(1.0, max(share, float(centre + half)))
