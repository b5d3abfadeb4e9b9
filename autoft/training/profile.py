"""What frozen features of a backbone, and plain pixels, know: the numbers of the regime.

Cross-validated classifiers on the pooled features of every stage of a backbone, of the same
network with random weights, and of pixels. What the weights add to the two latter is likeness to
what they were trained on. Nothing here may look at the test part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from autoft.data.views import evaluation_batches
from autoft.errors import PluginError
from autoft.network.pooling import Pooling
from autoft.training.classify import Fit, cross_validate, logistic, majority, nearest
from autoft.training.evaluate import EVALUATION_BATCH
from autoft.training.features import (
    as_array,
    built,
    fingerprint,
    pooled_features,
    weights_hash,
)
from autoft.training.job import Images, Precision, Setup
from autoft.training.kept import Features
from autoft.training.measures import Measured, OutOfFold, Sample, failure
from autoft.training.precision import memory_format, place
from autoft.training.remember import identity, key_of, recall, remember
from autoft.values import Backbone, Preprocess

PLAIN = Precision(bf16=False, channels_last=True)  # the same numbers whatever else runs
CALIBRATION = 256  # images for the norms of a random network
PIXELS, CELLS, ANGLES = 16, 4, 8  # thumbnails; cells a side and directions of the gradients

KIND, VERSION = "profile", 5

Progress = Callable[[str, int, int], None]
Told = Callable[[int, int], None]


def measure_backbone(
    setup: Setup, label: str, sample: Sample, repeats: int, progress: Progress
) -> Measured:
    """Measure one backbone; one that cannot be built or run is returned with its reason.

    Raises:
        DataError: the images cannot be read.
    """
    try:
        return _measure(setup, label, sample, repeats, progress)
    except Exception as error:  # noqa: BLE001 - a network may fail in any way on these images
        text, exit_code = failure(label, error)
        return Measured(label, error=text, exit_code=exit_code)


def _measure(
    setup: Setup, label: str, sample: Sample, repeats: int, progress: Progress
) -> Measured:
    began = time.monotonic()
    source = setup.sources[label]
    trained = built(setup, label)
    network = fingerprint(trained.module, setup)
    asked = (VERSION, identity(network, source, trained), setup.preprocess(trained), repeats)
    key = key_of(setup, asked, *_columns(sample))
    if (known := recall(KIND, key)) is not None:
        return replace(Measured.from_json(known), label=label)
    told = partial(progress, label)
    final, stages, untapped = _staged(setup, trained, network, sample, told)
    probes = {
        "knn": _score(setup, nearest, final, sample, repeats),
        "final": _score(setup, logistic, final, sample, repeats),
        "stages": _score(setup, logistic, stages, sample, repeats),
    }
    # A plugin that has no random weights to give returns the trained ones: no control.
    blank = built(setup, label, pretrained=False)
    if weights_hash(blank.module) != weights_hash(trained.module):
        told = partial(progress, f"{label} with random weights")
        probes |= _random(setup, blank, sample, repeats, told)
    seconds = time.monotonic() - began
    found = Measured(label, probes, untapped, seconds, source.pretrained, trained.source)
    remember(KIND, key, found.to_json())
    return found


def _random(
    setup: Setup, blank: Backbone, sample: Sample, repeats: int, told: Told
) -> dict[str, OutOfFold]:
    """Measure the network with random weights; nothing where they explode, as without norms."""
    evenly = np.linspace(0, len(sample) - 1, min(CALIBRATION, len(sample))).astype(np.int64)
    pre, device = setup.preprocess(blank), torch.device(setup.device)
    batches = evaluation_batches(setup.store, sample.rows[evenly], pre, EVALUATION_BATCH)
    module = blank.module.to(device).to(memory_format=memory_format(PLAIN))
    calibrate(module, (place(images, PLAIN, device) for images in batches))
    try:
        network = fingerprint(module, setup)
        stages = _staged(setup, blank, network, sample, told)[1]
    except PluginError:
        return {}
    return {"random": _score(setup, logistic, stages, sample, repeats)}


def measure_pixels(setup: Setup, sample: Sample, repeats: int) -> Measured:
    """Measure what can be known without a backbone: the largest class, and pixels alone."""
    began = time.monotonic()
    key = key_of(setup, VERSION, repeats, *_columns(sample))
    if (known := recall(KIND, key)) is not None:
        return Measured.from_json(known)
    small = Preprocess(setup.image_size, setup.store.resize, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    batches = evaluation_batches(setup.store, sample.rows, small, EVALUATION_BATCH)
    plain: Features = np.concatenate([as_array(look(batch)) for batch in batches])
    probes = {
        "majority": _score(setup, majority, plain, sample, repeats),
        "pixels": _score(setup, logistic, plain, sample, repeats),
    }
    found = Measured("", probes, seconds=time.monotonic() - began)
    remember(KIND, key, found.to_json())
    return found


def _score(setup: Setup, fit: Fit, features: Features, sample: Sample, repeats: int) -> OutOfFold:
    return cross_validate(fit, features, sample, repeats, setup.threads)


def _columns(sample: Sample) -> tuple[NDArray[Any], ...]:
    return sample.rows, sample.labels, sample.groups


def look(images: Tensor) -> Tensor:
    """Return 16 x 16 colours and a histogram of gradients, (N, 896), of images (N, 3, S, S).

    The histogram counts, in each of 4 x 4 cells, the directions of edges by their strength (Dalal
    and Triggs 2005).
    """
    colours = functional.adaptive_avg_pool2d(images, PIXELS).flatten(1)
    grey = functional.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), 4 * PIXELS)
    across = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
    down = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    strength = (across.square() + down.square()).sqrt()
    angle = torch.atan2(down, across).remainder(torch.pi) * (ANGLES / torch.pi)
    which = functional.one_hot(angle.long().clamp(0, ANGLES - 1).squeeze(1), ANGLES)
    edges = strength * which.permute(0, 3, 1, 2)
    cells = functional.adaptive_avg_pool2d(edges, CELLS).flatten(1)
    return torch.cat([colours, cells / (cells.norm(dim=1, keepdim=True) + 1e-6)], dim=1)


def _staged(
    setup: Setup, backbone: Backbone, network: str, sample: Sample, told: Told
) -> tuple[Features, Features, tuple[int, ...]]:
    """Return final features (N, F), those of all stages (N, M), and stages that cannot be seen.

    They are what a head on the features of all stages is trained with.

    Raises:
        PluginError: the features are not finite.
    """
    backbone.module.to(setup.device).to(memory_format=memory_format(PLAIN))
    pool = Pooling(backbone, "stages", setup.image_size)
    images, pre = Images(sample.rows, sample.labels), setup.preprocess(backbone)
    stages = pooled_features(pool, setup, images, pre, PLAIN, network=network, progress=told)
    if not np.isfinite(stages).all():
        raise PluginError(
            "The features of this backbone are not finite on these images. Choose other weights."
        )
    return stages[:, -backbone.num_features :], stages, pool.unseen


@torch.inference_mode()
def calibrate(module: nn.Module, batches: Iterator[Tensor]) -> None:
    """Set the statistics of batch norms to those of `batches`; the rest stays in eval mode."""
    module.eval()
    kinds = nn.modules.batchnorm._BatchNorm
    all_norms = [each for each in module.modules() if isinstance(each, kinds)]
    norms = [norm for norm in all_norms if norm.running_mean is not None]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
        norm.train()
    for images in batches if norms else ():
        module(images)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
        norm.eval()
