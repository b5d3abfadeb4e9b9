"""Train a head alone on cached features: what a fine-tune takes hours for, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoft.network.stages import kind_of_parameters
from autoft.training.losses import Loss
from autoft.training.optim import schedule
from autoft.training.recipe import Recipe

EPOCHS = 60
MIN_STEPS, MAX_STEPS = 600, 6000
NEWEST = 0.02  # share of the newest loss in the mean training loss

AfterRound = Callable[[int, float], bool]


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; the trial ends, the run goes on."""


def fit_head(  # noqa: PLR0913 (data, recipe and what is asked for by name)
    head: nn.Module,
    features: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    loss: Loss,
    seed: int,
    weights: Tensor | None = None,
    rounds: int = 1,
    after_round: AfterRound | None = None,
) -> None:
    """Train `head` on features (N, F) and labels (N,) in place, by `loss`.

    `weights` (N,), of mean 1, scale the loss of each image (None: all are 1). The run is cut into
    `rounds` of equal length; `after_round(index, train_loss)` may return False to stop.

    Raises:
        NonFiniteLoss: names the step and the learning rate.
    """
    weights = torch.ones(len(features)).to(features) if weights is None else weights
    batch = min(recipe.batch_size, len(features))
    total = steps_of(len(features), batch)
    optimizer = _optimizer(head, recipe)
    mean_loss = torch.zeros(())
    head.train()
    for step, drawn in enumerate(minibatches(len(features), batch, total, seed)):
        chosen = drawn.to(features.device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.head_lr * schedule(recipe.schedule, step / total)
        logits = head(features[chosen])
        targets = functional.one_hot(labels[chosen], logits.shape[1]).to(logits.dtype)
        value = loss(logits, targets, weights[chosen])
        if not torch.isfinite(value):
            raise NonFiniteLoss(failure(step, recipe))
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        mean_loss = value.detach() if step == 0 else mean_loss.lerp(value.detach(), NEWEST)
        done = round_ended(step, total, rounds)
        if done and after_round and not after_round(done, float(mean_loss)):
            return


def steps_of(count: int, batch: int) -> int:
    """Return in how many steps a head is trained on `count` images, `batch` at a time."""
    return min(max(EPOCHS * count // batch, MIN_STEPS), MAX_STEPS)


def minibatches(count: int, batch: int, total: int, seed: int) -> Iterator[Tensor]:
    """Yield `total` times which `batch` of `count` images come next, shuffled by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(total):
        if len(order) < batch:
            order = torch.randperm(count, generator=generator)
        yield order[:batch]
        order = order[batch:]


def round_ended(step: int, total: int, rounds: int) -> int:
    """Return which of `rounds` equal parts of `total` steps `step` ends, from 1 on; 0: none."""
    done = (step + 1) * rounds // total
    return done if done > step * rounds // total else 0


def failure(step: int, recipe: Recipe) -> str:
    """Return how it is said that the loss was no number at `step`."""
    return f"non_finite_loss at step {step} (head_lr={recipe.head_lr:g})"


def _optimizer(head: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    kinds = kind_of_parameters(head)
    named = dict(head.named_parameters())
    decaying = [named[name] for name, kind in kinds.items() if kind == "weights"]
    others = [named[name] for name, kind in kinds.items() if kind != "weights"]
    groups = [
        {"params": decaying, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.head_lr)
