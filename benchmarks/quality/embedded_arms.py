"""What is compared in `embedded.py`: the arms, how each is probed and how it is fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import torch
from embedded_table import IMAGENET, MINI, SCRATCH
from one_trial import Row, joined, open_data, per_class, some, train_and_score

from autoft.data.views import evaluation_batches
from autoft.network.pooling import Pooling
from autoft.network.sources import Source, in_folder
from autoft.training.classify import logistic
from autoft.training.evaluate import EVALUATION_BATCH
from autoft.training.features import built, pooled_features
from autoft.training.job import Images, Precision, Setup
from autoft.training.precision import memory_format, place
from autoft.training.profile import CALIBRATION, PLAIN, calibrate
from autoft.values import Backbone, Part, TrialConfig

SIZES = {"sign-digits": 96, "flowers": 96, "hymenoptera": 96, "sample:digits": 64}
UPRIGHT = ("sign-digits", "sample:digits")  # mirrored they may be something else
HELD = 500  # images to validate, at most
BATCH = 32

QUICK = ("sign-digits", "flowers", "hymenoptera")
QUICK_PIXELS = 64
QUICK_WATCHED, QUICK_JUDGED = 32, 1000  # images scored after every epoch, and in the end


@dataclass(frozen=True)
class Given:
    """What holds for all trials of a command.

    `data` and `weights` are folders; `mini` is a file of weights in place of the package's, or
    empty; `fixed` are answers for trials that start from it. `images` are those of a class.
    """

    data: Path
    weights: Path
    images: int
    epochs: int
    mini: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    bf16: bool = False

    @property
    def precision(self) -> Precision:
        """Return how networks are trained."""
        return Precision(bf16=self.bf16, channels_last=True)

    def source(self, role: str) -> Source:
        """Return the backbone of an arm."""
        if role == IMAGENET:
            return in_folder(self.weights)[0][IMAGENET]
        return Source(MINI, MINI, weights=self.mini)

    def place(self, dataset: str) -> str:
        """Return what the search is told of a data set."""
        return dataset if ":" in dataset else str(self.data / dataset)

    def config(self, role: str, dataset: str, rate: float, seed: int) -> TrialConfig:
        """Return how an arm is fine-tuned."""
        strategy = {
            # Weak weights want the rate of training from nothing, and in every stage.
            MINI: Part("full", {"bottom": 1.0}),
            SCRATCH: Part("scratch"),
            IMAGENET: Part("full"),
        }[role]
        augment = "crop" if dataset in UPRIGHT else "crop_flip"
        how: dict[str, Any] = {"lr": rate, "augment": augment, "batch_size": BATCH}
        if role == MINI:  # as the search begins with weights of generated images
            how |= {"norm_mode": "train"} | dict(self.fixed)
        label = IMAGENET if role == IMAGENET else MINI
        return TrialConfig(Part(label), strategy, Part("linear"), how, seed=seed)


def measure(given: Given, spec: Row, folder: Path) -> Row:
    """Return what one line of results says: of a probe, or of a fine-tune at `spec["rate"]`."""
    torch.set_num_threads(given.threads)
    role, dataset = spec["role"], spec["dataset"]
    source = given.source(role)
    place = given.place(dataset)
    setup, data = open_data(place, SIZES[dataset], {source.label: source}, folder, given.threads)
    train, _ = per_class(setup.train, given.images)
    setup = replace(setup, train=train, validation=some(setup.validation, HELD))
    test = data.part(data.split.test)
    told: Row = {"classes": len(setup.classes)}
    if spec["rate"] is None:
        return told | probe(setup, role, test)
    config = given.config(role, dataset, spec["rate"], spec["seed"])
    told |= {"precision": "bf16" if given.bf16 else "fp32"}
    return told | train_and_score(setup, config, given.epochs, given.precision, test)


def quick(given: Given, role: str, rate: float, seed: int) -> Row:
    """Return what weights reach on a few images of three data sets, without the test parts."""
    torch.set_num_threads(given.threads)
    began = process_time()
    found = {dataset: _judged(given, role, dataset, rate, seed) for dataset in QUICK}
    kinds = ("last", "stages", "tuned")
    means = {kind: round(mean(row[kind] for row in found.values()), 4) for kind in kinds}
    return {**found, "mean": means, "seconds": round(process_time() - began, 1)}


def _judged(given: Given, role: str, dataset: str, rate: float, seed: int) -> Row:
    source = given.source(role)
    place = given.place(dataset)
    with TemporaryDirectory() as folder:
        setup, _ = open_data(
            place, QUICK_PIXELS, {source.label: source}, Path(folder), given.threads
        )
        train, rest = per_class(setup.train, given.images)
        judged = some(joined(rest, setup.validation), QUICK_JUDGED)
        setup = replace(setup, train=train, validation=some(setup.validation, QUICK_WATCHED))
        config = given.config(role, dataset, rate, seed)
        tuned = train_and_score(setup, config, given.epochs, given.precision, judged)
        probed = probe(setup, role, judged)
    failed = {"error": tuned["error"]} if "error" in tuned else {}
    kept = {kind: round(probed[kind], 4) for kind in ("last", "stages")}
    # A fine-tune that broke down knows nothing.
    return kept | {"tuned": round(tuned.get("test", 0.0), 4), "n": probed["n"]} | failed


def probe(setup: Setup, role: str, asked: Images) -> Row:
    """Return the accuracy on `asked` of logistic probes on frozen features, and CPU seconds."""
    began = process_time()
    backbone = built(setup, IMAGENET if role == IMAGENET else MINI, pretrained=role != SCRATCH)
    pre = setup.preprocess(backbone)
    backbone.module.to(memory_format=memory_format(PLAIN))
    if role == SCRATCH:
        _calibrate(setup, backbone)
    pool = Pooling(backbone, "stages", setup.image_size)
    known, shown = (pooled_features(pool, setup, p, pre, PLAIN) for p in (setup.train, asked))
    found: Row = {}
    for name, width in (("last", backbone.num_features), ("stages", known.shape[1])):
        guessed = logistic(known[:, -width:], setup.train.labels, shown[:, -width:])
        found[name] = float((guessed.argmax(axis=1) == asked.labels).mean())
    counts = [len(setup.train), len(asked)]
    return found | {"n": counts, "seconds": round(process_time() - began, 1)}


def _calibrate(setup: Setup, backbone: Backbone) -> None:
    """Give the norms of a random network the statistics of images to train on."""
    pre, cpu = setup.preprocess(backbone), torch.device("cpu")
    rows = some(setup.train, CALIBRATION).rows
    batches = evaluation_batches(setup.store, rows, pre, EVALUATION_BATCH)
    calibrate(backbone.module, (place(images, PLAIN, cpu) for images in batches))
