"""Which of the four regimes of fine-tuning the data is in: by size, and by likeness to the source.

Similarity S is how much of the error that is left by the best control (the largest class, pixels,
the same network with random weights) is removed by frozen pre-trained features: 0 = they help
nothing, 1 = they solve the task. Depth gain D is how much of what the last features leave is
removed by those of all stages together. The regime orders the first trials and excludes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from autoft.training.measures import Measured, OutOfFold
from autoft.values import PROCEDURAL

SIMILAR, DISSIMILAR = 0.50, 0.25
TOO_EASY = 0.05  # where the controls leave less error than this, S measures nothing
NEAR = 0.02  # probes so close do not tell which backbone is better
DEEP = 0.15  # from here on the last features leave much that earlier stages know
SOLVED = 0.01  # where the last features leave less error than this, D measures nothing
BOOTSTRAPS = 2000
CONTROLS: Final = ("majority", "pixels", "random")
PROBES: Final = ("knn", "final", "stages")

ADVICE = {
    "small-similar": "train the head, then touch the backbone lightly",
    "small-dissimilar": "freeze the first stages, retrain the rest",
    "large-similar": "fine-tune everything from the pre-trained weights",
    "large-dissimilar": "fine-tune everything at a high rate; training from scratch may tie",
    "ambiguous": "race full fine-tuning against freezing half",
    "weak-weights": "train everything at a high rate, and from scratch too: the weights saw "
    "generated images alone",
    "no-weights": "no pre-trained weights: train from scratch",
}
_LIKENESS: Final = ("dissimilar", "between", "similar")
_SIZES: Final = (("tiny, small", "small"), ("medium", ""), ("large", "large"))


@dataclass(frozen=True)
class Spread:
    """A balanced accuracy: its mean over the folds and their standard deviation."""

    mean: float
    sd: float


@dataclass(frozen=True)
class Likeness:
    """What one backbone knows of the data; `scores` has the controls and the probes by name.

    `similarity` S has a 90 % interval; both are None where the task is too easy to be measured.
    `source` is what its weights were trained on.
    """

    backbone: str
    scores: Mapping[str, Spread]
    similarity: float | None
    interval: tuple[float, float] | None
    depth_gain: float
    untapped: tuple[int, ...] = ()
    seconds: float = 0.0
    source: str = ""

    @property
    def weak(self) -> bool:
        """Tell whether its weights saw generated images alone."""
        return self.source == PROCEDURAL

    @property
    def best(self) -> float:
        """Return the better of k-NN and the probe on the final features."""
        return max(self.scores["knn"].mean, self.scores["final"].mean)

    @property
    def control(self) -> float:
        """Return the best of the controls."""
        return max(self.scores[name].mean for name in CONTROLS if name in self.scores)


@dataclass(frozen=True)
class Profile:
    """The regime of a data set, and every number that it was told from.

    `images`, `classes`, `median` (images of the median class) and `imbalance` (largest class by
    smallest) are of all images but the test part; `measured` of them were looked at. `backbones`
    are best first, by `merit`: the first speaks. `controls` are the scores that need no backbone,
    `failed` says why a backbone could not be measured.
    """

    name: str
    size: str
    likeness: str
    images: int
    classes: int
    median: float
    imbalance: float
    measured: int = 0
    backbones: tuple[Likeness, ...] = ()
    controls: Mapping[str, Spread] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def speaking(self) -> Likeness | None:
        """Return what the backbone that knows most knows; None: none could be measured."""
        return self.backbones[0] if self.backbones else None

    @property
    def similarity(self) -> float | None:
        """Return S, or None where it was not or cannot be measured."""
        return self.speaking.similarity if self.speaking else None

    @property
    def text(self) -> str:
        """Say in one sentence what the regime is and what usually works in it."""
        likeness = {"easy": "easy", "unknown": "otherwise unknown"}.get(self.likeness)
        likeness = likeness or {"ambiguous": "half similar"}.get(self.likeness, self.likeness)
        return f"{self.size} and {likeness} data{self._measure()}: {ADVICE[self.name]}"

    def _measure(self) -> str:
        speaking = self.speaking
        if speaking is None or speaking.similarity is None or speaking.interval is None:
            return ""
        low, high = speaking.interval
        return f" (similarity {speaking.similarity:.2f}, 90 % interval {low:.2f} to {high:.2f})"

    def to_json(self) -> dict[str, Any]:
        """Return plain data: what is above, and the numbers of the backbone that speaks."""
        speaking = self.speaking
        return {
            **asdict(self),
            "backbone": speaking.backbone if speaking else None,
            "similarity": self.similarity,
            "interval": speaking.interval if speaking else None,
            "depth_gain": speaking.depth_gain if speaking else None,
            "control": speaking.control if speaking else None,
            "text": self.text,
        }


def judge(
    labels: NDArray[np.int64],
    pixels: Measured | None,
    found: Sequence[Measured],
    *,
    weights: bool = False,
    weak: bool = False,
) -> Profile:
    """Return the regime of all images but the test part, with labels (N,).

    `pixels` is what was measured without a backbone, None where nothing was. `weights` says that
    there are pre-trained weights although none of those in `found` could be measured, `weak`
    that these saw generated images alone.
    """
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    usable = [each for each in found if each.pretrained and not each.error]
    known = [likeness_of(each, pixels) for each in usable if pixels and pixels.probes]
    known.sort(key=lambda each: -merit(each.best, weak=each.weak))
    size = size_class(labels)
    likeness = _likeness(known[0]) if known else "unknown"
    return Profile(
        name=_name(size, likeness, weights or bool(usable), known[0].weak if known else weak),
        size=size,
        likeness=likeness,
        images=len(labels),
        classes=len(counts),
        median=float(np.median(counts)),
        imbalance=float(counts.max() / counts.min()),
        measured=_measured([*usable, *([pixels] if pixels else [])]),
        backbones=tuple(known),
        controls=_spreads(pixels.probes) if pixels else {},
        failed={each.label: each.error for each in found if each.error},
        seconds=sum(each.seconds for each in (*found, *([pixels] if pixels else []))),
    )


def likeness_of(found: Measured, pixels: Measured) -> Likeness:
    """Return S with its interval, and D, of one backbone."""
    probes = {**pixels.probes, **found.probes}
    scores = {name: np.array(probe.scores) for name, probe in probes.items()}
    means = {name: float(each.mean()) for name, each in scores.items()}
    easy = 1 - max(means[name] for name in CONTROLS if name in means) < TOO_EASY
    left = 1 - means["final"]
    return Likeness(
        found.label,
        _spreads(probes),
        None if easy else _similarity(means),
        None if easy else _interval(scores),
        0.0 if left < SOLVED else (means["stages"] - means["final"]) / left,
        found.untapped,
        found.seconds,
        found.source,
    )


def merit(probe: float, *, weak: bool) -> float:
    """Return what backbones are ordered by: `probe`, less `NEAR` for weak weights.

    Weak weights lead only where their probe is clearly ahead: a near-tie must not decide that the
    whole search is made by what suits weights that saw no photograph.
    """
    return probe - NEAR if weak else probe


def size_class(labels: NDArray[np.int64]) -> str:
    """Return tiny, small, medium or large by the number of images and the median class."""
    counts = np.bincount(labels)
    total, median = len(labels), float(np.median(counts[counts > 0]))
    if total < 200 or median < 10:
        return "tiny"
    if total < 2000 or median < 50:
        return "small"
    return "large" if total >= 20000 and median >= 200 else "medium"


def regime_map(profile: Profile) -> list[list[str]]:
    """Return the four regimes as cells, the place of `profile` marked by brackets.

    Nothing is marked where weak weights spoke: what is advised then is none of these.
    """
    rows = [["", *_LIKENESS]]
    here = {"easy": "similar", "ambiguous": "between"}.get(profile.likeness, profile.likeness)
    weak = profile.name == "weak-weights"
    for words, size in _SIZES:
        cells = [words]
        for likeness in _LIKENESS:
            corner = size and likeness != "between"
            cell = f"{size}-{likeness}" if corner else "ambiguous"
            marked = profile.size in words.split(", ") and likeness == here and not weak
            cells.append(f"[{cell}]" if marked else f" {cell} ")
        rows.append(cells)
    return rows


def _similarity(means: Mapping[str, float]) -> float:
    control = max(means[name] for name in CONTROLS if name in means)
    return (max(means["final"], means["knn"]) - control) / (1 - control)


def _interval(scores: Mapping[str, NDArray[np.float64]]) -> tuple[float, float]:
    """Return the 90 % interval of S when the folds are drawn anew, the same for all scores.

    The folds share images, so that it is rather too narrow than too wide.
    """
    folds = len(scores["final"])
    drawn = np.random.default_rng(0).integers(0, folds, (BOOTSTRAPS, folds))
    means = {name: each[drawn].mean(axis=1) for name, each in scores.items()}
    control = np.max([means[name] for name in CONTROLS if name in means], axis=0)
    best = np.maximum(means["final"], means["knn"])
    values = (best - control) / np.maximum(1 - control, TOO_EASY / 10)
    low, high = np.quantile(values, [0.05, 0.95])
    return float(low), float(high)


def _likeness(known: Likeness) -> str:
    if known.similarity is None:
        return "easy"
    if known.similarity >= SIMILAR:
        return "similar"
    return "dissimilar" if known.similarity < DISSIMILAR else "ambiguous"


def _name(size: str, likeness: str, weights: bool, weak: bool) -> str:
    if not weights:
        return "no-weights"
    if weak:  # wherever the data is on the map: these weights say little of it
        return "weak-weights"
    if likeness == "easy":
        return "small-similar"
    broad = "small" if size in {"tiny", "small"} else size
    clear = likeness in ("similar", "dissimilar") and broad != "medium"
    return f"{broad}-{likeness}" if clear else "ambiguous"


def _spreads(probes: Mapping[str, OutOfFold]) -> dict[str, Spread]:
    return {
        name: Spread(float(np.mean(probe.scores)), float(np.std(probe.scores)))
        for name, probe in probes.items()
    }


def _measured(found: Sequence[Measured]) -> int:
    return max((len(p.predicted) for each in found for p in each.probes.values()), default=0)
