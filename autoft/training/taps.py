"""Pooled features of every stage of a backbone: forward hooks where each stage ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoft.network.stages import stage_of_modules, stage_of_parameters
from autoft.values import Backbone


@dataclass
class Taps:
    """What the hooks saw in the latest forward pass: one pooled output (N, C) a stage."""

    pooled: dict[int, Tensor] = field(default_factory=dict)
    channels_last: bool = False  # where a shape alone does not tell
    _stage: int = -1

    def see(self, stage: int | None, output: Any) -> None:
        """Take an output of `stage`; None: of what has no parameters, so of the latest stage.

        Each replaces the one before it, so that the last of a stage stays: its end.
        """
        tensor = first_tensor(output)
        self._stage = self._stage if stage is None else stage
        if tensor is None or self._stage < 0 or (stage is None and tensor.ndim < 3):
            return
        pooled = pool(tensor, self.channels_last)
        if pooled is not None:
            self.pooled[self._stage] = pooled.float()
        if tensor.ndim == 4 and tensor.shape[1] == tensor.shape[2] != tensor.shape[3]:
            self.channels_last = True

    def clear(self) -> None:
        """Forget the latest pass."""
        self.pooled.clear()
        self._stage = -1


@contextmanager
def tapped(backbone: Backbone) -> Iterator[Taps]:
    """Hold hooks on the stages of `backbone` while the block runs."""
    taps = Taps()
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, stage=stage: taps.see(stage, output))
        for stage, module in _watched(backbone)
    ]
    try:
        yield taps
    finally:
        for hook in hooks:
            hook.remove()


def _watched(backbone: Backbone) -> list[tuple[int | None, nn.Module]]:
    """Return the largest modules that lie in one stage, and what lies between stages.

    An activation or a pooling that belongs to no stage ends the stage that ran before it.
    """
    owned = stage_of_modules(backbone, stage_of_parameters(backbone))
    watched: list[tuple[int | None, nn.Module]] = []
    for name, module in backbone.module.named_modules():
        parent = name.rpartition(".")[0]
        inside = bool(name) and parent in owned
        if inside:
            continue
        if name in owned:
            watched.append((owned[name], module))
        elif name and not any(True for _ in module.parameters()):
            watched.append((None, module))
    return watched


def first_tensor(output: Any) -> Tensor | None:
    """Return a floating-point tensor (N, ...) of what a module returned, if there is one."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.ndim >= 2 else None
    if isinstance(output, list | tuple) and output:
        return first_tensor(output[0])
    return None


def pool(output: Tensor, channels_last: bool) -> Tensor | None:
    """Average (N, C, H, W), (N, H, W, C) or tokens (N, T, C) to (N, C); None: another shape.

    Images are square, so the two sides that are equal are H and W; where all three are,
    `channels_last` decides.
    """
    if output.ndim == 2:
        return output
    if output.ndim == 3:
        return output.mean(dim=1)
    if output.ndim != 4:
        return None
    first = output.shape[1] == output.shape[2]
    last = output.shape[2] == output.shape[3]
    by_shape = first and not last
    return output.mean(dim=(1, 2) if by_shape or (first and last and channels_last) else (2, 3))


@torch.inference_mode()
def calibrate(module: nn.Module, batches: Iterator[Tensor]) -> None:
    """Set the statistics of batch norms to those of `batches`; the rest stays in eval mode."""
    module.eval()
    kinds = nn.modules.batchnorm._BatchNorm
    all_norms = [each for each in module.modules() if isinstance(each, kinds)]
    norms = [norm for norm in all_norms if norm.running_mean is not None]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
        norm.train()
    for images in batches if norms else ():
        module(images)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
        norm.eval()
