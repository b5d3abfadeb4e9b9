"""The same configurations with what autoft shares and without, and how many views are enough."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from given import CPU, UPRIGHT, Given, Task, open_task, own_cache, scored
from lines import Row
from numpy.typing import NDArray
from plain_optuna import train_head
from quality_table import paired_difference

from autoft.data.views import evaluation_batches
from autoft.network.strategy import bind
from autoft.search.finish import load_trial
from autoft.training.evaluate import EVALUATION_BATCH, logits_of
from autoft.training.job import Outcome, Precision, Ranked, Report, Setup, Sharing, TrialJob
from autoft.training.metrics import predict
from autoft.training.noted import noted_sharing
from autoft.training.rank import rank_backbone
from autoft.training.trial import train_trial
from autoft.values import Part, TrialConfig, TrialResult, Value

HOUR = 3600.0
LIST_EPOCHS, ROUNDS, VIEW_EPOCHS = 8, 4, 8
LIST_SIZE = 128  # pixels
Train = Callable[[Setup, TrialJob, Callable[[Report], bool]], Outcome]

DEEP: dict[str, Value] = {"depth": 0.75}
# What shares nothing is the same on both sides and is left out.
LIST: tuple[tuple[Part, Part, dict[str, Value]], ...] = (
    (Part("head_only"), Part("linear"), {}),
    (Part("head_only"), Part("mlp"), {"head_lr": 1e-3}),
    (Part("freeze", DEEP), Part("linear"), {"lr": 1e-4}),
    (Part("freeze", DEEP), Part("linear"), {"lr": 5e-4, "smoothing": 0.1}),
)


def same_trials(given: Given, dataset: str, seed: int, folder: Path) -> Row:
    """Train the list twice: as autoft shares, and running every frozen part again in each step.

    The best of each by validation is what a search would return. All are scored on the test part:
    the mean says more of sharing than which of few is chosen. A head alone is trained by a plain
    loop in the second, for as many epochs as any other trial. Seconds are the processor's.
    """
    told: Row = {}
    for kind in ("shared", "rerun"):
        place = folder / kind
        with own_cache(place / "cache"):
            task = open_task(given, dataset, seed, place, LIST_SIZE)
            ranked = _measured(task, given.backbone)
            told[kind] = _best_of_list(task, ranked, dataset, seed, shared=kind == "shared")
            told |= {"n": told[kind]["n"], "split": task.split}
    shared, rerun = told["shared"]["right"], told["rerun"]["right"]
    return told | {"difference": paired_difference(shared, rerun), "backbone": given.backbone}


def _measured(task: Task, label: str) -> Ranked:
    """Measure a backbone, off the clock."""
    ranked = rank_backbone(task.setup, label, lambda *_: None)
    if ranked.error:
        raise RuntimeError(ranked.error)
    return ranked


def _best_of_list(task: Task, ranked: Ranked, dataset: str, seed: int, *, shared: bool) -> Row:
    results, modes, seconds = list[TrialResult](), list[str](), 0.0
    for number, (strategy, head, answers) in enumerate(LIST):
        tunes = strategy.name != "head_only"
        how = answers | ({"augment": _augment(dataset)} if tunes else {})
        config = TrialConfig(Part(ranked.label), strategy, head, how, seed=seed)
        job = TrialJob(
            number,
            config,
            LIST_EPOCHS if tunes else ROUNDS if shared else LIST_EPOCHS,
            time.time() + HOUR,
            ranked.precision,
            costs=ranked.costs,
            sharing=None if shared else Sharing("rerun"),
        )
        train: Train = train_trial if tunes or shared else train_head
        began = time.process_time()
        results.append(_result(config, train(task.setup, job, lambda _: True)))
        seconds += time.process_time() - began
        known = noted_sharing(task.setup.folder / "trials" / f"{number:04d}")
        modes.append(f"{known.mode} {known.views}" if known and tunes else "head")
    usable = [each for each in results if each.score is not None]
    best = max(usable, key=lambda each: (each.score, -(each.loss or 0.0)))
    predicted = {each.number: _predicted(task, each) for each in usable}
    labels = task.test.labels
    return scored(task, predicted[best.number]) | {
        "validation": best.score,
        "chosen": best.number,
        "scores": [each.score for each in results],
        "tests": [float((each == labels).mean()) for each in predicted.values()],
        "modes": modes,
        "seconds": round(seconds, 1),
    }


def _augment(dataset: str) -> str:
    return "crop" if dataset in UPRIGHT else "crop_flip"


def _result(config: TrialConfig, outcome: Outcome) -> TrialResult:
    return TrialResult(
        outcome.number, config, outcome.status, outcome.scores, outcome.score, outcome.loss
    )


def _predicted(task: Task, result: TrialResult) -> NDArray[np.int64]:
    network, backbone = load_trial(task.setup, result)
    pre = task.setup.preprocess(backbone)
    batches = evaluation_batches(task.setup.store, task.test.rows, pre, EVALUATION_BATCH)
    return predict(logits_of(network, batches, CPU, Precision(channels_last=True)))


def views(given: Given, spec: Row, folder: Path) -> Row:
    """Train one tail on `spec["views"]` kept views of each image; 0: on new ones every epoch.

    With `spec["mix"]` these are mixed: "mixup" images, "manifold" what is kept of them.
    The seconds, of the processor, hold the pass that fills what is kept.
    """
    with own_cache(folder / "cache"):
        task = open_task(given, spec["dataset"], spec["seed"], folder)
        ranked = _measured(task, spec["backbone"])
        strategy = Part("freeze", {"depth": spec["depth"]})
        cut = bind(strategy, ranked.num_stages).frozen_prefix()
        kept = spec["views"]
        sharing = Sharing("disk", cut, kept) if kept else Sharing("rerun", cut, 0)
        how: dict[str, Value] = {"augment": _augment(spec["dataset"]), "mix": spec["mix"]}
        config = TrialConfig(Part(ranked.label), strategy, Part("linear"), how, seed=spec["seed"])
        deadline = time.time() + HOUR
        job = TrialJob(
            0, config, VIEW_EPOCHS, deadline, ranked.precision, costs=ranked.costs, sharing=sharing
        )
        began = time.process_time()
        outcome = train_trial(task.setup, job, lambda _: True)
        seconds = time.process_time() - began
        if outcome.score is None:
            return {"error": outcome.error}
        told = scored(task, _predicted(task, _result(config, outcome)))
    return told | {
        "validation": outcome.score,
        "loss": outcome.loss,
        "scores": list(outcome.scores),
        "seconds": round(seconds, 1),
        "cut": cut,
        "stages": ranked.num_stages,
    }
