"""Which trial next, for how long, and which goes on: the policy, told and asked by an engine.

An engine asks `next_jobs`, passes on every report and outcome, and stops when there is no job
left. The director alone writes the trials of the run. `proposer.py` says what is tried next,
`policy.py` and `halving.py` have what is decided by.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoft.search import halving, policy
from autoft.search.budget import NOMINAL_BATCH, Budget
from autoft.search.configs import Space
from autoft.search.finals import Finals
from autoft.search.folder import RunFolder, stopped
from autoft.search.proposer import Proposer
from autoft.search.study import Study
from autoft.selection.winner import usable
from autoft.training.job import Outcome, Report, TrialJob
from autoft.training.noted import drop_state
from autoft.values import TrialConfig, TrialResult, Value

SAME_FAILURES = 3  # in a row end a search: the next would fail as well

Emit = Callable[..., None]


@dataclass
class Director:
    """The state of a search while it runs.

    With `lockstep` its engine can end one of several trials that take their steps together, and
    the memory holds them. The split has so many `folds`, a score in one is as noisy as that of so
    many `images` (0: those held out), and `seats` trials run at the same time. What scored a trial
    again is with the `finals`, not among the `results`.
    """

    folder: RunFolder
    space: Space
    study: Study
    budget: Budget
    seed: int
    first: Iterable[Mapping[str, Value]]
    emit: Emit
    cancelled: bool = False
    lockstep: bool = True
    folds: int = 1
    images: int = 0
    seats: int = 1
    results: list[TrialResult] = field(default_factory=list)
    _running: dict[int, TrialJob] = field(default_factory=dict)
    _unfinished: list[TrialJob] = field(default_factory=list)
    _by_itself: set[int] = field(default_factory=set)
    _race: halving.Race = field(default_factory=halving.Race)
    _told: set[str] = field(default_factory=set)
    _with_weights: set[int] = field(default_factory=set)
    _nothing_fits: bool = False

    def __post_init__(self) -> None:
        """Have the proposer see every result."""
        self._proposer = Proposer(self.space, self.study, self.budget, self.seed, self.results)
        images = self.images or self.budget.validation_images
        self.finals = Finals(self.folder, self.space, self.budget, self.folds, images, self.seats)

    def resume(self) -> None:
        """Take up what the run folder holds: finished trials, and those cut off."""
        known = self.folder.trials()
        self.results += [each for each in known if each.of is None]
        for each in known:
            if each.of is not None:
                self.finals.note(each)
        self.budget.first = not self.results
        self._race.unit = halving.unit_of(self.budget.train_images // NOMINAL_BATCH)
        for result in self.results:
            self._learn_anew(result)
        finished = {result.number for result in known}
        for number in finished:
            drop_state(self.folder.trial(number))
        self._with_weights = set(finished)
        started = sorted(int(p.name) for p in (self.folder.path / "trials").iterdir())
        for number in started:
            job = self.folder.begun(number) if number not in finished else None
            if job and job.of is None:
                self._take_up(job)
            elif job:  # a final that was cut off begins anew
                self._with_weights.add(number)
        self._proposer.number = max([*finished, *started], default=-1) + 1
        self._proposer.first = deque(self.first)
        self.finals.reserve(usable(self.results), self.baseline())

    def _learn_anew(self, result: TrialResult) -> None:
        """Have all who learn from trials learn of one of an earlier command."""
        self.study.tell(result)
        self._proposer.note(result.config)
        if self.space.trains_backbone(result.config):
            epochs = len(result.scores) if result.status == "done" else result.epochs
            self._race.note(result.number, self._phase(result.config), epochs, result.scores)
            self.budget.plan(result.config, result.epochs)
            self._note_kept(result)

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
        if self.space.trains_backbone(config):  # the rungs that it has passed are passed
            reports = list(self.folder.reports(number).values())
            epochs = (reports[-1].epochs if reports else 0) or job.epochs
            scores = [report.score for report in reports]
            self._race.note(number, self._phase(config), epochs, scores)

    def next_jobs(self) -> tuple[TrialJob, ...]:
        """Return the next trials, to be trained together; none where nothing more fits.

        It is one trial that trains its backbone, or heads on one backbone. Where no time is left
        but that of the finals, and nothing else is running, it is one that is scored again.
        """
        return self._next_trials() or self._next_final()

    def _next_trials(self) -> tuple[TrialJob, ...]:
        room = self._room()
        if not room or self._nothing_fits or self._keeps_failing():
            return ()
        if self._unfinished:
            return self._go_on(room)
        for configs in self._proposer.candidates(room, len(self._running)):
            epochs = self.budget.epochs(configs[0], self.space.trains_backbone(configs[0]))
            if epochs:
                more = self._proposer.in_step(configs[0], epochs, room) if self.lockstep else []
                together = 1 + len(more)
                return tuple(self._start(each, epochs, together) for each in configs + more)
            self._proposer.forget(len(configs))
        self._say_why()
        self._nothing_fits = True  # until a trial ends: an idle seat asks several times a second
        return ()

    def _next_final(self) -> tuple[TrialJob, ...]:
        """Return a finalist that is yet to be scored with another fold held out."""
        searching = any(job.of is None for job in self._running.values())
        if self.cancelled or searching or self.budget.remaining() <= 0:
            return ()
        ordered, number = usable(self.results), self._proposer.number
        found = self.finals.next_job(ordered, self.baseline(), number)
        if found is None:
            return ()
        job, call = found
        if not self._running and not self.finals.again:
            self.emit("phase", name="finals", text="scoring the best on other folds")
            self.emit("note", text=str(call))
        return (self._begin(job),)

    def _say_why(self) -> None:
        """Say so where the search ends before its time for want of anything that may gain."""
        if not self._running and not policy.order(self.results, self.space, lambda _: 1.0):
            self.emit(
                "note",
                text=f"The last {policy.EXHAUSTED} trials of every kind gained nothing: the "
                f"search ends before its time.",
            )

    def take_back(self, jobs: Sequence[TrialJob]) -> None:
        """Take back trials whose worker died while it trained them together.

        Each is tried again by itself: it may be one of them that ends the worker. Where it may be
        the memory that several take in step, none is proposed in step any more.
        """
        self.lockstep = self.lockstep and all(job.together == 1 for job in jobs)
        for job in jobs:
            self._unfinished.append(self._running.pop(job.number))
            self._by_itself.add(job.number)
        self._nothing_fits = False

    def end(self) -> None:
        """Tell of trials that were taken back and for which no time was left."""
        late = [job for job in self._unfinished if job.number in self._by_itself]
        for job in late if not self.cancelled else ():
            self._unfinished.remove(job)
            self._running[job.number] = job
            why = "its worker died, and no time was left to try it by itself"
            self.on_outcome(self.given_up(job.number, why))

    def _room(self) -> int:
        """Return how many trials may start now."""
        begun = len(self.results) + len(self._running)
        if self.cancelled or not self.budget.allows_another(begun):
            return 0
        most = self.budget.max_trials
        return policy.PACK_MOST if most is None else max(1, most - begun)

    def _go_on(self, room: int) -> tuple[TrialJob, ...]:
        """Return trials that were cut off, with the epochs and the format that they had."""
        first = self._unfinished[0]
        alike = [first]
        if not self.space.trains_backbone(first.config) and first.number not in self._by_itself:
            alike = [job for job in self._unfinished if self._fits_with(first, job)][:room]
        for job in alike:
            self._unfinished.remove(job)
        return tuple(self._start(job.config, job.epochs, before=job) for job in alike)

    def _fits_with(self, first: TrialJob, job: TrialJob) -> bool:
        same = job.config.backbone.name == first.config.backbone.name
        same = same and (job.epochs, job.precision) == (first.epochs, first.precision)
        heads = not self.space.trains_backbone(job.config)
        return same and heads and job.number not in self._by_itself

    def on_report(self, report: Report) -> bool:
        """Learn the score after an epoch; tell whether the trial shall go on."""
        job = self._running[report.number]
        epochs = report.epochs or job.epochs
        self.emit(
            "epoch",
            number=report.number,
            epoch=report.epoch,
            epochs=epochs,
            score=report.score,
            train_loss=report.train_loss,
        )
        if report.note and report.note not in self._told:
            self._told.add(report.note)
            self.emit("note", text=f"Trial {report.number}: {report.note}.")
        if self.cancelled:
            return False
        if job.of is not None or not self.space.trains_backbone(job.config):
            return True
        phase = self._phase(job.config)
        keeps = self._race.goes_on(job.number, phase, epochs, report.epoch, report.score)
        return keeps or self._is_first(job)

    def _is_first(self, job: TrialJob) -> bool:
        """Tell whether it is the first trial that trains a backbone, as the regime advises."""
        begun = {r.number: r.config for r in self.results}
        begun |= {n: other.config for n, other in self._running.items() if other.of is None}
        return job.number == min(n for n, c in begun.items() if self.space.trains_backbone(c))

    def on_outcome(self, outcome: Outcome) -> None:
        """Record how a trial ended, in the folder first of all."""
        job = self._running.pop(outcome.number)
        result = _result_of(job, outcome)
        self.folder.append_trial(result)
        drop_state(self.folder.trial(result.number))
        self._with_weights.add(result.number)
        if result.of is not None:
            first = next(each for each in self.results if each.number == result.of)
            self._tell_end(result, self.finals.expected(first))
            self.finals.note(result)
            self._drop_weights(usable(self.results))
            return
        self._nothing_fits = False
        self.results.append(result)
        self.study.tell(result)
        trains = self.space.trains_backbone(job.config)
        done = max(1, len(outcome.scores))
        expected = self.budget.expected(job.config, done, trains, job.together)
        self.budget.learn(job, outcome, trains)
        if trains:
            self._note_kept(result)
            self._tell_fewer(result)
        self._tell_end(result, expected)
        ordered = usable(self.results)
        if ordered and ordered[0].number == result.number:
            self.emit("best", number=result.number, score=result.score)
        self._drop_weights(ordered)
        self.finals.reserve(ordered, self.baseline())

    def given_up(self, number: int, why: str) -> Outcome:
        """Return how a trial ended that was given up: what is scored and kept of it stays."""
        reports = self.folder.reports(number)
        if not (reports and self.folder.has_weights(number)):
            return Outcome(number, "failed", error=why)
        self.emit("note", text=f"Trial {number}: {why}. It ends with what it had reached by then.")
        return stopped(number, reports)

    def _note_kept(self, result: TrialResult) -> None:
        """Have the budget know what later trials will find kept, of a backbone of today."""
        here = result.config.backbone.name in self.budget.ranked
        if here and (views := self.folder.views_kept(result.number)):
            self.budget.note_kept(result.config, min(views, len(result.scores)))

    def _tell_fewer(self, result: TrialResult) -> None:
        """Say of a trial whose schedule had to end in time how many epochs it had."""
        had = len(result.scores)
        if result.status == "done" and had < result.epochs:
            text = f"Trial {result.number}: {had} of its {result.epochs} epochs, to end in time."
            self.emit("note", text=text)

    def _tell_end(self, result: TrialResult, expected: float) -> None:
        self.emit(
            "trial_end",
            number=result.number,
            status=result.status,
            score=result.score,
            seconds=result.seconds,
            expected=round(expected, 2),
            error=result.error,
        )

    def baseline(self) -> TrialResult | None:
        """Return the first trial whose head alone was trained; None if there was none."""
        scored = (each for each in self.results if each.status != "failed")
        heads = (each for each in scored if not self.space.trains_backbone(each.config))
        return min(heads, key=lambda result: result.number, default=None)

    def _start(
        self,
        config: TrialConfig,
        epochs: int,
        together: int = 1,
        *,
        before: TrialJob | None = None,
    ) -> TrialJob:
        """Begin a trial, one of `together` in step, or go on with one that was begun `before`."""
        number = before.number if before else self._proposer.number
        self._proposer.note(config)
        if not self.study.knows(number):
            self.study.expect(number, config)
        precision = before.precision if before else None
        job = self.budget.job(number, config, epochs, precision, together)
        start = before.head_start if before else policy.head_start(self.results, self.space, job)
        return self._begin(replace(job, head_start=start))

    def _begin(self, job: TrialJob) -> TrialJob:
        self._proposer.number = max(self._proposer.number, job.number + 1)
        self._running[job.number] = job
        config = job.config
        self.emit(
            "trial_start",
            number=job.number,
            backbone=config.backbone.name,
            strategy=config.strategy.name,
            head=config.head.name,
            epochs=job.epochs,
            **({} if job.of is None else {"of": job.of, "fold": job.fold}),
        )
        return job

    def _phase(self, config: TrialConfig) -> policy.Phase:
        return policy.phase_of(config.strategy.name, self.space)

    def _keeps_failing(self) -> bool:
        last = [r.error for r in self.results[-SAME_FAILURES:] if r.status == "failed"]
        nothing_works = not usable(self.results)
        return nothing_works and len(last) == SAME_FAILURES and len(set(last)) == 1

    def _drop_weights(self, ordered: list[TrialResult]) -> None:
        """Keep the weights of the best few and of the baseline; the disk is not eaten."""
        baseline = self.baseline()
        kept = {result.number for result in ordered[: policy.KEPT]} | set(self._running)
        kept |= {baseline.number} if baseline else set()
        kept |= {each.of for each in self.finals.again if each.of is not None}
        for number in self._with_weights - kept:
            for weights in self.folder.trial(number).glob("*.safetensors"):
                weights.unlink(missing_ok=True)
        self._with_weights &= kept


def _result_of(job: TrialJob, outcome: Outcome) -> TrialResult:
    return TrialResult(
        outcome.number,
        job.config,
        outcome.status,
        outcome.scores,
        outcome.score,
        outcome.loss,
        round(outcome.seconds, 2),
        outcome.error,
        job.epochs,
        job.fold,
        job.of,
    )
