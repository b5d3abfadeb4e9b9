"""Measure what it is worth that a worker keeps the memory that it frees.

    python benchmarks/speed/heap.py [NAMES ...] [--rounds N] [--json FILE] [--page FILE]

For each backbone (a timm name; its weights are random), processes with and without
`keep_freed_memory` take turns, `rounds` of each: forward passes of 64 images, as an evaluation
takes them, and steps of training on 32. Numbers are milliseconds an image by the clock: the median
and, in brackets, the least and the most of the rounds, each the median of its runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import timm
import torch
from page import write_between
from precision import Times, middle, run, stopwatch, train

from autoft.training.heap import keep_freed_memory
from autoft.training.job import Precision
from autoft.training.precision import memory_format, noise_batch, place

CPU, FORMAT = torch.device("cpu"), Precision(channels_last=True)
NAMES = ("mobilenetv2_100", "resnet18")
SIZE = 224
FORWARD, TRAINED, RUNS = 64, 32, 4
KINDS = {"forward": f"forward, {FORWARD} images", "step": f"step of training, {TRAINED} images"}

Found = dict[str, dict[str, list[float]]]


def main() -> None:
    """Measure, print and write; as a process that is measured, print its numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(NAMES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--measure", choices=("kept", "as usual"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        sys.stdout.write(json.dumps(measured(asked.names[0], asked.measure)))
        return
    found = {name: _in_turns(name, asked.rounds) for name in asked.names}
    text = table(found, asked.rounds)
    sys.stderr.write(f"{text}\n")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if asked.page:
        write_between(asked.page, "heap", text)


def _in_turns(name: str, rounds: int) -> Found:
    found: Found = {kind: {"as usual": [], "kept": []} for kind in KINDS}
    for _ in range(rounds):
        for mode in ("as usual", "kept"):
            command = [sys.executable, __file__, name, "--measure", mode]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for kind, value in json.loads(done.stdout).items():
                found[kind][mode].append(value)
    return found


def measured(name: str, mode: str) -> dict[str, float]:
    """Return the milliseconds an image of each kind of work in this process."""
    if mode == "kept" and not keep_freed_memory():
        raise SystemExit("The C library here cannot be told to keep what is freed.")
    torch.set_num_threads(os.cpu_count() or 1)
    network = timm.create_model(name, num_classes=0).to(memory_format=memory_format(FORMAT))
    network.eval()  # batch norms as a search has them
    many, few = (noise_batch(count, SIZE, CPU) for count in (FORWARD, TRAINED))
    return {
        "forward": _median(partial(forward, network, place(many, FORMAT, CPU))) / FORWARD,
        "step": _median(partial(train, network, place(few, FORMAT, CPU), FORMAT)) / TRAINED,
    }


@torch.no_grad()
def forward(network: torch.nn.Module, images: torch.Tensor) -> None:
    """Pass images (N, 3, S, S) through the network."""
    run(network, images, FORMAT)


def _median(work: Callable[[], None]) -> float:
    """Return the milliseconds of the median of RUNS runs after one that warms up."""
    times = Times()
    for number in range(RUNS + 1):
        with stopwatch(times if number else Times(), CPU):
            work()
    return median(times.clock)


def table(found: dict[str, Found], rounds: int) -> str:
    """Return a Markdown table, a row a backbone and kind of work."""
    lines = [
        f"{rounds} processes of each kind in turns, {SIZE} px, {os.cpu_count()} threads.",
        "",
        "| Backbone | What | as usual, ms an image | memory kept, ms an image | faster |",
        "|---|---|---|---|---|",
    ]
    for name, kinds in found.items():
        for kind, modes in kinds.items():
            usual, kept = modes["as usual"], modes["kept"]
            lines.append(
                f"| {name} | {KINDS[kind]} | {middle(usual, 1)} | {middle(kept, 1)} | "
                f"**{median(usual) / median(kept):.2f}x** |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
