"""Measure what sharing is worth against a plain loop (goals P1-P5, P8-P10 and P14-P16).

    PYTHONPATH=benchmarks python benchmarks/speed/sharing.py [--only PART ...] [--json FILE]

Baseline R is a plain loop: the frozen part runs in `no_grad` in every step, one trial after the
other, from the same decoded images. Both sides train the same configurations for the same epochs
on generated photographs with random weights (speed does not depend on them), take turns,
`--rounds` times after one that warms up, and are told in seconds of processor time: the median
and, in brackets, the least and the most. What autoft takes includes building the backbone and
making what it keeps; "cold" begins with an empty cache, "warm" with what an earlier search left.
Trials of R that differ in numbers alone are measured once or twice and multiplied, which the
table says. It wants a machine that does nothing else: the load that it found is told.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import finer
import torch
from generated import generated, own_cache
from goals import Line, read_lines, row, where, write_results
from sharing_heads import heads
from sharing_memory import memory
from sharing_planner import planner
from sharing_search import search
from sharing_tails import tails

from autoft.training.heap import settle
from autoft.training.job import Setup

PARTS: dict[str, Callable[[Setup, int], Iterator[Line]]] = {
    "heads": heads,
    "tails": tails,
    "search": search,
    "planner": planner,
    "memory": memory,
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    settle()  # both sides compute in a process like a worker of autoft
    load = os.getloadavg()[0]
    found = before(asked.json)
    with tempfile.TemporaryDirectory() as folder, own_cache(Path(folder)):
        finer.install(Path(folder, "plugins"))
        setup = generated(Path(folder), asked.threads)
        for place, name in enumerate(asked.only):
            for number, line in enumerate(PARTS[name](setup, asked.rounds)):
                if not number:
                    found = [each for each in found if each.part != name]
                found.append(replace(line, part=name))
                found.sort(key=lambda line: list(PARTS).index(line.part))
                sys.stderr.write(f"{row(line)}\n")
                tell(asked, asked.only[: place + 1], found, load)


def before(path: Path | None) -> list[Line]:
    """Return what an earlier call measured: with `--only` the other parts stay."""
    if path is None or not path.exists():
        return []
    return [line for line in read_lines(path) if line.part in PARTS]


def tell(asked: argparse.Namespace, parts: list[str], found: list[Line], load: float) -> None:
    """Write what was found so far, the last of it of `parts`."""
    if asked.json:
        about = (
            f"Measured last: {', '.join(parts)}. {asked.rounds} rounds in turns after one that "
            f"warms up (search at most 3, planner 2, memory 1), {asked.threads} thread(s); "
            f"{where(load)}"
        )
        write_results(asked.json, about, found)


if __name__ == "__main__":
    main()
