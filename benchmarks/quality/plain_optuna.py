"""Plain Optuna, TPE and successive halving, over the space of a search, by a plain loop.

Backbones, ranges and conditions are those of autoft. What is missing is all sharing: a trial
that freezes stages runs them again in every step, one that trains the head alone runs the frozen
network in every epoch, one trial after the other, each with an empty cache.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from given import CPU, Given, Task, open_task, own_cache, scored
from lines import Row

from autoft.data.views import evaluation_batches, training_batches
from autoft.network.assemble import Network, assemble
from autoft.network.build import build
from autoft.network.heads import prior_bias
from autoft.search import prepare
from autoft.search.configs import Space
from autoft.search.engines.tasks import describe
from autoft.search.finish import load_trial
from autoft.search.settings import Settings
from autoft.space import Choice, Int, Range
from autoft.training import checkpoint, recipe
from autoft.training.evaluate import EVALUATION_BATCH, evaluate, logits_of
from autoft.training.job import Outcome, Precision, Ranked, Report, Setup, Sharing, TrialJob
from autoft.training.losses import log_prior, make_loss
from autoft.training.metrics import predict
from autoft.training.optim import schedule
from autoft.training.precision import autocast, memory_format, place
from autoft.training.rank import mirroring_keeps_labels, rank_backbone
from autoft.training.trial import train_trial
from autoft.training.underway import class_counts
from autoft.values import Backbone, TrialConfig, TrialResult, Value

if TYPE_CHECKING:
    import optuna

MAX_EPOCHS, LEAST_EPOCHS = 20, 3
SHARE = 0.25  # of the time is what a trial that is not pruned may take; twice that for the least
REDUCTION = 3

Goes = Callable[[Report], bool]


@dataclass
class Plain:
    """A study while it runs: the task, its space, what was measured, and what was best."""

    task: Task
    space: Space
    ranked: Mapping[str, Ranked]
    seconds: float
    seed: int
    began: float = 0.0
    best: TrialResult | None = None
    top: float = -1.0
    curve: list[list[float]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def spent(self) -> float:
        """Return the seconds since the clock started."""
        return time.monotonic() - self.began

    @property
    def deadline(self) -> float:
        """Return the wall-clock time at which it ends."""
        return time.time() + self.seconds - self.spent

    def note(self, score: float) -> None:
        """Note a score in the curve of the best so far."""
        if score > self.top:
            self.top = score
            self.curve.append([round(self.spent, 1), score])


def plain_optuna(given: Given, dataset: str, seed: int, folder: Path) -> Row:
    """Return what plain Optuna reaches in the time, and its curve of the best score so far.

    Decoding, ranking the backbones and judging whether mirroring keeps labels are not on its
    clock: it is given the backbones and augmentations that a search would find out for itself.
    """
    with own_cache(folder / "cache"):
        task = open_task(given, dataset, seed, folder)
        space, ranked = space_of(task.setup)
    plain = Plain(task, space, ranked, given.seconds, seed, time.monotonic())
    _search(plain, folder)
    if plain.best is None:
        return {"error": f"none of {sum(plain.counts.values())} trials was finished in time"}
    seconds, best = plain.spent, plain.best
    network, backbone = load_trial(task.setup, best)
    pre = task.setup.preprocess(backbone)
    batches = evaluation_batches(task.setup.store, task.test.rows, pre, EVALUATION_BATCH)
    logits = logits_of(network, batches, CPU, Precision(channels_last=True))
    config = best.config
    return scored(task, predict(logits)) | {
        "validation": best.score,
        "seconds": round(seconds, 1),
        "chosen": f"{config.backbone.name}, {config.strategy.name}, {config.head.name}",
        "answers": config.answers(),
        "trials": plain.counts,
        "curve": plain.curve,
        "image_size": task.setup.image_size,
    }


def space_of(setup: Setup) -> tuple[Space, dict[str, Ranked]]:
    """Return the space as a search builds it for weights of photographs, and what it measured."""
    asked = Settings(dataset="-")
    names = prepare.names(asked)
    measured = [rank_backbone(setup, label, lambda *_: None) for label in setup.sources]
    usable = sorted((each for each in measured if not each.error), key=lambda r: -r.probe)
    near = [each for each in usable if each.probe >= usable[0].probe - prepare.BEHIND]
    keeps = mirroring_keeps_labels(setup, near[0])
    counts = np.bincount(setup.train.labels)
    augments = recipe.AUGMENTS if keeps else recipe.UPRIGHT
    imbalance = float(counts.max() / counts[counts > 0].min())
    space = prepare.narrowed(describe(names).space, asked, setup, near, imbalance, augments)
    return space, {each.label: each for each in near}


def _search(plain: Plain, folder: Path) -> None:
    """Ask, train and tell until the time is over."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=plain.seed),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION),
    )
    while plain.spent < plain.seconds:
        asked = study.ask()

        def ask(name: str, range_: Range, _: Value, trial: optuna.trial.Trial = asked) -> Value:
            return _suggest(trial, name, range_)

        config = plain.space.configure(ask, plain.seed * 100_003 + asked.number)
        outcome = _trained(plain, asked, config, folder)
        plain.counts[outcome.status] = plain.counts.get(outcome.status, 0) + 1
        if outcome.status == "done" and outcome.score is not None:
            study.tell(asked, outcome.score)
        else:
            states = optuna.trial.TrialState
            study.tell(asked, state=states.PRUNED if outcome.scores else states.FAIL)
        _keep_best(plain, config, outcome)


def _suggest(trial: optuna.trial.Trial, name: str, range_: Range) -> Value:
    if isinstance(range_, Choice):
        return trial.suggest_categorical(name, range_.options)
    if isinstance(range_, Int):
        return trial.suggest_int(name, range_.low, range_.high, log=range_.log)
    return trial.suggest_float(name, range_.low, range_.high, log=range_.log)


def _trained(
    plain: Plain, asked: optuna.trial.Trial, config: TrialConfig, folder: Path
) -> Outcome:
    """Train one trial by itself; whatever it fails of, the study goes on."""

    def report(told: Report) -> bool:
        asked.report(told.score, told.epoch)
        plain.note(told.score)
        return not asked.should_prune()

    trains = plain.space.strategies[config.strategy.name].trains_backbone
    ranked = plain.ranked[config.backbone.name]
    setup = plain.task.setup
    epochs = planned_epochs(plain.seconds, epoch_seconds(ranked, setup, trains=trains))
    job = TrialJob(
        asked.number, config, epochs, plain.deadline, ranked.precision, sharing=Sharing("rerun")
    )
    own = folder / "trial-cache"  # what one trial keeps is nothing to the next
    train = train_trial if trains else train_head
    try:
        with own_cache(own):
            return train(setup, job, report)
    except Exception as error:  # noqa: BLE001 - one trial must not end the others
        return Outcome(asked.number, "failed", error=f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(own, ignore_errors=True)


def epoch_seconds(ranked: Ranked, setup: Setup, *, trains: bool) -> float:
    """Return what an epoch takes at the measured speeds: trained whole, or forward alone."""
    speed = ranked.trained_per_second if trains else ranked.images_per_second
    return len(setup.train) / speed + len(setup.validation) / ranked.images_per_second


def planned_epochs(seconds: float, each: float) -> int:
    """Return the epochs of a trial: a quarter of the time, up to half of it to reach three."""
    affordable = int(SHARE * seconds / each)
    stretched = min(LEAST_EPOCHS, int(2 * SHARE * seconds / each))
    return max(1, min(MAX_EPOCHS, max(affordable, stretched)))


def _keep_best(plain: Plain, config: TrialConfig, outcome: Outcome) -> None:
    """Remember the best trial by validation; drop the weights of all others."""
    result = TrialResult(
        outcome.number,
        config,
        outcome.status,
        outcome.scores,
        outcome.score,
        outcome.loss,
        outcome.seconds,
        outcome.error,
    )
    loser: TrialResult | None = result
    if outcome.score is not None and (plain.best is None or _merit(result) > _merit(plain.best)):
        loser, plain.best = plain.best, result
    if loser is not None:
        trials = plain.task.setup.folder / "trials"
        shutil.rmtree(trials / f"{loser.number:04d}", ignore_errors=True)


def _merit(result: TrialResult) -> tuple[float, float]:
    return result.score or 0.0, -(result.loss if result.loss is not None else np.inf)


# --- the head alone, as a plain loop trains it ---------------------------------------------------


def train_head(setup: Setup, job: TrialJob, report: Goes) -> Outcome:
    """Train the head of `job` on a frozen network that is run again in every epoch."""
    config = job.config
    torch.manual_seed(config.seed)
    how = recipe.probing(**config.train)  # type: ignore[arg-type]  # answers of its own ranges
    backbone = build(setup.sources[config.backbone.name], image_size=setup.image_size)
    network = assemble(backbone, config.head, len(setup.classes), how.pool, setup.image_size)
    if how.balance in ("none", "focal"):
        prior_bias(network.head, log_prior(class_counts(setup)))
    network.to(memory_format=memory_format(job.precision))
    network.set_rates([0.0] * network.num_stages, norm_mode="frozen")
    folder = setup.folder / "trials" / f"{job.number:04d}"
    checkpoint.start(folder, job, pretrained=True)
    decay = [p for p in network.head.parameters() if p.ndim > 1]
    rest = [p for p in network.head.parameters() if p.ndim <= 1]
    groups = [{"params": decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], weight_decay=how.weight_decay
    )
    began, scores, loss = time.monotonic(), list[float](), None
    for epoch in range(job.epochs):
        if not _head_epoch(setup, job, network, backbone, optimizer, how, epoch):
            break
        found = evaluate(
            network, setup, setup.validation, setup.preprocess(backbone), job.precision
        )
        checkpoint.save_scored(folder, network)
        scores.append(found.score)
        loss = found.loss
        elapsed = time.monotonic() - began
        goes = report(Report(job.number, epoch + 1, found.score, found.loss, 0.0, elapsed))
        if not goes or not found.finite:
            break
    whole = len(scores) == job.epochs
    status = "done" if whole else "stopped" if scores else "failed"
    score = scores[-1] if scores else None
    return Outcome(job.number, status, tuple(scores), score, loss, time.monotonic() - began)


def _head_epoch(
    setup: Setup,
    job: TrialJob,
    network: Network,
    backbone: Backbone,
    optimizer: torch.optim.Optimizer,
    how: recipe.Recipe,
    epoch: int,
) -> bool:
    """Train one epoch; return False where the deadline fell."""
    counts = torch.from_numpy(class_counts(setup)).float()
    loss = make_loss(how.balance, how.smoothing, counts)
    train = setup.train
    batches = training_batches(
        setup.store,
        train.rows,
        train.labels,
        setup.preprocess(backbone),
        num_classes=len(setup.classes),
        weights=train.loss_weights(),
        augment="none",
        mix="none",
        batch_size=how.batch_size,
        seed=job.config.seed,
        epoch=epoch,
    )
    steps = -(-len(train) // how.batch_size)
    network.train()
    for step, batch in enumerate(batches):
        if time.time() > job.deadline:
            batches.close()
            return False
        for group in optimizer.param_groups:
            progress = (epoch + step / steps) / job.epochs
            group["lr"] = how.head_lr * schedule(how.schedule, progress)
        with torch.no_grad(), autocast(job.precision, CPU):
            features = network.features(place(batch.images, job.precision, CPU))
        value = loss(network.head(features.float()), batch.targets, batch.weights)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
    return True
