"""Trials on a Ray cluster: Ray Tune places them, our director decides everything.

A Ray `Searcher` and a Ray scheduler pass every question on. The run folder stays the truth: Ray's
own experiment state (pickles) is never read, and what it writes goes to a temporary folder. The
run folder and the cache must be visible on every node under the same path.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autoft.errors import MachineError
from autoft.search.director import Director
from autoft.search.engines import tasks
from autoft.search.engines.cluster import cluster, resources_of
from autoft.search.engines.local import GRACE
from autoft.search.engines.tasks import Link
from autoft.search.folder import stopped
from autoft.training.job import Outcome, Report, Setup, TrialJob

RETRIES = 1  # of a trial whose actor or node died; it goes on from its last epoch


@dataclass
class Bridge:
    """What Ray's trials are to our director, and what the director raised while Ray called it."""

    director: Director
    jobs: dict[str, tuple[TrialJob, ...]] = field(default_factory=dict)
    placed: set[str] = field(default_factory=set)
    reports: dict[int, dict[int, Report]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    raised: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Give nothing to Ray's pickles of the experiment: they are never read."""
        return {}

    def suggest(self, trial_id: str) -> tuple[TrialJob, ...]:
        """Return the next jobs for Ray's trial, which may be none."""
        jobs = self.director.next_jobs()
        if jobs:
            self.jobs[trial_id] = jobs
        return jobs

    def on_result(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Pass reports on; tell whether Ray's trial shall go on."""
        told = [Report(**each) for each in json.loads(result.get("reports", "[]"))]
        answers = [self._on_report(report) for report in told]  # of all, whatever the first is
        return all(answers)

    def _on_report(self, report: Report) -> bool:
        known = self.reports.setdefault(report.number, {})
        if report.epoch in known:  # its actor died before the epoch's state was on the disk
            return True
        known[report.epoch] = report
        goes_on = False
        with self._holding():
            goes_on = self.director.on_report(report)
        return goes_on and self.raised is None

    def on_end(self, trial_id: str, result: dict[str, Any] | None, *, error: bool) -> None:
        """Pass on how trials ended: by themselves, stopped at a rung, or with their actor."""
        jobs = self.jobs.pop(trial_id, None)
        if jobs is None or self.director.cancelled:
            return
        told = json.loads((result or {}).get("outcomes", "null"))
        with self._holding():
            if told is not None:
                outcomes = [Outcome(**{**each, "scores": tuple(each["scores"])}) for each in told]
            elif error and len(jobs) > 1:  # it may be one of them that ends the actor
                self.director.take_back(jobs)
                return
            elif error:
                why = f"its Ray actor failed twice: {self.errors.get(trial_id, '')}"
                outcomes = [Outcome(job.number, "failed", error=why) for job in jobs]
            else:
                outcomes = [self._stopped(job.number) for job in jobs]
            for outcome in outcomes:
                self.director.on_outcome(outcome)

    def must_end(self) -> bool:
        """Tell whether Ray must end everything now; give up what ran past its deadline."""
        if self.director.cancelled or self.raised is not None:
            return True
        deadlines = [job.deadline for jobs in self.jobs.values() for job in jobs]
        if not deadlines or time.time() < max(deadlines) + GRACE:
            return False
        late, self.jobs = self.jobs, {}
        for trial_id, jobs in late.items():
            no_room = "no node of the Ray cluster had room for it before its deadline"
            reason = "it hung past its deadline" if trial_id in self.placed else no_room
            with self._holding():
                for job in jobs:
                    self.director.on_outcome(self.director.given_up(job.number, reason))
        return True

    def _stopped(self, number: int) -> Outcome:
        """Return the outcome; the folder also knows epochs from before the search was resumed."""
        return stopped(number, self.director.folder.reports(number) | self.reports[number])

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Hold what the director raises until Ray has ended; Ray would call it a failed trial."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - run_trials raises it again
            self.raised = self.raised or error


def check_installed() -> None:
    """Refuse early where Ray Tune is absent.

    Raises:
        MachineError: says how to install it.
    """
    if find_spec("ray") is None or find_spec("ray.tune") is None:
        raise MachineError("--engine ray needs Ray Tune. Install it: pip install 'autoft[ray]'.")


def run_trials(director: Director, setup: Setup, count: int, allow_gpu: bool) -> None:
    """Run the director's trials on Ray, `count` at a time, on GPUs where allowed and there."""
    from ray import tune

    bridge = Bridge(director)
    with cluster(), tempfile.TemporaryDirectory(prefix="autoft-ray-") as scratch:
        resources = resources_of(setup.threads, count, allow_gpu=allow_gpu)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_train, setup=setup), resources),
            tune_config=tune.TuneConfig(
                search_alg=_searcher(bridge),
                scheduler=_scheduler(bridge),
                num_samples=-1,
                max_concurrent_trials=count,
                reuse_actors=True,  # torch is imported once per actor, not once per trial
                trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
                trial_name_creator=lambda trial: f"trial-{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name="autoft",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                stop=_stopper(bridge),
                callbacks=[_watcher(bridge)],
            ),
        )
        tuner.fit()
    if bridge.raised is not None:
        raise bridge.raised


def _train(config: dict[str, Any], setup: Setup) -> None:
    """Run trials inside a Ray actor, on the GPU that Ray gave it, if any.

    Ray takes its time for a report: those of trials that train together are told a round at once.
    """
    import ray
    import torch
    from ray import tune

    ended = False
    held: list[dict[str, Any]] = []

    def report(state: Report) -> bool:
        nonlocal ended
        held.append(asdict(state))
        if len(held) < len(config["jobs"]):
            return True
        try:
            tune.report({"reports": json.dumps(held)})
        except SystemExit:
            ended = True
            raise
        held.clear()
        return True  # Ray ends the trial itself where the scheduler said so

    has_gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
    placed = replace(setup, device="cuda:0" if has_gpu else "cpu")
    outcomes = tasks.train(Link(lambda *_: None, report), placed, config["jobs"])
    if ended:
        # `tasks.train` took Ray's exit for the trial's failure. Nobody would fetch a report now:
        # it would wait for ever, and the actor could not take another trial.
        sys.exit(0)
    told = json.dumps([asdict(outcome) for outcome in outcomes])
    tune.report({"reports": json.dumps(held), "outcomes": told})


def _searcher(bridge: Bridge) -> Any:
    from ray.tune.search import Searcher

    class StudySearcher(Searcher):  # type: ignore[misc]  # Ray ships no types
        """Asks our director; Ray's own saved state is empty and never read."""

        def suggest(self, trial_id: str) -> Any:
            if jobs := bridge.suggest(trial_id):
                return {"jobs": jobs}
            return None if bridge.jobs else Searcher.FINISHED

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            bridge.on_end(trial_id, result, error=error)

        def save(self, *_: str) -> None:
            """Write and read nothing: the run folder is the truth."""

        save_to_dir = restore = save

    return StudySearcher()  # without a metric, or Ray wants it in every report


def _scheduler(bridge: Bridge) -> Any:
    from ray.tune.schedulers import FIFOScheduler

    class StudyScheduler(FIFOScheduler):  # type: ignore[misc]  # Ray ships no types
        """Asks our director whether a trial goes on."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: Any) -> str:
            goes_on = bridge.on_result(trial.trial_id, result)
            return str(self.CONTINUE if goes_on else self.STOP)

        def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
            text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
            bridge.errors[trial.trial_id] = (text.strip().splitlines() or [""])[-1][:500]

    return StudyScheduler()


def _watcher(bridge: Bridge) -> Any:
    from ray.tune import Callback

    class Watcher(Callback):  # type: ignore[misc]  # Ray ships no types
        """Notes which trials found a place on the cluster."""

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            bridge.placed.add(trial.trial_id)

    return Watcher()


def _stopper(bridge: Bridge) -> Any:
    from ray.tune import Stopper

    class Ending(Stopper):  # type: ignore[misc]  # Ray ships no types
        """Ends everything where the bridge says so, and no trial by itself."""

        def __call__(self, trial_id: str, result: Any) -> bool:
            return False

        def stop_all(self) -> bool:
            return bridge.must_end()

    return Ending()
