"""Measure what the settings of the device that a search chooses are worth (goal P17).

    PYTHONPATH=benchmarks python benchmarks/speed/device.py [NAMES ...] [--rounds N]
        [--json FILE] [--page FILE]

Processes as PyTorch starts them and processes as workers of autoft are, which keep the memory that
they free, take turns, `--rounds` of each. For each backbone (a timm name; its weights are random)
a worker first chooses a number format as a search does; then both kinds of process time plain fp32
and that format in turns: steps of training on 32 images, batch norms as a search has them, and
forward passes of 64, as an evaluation takes them. Numbers are milliseconds an image by the clock:
the median and, in brackets, the least and the most of the rounds, each the median of its runs. P17
is a step of training in plain fp32 in a process as PyTorch starts it, against one in the chosen
format in a worker; the table also says what each of the two is worth by itself. A file of results
holds the backbones of its call alone. It wants a machine that does nothing else: the load that it
found is told.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from goals import Line, where, write_results
from page import write_between
from timing import Times, middle, run, stopwatch, train

from autoft.training.heap import keep_freed_memory, settle
from autoft.training.job import Precision
from autoft.training.precision import (
    choose,
    memory_format,
    name_of,
    noise_batch,
    place,
)

# What P17 asks for, and where it does not ask: never slower.
GOALS = {"resnet18": (1.3, 2.0), "mobilenetv3_small_100": (1.15, 1.35)}
NEVER_SLOWER = 0.97, 1.0
NAMES = (*GOALS, "mobilenetv2_100", "convnext_atto")
PLAIN = Precision()
RUNS = 3  # of each work, in a process
PROCESSES = ("as usual", "worker")
FORMATS = ("fp32", "chosen")
WORKS = {"step": 32, "forward": 64}  # and how many images each takes
ORDER = tuple(f"{form} {process}" for process in PROCESSES for form in FORMATS)

# Milliseconds an image, by work and by format and process; a number a round.
Found = dict[str, dict[str, list[float]]]


@dataclass
class Compared:
    """A backbone in both formats and both kinds of process."""

    name: str
    chosen: Precision
    choosing: float  # seconds
    kept: bool  # whether the C library can be told to keep what is freed
    found: Found

    def faster(self, work: str, than: str = ORDER[0]) -> float:
        """Return how many times as fast a worker is in the chosen format."""
        return median(self.found[work][than]) / median(self.found[work][ORDER[3]])


def main() -> None:
    """Measure, print and write; as a process that is measured, print its numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(NAMES))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--process", choices=PROCESSES, help=argparse.SUPPRESS)
    parser.add_argument("--format", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.process:
        sys.stdout.write(json.dumps(in_process(asked)))
        return
    load = os.getloadavg()[0]
    compared = [compare(name, asked) for name in asked.names]
    about = heading(asked, compared, load)
    text = f"{about}\n\n{table(compared)}\n"
    sys.stderr.write(text)
    if asked.json:
        measured = [asdict(each) for each in compared]
        write_results(asked.json, about, list(map(goal, compared)), measured=measured)
    if asked.page:
        write_between(asked.page, "device", text)


def compare(name: str, asked: argparse.Namespace) -> Compared:
    """Have a worker choose a format, and processes of both kinds time it, in turns."""
    first = _child(name, asked, "worker")
    found: Found = {work: {each: [] for each in ORDER} for work in WORKS}
    for number in range(asked.rounds):
        for process in in_turn(PROCESSES, number):
            told = _child(name, asked, process, "--format", json.dumps(first["chosen"]))
            for work in WORKS:
                for form in FORMATS:
                    found[work][f"{form} {process}"].append(told[work][form])
    return Compared(name, Precision(**first["chosen"]), first["seconds"], first["kept"], found)


def in_turn(sides: Sequence[str], number: int) -> Sequence[str]:
    """Return the sides, every other time from the last: whoever begins may be at an advantage."""
    return sides[::-1] if number % 2 else sides


def _child(name: str, asked: argparse.Namespace, process: str, *more: str) -> dict[str, Any]:
    command = [sys.executable, __file__, name, "--process", process, "--device", asked.device]
    command += ["--size", str(asked.size), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {process}: {done.stderr}")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def in_process(asked: argparse.Namespace) -> dict[str, Any]:
    """Choose a format, or time each work in fp32 and in `--format`."""
    kept = asked.process == "worker" and asked.device == "cpu" and keep_freed_memory()
    if asked.process == "worker":
        settle()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as a worker that has no others beside it
    torch.manual_seed(0)
    device = torch.device(asked.device)
    module = timm.create_model(asked.names[0], num_classes=0).to(device)
    if asked.format is None:
        began = time.perf_counter()
        precision = choose(module, asked.size, device).precision
        spent = time.perf_counter() - began
        return {"chosen": asdict(precision), "seconds": spent, "kept": kept}
    formats = dict(zip(FORMATS, (PLAIN, Precision(**json.loads(asked.format))), strict=True))
    times = {work: {form: Times() for form in FORMATS} for work in WORKS}
    many, few = (noise_batch(WORKS[work], asked.size, device) for work in ("forward", "step"))
    module.eval()
    for number in range(RUNS + 1):
        for form in in_turn(FORMATS, number):
            precision = formats[form]
            module.to(memory_format=memory_format(precision))
            kept = {work: by_form[form] if number else Times() for work, by_form in times.items()}
            images = place(few, precision, device)
            with stopwatch(kept["step"], device):
                train(module, images, precision)
            images = place(many, precision, device)
            with stopwatch(kept["forward"], device), torch.no_grad():
                run(module, images, precision)
    return {
        work: {form: median(each.clock) / WORKS[work] for form, each in by_form.items()}
        for work, by_form in times.items()
    }


def goal(compared: Compared) -> Line:
    """Return what P17 asks of a backbone, and what was measured."""
    must, stretch = GOALS.get(compared.name, NEVER_SLOWER)
    fp32, chosen = (middle(compared.found["step"][ORDER[index]], 1) for index in (0, 3))
    what = (
        f"a step of training, {compared.name}: {name_of(compared.chosen)} in a worker {chosen} ms "
        f"an image, fp32 in a process as PyTorch starts it {fp32} ms (the format alone "
        f"{compared.faster('step', ORDER[2]):.2f}x)"
    )
    return Line("P17", what, compared.faster("step"), must, stretch)


def heading(asked: argparse.Namespace, compared: Sequence[Compared], load: float) -> str:
    """Return what was measured where."""
    kept = all(each.kept for each in compared)
    device = torch.device(asked.device)
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return (
        f"{asked.device}{gpu}, {asked.size} px; {asked.rounds} processes of each kind in turns; "
        f"memory that workers free is {'' if kept else 'not '}kept. {where(load)}"
    )


def table(compared: list[Compared]) -> str:
    """Return a Markdown table, a row for each backbone and kind of work."""
    lines = [
        "| Backbone | What | fp32 | chosen format | fp32, worker | both | the format | "
        "the memory | together | chosen |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in compared:
        for work in WORKS:
            sides = " | ".join(middle(each.found[work][side], 1) for side in ORDER)
            ratios = [f"{each.faster(work, ORDER[index]):.2f}x" for index in (2, 1, 0)]
            lines.append(
                f"| {each.name} | {work} | {sides} | {ratios[0]} | {ratios[1]} | "
                f"**{ratios[2]}** | {name_of(each.chosen)} in {each.choosing:.1f} s |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
