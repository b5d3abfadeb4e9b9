"""Run a network over images and score it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from autoft.data.views import evaluation_batches
from autoft.network.assemble import Network
from autoft.training import metrics
from autoft.training.job import Images, Precision, Setup
from autoft.training.memory import MicroBatches
from autoft.training.metrics import Logits
from autoft.training.precision import autocast, place
from autoft.values import Preprocess

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Scored:
    """Score (higher is better) and log-loss (nats) over `n` images."""

    score: float
    loss: float
    n: int

    @property
    def finite(self) -> bool:
        """Tell whether both are numbers that can be compared."""
        return bool(np.isfinite(self.score) and np.isfinite(self.loss))


@torch.inference_mode()
def logits_of(
    network: nn.Module, batches: Iterable[Tensor], device: torch.device, precision: Precision
) -> Logits:
    """Return logits (N, C) of normalised image batches (B, 3, S, S), in eval mode, fp32.

    A network behind a cut is given what crosses it, (B, W), in their place.

    A batch that does not fit into the memory is taken in parts.

    Raises:
        MachineError: the memory does not hold one image.
    """
    was_training = network.training
    network.eval()
    micro = MicroBatches()

    def forward(images: Tensor) -> Tensor:
        logits: Tensor = network(place(images, precision, device))
        return logits.float().cpu()

    with autocast(precision, device):
        parts = [micro.outputs(forward, images) for images in batches]
    network.train(was_training)
    result: Logits = torch.cat(parts).numpy()
    return result


def evaluate(
    network: Network, setup: Setup, part: Images, pre: Preprocess, precision: Precision
) -> Scored:
    """Score `network` on `part` by the metric of the run."""
    batches = evaluation_batches(setup.store, part.rows, pre, EVALUATION_BATCH)
    logits = logits_of(network, batches, torch.device(setup.device), precision)
    return score_logits(setup.metric, part.labels, logits)


def score_logits(metric: str, labels: np.ndarray, logits: Logits) -> Scored:
    """Score logits (N, C) against class indices (N,)."""
    value = metrics.score(metric, labels, metrics.predict(logits))
    return Scored(value, metrics.log_loss(labels, logits), len(labels))
