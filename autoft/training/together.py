"""Trials that train a head alone, together: one backbone, and one set of features a pooling.

Read `train_heads` first. Every trial has its own folder, curve and outcome, as if it were the
only one; what a plugin does wrong in one head is the failure of that trial. The heads see the same
minibatches, by the seed that they have in common, so that it makes no difference which others
are with them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from autoft.network.assemble import Network
from autoft.network.heads import build_head, features_of
from autoft.network.pooling import Pooling
from autoft.space import check_choices, read_signature
from autoft.training import checkpoint, recipe
from autoft.training.evaluate import score_logits
from autoft.training.job import Outcome, Reporter, Setup, TrialJob
from autoft.training.packs import Round, train_pack
from autoft.training.packs.train import in_words
from autoft.training.precision import memory_format
from autoft.training.probe import NonFiniteLoss
from autoft.training.underway import (
    Built,
    Trial,
    after_epoch,
    begin_at_prior,
    class_counts,
    folder_of,
    new_trial,
    outcome_of,
)
from autoft.values import Status


@dataclass
class Seat:
    """One trial in a pack and its head: how it gets on, and the seconds it is yet to be charged.

    `trained` are those of its training so far; `goes_on` is what was answered last.
    """

    trial: Trial
    head: nn.Module
    owes: float
    trained: float = 0.0
    error: str = ""
    goes_on: bool = True

    def pay(self) -> None:
        """Set the trial's clock as if it had begun when that, which it owes, was begun."""
        self.trial.began, self.owes = time.monotonic() - self.owes, 0.0

    def charge_training(self, seconds: float) -> None:
        """Learn for how long it was trained in all."""
        self.owes, self.trained = self.owes + seconds - self.trained, seconds


def train_heads(
    setup: Setup,
    jobs: Sequence[TrialJob],
    built: Built,
    report: Reporter,
    *,
    keep: int,
    began: float,
) -> Iterator[Outcome]:
    """Train the heads of `jobs` on frozen features of what was built; yield how each ended.

    All have the same backbone, seed, number format and number of epochs. Of the weights those of
    the best `keep` are written, and those of the first, which may be a baseline. The clock runs
    since `began` (time.monotonic).
    """
    for job in jobs:
        checkpoint.start(folder_of(setup, job.number), job, pretrained=built.pretrained)
    networks: dict[str, Network] = {}
    packs: dict[str, list[tuple[Trial, nn.Module]]] = {}
    for job in jobs:
        try:
            trial, head = _begin(setup, job, built, networks, report)
        except BaseException as error:  # noqa: BLE001 - plugins may raise anything at all
            yield failure(job, error)
        else:
            packs.setdefault(trial.network.pool.kind, []).append((trial, head))
    share = (time.monotonic() - began) / len(jobs)
    for members in packs.values():
        seats = [Seat(trial, head, share) for trial, head in members]
        try:
            _train(seats)
        except BaseException as error:  # noqa: BLE001 - as above: of what these heads share
            yield from (failure(seat.trial.job, error) for seat in seats)
        else:
            yield from _ended(seats, keep)


def failure(job: TrialJob, error: BaseException) -> Outcome:
    """Return the outcome of a trial in which a plugin raised `error`.

    Raises:
        KeyboardInterrupt: it was no plugin's doing.
    """
    if isinstance(error, KeyboardInterrupt):
        raise error
    return Outcome(job.number, "failed", error=in_words(error))


def _begin(
    setup: Setup,
    job: TrialJob,
    built: Built,
    networks: dict[str, Network],
    report: Reporter,
) -> tuple[Trial, nn.Module]:
    """Return a trial and its new head; trials of one pooling have the network in common."""
    config = job.config
    check_choices("The recipe", read_signature(recipe.probing), config.train)
    how = recipe.probing(**config.train)  # type: ignore[arg-type]  # checked just above
    kind = "stages" if features_of(config.head) == "stages" else how.pool
    known = networks.get(kind)
    pool = known.pool if known else Pooling(built.backbone, kind, setup.image_size)
    torch.default_generator.manual_seed(config.seed)  # of the CPU: `torch.manual_seed` takes 1 ms
    head = build_head(config.head, pool.num_features, len(setup.classes))
    begin_at_prior(setup, head, how)
    head.to(setup.device)
    if known is None:
        known = networks[kind] = Network(built.backbone, head, pool)
        known.to(setup.device).to(memory_format=memory_format(job.precision))
        known.set_rates([0.0] * known.num_stages, norm_mode="frozen")
    trial = new_trial(setup, job, built, known, how, report, time.monotonic())
    return trial, head


def _train(seats: Sequence[Seat]) -> None:
    """Train the heads of one pooling, and score each after every round."""
    began, first = time.monotonic(), seats[0].trial
    setup, device, seed = first.setup, first.device, first.job.config.seed
    train = setup.train
    features = torch.from_numpy(first.features(train)).to(device)
    held_out = torch.from_numpy(first.features(setup.validation)).to(device)
    for seat in seats:
        seat.owes += (time.monotonic() - began) / len(seats)

    def after_round(now: Round) -> list[bool]:
        return [_told(seats[head], now, place) for place, head in enumerate(now.heads)]

    torch.manual_seed(seed)
    ended = train_pack(
        [seat.head for seat in seats],
        features,
        torch.from_numpy(train.labels).to(device),
        [seat.trial.recipe for seat in seats],
        counts=torch.from_numpy(class_counts(setup)).to(device, torch.float32),
        seed=seed,
        weights=torch.from_numpy(train.loss_weights()).to(device),
        held_out=held_out,
        rounds=first.job.epochs,
        after_round=after_round,
    )
    for seat, outcome in zip(seats, ended, strict=True):
        seat.error = seat.error or outcome.error
        seat.charge_training(outcome.seconds)


def _told(seat: Seat, now: Round, place: int) -> bool:
    """Score the head at `place` of a round; tell whether it goes on."""
    trial, logits = seat.trial, now.logits[place]
    assert logits is not None  # there is a part held out
    seat.charge_training(now.seconds[place])
    seat.pay()
    try:
        labels = trial.setup.validation.labels
        scored = score_logits(trial.setup.metric, labels, logits.numpy())
        seat.goes_on = after_epoch(trial, now.index, scored, now.losses[place], keep=False)
    except NonFiniteLoss as error:
        seat.error, seat.goes_on = str(error), False
    return seat.goes_on


def _ended(seats: Sequence[Seat], keep: int) -> Iterator[Outcome]:
    """Write the weights that may be asked for, and how each trial ended."""
    fine = [seat.trial for seat in seats if not seat.error]
    best = sorted(fine, key=lambda each: (-each.state.scores[-1], each.state.loss or 0.0))
    kept = {each.job.number for each in (*best[:keep], *fine[:1])}
    for seat in seats:
        trial = seat.trial
        seat.pay()
        if trial.job.number in kept:
            trial.network.head = seat.head
            checkpoint.save_scored(trial.folder, trial.network)
        status: Status = "done" if seat.goes_on else "stopped"
        outcome = outcome_of(trial, "failed" if seat.error else status, seat.error)
        checkpoint.finish(trial.folder, outcome)
        yield outcome
