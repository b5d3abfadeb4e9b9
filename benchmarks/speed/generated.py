"""Generated photographs, the trials that are timed on them, and the plain loop beside them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import finer
import numpy as np
import torch
from baseline import CPU, built
from PIL import Image

from autoft.data.cache.files import cache_root
from autoft.network.sources import Source
from autoft.network.stages import stage_of_parameters
from autoft.search.images import read_data, setup_of
from autoft.search.settings import Settings
from autoft.training import probe
from autoft.training.costs import crossing_bytes, measure_costs, view_seconds
from autoft.training.job import Costs, Precision, Reporter, Setup, Sharing, TrialJob
from autoft.training.trial import begin, prepare, train_trials
from autoft.training.underway import Trial
from autoft.values import Backbone, Part, TrialConfig

MODEL = "mobilenetv3_small_100"
MODELS = (MODEL, "resnet18", "vit_tiny_patch16_224", "efficientnet_b0")
# The same networks with a stage for each row of blocks, as a plugin may declare them.
FINER = {f"{name} by rows": name for name in (MODEL, "efficientnet_b0")}
CLASSES, IMAGES, PIXELS, BATCH = 10, 256, 224, 64
FORMAT = Precision(channels_last=True)
FOR_EVER = 1e5  # seconds: no deadline


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Have the block use a cache of its own."""
    before = os.environ.get("AUTOFT_CACHE")
    os.environ["AUTOFT_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ["AUTOFT_CACHE"]
        else:
            os.environ["AUTOFT_CACHE"] = before


def forget() -> None:
    """Drop what the cache keeps beside the decoded images."""
    for kind in ("features", "activations"):
        shutil.rmtree(cache_root() / kind, ignore_errors=True)


def new_run(setup: Setup) -> None:
    """Drop what trials have left: to write over it would take longer than to write it."""
    shutil.rmtree(setup.folder / "trials", ignore_errors=True)


def generated(folder: Path, threads: int) -> Setup:
    """Return a setup of IMAGES training images of CLASSES classes, and half as many held out."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        place = folder / "images" / f"class-{label}"
        place.mkdir(parents=True)
        for index in range(48):
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            coarse[..., label % 3] //= 2
            image = Image.fromarray(coarse).resize(
                (PIXELS + 32, PIXELS + 32), Image.Resampling.BICUBIC
            )
            image.save(place / f"{index}.png")
    settings = Settings(dataset=str(folder / "images"), image_size=PIXELS, metric="accuracy")
    data = read_data(settings, lambda *_, **__: None)
    sources = {name: Source(name, "timm", {"model": name}, pretrained=False) for name in MODELS}
    for name, model in FINER.items():
        sources[name] = Source(name, finer.NAME, {"model": model}, pretrained=False)
    setup = replace(setup_of(settings, folder / "run", data, sources, "cpu"), threads=threads)
    every = np.arange(len(setup.train))
    return replace(
        setup, train=setup.train.take(every[:IMAGES]), validation=setup.validation.take(every[:64])
    )


def head_jobs(count: int, model: str = MODEL) -> list[TrialJob]:
    """Return trials that train heads alone, each with a rate and a decay of its own."""
    shares = [index / max(count - 1, 1) for index in range(count)]
    recipes = [
        {
            "head_lr": min(1e-4 * 300**share, 0.03),  # rounding must not leave the range
            "weight_decay": 1e-4 * 3000 ** (share * 7 % 1),
        }
        for share in shares
    ]
    configs = [
        TrialConfig(Part(model), Part("head_only"), Part("linear"), recipe, seed=0)
        for recipe in recipes
    ]
    return [job_of(number, config, 1) for number, config in enumerate(configs)]


@contextmanager
def steps_of_heads(steps: int) -> Iterator[None]:
    """Have heads trained for `steps`, as the plain loop does, and not for as long as pays."""
    before = probe.EPOCHS, probe.MIN_STEPS
    probe.EPOCHS, probe.MIN_STEPS = 0, steps
    try:
        yield
    finally:
        probe.EPOCHS, probe.MIN_STEPS = before


def job_of(
    number: int, config: TrialConfig, epochs: int, sharing: Sharing | None = None
) -> TrialJob:
    """Return a trial without a deadline."""
    deadline = time.time() + FOR_EVER
    return TrialJob(number, config, epochs, deadline, FORMAT, sharing=sharing)


def train_all(
    setup: Setup, jobs: list[TrialJob], report: Reporter, keep: int | None = None
) -> None:
    """Train trials; what fails takes no time, so that nothing that failed may be measured."""
    for each in train_trials(setup, jobs, report, keep=keep):
        if each.error or (report is go_on and each.status != "done"):
            raise RuntimeError(f"Trial {each.number}: {each.status} {each.error}")


def go_on(_: object) -> bool:
    """Let a trial go on after an epoch."""
    return True


@contextmanager
def plain_loop(setup: Setup, model: str, frozen: int | None) -> Iterator[Any]:
    """Give a backbone of which `frozen` stages (None: all) are frozen, a head, an optimiser."""
    backbone = built(setup, model, FORMAT)
    stages = stage_of_parameters(backbone)
    for name, parameter in backbone.module.named_parameters():
        parameter.requires_grad_(frozen is not None and stages[name] >= frozen)
    head = torch.nn.Linear(backbone.num_features, len(setup.classes))
    live = [each for each in backbone.module.parameters() if each.requires_grad]
    yield backbone, head, torch.optim.AdamW([*live, *head.parameters()], lr=1e-4)


def prepared_trial(setup: Setup, job: TrialJob, depth: int) -> Trial:
    """Return a trial whose first `depth` stages are frozen, ready to train."""
    trial = prepare(setup, job, begin(setup, job), go_on, time.monotonic())
    stages = trial.network.num_stages
    rates = [0.0] * depth + [1.0] * (stages - depth)
    trial.network.set_rates(rates, norm_mode="affine")
    return trial


def costs_of(backbone: Backbone, setup: Setup) -> Costs:
    """Measure what the stages of a backbone take."""
    crossing, _ = crossing_bytes(backbone, setup.image_size)
    view = view_seconds(setup, backbone)
    return measure_costs(backbone, setup.image_size, CPU, FORMAT, crossing=crossing, view=view)
