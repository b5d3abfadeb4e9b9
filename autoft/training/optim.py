"""One optimiser group per stage and kind of parameter, and the schedule over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from autoft.network.assemble import Network
from autoft.network.stages import kind_of_parameters
from autoft.training.recipe import SGD_FACTOR, TRANSFORMER_FACTOR, Recipe

CLIP = 1.0  # of the norm of all gradients together
WARMUP = 0.1  # share of the run
COOLDOWN = 0.2  # share of the run in which warm-up-stable-decay comes down
HEAD = -1  # the "stage" of the head and of what pools for it
DECAYING = ("weights", "adapters")


def make_optimizer(network: Network, recipe: Recipe) -> torch.optim.Optimizer:
    """Return an optimiser whose groups carry `stage` and `kind`; norms and biases do not decay.

    Every parameter is in it from the start. One that is frozen has no gradient, and torch passes
    over it: no step, no decay, no momentum. Where the backbone is drawn to its start (`l2sp`), it
    does not decay towards zero.
    """
    groups = [
        _group(parameters, stage, kind, recipe)
        for (stage, kind), parameters in network.groups().items()
    ]
    for part in (network.pool, network.head):
        kinds = kind_of_parameters(part)
        for kind in sorted(set(kinds.values())):
            members = [p for name, p in part.named_parameters() if kinds[name] == kind]
            groups.append(_group(members, HEAD, kind, recipe))
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr * SGD_FACTOR, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=can_fuse(network.parameters()))


def can_fuse(parameters: Iterable[Tensor]) -> bool:
    """Tell whether AdamW can step through `parameters` as they lie in memory, without gaps."""
    return all(
        each.is_floating_point() and each.stride() == torch.empty_like(each).stride()
        for each in parameters
    )


def take(optimizer: torch.optim.Optimizer) -> None:
    """Take a step with the gradients that there are.

    Fused steps, four times as fast on a CPU, go through memory and pair what lies at the same
    place: a gradient that lies another way than its parameter is laid out anew.
    """
    for parameter in (each for group in optimizer.param_groups for each in group["params"]):
        if parameter.grad is not None:
            parameter.grad = laid_as(parameter, parameter.grad)
    optimizer.step()


def restore(optimizer: torch.optim.Optimizer, slots: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Have `optimizer` go on with what it knew of each of its parameters, by their number."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    for parameter, known in optimizer.state.items():
        for name, value in known.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                known[name] = laid_as(parameter, value)


def laid_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Return `value` of the shape of `parameter`, which lies in memory as that does."""
    sizes = zip(parameter.shape, value.stride(), parameter.stride(), strict=True)
    if all(one == other for size, one, other in sizes if size > 1):
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _group(
    parameters: list[nn.Parameter], stage: int, kind: str, recipe: Recipe
) -> dict[str, object]:
    anchored = stage != HEAD and recipe.l2sp > 0
    decay = recipe.weight_decay / (SGD_FACTOR if recipe.optimizer == "sgd" else 1.0)
    return {
        "params": parameters,
        "stage": stage,
        "kind": kind,
        "weight_decay": decay if kind in DECAYING and not anchored else 0.0,
    }


def set_learning_rates(
    optimizer: torch.optim.Optimizer, network: Network, recipe: Recipe, progress: float
) -> None:
    """Write the learning rate of every group: base rate x stage's rate x schedule.

    The base rate of the backbone goes by the optimiser and by the family of the network.
    """
    factor = schedule(recipe.schedule, progress)
    factor *= SGD_FACTOR if recipe.optimizer == "sgd" else 1.0
    family = TRANSFORMER_FACTOR if network.transformer else 1.0
    for group in optimizer.param_groups:
        if group["stage"] == HEAD:
            group["lr"] = recipe.head_lr * factor
        else:
            rate = getattr(network.rates[group["stage"]], group["kind"])
            group["lr"] = recipe.lr * rate * factor * family


def schedule(name: str, progress: float) -> float:
    """Return the multiplier at `progress` in [0, 1): linear warm-up, then `name` down to 0.

    "cosine" is half a cosine; "wsd" stays at 1 and comes down in a line at the end, so that
    scores on the way are of the full rate, however long the run (Hu et al. 2024, arXiv
    2404.06395).
    """
    if progress < WARMUP:
        return 0.1 + 0.9 * progress / WARMUP
    if name == "wsd":
        return min(1.0, (1.0 - progress) / COOLDOWN)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))
