"""How well each backbone's frozen features already separate the classes, and what it costs.

One forward pass per backbone over the training and validation parts (at most `MAX_IMAGES` of them)
feeds k-NN and a logistic probe; plain k-NN is the best single predictor in the large comparison of
arXiv 2503.18528, and the probe is what a head-only trial will reach. Both are cross-validated
where the data has folds. What was measured is kept: the same search again begins at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # has no types

from autoft.errors import PluginError
from autoft.looking import evaluating, noise
from autoft.network.assemble import has_statistics
from autoft.network.pooling import Pooling
from autoft.training import metrics
from autoft.training.classify import logistic, nearest
from autoft.training.features import built, fingerprint, pooled_features
from autoft.training.job import MAX_IMAGES, Images, Precision, Ranked, Setup
from autoft.training.kept import Features
from autoft.training.measures import failure
from autoft.training.precision import memory_format
from autoft.training.recipe import SMALLER, smaller
from autoft.training.remember import identity, key_of, place_of, recall, remember
from autoft.training.speeds import speeds_of
from autoft.values import Backbone

FLIP_MAY_COST = 0.03
MIRRORED = 400  # images that are looked at mirrored: what makes another label shows in few
WORTH_SMALLER = 128  # pixels: smaller images are cheap, and lose what they show
UNTIMED = Precision(channels_last=True)
KIND, MIRROR, STRUCTURE, VERSION = "rank", "mirror", "structure", 9

Progress = Callable[[str, int, int], None]
Division = tuple[NDArray[Any], NDArray[Any]]
Predicted = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def rank_backbone(
    setup: Setup, label: str, progress: Progress, limit: int = MAX_IMAGES, *, timed: bool = True
) -> Ranked:
    """Measure one backbone on at most `limit` images of each part, and, if `timed`, its speed.

    One that cannot be built or run is returned with its reason.

    Raises:
        DataError: the images cannot be read.
    """
    try:
        return _measure(setup, label, progress, limit, timed=timed)
    except Exception as error:  # noqa: BLE001 - a network may fail in any way on these images
        text, exit_code = failure(label, error)
        return Ranked(label, error=text, exit_code=exit_code)


def _measure(setup: Setup, label: str, progress: Progress, limit: int, *, timed: bool) -> Ranked:
    began = time.monotonic()
    source = setup.sources[label]
    backbone = built(setup, label)
    module, pre = backbone.module, setup.preprocess(backbone)
    network = fingerprint(module, setup)
    measured = _timed(setup, backbone, label) if timed else _untimed(setup, backbone, label)
    # Features in another number format are others.
    who = identity(network, source, backbone)
    key = _key(setup, who, pre, measured["precision"].bf16, limit)
    if (known := recall(KIND, key)) is not None:
        return Ranked(**{**known, **measured, "seconds": time.monotonic() - began})
    images, divisions = pool(setup, limit)
    told = partial(progress, f"{label}: images")
    native = Pooling(backbone, "native", setup.image_size)
    features = pooled_features(
        native, setup, images, pre, measured["precision"], network=network, progress=told
    )
    labels, probed, near = _predict(features, images, divisions)
    found: dict[str, Any] = {
        "probe": metrics.score(setup.metric, labels, probed),
        "balanced_probe": metrics.score("balanced_accuracy", labels, probed),
        "balanced_knn": metrics.score("balanced_accuracy", labels, near),
        **_made_of(backbone),
        "images": len(images),
        **_structure(backbone, setup, network),
        "pretrained": source.pretrained,
        "source": backbone.source,
        "license": backbone.license,
    }
    remember(KIND, key, found)
    return Ranked(**{**found, **measured, "seconds": time.monotonic() - began})


def speed_of(setup: Setup, label: str) -> Ranked:
    """Measure how fast a backbone is, and nothing of what it knows."""
    try:
        backbone = built(setup, label)
        network = fingerprint(backbone.module, setup)
        return Ranked(
            **_timed(setup, backbone, label),
            **_made_of(backbone),
            **_structure(backbone, setup, network),
            pretrained=setup.sources[label].pretrained,
            source=backbone.source,
            license=backbone.license,
        )
    except Exception as error:  # noqa: BLE001 - a network may fail in any way on these images
        text, exit_code = failure(label, error)
        return Ranked(label, error=text, exit_code=exit_code)


def _timed(setup: Setup, backbone: Backbone, label: str) -> dict[str, Any]:
    """Return what is told of the speed of a backbone, which is in its best format then."""
    speeds = speeds_of(setup, backbone)
    return {
        "label": label,
        "precision": speeds.timed.precision,
        "images_per_second": speeds.timed.images_per_second,
        "fp32_images_per_second": speeds.fp32_images_per_second,
        "trained_per_second": speeds.timed.trained_per_second,
        "timings": speeds.timed.timings,
        "uncut": speeds.uncut,
        "costs": speeds.costs,
    }


def _untimed(setup: Setup, backbone: Backbone, label: str) -> dict[str, Any]:
    """Return what a backbone runs in that is not worth timing yet, and have it so."""
    backbone.module.to(setup.device).to(memory_format=memory_format(UNTIMED))
    return {"label": label, "precision": UNTIMED}


def _made_of(backbone: Backbone) -> dict[str, Any]:
    module = backbone.module
    return {
        "num_stages": len(backbone.stages),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "batch_norms": sum(map(has_statistics, module.modules())),
    }


def _structure(backbone: Backbone, setup: Setup, network: str) -> dict[str, Any]:
    """Return whether there is a map to be pooled in another way, and smaller images are taken."""
    key = place_of(setup, VERSION, network)
    if (known := recall(STRUCTURE, key)) is None:
        pooling: Pooling | None = None
        with suppress(PluginError):
            pooling = Pooling(backbone, "avgmax", setup.image_size)
        smaller_too = _takes_smaller(backbone, pooling, setup.image_size)
        known = {"map_seen": pooling is not None, "resizable": smaller_too}
        remember(STRUCTURE, key, known)
    return {name: bool(known[name]) for name in ("map_seen", "resizable")}


def _takes_smaller(backbone: Backbone, pooling: Pooling | None, image_size: int) -> bool:
    """Tell whether smaller images give as many features, pooled in any way that there is."""
    size = smaller(image_size, SMALLER)
    if image_size < WORTH_SMALLER or size == image_size:
        return False
    images = noise(backbone.module, 2, size)
    widths = {backbone.module: backbone.num_features}
    if pooling is not None:
        widths[pooling] = pooling.num_features
    try:
        with evaluating(backbone.module), torch.no_grad():
            return all(module(images).shape == (2, width) for module, width in widths.items())
    except Exception:  # noqa: BLE001 - a network may refuse another size in any way
        return False


def pool(setup: Setup, limit: int = MAX_IMAGES) -> tuple[Images, list[Division]]:
    """Return the images that backbones are ranked on, and which of them are learnt and asked.

    A hold-out divides them once, where few are looked at twice, either way; k folds divide the
    training and validation images k times, so that each is asked for once. At most `limit` are
    drawn from each part.
    """
    train, held = subsample(setup.train, limit), subsample(setup.validation, limit)
    both = train.joined(held)
    asked = np.arange(len(both)) >= len(train)
    others = np.unique(train.folds[train.folds >= 0])
    flags = [asked]
    if limit < MAX_IMAGES:  # a first look: so few tell more where each is asked for once
        flags.append(~asked)
    flags += [both.folds == fold for fold in others if not asked[both.folds == fold].any()]
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
    train, held_out = subsample(setup.train), subsample(setup.validation, MIRRORED)

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
    """Return at most `limit` images of `part`, drawn evenly over it; fewer are among more."""
    if len(part) <= limit:
        return part
    return part.take(np.sort(np.random.default_rng(0).permutation(len(part))[:limit]))


def _key(setup: Setup, *more: object) -> str:
    parts = (setup.train, setup.validation)
    columns = [getattr(part, column.name) for part in parts for column in fields(Images)]
    return key_of(setup, VERSION, setup.metric, *columns, *more)
