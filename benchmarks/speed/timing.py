"""What is timed of a network, how long a block takes, and how a row of such numbers is told."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from autoft.training.job import Precision
from autoft.training.precision import autocast


@dataclass
class Times:
    """Milliseconds of one kind of work in one format, a number a run."""

    clock: list[float] = field(default_factory=list)
    processors: list[float] = field(default_factory=list)


def middle(values: Sequence[float], digits: int = 0) -> str:
    """Return the median and, in brackets, the least and the most."""
    told = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return "{} [{}, {}]".format(*told)


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


def run(module: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    """Return the features (N, F) of `images`."""
    with autocast(precision, images.device):
        output: Tensor = module(images)
    return output.float()


def train(module: nn.Module, images: Tensor, precision: Precision) -> None:
    """Take the gradient of something that all parameters have a part in."""
    module.zero_grad(set_to_none=True)
    loss = run(module, images, precision).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
