"""One optimiser group per stage and kind of parameter, and the schedule over them."""

from __future__ import annotations

import math

import torch
from torch import nn

from autoft.network.assemble import Network
from autoft.network.stages import kind_of_parameters
from autoft.training.recipe import SGD_FACTOR, Recipe

WARMUP = 0.1  # share of the run
HEAD = -1  # the "stage" of the head


def make_optimizer(network: Network, recipe: Recipe) -> torch.optim.Optimizer:
    """Return an optimiser whose groups carry `stage` and `kind`; norms and biases do not decay.

    Every parameter is in it from the start. One that is frozen has no gradient, and torch passes
    over it: no step, no decay, no momentum.
    """
    groups = [
        _group(parameters, stage, kind, recipe)
        for (stage, kind), parameters in network.groups().items()
    ]
    kinds = kind_of_parameters(network.head)
    for kind in sorted(set(kinds.values())):
        members = [p for name, p in network.head.named_parameters() if kinds[name] == kind]
        groups.append(_group(members, HEAD, kind, recipe))
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr * SGD_FACTOR, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=recipe.lr)


def _group(
    parameters: list[nn.Parameter], stage: int, kind: str, recipe: Recipe
) -> dict[str, object]:
    decays = kind == "weights"
    decay = recipe.weight_decay / (SGD_FACTOR if recipe.optimizer == "sgd" else 1.0)
    return {
        "params": parameters,
        "stage": stage,
        "kind": kind,
        "weight_decay": decay if decays else 0.0,
    }


def set_learning_rates(
    optimizer: torch.optim.Optimizer, network: Network, recipe: Recipe, progress: float
) -> None:
    """Write the learning rate of every group: base rate x stage's rate x schedule."""
    factor = schedule(progress) * (SGD_FACTOR if recipe.optimizer == "sgd" else 1.0)
    for group in optimizer.param_groups:
        if group["stage"] == HEAD:
            group["lr"] = recipe.head_lr * factor
        else:
            rate = getattr(network.rates[group["stage"]], group["kind"])
            group["lr"] = recipe.lr * rate * factor


def schedule(progress: float) -> float:
    """Return the multiplier at `progress` in [0, 1): linear warm-up, then half a cosine to 0."""
    if progress < WARMUP:
        return 0.1 + 0.9 * progress / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))
