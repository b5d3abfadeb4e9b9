"""Measure heads that train together against the same heads one by one (goals P6 and P7).

    PYTHONPATH=benchmarks python benchmarks/speed/heads.py [--kind KIND] [--heads N]
        [--json FILE] [--page FILE]

`--heads` heads of one kind, each with its own rate, decay, smoothing and balance, train on the
same minibatches of 64 for `--steps` steps: one by one as `probe.fit_head` does it, and by
`train_pack`, in turns, `--rounds` times after one that warms up; one thread. A Markdown table of
seconds of processor time and by the clock, the median and, in brackets, the least and the most,
goes to stdout; "apart" is the largest difference of any weight between the two ways, and "size"
how many heads `train_pack` itself would take at once. `--json` writes all numbers, `--page` the
table into a page.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from goals import Line, where, write_results
from page import write_between
from timing import Times, middle, stopwatch
from torch import Tensor, nn

from autoft.heads import classifiers
from autoft.training import probe
from autoft.training.losses import make_loss
from autoft.training.packs import best_pack_size, train_pack
from autoft.training.recipe import BALANCES, Recipe, probing

SIZES = ((512, 10), (192, 10), (1024, 10), (512, 37), (512, 100))
KINDS = ("linear", "norm_linear", "cosine", "mlp")
IMAGES = 640
BATCH = 64
# Features and classes that P6 names, and how many times as fast packs must and should be.
GOALS = {(512, 10): (6, 11), (512, 37): (4, 7), (512, 100): (1.2, 3)}


@dataclass
class Compared:
    """One by one against together, for features of a width and a number of classes."""

    num_features: int
    num_classes: int
    alone: Times
    together: Times
    apart: float
    size: int
    choosing: float


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="linear")
    parser.add_argument("--balances", nargs="+", choices=BALANCES, default=["none"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", type=pair, default=SIZES, metavar="F,C")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    probe.EPOCHS, probe.MIN_STEPS = 0, asked.steps
    load = os.getloadavg()[0]
    found = [compare(asked, features, classes) for features, classes in asked.sizes]
    about = heading(asked, load)
    text = f"{about}\n\n{table(found)}\n"
    sys.stdout.write(text)
    if asked.page:
        write_between(asked.page, "heads", text)
    if asked.json:
        write_results(asked.json, about, goals(asked, found), results=list(map(asdict, found)))


def pair(text: str) -> tuple[int, int]:
    """Read "F,C"."""
    features, classes = text.split(",")
    return int(features), int(classes)


def compare(asked: argparse.Namespace, num_features: int, num_classes: int) -> Compared:
    """Train the same heads in both ways, in turns."""
    features, labels = blobs(num_features, num_classes)
    counts = torch.bincount(labels, minlength=num_classes)
    torch.manual_seed(0)
    make = getattr(classifiers, asked.kind)
    start = [make(num_features, num_classes) for _ in range(asked.heads)]
    recipes = spread(asked.heads, asked.balances)
    alone, together, apart = Times(), Times(), 0.0

    def one_by_one(heads: list[nn.Module]) -> None:
        for head, recipe in zip(heads, recipes, strict=True):
            torch.manual_seed(1)
            loss = make_loss(recipe.balance, recipe.smoothing, counts)
            probe.fit_head(head, features, labels, recipe, loss=loss, seed=0)

    def at_once(heads: list[nn.Module]) -> None:
        torch.manual_seed(1)
        train_pack(heads, features, labels, recipes, counts=counts, seed=0)

    began = time.perf_counter()
    device = features.device
    size = best_pack_size(num_features, num_classes, BATCH, device, asked.heads)
    choosing = time.perf_counter() - began
    for number in range(asked.rounds + 1):
        first = timed(one_by_one, start, alone if number else Times())
        second = timed(at_once, start, together if number else Times())
        apart = max(apart, *map(furthest, first, second))
    return Compared(num_features, num_classes, alone, together, apart, size, choosing)


def blobs(num_features: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return features (N, F) of overlapping classes, and labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, num_classes, (IMAGES,), generator=generator)
    centres = 0.2 * torch.randn(num_classes, num_features, generator=generator)
    noise = torch.randn(IMAGES, num_features, generator=generator)
    return noise + centres[labels], labels


def spread(count: int, balances: list[str]) -> list[Recipe]:
    """Return recipes all over the ranges, each another."""
    shares = [index / max(count - 1, 1) for index in range(count)]
    return [
        probing(
            head_lr=1e-4 * 300**share,
            weight_decay=1e-4 * 3000 ** (share * 7 % 1),
            smoothing=(0.0, 0.05, 0.1)[index % 3],
            balance=balances[index % len(balances)],
        )
        for index, share in enumerate(shares)
    ]


def timed(
    train: Callable[[list[nn.Module]], None], start: list[nn.Module], times: Times
) -> list[nn.Module]:
    """Train copies of the heads, note how long it takes, and return them."""
    heads = copy.deepcopy(start)
    with stopwatch(times, torch.device("cpu")):
        train(heads)
    return heads


def furthest(one: nn.Module, other: nn.Module) -> float:
    """Return the largest difference of any weight."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((mine - its).detach().abs().max()) for mine, its in pairs)


def goals(asked: argparse.Namespace, found: list[Compared]) -> list[Line]:
    """Return what P6 asks of `linear` heads of the sizes it names, and P7 of all weights."""
    lines = []
    for each in found:
        bounds = GOALS.get((each.num_features, each.num_classes))
        if asked.kind == "linear" and asked.heads == 32 and bounds:
            first, second = each.alone.processors, each.together.processors
            what = (
                f"32 heads in a pack, {each.num_features} features, {each.num_classes} classes: "
                f"{middle(second)} ms, one by one {middle(first)} ms"
            )
            lines.append(Line("P6", what, median(first) / median(second), *bounds))
    apart = max(each.apart for each in found)
    what = "the largest difference of a weight between the two ways"
    return [*lines, Line("P7", what, apart, 1e-4, 0, "", less=True)]


def heading(asked: argparse.Namespace, load: float) -> str:
    """Return what was measured where."""
    return (
        f"{asked.heads} heads `{asked.kind}` ({', '.join(asked.balances)}), {asked.steps} steps "
        f"of {BATCH}, one thread, {asked.rounds} rounds; {where(load)}"
    )


def table(found: list[Compared]) -> str:
    """Return a Markdown table, a row for each size."""
    lines = [
        "| F, C | alone, processor ms | together, processor ms | faster | by the clock | apart | "
        "size (s to choose) |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found:
        first, second = each.alone, each.together
        lines.append(
            f"| {each.num_features}, {each.num_classes} | {middle(first.processors)} | "
            f"{middle(second.processors)} | "
            f"{median(first.processors) / median(second.processors):.1f}x | "
            f"{median(first.clock) / median(second.clock):.1f}x | {each.apart:.1e} | "
            f"{each.size} ({each.choosing:.2f}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
