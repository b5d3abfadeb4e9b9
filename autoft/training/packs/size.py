"""How many heads are best trained at once: as many as are fastest, and that may be one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from autoft.training import probe
from autoft.training.losses import make_loss
from autoft.training.packs.forms import Form
from autoft.training.packs.pack import Pack
from autoft.training.packs.stacks import Member
from autoft.training.recipe import Recipe, probing

SIZES = (8, 32, 128)
STEPS = 5  # to a turn
TURNS = 7  # the fastest counts: what else the machine does slows the others
MEMORY = 2**30  # bytes that the heads of a pack may take
COPIES = 4  # of each weight, fp32: itself, its gradient and two moments


def best_pack_size(
    num_features: int, num_classes: int, batch: int, device: torch.device, most: int = SIZES[-1]
) -> int:
    """Return how many linear heads of this size, up to `most`, take the least time each.

    It is measured once in a process for each size, device and number of threads, in a fraction of
    a second. A large pack of many classes no longer lies in the cache of a processor.
    """
    if most < 2:
        return 1
    # The next larger one stands for `most`: so few sizes are timed, whatever is asked for.
    larger = [size for size in SIZES if size >= most][:1]
    sizes = [1, *(size for size in SIZES if size < most), *larger]
    threads = torch.get_num_threads()

    def seconds(size: int) -> float:
        return _seconds(size, num_features, num_classes, batch, device, threads)

    return min(most, min(sizes, key=seconds))


def most_in_memory(forms: Sequence[Form]) -> int:
    """Return how many heads of the largest of `forms` have room in a pack, at least one."""
    largest = max(sum(each.numel() for each in form.parameters.values()) for form in forms)
    return max(1, MEMORY // (COPIES * 4 * largest))


@cache
def _seconds(
    size: int, num_features: int, num_classes: int, batch: int, device: torch.device, threads: int
) -> float:
    """Return the seconds of a step for each of `size` heads; `threads` is there to be told by."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, num_features, generator=generator).to(device)
    labels = (torch.arange(batch) % num_classes).to(device)
    with torch.random.fork_rng([]):  # nobody's draws may depend on what was timed before
        heads = [nn.Linear(num_features, num_classes).to(device) for _ in range(size)]
    run = _alone if size == 1 else _together
    step = run(heads, features, labels, replace(probing(), batch_size=batch))
    times = []
    for _ in range(TURNS + 1):  # the first one warms up
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return min(times[1:]) / (STEPS * size)


def _alone(
    heads: list[nn.Linear], features: torch.Tensor, labels: torch.Tensor, recipe: Recipe
) -> Callable[[], None]:
    loss = make_loss("none", 0.0, torch.ones(1))
    rounds = probe.steps_of(len(features), recipe.batch_size) // STEPS  # stopped after the first

    def steps() -> None:
        probe.fit_head(
            heads[0],
            features,
            labels,
            recipe,
            loss=loss,
            seed=0,
            rounds=rounds,
            after_round=lambda index, loss: False,
        )

    return steps


def _together(
    heads: list[nn.Linear], features: torch.Tensor, labels: torch.Tensor, recipe: Recipe
) -> Callable[[], None]:
    members = [
        Member(index, head, Form(head.weight, head.bias), recipe)
        for index, head in enumerate(heads)
    ]
    pack = Pack(members, torch.ones(members[0].form.weight.shape[0]))
    weights = torch.ones_like(features[:, 0])

    @torch.no_grad()
    def steps() -> None:
        for _ in range(STEPS):
            losses, slopes = pack.losses(features, labels, weights)
            if torch.isfinite(losses).all():  # as in training, where it waits for a GPU
                pack.step(losses, slopes, 0.5)

    return steps
