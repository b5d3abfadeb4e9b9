"""The number format and memory layout in which a backbone runs fastest on a device, by timing."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from autoft.training.job import Precision

TIMED_BATCH = 8
REPEATS = 3
BF16_MUST_WIN_BY = 1.1  # equal speed is not worth the lost digits


def memory_format(precision: Precision) -> torch.memory_format:
    """Return torch's name of the memory layout."""
    return torch.channels_last if precision.channels_last else torch.contiguous_format


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which forward passes run; parameters stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision.bf16)


def place(images: Tensor, precision: Precision, device: torch.device) -> Tensor:
    """Move images (N, 3, H, W) to the device in the layout of `precision`."""
    return images.to(device, memory_format=memory_format(precision), non_blocking=True)


def fp32_per_second(module: nn.Module, image_size: int) -> float:
    """Return the images per second of the forward pass in fp32 on the CPU, where runs finish."""
    module.eval()
    precision = Precision(channels_last=True)
    return _images_per_second(module.to("cpu"), image_size, torch.device("cpu"), precision)


def choose(module: nn.Module, image_size: int, device: torch.device) -> tuple[Precision, float]:
    """Time the forward pass of `module` in each format; return the fastest and its images/s."""
    module.eval()
    candidates = [Precision(False, False), Precision(False, True), Precision(True, True)]
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        candidates = candidates[:2]
    rates = [_images_per_second(module, image_size, device, each) for each in candidates]
    merits = [
        rate / (BF16_MUST_WIN_BY if candidate.bf16 else 1.0)
        for rate, candidate in zip(rates, candidates, strict=True)
    ]
    index = merits.index(max(merits))
    module.to(memory_format=memory_format(candidates[index]))
    return candidates[index], rates[index]


@torch.no_grad()  # inference_mode would leave converted weights that cannot be trained
def _images_per_second(
    module: nn.Module, image_size: int, device: torch.device, precision: Precision
) -> float:
    module.to(memory_format=memory_format(precision))
    images = place(torch.zeros(TIMED_BATCH, 3, image_size, image_size), precision, device)
    seconds = []
    with autocast(precision, device):
        module(images)
        for _ in range(REPEATS):
            start = _now(device)
            module(images)
            seconds.append(_now(device) - start)
    return TIMED_BATCH / min(seconds)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
