"""What a trial holds while it runs, and what all trials do on the way."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autoft.network.assemble import Network
from autoft.network.heads import prior_bias
from autoft.network.strategy import BoundStrategy
from autoft.training import checkpoint, probe
from autoft.training.evaluate import Scored
from autoft.training.features import fingerprint, pooled_features
from autoft.training.job import Images, Outcome, Report, Reporter, Setup, TrialJob
from autoft.training.kept import Features
from autoft.training.losses import Loss, log_prior, make_loss
from autoft.training.probe import NonFiniteLoss
from autoft.training.recipe import Recipe
from autoft.values import Backbone, NormMode, Preprocess, Status


@dataclass
class Trial:
    """Everything that one trial holds while it runs.

    `fingerprint` is that of the backbone as it was built, "" until it is asked for;
    `gradient_norms` are what the strategy asked to be told of the stages, measured last; `note` is
    what the user is to be told of it.
    """

    setup: Setup
    job: TrialJob
    folder: Path
    backbone: Backbone
    network: Network
    strategy: BoundStrategy
    recipe: Recipe
    report: Reporter
    state: checkpoint.State
    pretrained: bool
    fingerprint: str
    began: float
    gradient_norms: tuple[float, ...] = ()
    micro_batch: int = 0
    note: str = ""

    @property
    def epochs(self) -> int:
        """Return those that it is going to have: all that the job wants, or what ends in time."""
        return self.state.epochs or self.job.epochs

    @property
    def device(self) -> torch.device:
        """Return the device that the trial runs on."""
        return torch.device(self.setup.device)

    @property
    def pre(self) -> Preprocess:
        """Return how an image becomes the network's input."""
        return self.setup.preprocess(self.backbone)

    def loss(self, recipe: Recipe) -> Loss:
        """Return the loss of `recipe` on these classes."""
        counts = torch.from_numpy(class_counts(self.setup)).to(self.device, torch.float32)
        return make_loss(recipe.balance, recipe.smoothing, counts)

    def apply_rates(self, progress: float) -> None:
        """Freeze and thaw as the strategy says; random weights need the statistics of batches."""
        rates = self.strategy.rates(progress, self.gradient_norms)
        mode: NormMode = self.recipe.norm_mode if self.pretrained else "train"
        if rates != self.network.rates or mode != self.network.norm_mode:
            self.network.set_rates(rates, norm_mode=mode)

    def backbone_as_built(self) -> str:
        """Return the fingerprint of the backbone; asked first before anything of it is trained."""
        self.fingerprint = self.fingerprint or fingerprint(self.network.backbone, self.setup)
        return self.fingerprint

    def features(self, part: Images) -> Features:
        """Return what the head takes of the images of `part`, (N, F), from frozen weights."""
        pool, precision = self.network.pool, self.job.precision
        return pooled_features(
            pool, self.setup, part, self.pre, precision, network=self.backbone_as_built()
        )


@dataclass(frozen=True)
class Built:
    """A backbone as trials begin with it; `fingerprint` may be "" until it is asked for."""

    backbone: Backbone
    strategy: BoundStrategy
    pretrained: bool
    fingerprint: str


def new_trial(
    setup: Setup,
    job: TrialJob,
    built: Built,
    network: Network,
    recipe: Recipe,
    report: Reporter,
    began: float,
) -> Trial:
    """Return a trial that nothing was done for yet; its clock runs since `began`."""
    return Trial(
        setup=setup,
        job=job,
        folder=folder_of(setup, job.number),
        backbone=built.backbone,
        network=network,
        strategy=built.strategy,
        recipe=recipe,
        report=report,
        state=checkpoint.State(),
        pretrained=built.pretrained,
        fingerprint=built.fingerprint,
        began=began,
    )


def folder_of(setup: Setup, number: int) -> Path:
    """Return the folder of a trial in the run."""
    return setup.folder / "trials" / f"{number:04d}"


def begin_at_prior(setup: Setup, head: nn.Module, recipe: Recipe) -> None:
    """Have a new head begin with the shares of the classes, where its loss teaches them."""
    if recipe.balance in (
        "none",
        "focal",
    ):  # the others teach scores that the prior has no part in
        prior_bias(head, log_prior(class_counts(setup)))


def class_counts(setup: Setup) -> NDArray[np.float64]:
    """Return how much every class weighs in training, (C,): its images by their weights."""
    train = setup.train
    counts = np.bincount(train.labels, train.loss_weights(), minlength=len(setup.classes))
    return counts.astype(np.float64)


def fit_head(trial: Trial, recipe: Recipe) -> None:
    """Train the head alone on features of the backbone as it is.

    Raises:
        NonFiniteLoss: names the step and the learning rate.
    """
    train = trial.setup.train
    features = torch.from_numpy(trial.features(train)).to(trial.device)
    probe.fit_head(
        trial.network.head,
        features,
        torch.from_numpy(train.labels).to(trial.device),
        recipe,
        loss=trial.loss(recipe),
        seed=trial.job.config.seed,
        weights=torch.from_numpy(train.loss_weights()).to(trial.device),
    )


def after_epoch(
    trial: Trial, epoch: int, scored: Scored, train_loss: float, *, keep: bool = True
) -> bool:
    """Record an epoch, keep its weights unless that is left to others, and ask whether to go on.

    The latest epoch counts, not the best: the schedule ends low, and picking the luckiest of many
    epochs on a small validation part is mostly picking noise.

    Raises:
        NonFiniteLoss: the score or the log-loss is no number.
    """
    if not scored.finite:
        raise NonFiniteLoss(f"non_finite_score after epoch {epoch} (score={scored.score})")
    if keep:
        checkpoint.save_scored(trial.folder, trial.network)
    elapsed = time.monotonic() - trial.began
    trial.state = replace(
        trial.state,
        epoch=epoch,
        scores=(*trial.state.scores, scored.score),
        loss=scored.loss,
        seconds=trial.state.seconds + elapsed,
    )
    trial.began += elapsed
    report = Report(
        trial.job.number,
        epoch,
        scored.score,
        scored.loss,
        train_loss,
        trial.state.seconds,
        trial.micro_batch,
        trial.note,
        trial.epochs,
    )
    checkpoint.append_curve(trial.folder, report)
    wanted = trial.report(report)
    return epoch >= trial.epochs or (wanted and time.time() < trial.job.deadline)


def outcome_of(trial: Trial, status: Status, error: str = "") -> Outcome:
    """Return how a trial ended; one that finished no epoch has failed."""
    state = trial.state
    usable = status != "failed"
    return Outcome(
        number=trial.job.number,
        status=status if state.scores else "failed",
        scores=state.scores,
        score=state.scores[-1] if usable and state.scores else None,
        loss=state.loss if usable else None,
        seconds=state.seconds + time.monotonic() - trial.began,
        error=error or ("" if state.scores else "no epoch was finished before the deadline"),
    )
