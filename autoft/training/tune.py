"""Backbone and head together, epoch by epoch: what a strategy thaws, from a fitted head."""

from __future__ import annotations

import gc
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from autoft.data.views import Batch, training_batches
from autoft.training import checkpoint, recipe
from autoft.training.activations import NoPlace, OutOfTime, Read
from autoft.training.average import Average
from autoft.training.evaluate import Scored, evaluate, logits_of, score_logits
from autoft.training.gradients import BATCHES, relative_norms
from autoft.training.job import Sharing
from autoft.training.losses import Loss
from autoft.training.memory import MicroBatches
from autoft.training.noted import note_sharing
from autoft.training.optim import CLIP, make_optimizer, set_learning_rates, take
from autoft.training.pace import Pace
from autoft.training.precision import autocast, place
from autoft.training.prefix import Shared, share
from autoft.training.probe import NonFiniteLoss
from autoft.training.sharpness import sharpness_aware
from autoft.training.underway import Trial, after_epoch, fit_head
from autoft.values import Status


@dataclass
class Tuning:
    """What training a backbone holds beside the trial; `anchor` is where its weights began.

    `shared` gives what the frozen stages make of the images (None: they run in every step);
    `sharing` is how, as it is written in the trial's folder. `behind` is the network behind a cut
    where others run what lies before it, too (None: it is by itself).
    """

    trial: Trial
    optimizer: torch.optim.Optimizer
    loss: Loss
    anchor: dict[str, Tensor]
    sharing: Sharing
    shared: Shared | None = None
    behind: nn.Module | None = None
    micro: MicroBatches = field(default_factory=MicroBatches)
    average: Average | None = None

    @property
    def model(self) -> nn.Module:
        """Return what maps a batch, as it is given, to logits."""
        if self.shared:
            return self.shared.divided.model
        return self.trial.network if self.behind is None else self.behind


def tune(trial: Trial) -> Status:
    """Train what the strategy thaws, from a fitted head.

    Raises:
        NonFiniteLoss: the loss or the score became NaN or infinite.
        MachineError: the memory does not hold a single image's step.
    """
    sharing, shared, why = share(trial)  # before an earlier state of the weights is restored
    note_sharing(trial.folder, sharing, why)
    tuning = begin(trial, sharing, shared=shared)
    pace = Pace(trial.pre.image_size, trial.recipe.train_scale)
    since, first = time.monotonic(), trial.state.epoch
    try:
        while trial.state.epoch < trial.epochs:
            train_loss = _epoch(tuning)
            trained = time.monotonic()
            if train_loss is None or not _score(tuning, train_loss):
                return "stopped"
            now, done = time.monotonic(), trial.state.epoch
            if done - first > tuning.sharing.views:  # to make a view takes longer
                pace.note(done - 1, trial.epochs, trained - since, now - trained)
            if not _ends_in_time(trial, pace):
                return "stopped"
            since = now
            save(tuning)
    except OutOfTime:
        return "stopped"
    finally:
        _let_go(tuning)
    return "done"


def _ends_in_time(trial: Trial, pace: Pace) -> bool:
    """Have the trial as many of its epochs as end in time; tell whether there are any more.

    They never grow again: a schedule does not go back. A trial that scores another again has as
    many as that.
    """
    done, planned = trial.state.epoch, trial.epochs
    if done == planned or trial.job.of is not None:
        return True
    fits = pace.epochs_within(trial.job.deadline - time.time(), done, planned)
    if fits == done:
        return False
    trial.state = replace(trial.state, epochs=fits)
    return True


def begin(
    trial: Trial,
    sharing: Sharing,
    *,
    shared: Shared | None = None,
    behind: nn.Module | None = None,
) -> Tuning:
    """Return where the trial had come to, or the start: a fitted head on good features.

    Raises:
        NonFiniteLoss: the head could not be fitted.
    """
    how, network = trial.recipe, trial.network
    optimizer = make_optimizer(network, how)
    anchor = _anchor(trial) if how.l2sp and trial.pretrained else {}
    trial.state, averaged = checkpoint.load_last(trial.folder, network, optimizer)
    network.set_rates([1.0] * network.num_stages)  # whatever a plugin left frozen
    if trial.state.epoch == 0 and trial.pretrained and how.head_first:
        fit_head(trial, _of_head(trial))
    tuning = Tuning(trial, optimizer, trial.loss(how), anchor, sharing, shared, behind)
    if how.ema:
        steps = trial.job.epochs * steps_per_epoch(len(trial.setup.train), how.batch_size)
        tuning.average = Average(network, steps)
        if averaged:
            tuning.average.load(averaged)
    if trial.state.epoch < trial.epochs:  # strategies know of no moment after the last
        trial.apply_rates(trial.state.epoch / trial.epochs)
    return tuning


def save(tuning: Tuning) -> None:
    """Write all that is needed to go on with the next epoch."""
    trial, state = tuning.trial, tuning.average.state() if tuning.average else {}
    checkpoint.save_last(trial.folder, trial.network, tuning.optimizer, trial.state, state)


def _of_head(trial: Trial) -> recipe.Recipe:
    """Return how the head is fitted first: as the best head so far was."""
    how = trial.recipe
    return replace(
        recipe.probing(**trial.job.head_start),  # type: ignore[arg-type]  # answers of this recipe
        balance=how.balance,
        pool=how.pool,
    )


def _anchor(trial: Trial) -> dict[str, Tensor]:
    named = trial.network.backbone.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named}


def _score(tuning: Tuning, train_loss: float) -> bool:
    """Score the network, or the average of its weights; tell whether to go on."""
    trial = tuning.trial
    network, setup, job = trial.network, trial.setup, trial.job
    with as_scored(tuning):
        scored = _held_out(tuning) or evaluate(
            network, setup, setup.validation, trial.pre, job.precision
        )
        return after_epoch(trial, trial.state.epoch + 1, scored, train_loss)


def as_scored(tuning: Tuning) -> AbstractContextManager[None]:
    """Return a context in which the network has the weights that are scored and kept."""
    average = tuning.average
    return average.in_place_of(tuning.trial.network) if average else nullcontext()


def _held_out(tuning: Tuning) -> Scored | None:
    """Score what is kept of the validation images; None where nothing is."""
    trial, shared = tuning.trial, tuning.shared
    if shared is None:
        return None
    try:
        logits = logits_of(tuning.model, shared.held_out(), trial.device, trial.job.precision)
    except NoPlace as error:
        _give_up(tuning, str(error))
        return None
    return score_logits(trial.setup.metric, trial.setup.validation.labels, logits)


def _give_up(tuning: Tuning, why: str) -> None:
    """Go on without what was shared: the views stay, and so do the numbers if nothing is mixed."""
    _let_go(tuning)
    tuning.trial.note = f"what its frozen stages give is not kept: {why}"
    _note(tuning, replace(tuning.sharing, mode="rerun"), why)


def _note(tuning: Tuning, sharing: Sharing, why: str) -> None:
    """Write how it is shared from now on."""
    tuning.sharing = sharing
    note_sharing(tuning.trial.folder, sharing, why)


def _let_go(tuning: Tuning) -> None:
    """Drop what is shared: graphs and what they are of hold each other, and would pile up."""
    if tuning.shared:
        tuning.shared.close()
        tuning.shared = None
        gc.collect()


def _epoch(tuning: Tuning) -> float | None:
    """Train one epoch; return the mean loss, or None where the deadline fell."""
    trial = tuning.trial
    torch.manual_seed(seed_of_epoch(trial))
    if trial.strategy.wants_gradients:
        _measure_gradients(tuning)
    batches = batches_of(tuning)
    steps = steps_per_epoch(len(trial.setup.train), trial.recipe.batch_size)
    total = torch.zeros((), device=trial.device)
    trial.network.train()
    for step, batch in enumerate(batches):
        if time.time() > trial.job.deadline:
            batches.close()
            return None
        total += take_step(tuning, batch, (trial.state.epoch + step / steps) / trial.epochs)
    trial.micro_batch = tuning.micro.size
    if tuning.shared:
        trial.note = tuning.shared.note or trial.note
        if tuning.shared.sharing != tuning.sharing:  # fp16 did not hold it
            _note(tuning, tuning.shared.sharing, "")
        if tuning.shared.read_too_slowly():  # than it was when the trial was planned
            _give_up(tuning, "reading it takes longer than computing it again")
    return float(total) / steps


def seed_of_epoch(trial: Trial) -> int:
    """Return what an epoch draws its random numbers by: dropout draws the same when resumed."""
    return trial.job.config.seed * 1000 + trial.state.epoch


def batches_of(tuning: Tuning) -> Generator[Batch, None, None]:
    """Yield the batches of the epoch that comes next: of images, or of what is kept of them."""
    trial = tuning.trial
    part, how, setup = trial.setup.train, trial.recipe, trial.setup
    return training_batches(
        setup.store,
        part.rows,
        part.labels,
        trial.pre,
        num_classes=len(setup.classes),
        weights=part.loss_weights(),
        augment=how.augment,
        mix=how.mix,
        batch_size=how.batch_size,
        seed=trial.job.config.seed,
        epoch=trial.state.epoch,
        views=tuning.sharing.views,
        kept=_kept(tuning),
        size=recipe.size_in(
            trial.pre.image_size, how.train_scale, trial.state.epoch, trial.epochs
        ),
    )


def _kept(tuning: Tuning) -> Read | None:
    """Return what reads what is kept for this epoch; None where nothing is."""
    if tuning.shared is None:
        return None
    try:
        return tuning.shared.train_rows(tuning.trial.state.epoch)
    except NoPlace as error:
        _give_up(tuning, str(error))
        return None


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the number of optimiser steps in an epoch; a last batch of one image is dropped."""
    whole, rest = divmod(images, batch_size)
    return max(1, whole + (rest > 1))


def _measure_gradients(tuning: Tuning) -> None:
    """Tell the strategy how large gradients are, on the first batches of the epoch."""
    trial = tuning.trial
    batches = batches_of(tuning)
    fills = (partial(_fill, tuning, batch) for batch in islice(batches, BATCHES))
    trial.gradient_norms = relative_norms(trial.network, fills)
    batches.close()


def take_step(tuning: Tuning, batch: Batch, progress: float) -> Tensor:
    """Take one optimiser step at `progress` in [0, 1) of the trial; return the loss.

    Raises:
        NonFiniteLoss: names the progress and the learning rate.
    """
    trial, network, how = tuning.trial, tuning.trial.network, tuning.trial.recipe
    trial.apply_rates(progress)
    set_learning_rates(tuning.optimizer, network, how, progress)

    def gradients() -> Tensor:
        loss = _fill(tuning, batch)
        if not torch.isfinite(loss):
            raise NonFiniteLoss(f"non_finite_loss at progress {progress:.2f} (lr={how.lr:g})")
        _draw_to_start(tuning)
        return loss

    loss = sharpness_aware(network, how.sam, gradients)() if how.sam else gradients()
    nn.utils.clip_grad_norm_(network.parameters(), CLIP)
    take(tuning.optimizer)
    if tuning.average:
        tuning.average.update(network)
    return loss


def _fill(tuning: Tuning, batch: Batch) -> Tensor:
    """Drop earlier gradients and fill in those of `batch`; return its loss."""
    return tuning.micro.gradients(tuning.trial.network, batch, partial(_loss, tuning))


def _loss(tuning: Tuning, batch: Batch) -> Tensor:
    trial = tuning.trial
    with autocast(trial.job.precision, trial.device):
        logits = tuning.model(place(batch.images, trial.job.precision, trial.device))
    targets, weights = batch.targets.to(trial.device), batch.weights.to(trial.device)
    return tuning.loss(logits.float(), targets, weights)


def _draw_to_start(tuning: Tuning) -> None:
    """Add the gradient of l2sp / 2 x ||w - w0||^2 (Li et al. 2018, arXiv 1802.01483)."""
    if not tuning.anchor:
        return
    for name, parameter in tuning.trial.network.backbone.named_parameters():
        if name in tuning.anchor and parameter.grad is not None:
            pull = parameter.detach() - tuning.anchor[name]
            parameter.grad.add_(pull, alpha=tuning.trial.recipe.l2sp)
