"""Trials on a real Ray cluster of this machine: stopped at rungs, killed, and hung."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from autoft.network.sources import in_folder
from autoft.search.budget import Budget
from autoft.search.director import Director
from autoft.search.engines import cluster, ray, tasks
from autoft.search.engines.tasks import Names
from autoft.search.folder import RunFolder, read_lines
from autoft.search.images import read_data
from autoft.search.settings import Settings
from autoft.search.study import Study
from autoft.training.job import Ranked, Setup
from autoft.values import TrialResult

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

BACKBONE, EPOCHS = "test_resnet.fixed", 3
Watch = Callable[[str, dict], None]


@pytest.fixture
def setup(photos, tiny_weights, tmp_path) -> Setup:
    data = read_data(Settings(dataset=str(photos), image_size=64), lambda *_, **__: None)
    split, classes = data.split, data.catalog.classes
    train, validation = data.part(split.train()), data.part(split.validation())
    (tmp_path / "trials").mkdir()
    sources = in_folder(tiny_weights)[0]
    return Setup(
        tmp_path, data.store, classes, train, validation, sources, 64, "accuracy", "cpu", 1
    )


def make_director(
    setup: Setup,
    watch: Watch,
    *,
    trials: int,
    best: float,
    seconds: float = 300.0,
    ended: int = 2,
    images: int = 72,
) -> Director:
    """A director of full fine-tunes, of which some ended with `best` at every rung."""
    names = Names(("full",), ("linear",), True, True)
    space = replace(tasks.describe(names).space, backbones=(BACKBONE,))
    folder = RunFolder(setup.folder)
    for number in range(ended):
        config = space.default({}, number)
        scores = (best,) * EPOCHS
        folder.append_trial(
            TrialResult(number, config, "done", scores, best, 0.1, 1.0, "", EPOCHS)
        )
    ranked = {BACKBONE: Ranked(BACKBONE, images_per_second=500.0, trained_per_second=200.0)}
    budget = Budget(time.time() + seconds, ended + trials, ranked, images, 24)
    study = Study(space, 0)
    director = Director(
        folder, space, study, budget, 0, (), lambda kind, **data: watch(kind, data)
    )
    director.resume()
    return director


def actors() -> list[int]:
    """Processes of this session's Ray that run a trial."""
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if "ImplicitFunc" in " ".join(child.cmdline())]


def kill_once(number: int, epoch: int, how: signal.Signals) -> Watch:
    done: list[int] = []

    def watch(kind: str, data: dict) -> None:
        if kind == "epoch" and (data["number"], data["epoch"]) == (number, epoch) and not done:
            done.extend(actors())
            assert len(done) == 1
            os.kill(done[0], how)

    return watch


def epochs_told(folder: Path, number: int) -> list[int]:
    return [line["epoch"] for line in read_lines(folder / f"trials/{number:04d}/metrics.jsonl")]


def test_a_trial_stopped_at_its_rung_leaves_its_actor_to_the_next(setup) -> None:
    seen: set[int] = set()

    def watch(kind: str, data: dict) -> None:
        if kind == "epoch":
            seen.update(actors())

    # An epoch of fewer steps than 50 is none that rungs count.
    director = make_director(setup, watch, trials=3, best=1.5, ended=3, images=1600)
    ray.run_trials(director, setup, 1, False)
    ended = director.results[3:]
    assert [(r.number, r.status, len(r.scores), r.error) for r in ended] == [
        (number, "stopped", 1, "") for number in (3, 4, 5)
    ]
    assert len(seen) == 1
    assert not list(setup.folder.rglob("last.safetensors"))


def test_a_killed_actor_costs_its_trial_one_epoch_at_most(setup) -> None:
    watch = kill_once(2, 2, signal.SIGKILL)
    director = make_director(setup, watch, trials=2, best=-1.0)
    ray.run_trials(director, setup, 1, False)
    ended = director.results[2:]
    assert [(r.number, r.status, len(r.scores)) for r in ended] == [(2, "done", 3), (3, "done", 3)]
    assert epochs_told(setup.folder, 2) in ([1, 2, 2, 3], [1, 2, 3])


def test_an_actor_that_dies_twice_costs_that_trial_alone(setup) -> None:
    def watch(kind: str, data: dict) -> None:
        if kind == "epoch" and data["number"] == 2:
            os.kill(actors()[0], signal.SIGKILL)

    director = make_director(setup, watch, trials=2, best=-1.0)
    ray.run_trials(director, setup, 1, False)
    ended = director.results[2:]
    assert [(r.number, r.status) for r in ended] == [(2, "failed"), (3, "done")]
    assert "its Ray actor failed twice" in ended[0].error


def test_a_trial_that_hangs_is_given_up_and_the_search_ends(setup, monkeypatch) -> None:
    monkeypatch.setattr(ray, "GRACE", 2.0)
    hung: list[psutil.Process] = []

    def watch(kind: str, data: dict) -> None:
        if kind == "epoch" and not hung:
            hung.extend(psutil.Process(pid) for pid in actors())
            hung[0].suspend()
            director.budget.deadline = 0.0

    director = make_director(setup, watch, trials=2, best=-1.0, seconds=40.0)
    began = time.time()
    ray.run_trials(director, setup, 1, False)
    ended = director.results[2:]
    assert [(r.number, r.status, len(r.scores)) for r in ended] == [(2, "stopped", 1)]
    assert time.time() - began < 100
    assert not [actor for actor in hung if cluster.is_alive(actor)], (
        "the hung actor was left behind"
    )


def test_a_process_that_is_none_of_rays_goes_on(monkeypatch) -> None:
    monkeypatch.setattr(cluster, "LEAVE", 0.5)
    with cluster.cluster():
        ours = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        daemon = next(p for p in psutil.Process().children() if p.name() == "raylet")
    assert not cluster.is_alive(daemon)
    assert cluster.is_alive(ours)
    ours.kill()
    ours.wait()


def test_what_hangs_when_ray_has_ended_is_killed(monkeypatch) -> None:
    monkeypatch.setattr(cluster, "LEAVE", 0.5)
    hung = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    hung.suspend()
    cluster.end({psutil.Process(hung.pid)})
    assert hung.wait(5) == -signal.SIGKILL


def test_a_trial_that_finds_no_room_is_given_up(setup, monkeypatch) -> None:
    monkeypatch.setattr(ray, "GRACE", 2.0)
    monkeypatch.setattr(ray, "resources_of", lambda *_, **__: {"cpu": 99.0})
    director = make_director(setup, lambda *_: None, trials=1, best=1.5, seconds=15.0)
    ray.run_trials(director, setup, 1, False)
    assert ["had room for it" in r.error for r in director.results[2:]] == [True]


def test_what_the_director_raises_ends_the_search(setup) -> None:
    def watch(kind: str, data: dict) -> None:
        if kind == "trial_end":
            raise OSError(28, "No space left on device")

    director = make_director(setup, watch, trials=3, best=1.5)
    with pytest.raises(OSError, match="No space left"):
        ray.run_trials(director, setup, 1, False)
    assert len(director.results) == 3


def test_all_trials_at_a_time_fit_on_the_cluster_at_once() -> None:
    import ray as library

    library.init(num_cpus=4, num_gpus=3, include_dashboard=False, log_to_driver=False)
    try:
        with cluster.cluster():
            for count in (1, 2, 3, 7):
                asked = cluster.resources_of(64, count, allow_gpu=True)
                assert 0 < asked["cpu"] * count <= 4
                assert 3 * int(1 / asked["gpu"] + 1e-9) >= count
            assert cluster.resources_of(1, 2, allow_gpu=False) == {"cpu": 1.0}
        assert library.is_initialized()  # it was not ours to end
    finally:
        library.shutdown()
