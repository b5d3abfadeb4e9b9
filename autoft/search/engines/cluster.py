"""The Ray cluster that trials run on: one that is there, or our own, which ends with the run."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from autoft.errors import MachineError

LEAVE = 3.0  # seconds for Ray's processes to end after it was shut down
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our run folder is the log
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths mean in a trial what they mean here
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the trial's own error tells
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def cluster() -> Iterator[None]:
    """Connect to the cluster at RAY_ADDRESS or of this machine, or start one for the run."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    before, daemons = _below(psutil.Process()), set[psutil.Process]()
    try:
        _start()
        daemons = _below(psutil.Process()) - before  # none, if a cluster was there
        yield
    finally:
        started = daemons.union(*map(_below, daemons))
        ray.shutdown()
        end(started)


def _start() -> None:
    import ray

    # The dashboard lets anyone who reaches it run code: it stays off where we start Ray.
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except ConnectionError as error:
        raise MachineError(f"{error}. Start it, or unset RAY_ADDRESS.") from error


def _below(process: psutil.Process) -> set[psutil.Process]:
    """Return what a process has started that still runs, and what that has started."""
    try:
        return set(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def end(processes: set[psutil.Process]) -> None:
    """Wait for Ray's processes to end, and kill what does not: Ray itself gives them a second."""
    until = time.monotonic() + LEAVE
    while (left := [p for p in processes if is_alive(p)]) and time.monotonic() < until:
        time.sleep(0.05)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def is_alive(process: psutil.Process) -> bool:
    """Tell whether it runs; one that has ended may stay listed where nobody asks for its end."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def resources_of(threads: int, count: int, *, allow_gpu: bool) -> dict[str, float]:
    """Return what one of `count` trials asks of the cluster, so little that all run at once."""
    import ray

    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    with_gpu = [node for node in nodes if node.get("GPU")] if allow_gpu else []
    cpus = [float(node["CPU"]) for node in with_gpu or nodes] or [float(threads)]
    share = sum(cpus) / count
    share = math.floor(share) if share >= 1 else math.floor(share * 1000) / 1000
    cpu = min([float(threads), share, *cpus])
    gpus = sum(node["GPU"] for node in with_gpu)
    return {"cpu": cpu, "gpu": 1 / math.ceil(count / gpus)} if gpus else {"cpu": cpu}
