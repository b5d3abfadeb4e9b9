"""One trial of a benchmark: images of a data set, one configuration, and what it scores."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from lines import Row

from autoft.network.sources import Source
from autoft.search.finish import load_trial
from autoft.search.images import Data, read_data, setup_of
from autoft.search.settings import Settings
from autoft.training.evaluate import evaluate
from autoft.training.job import Images, Precision, Setup, TrialJob
from autoft.training.trial import train_trial
from autoft.values import TrialConfig, TrialResult

HOUR = 3600.0  # seconds: the longest that a trial may take


def open_data(
    dataset: str, image_size: int, sources: Mapping[str, Source], folder: Path, threads: int
) -> tuple[Setup, Data]:
    """Return what trials in `folder` are told of the images of `dataset`, and all of them."""
    settings = Settings(dataset=dataset, image_size=image_size, metric="accuracy")
    data = read_data(settings, lambda *_, **__: None)
    return replace(setup_of(settings, folder, data, sources, "cpu"), threads=threads), data


def some(part: Images, limit: int) -> Images:
    """Return at most `limit` images of `part`, the same ones every time."""
    order = np.random.default_rng(0).permutation(len(part))[:limit]
    return part.take(np.sort(order))


def per_class(part: Images, limit: int) -> tuple[Images, Images]:
    """Return at most `limit` images of every class of `part`, and the images left over.

    They are the same ones every time; those of a smaller limit are among those of a larger one.
    """
    order = np.random.default_rng(0).permutation(len(part))
    labels = part.labels[order]
    taken = np.zeros(len(part), np.bool_)
    for label in np.unique(labels):
        taken[order[labels == label][:limit]] = True
    return part.take(taken), part.take(~taken)


def joined(*parts: Images) -> Images:
    """Return the images of all `parts`."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Images(*map(np.concatenate, columns))


def train_and_score(
    setup: Setup, config: TrialConfig, epochs: int, precision: Precision, part: Images
) -> Row:
    """Train `config` and score it on `part` as well, which has no say in the training.

    `seconds` are those of the processor, for the training alone; `n` counts the images to train,
    to validate and of `part`.
    """
    job = TrialJob(0, config, epochs, time.time() + HOUR, precision)
    began = time.process_time()
    outcome = train_trial(setup, job, lambda _: True)
    seconds = time.process_time() - began
    if outcome.score is None or outcome.status != "done" or len(outcome.scores) < epochs:
        return {"error": outcome.error or f"{outcome.status} after {len(outcome.scores)} epochs"}
    network, backbone = load_trial(setup, TrialResult(0, config, "done"))
    scored = evaluate(network, setup, part, setup.preprocess(backbone), precision)
    return {
        "validation": outcome.score,
        "loss": outcome.loss,
        "curve": outcome.scores,
        "test": scored.score,
        "seconds": round(seconds, 1),
        "n": [len(setup.train), len(setup.validation), len(part)],
        "image_size": setup.image_size,
        "epochs": epochs,
    }
