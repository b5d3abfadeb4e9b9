"""Trials on a Ray cluster: Ray Tune places them, our director decides everything.

A Ray `Searcher` and a Ray scheduler pass every question on. The run folder stays the truth: Ray's
own experiment state (pickles) is never read, and what it writes goes to a temporary folder. The
run folder and the cache must be visible on every node under the same path.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from autoft.errors import MachineError
from autoft.search.director import Director
from autoft.search.engines import tasks
from autoft.search.engines.tasks import Link
from autoft.training.job import Outcome, Report, Setup, TrialJob

RETRIES = 1  # of a trial whose actor or node died; it goes on from its last epoch
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our run folder is the log
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass
class Bridge:
    """What Ray's trials are to our director."""

    director: Director
    jobs: dict[str, TrialJob] = field(default_factory=dict)
    reports: dict[int, list[Report]] = field(default_factory=dict)

    def suggest(self, trial_id: str) -> TrialJob | None:
        """Return the next job for Ray's trial, or None where there is none."""
        job = self.director.next_job()
        if job is not None:
            self.jobs[trial_id] = job
        return job

    def on_result(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Pass a report on; tell whether the trial shall go on."""
        told = result.get("report")
        if told is None:
            return True
        report = Report(**json.loads(told))
        self.reports.setdefault(self.jobs[trial_id].number, []).append(report)
        return self.director.on_report(report)

    def on_end(self, trial_id: str, result: dict[str, Any] | None, *, error: bool) -> None:
        """Pass on how a trial ended: by itself, stopped at a rung, or with its actor."""
        job = self.jobs.pop(trial_id)
        if self.director.cancelled:
            return
        told = (result or {}).get("outcome")
        if told is not None:
            outcome = json.loads(told)
            self.director.on_outcome(Outcome(**{**outcome, "scores": tuple(outcome["scores"])}))
        elif error:
            reason = "its Ray actor died, and died again when it was retried"
            self.director.on_outcome(Outcome(job.number, "failed", error=reason))
        else:
            self.director.on_outcome(self._stopped(job.number))

    def _stopped(self, number: int) -> Outcome:
        reports = self.reports.get(number, [])
        best = max(reports, key=lambda each: (each.score, -each.loss))
        scores = tuple(each.score for each in reports)
        return Outcome(number, "stopped", scores, best.score, best.loss, reports[-1].seconds)


def check_installed() -> None:
    """Refuse early where Ray Tune is absent.

    Raises:
        MachineError: says how to install it.
    """
    if find_spec("ray") is None or find_spec("ray.tune") is None:
        raise MachineError("--engine ray needs Ray Tune. Install it: pip install 'autoft[ray]'.")


def run_trials(director: Director, setup: Setup, count: int, devices: int) -> None:
    """Run the director's trials on Ray, `count` at a time over `devices` GPUs (0: CPUs only)."""
    from ray import tune

    bridge = Bridge(director)
    gpus = {"gpu": min(1.0, devices / count)} if setup.device.startswith("cuda") else {}
    resources = {"cpu": float(setup.threads), **gpus}
    with _cluster(), tempfile.TemporaryDirectory(prefix="autoft-ray-") as scratch:
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
            ),
        )
        tuner.fit()


def _train(config: dict[str, Any], setup: Setup) -> None:
    """Run one trial inside a Ray actor."""
    from ray import tune

    def report(state: Report) -> bool:
        tune.report({"report": json.dumps(asdict(state))})
        return True  # Ray ends the trial itself where the scheduler said so

    link = Link(progress=lambda *_: None, report=report)
    device = "cuda:0" if setup.device.startswith("cuda") else setup.device
    outcome = tasks.train(link, replace(setup, device=device), config["job"])
    tune.report({"outcome": json.dumps(asdict(outcome))})


@contextmanager
def _cluster() -> Iterator[None]:
    """Connect to the cluster at RAY_ADDRESS, or start one on this machine for the run."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    ours = not ray.is_initialized()
    if ours:
        # The dashboard lets anyone who reaches it run code: it stays off.
        local = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _searcher(bridge: Bridge) -> Any:
    from ray.tune.search import Searcher

    class StudySearcher(Searcher):  # type: ignore[misc]  # Ray ships no types
        """Asks our director; Ray's own saved state is empty and never read."""

        def suggest(self, trial_id: str) -> Any:
            job = bridge.suggest(trial_id)
            if job is not None:
                return {"job": job}
            return None if bridge.jobs else Searcher.FINISHED

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            bridge.on_end(trial_id, result, error=error)

        def save(self, checkpoint_path: str) -> None:
            """Write nothing: the run folder is the truth."""

        def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
            """Write nothing: the run folder is the truth."""

        def restore(self, checkpoint_path: str) -> None:
            """Read nothing: the run folder is the truth."""

        def __getstate__(self) -> dict[str, Any]:
            return {}

    return StudySearcher(metric="score", mode="max")


def _scheduler(bridge: Bridge) -> Any:
    from ray.tune.schedulers import FIFOScheduler

    class StudyScheduler(FIFOScheduler):  # type: ignore[misc]  # Ray ships no types
        """Asks our director whether a trial goes on."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: Any) -> str:
            goes_on = bridge.on_result(trial.trial_id, result)
            return str(self.CONTINUE if goes_on else self.STOP)

        def __getstate__(self) -> dict[str, Any]:
            return {}

    return StudyScheduler()


def _stopper(bridge: Bridge) -> Any:
    from ray.tune import Stopper

    class Cancelled(Stopper):  # type: ignore[misc]  # Ray ships no types
        """Ends everything once the user asked for it."""

        def __call__(self, trial_id: str, result: Any) -> bool:
            return False

        def stop_all(self) -> bool:
            return bridge.director.cancelled

        def __getstate__(self) -> dict[str, Any]:
            return {}

    return Cancelled()
