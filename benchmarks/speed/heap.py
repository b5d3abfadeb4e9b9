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
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from page import write_between
from precision import middle

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
    import timm
    import torch

    from autoft.training.heap import keep_freed_memory

    if mode == "kept" and not keep_freed_memory():
        raise SystemExit("The C library here cannot be told to keep what is freed.")
    torch.set_num_threads(os.cpu_count() or 1)
    network = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last)
    network.eval()  # batch norms as a search has them
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)

    def images(count: int) -> torch.Tensor:
        noise = torch.randn(count, 3, SIZE, SIZE)
        return noise.contiguous(memory_format=torch.channels_last)

    many, few = images(FORWARD), images(TRAINED)

    def forward() -> None:
        with torch.inference_mode():
            network(many)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        network(few).square().mean().backward()
        optimizer.step()

    return {
        "forward": 1000 * _seconds(forward) / FORWARD,
        "step": 1000 * _seconds(step) / TRAINED,
    }


def _seconds(run: Callable[[], None]) -> float:
    """Return the median of RUNS runs after one that warms up."""
    took = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return median(took[1:])


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
