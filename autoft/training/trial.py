"""One trial, top to bottom: build, warm the head, train epoch by epoch, score, keep what scored.

Read `train_trial` first. A strategy that never thaws a stage trains its head on cached features;
every other trial starts from a head that was fitted the same way (Kumar et al. 2022: a random head
distorts good features), then trains what the strategy thaws (`tune.py`).
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from autoft.network.adapters import adapt
from autoft.network.assemble import assemble
from autoft.network.build import build
from autoft.network.heads import prior_bias
from autoft.network.strategy import BoundStrategy, bind
from autoft.space import check_choices, read_signature
from autoft.training import checkpoint, recipe
from autoft.training.evaluate import score_logits
from autoft.training.features import fingerprint
from autoft.training.job import Outcome, Reporter, Setup, TrialJob
from autoft.training.losses import log_prior
from autoft.training.precision import memory_format
from autoft.training.probe import NonFiniteLoss
from autoft.training.tune import tune
from autoft.training.underway import Trial, after_epoch, class_counts, fit_head
from autoft.values import Status


def train_trial(setup: Setup, job: TrialJob, report: Reporter) -> Outcome:
    """Train one trial and return how it ended.

    Raises:
        AutoftError: a plugin of the configuration is missing, broken or misused.
    """
    trial = _prepare(setup, job, report)
    checkpoint.start(trial.folder, job, pretrained=trial.pretrained)
    try:
        status = tune(trial) if trial.strategy.trains_backbone() else _probe(trial)
    except NonFiniteLoss as error:
        outcome = _outcome(trial, "failed", str(error))
    else:
        outcome = _outcome(trial, status)
    checkpoint.finish(trial.folder, outcome)
    return outcome


def _prepare(setup: Setup, job: TrialJob, report: Reporter) -> Trial:
    config = job.config
    torch.manual_seed(config.seed)
    source = setup.sources[config.backbone.name]
    strategy = bind(config.strategy, 1)
    backbone = build(source, pretrained=strategy.pretrained, image_size=setup.image_size)
    strategy = replace(strategy, num_stages=len(backbone.stages))
    how = _recipe(strategy, job)
    # Adapters draw random numbers, by which the same backbone would not be known again.
    as_built = fingerprint(backbone.module, setup) if strategy.adapter else ""
    backbone = adapt(backbone, strategy, image_size=setup.image_size)
    network = assemble(backbone, config.head, len(setup.classes), how.pool, setup.image_size)
    if how.balance in ("none", "focal"):  # the others teach scores that the prior has no part in
        prior_bias(network.head, log_prior(class_counts(setup)))
    network.to(setup.device).to(memory_format=memory_format(job.precision))
    if job.precision.compiled:
        network.compile()
    return Trial(
        setup=setup,
        job=job,
        folder=setup.folder / "trials" / f"{job.number:04d}",
        backbone=backbone,
        network=network,
        strategy=strategy,
        recipe=how,
        report=report,
        state=checkpoint.State(),
        pretrained=strategy.pretrained and source.pretrained,
        fingerprint=as_built,
        began=time.monotonic(),
    )


def _recipe(strategy: BoundStrategy, job: TrialJob) -> recipe.Recipe:
    make = recipe.tuning if strategy.trains_backbone() else recipe.probing
    check_choices("The recipe", read_signature(make), job.config.train)
    return make(**job.config.train)  # type: ignore[arg-type]  # checked just above


def _probe(trial: Trial) -> Status:
    """Train the head on features of the frozen backbone, scoring after every round."""
    trial.network.set_rates([0.0] * trial.network.num_stages, norm_mode="frozen")
    head, held_out = trial.network.head, trial.setup.validation
    features = torch.from_numpy(trial.features(held_out)).to(trial.device)
    goes_on = True

    def after_round(index: int, train_loss: float) -> bool:
        nonlocal goes_on
        head.eval()
        with torch.inference_mode():
            logits = head(features).float().cpu().numpy()
        head.train()
        scored = score_logits(trial.setup.metric, held_out.labels, logits)
        goes_on = after_epoch(trial, index, scored, train_loss)
        return goes_on

    fit_head(trial, trial.recipe, rounds=trial.job.epochs, after_round=after_round)
    return "done" if goes_on else "stopped"


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
