"""Logistic regression on the frozen features of the best backbone: the usual strong baseline."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from given import Given, Task, open_task, own_cache, scored
from lines import Row
from numpy.typing import NDArray
from one_trial import joined
from threadpoolctl import threadpool_limits

from autoft.training.features import built, pooled_features
from autoft.training.job import Images
from autoft.training.precision import memory_format
from autoft.training.profile import PLAIN

STRENGTHS = tuple(10.0**power for power in (-4, -3.5, -3, -2.5, -2, -1.5, -1, 0))  # C
Features = NDArray[np.float32]


def logistic_best(given: Given, dataset: str, seed: int, folder: Path) -> Row:
    """Return what logistic regression reaches with backbone, image size and C chosen.

    The images to train and to validate are cross-validated together, by the folds of the split;
    the chosen one is fitted to all of them.
    """
    with own_cache(folder / "cache"):
        tasks = [
            open_task(given, dataset, seed, folder, size)
            for size in dict.fromkeys((0, given.size))
        ]
        tasks = [
            task for place, task in enumerate(tasks) if place == 0 or not _same(task, tasks[0])
        ]
        began = time.monotonic()
        tried: list[Row] = []
        for task in tasks:
            for label in task.setup.sources:
                if tried and time.monotonic() - began > given.seconds * 0.8:
                    break
                tried += _cross_validated(task, label)
        best = max(tried, key=lambda row: row["validation"])
        predicted = _fitted(best)
        seconds = time.monotonic() - began
        told = scored(best["task"], predicted)
    size = best["task"].setup.image_size
    return told | {
        "validation": best["validation"],
        "seconds": round(seconds, 1),
        "chosen": f"{best['backbone']}, {size} pixels, C {best['strength']:.2g}",
        "image_size": size,
        "tried": len(tried),
    }


def _same(task: Task, other: Task) -> bool:
    return task.setup.image_size == other.setup.image_size


def _cross_validated(task: Task, label: str) -> list[Row]:
    """Return the accuracy of one backbone's features at every strength."""
    known = joined(task.setup.train, task.setup.validation)
    features = _features(task, label, known)
    divisions = list(_divisions(task, known))
    asked = np.concatenate([held for _, held in divisions])

    def validation(strength: float) -> float:
        right = 0
        for fitted, held in divisions:
            predict = _logistic(features[fitted], known.labels[fitted], strength)
            right += int((predict(features[held]) == known.labels[held]).sum())
        return right / len(asked)

    # Side by side with one thread each: the matrices are too thin to share among threads.
    with threadpool_limits(1), ThreadPoolExecutor(task.setup.threads) as pool:
        scores = list(pool.map(validation, STRENGTHS))
    return [
        {"task": task, "backbone": label, "strength": strength, "validation": score}
        for strength, score in zip(STRENGTHS, scores, strict=True)
    ]


def _divisions(task: Task, known: Images) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Yield what is fitted and what is asked: by the folds, or by the hold-out."""
    folds = np.unique(known.folds[known.folds >= 0])
    held_out = np.arange(len(known)) >= len(task.setup.train)
    parts = [known.folds == fold for fold in folds] if len(folds) > 1 else [held_out]
    for held in parts:
        yield np.flatnonzero(~held), np.flatnonzero(held)


def _features(task: Task, label: str, part: Images) -> Features:
    backbone = built(task.setup, label)
    module = backbone.module.to(memory_format=memory_format(PLAIN))
    pre = task.setup.preprocess(backbone)
    return pooled_features(module, task.setup, part, pre, PLAIN)


def _logistic(features: Features, labels: NDArray[np.int64], strength: float) -> Any:
    """Return what predicts classes of features, fitted on standardised ones."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough to be compared
        model.fit(features, labels)
    return model.predict


def _fitted(best: Row) -> NDArray[np.int64]:
    """Return what the chosen one, fitted to all that is known, says of the test part."""
    task: Task = best["task"]
    known = joined(task.setup.train, task.setup.validation)
    label, strength = best["backbone"], best["strength"]
    predict = _logistic(_features(task, label, known), known.labels, strength)
    guessed: NDArray[np.int64] = predict(_features(task, label, task.test))
    return guessed
