"""What the last worker is told and what it answers: plain values, known without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoft.training.job import Images
from autoft.values import Estimate, TrialResult


@dataclass(frozen=True)
class FinishJob:
    """What is to be finished: which trial, which formats, and the test part, unlocked for this.

    Where the test part is empty, `known_test` is what an earlier command read of it.
    """

    winner: TrialResult
    baseline: TrialResult | None
    test: Images
    formats: tuple[str, ...]
    out: Path
    split_hash: str
    known_test: Estimate | None = None


@dataclass(frozen=True)
class Finished:
    """What was measured of the winner, and of the baseline beside it; logits are (N, C)."""

    validation: Estimate
    test: Estimate | None
    baseline_test: Estimate | None
    parity: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    validation_logits: NDArray[np.float32]
    test_logits: NDArray[np.float32] | None
