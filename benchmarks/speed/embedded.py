"""How fast `autoft_mini` is beside timm's `mobilenetv3_small_100`, and whether its exports agree.

    python benchmarks/speed/embedded.py --json FILE.json [--page docs/results/embedded.md]

Both networks are without classifier; speed does not depend on the weights, which are random. In
every round each network does each kind of work in each format once, so that whatever else the
machine does meets all alike; the first round warms up. "Forward" is evaluation, "step" is forward,
backward and AdamW. The numbers are images per second: the median and, in brackets, the least and
the most. It wants a machine that does nothing else: the load that it found is told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from timing import Times, middle, run, stopwatch, train
from torch import Tensor, nn

from autoft.backbones import mini
from autoft.export.onnx import metadata_of, to_onnx
from autoft.export.parity import Parity, check_parity
from autoft.export.torchscript import to_torchscript
from autoft.network.assemble import assemble
from autoft.training.job import Precision
from autoft.training.precision import memory_format, name_of, place
from autoft.values import Part, Preprocess

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what all benchmarks share

MINI, OTHER = "autoft_mini", "mobilenetv3_small_100"
FORMATS = (
    Precision(),
    Precision(channels_last=True),
    Precision(bf16=True, channels_last=True),
)
WORKS = ("forward", "step")
CPU = torch.device("cpu")
CLASSES, SURE = 10, 3.0  # of the head that is exported; how far its logits spread


@dataclass
class Work:
    """One network at one kind of work in one format, and what was measured of it."""

    network: str
    module: nn.Module
    precision: Precision
    kind: str
    times: Times = field(default_factory=Times)

    def per_second(self, batch: int) -> list[float]:
        """Return images per second, a number a round."""
        return [1e3 * batch / each for each in self.times.clock]


@dataclass(frozen=True)
class Measured:
    """Images per second, (rounds,) each, of both networks side by side."""

    size: int
    threads: int
    kind: str
    format: str
    speeds: dict[str, list[float]]
    processor_ms: dict[str, list[float]]

    @property
    def ratio(self) -> float:
        """Return by how many times the embedded network is faster."""
        return median(self.speeds[MINI]) / median(self.speeds[OTHER])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file to write the numbers to")
    parser.add_argument("--page", type=Path, help="page to write the table into")
    parser.add_argument("--sizes", default="128,96", help="pixels a side")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    known = facts()
    load, every = os.getloadavg()[0], torch.get_num_threads()
    found = [
        measured
        for size, threads in product(map(int, asked.sizes.split(",")), sorted({1, every}))
        for measured in compare(size, threads, asked.batch, asked.rounds)
    ]
    torch.set_num_threads(every)
    told = known | {
        "batch": asked.batch,
        "rounds": asked.rounds,
        "load": [round(each, 1) for each in (load, os.getloadavg()[0])],
        "speeds": [vars(each) for each in found],
    }
    asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    text = table(told, found)
    sys.stdout.write(text)
    if asked.page:
        from page import write_between

        write_between(asked.page, "speed", text)


def compare(size: int, threads: int, batch: int, rounds: int) -> Iterator[Measured]:
    """Time both networks in turns, in every format, at one size and number of threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    built = {MINI: mini.network(), OTHER: timm.create_model(OTHER, num_classes=0)}
    images = torch.randn(batch, 3, size, size)
    # The networks take turns within a format and a kind of work.
    works = [
        Work(name, deepcopy(built[name]).to(memory_format=memory_format(how)), how, kind)
        for kind, how, name in product(WORKS, FORMATS, built)
    ]
    optimizers = [torch.optim.AdamW(work.module.parameters(), lr=0.0) for work in works]
    for number in range(rounds + 1):
        for work, optimizer in zip(works, optimizers, strict=True):
            ready = place(images, work.precision, CPU)
            work.module.train(work.kind == "step")
            with stopwatch(work.times if number else Times(), CPU):
                _do(work, ready, optimizer)
    for one, other in zip(works[::2], works[1::2], strict=True):
        yield Measured(
            size=size,
            threads=threads,
            kind=one.kind,
            format=name_of(one.precision),
            speeds={each.network: each.per_second(batch) for each in (one, other)},
            processor_ms={each.network: each.times.processors for each in (one, other)},
        )


def _do(work: Work, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    if work.kind == "step":
        train(work.module, images, work.precision)
        optimizer.step()  # of rate 0: the same work, and the same network in the next round
    else:
        with torch.inference_mode():
            run(work.module, images, work.precision)


def facts() -> dict[str, Any]:
    """Return what does not depend on time: sizes, parity of the exports, and the machine."""
    networks = {MINI: mini.network(), OTHER: timm.create_model(OTHER, num_classes=0)}
    return {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "parameters": {
            name: sum(parameter.numel() for parameter in network.parameters())
            for name, network in networks.items()
        },
        "file_bytes": mini.FILE.stat().st_size,
        "parity": [vars(each) for each in parity()],
    }


def parity(size: int = 128) -> list[Parity]:
    """Export the embedded weights with a linear head, and compare on noise of several scales."""
    torch.manual_seed(0)
    network = assemble(mini.autoft_mini(), Part("linear"), CLASSES, "native", size).eval()
    images = [scale * torch.randn(64, 3, size, size) for scale in torch.logspace(-1, 0.5, 4)]
    with torch.no_grad():  # a head as sure as a trained one: a new one knows nothing yet
        for parameter in network.head.parameters():
            parameter.normal_()
        spread = torch.cat([network(batch) for batch in images]).std(dim=0).mean()
        for parameter in network.head.parameters():
            parameter.mul_(SURE / spread)
    pre = Preprocess(size, size)
    told = metadata_of([str(label) for label in range(CLASSES)], pre, {})
    with TemporaryDirectory() as folder:
        files = {
            "onnx": Path(folder) / "model.onnx",
            "torchscript": Path(folder) / "model.ts",
        }
        to_onnx(network, files["onnx"], pre, told)
        to_torchscript(network, files["torchscript"], pre, told)
        return check_parity(network, files, lambda: iter(images))


def table(told: dict[str, Any], found: list[Measured]) -> str:
    """Return Markdown: the speeds, a row a kind of work, and the facts."""
    sizes = told["parameters"]
    lines = [
        "Written by `benchmarks/speed/embedded.py`. A step is forward, backward and AdamW of the "
        "whole network, forward is evaluation. Images per second: the median and, in "
        f"brackets, the least and the most of {told['rounds']} rounds in turns; batches of "
        f"{told['batch']}, torch {told['torch']}, timm {told['timm']}, {told['machine']}. "
        f"The load was {told['load'][0]} before and {told['load'][1]} after.",
        "",
        f"| pixels | threads | work | format | {MINI} | {OTHER} | times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found:
        cells = [each.size, each.threads, each.kind, each.format]
        cells += [middle(each.speeds[name]) for name in (MINI, OTHER)]
        lines.append(f"| {' | '.join(map(str, cells))} | {each.ratio:.2f}x |")
    lines += ["", *_best(found), ""]
    lines.append(
        f"Parameters: {MINI} {sizes[MINI]:,}, {OTHER} {sizes[OTHER]:,} (without classifier). The "
        f"file of weights has {told['file_bytes'] / 1e6:.2f} MB."
    )
    lines += ["", "| export at 128 px | images | same label | largest difference of probability |"]
    lines.append("|---|---|---|---|")
    for proof in told["parity"]:
        lines.append(
            f"| {proof['format']} | {proof['n']} | {100 * proof['label_agreement']:.1f} % | "
            f"{proof['max_probability_difference']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def _best(found: list[Measured]) -> Iterator[str]:
    """Yield a line for each size, number of threads and work: both in their fastest format."""
    yield "Each in the format that is fastest for it:"
    yield ""
    for key in dict.fromkeys((each.size, each.threads, each.kind) for each in found):
        mine = [each for each in found if (each.size, each.threads, each.kind) == key]
        best = {name: max(median(each.speeds[name]) for each in mine) for name in (MINI, OTHER)}
        size, threads, kind = key
        yield (
            f"- {size} px, {threads} thread{'s' if threads > 1 else ''}, {kind}: "
            f"{best[MINI]:.0f} against {best[OTHER]:.0f}, "
            f"{best[MINI] / best[OTHER]:.2f}x"
        )


if __name__ == "__main__":
    main()
