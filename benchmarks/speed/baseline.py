"""Baseline R: what everybody writes. The frozen part runs in every step, nothing is shared.

The images come from the same decoded store as autoft's, so that decoding once is not counted
twice; format of numbers and memory is the same on both sides.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoft.data.views import evaluation_batches, training_batches
from autoft.network.build import build
from autoft.training.job import Images, Precision, Setup
from autoft.training.precision import autocast, memory_format, place
from autoft.values import Backbone, Preprocess

CPU = torch.device("cpu")


def built(setup: Setup, model: str, precision: Precision) -> Backbone:
    """Return a backbone in the memory format of `precision`."""
    torch.manual_seed(0)
    backbone = build(setup.sources[model], pretrained=False, image_size=setup.image_size)
    backbone.module.to(memory_format=memory_format(precision))
    return backbone


def head_epoch(
    backbone: Backbone,
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    setup: Setup,
    precision: Precision,
    batch: int,
) -> None:
    """Train a head for an epoch; the frozen backbone runs in every step."""
    pre, labels = setup.preprocess(backbone), torch.from_numpy(setup.train.labels)
    backbone.module.eval()
    done = 0
    for images in evaluation_batches(setup.store, setup.train.rows, pre, batch):
        with torch.no_grad(), autocast(precision, CPU):
            features = backbone.module(place(images, precision, CPU))
        loss = functional.cross_entropy(head(features.float()), labels[done : done + len(images)])
        done += len(images)
        step(optimizer, loss)
    score(lambda images: head(backbone.module(images)), setup.validation, setup, pre, precision)


def tail_epoch(
    backbone: Backbone,
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    setup: Setup,
    precision: Precision,
    batch: int,
    epoch: int,
) -> None:
    """Train what of the backbone requires gradients, and the head, for an epoch.

    Frozen parameters have none, so that autograd stops at the first stage that is trained.
    """
    pre = setup.preprocess(backbone)
    part = setup.train
    backbone.module.eval()  # pre-trained statistics stay, as is autoft's default
    for each in training_batches(
        setup.store,
        part.rows,
        part.labels,
        pre,
        num_classes=len(setup.classes),
        weights=part.loss_weights(),
        augment="crop_flip",
        mix="none",
        batch_size=batch,
        seed=0,
        epoch=epoch,
    ):
        with autocast(precision, CPU):
            logits = head(backbone.module(place(each.images, precision, CPU)).float())
        step(optimizer, functional.cross_entropy(logits.float(), each.targets))
    score(lambda images: head(backbone.module(images)), setup.validation, setup, pre, precision)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take a step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimizer.step()


@torch.no_grad()
def score(
    model: object, part: Images, setup: Setup, pre: Preprocess, precision: Precision
) -> float:
    """Return the accuracy on the images held out."""
    right = 0
    done = 0
    for images in evaluation_batches(setup.store, part.rows, pre, 64):
        with autocast(precision, CPU):
            logits = model(place(images, precision, CPU))  # type: ignore[operator]
        labels = torch.from_numpy(part.labels[done : done + len(images)])
        done += len(images)
        right += int((logits.argmax(1) == labels).sum())
    return right / len(part)
