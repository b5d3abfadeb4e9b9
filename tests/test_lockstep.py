"""Trials that take their steps together end as each would by itself."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from autoft.errors import MachineError
from autoft.network.build import build
from autoft.search.budget import Budget
from autoft.search.configs import Space, StrategyInfo
from autoft.search.director import Director
from autoft.search.folder import RunFolder
from autoft.search.study import Study
from autoft.space import Choice, Float, Parameter
from autoft.training import divided, lockstep
from autoft.training.job import Costs, Outcome, Precision, Ranked, Setup, Sharing, TrialJob
from autoft.training.plan import Room, Work, choose, predict
from autoft.training.trial import train_trial, train_trials
from autoft.values import Part, TrialConfig

SMALL = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet"]
HALF, LINEAR = Part("freeze", {"depth": 0.5}), Part("linear")
OWN = (
    {"lr": 1e-3},
    {"lr": 3e-4, "smoothing": 0.1, "ema": True},
    {"lr": 1e-3, "optimizer": "sgd", "l2sp": 1e-3},
)


@pytest.fixture
def setup(small_setup, tmp_path, monkeypatch) -> Setup:
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))
    return small_setup


def live(setup, backbone, number, *, epochs=3, head=LINEAR, seed=5, **own) -> TrialJob:
    depth = len(build(setup.sources[backbone], pretrained=False, image_size=64).stages) // 2
    train = {"head_lr": 3e-3, "batch_size": 16, "augment": "crop_flip", "mix": "mixup"} | own
    config = TrialConfig(Part(backbone), HALF, head, train, seed)
    return TrialJob(
        number,
        config,
        epochs,
        time.time() + 300,
        Precision(channels_last=True),
        sharing=Sharing("live", depth),
        together=3,
    )


def by_itself(job: TrialJob) -> TrialJob:
    assert job.sharing is not None
    return replace(job, sharing=Sharing("rerun", job.sharing.cut), together=1)


def place(setup, number):
    return setup.folder / "trials" / f"{number:04d}"


def weights(setup, number):
    return load_file(place(setup, number) / "scored.safetensors")


def sharing_of(setup, number) -> dict:
    return json.loads((place(setup, number) / "sharing.json").read_text())


def same(one, other) -> bool:
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("model", SMALL)
def test_each_ends_bit_for_bit_as_by_itself(setup, fixed, tmp_path, model) -> None:
    heads = [Part("linear"), Part("mlp"), Part("mlp")]  # with dropout: random numbers count
    jobs = [
        live(setup, model, number, head=head, **own)
        for number, (own, head) in enumerate(zip(OWN, heads, strict=True))
    ]
    both = replace(setup, folder=tmp_path / "together")
    found = train_trials(both, jobs, lambda _: True)
    assert [outcome.status for outcome in found] == ["done"] * 3
    for job, outcome in zip(jobs, found, strict=True):
        assert sharing_of(both, job.number)["mode"] == "live"
        alone = replace(setup, folder=tmp_path / "alone")
        expected = train_trial(alone, by_itself(job), lambda _: True)
        assert outcome.scores == expected.scores
        assert outcome.loss == pytest.approx(expected.loss, rel=1e-6)
        assert same(weights(both, job.number), weights(alone, job.number))


def test_the_frozen_stages_run_once_for_all(setup, fixed, tmp_path, monkeypatch) -> None:
    seen: list[int] = []
    plain = divided.Divided.rows

    def counting(self, images):
        seen.append(len(images))
        return plain(self, images)

    monkeypatch.setattr(divided.Divided, "rows", counting)
    jobs = [live(setup, "test_resnet", number, **own) for number, own in enumerate(OWN)]
    train_trials(replace(setup, folder=tmp_path), jobs, lambda _: True)
    left_out = len(setup.train) % 16 == 1  # a last batch of one image is dropped
    assert sum(seen) == 3 * (len(setup.train) - left_out + len(setup.validation))


def test_what_one_fails_of_is_nothing_to_the_others(setup, fixed, tmp_path, monkeypatch) -> None:
    plain = lockstep.take_step

    def diverging(tuning, batch, progress):
        if tuning.trial.job.number == 1 and progress > 0.2:
            batch = replace(batch, weights=batch.weights * float("nan"))
        return plain(tuning, batch, progress)

    monkeypatch.setattr(lockstep, "take_step", diverging)
    jobs = [live(setup, "test_resnet", number, **own) for number, own in enumerate(OWN)]
    both, alone = (replace(setup, folder=tmp_path / name) for name in ("together", "alone"))
    found = train_trials(both, jobs, lambda _: True)
    assert [outcome.status for outcome in found] == ["done", "failed", "done"]
    assert "non_finite" in found[1].error
    expected = train_trial(alone, by_itself(jobs[2]), lambda _: True)
    assert found[2].scores == expected.scores
    assert same(weights(both, 2), weights(alone, 2))


def test_a_head_that_raises_fails_alone(setup, fixed, tmp_path, monkeypatch) -> None:
    plain, steps = lockstep.take_step, 0

    def raising(tuning, batch, progress):
        nonlocal steps
        steps += tuning.trial.job.number == 0
        if steps == 3 and tuning.trial.job.number == 0:
            raise ValueError("the plugin's doing")
        return plain(tuning, batch, progress)

    monkeypatch.setattr(lockstep, "take_step", raising)
    jobs = [live(setup, "test_resnet", number) for number in range(2)]
    found = train_trials(replace(setup, folder=tmp_path), jobs, lambda _: True)
    assert [outcome.status for outcome in found] == ["failed", "done"]
    assert found[0].error == "ValueError: the plugin's doing"


def test_one_that_is_stopped_leaves_the_others_to_go_on(setup, fixed, tmp_path) -> None:
    jobs = [live(setup, "test_resnet", number, **own) for number, own in enumerate(OWN)]
    both = replace(setup, folder=tmp_path)
    found = train_trials(both, jobs, lambda told: told.number != 0 or told.epoch < 1)
    assert [outcome.status for outcome in found] == ["stopped", "done", "done"]
    assert [len(outcome.scores) for outcome in found] == [1, 3, 3]
    assert found[0].seconds < found[1].seconds
    done = [json.loads((place(both, n) / "done.json").read_text())["status"] for n in range(3)]
    assert done == ["stopped", "done", "done"]
    told = []  # until somebody wrote how they ended they can go on, and have nothing left to do
    again = [train_trial(both, by_itself(jobs[n]), told.append) for n in (1, 2)]
    assert [(each.status, each.scores) for each in again] == [
        ("done", e.scores) for e in found[1:]
    ]
    assert not told


def test_at_the_deadline_all_stop_with_what_they_have(setup, fixed, tmp_path, monkeypatch) -> None:
    jobs = [live(setup, "test_resnet", number) for number in range(2)]
    clock = [0.0]
    monkeypatch.setattr("autoft.training.lockstep.time.time", lambda: clock[0])

    def late_after_the_first(told) -> bool:
        clock[0] = jobs[0].deadline + 1 if told.number == 1 else 0.0
        return True

    found = train_trials(replace(setup, folder=tmp_path), jobs, late_after_the_first)
    assert {outcome.status for outcome in found} == {"stopped"}
    assert {len(outcome.scores) for outcome in found} == {1}


def test_one_stopped_before_a_crash_is_stopped_again_at_the_same_epoch(
    setup, fixed, tmp_path
) -> None:
    jobs = [live(setup, "test_resnet", number, epochs=4) for number in range(2)]
    both = replace(setup, folder=tmp_path)

    def stop_one_and_crash(told) -> bool:
        if told.number == 1 and told.epoch == 3:
            raise KeyboardInterrupt
        return told.number == 1 or told.epoch < 2

    with pytest.raises(KeyboardInterrupt):
        train_trials(both, jobs, stop_one_and_crash)
    later = replace(jobs[0], sharing=None, together=1)
    asked = []
    train_trial(both, later, lambda told: asked.append(told.epoch) or told.epoch < 2)
    assert asked == [2]


@pytest.mark.parametrize("when", ["at the start", "in the second epoch"])
def test_what_they_share_may_fail_and_each_goes_on_by_itself(
    setup, fixed, tmp_path, monkeypatch, when
) -> None:
    plain, calls = divided.Divided.rows, 0
    first = 0 if when == "at the start" else 12

    def failing(self, images):
        nonlocal calls
        calls += 1
        if calls > first:
            raise MachineError("the memory does not hold it")
        return plain(self, images)

    monkeypatch.setattr(divided.Divided, "rows", failing)
    jobs = [live(setup, "test_resnet", number, **own) for number, own in enumerate(OWN)]
    both, alone = (replace(setup, folder=tmp_path / name) for name in ("together", "alone"))
    found = train_trials(both, jobs, lambda _: True)
    assert [outcome.status for outcome in found] == ["done"] * 3
    for job, outcome in zip(jobs, found, strict=True):
        assert outcome.scores == train_trial(alone, by_itself(job), lambda _: True).scores
        told = (place(both, job.number) / "metrics.jsonl").read_text()
        assert "the memory does not hold it" in told


def test_the_time_is_shared_out(setup, fixed, tmp_path) -> None:
    jobs = [live(setup, "test_resnet", number, **own) for number, own in enumerate(OWN)]
    began = time.monotonic()
    found = train_trials(replace(setup, folder=tmp_path), jobs, lambda _: True)
    took = time.monotonic() - began
    assert sum(outcome.seconds for outcome in found) == pytest.approx(took, rel=0.2)


@pytest.mark.parametrize(
    "other",
    [
        {"batch_size": 32},
        {"seed": 6},
        {"augment": "crop"},
        {"train_scale": 0.7},
        {"head": Part("multilayer")},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_cannot_be_in_step_is_trained_by_itself(setup, fixed, tmp_path, other) -> None:
    jobs = [live(setup, "test_resnet", number) for number in range(2)]
    jobs.append(live(setup, "test_resnet", 2, **other))
    both = replace(setup, folder=tmp_path)
    found = train_trials(both, jobs, lambda _: True)
    assert [outcome.status for outcome in found] == ["done"] * 3
    assert [sharing_of(both, n)["mode"] for n in range(3)] == ["live", "live", "rerun"]


def test_one_alone_is_no_group(setup, fixed, tmp_path) -> None:
    jobs = [live(setup, "test_resnet", 0), live(setup, "test_vit", 1)]
    both = replace(setup, folder=tmp_path)
    found = train_trials(both, jobs, lambda _: True)
    assert [outcome.status for outcome in found] == ["done"] * 2
    assert [sharing_of(both, n)["mode"] for n in range(2)] == ["rerun"] * 2


def test_one_that_was_cut_off_goes_on_by_itself_with_the_same_numbers(
    setup, fixed, tmp_path
) -> None:
    jobs = [live(setup, "test_resnet", number, epochs=4, **OWN[number]) for number in range(2)]
    whole, broken = (replace(setup, folder=tmp_path / name) for name in ("whole", "broken"))
    expected = train_trials(whole, jobs, lambda _: True)

    def crash_in_the_third(told) -> bool:
        if told.epoch == 3:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        train_trials(broken, jobs, crash_in_the_third)
    for job, before in zip(jobs, expected, strict=True):
        later = train_trial(broken, replace(job, sharing=None, together=1), lambda _: True)
        assert later.scores == before.scores
        assert same(weights(broken, job.number), weights(whole, job.number))


# --- what is planned ---------------------------------------------------------------------------

COSTS = Costs(
    prefix=(0.0, 4e-3, 8e-3, 10e-3),
    tail=(30e-3, 20e-3, 10e-3, 1e-5),
    score=(10e-3, 6e-3, 2e-3, 0.0),
    bytes=(0, 1_000_000, 100_000, 500),
    view=1e-3,
)
WORK = Work(1000, 200, 10, augmented=True, mixed=True)
WIDE = Room(ram=10**11, disk=10**11, device=0, bandwidth=1e9)
NONE = Room(0, 0, 0, 1e9)


def test_in_step_each_adds_its_tail_and_its_share_of_the_rest() -> None:
    found = predict(COSTS, 2, replace(WORK, together=4), WIDE)
    assert found["live"] == pytest.approx(10 * (1000 * 12e-3 + 200 * 4e-3))
    assert found["rerun"] == pytest.approx(10 * (1000 * 18e-3 + 200 * 10e-3))
    assert set(found) == {"live", "rerun"}  # mixed images are never the same twice
    assert choose(COSTS, 2, replace(WORK, together=4), WIDE) == Sharing("live", 2)


@pytest.mark.parametrize(
    ("cut", "given", "room", "mode"),
    [
        (2, {"together": 1}, WIDE, "rerun"),
        (0, {"together": 4}, WIDE, "rerun"),
        (2, {"together": 4, "smaller": True}, WIDE, "rerun"),
        (2, {"together": 4, "mixed": False, "epochs": 40}, WIDE, "disk"),
        (2, {"together": 4, "mixed": False}, NONE, "live"),
        (1, {"together": 2, "mixed": False}, NONE, "live"),
    ],
)
def test_what_is_chosen_where_several_could_go_in_step(cut, given, room, mode) -> None:
    assert choose(COSTS, cut, replace(WORK, **given), room).mode == mode


def make_director(folder, *, room=NONE, seconds=4000.0, trials=None) -> Director:
    (folder / "trials").mkdir()
    depth = Parameter("depth", Choice(0.34, 0.67), 0.67)
    space = Space(
        ("a",),
        {
            "freeze": StrategyInfo((depth,), True, True, True, keeps_prefix=True),
        },
        {"linear": ()},
        (
            Parameter("lr", Float(1e-4, 1e-2, log=True), 1e-3),
            Parameter("augment", Choice("crop", "crop_flip"), "crop"),
            Parameter("mix", Choice("none", "mixup"), "none"),
        ),
        (Parameter("head_lr", Float(1e-4, 1e-2, log=True), 1e-3),),
    )
    ranked = Ranked(
        "a", 0.9, images_per_second=100, trained_per_second=33, num_stages=3, costs=COSTS
    )
    budget = Budget(time.time() + seconds, trials, {"a": ranked}, 1000, 200, room)
    director = Director(
        RunFolder(folder), space, Study(space, 0), budget, 0, (), lambda *_, **__: None
    )
    director.resume()
    return director


def finish(director, jobs) -> None:
    for job in jobs:
        scores = (0.5,) * job.epochs
        director.on_outcome(Outcome(job.number, "done", scores, 0.5, 1.0, 1.0))


def packs_of(director, most=12) -> list[tuple[TrialJob, ...]]:
    packs = []
    while len(packs) < most and (jobs := director.next_jobs()):
        packs.append(jobs)
        finish(director, jobs)
    return packs


def test_tails_are_proposed_in_step_where_nothing_can_be_kept(tmp_path) -> None:
    packs = packs_of(make_director(tmp_path))
    together = [jobs for jobs in packs if len(jobs) > 1]
    assert together
    for jobs in together:
        assert {job.sharing for job in jobs} == {Sharing("live", jobs[0].sharing.cut)}
        assert {job.together for job in jobs} == {len(jobs)}
        assert len({job.config.seed for job in jobs}) == 1
        assert len({repr(job.config.strategy) for job in jobs}) == 1
        assert len({(job.config.train["augment"], job.config.train["mix"]) for job in jobs}) == 1
        assert len({job.config.train["lr"] for job in jobs}) == len(jobs)
        assert len({job.number for job in jobs}) == len(jobs)


def test_what_can_be_kept_is_trained_one_by_one(tmp_path) -> None:
    packs = packs_of(make_director(tmp_path, room=WIDE))
    kept = [jobs for jobs in packs if jobs[0].config.train["mix"] == "none"]
    assert kept
    assert {len(jobs) for jobs in kept} == {1}


def test_an_engine_that_cannot_end_one_of_them_gets_none_in_step(tmp_path) -> None:
    director = make_director(tmp_path)
    director.lockstep = False
    assert {len(jobs) for jobs in (packs_of(director))} == {1}


def test_no_more_trials_are_in_step_than_were_asked_for(tmp_path) -> None:
    director = make_director(tmp_path, trials=6)
    assert sum(len(jobs) for jobs in packs_of(director)) == 6


def test_trials_in_step_leave_half_of_the_time(tmp_path) -> None:
    director = make_director(tmp_path, seconds=600.0)
    sizes = []
    while len(sizes) < 12 and (jobs := director.next_jobs()):
        sizes.append(len(jobs))
        expected = director.budget.expected(jobs[0].config, jobs[0].epochs, True, len(jobs))
        assert sizes[-1] <= 1 or len(jobs) * expected <= 300
        finish(director, jobs)
    assert max(sizes) > 1


def test_a_dead_worker_has_each_tried_by_itself(tmp_path) -> None:
    director = make_director(tmp_path)
    jobs = director.next_jobs()
    for _ in range(20):
        if len(jobs) > 1:
            break
        finish(director, jobs)
        jobs = director.next_jobs()
    director.take_back(jobs)
    again = director.next_jobs()
    assert [job.number for job in again] == [jobs[0].number]
    assert again[0].sharing is None
    assert again[0].together == 1
    finish(director, again)
    assert {len(jobs) for jobs in (packs_of(director))} == {1}  # it may be the memory
