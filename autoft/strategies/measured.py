"""Strategies that follow what is measured while a trial trains.

A fixed option `gradient_norms` in the signature asks for it: at the start of every epoch the
strategy is given one relative gradient norm per stage, ||gradient|| / ||parameters||, input first.
It stays arithmetic: the measuring is done elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def rgn(num_stages: int, progress: float, *, gradient_norms: Sequence[float] = ()) -> list[float]:
    """Train every stage at its relative gradient norm, as a share of the largest one (Auto-RGN).

    Before anything is measured, and where all norms are 0, every stage trains at the same rate. A
    stage without a number (NaN) rests until the next measurement; an infinite norm, which is that
    of a stage whose parameters are all 0, counts as the largest.

    Source: Lee et al. 2022, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts".
    """
    norms = [0.0 if math.isnan(norm) else norm for norm in gradient_norms]
    top = max((norm for norm in norms if norm < math.inf), default=0.0)
    if top == 0:
        return [1.0] * num_stages
    return [min(norm, top) / top for norm in norms]
