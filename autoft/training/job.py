"""What a worker is told: everything a trial needs, and nothing of the locked test part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from autoft.data.pixels.store import Store
from autoft.errors import DataError
from autoft.network.sources import Source
from autoft.values import PROCEDURAL, Backbone, Preprocess, Status, TrialConfig, Value

MAX_IMAGES = 5000  # of each part that backbones are ranked on

Rows = NDArray[np.int64]
Labels = NDArray[np.int64]
Weights = NDArray[np.float32]
Folds = NDArray[np.int8]


@dataclass(frozen=True)
class Images:
    """Images of one part of the data, (N,) each: rows in the store, class indices and more.

    `weights` say how much each counts in training (not given: all the same), `folds` in which
    fold of a cross-validation it is held out (not given: all in fold 0).
    """

    rows: Rows
    labels: Labels
    weights: Weights = field(default_factory=lambda: np.ones(0, np.float32))
    folds: Folds = field(default_factory=lambda: np.zeros(0, np.int8))

    def __post_init__(self) -> None:
        """Fill what was not given."""
        if not len(self.weights):
            object.__setattr__(self, "weights", np.ones(len(self.rows), np.float32))
        if not len(self.folds):
            object.__setattr__(self, "folds", np.zeros(len(self.rows), np.int8))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def take(self, chosen: NDArray[Any]) -> Images:
        """Return the images at the positions `chosen`, or where it is true."""
        columns = (getattr(self, column.name) for column in fields(self))
        return Images(*(column[chosen] for column in columns))

    def joined(self, other: Images) -> Images:
        """Return these images and those of `other` after them."""
        names = [column.name for column in fields(self)]
        pairs = ((getattr(self, name), getattr(other, name)) for name in names)
        return Images(*map(np.concatenate, pairs))

    def loss_weights(self) -> Weights:
        """Return the weights scaled to a mean of 1, as losses take them.

        Raises:
            DataError: all are 0.
        """
        mean = self.weights.mean(dtype=np.float64)
        if mean == 0:
            raise DataError(
                f"The weights of all {len(self)} images to train on are 0; expected some above 0: "
                f"mend the column 'weight' of the manifest."
            )
        scaled: Weights = (self.weights / mean).astype(np.float32)
        return scaled


@dataclass(frozen=True)
class Precision:
    """How a network runs: in bf16 or fp32, channels-last or contiguous, compiled or not."""

    bf16: bool = False
    channels_last: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Setup:
    """What all trials of a run share; it goes to a worker with every task."""

    folder: Path
    store: Store
    classes: tuple[str, ...]
    train: Images
    validation: Images
    sources: Mapping[str, Source]
    image_size: int
    metric: str
    device: str
    threads: int

    def holding_out(self, fold: int) -> Setup:
        """Return the setup in which another `fold` is held out, and the rest is trained on."""
        if fold == 0:
            return self
        both = self.train.joined(self.validation)
        held = both.folds == fold
        return replace(self, train=both.take(~held), validation=both.take(held))

    def preprocess(self, backbone: Backbone) -> Preprocess:
        """Return how an image becomes the input of `backbone`."""
        return Preprocess(
            self.image_size, self.store.resize, backbone.mean, backbone.std, "bilinear"
        )


@dataclass(frozen=True)
class Costs:
    """What the stages of a backbone cost at one image size in its best format, as measured.

    Place k = 0 ... S belongs to the cut after the first k of S stages. Seconds per image:
    `prefix` is the forward pass of what lies before it, `tail` a step of training what follows,
    `score` the forward pass of what follows. `bytes` cross for each image in fp16; 0 where there
    is no such cut. `view` is what a processor takes for one augmented view of an image, `smaller`
    the share of its time that a step takes on the smaller images that a recipe may ask for, and
    `vectors` the share that it takes where norms and biases alone are trained.
    """

    prefix: tuple[float, ...]
    tail: tuple[float, ...]
    score: tuple[float, ...]
    bytes: tuple[int, ...]
    view: float = 0.0
    smaller: float = 1.0
    vectors: float = 1.0


Mode = Literal["rerun", "live", "ram", "disk", "device"]
"""Where what a frozen prefix gives is read from; "rerun": it is computed again in every step.

"live": it is computed in every step, once for several trials that take their steps together.
"""


@dataclass(frozen=True)
class Sharing:
    """How a trial comes by what its frozen prefix, the first `cut` stages, gives.

    `views` is how many augmented views of each image its epochs take in turns (0: new ones in
    every epoch, which cannot be kept). What is kept is fp16, or fp32 where it is to be `exact`.
    """

    mode: Mode = "rerun"
    cut: int = 0
    views: int = 0
    exact: bool = False


@dataclass(frozen=True)
class Ranked:
    """What was measured of a backbone: probe scores, speed, and what it is; or why it cannot be.

    Speeds are images per second: forward in its best format, forward in fp32 on the CPU, and
    trained whole; `timings` has the last of every format that was tried. `uncut` says why a
    frozen prefix cannot be split off (empty: it can), `map_seen` whether there is a map of several
    positions to pool, `resizable` whether it takes smaller images, too. It was measured on
    `images` of the data. `costs` are those of its stages (None: not measured).
    """

    label: str
    probe: float = 0.0
    balanced_probe: float = 0.0
    balanced_knn: float = 0.0
    precision: Precision = Precision()
    images_per_second: float = 0.0
    fp32_images_per_second: float = 0.0
    trained_per_second: float = 0.0
    timings: Mapping[str, float] = field(default_factory=dict)
    num_stages: int = 0
    parameters: int = 0
    batch_norms: int = 0
    map_seen: bool = True
    resizable: bool = True
    uncut: str = ""
    pretrained: bool = True
    source: str = ""
    license: str = ""
    costs: Costs | None = None
    images: int = 0
    seconds: float = 0.0
    error: str = ""
    exit_code: int = 0

    @property
    def weak(self) -> bool:
        """Tell whether it starts from weights that saw generated images alone."""
        return self.pretrained and self.source == PROCEDURAL


@dataclass(frozen=True)
class TrialJob:
    """One trial to be trained for `epochs` epochs, or as many of them as end in time.

    `deadline` is the wall-clock time (seconds since 1970) at which the trial ends, wherever it is.
    `costs` are those of its backbone, by which it chooses how its frozen prefix is shared unless
    `sharing` says so; `together` trials with the same frozen prefix take their steps together.
    `head_start` are answers of the recipe, from the best head so far, for the head that it begins
    with. Where another `fold` than the first is held out, it scores the trial `of` that number
    again.
    """

    number: int
    config: TrialConfig
    epochs: int
    deadline: float
    precision: Precision = Precision()
    costs: Costs | None = None
    sharing: Sharing | None = None
    together: int = 1
    head_start: Mapping[str, Value] = field(default_factory=dict)
    fold: int = 0
    of: int | None = None


@dataclass(frozen=True)
class Report:
    """The state of a trial after an epoch; the score is of the validation part.

    `micro_batch` is how many images fitted into the memory at once (0: whole batches). `note` is
    what the user is to be told ("": nothing), `epochs` how many there are going to be (0: all that
    were planned).
    """

    number: int
    epoch: int
    score: float
    loss: float
    train_loss: float
    seconds: float
    micro_batch: int = 0
    note: str = ""
    epochs: int = 0


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
