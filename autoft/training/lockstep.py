"""Trials that take their steps together: one pass of the frozen stages for each batch serves all.

Read `tune_together` first. Every trial is trained as it would be by itself, on the same batches
and with random numbers of its own; what goes wrong in one is the failure of that trial. Nothing
is kept, so that any augmentation will do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from autoft.data.views import Batch, evaluation_batches
from autoft.errors import MachineError
from autoft.training import checkpoint
from autoft.training.divided import Behind, CannotShare, Divided, uncut
from autoft.training.evaluate import EVALUATION_BATCH, logits_of, score_logits
from autoft.training.job import Outcome, Sharing
from autoft.training.metrics import Logits
from autoft.training.noted import note_sharing
from autoft.training.packs.train import in_words
from autoft.training.probe import NonFiniteLoss
from autoft.training.tune import (
    Tuning,
    as_scored,
    batches_of,
    begin,
    save,
    seed_of_epoch,
    steps_per_epoch,
    take_step,
)
from autoft.training.underway import Trial, after_epoch, outcome_of
from autoft.values import Status


@dataclass
class Member:
    """A trial among others, and how it ended (None: it runs).

    `random` are the random numbers that it would draw next by itself, of the CPU and the GPU;
    `model` is its network behind the cut.
    """

    trial: Trial
    random: tuple[Tensor, Tensor | None]
    model: Behind | None = None
    tuning: Tuning | None = None
    loss: float = 0.0
    ended: Status | None = None
    error: str = ""

    @classmethod
    def of(cls, trial: Trial) -> Member:
        """Return a member for a trial that was just built."""
        return cls(trial, _random(trial.device))

    @property
    def running(self) -> Tuning:
        """Return what it trains with."""
        assert self.tuning is not None  # it has begun
        return self.tuning

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Have what goes wrong in the block end this trial alone."""
        try:
            yield
        except (KeyboardInterrupt, MachineError, CannotShare):
            raise  # there may be room for one alone
        except NonFiniteLoss as error:
            self.ended, self.error = "failed", str(error)
        except BaseException as error:  # noqa: BLE001 - plugins may raise anything at all
            self.ended, self.error = "failed", in_words(error)


def tune_together(trials: Sequence[Member], began: float) -> list[Outcome]:
    """Train those of `trials` in step that can be; return how each of these ended.

    Each takes as long as its share of what they do together and its own; the clock runs since
    `began` (time.monotonic).

    Raises:
        Exception: what they share failed. Each can go on by itself from its last epoch.
    """
    prefix, members = _grouped(trials)
    if prefix is None or len(members) < 2:
        return []
    for member in members:
        with member.guarded(), _drawing(member):
            _begin(member)
    _charge(members, began)
    while running := [each for each in members if each.ended is None]:
        _epoch(prefix, running)
    return [_outcome(member) for member in members]


def _grouped(trials: Sequence[Member]) -> tuple[Divided | None, list[Member]]:
    """Return which of `trials` can take their steps together, and the prefix that they share."""
    first: Divided | None = None
    members: list[Member] = []
    for each in trials:
        if members and _start_of(each.trial) != _start_of(members[0].trial):
            continue
        try:
            divided = _divided(each.trial, first)
        except CannotShare:
            continue
        first, each.model = first or divided, divided.model
        members.append(each)
    return first, members


def _divided(trial: Trial, first: Divided | None) -> Divided:
    """Divide the network of a trial, whose prefix is that of `first`.

    Raises:
        CannotShare: nothing is frozen all the time, or it has to be by itself.
    """
    depth = trial.strategy.frozen_prefix()
    if not depth or trial.strategy.wants_gradients or trial.recipe.train_scale != 1:
        raise CannotShare("it has to be by itself")
    if why := uncut(trial, depth):
        raise CannotShare(why)
    return Divided(trial, depth, first)


def _start_of(trial: Trial) -> tuple[object, ...]:
    """Return all by which two trials are given the same in every step."""
    how, job = trial.recipe, trial.job
    batches = how.augment, how.mix, how.batch_size, job.config.seed, job.epochs
    return (trial.backbone_as_built(), trial.strategy.frozen_prefix(), job.precision, *batches)


def _begin(member: Member) -> None:
    trial = member.trial
    sharing = Sharing("live", trial.strategy.frozen_prefix())
    note_sharing(trial.folder, sharing, "")
    member.tuning = begin(trial, sharing, behind=member.model)


def _outcome(member: Member) -> Outcome:
    trial = member.trial
    trial.began = time.monotonic()  # all that it took is charged
    outcome = outcome_of(trial, member.ended or "failed", member.error)
    checkpoint.finish(trial.folder, outcome)
    return outcome


def _epoch(prefix: Divided, members: Sequence[Member]) -> None:
    """Train and score one epoch."""
    began = time.monotonic()
    whole = _train(prefix, members)
    if not whole:
        for member in members:
            member.ended = member.ended or "stopped"
    going = [each for each in members if each.ended is None]
    logits = _held_out(prefix, going) if going else {}
    _charge(members, began)
    for member in going:
        if member.ended is None:
            with member.guarded():
                _score(member, np.concatenate(logits[member.trial.job.number]))


def _charge(members: Sequence[Member], began: float) -> None:
    """Have each pay for its share of the time since `began`, which all have spent together."""
    share = (time.monotonic() - began) / len(members)
    for member in members:
        state = member.trial.state
        member.trial.state = replace(state, seconds=state.seconds + share)


def _train(prefix: Divided, members: Sequence[Member]) -> bool:
    """Train one epoch; return False where the deadline fell."""
    first = members[0].trial
    for member in members:
        member.trial.network.train()
        torch.manual_seed(seed_of_epoch(member.trial))
        member.random, member.loss = _random(member.trial.device), 0.0
    steps = steps_per_epoch(len(first.setup.train), first.recipe.batch_size)
    totals = [torch.zeros((), device=first.device) for _ in members]
    batches = batches_of(members[0].running)
    for step, batch in enumerate(batches):
        if time.time() > first.job.deadline:
            batches.close()
            return False
        crossing = Batch(prefix.rows(batch.images), batch.targets, batch.weights)
        _steps(members, totals, crossing, (first.state.epoch + step / steps) / first.epochs)
        if all(member.ended for member in members):
            batches.close()
            break
    for member, total in zip(members, totals, strict=True):
        member.loss = float(total) / steps
        member.trial.micro_batch = member.running.micro.size
    return True


def _steps(
    members: Sequence[Member], totals: Sequence[Tensor], crossing: Batch, progress: float
) -> None:
    """Have each that goes on take a step on what crosses, and add its loss to its total.

    Raises:
        CannotShare: one changed what the next is given.
    """
    version = crossing.images._version
    for member, total in zip(members, totals, strict=True):
        if member.ended is None:
            with member.guarded(), _drawing(member):
                total += take_step(member.running, crossing, progress)
    if crossing.images._version != version:
        raise CannotShare("a tail changes what crosses the cut")


@contextmanager
def _drawing(member: Member) -> Iterator[None]:
    """Have the block draw the random numbers that the trial would draw by itself."""
    device = member.trial.device
    torch.set_rng_state(member.random[0])
    if member.random[1] is not None:
        torch.cuda.set_rng_state(member.random[1], device)
    try:
        yield
    finally:
        member.random = _random(device)


def _random(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_gpu = device.type == "cuda"
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None


def _held_out(prefix: Divided, members: Sequence[Member]) -> dict[int, list[Logits]]:
    """Return what each makes of the validation images in one pass: batches (B, C), by trial."""
    first, found = members[0].trial, {each.trial.job.number: list[Logits]() for each in members}
    rows, setup = first.setup.validation.rows, first.setup
    batches = evaluation_batches(setup.store, rows, first.pre, EVALUATION_BATCH)
    with ExitStack() as stack:
        for member in members:
            stack.enter_context(as_scored(member.running))
        for images in batches:
            crossing = prefix.rows(images)
            for member in members:
                with member.guarded():
                    job = member.trial.job
                    logits = logits_of(
                        member.running.model, [crossing], first.device, job.precision
                    )
                    found[job.number].append(logits)
    return found


def _score(member: Member, logits: Logits) -> None:
    """Record an epoch, and learn whether the trial goes on.

    One that was stopped is not saved: resumed before the others have ended, it repeats its last
    epoch and is stopped again.
    """
    trial = member.trial
    trial.began = time.monotonic()  # what was before is charged already
    scored = score_logits(trial.setup.metric, trial.setup.validation.labels, logits)
    with as_scored(member.running):
        goes_on = after_epoch(trial, trial.state.epoch + 1, scored, member.loss)
    if goes_on:
        save(member.running)
    _charge((member,), trial.began)
    if not goes_on:
        member.ended = "stopped"
    elif trial.state.epoch >= trial.epochs:
        member.ended = "done"
    if member.ended:
        member.tuning = member.model = None  # optimiser and average: the others go on for long
