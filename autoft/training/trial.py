"""One trial, top to bottom: build, warm the head, train epoch by epoch, score, keep what scored.

Read `train_trial` first. A strategy that never thaws a stage trains its head on cached features;
every other trial starts from a head that was fitted the same way (Kumar et al. 2022: a random head
distorts good features), then trains what the strategy thaws.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoft import plugins
from autoft.data.views import Batch, training_batches
from autoft.errors import PluginError
from autoft.network.assemble import Network
from autoft.network.build import build
from autoft.network.strategy import BoundStrategy, bind
from autoft.space import check_choices, read_signature
from autoft.training import checkpoint, probe, recipe
from autoft.training.evaluate import Scored, evaluate, score_logits
from autoft.training.features import fingerprint, pooled_features
from autoft.training.job import Images, Outcome, Report, Reporter, Setup, TrialJob
from autoft.training.losses import weighted_cross_entropy
from autoft.training.optim import make_optimizer, set_learning_rates
from autoft.training.precision import autocast, memory_format, place
from autoft.training.probe import NonFiniteLoss
from autoft.values import Backbone, NormMode, Part, Preprocess, Status

CLIP = 1.0


@dataclass
class Trial:
    """Everything that one trial holds while it runs."""

    setup: Setup
    job: TrialJob
    folder: Path
    backbone: Backbone
    network: Network
    strategy: BoundStrategy
    recipe: recipe.Recipe
    report: Reporter
    state: checkpoint.State
    pretrained: bool
    began: float

    @property
    def device(self) -> torch.device:
        """Return the device that the trial runs on."""
        return torch.device(self.setup.device)

    @property
    def pre(self) -> Preprocess:
        """Return how an image becomes the network's input."""
        return self.setup.preprocess(self.backbone)


def train_trial(setup: Setup, job: TrialJob, report: Reporter) -> Outcome:
    """Train one trial and return how it ended.

    Raises:
        AutoftError: a plugin of the configuration is missing, broken or misused.
    """
    trial = _assemble(setup, job, report)
    checkpoint.start(trial.folder, job)
    try:
        status = _tune(trial) if trial.strategy.trains_backbone() else _probe(trial)
    except NonFiniteLoss as error:
        outcome = _outcome(trial, "failed", str(error))
    else:
        outcome = _outcome(trial, status)
    checkpoint.finish(trial.folder, outcome)
    return outcome


def _assemble(setup: Setup, job: TrialJob, report: Reporter) -> Trial:
    torch.manual_seed(job.config.seed)
    source = setup.sources[job.config.backbone.name]
    strategy = bind(job.config.strategy, 1)
    backbone = build(source, pretrained=strategy.pretrained, image_size=setup.image_size)
    head = build_head(job.config.head, backbone.num_features, len(setup.classes))
    network = Network(backbone, head).to(setup.device)
    network.to(memory_format=memory_format(job.precision))
    strategy = replace(strategy, num_stages=network.num_stages)
    recipe_of = recipe.tuning if strategy.trains_backbone() else recipe.probing
    check_choices("The recipe", read_signature(recipe_of), job.config.train)
    return Trial(
        setup=setup,
        job=job,
        folder=setup.folder / "trials" / f"{job.number:04d}",
        backbone=backbone,
        network=network,
        strategy=strategy,
        recipe=recipe_of(**job.config.train),  # type: ignore[arg-type]  # checked just above
        report=report,
        state=checkpoint.State(),
        pretrained=strategy.pretrained and source.pretrained,
        began=time.monotonic(),
    )


def build_head(part: Part, num_features: int, num_classes: int) -> nn.Module:
    """Build the head of `part`.

    Raises:
        PluginError: it is missing, broken, or returns no module.
        UsageError: a choice is unknown or out of range.
    """
    function = plugins.load("head", part.name)
    check_choices(f"The head '{part.name}'", read_signature(function), part.params)
    head = function(num_features, num_classes, **part.params)
    if not isinstance(head, nn.Module):
        raise PluginError(
            f"The head '{part.name}' returned a {type(head).__name__}; a torch.nn.Module was "
            f"expected."
        )
    return head


# --- a head alone, on cached features -----------------------------------------------------------


def _probe(trial: Trial) -> Status:
    """Train the head on features of the frozen backbone, scoring after every round."""
    trial.network.set_rates(trial.strategy.rates(0.0), norm_mode="frozen")
    network = fingerprint(trial.network.backbone, trial.setup)
    held_out = torch.from_numpy(_features(trial, trial.setup.validation, network))
    held_out = held_out.to(trial.device)
    labels = trial.setup.validation.labels
    goes_on = True

    def after_round(index: int, train_loss: float) -> bool:
        nonlocal goes_on
        trial.network.head.eval()
        with torch.inference_mode():
            logits = trial.network.head(held_out).float().cpu().numpy()
        trial.network.head.train()
        scored = score_logits(trial.setup.metric, labels, logits)
        goes_on = _after_epoch(trial, index, scored, train_loss)
        return goes_on

    _fit_head(trial, trial.recipe, network, rounds=trial.job.epochs, after_round=after_round)
    return "done" if goes_on else "stopped"


def _fit_head(
    trial: Trial,
    how: recipe.Recipe,
    network: str,
    *,
    rounds: int = 1,
    after_round: probe.AfterRound | None = None,
) -> None:
    features = torch.from_numpy(_features(trial, trial.setup.train, network)).to(trial.device)
    labels = torch.from_numpy(trial.setup.train.labels).to(trial.device)
    weights = torch.from_numpy(trial.setup.train.loss_weights()).to(trial.device)
    probe.fit_head(
        trial.network.head,
        features,
        labels,
        how,
        seed=trial.job.config.seed,
        weights=weights,
        rounds=rounds,
        after_round=after_round,
    )


def _features(trial: Trial, part: Images, network: str) -> np.ndarray:
    """Return the features of `part`; `network` is the fingerprint of the backbone as it is."""
    backbone, precision = trial.network.backbone, trial.job.precision
    return pooled_features(backbone, trial.setup, part, trial.pre, precision, network=network)


# --- backbone and head, epoch by epoch ----------------------------------------------------------


def _tune(trial: Trial) -> Status:
    """Train what the strategy thaws, from a fitted head, epoch by epoch."""
    optimizer = make_optimizer(trial.network, trial.recipe)
    trial.state = checkpoint.load_last(trial.folder, trial.network, optimizer)
    if trial.state.epoch == 0 and trial.pretrained:
        _fit_head(trial, recipe.probing(), fingerprint(trial.network.backbone, trial.setup))
    _apply_rates(trial, trial.state.epoch / trial.job.epochs)
    while trial.state.epoch < trial.job.epochs:
        train_loss = _epoch(trial, optimizer)
        if train_loss is None:
            return "stopped"
        scored = evaluate(
            trial.network, trial.setup, trial.setup.validation, trial.pre, trial.job.precision
        )
        if not _after_epoch(trial, trial.state.epoch + 1, scored, train_loss):
            return "stopped"
        checkpoint.save_last(trial.folder, trial.network, optimizer, trial.state)
    return "done"


def _epoch(trial: Trial, optimizer: torch.optim.Optimizer) -> float | None:
    """Train one epoch; return the mean loss, or None where the deadline fell."""
    epoch, seed = trial.state.epoch, trial.job.config.seed
    torch.manual_seed(seed * 1000 + epoch)  # dropout draws the same when a trial is resumed
    part, how = trial.setup.train, trial.recipe
    batches = training_batches(
        trial.setup.store,
        part.rows,
        part.labels,
        trial.pre,
        num_classes=len(trial.setup.classes),
        weights=part.loss_weights(),
        augment=how.augment,
        mix=how.mix,
        batch_size=how.batch_size,
        seed=seed,
        epoch=epoch,
    )
    steps = steps_per_epoch(len(part), how.batch_size)
    total = torch.zeros((), device=trial.device)
    trial.network.train()
    for step, batch in enumerate(batches):
        if time.time() > trial.job.deadline:
            batches.close()
            return None
        progress = (epoch + step / steps) / trial.job.epochs
        total += _step(trial, optimizer, batch, progress)
    return float(total) / steps


def _apply_rates(trial: Trial, progress: float) -> None:
    """Freeze and thaw as the strategy says; good pre-trained norm statistics stay as they are."""
    norm_mode: NormMode = "affine" if trial.pretrained else "train"
    trial.network.set_rates(trial.strategy.rates(progress), norm_mode=norm_mode)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the number of optimiser steps in an epoch; a last batch of one image is dropped."""
    whole, rest = divmod(images, batch_size)
    return max(1, whole + (rest > 1))


def _step(
    trial: Trial, optimizer: torch.optim.Optimizer, batch: Batch, progress: float
) -> torch.Tensor:
    """Take one optimiser step at `progress` in [0, 1) of the trial; return the loss."""
    network, how = trial.network, trial.recipe
    if trial.strategy.rates(progress) != network.rates:
        _apply_rates(trial, progress)
    set_learning_rates(optimizer, network, how, progress)
    with autocast(trial.job.precision, trial.device):
        logits = network(place(batch.images, trial.job.precision, trial.device))
    targets, weights = batch.targets.to(trial.device), batch.weights.to(trial.device)
    loss = weighted_cross_entropy(logits.float(), targets, weights, how.smoothing)
    if not torch.isfinite(loss):
        raise NonFiniteLoss(f"non_finite_loss at progress {progress:.2f} (lr={how.lr:g})")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    nn.utils.clip_grad_norm_(network.parameters(), CLIP)
    optimizer.step()
    return loss.detach()


# --- what follows every epoch, and the end ------------------------------------------------------


def _after_epoch(trial: Trial, epoch: int, scored: Scored, train_loss: float) -> bool:
    """Record an epoch, keep its weights, and ask whether to go on.

    The latest epoch counts, not the best: the schedule ends low, and picking the luckiest of many
    epochs on a small validation part is mostly picking noise.
    """
    if not scored.finite:
        raise NonFiniteLoss(f"non_finite_score after epoch {epoch} (score={scored.score})")
    checkpoint.save_scored(trial.folder, trial.network)
    elapsed = time.monotonic() - trial.began
    trial.state = checkpoint.State(
        epoch=epoch,
        scores=(*trial.state.scores, scored.score),
        loss=scored.loss,
        seconds=trial.state.seconds + elapsed,
    )
    trial.began += elapsed
    report = Report(
        trial.job.number, epoch, scored.score, scored.loss, train_loss, trial.state.seconds
    )
    checkpoint.append_curve(trial.folder, report)
    wanted = trial.report(report)
    return epoch >= trial.job.epochs or (wanted and time.time() < trial.job.deadline)


def _outcome(trial: Trial, status: Status, error: str = "") -> Outcome:
    state = trial.state
    usable = status != "failed"
    return Outcome(
        number=trial.job.number,
        status=status if state.scores or status == "failed" else "failed",
        scores=state.scores,
        score=state.scores[-1] if usable and state.scores else None,
        loss=state.loss if usable else None,
        seconds=state.seconds + time.monotonic() - trial.began,
        error=error or ("" if state.scores else "no epoch was finished before the deadline"),
    )
