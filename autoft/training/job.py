"""What a worker is told: everything a trial needs, and nothing of the locked test part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autoft.data.pixels import PixelStore
from autoft.network.sources import Source
from autoft.values import Backbone, Preprocess, Status, TrialConfig

Rows = NDArray[np.int64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """Images of one part of the data: their rows in the store and their class indices."""

    rows: Rows
    labels: Labels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)


@dataclass(frozen=True)
class Precision:
    """How a network runs: bf16 or fp32 arithmetic, channels-last or contiguous memory."""

    bf16: bool = False
    channels_last: bool = False


@dataclass(frozen=True)
class Setup:
    """What all trials of a run share; it goes to a worker with every task."""

    folder: Path
    store: PixelStore
    classes: tuple[str, ...]
    train: Images
    validation: Images
    sources: Mapping[str, Source]
    image_size: int
    metric: str
    device: str
    threads: int

    def preprocess(self, backbone: Backbone) -> Preprocess:
        """Return how an image becomes the input of `backbone`."""
        return Preprocess(
            self.image_size, self.store.resize, backbone.mean, backbone.std, "bilinear"
        )


@dataclass(frozen=True)
class Ranked:
    """What was measured of a backbone: probe scores, speed, and what it is; or why it cannot be.

    Speeds are images per second: forward in its best format, forward in fp32 on
    the CPU, and trained whole.
    """

    label: str
    probe: float = 0.0
    balanced_probe: float = 0.0
    balanced_knn: float = 0.0
    precision: Precision = Precision()
    images_per_second: float = 0.0
    fp32_images_per_second: float = 0.0
    trained_per_second: float = 0.0
    num_stages: int = 0
    parameters: int = 0
    pretrained: bool = True
    source: str = ""
    license: str = ""
    seconds: float = 0.0
    error: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class TrialJob:
    """One trial to be trained for `epochs` epochs.

    `deadline` is the wall-clock time (seconds since 1970) at which the trial ends, wherever it is.
    """

    number: int
    config: TrialConfig
    epochs: int
    deadline: float
    precision: Precision = Precision()


@dataclass(frozen=True)
class Report:
    """The state of a trial after an epoch; the score is of the validation part."""

    number: int
    epoch: int
    score: float
    loss: float
    train_loss: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a trial ended; `score` and `loss` are those of its last scored epoch and its weights."""

    number: int
    status: Status
    scores: tuple[float, ...] = ()
    score: float | None = None
    loss: float | None = None
    seconds: float = 0.0
    error: str = ""


class Reporter(Protocol):
    """Takes a report and tells whether the trial shall go on."""

    def __call__(self, report: Report, /) -> bool:
        """Return False to stop the trial after this epoch."""
        ...
