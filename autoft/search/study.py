"""Optuna as the proposer: it is told every trial and asked for the next configuration.

The study lives in memory and is rebuilt from `trials.jsonl`; the sampler is seeded anew for every
question, so that a proposal depends on the history and the trial's number alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoft.search.configs import Space
from autoft.space import Choice, Float, Int, Range
from autoft.values import TrialConfig, TrialResult, Value

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

STARTUP_TRIALS = 10


class Study:
    """Proposes configurations; owns the Optuna study of one run."""

    def __init__(self, space: Space, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._seed = seed
        self._study = optuna.create_study(direction="maximize", sampler=self._sampler(0))
        self._asked: dict[int, optuna.trial.Trial] = {}

    def propose(
        self,
        number: int,
        seed: int,
        fixed: Mapping[str, Value] | None = None,
        *,
        at_random: bool = False,
    ) -> TrialConfig:
        """Return the configuration of trial `number`, with the `fixed` answers given.

        One `at_random` costs a fraction of a millisecond; others grow dearer with every trial.
        """
        import optuna

        sampler: optuna.samplers.BaseSampler = self._sampler(number)
        if at_random:
            sampler = optuna.samplers.RandomSampler(self._seed_of(number))
        if fixed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler = optuna.samplers.PartialFixedSampler(dict(fixed), sampler)
        self._study.sampler = sampler
        trial = self._study.ask()
        self._asked[number] = trial
        return self._space.configure(lambda name, range_, _: _suggest(trial, name, range_), seed)

    def expect(self, number: int, config: TrialConfig) -> None:
        """Learn that trial `number` runs with a configuration from elsewhere.

        Answers outside today's space are left out.
        """
        held, _ = _held(self._space, config)
        self._study.enqueue_trial(held)
        self._study.sampler = self._sampler(number)
        trial = self._study.ask()
        self._asked[number] = trial
        self._space.configure(lambda name, range_, _: _suggest(trial, name, range_), config.seed)

    def knows(self, number: int) -> bool:
        """Tell whether trial `number` was proposed or expected, and has not ended."""
        return number in self._asked

    def forget(self, number: int) -> None:
        """Take back a proposal that was not used."""
        from optuna.trial import TrialState

        trial = self._asked.pop(number, None)
        if trial is not None:
            self._study.tell(trial, state=TrialState.FAIL)

    def tell(self, result: TrialResult) -> None:
        """Learn how a trial ended; one that was not asked for here is added whole."""
        from optuna.trial import TrialState

        trial = self._asked.pop(result.number, None)
        states = {"failed": TrialState.FAIL, "stopped": TrialState.PRUNED}
        state = states.get(result.status, TrialState.COMPLETE)
        usable = result.score is not None and math.isfinite(result.score)
        if trial is None:
            self._add(result)
            return
        for epoch, score in enumerate(result.scores, start=1):
            trial.report(score, epoch)
        if state is TrialState.COMPLETE and usable:
            self._study.tell(trial, result.score)
        else:
            self._study.tell(trial, state=TrialState.FAIL if not result.scores else state)

    def _add(self, result: TrialResult) -> None:
        self._study.add_trial(_frozen(self._space, result))

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        import optuna

        with warnings.catch_warnings():  # pinned whatever Optuna's defaults become
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                multivariate=True,
                group=True,
                constant_liar=True,
                n_startup_trials=STARTUP_TRIALS,
                seed=self._seed_of(number),
            )

    def _seed_of(self, number: int) -> int:
        return (self._seed * 100_003 + number) % 2**32


def _suggest(trial: optuna.trial.Trial, name: str, range_: Range) -> Value:
    if isinstance(range_, Choice):
        chosen = trial.suggest_categorical(name, range_.options)
        return next(option for option in range_.options if option == chosen)
    if isinstance(range_, Int):
        return trial.suggest_int(name, range_.low, range_.high, log=range_.log)
    return trial.suggest_float(name, range_.low, range_.high, log=range_.log)


def _distribution(range_: Range) -> BaseDistribution:
    from optuna import distributions

    if isinstance(range_, Choice):
        return distributions.CategoricalDistribution(range_.options)
    if isinstance(range_, Int):
        return distributions.IntDistribution(range_.low, range_.high, log=range_.log)
    assert isinstance(range_, Float)
    return distributions.FloatDistribution(range_.low, range_.high, log=range_.log)


def _frozen(space: Space, result: TrialResult) -> optuna.trial.FrozenTrial:
    """Return a finished trial as Optuna stores it; answers outside today's space are left out."""
    import optuna
    from optuna.trial import TrialState

    held, distributions = _held(space, result.config)
    done = result.status == "done" and result.score is not None
    state = TrialState.COMPLETE if done else TrialState.PRUNED
    if result.status == "failed" or not result.scores:
        state, done = TrialState.FAIL, False
    return optuna.trial.create_trial(
        state=state,
        value=result.score if done else None,
        params=held,
        distributions=distributions,
        intermediate_values=dict(enumerate(result.scores, start=1)),
        user_attrs={"number": result.number, "status": result.status},
    )


def _held(
    space: Space, config: TrialConfig
) -> tuple[dict[str, Value], dict[str, BaseDistribution]]:
    """Return the answers of `config` that today's space holds, and their ranges for Optuna."""
    answers = config.answers()
    held: dict[str, Value] = {}
    distributions: dict[str, BaseDistribution] = {}

    def note(name: str, range_: Range, default: Value) -> Value:
        answer = answers.get(name, default)
        if name in answers and range_.holds(answer):
            held[name], distributions[name] = answer, _distribution(range_)
            return answer
        return default

    space.configure(note, config.seed)
    return held, distributions


def write_view(path: Path, space: Space, results: Sequence[TrialResult], name: str) -> None:
    """Write `path` anew as an SQLite study for optuna-dashboard: a view, never the truth."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.unlink(missing_ok=True)
    study = optuna.create_study(storage=f"sqlite:///{path}", study_name=name, direction="maximize")
    study.add_trials([_frozen(space, result) for result in results])
