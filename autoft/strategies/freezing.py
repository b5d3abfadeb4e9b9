"""Freezing strategies: one learning-rate multiplier per stage, input first, 0 = frozen.

`progress` runs from 0 to 1 over the training of a trial, so a strategy may change on the way. A
strategy whose fixed option `pretrained` is False starts from random weights. `bottom` is one
thing everywhere: the rate of the first stage that is trained as a ratio of the last one's, so that
a value means the same on networks of 5 stages and of 24.
"""

from __future__ import annotations

from typing import Annotated

from autoft.space import Float
from autoft.values import Rates


def head_only(num_stages: int, progress: float) -> list[float]:
    """Freeze the whole backbone and train the head alone: the linear probe."""
    return [0.0] * num_stages


def freeze(
    num_stages: int,
    progress: float,
    *,
    depth: Annotated[float, Float(0.1, 0.95)] = 0.5,
    bottom: Annotated[float, Float(0.001, 1.0, log=True)] = 0.3,
) -> list[float]:
    """Freeze the first `depth` share of the stages, but never the last; train the others.

    The default of `bottom` is about what the upper half of `full` has at its own default.
    """
    frozen = min(round(depth * num_stages), num_stages - 1)
    return [0.0] * frozen + _geometric(num_stages - frozen, bottom)


def surgical(
    num_stages: int,
    progress: float,
    *,
    where: Annotated[float, Float(0.0, 1.0)] = 0.5,
    width: Annotated[float, Float(0.1, 0.6)] = 0.25,
) -> list[float]:
    """Train one run of neighbouring stages, and freeze those before and behind it.

    The run holds a `width` share of the stages, at least one. `where` slides it: at 0 it begins
    with the first stage, at 1 it ends with the last. Early runs suit images that look different,
    middle ones new kinds of objects, late ones other labels for what is known.

    Source: Lee et al. 2022, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts".
    """
    trained = max(1, round(width * num_stages))
    first = round(where * (num_stages - trained))
    return [1.0 if first <= i < first + trained else 0.0 for i in range(num_stages)]


def full(
    num_stages: int,
    progress: float,
    *,
    bottom: Annotated[float, Float(0.001, 1.0, log=True)] = 0.1,
) -> list[float]:
    """Train everything; the first stage learns at `bottom` times the rate of the last.

    The default is the 10x rule of fine-tuning.
    """
    return _geometric(num_stages, bottom)


def scratch(num_stages: int, progress: float, *, pretrained: bool = False) -> list[float]:
    """Train everything from random weights: the challenger for large, dissimilar data."""
    return [1.0] * num_stages


def gradual(
    num_stages: int,
    progress: float,
    *,
    until: Annotated[float, Float(0.2, 0.9)] = 0.6,
    bottom: Annotated[float, Float(0.001, 1.0, log=True)] = 0.1,
) -> list[float]:
    """Unfreeze from the last stage down, one by one, until all train at `until` of the run.

    Source: ULMFiT (Howard & Ruder 2018), there one group per epoch.
    """
    thawed = min(num_stages, 1 + int(progress / until * num_stages))
    rates = _geometric(num_stages, bottom)
    return [0.0] * (num_stages - thawed) + rates[num_stages - thawed :]


def probe_then_tune(
    num_stages: int,
    progress: float,
    *,
    probe: Annotated[float, Float(0.1, 0.6)] = 0.3,
    bottom: Annotated[float, Float(0.001, 1.0, log=True)] = 0.1,
) -> list[float]:
    """Train the head alone for the first `probe` share of the run, then everything (LP-FT).

    Source: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features".
    """
    return [0.0] * num_stages if progress < probe else _geometric(num_stages, bottom)


def norm_bias(num_stages: int, progress: float) -> list[Rates]:
    """Train only the scales and shifts of norms and the biases; every other weight stays.

    Source: Ben Zaken et al. 2022 (BitFit), and Cai et al. 2020 (TinyTL) for convolutions.
    """
    return [Rates(weights=0.0, norms=1.0, biases=1.0)] * num_stages


def _geometric(num_stages: int, bottom: float) -> list[float]:
    """Return rates that rise geometrically from `bottom` to 1."""
    steps = max(num_stages - 1, 1)
    return [bottom ** ((num_stages - 1 - i) / steps) for i in range(num_stages)]
