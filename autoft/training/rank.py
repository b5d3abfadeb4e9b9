"""How well each backbone's frozen features already separate the classes, and what it costs.

One forward pass per backbone over the training and validation parts (at most `MAX_IMAGES` of them)
feeds k-NN and a logistic probe; plain k-NN is the best single predictor in the large comparison of
arXiv 2503.18528, and the probe is what a head-only trial will reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autoft.data.views import evaluation_batches
from autoft.errors import AutoftError, PluginError
from autoft.network.build import build
from autoft.training import metrics
from autoft.training.features import Features, pooled_features
from autoft.training.job import Images, Precision, Ranked, Setup
from autoft.training.precision import autocast, choose, fp32_per_second, memory_format, place
from autoft.values import Preprocess

MAX_IMAGES = 5000
NEIGHBOURS = 20
TIMED_BATCH = 16
TIMED_STEPS = 4
PIXELS = 16
FLIP_MAY_COST = 0.03

Progress = Callable[[str, int, int], None]


def rank_backbone(setup: Setup, label: str, progress: Progress) -> Ranked:
    """Measure one backbone; one that cannot be built or run is returned with its reason."""
    try:
        return _measure(setup, label, progress)
    except AutoftError as error:
        return Ranked(label, error=str(error), exit_code=error.exit_code)
    except Exception as error:  # noqa: BLE001 - a network may fail in any way on these images
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        text = f"The backbone '{label}' cannot run here: {type(error).__name__}: {reason[:300]}"
        return Ranked(label, error=text, exit_code=PluginError.exit_code)


def _measure(setup: Setup, label: str, progress: Progress) -> Ranked:
    began = time.monotonic()
    source = setup.sources[label]
    torch.manual_seed(0)
    backbone = build(source, image_size=setup.image_size)
    device = torch.device(setup.device)
    module = backbone.module
    pre = setup.preprocess(backbone)
    cpu_per_second = fp32_per_second(module, setup.image_size)
    precision, per_second = choose(module.to(device), setup.image_size, device)

    def features(part: Images, what: str) -> Features:
        return pooled_features(
            module,
            setup,
            part,
            pre,
            precision,
            progress=lambda done, total: progress(f"{label}: {what}", done, total),
        )

    train, held_out = subsample(setup.train), subsample(setup.validation)
    known = features(train, "training images")
    asked = features(held_out, "validation images")
    probed = logistic_probe(known, train.labels)(asked)
    return Ranked(
        label=label,
        probe=metrics.score(setup.metric, held_out.labels, probed),
        balanced_probe=metrics.score("balanced_accuracy", held_out.labels, probed),
        balanced_knn=metrics.score(
            "balanced_accuracy", held_out.labels, nearest(known, train.labels, asked)
        ),
        precision=precision,
        images_per_second=per_second,
        fp32_images_per_second=cpu_per_second,
        trained_per_second=_trained_per_second(module, setup, pre, precision),
        num_stages=len(backbone.stages),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        pretrained=source.pretrained,
        source=backbone.source,
        license=backbone.license,
        seconds=time.monotonic() - began,
    )


def mirroring_keeps_labels(setup: Setup, ranked: Ranked) -> bool:
    """Tell whether a probe still knows the validation images when they are mirrored.

    A mirrored flower is a flower; a mirrored digit often is none.
    """
    torch.manual_seed(0)
    backbone = build(setup.sources[ranked.label], image_size=setup.image_size)
    module, pre = backbone.module.to(setup.device), setup.preprocess(backbone)
    module.to(memory_format=memory_format(ranked.precision))
    train, held_out = subsample(setup.train), subsample(setup.validation)

    def features(part: Images, *, flip: bool = False) -> Features:
        return pooled_features(module, setup, part, pre, ranked.precision, flip=flip)

    probe = logistic_probe(features(train), train.labels)
    plain = (probe(features(held_out)) == held_out.labels).mean()
    mirrored = (probe(features(held_out, flip=True)) == held_out.labels).mean()
    return bool(mirrored >= plain - FLIP_MAY_COST)


def subsample(part: Images, limit: int = MAX_IMAGES) -> Images:
    """Return at most `limit` images of `part`, drawn evenly over it."""
    if len(part) <= limit:
        return part
    chosen = np.random.default_rng(0).permutation(len(part))[:limit]
    return Images(part.rows[np.sort(chosen)], part.labels[np.sort(chosen)])


def logistic_probe(
    features: Features, labels: NDArray[np.int64]
) -> Callable[[Features], NDArray[np.int64]]:
    """Fit a logistic regression on standardised features; return its predictor."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    strength = 100.0 / len(features)  # the penalty per image stays the same whatever their number
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
    model.fit(features, labels)

    def predict(asked: Features) -> NDArray[np.int64]:
        return np.asarray(model.predict(asked), dtype=np.int64)

    return predict


def nearest(known: Features, labels: NDArray[np.int64], asked: Features) -> NDArray[np.int64]:
    """Return the majority class among the nearest neighbours by cosine similarity."""
    from sklearn.neighbors import KNeighborsClassifier

    smallest = int(np.bincount(labels).min())
    model = KNeighborsClassifier(min(NEIGHBOURS, max(smallest, 1)), metric="cosine")
    return np.asarray(model.fit(known, labels).predict(asked), dtype=np.int64)


def pixel_control(setup: Setup) -> float:
    """Return the balanced accuracy of a logistic probe on 16 x 16 pixels."""
    train, held_out = subsample(setup.train, 2000), subsample(setup.validation, 2000)
    small = Preprocess(setup.image_size, setup.store.resize)

    def thumbnails(part: Images) -> Features:
        batches = evaluation_batches(setup.store, part.rows, small, 64)
        shrunk = [nn.functional.adaptive_avg_pool2d(b, PIXELS).flatten(1).numpy() for b in batches]
        joined: Features = np.concatenate(shrunk)
        return joined

    predicted = logistic_probe(thumbnails(train), train.labels)(thumbnails(held_out))
    return metrics.score("balanced_accuracy", held_out.labels, predicted)


def _trained_per_second(
    module: nn.Module, setup: Setup, pre: Preprocess, precision: Precision
) -> float:
    """Time training steps of the whole network; the images per second of the quickest."""
    device = torch.device(setup.device)
    batch = next(evaluation_batches(setup.store, setup.train.rows[:TIMED_BATCH], pre, TIMED_BATCH))
    module.train()
    seconds = []
    for _ in range(TIMED_STEPS):  # the first warms up; of the others the least disturbed counts
        began = time.perf_counter()
        with autocast(precision, device):
            loss = module(place(batch, precision, device)).float().square().mean()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return len(batch) / min(seconds)
