"""Trials of heads that are trained together: as if each were alone, whoever fails or dies."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autoft.search.budget import Budget
from autoft.search.director import Director
from autoft.search.engines import local, tasks
from autoft.search.engines.local import Seat
from autoft.search.engines.worker import Worker
from autoft.search.finish import load_trial
from autoft.search.folder import RunFolder, read_lines
from autoft.search.policy import KEPT
from autoft.search.study import Study
from autoft.training.evaluate import evaluate
from autoft.training.job import Precision, Ranked, Setup, TrialJob
from autoft.training.trial import train_trial, train_trials
from autoft.values import Part, TrialConfig, TrialResult

BACKBONE = "test_resnet.fixed"
HEADS = ("linear", "norm_linear", "cosine", "mlp", "multilayer")
BAD = """
import os
import signal
from torch import nn

class Bad(nn.Linear):
    "Fails, in training or where it is scored."
    def __init__(self, features, classes, when):
        super().__init__(features, classes)
        self.when = when

    def forward(self, features):
        if self.when == "die" and not os.environ.get("SPARED"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.when == "train" and self.training and len(features) > 8:
            raise SystemExit("I do not want to")
        if self.when == "nan" and not self.training:
            return super().forward(features) * float("nan")
        return super().forward(features)

def train(num_features, num_classes):
    "Raise in training."
    return Bad(num_features, num_classes, "train")

def nan(num_features, num_classes):
    "Give NaN where it is scored."
    return Bad(num_features, num_classes, "nan")

def die(num_features, num_classes):
    "End the process."
    return Bad(num_features, num_classes, "die")

def never(num_features, num_classes):
    "Cannot be built."
    raise ValueError("I cannot be built")
"""


@pytest.fixture
def bad_heads(install) -> None:
    """Install heads that fail in several ways."""
    install("bad_heads", BAD, "heads", ("train", "nan", "die", "never"))


@pytest.fixture
def setup(photos, tiny_sources, setup_in, tmp_path) -> Setup:
    (tmp_path / "trials").mkdir(exist_ok=True)
    return setup_in(photos, tiny_sources, tmp_path)


def go_on(report) -> bool:
    return True


def job(number: int, head: str, seed: int = 3, **train) -> TrialJob:
    config = TrialConfig(Part(BACKBONE), Part("head_only"), Part(head), train, seed)
    return TrialJob(number, config, 3, time.time() + 300, Precision())


def many() -> list[TrialJob]:
    pools = ("native", "avgmax", "gem")
    return [
        job(at, head, head_lr=1e-3 * (1 + at), pool=pools[at % 3], smoothing=0.05 * (at % 2))
        for at, head in enumerate(HEADS * 2)
    ]


def test_trials_trained_together_end_as_if_each_had_been_alone(setup, tmp_path) -> None:
    jobs = many()
    told: list[tuple[int, int]] = []
    together = train_trials(
        setup, jobs, lambda report: told.append((report.number, report.epoch)) or True
    )
    other = replace(setup, folder=tmp_path / "alone")
    alone = [train_trial(other, each, go_on) for each in jobs]
    assert [each.number for each in together] == [each.number for each in jobs]
    for one, many_ in zip(alone, together, strict=True):
        assert (one.status, many_.status) == ("done", "done"), (one, many_)
        assert many_.scores == pytest.approx(one.scores, abs=1e-6)
        assert many_.loss == pytest.approx(one.loss, abs=1e-3)
        folders = [root / f"trials/{one.number:04d}" for root in (setup.folder, other.folder)]
        curves = [read_lines(folder / "metrics.jsonl") for folder in folders]
        assert [line["epoch"] for line in curves[0]] == [1, 2, 3]
        first, second = (load_file(folder / "scored.safetensors") for folder in folders)
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[n], second[n], atol=2e-3) for n in first)
        assert json.loads((folders[0] / "done.json").read_text())["score"] == many_.score
    assert sorted(told) == [(each.number, epoch) for each in jobs for epoch in (1, 2, 3)]


def test_the_seconds_of_trials_together_are_those_that_passed(setup) -> None:
    began = time.monotonic()
    outcomes = train_trials(setup, many(), go_on)
    passed = time.monotonic() - began
    assert sum(each.seconds for each in outcomes) == pytest.approx(passed, rel=0.15)
    lines = read_lines(setup.folder / "trials/0001/metrics.jsonl")
    assert all(0 < a["seconds"] < b["seconds"] for a, b in pairwise(lines))


def test_weights_are_kept_of_the_best_and_of_the_first(setup) -> None:
    jobs = [job(at, "linear", head_lr=1e-4 * (1 + 20 * at)) for at in range(8)]
    outcomes = train_trials(setup, jobs, go_on, keep=KEPT)
    best = sorted(outcomes, key=lambda each: (-each.score, each.loss))[:KEPT]
    kept = {int(path.parent.name) for path in setup.folder.glob("trials/*/scored.safetensors")}
    assert kept == {0, *(each.number for each in best)}
    for each in best:
        network, backbone = load_trial(
            setup, TrialResult(each.number, jobs[each.number].config, "done")
        )
        pre = setup.preprocess(backbone)
        again = evaluate(network, setup, setup.validation, pre, Precision())
        assert again.score == each.score
        assert again.loss == pytest.approx(each.loss, abs=1e-4)


def test_what_one_head_does_wrong_is_its_own_failure(setup, bad_heads) -> None:
    jobs = [
        job(0, "linear"),
        job(1, "train"),
        job(2, "nan"),
        job(3, "never"),
        job(4, "linear", head_lr=99.0),  # outside its range
        job(5, "mlp"),
        job(6, "absent"),
    ]
    outcomes = train_trials(setup, jobs, go_on)
    failed = {each.number: each.error for each in outcomes if each.status == "failed"}
    assert set(failed) == {1, 2, 3, 4, 6}
    words = {1: "I do not want to", 2: "non_finite_score", 3: "cannot be built", 4: "head_lr"}
    assert all(text in failed[number] for number, text in words.items()), failed
    fine = [each for each in outcomes if each.status == "done"]
    alone = [train_trial(setup, jobs[each.number], go_on) for each in fine]
    assert [each.scores for each in fine] == [each.scores for each in alone]
    assert all(each.score is None for each in outcomes if each.number in failed)


def test_a_pooling_that_a_backbone_does_not_know_fails_only_who_wants_it(
    setup, monkeypatch
) -> None:
    from autoft.training import together

    plain = together.Pooling

    def picky(backbone, kind, size):
        if kind == "gem":
            raise ValueError("no map here")
        return plain(backbone, kind, size)

    monkeypatch.setattr(together, "Pooling", picky)
    outcomes = train_trials(setup, many(), go_on)
    # `multilayer` takes all stages whatever the pool is.
    wants = {each.number for each in many() if each.config.train["pool"] == "gem"}
    wants -= {each.number for each in many() if each.config.head.name == "multilayer"}
    assert {each.number for each in outcomes if each.status == "failed"} == wants


def test_who_is_told_to_stop_or_past_the_deadline_stops_alone(setup) -> None:
    jobs = [job(0, "linear"), job(1, "norm_linear"), job(2, "linear", head_lr=1e-3)]
    jobs[2] = replace(jobs[2], deadline=0.0)
    outcomes = train_trials(setup, jobs, lambda report: report.number != 1)
    ended = [(each.status, len(each.scores)) for each in outcomes]
    assert ended == [("done", 3), ("stopped", 1), ("stopped", 1)]


def test_an_interruption_is_nobodys_failure(setup) -> None:
    def stop(report) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_trials(setup, [job(0, "linear"), job(1, "linear")], stop)


def director_of(setup: Setup, trials: int, heads=HEADS, watch=lambda *_: None) -> Director:
    names = tasks.Names(("head_only",), heads, True, True)
    space = replace(tasks.describe(names).space, backbones=(BACKBONE,))
    ranked = {BACKBONE: Ranked(BACKBONE, images_per_second=500.0, trained_per_second=200.0)}
    budget = Budget(time.time() + 200, trials, ranked, 72, 24)
    answers = [{"strategy": "head_only", "head": head} for head in heads]
    director = Director(
        RunFolder(setup.folder),
        space,
        Study(space, 0),
        budget,
        0,
        answers,
        lambda kind, **told: watch(kind, told),
    )
    director.resume()
    return director


def run_here(director: Director, setup: Setup) -> None:
    worker = Worker()
    try:
        local.run_trials(director, setup, [Seat(worker, "cpu", 1)])
    finally:
        worker.kill()


def ends(director: Director) -> dict[int, tuple]:
    told = Counter(each.number for each in director.results)
    assert set(told.values()) == {1}, "a trial was told twice"
    return {each.number: (each.config.head.name, each.scores) for each in director.results}


@pytest.mark.slow
def test_a_worker_that_is_killed_in_a_pack_costs_no_trial(setup, tmp_path) -> None:
    kills, notes = [], []
    worker = Worker()

    def watch(kind: str, data: dict) -> None:
        if kind == "epoch" and data["number"] == 2 and not kills:
            kills.append(1)
            worker._process.kill()
        if kind == "note":
            notes.append(data["text"])

    director = director_of(setup, 8, watch=watch)
    try:
        local.run_trials(director, setup, [Seat(worker, "cpu", 1)])
    finally:
        worker.kill()
    assert kills
    assert [each.status for each in director.results] == ["done"] * 8
    assert sum("Each is tried by itself" in note for note in notes) == 1
    plain = replace(setup, folder=tmp_path / "plain")
    (plain.folder / "trials").mkdir(parents=True)
    undisturbed = director_of(plain, 8)
    run_here(undisturbed, plain)
    assert ends(director) == ends(undisturbed)


@pytest.mark.slow
def test_a_head_that_ends_the_worker_costs_itself_alone(setup, bad_heads) -> None:
    director = director_of(setup, 4, heads=("linear", "die", "mlp", "cosine"))
    run_here(director, setup)
    found = {each.config.head.name: each for each in director.results}
    assert found["die"].status == "failed"
    assert "SIGKILL" in found["die"].error
    assert {found[name].status for name in ("linear", "mlp", "cosine")} == {"done"}
    assert len(director.results) == 4


@pytest.mark.slow
def test_a_pack_cut_off_with_the_search_ends_with_the_same_numbers(setup, tmp_path) -> None:
    def watch(kind: str, data: dict) -> None:
        if kind == "epoch" and data["number"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_here(director_of(setup, 6, watch=watch), setup)
    assert len(RunFolder(setup.folder).trials()) == 1
    again = director_of(setup, 6)
    run_here(again, setup)
    plain = replace(setup, folder=tmp_path / "plain")
    (plain.folder / "trials").mkdir(parents=True)
    whole = director_of(plain, 6)
    run_here(whole, plain)
    assert ends(again) == ends(whole)
    assert sorted(ends(again)) == list(range(6))


@pytest.mark.slow
def test_ray_trains_the_same_packs_with_the_same_numbers(setup, tmp_path, bad_heads) -> None:
    pytest.importorskip("ray")
    from autoft.search.engines import ray

    heads = (*HEADS, "never")
    director = director_of(setup, 7, heads=heads)
    ray.run_trials(director, setup, 1, False)
    here = replace(setup, folder=tmp_path / "here")
    (here.folder / "trials").mkdir(parents=True)
    other = director_of(here, 7, heads=heads)
    run_here(other, here)
    assert ends(director) == ends(other)
    assert sum(each.status == "failed" for each in director.results) == 1
    for number, (_, scores) in ends(director).items():
        curve = Path(setup.folder / f"trials/{number:04d}/metrics.jsonl")
        assert [line["score"] for line in read_lines(curve)] == list(scores)


@pytest.mark.slow
def test_an_actor_that_dies_of_a_pack_costs_the_guilty_alone(setup, bad_heads) -> None:
    pytest.importorskip("ray")
    from autoft.search.engines import ray

    director = director_of(setup, 4, heads=("linear", "die", "mlp", "cosine"))
    ray.run_trials(director, setup, 1, False)
    found = {each.config.head.name: each.status for each in director.results}
    assert found == {"linear": "done", "die": "failed", "mlp": "done", "cosine": "done"}
    assert len(director.results) == 4
