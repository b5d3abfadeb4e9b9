"""Which trial next, for how long, and which goes on: the policy, told and asked by an engine.

An engine asks `next_job`, passes on every report and outcome, and stops when there is no job left.
The director alone writes the trials of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from autoft.search import halving
from autoft.search.budget import Budget
from autoft.search.configs import Space
from autoft.search.folder import RunFolder
from autoft.search.study import Study
from autoft.selection.winner import usable
from autoft.training.job import Outcome, Precision, Report, TrialJob
from autoft.values import TrialConfig, TrialResult, Value

KEPT = 3  # trials whose weights stay on the disk, beside the baseline
SAME_FAILURES = 3  # in a row end a search: the next would fail as well

Emit = Callable[..., None]


@dataclass
class Director:
    """The state of a search while it runs."""

    folder: RunFolder
    space: Space
    study: Study
    budget: Budget
    seed: int
    first: Iterable[Mapping[str, Value]]
    emit: Emit
    cancelled: bool = False
    results: list[TrialResult] = field(default_factory=list)
    _running: dict[int, TrialJob] = field(default_factory=dict)
    _unfinished: list[TrialJob] = field(default_factory=list)
    _reached: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    _tried: set[str] = field(default_factory=set)
    _next_number: int = 0
    _nothing_fits: bool = False

    def resume(self) -> None:
        """Take up what the run folder holds: finished trials, and those cut off."""
        self.results = self.folder.trials()
        self.budget.first = not self.results
        for result in self.results:
            self.study.tell(result)
            self._tried.add(_key(result.config))
            if self._trains_backbone(result.config):
                self._note_rungs(result)
                self.budget.plan(result.config.backbone.name, result.epochs)
        finished = {result.number for result in self.results}
        started = sorted(int(p.name) for p in (self.folder.path / "trials").iterdir())
        for number in started:
            data = self.folder.read_json(f"trials/{number:04d}/config.json")
            if number not in finished and data:
                config, epochs = TrialConfig.from_json(data["config"]), int(data["epochs"])
                self._take_up(
                    TrialJob(number, config, epochs, 0.0, Precision(**data["precision"]))
                )
        self._next_number = max([*finished, *started], default=-1) + 1
        self.first = iter(self.first)

    def _take_up(self, job: TrialJob) -> None:
        """Let a trial that was cut off be the next, where all its parts are still there."""
        number, config = job.number, job.config
        here = (
            config.backbone.name in self.space.backbones
            and config.strategy.name in self.space.strategies
            and config.head.name in self.space.heads
        )
        if not here:
            self.emit("note", text=f"Trial {number} was cut off and needs what is gone: left out.")
            return
        self._unfinished.append(job)

    def next_job(self) -> TrialJob | None:
        """Return the next trial, or None where nothing more fits into the budget."""
        running = len(self._running)
        if self.cancelled or not self.budget.allows_another(len(self.results) + running):
            return None
        if self._nothing_fits or self._keeps_failing():
            return None
        if self._unfinished:  # with the epochs and the format that its numbers depend on
            cut_off = self._unfinished.pop(0)
            number, config, epochs = cut_off.number, cut_off.config, cut_off.epochs
            return self._start(number, config, epochs, known=False, precision=cut_off.precision)
        for number, config, known in self._candidates():
            epochs = self.budget.epochs(config, self._trains_backbone(config))
            if epochs:
                return self._start(number, config, epochs, known=known)
        self._nothing_fits = True  # until a trial ends: an idle seat asks several times a second
        return None

    def on_report(self, report: Report) -> bool:
        """Learn the score after an epoch; tell whether the trial shall go on."""
        job = self._running[report.number]
        self.emit(
            "epoch",
            number=report.number,
            epoch=report.epoch,
            epochs=job.epochs,
            score=report.score,
            train_loss=report.train_loss,
        )
        if self.cancelled:
            return False
        if not self._trains_backbone(job.config) or report.epoch not in halving.rungs(job.epochs):
            return True
        reached = self._reached.setdefault((job.epochs, report.epoch), [])
        keeps = halving.goes_on(report.score, reached)
        reached.append(report.score)
        return keeps

    def on_outcome(self, outcome: Outcome) -> None:
        """Record how a trial ended, in the folder first of all."""
        job = self._running.pop(outcome.number)
        self._nothing_fits = False
        result = TrialResult(
            outcome.number,
            job.config,
            outcome.status,
            outcome.scores,
            outcome.score,
            outcome.loss,
            round(outcome.seconds, 2),
            outcome.error,
            job.epochs,
        )
        self.folder.append_trial(result)
        self.results.append(result)
        self.study.tell(result)
        self.budget.learn(job, outcome, self._trains_backbone(job.config))
        self.emit(
            "trial_end",
            number=result.number,
            status=result.status,
            score=result.score,
            seconds=result.seconds,
            error=result.error,
        )
        ordered = usable(self.results)
        if ordered and ordered[0].number == result.number:
            self.emit("best", number=result.number, score=result.score)
        self._drop_weights(ordered)

    def baseline(self) -> TrialResult | None:
        """Return the first trial whose head alone was trained; None if there was none."""
        heads = [r for r in usable(self.results) if not self._trains_backbone(r.config)]
        return min(heads, key=lambda result: result.number, default=None)

    def _candidates(self) -> Iterable[tuple[int, TrialConfig, bool]]:
        """Yield what may come next: the portfolio, then one proposal or two."""
        for answers in self.first:
            config = self.space.default(answers, self._trial_seed(self._next_number))
            if _key(config) not in self._tried:
                yield self._next_number, config, False
        number = self._next_number
        yield number, self.study.propose(number, self._trial_seed(number)), True
        for name, info in self.space.strategies.items():
            if not info.trains_backbone:  # too late to train a backbone: a head still fits
                fixed: dict[str, Value] = {"strategy": name}
                self.study.forget(number)
                yield number, self.study.propose(number, self._trial_seed(number), fixed), True
                break
        self.study.forget(number)

    def _start(
        self,
        number: int,
        config: TrialConfig,
        epochs: int,
        *,
        known: bool,
        precision: Precision | None = None,
    ) -> TrialJob:
        self._next_number = max(self._next_number, number + 1)
        self._tried.add(_key(config))
        if not known:
            self.study.expect(number, config)
        job = self.budget.job(number, config, epochs, precision)
        self._running[number] = job
        self.emit(
            "trial_start",
            number=number,
            backbone=config.backbone.name,
            strategy=config.strategy.name,
            head=config.head.name,
            epochs=epochs,
        )
        return job

    def _trial_seed(self, number: int) -> int:
        return self.seed * 100_003 + number

    def _trains_backbone(self, config: TrialConfig) -> bool:
        known = self.space.strategies.get(config.strategy.name)
        return known is None or known.trains_backbone  # one no longer installed: assume the usual

    def _note_rungs(self, result: TrialResult) -> None:
        for mark in halving.rungs(result.epochs):
            if len(result.scores) >= mark:
                reached = self._reached.setdefault((result.epochs, mark), [])
                reached.append(result.scores[mark - 1])

    def _keeps_failing(self) -> bool:
        last = [r.error for r in self.results[-SAME_FAILURES:] if r.status == "failed"]
        nothing_works = not usable(self.results)
        return nothing_works and len(last) == SAME_FAILURES and len(set(last)) == 1

    def _drop_weights(self, ordered: list[TrialResult]) -> None:
        """Keep the weights of the best few and of the baseline; the disk is not eaten."""
        baseline = self.baseline()
        kept = {result.number for result in ordered[:KEPT]} | set(self._running)
        kept |= {baseline.number} if baseline else set()
        for result in self.results:
            if result.number not in kept:
                for weights in self.folder.trial(result.number).glob("*.safetensors"):
                    weights.unlink(missing_ok=True)


def _key(config: TrialConfig) -> str:
    return repr(sorted(config.answers().items(), key=lambda pair: pair[0]))
