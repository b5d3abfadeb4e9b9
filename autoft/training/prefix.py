"""The frozen first stages of a trial: cut off, run once for each image and view, and kept.

Only the tail runs in training then. Read `share` first. What cannot be shared is run again in
every step: on views that nobody saw before, so that its numbers are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from torch import Tensor

from autoft.data.views import view_batches
from autoft.network.folding import WORTH
from autoft.training import plan
from autoft.training.activations import Activations, Computed, Read, View, is_kept
from autoft.training.divided import CannotShare, Divided, uncut
from autoft.training.evaluate import EVALUATION_BATCH
from autoft.training.features import cache_key
from autoft.training.job import Rows, Sharing
from autoft.training.noted import noted_sharing
from autoft.training.rowstore import Number
from autoft.training.underway import Trial, folder_of
from autoft.values import is_of_images


class Shared:
    """What the prefix of a trial gives, kept; `divided` is its network, cut there."""

    def __init__(self, trial: Trial, sharing: Sharing, on_the_way: Sequence[int] = ()) -> None:
        """Cut the network of `trial`, whose weights are as they were built.

        What crosses earlier cuts `on_the_way` is kept for other trials.

        Raises:
            CannotShare: says why.
        """
        self._sharing = sharing
        self._trial = trial
        trial.backbone_as_built()  # by which what is kept is found: asked before it is trained
        self.divided = _divided(trial, sharing.cut, on_the_way)
        self._kept = Activations(
            self._computed,
            self._key,
            sharing.mode,
            trial.device,
            exact=sharing.exact,
            until=trial.job.deadline,
            others=[partial(key_of, trial, each) for each in self.divided.on_the_way],
        )
        if trial.job.costs:
            self._kept.row_bytes = trial.job.costs.bytes[sharing.cut]

    @property
    def sharing(self) -> Sharing:
        """Return how it is shared, with the number format that turned out to be needed."""
        return replace(self._sharing, exact=self._kept.exact)

    def close(self) -> None:
        """Let go of what is kept in memory, of files, and of the network."""
        self._kept.close()
        del self.divided, self._trial

    def read_too_slowly(self) -> bool:
        """Tell whether reading took longer, since this was asked last, than computing again would.

        What is kept may be mixed, and images in its place would be another trial.
        """
        costs, bandwidth = self._trial.job.costs, self._kept.bandwidth()
        if costs is None or not bandwidth or self._trial.recipe.mix != "none":
            return False
        fp32 = 2 if self._kept.exact else 1
        return plan.reads_too_slowly(costs, self._sharing.cut, bandwidth / fp32)

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

    def _computed(self, rows: Rows, view: View) -> Iterator[Computed]:
        """Run the prefix over `rows` (N,) in `view`, a batch at a time."""
        trial = self._trial
        batches = view_batches(
            trial.setup.store, rows, trial.pre, view.augment, view.number, EVALUATION_BATCH
        )
        with self.divided.folded() if len(rows) >= WORTH else nullcontext():
            for images in batches:
                *others, own = (each.cpu().numpy() for each in self.divided.all_rows(images))
                yield own, others

    def _key(self, view: View, dtype: Number) -> str:
        return key_of(self._trial, self._sharing.cut, view, dtype)


def _divided(trial: Trial, depth: int, on_the_way: Sequence[int]) -> Divided:
    try:
        return Divided(trial, depth, on_the_way=on_the_way)
    except CannotShare:
        if not on_the_way:
            raise
        return Divided(trial, depth)  # other cuts must not keep the trial from its own


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
    wanted = trial.job.sharing or noted_sharing(trial.folder)
    if trial.job.of is not None:  # it is trained as the trial was that it scores again
        wanted = wanted or noted_sharing(folder_of(trial.setup, trial.job.of))
    depth = trial.strategy.frozen_prefix()
    if wanted is not None and wanted.mode in ("rerun", "live"):  # by itself: in every step
        return replace(wanted, mode="rerun"), None, ""
    if depth == 0 and wanted is None:
        return Sharing(), None, ""  # nothing is frozen all the time
    rerun = Sharing(cut=depth, views=wanted.views if wanted else 0)
    if why := _unfit(trial, depth):
        return rerun, None, why
    try:
        if wanted is not None:
            return wanted, Shared(trial, wanted), ""
        chosen, on_the_way = _planned(trial, depth)
        if chosen.mode == "rerun":
            return chosen, None, ""
        return chosen, Shared(trial, chosen, on_the_way), ""
    except CannotShare as error:
        return rerun, None, str(error)


def _planned(trial: Trial, depth: int) -> tuple[Sharing, Sequence[int]]:
    """Return what costs the least by the measured costs, and which cuts to keep on the way."""
    costs, job, setup = trial.job.costs, trial.job, trial.setup
    if costs is None:
        return Sharing(cut=depth), ()
    work = plan.Work(
        train=len(setup.train),
        validation=len(setup.validation),
        epochs=job.epochs,
        augmented=trial.recipe.augment != "none",
        mixed=is_of_images(trial.recipe.mix),
    )
    room = plan.room_of(setup.device)
    chosen = plan.choose(costs, depth, work, room)
    if chosen.mode == "rerun" and costs.bytes[depth]:  # what earlier trials kept may turn it
        work = replace(work, kept=_views_kept(trial, depth, plan.views_for(costs, depth, work)))
        chosen = plan.choose(costs, depth, work, room)
    return chosen, _on_the_way(trial, chosen, work, room)


def _on_the_way(trial: Trial, chosen: Sharing, work: plan.Work, room: plan.Room) -> Sequence[int]:
    """Return the earlier cuts to keep, which are not kept, if the prefix is to run at all."""
    costs, depth, views = trial.job.costs, chosen.cut, chosen.views
    if costs is None or chosen.mode not in ("disk", "device"):
        return ()
    if _views_kept(trial, depth, views) == views:
        return ()
    wanted = plan.on_the_way(costs, depth, replace(work, kept=0), room, plan.writing())
    return [cut for cut in wanted if not _views_kept(trial, cut, 1)]


def _views_kept(trial: Trial, depth: int, views: int) -> int:
    """Return how many of the first `views` views are in the cache already."""
    keys = (key_of(trial, depth, view_of(trial, number), "float16") for number in range(views))
    return sum(is_kept(key, trial.setup.train.rows) for key in keys)


def _unfit(trial: Trial, depth: int) -> str:
    """Return why nothing can be kept, by what the trial is; "" if it can."""
    if is_of_images(trial.recipe.mix):
        return f"mix={trial.recipe.mix} is of images"
    if trial.recipe.train_scale != 1:
        return "images are trained on in two sizes"
    return uncut(trial, depth)
