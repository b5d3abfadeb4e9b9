"""Ridge regression on the classes: a probe in closed form, whatever the number of classes."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

PENALTIES: Final = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Per image, whatever their number: for standardised features."""

NOTHING: Final = 1e-10  # of the largest variance: a direction with less is rounding

Array = NDArray[np.float32]
Double = NDArray[np.float64]


def ridge(
    known: Array,
    labels: NDArray[np.int64],
    asked: Array,
    weights: NDArray[np.float32] | None = None,
) -> Array:
    """Return (asked, classes up to the largest label), shares of classes by ridge regression.

    `known` (N, F) with `labels` (N,) is standardised; `weights` (N,) are of the images. All
    `PENALTIES` come out of one decomposition, and the one with the least squared error on images
    left out one by one is taken (Golub, Heath and Wahba 1979). scikit-learn's `RidgeCV` gives the
    same, but takes a matrix product of all features for each penalty.

    Raises:
        ValueError: features are not finite.
    """
    from sklearn.preprocessing import StandardScaler

    classes = np.unique(labels)
    if len(classes) == 1:
        return spread(np.ones((len(asked), 1)), classes)
    known, asked = np.asarray_chkfinite(known), np.asarray_chkfinite(asked)
    scaler = StandardScaler().fit(known)
    images = np.ones(len(known)) if weights is None else weights.astype(np.float64)
    targets = (labels[:, None] == classes).astype(np.float64)
    found = _regress(scaler.transform(known), targets, scaler.transform(asked), images)
    scores = np.clip(found, 1e-4, None)
    return spread(scores / scores.sum(axis=1, keepdims=True), classes)


def spread(found: NDArray[Any], classes: NDArray[np.int64]) -> Array:
    """Put columns of the `classes`, in rising order, where their numbers say."""
    result = np.zeros((len(found), int(classes[-1]) + 1), np.float32)
    result[:, classes] = found
    return result


def _regress(known: Array, targets: Double, asked: Array, weights: Double) -> Double:
    """Return what is predicted of `asked` (M, F), (M, C), with the best of `PENALTIES`."""
    shares = weights / weights.sum()
    centre, middle = shares @ known, shares @ targets  # the intercept is not penalised
    root = np.sqrt(weights)[:, None]
    inputs, outputs = root * (known - centre), root * (targets - middle)
    variances, directions, along = _decompose(inputs)
    projected = along.T @ outputs
    best, coefficients = np.inf, projected
    for penalty in PENALTIES:
        shrunk = 1 / (variances + penalty * len(known))
        candidate = shrunk[:, None] * projected
        # How much each image's prediction is by its own target; without it the error is larger.
        leverage = shares + along**2 @ shrunk
        errors = (outputs - along @ candidate) / np.maximum(1 - leverage, NOTHING)[:, None]
        if (error := float(np.square(errors).mean())) < best:
            best, coefficients = error, candidate
    predicted: Double = (asked - centre) @ directions @ coefficients + middle
    return predicted


def _decompose(inputs: Double) -> tuple[Double, Double, Double]:
    """Return variances (K,), unit directions (F, K) and `inputs` (N, F) along these, (N, K)."""
    if len(inputs) > inputs.shape[1]:
        variances, directions = np.linalg.eigh(inputs.T @ inputs)
        return np.maximum(variances, 0), directions, inputs @ directions
    variances, units = np.linalg.eigh(inputs @ inputs.T)
    kept = variances > NOTHING * variances[-1]
    variances, units = variances[kept], units[:, kept]
    lengths = np.sqrt(variances)
    return variances, inputs.T @ units / lengths, units * lengths
