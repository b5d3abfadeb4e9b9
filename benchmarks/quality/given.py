"""What holds for all methods that are compared: images, weights, time, and how each is scored."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lines import Row
from numpy.typing import NDArray

from autoft.data.views import evaluation_batches
from autoft.network.sources import Source, in_folder
from autoft.search.images import Data, read_data, setup_of
from autoft.search.settings import Settings
from autoft.selection.intervals import estimate
from autoft.training.job import Images, Precision, Setup
from autoft.training.metrics import log_loss, predict
from autoft.training.precision import autocast, place
from autoft.values import Preprocess

CPU = torch.device("cpu")
EVALUATION_BATCH = 64
CACHE = "AUTOFT_CACHE"
UPRIGHT = ("sign-digits",)  # mirrored it may be another sign: known to every method beforehand


@dataclass(frozen=True)
class Given:
    """What holds for all lines of a command.

    `data` and `weights` are folders; each method has `seconds` of wall time. `size` is the side in
    pixels at which networks run that were trained so (0: that of the search), `backbone` the one
    with the best prior. Each line computes with so many `threads` (0: all processors).
    """

    data: Path
    weights: Path
    seconds: float
    size: int = 224
    backbone: str = "mobilenetv2_100.in1k"
    threads: int = 0

    def sources(self) -> dict[str, Source]:
        """Return the backbones that the folder of weights holds, by label."""
        return in_folder(self.weights)[0]


@dataclass(frozen=True)
class Task:
    """A data set as a method is told of it, and its locked test part, which only `scored` reads.

    `paths` (N,) name the images of `test`, in its order.
    """

    setup: Setup
    test: Images
    paths: tuple[str, ...]
    split: str


@dataclass(frozen=True)
class Moments:
    """Mean and deviation of the pixels that a network was trained on, three of each."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def preprocess(self, setup: Setup) -> Preprocess:
        """Return how an image becomes the network's input."""
        return Preprocess(setup.image_size, setup.store.resize, self.mean, self.std, "bilinear")


def open_task(given: Given, dataset: str, seed: int, folder: Path, size: int = 0) -> Task:
    """Return `dataset` at `size` pixels (0: as a search takes it), split as a search splits it."""
    settings = Settings(
        dataset=str(given.data / dataset), image_size=size or None, metric="accuracy", seed=seed
    )
    data: Data = read_data(settings, lambda *_, **__: None)
    setup = setup_of(settings, folder, data, given.sources(), "cpu")
    threads = given.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    paths = tuple(data.catalog.paths[index] for index in data.split.test)
    test = data.part(data.split.test)
    return Task(replace(setup, threads=threads), test, paths, data.split.hash)


def scored(task: Task, predicted: NDArray[np.int64]) -> Row:
    """Return the test score of predictions (N,) with its interval: the one reading of the part.

    `right` has a 1 for each image that is known and a 0 for each other, in the order of paths.
    """
    found = estimate("accuracy", task.test.labels, predicted)
    setup = task.setup
    return {
        "test": found.value,
        "interval": [found.low, found.high],
        "right": rights(task.paths, predicted == task.test.labels),
        "n": [len(setup.train), len(setup.validation), len(task.test)],
        "classes": len(setup.classes),
        "split": task.split,
    }


def rights(paths: Sequence[str], right: Sequence[bool] | NDArray[np.bool_]) -> str:
    """Return `right` (N,) as digits in the order of the paths."""
    return "".join(str(int(known)) for _, known in sorted(zip(paths, right, strict=True)))


@torch.inference_mode()
def logits_of(
    network: torch.nn.Module, setup: Setup, part: Images, moments: Moments, how: Precision
) -> NDArray[np.float32]:
    """Return logits (N, C) of any module that maps normalised images to them, in eval mode."""
    network.eval()
    pre = moments.preprocess(setup)
    found = []
    with autocast(how, CPU):
        for images in evaluation_batches(setup.store, part.rows, pre, EVALUATION_BATCH):
            found.append(network(place(images, how, CPU)).float())
    logits: NDArray[np.float32] = torch.cat(found).numpy()
    return logits


def judged(labels: NDArray[np.int64], logits: NDArray[np.float32]) -> tuple[float, float]:
    """Return what models are compared by: accuracy, and the negative log-loss where it is even."""
    return float((predict(logits) == labels).mean()), -log_loss(labels, logits)


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Have nothing in the cache at the beginning of the block, and keep out of that of others."""
    before = os.environ.get(CACHE)
    os.environ[CACHE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[CACHE]
        else:
            os.environ[CACHE] = before
