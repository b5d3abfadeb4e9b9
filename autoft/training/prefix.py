"""The frozen first stages of a trial: cut off, run once for each image and view, and kept.

Only the tail runs in training then. Read `share` first. What cannot be shared is run again in
every step: on views that nobody saw before, so that its numbers are others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from autoft.data.views import view_batches
from autoft.errors import PluginError
from autoft.looking import evaluating, noise
from autoft.network.assemble import Network
from autoft.network.cut import CannotCut, cut
from autoft.training import checkpoint, plan
from autoft.training.activations import Activations, Read, View, is_kept
from autoft.training.evaluate import EVALUATION_BATCH
from autoft.training.features import cache_key
from autoft.training.job import Rows, Sharing
from autoft.training.memory import MicroBatches
from autoft.training.precision import autocast, place
from autoft.training.rowstore import Number
from autoft.training.underway import Trial

AGREE, AGREE_BF16 = 1e-3, 5e-2  # of the largest feature: so far may tail and whole differ


class CannotShare(Exception):
    """Says why what the prefix of a trial gives cannot be kept."""


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


class Shared:
    """What the prefix of a trial gives; `model` is the network behind it."""

    def __init__(self, trial: Trial, sharing: Sharing) -> None:
        """Cut the network of `trial`, whose weights are as they were built.

        Raises:
            CannotShare: says why.
        """
        self._sharing = sharing
        self._trial = trial
        prefix, tail = _divided(trial, sharing.cut)
        # Apart from the network, which trains meanwhile; always in eval mode.
        self._prefix = copy.deepcopy(prefix).eval().requires_grad_(False)
        images = noise(trial.network.backbone, 2, trial.setup.image_size)
        self._crossing = _crossing(trial, self.through(images))
        self.model = Behind(trial.network, tail, self._crossing)
        self._check(images)
        self._kept = Activations(
            self._computed,
            self._key,
            sharing.mode,
            trial.device,
            exact=sharing.exact,
            until=trial.job.deadline,
        )

    @property
    def sharing(self) -> Sharing:
        """Return how it is shared, with the number format that turned out to be needed."""
        return replace(self._sharing, exact=self._kept.exact)

    def close(self) -> None:
        """Let go of what is kept in memory, of files, and of the network."""
        self._kept.close()
        del self._prefix, self.model, self._trial

    @property
    def note(self) -> str:
        """Return what went wrong with what was kept, and how it goes on; "" for nothing."""
        return self._kept.note

    def train_rows(self, epoch: int) -> Read:
        """Return what reads the training images in the view of `epoch`.

        Raises:
            NoPlace: there is no room for them.
        """
        view = view_of(self._trial, epoch % max(1, self._sharing.views))
        return self._kept.ready(self._trial.setup.train.rows, view)

    def held_out(self) -> Iterator[Tensor]:
        """Yield (B, W) of the validation images in order.

        Raises:
            NoPlace: there is no room for them.
        """
        rows = self._trial.setup.validation.rows
        read = self._kept.ready(rows, View())
        for start in range(0, len(rows), EVALUATION_BATCH):
            yield read(rows[start : start + EVALUATION_BATCH])

    def _computed(self, rows: Rows, view: View) -> NDArray[np.float32]:
        """Run the prefix over `rows` (N,) in `view`; return (N, W)."""
        trial, micro = self._trial, MicroBatches()
        batches = view_batches(
            trial.setup.store, rows, trial.pre, view.augment, view.number, EVALUATION_BATCH
        )
        found = [micro.outputs(self._flat, images).cpu().numpy() for images in batches]
        joined: NDArray[np.float32] = np.concatenate(found)
        return joined

    def _flat(self, images: Tensor) -> Tensor:
        given = zip(self._crossing, self.through(images), strict=True)
        return torch.cat([each.flat(tensor) for each, tensor in given], dim=1)

    @torch.no_grad()
    def through(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what crosses for images (N, 3, S, S)."""
        precision, device = self._trial.job.precision, self._trial.device
        with autocast(precision, device):
            given: tuple[Tensor, ...] = self._prefix(place(images, precision, device))
        return given

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
                found = self.model.features(self._flat(images)).float()
            except PluginError as error:
                raise CannotShare(str(error)) from error
        apart = float((whole - found).abs().max())
        share = AGREE_BF16 if precision.bf16 else AGREE
        if not apart <= share * max(float(whole.abs().max()), 1e-6):
            raise CannotShare(f"behind the cut its features differ by {apart:.3g}")

    def _key(self, view: View, dtype: Number) -> str:
        return key_of(self._trial, self._sharing.cut, view, dtype)


def view_of(trial: Trial, number: int) -> View:
    """Return a view of the training images of `trial`; without augmentation there is one."""
    augment = trial.recipe.augment
    return View(augment, 0 if augment == "none" else number)


def key_of(trial: Trial, depth: int, view: View, dtype: Number) -> str:
    """Return the name of what the first `depth` stages give in a view."""
    how = (trial.job.precision.bf16, trial.job.precision.channels_last, dtype)
    stages = tuple(map(tuple, trial.backbone.stages[:depth]))
    return cache_key(trial.backbone_as_built(), trial.setup, (stages, trial.pre, how, view))


def share(trial: Trial) -> tuple[Sharing, Shared | None, str]:
    """Decide how `trial` comes by what its frozen stages give.

    Returned are the decision, what gives it (None: the whole network runs in every step) and why
    it cannot be kept ("": it can, or need not).
    """
    # A trial that goes on keeps its views, on which its numbers depend.
    wanted = trial.job.sharing or checkpoint.noted_sharing(trial.folder)
    depth = trial.strategy.frozen_prefix()
    if wanted is not None and wanted.mode == "rerun":
        return wanted, None, ""
    if depth == 0 and wanted is None:
        return Sharing(), None, ""  # nothing is frozen all the time
    rerun = Sharing(cut=depth, views=wanted.views if wanted else 0)
    if why := _unfit(trial, depth):
        return rerun, None, why
    try:
        if wanted is not None:
            return wanted, Shared(trial, wanted), ""
        chosen = _planned(trial, depth)
        return chosen, None if chosen.mode == "rerun" else Shared(trial, chosen), ""
    except CannotShare as error:
        return rerun, None, str(error)


def _planned(trial: Trial, depth: int) -> Sharing:
    """Return what costs the least by the measured costs of the backbone."""
    costs, job, setup = trial.job.costs, trial.job, trial.setup
    if costs is None:
        return Sharing(cut=depth)
    work = plan.Work(
        train=len(setup.train),
        validation=len(setup.validation),
        epochs=job.epochs,
        augmented=trial.recipe.augment != "none",
        mixed=trial.recipe.mix != "none",
    )
    chosen = plan.choose(costs, depth, work, plan.room_of(setup.device))
    if chosen.mode == "rerun" and costs.bytes[depth]:  # what earlier trials kept may turn it
        work = replace(work, kept=_views_kept(trial, depth, plan.views_for(costs, depth, work)))
        chosen = plan.choose(costs, depth, work, plan.room_of(setup.device))
    return chosen


def _views_kept(trial: Trial, depth: int, views: int) -> int:
    """Return how many of the first `views` views are in the cache already."""
    keys = (key_of(trial, depth, view_of(trial, number), "float16") for number in range(views))
    return sum(is_kept(key, trial.setup.train.rows) for key in keys)


def _unfit(trial: Trial, depth: int) -> str:
    """Return why nothing can be kept, by what the trial is; "" if it can."""
    if trial.recipe.mix != "none":
        return f"mix={trial.recipe.mix} is of images"
    if trial.recipe.train_scale != 1:
        return "images are trained on in two sizes"
    if trial.network.pool.kind == "stages":
        return "the head takes the features of all stages"
    if trial.network.pool.kind != "native" and trial.network.pool.map_stage < depth:
        return "the map that is pooled lies in the frozen stages"
    if trial.job.precision.compiled:
        return "a compiled network is not cut"
    return ""


def _divided(trial: Trial, depth: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    try:
        return cut(trial.backbone, depth, trial.setup.image_size)
    except CannotCut as error:
        raise CannotShare(str(error)) from error


def _crossing(trial: Trial, given: Sequence[Tensor]) -> tuple[Crossing, ...]:
    if not all(each.is_floating_point() for each in given):
        raise CannotShare("what crosses the cut are not all numbers")
    last = trial.job.precision.channels_last
    return tuple(
        Crossing(tuple(each.shape[1:]), each.dtype, last and each.ndim == 4) for each in given
    )
