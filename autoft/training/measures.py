"""What is measured of a data set before the search: values that need no torch to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from autoft.errors import AutoftError, DataError, PluginError
from autoft.training.job import Labels, Rows

REPEATS: Final = 3
REPEATED_BELOW: Final = 1000  # images: smaller samples are divided several times
LEAST_PER_CLASS: Final = 5  # images of each class that a sample holds, where there are so many

Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """Images that are measured, (N,) each; those of one number of `groups` are kept together.

    `positions` are places in whatever the sample was drawn from.
    """

    rows: Rows
    labels: Labels
    groups: NDArray[np.int64]
    positions: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def take(self, chosen: NDArray[np.int64], origin: NDArray[np.int64]) -> Sample:
        """Return the images `chosen`, with `positions` as places in what `origin` indexes."""
        columns = self.rows[chosen], self.labels[chosen], self.groups[chosen]
        return Sample(*columns, origin[self.positions[chosen]])


@dataclass(frozen=True)
class OutOfFold:
    """How well a classifier knows images that it was not fitted on.

    `scores` holds the balanced accuracy in every fold of every repeat. `confidence` (N,) is the
    probability of each image's own label, `predicted` (N,) its likeliest class, both by fits
    that did not see the image.
    """

    scores: tuple[float, ...]
    confidence: Numbers
    predicted: Labels

    @property
    def mean(self) -> float:
        """Return the mean over the folds."""
        return float(np.mean(self.scores))

    def to_json(self) -> dict[str, Any]:
        """Return plain data; `from_json` is the inverse."""
        return {
            "scores": list(self.scores),
            "confidence": self.confidence.tolist(),
            "predicted": self.predicted.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OutOfFold:
        """Rebuild from what `to_json` returned."""
        confidence = np.array(data["confidence"], np.float32)
        return cls(tuple(data["scores"]), confidence, np.array(data["predicted"], np.int64))


@dataclass(frozen=True)
class Measured:
    """What was measured with one backbone (label "": what is measured without any).

    `probes` has `majority` and `pixels` without a backbone; with one it has `knn`, `final`,
    `stages` and, where its weights can be made random, `random`. `untapped` are stages whose
    output could not be seen, `source` is what its weights were trained on.
    """

    label: str
    probes: Mapping[str, OutOfFold] = field(default_factory=dict)
    untapped: tuple[int, ...] = ()
    seconds: float = 0.0
    pretrained: bool = True
    source: str = ""
    error: str = ""
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain data; `from_json` is the inverse."""
        probes = {name: probe.to_json() for name, probe in self.probes.items()}
        return {**vars(self), "probes": probes, "untapped": list(self.untapped)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        """Rebuild from what `to_json` returned."""
        probes = {name: OutOfFold.from_json(probe) for name, probe in data["probes"].items()}
        return cls(**{**data, "probes": probes, "untapped": tuple(data["untapped"])})


class UnfitWeights(DataError):
    """The data that cannot be used are the weights of one backbone, not the images."""


def failure(label: str, error: Exception) -> tuple[str, int]:
    """Return in words, and as an exit code, why a backbone cannot be measured.

    Raises:
        DataError: `error` itself, where the images are at fault and not the backbone.
    """
    if isinstance(error, DataError) and not isinstance(error, UnfitWeights):
        raise error
    if isinstance(error, AutoftError):
        return str(error), error.exit_code
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    text = f"The backbone '{label}' cannot run here: {type(error).__name__}: {reason[:300]}"
    return text, PluginError.exit_code


def draw(
    rows: Rows, labels: Labels, groups: NDArray[np.int64], limit: int, seed: int = 0
) -> Sample:
    """Return a sample of about `limit` images, each class by its share and with at least five.

    A smaller sample is part of every larger one. Classes whose images are all of one group are
    left out: they cannot be both learnt and asked for. Negative `groups` are none.
    """
    alone = groups.max(initial=0) + 1 + np.arange(len(groups))
    groups = np.where(groups < 0, alone, groups)
    keys = np.empty(len(labels))
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        keys[members] = (np.arange(len(members)) + 0.5) / len(members)
        keys[members[:LEAST_PER_CLASS]] = -1.0  # these first
    limit = max(limit, LEAST_PER_CLASS * len(np.unique(labels)))
    chosen = np.sort(np.argsort(keys, kind="stable")[:limit])
    pairs = np.unique(np.stack([labels[chosen], groups[chosen]], axis=1), axis=0)
    several = np.bincount(pairs[:, 0], minlength=1) >= 2
    chosen = chosen[several[labels[chosen]]]
    return Sample(rows[chosen], labels[chosen], groups[chosen], chosen)
