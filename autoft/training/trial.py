"""One trial, top to bottom: build, warm the head, train epoch by epoch, score, keep what scored.

Read `train_trials` first. Strategies that never thaw a stage train their heads together, on
features that they share (`together.py`); every other trial starts from a head that was fitted the
same way (Kumar et al. 2022: a random head distorts good features), then trains what the strategy
thaws (`tune.py`), or in step with others that freeze the same stages (`lockstep.py`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

import torch

from autoft.network.adapters import adapt
from autoft.network.assemble import assemble
from autoft.network.build import build
from autoft.network.strategy import bind
from autoft.space import check_choices, read_signature
from autoft.training import checkpoint, recipe
from autoft.training.features import fingerprint
from autoft.training.job import Outcome, Reporter, Setup, TrialJob
from autoft.training.lockstep import Member, tune_together
from autoft.training.packs.train import in_words
from autoft.training.precision import memory_format
from autoft.training.probe import NonFiniteLoss
from autoft.training.together import failure, train_heads
from autoft.training.tune import tune
from autoft.training.underway import Built, Trial, begin_at_prior, new_trial, outcome_of

FEW_STAGES = 4  # of a network that is not built yet, to see whether a strategy thaws any


def train_trial(setup: Setup, job: TrialJob, report: Reporter) -> Outcome:
    """Train one trial and return how it ended."""
    (outcome,) = train_trials(setup, (job,), report)
    return outcome


def train_trials(
    setup: Setup, jobs: Sequence[TrialJob], report: Reporter, *, keep: int | None = None
) -> list[Outcome]:
    """Train trials and return how each ended; heads that fit together are trained together.

    Of heads trained together the weights of the best `keep` are written (None: of all), and those
    of the first. Whatever a plugin does wrong in a trial is that trial's failure.
    """
    most = len(jobs) if keep is None else keep
    ended: dict[int, Outcome] = {}
    for members in _alike(jobs):
        try:
            held_out = setup.holding_out(members[0].fold)
            for outcome in _train(held_out, members, report, most):
                ended[outcome.number] = outcome
        except BaseException as error:  # noqa: BLE001 - plugins may raise anything at all
            late = (job for job in members if job.number not in ended)
            ended |= {job.number: failure(job, error) for job in late}
    return [ended[job.number] for job in jobs]


def _alike(jobs: Sequence[TrialJob]) -> list[list[TrialJob]]:
    """Return the jobs in groups that can begin with the same backbone."""
    starts: dict[str, Hashable] = {}
    groups: dict[Hashable, list[TrialJob]] = {}
    for job in jobs:
        part, config = repr(job.config.strategy), job.config
        if part not in starts:  # a strategy is asked about many moments
            starts[part] = _start_of(job)
        alike: Hashable = "in step" if _is_live(job) else job.number
        if (begins := starts[part]) is not None:
            alike = config.backbone.name, begins, config.seed, job.precision, job.epochs, job.fold
        groups.setdefault(alike, []).append(job)
    return list(groups.values())


def _is_live(job: TrialJob) -> bool:
    return job.sharing is not None and job.sharing.mode == "live"


def _start_of(job: TrialJob) -> Hashable:
    """Return what its strategy makes of a backbone; None where it thaws any, or is broken."""
    part = job.config.strategy
    try:
        strategy = bind(part, FEW_STAGES)
        if strategy.trains_backbone():
            return None
    except BaseException as error:  # noqa: BLE001 - a plugin; it fails again where that is told
        failure(job, error)
        return None
    return repr(part) if strategy.adapter else strategy.pretrained


def _train(
    setup: Setup, jobs: Sequence[TrialJob], report: Reporter, keep: int
) -> Iterator[Outcome]:
    """Train heads together, or by itself each trial whose strategy thaws a stage after all."""
    if len(jobs) > 1 and _is_live(jobs[0]):
        yield from _train_in_step(setup, jobs, report)
        return
    began = time.monotonic()
    built = begin(setup, jobs[0])
    count = len(built.backbone.stages)
    parts = {repr(job.config.strategy): job.config.strategy for job in jobs}
    if not any(bind(part, count).trains_backbone() for part in parts.values()):
        yield from train_heads(setup, jobs, built, report, keep=keep, began=began)
        return
    yield _tune(setup, jobs[0], built, report, began)
    for job in jobs[1:]:
        began = time.monotonic()
        yield _tune(setup, job, begin(setup, job), report, began)


def _train_in_step(setup: Setup, jobs: Sequence[TrialJob], report: Reporter) -> Iterator[Outcome]:
    """Train trials that take their steps together, then by itself each that cannot."""
    began, trials = time.monotonic(), list[Member]()
    for job in jobs:
        try:
            trials.append(Member.of(_started(setup, job, begin(setup, job), report, began)))
        except BaseException as error:  # noqa: BLE001 - plugins may raise anything at all
            yield failure(job, error)
    ended, why = _in_step(trials, began)
    yield from ended
    done = {outcome.number for outcome in ended}
    left = [each.trial.job for each in trials if each.trial.job.number not in done]
    del trials
    gc.collect()  # networks and their graphs hold each other
    for job in left:
        alone, began = replace(job, sharing=None, together=1), time.monotonic()
        try:
            yield _tune(setup, alone, begin(setup, alone), report, began, note=why)
        except BaseException as error:  # noqa: BLE001 - as above
            yield failure(job, error)


def _in_step(trials: Sequence[Member], began: float) -> tuple[list[Outcome], str]:
    """Return how those ended that could take their steps together; none and why if that failed."""
    try:
        return tune_together(trials, began), ""
    except Exception as error:  # noqa: BLE001 - of plugins, or of memory: the user is told of it
        return [], f"it is trained by itself, in step with others it failed ({in_words(error)})"


def begin(setup: Setup, job: TrialJob) -> Built:
    """Return the backbone of `job` as trials begin with it."""
    config = job.config
    torch.manual_seed(config.seed)
    source = setup.sources[config.backbone.name]
    strategy = bind(config.strategy, 1)
    backbone = build(source, pretrained=strategy.pretrained, image_size=setup.image_size)
    strategy = replace(strategy, num_stages=len(backbone.stages))
    # Adapters draw random numbers, by which the same backbone would not be known again.
    as_built = fingerprint(backbone.module, setup) if strategy.adapter else ""
    backbone = adapt(backbone, strategy, image_size=setup.image_size)
    return Built(backbone, strategy, strategy.pretrained and source.pretrained, as_built)


def _tune(
    setup: Setup, job: TrialJob, built: Built, report: Reporter, began: float, note: str = ""
) -> Outcome:
    """Train one trial that trains its backbone by itself; the user is told its `note`."""
    trial = _started(setup, job, built, report, began)
    trial.note = note
    try:
        outcome = outcome_of(trial, tune(trial))
    except NonFiniteLoss as error:
        outcome = outcome_of(trial, "failed", str(error))
    checkpoint.finish(trial.folder, outcome)
    return outcome


def _started(setup: Setup, job: TrialJob, built: Built, report: Reporter, began: float) -> Trial:
    trial = prepare(setup, job, built, report, began)
    checkpoint.start(trial.folder, job, pretrained=trial.pretrained)
    return trial


def prepare(setup: Setup, job: TrialJob, built: Built, report: Reporter, began: float) -> Trial:
    """Return the trial of `job`, which trains its backbone, ready to begin."""
    config = job.config
    check_choices("The recipe", read_signature(recipe.tuning), config.train)
    how = recipe.tuning(**config.train)  # type: ignore[arg-type]  # checked just above
    network = assemble(built.backbone, config.head, len(setup.classes), how.pool, setup.image_size)
    begin_at_prior(setup, network.head, how)
    network.to(setup.device).to(memory_format=memory_format(job.precision))
    if job.precision.compiled:
        network.compile()
    return new_trial(setup, job, built, network, how, report, began)
