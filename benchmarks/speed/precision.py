"""Measure what the chosen number format is worth against plain fp32, for some backbones.

    python benchmarks/speed/precision.py [NAMES ...] [--size PX] [--batch N] [--rounds N]

Each backbone (a timm name; its weights are random) is timed by `choose` as in a search. Then plain
fp32 and the choice take turns: steps of training and forward passes, by the clock and by the
processor time, `rounds` times each after one that warms up. A Markdown table of the medians and,
in brackets, the least and the most goes to stdout and to docs/results/precision.md. It wants a
machine that does nothing else: the load that it found is told.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn

from autoft.training.job import Precision
from autoft.training.precision import Timed, autocast, choose, memory_format, name_of, place

NAMES = ("resnet18", "mobilenetv2_100", "convnext_atto")
PAGE = Path(__file__).resolve().parents[2] / "docs/results/precision.md"
PLAIN = Precision()
INTRODUCTION = """# The number format that is chosen, against plain fp32

Written by `python benchmarks/speed/precision.py`. "Step" is forward and backward of the whole
network, "forward" is evaluation. Numbers are milliseconds a batch: the median and, in brackets,
the least and the most; how many times faster is the ratio of the medians by the clock and, behind
the bar, by processor time.
"""


@dataclass
class Times:
    """Milliseconds of one kind of work in one format, a number a round."""

    clock: list[float] = field(default_factory=list)
    processors: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the median and, in brackets, the least and the most."""
        return middle(self.clock)


def middle(values: list[float], digits: int = 0) -> str:
    """Return the median and, in brackets, the least and the most."""
    told = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return "{} [{}, {}]".format(*told)


@dataclass
class Compared:
    """Plain fp32 and the choice, in turns."""

    name: str
    timed: Timed
    choosing: float
    step: tuple[Times, Times]
    forward: tuple[Times, Times]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    device, load = torch.device(asked.device), os.getloadavg()[0]
    found = [compare(name, asked.size, asked.batch, asked.rounds, device) for name in asked.names]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    text = (
        f"{INTRODUCTION}\n{device.type} ({where}), {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {asked.size} px, batches of {asked.batch}, {asked.rounds} rounds. "
        f"The load was {load:.1f} before and {os.getloadavg()[0]:.1f} after.\n\n{table(found)}\n"
    )
    sys.stdout.write(text)
    PAGE.write_text(text, encoding="utf-8")


def compare(name: str, size: int, batch: int, rounds: int, device: torch.device) -> Compared:
    """Choose a format as a search does, and time it against plain fp32 in turns."""
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=0).to(device)
    began = time.perf_counter()
    timed = choose(module, size, device)
    choosing = time.perf_counter() - began
    images = torch.randn(batch, 3, size, size)
    step, forward = (Times(), Times()), (Times(), Times())
    for number in range(rounds + 1):
        for side, precision in enumerate((PLAIN, timed.precision)):
            module.to(memory_format=memory_format(precision))
            ready = place(images, precision, device)
            warm = number == 0
            module.train()
            with stopwatch(Times() if warm else step[side], device):
                train(module, ready, precision)
            module.eval()
            with stopwatch(Times() if warm else forward[side], device), torch.no_grad():
                run(module, ready, precision)
    return Compared(name, timed, choosing, step, forward)


def run(module: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    """Return the features (N, F) of `images`."""
    with autocast(precision, images.device):
        output: Tensor = module(images)
    return output.float()


def train(module: nn.Module, images: Tensor, precision: Precision) -> None:
    """Take the gradient of something that all parameters have a part in."""
    module.zero_grad(set_to_none=True)
    run(module, images, precision).square().mean().backward()  # type: ignore[no-untyped-call]


@contextmanager
def stopwatch(times: Times, device: torch.device) -> Iterator[None]:
    """Note how long the block takes, to the end of what it started on a GPU."""
    wait(device)
    clock, processors = time.perf_counter(), time.process_time()
    yield
    wait(device)
    times.clock.append(1e3 * (time.perf_counter() - clock))
    times.processors.append(1e3 * (time.process_time() - processors))


def wait(device: torch.device) -> None:
    """Wait for a GPU to end what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def faster(sides: tuple[Times, Times]) -> str:
    """Return by how many times the second is faster, by the clock and by processor time."""
    plain, chosen = sides
    ratios = (
        median(plain.clock) / median(chosen.clock),
        median(plain.processors) / median(chosen.processors),
    )
    return " \\| ".join(f"{ratio:.2f}x" for ratio in ratios)


def table(found: list[Compared]) -> str:
    """Return a Markdown table, a row a backbone."""
    lines = [
        "| backbone | chosen | step, fp32 | step, chosen | faster | forward, fp32 | "
        "forward, chosen | faster | choosing |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        cells = [each.name, name_of(each.timed.precision)]
        for sides in (each.step, each.forward):
            cells += [str(sides[0]), str(sides[1]), faster(sides)]
        cells.append(f"{each.choosing:.1f} s")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
