"""Small classifiers on fixed features, and their cross-validation; all of it in seconds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoft.training.job import Labels, Weights
from autoft.training.measures import OutOfFold, Sample
from autoft.training.ridge import ridge, spread

NEIGHBOURS = 20
TEMPERATURE = 0.07  # of the votes of neighbours: a difference of 0.07 in cosine counts e times
FOLDS = 5
STRENGTH = 10.0  # over the number of images: the penalty per image, whatever their number
MANY_CLASSES = 100  # from here on the closed form: a logistic fit would take minutes

Features = NDArray[np.float32]
Probabilities = NDArray[np.float32]
Fit = Callable[[Features, Labels, Features], Probabilities]
"""(known, labels of known, asked) -> probabilities (asked, classes up to the largest label)."""


def logistic(
    known: Features, labels: Labels, asked: Features, weights: Weights | None = None
) -> Probabilities:
    """Return class probabilities by logistic regression on standardised features.

    Of one class, and from `MANY_CLASSES` on, a ridge regression on the classes stands in for it.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    classes = np.unique(labels)
    if not 1 < len(classes) < MANY_CLASSES:
        return ridge(known, labels, asked, weights)
    scaler = StandardScaler().fit(known)
    model = LogisticRegression(C=STRENGTH / len(known), tol=1e-3, max_iter=300)
    model.fit(scaler.transform(known), labels, sample_weight=weights)
    return spread(model.predict_proba(scaler.transform(asked)), classes)


def nearest(known: Features, labels: Labels, asked: Features) -> Probabilities:
    """Return the votes of the nearest neighbours by cosine similarity, closer ones weighing more.

    The weights of the votes are those of Wu et al. 2018 (arXiv 1805.01978).
    """
    counts = np.bincount(labels)
    count = max(1, min(NEIGHBOURS, int(counts[counts > 0].min())))
    likeness = _unit(asked) @ _unit(known).T
    near = np.argpartition(likeness, -count, axis=1)[:, -count:]
    close = np.take_along_axis(likeness, near, axis=1)
    votes = np.exp((close - close.max(axis=1, keepdims=True)) / TEMPERATURE)
    result: Probabilities = np.zeros((len(asked), len(counts)), np.float32)
    for column in range(count):
        np.add.at(result, (np.arange(len(asked)), labels[near[:, column]]), votes[:, column])
    shares: Probabilities = result / result.sum(axis=1, keepdims=True)
    return shares


def majority(known: Features, labels: Labels, asked: Features) -> Probabilities:
    """Return the shares of the classes, whatever is asked."""
    shares = np.bincount(labels).astype(np.float32) / len(labels)
    return np.tile(shares, (len(asked), 1))


def divisions(sample: Sample, repeats: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Yield (known, held out) positions: five folds, stratified, groups whole, `repeats` times.

    Where a class has fewer than five groups there are so many folds less, at least two.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    pairs = np.unique(np.stack([sample.labels, sample.groups], axis=1), axis=0)[:, 0]
    counts = np.bincount(pairs)
    folds = int(np.clip(counts[counts > 0].min(), 2, FOLDS))
    for repeat in range(repeats):
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=repeat)
        with warnings.catch_warnings():  # that a class is small is known
            warnings.simplefilter("ignore")
            divided = list(splitter.split(sample.labels, sample.labels, sample.groups))
        # Groups are never divided, so that a fold can be empty where there are few of them.
        yield from (each for each in divided if len(each[0]) and len(each[1]))


def cross_validate(
    fit: Fit, features: Features, sample: Sample, repeats: int, threads: int
) -> OutOfFold:
    """Return how well `fit` on `features` (N, F) knows the held-out images of `sample`."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # has no types

    classes = int(sample.labels.max()) + 1
    total = np.zeros((len(sample), classes), np.float32)

    def one(division: tuple[NDArray[Any], NDArray[Any]]) -> tuple[NDArray[Any], Probabilities]:
        known, held = division
        found = fit(features[known], sample.labels[known], features[held])
        return held, np.pad(found, [(0, 0), (0, classes - found.shape[1])])

    scores = []
    # Folds side by side with one thread each: the matrices are too thin to share among threads.
    with (
        threadpool_limits(1),
        warnings.catch_warnings(),
        ThreadPoolExecutor(max(1, threads)) as pool,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough to be compared
        for held, found in pool.map(one, divisions(sample, repeats)):
            total[held] += found
            scores.append(balanced(sample.labels[held], found.argmax(axis=1)))
    own = total[np.arange(len(sample)), sample.labels] / np.maximum(total.sum(axis=1), 1e-12)
    return OutOfFold(tuple(scores), own, total.argmax(axis=1).astype(np.int64))


def balanced(labels: Labels, predicted: Labels) -> float:
    """Return the mean over the classes of `labels` of the share that is predicted right."""
    right = labels == predicted
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def _unit(features: Features) -> Features:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit: Features = features / np.maximum(lengths, 1e-12)
    return unit
