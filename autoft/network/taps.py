"""What the stages of a backbone give: forward hooks where each stage ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoft.network.stages import stage_of_modules, stage_of_parameters
from autoft.values import Backbone


@dataclass(eq=False)
class Taps:
    """What the hooks see in a forward pass: of each stage its pooled end, or the last map of all.

    The hooks stay on the backbone, so that a compiled or copied network has them, and sleep
    outside of `listening`: nothing of a pass is kept for longer than the pass.
    """

    wants_map: bool
    pooled: dict[int, Tensor] = field(default_factory=dict)  # (N, C) by stage
    map: Tensor | None = None  # of several positions: (N, C, H, W), (N, H, W, C) or (N, T, C)
    map_stage: int = -1
    channels_last: bool = False  # where a shape alone does not tell
    _awake: bool = False
    _stage: int = -1

    def see(self, stage: int | None, output: Any) -> None:
        """Take an output of `stage`; None: of what has no parameters, so of the latest stage.

        Each replaces the one before it, so that the last of a stage stays: its end.
        """
        if not self._awake:
            return
        tensor = first_tensor(output)
        self._stage = self._stage if stage is None else stage
        if tensor is None or self._stage < 0 or (stage is None and tensor.ndim < 3):
            return
        if self.wants_map:
            if positions(tensor) > 1:
                self.map, self.map_stage = tensor, self._stage
        else:
            pooled = average(tensor, self.channels_last)
            if pooled is not None:
                self.pooled[self._stage] = pooled.float()
        if tensor.ndim == 4 and tensor.shape[1] == tensor.shape[2] != tensor.shape[3]:
            self.channels_last = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """See one forward pass; what was seen is forgotten at the end of the block."""
        self._awake, self._stage = True, -1
        try:
            yield
        finally:
            self._awake, self.map = False, None
            self.pooled.clear()


@dataclass(eq=False)
class _Hook:
    """A hook that is copied along with its taps when a network is."""

    taps: Taps
    stage: int | None

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Pass on what `module` returned."""
        self.taps.see(self.stage, output)


def tap(backbone: Backbone, *, wants_map: bool) -> Taps:
    """Put hooks on the stages of `backbone`: for the last map, or for the end of every stage."""
    taps = Taps(wants_map)
    _put_on(backbone, taps)
    return taps


@contextmanager
def tapping(backbone: Backbone, *, wants_map: bool) -> Iterator[Taps]:
    """Put hooks on as `tap` does, and take them off at the end of the block."""
    taps = Taps(wants_map)
    handles = _put_on(backbone, taps)
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def _put_on(backbone: Backbone, taps: Taps) -> list[RemovableHandle]:
    watched = _watched(backbone)
    return [module.register_forward_hook(_Hook(taps, stage)) for stage, module in watched]


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


def positions(output: Tensor) -> int:
    """Return over how many positions (N, C, H, W), (N, H, W, C) or tokens (N, T, C) extend."""
    if output.ndim == 3:
        return output.shape[1]
    if output.ndim != 4:
        return 1
    by_shape = output.shape[1] == output.shape[2] != output.shape[3]
    return output.shape[2] * output.shape[1 if by_shape else 3]


def places(output: Tensor, channels_last: bool) -> tuple[int, ...] | None:
    """Return the dimensions that positions extend over; None: neither a map nor tokens.

    Images are square, so the two sides that are equal are H and W; where all three are,
    `channels_last` decides.
    """
    if output.ndim == 3:
        return (1,)
    if output.ndim != 4:
        return None
    first = output.shape[1] == output.shape[2]
    last = output.shape[2] == output.shape[3]
    by_shape = first and not last
    return (1, 2) if by_shape or (first and last and channels_last) else (2, 3)


def average(output: Tensor, channels_last: bool) -> Tensor | None:
    """Average (N, C, H, W), (N, H, W, C) or tokens (N, T, C) to (N, C); None: another shape."""
    if output.ndim == 2:
        return output
    where = places(output, channels_last)
    return None if where is None else output.mean(dim=where)
