"""How well each backbone's frozen features already separate the classes, and what it costs.

One forward pass per backbone over the training and validation parts (at most `MAX_IMAGES` of them)
feeds k-NN and a logistic probe; plain k-NN is the best single predictor in the large comparison of
arXiv 2503.18528, and the probe is what a head-only trial will reach. Both are cross-validated
where the data has folds. What was measured is kept: the same search again begins at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # has no types
from torch import nn

from autoft.errors import PluginError
from autoft.network.assemble import has_statistics
from autoft.network.cut import why_uncut
from autoft.network.pooling import Pooling
from autoft.training import metrics
from autoft.training.classify import logistic, nearest
from autoft.training.features import Features, built, fingerprint, pooled_features
from autoft.training.job import Images, Precision, Ranked, Setup
from autoft.training.measures import failure
from autoft.training.precision import Timed, choose, fp32_per_second, memory_format
from autoft.training.remember import identity, key_of, place_of, recall, remember
from autoft.values import Backbone

MAX_IMAGES = 5000
LONG_TRIAL = 10  # epochs that a compiled network has to pay for itself
FLIP_MAY_COST = 0.03
KIND, MIRROR, SPEED, STRUCTURE, VERSION = "rank", "mirror", "speed", "structure", 6
# Seconds. Speeds that were measured in a busy moment must not plan all searches to come.
KNOWN_FOR = 24 * 3600.0

Progress = Callable[[str, int, int], None]
Division = tuple[NDArray[Any], NDArray[Any]]
Predicted = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def rank_backbone(setup: Setup, label: str, progress: Progress) -> Ranked:
    """Measure one backbone; one that cannot be built or run is returned with its reason.

    Raises:
        DataError: the images cannot be read.
    """
    try:
        return _measure(setup, label, progress)
    except Exception as error:  # noqa: BLE001 - a network may fail in any way on these images
        text, exit_code = failure(label, error)
        return Ranked(label, error=text, exit_code=exit_code)


def _measure(setup: Setup, label: str, progress: Progress) -> Ranked:
    began = time.monotonic()
    source = setup.sources[label]
    backbone = built(setup, label)
    device, module = torch.device(setup.device), backbone.module
    pre = setup.preprocess(backbone)
    network = fingerprint(module, setup)
    key = _key(setup, identity(network, source, backbone), pre)
    if (known := recall(KIND, key, KNOWN_FOR)) is not None:
        now = {"label": label, "seconds": time.monotonic() - began}
        return Ranked(**{**known, **now, "precision": Precision(**known["precision"])})
    cpu_per_second = fp32_per_second(module, setup.image_size)
    timed = _timed(module.to(device), setup, network)
    precision = timed.precision
    images, divisions = pool(setup)
    told = partial(progress, f"{label}: images")
    features = pooled_features(
        module, setup, images, pre, precision, network=network, progress=told
    )
    labels, probed, near = _predict(features, images, divisions)
    ranked = Ranked(
        label=label,
        probe=metrics.score(setup.metric, labels, probed),
        balanced_probe=metrics.score("balanced_accuracy", labels, probed),
        balanced_knn=metrics.score("balanced_accuracy", labels, near),
        precision=precision,
        images_per_second=timed.images_per_second,
        fp32_images_per_second=cpu_per_second,
        trained_per_second=timed.trained_per_second,
        timings=timed.timings,
        num_stages=len(backbone.stages),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        batch_norms=sum(map(has_statistics, module.modules())),
        **_structure(backbone, setup, network),
        pretrained=source.pretrained,
        source=backbone.source,
        license=backbone.license,
        seconds=time.monotonic() - began,
    )
    remember(KIND, key, asdict(ranked))
    return ranked


def _structure(backbone: Backbone, setup: Setup, network: str) -> dict[str, Any]:
    """Return what can be done with the backbone at this size, found once for all data sets."""
    key = place_of(setup, VERSION, network)
    if (known := recall(STRUCTURE, key)) is None:
        size = setup.image_size
        known = {"map_seen": _shows_map(backbone, size), "uncut": why_uncut(backbone, size)}
        remember(STRUCTURE, key, known)
    return known


def _shows_map(backbone: Backbone, image_size: int) -> bool:
    """Tell whether the backbone has a map that a head can be given pooled in another way."""
    try:
        Pooling(backbone, "avgmax", image_size)
    except PluginError:
        return False
    return True


def _timed(module: nn.Module, setup: Setup, network: str) -> Timed:
    """Return how fast `module` is in which format; known of another data set, it is not timed.

    `module` is on its device, and in that format afterwards.
    """
    device = torch.device(setup.device)
    trial = LONG_TRIAL * len(setup.train) if device.type == "cuda" else 0
    key = place_of(setup, VERSION, network, trial.bit_length())
    if (known := recall(SPEED, key, KNOWN_FOR)) is not None:
        timed = Timed(**{**known, "precision": Precision(**known["precision"])})
        module.to(memory_format=memory_format(timed.precision))
        return timed
    timed = choose(module, setup.image_size, device, images_in_a_trial=trial)
    remember(SPEED, key, asdict(timed))
    return timed


def pool(setup: Setup) -> tuple[Images, list[Division]]:
    """Return the images that backbones are ranked on, and which of them are learnt and asked.

    A hold-out divides them once; k folds divide the training and validation images k times, so
    that each is asked for once. At most `MAX_IMAGES` are drawn from each part.
    """
    train, held = subsample(setup.train), subsample(setup.validation)
    both = Images(
        *(
            np.concatenate([getattr(train, column.name), getattr(held, column.name)])
            for column in fields(Images)
        )
    )
    asked = np.arange(len(both)) >= len(train)
    others = np.unique(train.folds[train.folds >= 0])
    flags = [asked] + [
        both.folds == fold for fold in others if not asked[both.folds == fold].any()
    ]
    return both, [(np.flatnonzero(~each), np.flatnonzero(each)) for each in flags]


def _predict(features: Features, images: Images, divisions: Sequence[Division]) -> Predicted:
    """Return labels and what probe and k-NN predict, joined over the divisions."""
    found = []
    with threadpool_limits(1):  # thin matrices: threads would only wait for each other
        for known, asked in divisions:
            fit = features[known], images.labels[known], features[asked]
            weights = images.take(known).loss_weights()
            probed, near = logistic(*fit, weights), nearest(*fit)
            found.append((images.labels[asked], probed.argmax(axis=1), near.argmax(axis=1)))
    labels, probed, near = (np.concatenate(column) for column in zip(*found, strict=True))
    return labels, probed, near


def mirroring_keeps_labels(setup: Setup, ranked: Ranked) -> bool:
    """Tell whether a probe still knows the validation images when they are mirrored.

    A mirrored flower is a flower; a mirrored digit often is none.
    """
    backbone = built(setup, ranked.label)
    module, pre = backbone.module, setup.preprocess(backbone)
    network = fingerprint(module, setup)
    who = identity(network, setup.sources[ranked.label], backbone)
    key = _key(setup, who, pre, ranked.precision)
    if (known := recall(MIRROR, key)) is not None:
        return bool(known["keeps"])
    module.to(setup.device).to(memory_format=memory_format(ranked.precision))
    train, held_out = subsample(setup.train), subsample(setup.validation)

    def features(part: Images, *, flip: bool = False) -> Features:
        how = ranked.precision
        return pooled_features(module, setup, part, pre, how, flip=flip, network=network)

    both = np.concatenate([features(held_out), features(held_out, flip=True)])
    with threadpool_limits(1):
        found = logistic(features(train), train.labels, both, train.loss_weights()).argmax(axis=1)
    plain, mirrored = (found.reshape(2, -1) == held_out.labels).mean(axis=1)
    keeps = bool(mirrored >= plain - FLIP_MAY_COST)
    remember(MIRROR, key, {"keeps": keeps})
    return keeps


def subsample(part: Images, limit: int = MAX_IMAGES) -> Images:
    """Return at most `limit` images of `part`, drawn evenly over it."""
    if len(part) <= limit:
        return part
    return part.take(np.sort(np.random.default_rng(0).permutation(len(part))[:limit]))


def _key(setup: Setup, *more: object) -> str:
    parts = (setup.train, setup.validation)
    columns = [getattr(part, column.name) for part in parts for column in fields(Images)]
    return key_of(setup, VERSION, setup.metric, *columns, *more)
