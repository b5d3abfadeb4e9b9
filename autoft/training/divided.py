"""A network in two at a cut: the frozen first stages, and what is trained behind them.

Read `Divided` first. What it makes of images crosses the cut as rows of numbers; a network behind
it maps these to the same logits as the whole network maps the images.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from autoft.errors import PluginError
from autoft.looking import evaluating, noise
from autoft.network.assemble import Network
from autoft.network.cut import CannotCut, cut, prefix_of
from autoft.network.folding import folded
from autoft.training.memory import MicroBatches
from autoft.training.precision import autocast, place
from autoft.training.underway import Trial

AGREE, AGREE_BF16 = 1e-3, 5e-2  # of the largest feature: so far may tail and whole differ


class CannotShare(Exception):
    """Says why what the prefix of a trial gives cannot be shared."""


@dataclass(frozen=True)
class Crossing:
    """A tensor that crosses the cut: its shape for one image, and its number format.

    With `last` channels are stored last, as they lie in memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    last: bool

    @property
    def width(self) -> int:
        """Return how many numbers it has for an image."""
        return int(np.prod(self.shape))

    def flat(self, tensor: Tensor) -> Tensor:
        """Return fp32 (N, width) of (N, *shape)."""
        ordered = tensor.permute(0, 2, 3, 1) if self.last else tensor
        return ordered.reshape(len(tensor), -1).float()

    def whole(self, flat: Tensor) -> Tensor:
        """Return (N, *shape) of (N, width), in its own number format."""
        flat = flat.to(self.dtype)
        if not self.last:
            return flat.reshape(len(flat), *self.shape)
        channels, height, width = self.shape
        return flat.reshape(len(flat), height, width, channels).permute(0, 3, 1, 2)


class Behind(nn.Module):
    """A network from the cut on: maps what crosses, (N, W) as it is kept, to logits (N, C)."""

    def __init__(self, network: Network, tail: nn.Module, crossing: Sequence[Crossing]) -> None:
        super().__init__()
        self.network = network
        self._tail = (tail,)  # in a tuple: its modules are those of the network
        self._crossing = tuple(crossing)

    def features(self, rows: Tensor) -> Tensor:
        """Map what crosses the cut, (N, W), to what the head takes, (N, num_features)."""
        parts = torch.split(rows, [each.width for each in self._crossing], dim=1)
        given = [each.whole(part) for each, part in zip(self._crossing, parts, strict=True)]
        return self.network.pool.after(lambda: self._tail[0](*given))

    def forward(self, rows: Tensor) -> Tensor:
        """Map what crosses the cut, (N, W), to logits (N, C)."""
        logits: Tensor = self.network.head(self.features(rows))
        return logits


class Divided:
    """The network of a trial, divided; `model` is what lies behind the cut.

    `on_the_way` are earlier cuts, ascending, what crosses which its prefix gives, too.
    """

    def __init__(
        self,
        trial: Trial,
        depth: int,
        first: Divided | None = None,
        on_the_way: Sequence[int] = (),
    ) -> None:
        """Cut the network of `trial` after `depth` stages, whose weights are as they were built.

        What lies before the cut is that of `first` where it is given: a copy that all share.

        Raises:
            CannotShare: says why.
        """
        self._trial = trial
        prefix, tail = _parts(trial, depth, on_the_way)
        self.on_the_way = tuple(on_the_way)
        # Apart from the network, which trains meanwhile; always in eval mode.
        self._prefix: nn.Module = copy.deepcopy(prefix) if first is None else first._prefix
        self._prefix.eval().requires_grad_(False)
        self._micro = MicroBatches()
        images = noise(trial.network.backbone, 2, trial.setup.image_size)
        self._crossings = [_crossing(trial, given) for given in self._given(images)]
        self.model = Behind(trial.network, tail, self._crossings[-1])
        self._check(images)

    def rows(self, images: Tensor) -> Tensor:
        """Return what crosses for images (N, 3, S, S): (N, W) in fp32.

        Raises:
            MachineError: the memory does not hold one image.
        """
        return self.all_rows(images)[-1]

    def all_rows(self, images: Tensor) -> Sequence[Tensor]:
        """Return what crosses each cut on the way, and the last, in fp32: (N, W) of each.

        Raises:
            MachineError: the memory does not hold one image.
        """
        widths = [sum(part.width for part in each) for each in self._crossings]
        return torch.split(self._micro.outputs(self._flat, images), widths, dim=1)

    def folded(self) -> AbstractContextManager[None]:
        """Return a context in which the prefix has its batch norms in its convolutions.

        Faster, and the same but for rounding.
        """
        return folded(self._prefix, self._trial.setup.image_size)

    def _flat(self, images: Tensor) -> Tensor:
        cuts = zip(self._crossings, self._given(images), strict=True)
        pairs = (pair for cut_pair in cuts for pair in zip(*cut_pair, strict=True))
        return torch.cat([each.flat(tensor) for each, tensor in pairs], dim=1)

    def through(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors that cross for images (N, 3, S, S)."""
        return self._given(images)[-1]

    @torch.no_grad()
    def _given(self, images: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """Return the tensors that cross each cut on the way, and the last."""
        precision, device = self._trial.job.precision, self._trial.device
        with autocast(precision, device):
            given = self._prefix(place(images, precision, device))
        return given if self.on_the_way else (given,)

    @torch.no_grad()
    def _check(self, images: Tensor) -> None:
        """Refuse a tail whose features are not the whole network's: a pooling may look further.

        Raises:
            CannotShare: says by how much they differ.
        """
        network, precision = self._trial.network, self._trial.job.precision
        with evaluating(network), autocast(precision, self._trial.device):
            try:
                whole = network.features(place(images, precision, self._trial.device)).float()
                found = self.model.features(self.all_rows(images)[-1]).float()
            except PluginError as error:
                raise CannotShare(str(error)) from error
        apart = float((whole - found).abs().max())
        share = AGREE_BF16 if precision.bf16 else AGREE
        if not apart <= share * max(float(whole.abs().max()), 1e-6):
            raise CannotShare(f"behind the cut its features differ by {apart:.3g}")


def uncut(trial: Trial, depth: int) -> str:
    """Return why the network of `trial` cannot be divided, by what the trial is; "" if it can."""
    if trial.network.pool.kind == "stages":
        return "the head takes the features of all stages"
    if trial.network.pool.kind != "native" and trial.network.pool.map_stage < depth:
        return "the map that is pooled lies in the frozen stages"
    if trial.job.precision.compiled:
        return "a compiled network is not cut"
    return ""


def _parts(
    trial: Trial, depth: int, on_the_way: Sequence[int]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    size = trial.setup.image_size
    try:
        prefix, tail = cut(trial.backbone, depth, size)
        if on_the_way:
            prefix = prefix_of(trial.backbone, [*on_the_way, depth], size)
    except CannotCut as error:
        raise CannotShare(str(error)) from error
    return prefix, tail


def _crossing(trial: Trial, given: Sequence[Tensor]) -> tuple[Crossing, ...]:
    if not all(each.is_floating_point() for each in given):
        raise CannotShare("what crosses the cut are not all numbers")
    last = trial.job.precision.channels_last
    return tuple(
        Crossing(tuple(each.shape[1:]), each.dtype, last and each.ndim == 4) for each in given
    )
