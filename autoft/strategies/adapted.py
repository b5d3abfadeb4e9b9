"""Strategies that train what an adapter adds to the backbone, in place of its own weights.

A fixed option `adapter` in the signature names the function that adds them, "package.module:name".
It is called with the backbone and with those choices of the strategy that it has parameters for.
What it adds is trained at the rate `adapters` and is merged into the weights in the end.
"""

from __future__ import annotations

from typing import Annotated

from autoft.space import Choice, Float
from autoft.values import Rates


def lora(
    num_stages: int,
    progress: float,
    *,
    rank: Annotated[int, Choice(4, 8, 16)] = 8,
    alpha: Annotated[float, Float(1.0, 64.0, log=True)] = 16.0,
    depth: Annotated[float, Float(0.0, 0.9)] = 0.0,
    norms: Annotated[bool, Choice(False, True)] = False,
    adapter: str = "autoft.network.adapters:low_rank",
) -> list[Rates]:
    """Keep all weights and train low-rank changes of them, which are merged in the end.

    The change of a weight is (alpha / rank) B A, where A has `rank` rows: `alpha` says how far one
    step of A and B moves the weight, whatever the rank. `depth` is the share of leading stages
    that stay frozen, never the last; `norms` trains the norms of the others as well.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    frozen = min(round(depth * num_stages), num_stages - 1)
    still = Rates(weights=0.0, norms=0.0, biases=0.0, adapters=0.0)
    live = Rates(weights=0.0, norms=float(norms), biases=0.0, adapters=1.0)
    return [still] * frozen + [live] * (num_stages - frozen)
