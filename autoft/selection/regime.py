"""Which of the four regimes of fine-tuning the data is in: by size, and by likeness to the source.

Similarity S is how much of the error that pixels alone leave is removed by frozen pre-trained
features: 0 = they help nothing, 1 = they solve the task. The regime orders the first trials and
excludes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoft.training.job import Ranked

SIMILAR, DISSIMILAR = 0.50, 0.25
TOO_EASY = 0.05  # where the controls leave less error than this, S measures nothing


@dataclass(frozen=True)
class Regime:
    """The regime by name, its size and similarity classes, and S itself (None: no weights)."""

    name: str
    size: str
    likeness: str
    similarity: float | None

    @property
    def text(self) -> str:
        """Say in plain words what the regime is and what usually works in it."""
        measured = "" if self.similarity is None else f" (similarity {self.similarity:.2f})"
        return f"{self.size} and {self.likeness} data{measured}: {ADVICE[self.name]}"


ADVICE = {
    "small-similar": "train the head, then touch the backbone lightly",
    "small-dissimilar": "freeze the first stages, retrain the rest",
    "large-similar": "fine-tune everything from the pre-trained weights",
    "large-dissimilar": "fine-tune everything at a high rate; training from scratch may tie",
    "ambiguous": "race full fine-tuning against freezing half",
    "no-weights": "no pre-trained weights: train from scratch",
}


def measure(labels: NDArray[np.int64], ranked: Sequence[Ranked], pixel_control: float) -> Regime:
    """Return the regime of training labels (N,) under the backbones that were ranked.

    `pixel_control` is the balanced accuracy of a probe on raw pixels.
    """
    size = size_class(labels)
    usable = [each for each in ranked if each.pretrained and not each.error]
    if not usable:
        return Regime("no-weights", size, "unrelated", None)
    control = max(1.0 / len(np.unique(labels)), pixel_control)
    best = max(max(each.balanced_probe, each.balanced_knn) for each in usable)
    similarity = 1.0 if 1 - control < TOO_EASY else (best - control) / (1 - control)
    likeness = "similar" if similarity >= SIMILAR else "ambiguous"
    likeness = "dissimilar" if similarity < DISSIMILAR else likeness
    broad = "small" if size in {"tiny", "small"} else size
    clear = likeness != "ambiguous" and broad != "medium"
    return Regime(f"{broad}-{likeness}" if clear else "ambiguous", size, likeness, similarity)


def size_class(labels: NDArray[np.int64]) -> str:
    """Return tiny, small, medium or large by the number of images and the median class."""
    total, median = len(labels), float(np.median(np.bincount(labels)))
    if total < 200 or median < 10:
        return "tiny"
    if total < 2000 or median < 50:
        return "small"
    return "large" if total >= 20000 and median >= 200 else "medium"
