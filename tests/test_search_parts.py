"""The parts of the search that need no training: settings, folder, halving, study, director."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from autoft.cli.summary import ranking_lines
from autoft.errors import DataError, MachineError, UsageError
from autoft.network.provide import Provided
from autoft.network.sources import Source
from autoft.search import ending, halving, policy, prepare
from autoft.search.budget import Budget
from autoft.search.configs import Space, StrategyInfo
from autoft.search.director import Director
from autoft.search.engines import local
from autoft.search.engines.tasks import Described, describe
from autoft.search.engines.weighing import LeftOut
from autoft.search.folder import RunFolder, claim
from autoft.search.portfolio import WEAK_LR, portfolio, usual_of
from autoft.search.session import Session
from autoft.search.settings import Settings, parse_time, read_settings
from autoft.search.study import Study, write_view
from autoft.selection import winner
from autoft.selection.intervals import wilson
from autoft.selection.regime import judge, size_class
from autoft.space import Choice, Float, Int, Parameter, read_signature
from autoft.training import checkpoint, recipe
from autoft.training.job import (
    Costs,
    Images,
    Outcome,
    Precision,
    Ranked,
    Report,
    Setup,
    Sharing,
    TrialJob,
)
from autoft.training.measures import Measured
from autoft.training.noted import note_sharing
from autoft.training.plan import Room
from autoft.values import PROCEDURAL, Part, TrialConfig, TrialResult

LR = Parameter("lr", Float(1e-5, 1e-2, log=True), 1e-3)
HIDDEN = Parameter("hidden", Int(8, 64, log=True), 16)


def make_space() -> Space:
    return Space(
        backbones=("a", "b"),
        strategies={
            "head_only": StrategyInfo((), False, True, True),
            "full": StrategyInfo((Parameter("bottom", Float(0.01, 1), 0.1),), True, True, True),
            "freeze": StrategyInfo((), True, True, True, keeps_prefix=True),
            "theirs": StrategyInfo((), True, True, False),
        },
        heads={"linear": (), "mlp": (HIDDEN,)},
        tuning=(LR, Parameter("augment", Choice("none", "crop", "crop_flip"), "crop_flip")),
        probing=(LR,),
        augments=("none", "crop"),
    )


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("1.5h", 5400), ("1h30m", 5400)]
)
def test_a_time_is_read(text, seconds) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5 minutes", "-3m", "0", "1x", "m"])
def test_what_is_no_time_is_refused(text) -> None:
    with pytest.raises(ValueError, match="time"):
        parse_time(text)


def test_flags_win_over_environment_over_file(tmp_path, monkeypatch) -> None:
    file = tmp_path / "c.toml"
    file.write_text('dataset = "d"\ntime = "5m"\nseed = 3\nheads = ["mlp"]\n')
    monkeypatch.setenv("AUTOFT_TIME", "7m")
    settings = read_settings({"seed": 9, "time": None}, file)
    assert (settings.time, settings.seed, settings.heads) == (420.0, 9, ("mlp",))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "--dataset is not given"),
        ({"dataset": "d", "time": "soon"}, "--time 'soon' cannot be used"),
        ({"dataset": "d", "metric": "acuracy"}, "--metric 'acuracy'"),
        ({"dataset": "d", "trails": 3}, "Did you mean 'trials'"),
        ({"dataset": "d", "device": "tpu"}, "--device 'tpu'"),
        ({"dataset": "d", "export": "onx"}, "Did you mean 'onnx'"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(flags, words) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read_settings(flags)
    assert "\n" not in str(caught.value)


def test_settings_survive_their_own_file(tmp_path) -> None:
    settings = Settings(dataset='we"ird\\päth', time="15m", backbones="x,y", offline=True)
    RunFolder(tmp_path).write_settings(settings)
    assert read_settings({}, tmp_path / "config.toml") == settings


# --- the run folder ---------------------------------------------------------------------------


def result(number: int, score: float | None = 0.5, status: str = "done", **more) -> TrialResult:
    config = more.pop("config", None) or make_space().default({}, number)
    scores = more.pop("scores", () if score is None else (score,))
    return TrialResult(number, config, status, scores, score, 1.0, 2.0, **more)


def test_a_torn_last_line_is_cut_and_nothing_else_is_lost(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_trial(result(0))
    folder.append_trial(result(1))
    truth = tmp_path / "trials.jsonl"
    for cut in range(1, len(truth.read_bytes().splitlines(keepends=True)[1])):
        torn = truth.read_bytes()[:-cut]
        copy = tmp_path / str(cut)
        copy.mkdir()
        (copy / "trials.jsonl").write_bytes(torn)
        other = RunFolder(copy)
        assert [r.number for r in other.trials()] == [0]
        other.append_trial(result(2))
        assert [r.number for r in other.trials()] == [0, 2]


def test_T13_a_folder_in_use_names_its_holder(tmp_path) -> None:  # noqa: N802 - the row's id
    with claim(tmp_path), pytest.raises(MachineError, match="in use by process"), claim(tmp_path):
        pass
    with claim(tmp_path):  # the lock of a run that ended is free again
        pass


# --- halving ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "unit", "marks"),
    [
        (1, 1, ()),
        (2, 1, ()),
        (3, 1, (1,)),
        (5, 1, (1,)),
        (8, 1, (2,)),
        (10, 1, (2, 6)),
        (20, 1, (2, 6)),
        (50, 1, (3, 12)),
        (100, 17, (17,)),  # 100 epochs of three steps are worth five
        (30, 17, ()),
    ],
)
def test_rungs_are_where_they_are_known_to_pay(epochs, unit, marks) -> None:
    assert halving.rungs(epochs, unit) == marks


def test_only_the_best_third_or_quarter_goes_on() -> None:
    assert halving.goes_on(0.1, [])
    assert halving.goes_on(0.1, [0.9])
    assert not halving.goes_on(0.5, [0.9, 0.8])
    assert halving.goes_on(0.95, [0.9, 0.8])
    assert halving.goes_on(0.85, [0.9, 0.8, 0.1, 0.2, 0.3])
    assert not halving.goes_on(0.85, [0.9, 0.8, 0.1, 0.2, 0.3], 4)
    assert halving.goes_on(0.1, [0.9, 0.8], 4)
    assert [halving.reduction(epochs) for epochs in (5, 10, 20, 50)] == [4, 3, 3, 4]


def test_until_a_quarter_of_the_epochs_only_the_alike_are_compared() -> None:
    assert halving.races_alike(2, 20)
    assert not halving.races_alike(6, 20)


# --- the study --------------------------------------------------------------------------------


def test_proposals_depend_on_history_and_number_alone() -> None:
    def proposals() -> list[TrialConfig]:
        study = Study(make_space(), seed=1)
        for number in range(14):
            config = study.propose(number, seed=number)
            study.tell(result(number, score=number / 20, config=config))
        return [study.propose(number, seed=number) for number in (14, 15)]

    assert proposals() == proposals()


def test_a_rebuilt_study_proposes_the_same() -> None:
    space = make_space()
    first, rebuilt = Study(space, seed=1), Study(space, seed=1)
    for number in range(14):
        config = first.propose(number, seed=number)
        told = result(number, score=number / 20, config=config)
        first.tell(told)
        rebuilt.tell(told)
    assert first.propose(14, seed=0) == rebuilt.propose(14, seed=0)


def test_any_seed_will_do() -> None:
    assert Study(make_space(), seed=2**31 - 1).propose(0, seed=0)


def test_fixed_answers_are_kept() -> None:
    study = Study(make_space(), seed=0)
    for number in range(12):
        config = study.propose(number, 0, {"strategy": "head_only"})
        assert config.strategy.name == "head_only"
        study.forget(number)


def test_every_kind_of_result_can_be_told() -> None:
    study = Study(make_space(), seed=0)
    for number, (score, status) in enumerate([(0.5, "done"), (0.4, "stopped"), (None, "failed")]):
        config = study.propose(number, 0)
        study.tell(result(number, score, status, config=config))
    study.propose(3, 0)


def test_the_study_can_be_viewed_with_optuna(tmp_path) -> None:
    import optuna

    results = [result(0, 0.5), result(1, 0.4, "stopped"), result(2, None, "failed")]
    write_view(tmp_path / "study.db", make_space(), results, "r")
    seen = optuna.load_study(study_name="r", storage=f"sqlite:///{tmp_path / 'study.db'}").trials
    assert [trial.state.name for trial in seen] == ["COMPLETE", "PRUNED", "FAIL"]
    assert seen[0].params["backbone"] == "a"


# --- the director -----------------------------------------------------------------------------


def make_director(
    folder: RunFolder,
    *,
    trials=None,
    seconds=1000.0,
    speed=100.0,
    heads=("linear", "mlp"),
    backbones=("a", "b"),
) -> Director:
    (folder.path / "trials").mkdir(exist_ok=True)
    space = replace(make_space(), heads=dict.fromkeys(heads, ()), backbones=backbones)
    ranked = [
        Ranked(label, probe=probe, images_per_second=speed, trained_per_second=speed)
        for label, probe in (("a", 0.9), ("b", 0.85))
        if label in backbones
    ]
    regime = judge(np.arange(100) % 2, None, (), weights=True)
    events = []
    director = Director(
        folder,
        space,
        Study(space, 0),
        Budget(time.time() + seconds, trials, {r.label: r for r in ranked}, 100, 20),
        0,
        portfolio(space, regime, ranked),
        lambda kind, **data: events.append((kind, data)),
    )
    director.resume()
    return director


def finish(director: Director, job, score=0.5, status="done", error="", seconds=1.0) -> None:
    scores = () if score is None else (score,) * job.epochs
    director.on_outcome(Outcome(job.number, status, scores, score, 1.0, seconds, error))


def run_all(director: Director, score=lambda job: 0.5, seconds=1.0, most=100) -> list[tuple]:
    """Run until there is no more; return the packs."""
    packs = []
    while (jobs := director.next_jobs()) and sum(map(len, packs)) < most:
        packs.append(jobs)
        for job in jobs:
            finish(director, job, score(job), seconds=seconds)
    return packs


def next_tuning(director: Director):
    """Return the next trial that trains its backbone; heads on the way end well."""
    jobs = director.next_jobs()
    while jobs and jobs[0].config.strategy.name == "head_only":
        for job in jobs:
            finish(director, job)
        jobs = director.next_jobs()
    return jobs[0]


@pytest.mark.parametrize("left", ["", "{"])
def test_a_trial_whose_config_a_crash_left_torn_was_not_begun(tmp_path, left) -> None:
    folder = RunFolder(tmp_path)
    (job,) = make_director(folder).next_jobs()
    checkpoint.start(folder.trial(job.number), job, pretrained=True)
    assert folder.begun(job.number).config == job.config
    (folder.trial(job.number) / "config.json").write_text(left)
    assert folder.begun(job.number) is None
    assert make_director(folder).next_jobs()[0].number == job.number + 1


def test_the_linear_probe_is_first_and_third_parties_are_tried(tmp_path) -> None:
    director = make_director(RunFolder(tmp_path), trials=12)
    packs = run_all(director)
    configs = [job.config for jobs in packs for job in jobs]
    assert len(configs) == 12
    assert len(packs[0]) == 1
    assert (configs[0].strategy.name, configs[0].head.name) == ("head_only", "linear")
    assert configs[0].backbone.name == "a"
    assert "theirs" in {config.strategy.name for config in configs}
    assert {config.train.get("augment", "crop") for config in configs} <= {"none", "crop"}


def test_heads_are_trained_in_packs_on_one_backbone_with_one_seed(tmp_path) -> None:
    director = make_director(RunFolder(tmp_path), heads=("linear", "mlp", "norm_linear", "cosine"))
    packs = run_all(director, seconds=0.5)
    heads = [jobs for jobs in packs if jobs[0].config.strategy.name == "head_only"]
    assert [len(jobs) for jobs in heads[:2]] == [1, 1]  # the probes of two backbones
    designs = heads[2]
    assert len(designs) > 3  # and more with them than the portfolio has
    assert {job.config.head.name for job in designs[:3]} == {"norm_linear", "cosine", "mlp"}
    for jobs in packs:
        assert len({job.config.backbone.name for job in jobs}) == 1
        assert len(jobs) == 1 or all(j.config.strategy.name == "head_only" for j in jobs)
    assert len({job.config.seed for jobs in heads for job in jobs}) == 1
    numbers = [job.number for jobs in packs for job in jobs]
    assert numbers == list(range(len(numbers)))


def test_a_pack_is_cut_to_the_trials_that_are_left(tmp_path) -> None:
    heads = ("linear", "mlp", "norm_linear", "cosine")
    director = make_director(RunFolder(tmp_path), trials=4, heads=heads)
    assert [len(jobs) for jobs in run_all(director)] == [1, 1, 2]


def test_a_bad_trial_is_stopped_at_its_rung_and_a_good_one_is_not(tmp_path) -> None:
    director = make_director(RunFolder(tmp_path))
    director._race.unit = 1  # epochs that are worth the name
    director.budget.epochs = lambda *_: 20
    steps = [(0.1, True), (0.6, True), (0.7, True), (0.3, False), (0.8, True), (0.2, False)]
    for score, goes_on in steps:  # the first is what the regime advises: it is never stopped
        job = next_tuning(director)
        rung = halving.rungs(job.epochs)[-1]  # where all are compared
        assert director.on_report(Report(job.number, rung, score, 1.0, 1.0, 1.0)) is goes_on
        assert director.on_report(Report(job.number, rung + 1, 0.0, 1.0, 1.0, 1.0))
        scores = (score,) * rung
        director.on_outcome(
            Outcome(job.number, "done" if goes_on else "stopped", scores, score, 1.0, 1.0)
        )


def test_early_only_trials_that_freeze_alike_are_compared() -> None:
    race = halving.Race()
    race.note(0, "tails", 20, (0.9,) * 20)
    race.note(1, "tails", 20, (0.8,) * 20)
    assert not race.goes_on(2, "tails", 20, 2, 0.5)
    assert race.goes_on(3, "full", 20, 2, 0.5)
    assert race.goes_on(3, "full", 20, 3, 0.0)  # no rung
    assert not race.goes_on(3, "full", 20, 6, 0.5)


def test_a_trial_cut_off_comes_back_with_its_number_and_its_choices(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    director = make_director(folder)
    (first,), (second,) = director.next_jobs(), director.next_jobs()
    finish(director, first)
    tuned = next_tuning(director)
    assert tuned.head_start == {}  # what this space asks of heads is no part of it
    second = replace(second, precision=Precision(bf16=True))  # today's timing may say otherwise
    tuned = replace(tuned, head_start={"head_lr": 0.01})
    for job in (second, tuned):
        checkpoint.start(folder.trial(job.number), job, pretrained=True)
    again = make_director(folder)
    done = [r.number for r in again.results]
    assert 0 in done
    assert not {second.number, tuned.number} & set(done)
    (back,), (other,) = again.next_jobs(), again.next_jobs()
    assert (back.number, back.config) == (second.number, second.config)
    assert (back.epochs, back.precision) == (second.epochs, second.precision)
    assert (other.number, other.head_start) == (tuned.number, {"head_lr": 0.01})
    assert again.next_jobs()[0].number == 1 + max([*done, second.number, tuned.number])


def test_a_run_goes_on_whose_second_backbone_was_not_ranked_again(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    director = make_director(folder)
    tail = replace(next_tuning(director).config, backbone=Part("b"))
    kept = TrialResult(90, tail, "done", (0.6,) * 4, 0.6, 1.0, 5.0, epochs=4)
    folder.append_trial(kept)
    folder.trial(90).mkdir(parents=True)
    note_sharing(folder.trial(90), Sharing("disk", 1, 4), "")
    again = make_director(folder, backbones=("a",))  # no time to rank b
    assert kept in again.results
    assert again.next_jobs()


def test_a_trial_that_goes_on_has_passed_its_rungs_already(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    director = make_director(folder)
    director.budget.epochs = lambda *_: 102  # as many short ones count as six
    for _ in range(2):
        job = next_tuning(director)
        checkpoint.start(folder.trial(job.number), job, pretrained=True)
        for epoch in range(1, 35):
            report = Report(job.number, epoch, 0.9, 1.0, 1.0, 1.0)
            checkpoint.append_curve(folder.trial(job.number), report)
    again = make_director(folder)
    phase = again._phase(job.config)
    assert not again._race.goes_on(99, phase, 102, 34, 0.1)
    assert again._race.goes_on(job.number, phase, 102, 34, 0.95)  # it says it again
    assert not again._race.goes_on(100, phase, 102, 34, 0.93)


def test_what_is_only_for_an_unfinished_trial_goes_when_its_end_is_written(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    director = make_director(folder)
    (job,) = director.next_jobs()
    checkpoint.start(folder.trial(job.number), job, pretrained=True)
    state = folder.trial(job.number) / "last.safetensors"
    state.write_bytes(b"its latest state")
    finish(director, job)
    assert not state.exists()
    state.write_bytes(b"the process died before it dropped this")
    make_director(folder)
    assert not state.exists()


def test_an_answer_that_is_none_of_todays_does_not_end_a_run(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    director = make_director(folder)
    job = next_tuning(director)
    odd = replace(job, config=replace(job.config, train={**job.config.train, "augment": "gone"}))
    checkpoint.start(folder.trial(job.number), odd, pretrained=True)
    again = make_director(folder)
    back = next(each for each in again.next_jobs() if each.number == job.number)
    assert back.config == odd.config


def test_a_trial_that_hangs_ends_with_what_it_had_reached(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    director = make_director(folder)
    job = next_tuning(director)
    assert director.given_up(job.number, "it hung").status == "failed"
    checkpoint.start(folder.trial(job.number), job, pretrained=True)
    for epoch, score in ((1, 0.5), (2, 0.7)):
        report = Report(job.number, epoch, score, 1.0, 1.0, 10.0 * epoch)
        checkpoint.append_curve(folder.trial(job.number), report)
    with (folder.trial(job.number) / "metrics.jsonl").open("a") as curve:
        curve.write('{"number": 3, "ep')  # and the machine went down
    assert director.given_up(job.number, "it hung").status == "failed"  # without weights
    (folder.trial(job.number) / "scored.safetensors").write_bytes(b"weights")
    found = director.given_up(job.number, "it hung")
    assert (found.status, found.scores, found.seconds) == ("stopped", (0.5, 0.7), 20.0)


def test_a_pack_cut_off_comes_back_and_after_a_death_one_by_one(tmp_path) -> None:
    folder, heads = RunFolder(tmp_path), ("linear", "mlp", "norm_linear", "cosine")
    director = make_director(folder, heads=heads)
    for _ in range(2):
        finish(director, director.next_jobs()[0])
    pack = director.next_jobs()
    assert len(pack) > 2
    director.take_back(pack)
    alone = [director.next_jobs() for _ in pack]
    assert [(len(jobs), jobs[0].number) for jobs in alone] == [(1, job.number) for job in pack]
    for job in pack:
        checkpoint.start(folder.trial(job.number), job, pretrained=True)
    again = make_director(folder, heads=heads).next_jobs()
    assert [job.config for job in again] == [job.config for job in pack]


def test_a_trial_that_trains_its_backbone_begins_with_the_best_head(tmp_path) -> None:
    space = make_space()
    train = {"head_lr": 0.01, "weight_decay": 0.2, "smoothing": 0.1, "pool": "gem"}

    def head(number, score, name, backbone="a") -> TrialResult:
        config = TrialConfig(
            Part(backbone), Part("head_only"), Part(name), train | {"head_lr": number / 100}
        )
        return result(number, score, config=config)

    def job(name: str, strategy: str = "full") -> TrialJob:
        return TrialJob(9, TrialConfig(Part("a"), Part(strategy), Part(name), {}), 3, 0.0)

    results = [
        head(1, 0.7, "linear"),
        head(2, 0.8, "linear"),
        head(3, 0.9, "mlp"),
        head(4, 0.95, "linear", "b"),
        head(5, None, "linear"),
    ]
    assert policy.head_start(results[:0], space, job("linear")) == {}
    assert policy.head_start(results, space, job("linear"))["head_lr"] == 0.02
    assert policy.head_start(results, space, job("cosine"))["head_lr"] == 0.03
    assert set(policy.head_start(results, space, job("mlp"))) == set(policy.HEAD_START)
    assert policy.head_start(results, space, job("mlp", "head_only")) == {}


def test_an_epoch_that_is_reported_again_gets_the_answer_that_it_had(tmp_path) -> None:
    director = make_director(RunFolder(tmp_path))
    told = []
    (job,) = director.next_jobs()

    def refuse(report):
        told.append(report.epoch)
        return False

    director.on_report = refuse
    desk = local.Desk(director, None)
    report = Report(job.number, 2, 0.5, 1.0, 1.0, 1.0)
    assert [local._goes_on(desk, report) for _ in range(3)] == [False] * 3
    assert told == [2]


def test_a_trial_that_had_to_end_in_time_is_told_of(tmp_path) -> None:
    director = make_director(RunFolder(tmp_path))
    director.budget.epochs = lambda *_: 20
    told = []
    director.emit = lambda kind, **data: told.append((kind, data))
    job = next_tuning(director)
    director.on_report(Report(job.number, 2, 0.5, 1.0, 1.0, 1.0, epochs=7))
    director.on_outcome(Outcome(job.number, "done", (0.5,) * 7, 0.5, 1.0, 1.0))
    assert [data["epochs"] for kind, data in told if kind == "epoch"] == [7]
    notes = [data["text"] for kind, data in told if kind == "note"]
    assert notes == [f"Trial {job.number}: 7 of its 20 epochs, to end in time."]
    assert director.results[-1].epochs == 20  # a search that goes on plans as many


def test_a_resumed_search_plans_the_same_epochs(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    director = make_director(folder, seconds=800)
    job = next_tuning(director)
    finish(director, job)
    again = make_director(folder, seconds=300)
    assert again.budget.epochs(job.config, trains_backbone=True) == job.epochs


def test_no_more_trials_than_asked_and_none_after_the_deadline(tmp_path) -> None:
    director = make_director(RunFolder(tmp_path), trials=2)
    assert [len(director.next_jobs()) for _ in range(3)] == [1, 1, 0]
    (tmp_path / "late").mkdir()
    late = make_director(RunFolder(tmp_path / "late"), seconds=-1)
    (first,) = late.next_jobs()  # there is always a model
    assert first.config.strategy.name == "head_only"
    assert first.deadline > time.time()
    finish(late, first)
    assert late.next_jobs() == ()


def test_what_cannot_be_afforded_is_not_begun(tmp_path) -> None:
    director = make_director(RunFolder(tmp_path), seconds=20, speed=0.5)  # an epoch takes 240 s
    while jobs := director.next_jobs():
        for job in jobs:
            assert job.config.strategy.name == "head_only"
            finish(director, job)
            director.budget.deadline -= 1


def test_a_search_in_which_everything_fails_alike_ends(tmp_path) -> None:
    director = make_director(RunFolder(tmp_path))
    count = 0
    while (jobs := director.next_jobs()) and count < 50:
        for job in jobs:
            finish(director, job, None, "failed", "RuntimeError: the same")
            count += 1
    assert count == 3
    with pytest.raises(Exception, match="RuntimeError: the same"):
        winner.choose(director.results)


def test_only_the_weights_of_the_best_are_kept(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    director = make_director(folder, trials=7)

    def score(job) -> float:
        folder.trial(job.number).mkdir(parents=True, exist_ok=True)
        (folder.trial(job.number) / "scored.safetensors").write_bytes(b"x")
        return job.number / 10

    run_all(director, score)
    kept = {int(path.parent.name) for path in folder.path.glob("trials/*/scored.safetensors")}
    assert kept == {0, 4, 5, 6}  # the baseline and the best three


def by_phase(**scores: list[float]) -> list[TrialResult]:
    """Return results of phases, one after the other; heads take 1 s, others 10."""
    names = {"heads": "head_only", "tails": "freeze", "full": "full"}
    results = []
    for phase, values in scores.items():
        for value in values:
            config = TrialConfig(Part("a"), Part(names[phase]), Part("linear"), {})
            told = result(len(results), value, config=config)
            results.append(replace(told, seconds=1.0 if phase == "heads" else 10.0))
    return results


@pytest.mark.parametrize(
    ("results", "first", "last"),
    [
        (by_phase(heads=[0.8, 0.9]), "heads", "full"),  # nothing is known: the quick one
        (by_phase(heads=[0.80] * 40, full=[0.7] * 5, tails=[0.85, 0.9]), "tails", "heads"),
        (by_phase(heads=[0.80] * 40, tails=[0.85, 0.9]), "full", "heads"),  # it may be better yet
        (by_phase(heads=[0.80] * 40, tails=[0.7] * 9, full=[0.85, 0.95]), "full", "heads"),
        (by_phase(heads=[0.9, *[0.8] * 60], tails=[0.5] * 30), "full", "tails"),
    ],
)
def test_the_phase_that_promises_most_in_a_second_is_first(results, first, last) -> None:
    seconds = {"heads": 1.0, "tails": 10.0, "full": 12.0}
    ordered = policy.order(results, make_space(), seconds.__getitem__)
    assert (ordered[0], ordered[-1]) == (first, last)
    assert sorted(ordered) == ["full", "heads", "tails"]
    assert ordered == policy.order(results, make_space(), seconds.__getitem__)


def test_a_phase_that_never_pays_starves_and_is_left_at_last() -> None:
    gains = [
        policy.expected_gain(results, [r for r in results if r.config.strategy.name == "freeze"])
        for results in (by_phase(full=[0.9], tails=[0.85] * count) for count in (0, 1, 4, 16, 64))
    ]
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] < gains[0] / 50
    worn = by_phase(full=[0.9], heads=[0.8] * policy.EXHAUSTED)
    assert "heads" not in policy.order(worn, make_space(), lambda _: 1.0)


def test_what_each_phase_took_and_gave_is_told() -> None:
    results = by_phase(heads=[0.6, 0.7], tails=[0.65, 0.8], full=[0.75])
    again = [TrialResult(9, results[0].config, "done", seconds=1.5, fold=1, of=0)]
    assert policy.shares_json(results, make_space(), again) == {
        "finals": {"trials": 1, "seconds": 1.5, "gained": 0.0},
        "heads": {"trials": 2, "seconds": 2.0, "gained": 0.1},
        "tails": {"trials": 2, "seconds": 20.0, "gained": 0.1},
        "full": {"trials": 1, "seconds": 10.0, "gained": 0.0},
    }


def test_the_best_is_drawn_most_and_what_was_never_tried_before_it() -> None:
    drawn = [policy.draw("abc", {"a": 0.1, "b": 0.9}, seed) for seed in range(300)]
    counts = {name: drawn.count(name) for name in "abc"}
    assert counts["c"] > counts["b"] > counts["a"] > 0


@pytest.mark.parametrize(
    ("count", "seconds", "left", "size"),
    [(0, 1.0, 99, 1), (2, 2.0, 99, 10), (9, 0.05, 99, 32), (9, 60, 999, 4), (9, 1.0, 3, 1)],
)
def test_a_pack_is_what_takes_a_few_seconds(count, seconds, left, size) -> None:
    own = [replace(each, seconds=seconds) for each in by_phase(heads=[0.5] * count)]
    assert policy.pack_size(own, left) == size


@pytest.mark.parametrize("kind", [UsageError, DataError, MachineError])
def test_an_error_of_a_worker_keeps_its_kind(kind, tmp_path) -> None:
    def call(*_: object) -> Ranked:
        return Ranked("a", error="why", exit_code=kind.exit_code)

    nothing = np.zeros(0, np.int64)
    images = Images(nothing, nothing)
    sources = {"a": Source("a", "a")}
    setup = Setup(tmp_path, None, (), images, images, sources, 64, "accuracy", "cpu", 1)
    with pytest.raises(kind, match="why"):
        prepare.rank(Settings(dataset="d"), setup, call, lambda *_, **__: None, 60.0)


def test_a_few_images_tell_which_backbones_are_worth_a_pass_over_all(tmp_path) -> None:
    first = {"a": 0.90, "b": 0.91, "c": 0.88, "d": 0.80, "e": 0.99}
    looked: list[tuple[str, int, bool]] = []
    broken: set[tuple[str, int]] = set()

    def call(_task, _setup, label: str, limit: int, timed: bool) -> Ranked:
        looked.append((label, limit, timed))
        if label == "e" or (label, limit) in broken:
            return Ranked(label, error="why", exit_code=DataError.exit_code)
        probe = first[label] if limit else {"a": 0.95, "b": 0.93}[label]
        return Ranked(label, probe=probe, images=limit or 3000, source="in1k")

    def near(images: int) -> list[str]:
        looked.clear()
        rows = np.arange(images)
        part = Images(rows, rows)
        sources = {label: Source(label, label) for label in first}
        setup = Setup(tmp_path, None, (), part, part, sources, 64, "accuracy", "cpu", 1)
        found = prepare.rank(Settings(dataset="d"), setup, call, lambda *_, **__: None, 60.0)
        return [each.label for each in found[1]]

    few = prepare.FEW
    first["d"] = 0.70
    assert near(2 * few + 1) == ["a", "b", "c"]  # d is far behind, e cannot be used
    looks = [(label, few, False) for label in "abcde"]
    assert looked == [*looks, ("b", 0, True), ("a", 0, True), ("c", few, True)]
    first["a"] = first["c"] = 0.84
    near(2 * few + 1)
    again = [("b", 0, True), ("a", few, True), ("c", few, True)]
    assert looked[5:] == again  # nothing else may be as good
    broken.add(("b", 0))
    assert near(2 * few + 1) == ["a"]  # by its probe on all images c is far behind
    assert looked[5:] == [("b", 0, True), ("a", 0, True), ("c", few, True)]  # the next that can be


# --- the embedded backbone ----------------------------------------------------------------------

MINI = prepare.EMBEDDED
WEAK = Ranked(MINI, probe=0.6, balanced_probe=0.6, source=PROCEDURAL, license="apache-2.0")
STRONG = Ranked("photos", probe=0.9, balanced_probe=0.9, source="in1k", license="mit")


def test_the_embedded_backbone_is_ranked_beside_all_others_and_last() -> None:
    tiers = {"small-one": "nano", "middle-one": "small", "large-one": "large"}
    described = Described(make_space(), tiers, ())
    for settings, given, labels in [
        (Settings(dataset="d", time=60), {}, ["small-one", MINI]),
        (Settings(dataset="d", time=9000), {}, ["middle-one", MINI]),
        (Settings(dataset="d"), {"photos": Source("photos", "timm")}, ["photos", MINI]),
    ]:
        found = prepare.default_sources(settings, given, described, "cpu")
        assert list(found) == labels
    carried = {
        MINI: Source(MINI, MINI, weights="/carried/model.safetensors"),
        "b": Source("b", "b"),
    }
    assert prepare.with_embedded(carried) == carried  # one's own file of that name is kept


def ranking(
    folder, *found: Ranked, carried=(), prior="", **settings
) -> tuple[list[str], list[str], list[str]]:
    """Rank what is `found`; return labels of the usable, of the searched, and the notes."""
    known = {each.label: each for each in found}
    nothing = Images(np.zeros(0, np.int64), np.zeros(0, np.int64))
    sources = {label: Source(label, label) for label in known}
    sources |= {each.label: each for each in carried}
    setup = Setup(folder, None, (), nothing, nothing, sources, 64, "accuracy", "cpu", 1)
    session = Session(
        Settings(dataset="d", **settings), RunFolder(folder), lambda _: None, None, 0
    )

    def call(_task, _setup, label, *_) -> Ranked:
        return known[label]

    usable, near = prepare.rank(session.settings, setup, call, session.emit, 60.0, prior)
    events = RunFolder(folder).events()
    notes = [event["text"] for event in events if event["kind"] == "note"]
    return list(usable.sources), [each.label for each in near], notes


def test_weights_of_photographs_are_not_displaced_and_both_are_shown(tmp_path) -> None:
    assert ranking(tmp_path, STRONG, WEAK) == (["photos", MINI], ["photos"], [])
    shown = ending._ranking(RunFolder(tmp_path), ["photos"])
    assert shown == [
        {"backbone": "photos", "probe": 0.9, "source": "in1k", "license": "mit", "searched": True},
        {"backbone": MINI, "probe": 0.6, "source": PROCEDURAL, "license": "apache-2.0",
         "searched": False},
    ]  # fmt: skip
    (line,) = ranking_lines(shown)
    assert line == (
        f"Backbones by probe: photos 0.900 (in1k), {MINI} 0.600 (procedural, not searched)."
    )
    assert ranking_lines([]) == []  # a run of an earlier version


def test_the_ranking_decides_whichever_is_better(tmp_path) -> None:
    better = replace(WEAK, probe=0.95)
    assert ranking(tmp_path, STRONG, better) == ([MINI, "photos"], [MINI, "photos"], [])


def test_the_best_by_what_is_known_of_its_weights_is_always_searched(tmp_path) -> None:
    far = Ranked("far", probe=0.7, source="in1k")
    assert ranking(tmp_path, STRONG, far)[1] == ["photos"]
    assert ranking(tmp_path, STRONG, far, prior="far")[1] == ["photos", "far"]
    failed = replace(far, error="cannot run", exit_code=4)
    assert ranking(tmp_path, STRONG, failed, prior="far")[1] == ["photos"]


def test_which_is_best_is_stated_by_the_backbones_themselves() -> None:
    described = describe(prepare.names(Settings(dataset="d")))
    good, better = "resnet18.a1_in1k", "mobilenetv3_large_100.ra_in1k"
    assert described.priors[better] > described.priors[good]
    nothing = Images(np.zeros(0, np.int64), np.zeros(0, np.int64))
    sources = {name: Source(name, name) for name in (good, better, MINI)}
    setup = Setup(Path(), None, (), nothing, nothing, sources, 64, "accuracy", "cpu", 1)
    assert prepare.best_prior(setup, described.priors) == better
    blank = sources | {better: replace(sources[better], pretrained=False)}
    assert prepare.best_prior(replace(setup, sources=blank), described.priors) == good
    theirs = Source("mine", "mine", weights="model.safetensors")
    assert prepare.best_prior(replace(setup, sources={"mine": theirs}), {"mine": 99.0}) == ""


@pytest.mark.parametrize("probe", [0.9, 0.915, 0.92])
def test_weak_weights_lead_only_where_they_are_clearly_ahead(tmp_path, probe) -> None:
    nearly = replace(WEAK, probe=probe, balanced_knn=1.0)
    both = ["photos", MINI]
    assert ranking(tmp_path, nearly, STRONG) == (both, both, [])


def test_the_embedded_backbone_alone_is_told_of_once(tmp_path) -> None:
    gone = Ranked("gone", error="cannot run", exit_code=4)
    (tmp_path / "asked").mkdir()
    assert ranking(tmp_path, gone, WEAK) == ([MINI], [MINI], [prepare.BEGINS_WEAK])
    asked = ranking(tmp_path / "asked", WEAK, backbones=(MINI,))
    assert asked == ([MINI], [MINI], [])


def test_what_does_not_come_with_autoft_or_is_not_weak_is_not_called_so(tmp_path) -> None:
    assert ranking(tmp_path, replace(WEAK, label="theirs")) == (["theirs"], ["theirs"], [])
    assert ranking(tmp_path, replace(WEAK, source="in1k"))[2] == []
    carried = Source(MINI, MINI, weights="/carried/model.safetensors")
    assert ranking(tmp_path, WEAK, carried=(carried,))[2] == []


@pytest.mark.parametrize(("exit_code", "told"), [(4, [prepare.MISSING]), (2, []), (3, [])])
def test_advice_on_missing_weights_is_given_where_some_are_missing(exit_code, told) -> None:
    def call(_task, source, *_) -> Provided | LeftOut:
        return LeftOut("why", exit_code) if source.label == "photos" else Provided(source)

    notes = []
    sources = prepare.with_embedded({"photos": Source("photos", "timm")})
    found = prepare.provide(
        Settings(dataset="d"), sources, call, lambda kind, text, **_: notes.append((kind, text))
    )
    assert list(found) == [MINI]
    assert [text for kind, text in notes if kind == "note"] == ["Left out: why", *told]


def test_where_nothing_can_be_used_the_reason_is_that_of_the_users_own(tmp_path) -> None:
    mine = Ranked("mine", error="mine cannot run", exit_code=3)
    with pytest.raises(DataError, match="mine cannot run"):
        ranking(tmp_path, mine, Ranked(MINI, error="it cannot run", exit_code=4))

    def call(_task, source, *_) -> LeftOut:
        return LeftOut(f"{source.label} cannot be had", 3)

    sources, settings = prepare.with_embedded({"mine": Source("mine", "timm")}), {"dataset": "d"}
    for given, label in [({"weights": "w"}, "mine"), ({}, MINI)]:
        with pytest.raises(DataError, match=f"^{label} cannot be had"):
            prepare.provide(Settings(**settings, **given), sources, call, lambda *_, **__: None)


def test_a_trial_of_an_earlier_command_may_win_whose_backbone_is_gone(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    gone, unused = (Source(x, "timm", {"model": x}) for x in ("resnet10t", "unused"))
    failing = Source("failing", "timm", file="/earlier")
    known = {each.label: each for each in (gone, unused, failing)}
    folder.write_json("sources.json", {k: v.to_json() for k, v in known.items()})
    for number, label in enumerate(["resnet10t", "failing"]):
        config = TrialConfig(Part(label), Part("full"), Part("linear"), {})
        folder.append_trial(result(number, 0.9 - number / 10, config=config))
    now = Ranked("failing", error="cannot run now", exit_code=3)
    labels, searched, _ = ranking(tmp_path, now, WEAK)
    assert (labels, searched) == ([MINI, "resnet10t", "failing"], [MINI])
    assert winner.choose(folder.trials()).config.backbone.name in labels
    kept = prepare.known_sources(folder)
    assert list(kept) == ["resnet10t", "failing", MINI]
    assert (kept["resnet10t"], kept["failing"].file) == (gone, "")  # today's file, where known


def test_where_not_even_the_embedded_backbone_can_be_had_the_search_ends(tmp_path) -> None:
    nobody = LeftOut("it is gone", MachineError.exit_code)
    sources = prepare.with_embedded({})
    with pytest.raises(MachineError, match="it is gone"):
        prepare.provide(Settings(dataset="d"), sources, lambda *_: nobody, lambda *_, **__: None)


@pytest.mark.parametrize(
    ("ranked", "speaks", "name"),
    [
        ([STRONG, replace(WEAK, balanced_knn=0.99)], "photos", "ambiguous"),
        ([replace(WEAK, probe=0.95), STRONG], MINI, "weak-weights"),
        ([WEAK], MINI, "weak-weights"),
        ([replace(WEAK, pretrained=False)], None, "no-weights"),
    ],
)
def test_weak_weights_speak_for_the_data_only_where_they_are_best(
    monkeypatch, ranked, speaks, name
) -> None:
    asked = []

    def call(task, *arguments) -> Measured:
        asked.extend(each for each in arguments if isinstance(each, str))
        return Measured("", error="not measured here")

    labels = np.arange(6000) % 3
    monkeypatch.setattr(prepare, "sample_of", lambda *_: range(100))
    monkeypatch.setattr(prepare, "affordable", lambda *_: 100)
    data = SimpleNamespace(
        catalog=SimpleNamespace(labels=labels), split=SimpleNamespace(fold=np.zeros(6000))
    )
    profile = prepare.measure_regime(
        Settings(dataset="d"), None, data, ranked, call, lambda *_, **__: None
    )
    assert asked == ([speaks] if speaks else [])
    assert profile.name == name


TUNING = ("full", "freeze", "theirs", "scratch")


def first_of(*ranked: Ranked, regime: str = "weak-weights") -> list[TrialConfig]:
    space = replace(
        make_space(),
        backbones=tuple(each.label for each in ranked),
        strategies={
            **make_space().strategies,
            "scratch": StrategyInfo((), True, False, True),
            "freeze": StrategyInfo((), True, True, True),
        },
        heads={"linear": (), "norm_linear": (), "multilayer": ()},
        tuning=read_signature(recipe.tuning),
        batch_norms=frozenset(each.label for each in ranked),
        usual=usual_of(ranked),
    )
    profile = replace(judge(np.arange(100) % 2, None, (), weights=True), name=regime)
    return [space.default(answers, 0) for answers in portfolio(space, profile, ranked)]


@pytest.mark.parametrize("label", [MINI, "their-own"])
def test_weak_weights_begin_at_the_rate_of_training_from_scratch(label) -> None:
    configs = first_of(replace(WEAK, label=label))
    kinds = [(each.strategy.name, each.head.name) for each in configs]
    assert kinds[:6] == [
        ("head_only", "linear"),  # the baseline
        ("head_only", "norm_linear"),
        ("head_only", "multilayer"),
        ("full", "linear"),
        ("theirs", "linear"),
        ("scratch", "linear"),
    ]
    full, theirs = configs[3], configs[4]
    assert full.strategy.params["bottom"] == 1.0
    assert full.train["lr"] == theirs.train["lr"] == WEAK_LR
    assert full.train["norm_mode"] == theirs.train["norm_mode"] == "train"
    assert "head_only" not in {strategy for strategy, _ in kinds[6:]}
    assert {strategy for strategy, _ in kinds} == {"head_only", *TUNING}  # each has its turn


def test_strong_weights_keep_their_recipes_beside_weak_ones() -> None:
    alone = first_of(STRONG, regime="ambiguous")
    beside = first_of(STRONG, replace(WEAK, probe=0.89), regime="ambiguous")
    assert [each for each in beside if each.backbone.name == "photos"] == alone
    weak = [each for each in beside if each.backbone.name == MINI]
    assert [each.strategy.name for each in weak] == ["head_only", "full"]
    assert weak[1].train["lr"] == WEAK_LR
    assert {each.train.get("lr", 0) for each in alone} & {WEAK_LR} == set()


@pytest.mark.parametrize(
    ("probe", "kinds"), [(0.925, ["head_only", "freeze"]), (0.95, ["head_only"])]
)
def test_strong_weights_behind_weak_ones_keep_their_recipes_too(probe, kinds) -> None:
    configs = first_of(replace(WEAK, probe=probe), STRONG)
    strong = [each for each in configs if each.backbone.name == "photos"]
    assert [each.strategy.name for each in strong] == kinds
    assert all(each.train.get("lr") != WEAK_LR for each in strong)
    assert all(each.train.get("norm_mode") != "train" for each in strong)
    alone = first_of(STRONG, regime="ambiguous")
    assert all(each in alone for each in strong)


@pytest.mark.parametrize(
    ("ranked", "scratch"), [([WEAK], True), ([STRONG], False), ([STRONG, WEAK], False)]
)
def test_training_from_scratch_competes_where_the_best_weights_are_weak(
    tmp_path, ranked, scratch
) -> None:
    space = replace(
        make_space(),
        strategies={**make_space().strategies, "scratch": StrategyInfo((), True, False, True)},
    )
    few = Images(np.arange(9), np.zeros(9, np.int64))
    setup = Setup(tmp_path, None, (), few, few, {}, 64, "accuracy", "cpu", 1)
    narrowed = prepare.narrowed(space, Settings(dataset="d"), setup, ranked, 1.0, ("none",))
    assert ("scratch" in narrowed.strategies) is scratch
    assert set(narrowed.usual) == {each.label for each in ranked if each.weak}


@pytest.mark.parametrize(
    ("seconds", "epochs"),
    [
        (970, 20),  # an epoch takes 12 seconds: a quarter of the time
        (410, 10),
        (250, 10),  # as many as are good, though they take 120 seconds
        (100, 8),  # all of the time
        (10, 1),
    ],
)
def test_where_there_is_little_time_one_good_trial_is_worth_more_than_several(
    seconds, epochs
) -> None:
    ranked = Ranked("a", images_per_second=100.0, trained_per_second=10.0, source="in1k")
    budget = Budget(time.time() + seconds, None, {"a": ranked}, 100, 200, first=False)
    config = TrialConfig(Part("a"), Part("full"), Part("linear"), {})
    assert budget.full_epochs(config) == epochs


@pytest.mark.parametrize(("left", "epochs"), [(150, 10), (112, 10), (105, 9), (50, 4)])
def test_a_trial_is_planned_for_a_little_more_than_is_left(left, epochs) -> None:
    ranked = Ranked("a", images_per_second=100.0, trained_per_second=10.0, source="in1k")
    now = time.time()
    budget = Budget(now + left, None, {"a": ranked}, 100, 200, first=False, began=now - 100)
    config = TrialConfig(Part("a"), Part("full"), Part("linear"), {})
    assert budget.epochs(config, True) == epochs  # of 12 seconds each
    budget.reserved, budget.deadline = 60.0, now + left + 60
    assert budget.epochs(config, True) == min(10, left // 12)  # finals are not to wait


def test_what_has_to_be_kept_first_is_planned_for_what_is_left() -> None:
    costs = Costs((0.0, 0.1), (0.2, 0.02), (0.1, 0.0), (0, 1000))
    ranked = Ranked("a", costs=costs, num_stages=2, images_per_second=10.0)
    now, config = (
        time.time(),
        TrialConfig(Part("a"), Part("freeze", {"depth": 0.5}), Part("h"), {}),
    )
    budget = Budget(now + 1000, None, {"a": ranked}, 100, 0, first=False, began=now - 1000)
    assert budget._hope(config) > 1  # there is no room
    budget.room = Room(10**9, 10**9, 0, 1e9)
    assert budget._hope(config) == 1


def test_where_epochs_are_few_images_are_smaller_and_the_budget_knows() -> None:
    timed = {"images_per_second": 100.0, "trained_per_second": 10.0, "source": "in1k"}
    ranked = [Ranked("a", **timed), Ranked("b", **timed, resizable=False)]

    def hurried(seconds: float) -> tuple[Space, Budget]:
        known = {each.label: each for each in ranked}
        budget = Budget(time.time() + seconds, None, known, 100, 200, first=False)
        tuning = (*make_space().tuning, Parameter("train_scale", Choice(1.0, 0.7), 1.0))
        space = replace(make_space(), backbones=("a", "b"), tuning=tuning, rigid=frozenset("b"))
        return prepare.hurried(space, budget), budget

    def scale(space: Space, label: str) -> object:
        return space.default({"backbone": label, "strategy": "full"}, 0).train.get("train_scale")

    space, budget = hurried(100)
    assert (scale(space, "a"), scale(space, "b")) == (0.7, None)
    assert budget.whole_epochs("a") == 10 > budget.whole_epochs("b") == 8
    space, budget = hurried(970)
    assert (scale(space, "a"), scale(space, "b")) == (1.0, None)
    assert budget.smaller == frozenset()


def test_norms_and_biases_alone_are_expected_to_take_less() -> None:
    costs = Costs((0.0, 0.01), (0.1, 0.0), (0.0, 0.0), (0, 0), vectors=0.7)
    ranked = Ranked("a", costs=costs, num_stages=1)
    budget = Budget(time.time() + 1000, None, {"a": ranked}, 100, 0, first=False)

    def expected(strategy: str) -> float:
        config = TrialConfig(Part("a"), Part(strategy), Part("linear"), {})
        return budget.expected(config, 10, True) - budget.expected(config, 0, True)

    assert expected("full") == pytest.approx(100)
    assert expected("norm_bias") == pytest.approx(70)
    assert expected("no_such_strategy") == expected("full")


@pytest.mark.parametrize(("smaller", "pays"), [(0.5, True), (0.74, True), (0.9, False)])
def test_images_are_smaller_only_where_that_saves_time(smaller, pays) -> None:
    costs = Costs((0.0, 0.01), (0.1, 0.0), (0.01, 0.0), (0, 0), smaller=smaller)
    ranked = Ranked("a", images_per_second=100.0, trained_per_second=10.0, costs=costs)
    budget = Budget(time.time() + 121, None, {"a": ranked}, 100, 200, first=False)
    space = prepare.hurried(replace(make_space(), backbones=("a",)), budget)
    assert budget.smaller == (frozenset("a") if pays else frozenset())
    assert ("train.train_scale" in space.usual.get("a", {})) is pays


@pytest.mark.parametrize(
    ("told", "views"),
    [
        ('{"mode": "disk", "cut": 2, "views": 3, "exact": false}', 3),
        ('{"mode": "rerun", "cut": 2, "views": 3, "exact": false}', 0),
        ('{"mode": "disk"}', 0),
        ("torn", 0),
        (None, 0),
    ],
)
def test_the_budget_learns_of_views_that_trials_really_kept(tmp_path, told, views) -> None:
    folder = RunFolder(tmp_path)
    folder.trial(3).mkdir(parents=True)
    if told is not None:
        (folder.trial(3) / "sharing.json").write_text(told)
    assert folder.views_kept(3) == views


def test_weak_weights_get_the_time_of_random_ones() -> None:
    def epochs(*ranked: Ranked) -> int:
        timed = [replace(r, images_per_second=100.0, trained_per_second=100.0) for r in ranked]
        budget = Budget(time.time() + 40, None, {each.label: each for each in timed}, 100, 20)
        config = TrialConfig(Part(ranked[-1].label), Part("full"), Part("linear"), {})
        return budget.epochs(config, trains_backbone=True)

    assert epochs(WEAK) == epochs(replace(WEAK, pretrained=False)) > epochs(STRONG)
    assert epochs(STRONG, WEAK) == epochs(WEAK, STRONG) == epochs(STRONG)  # one trial among many
    assert epochs(replace(WEAK, label="a"), WEAK) == epochs(WEAK)


def test_what_a_regime_advises_was_tried_however_it_ended() -> None:
    regime = judge(np.arange(100) % 2, None, (), weights=True)
    head, tuned = (
        result(number, config=make_space().default({"strategy": name}, 0))
        for number, name in enumerate(["head_only", "full"])
    )
    failed = replace(tuned, status="failed", score=None)
    for results, tried, agreed in [
        ([head], False, False),
        ([head, failed], True, False),
        ([tuned, head], True, True),
    ]:
        told = ending._regime(regime, results, results[0])
        assert (told["tried"], told["agreed"]) == (tried, agreed)
        assert "full" in told["first"]


# --- selection --------------------------------------------------------------------------------


def test_ties_go_to_the_surer_and_then_to_the_cheaper() -> None:
    config = make_space().default({}, 0)
    rows = [(0, 0.9, 0.5, 5.0), (1, 0.9, 0.4, 9.0), (2, 0.9, 0.4, 3.0), (3, 0.8, 0.1, 1.0)]
    results = [TrialResult(n, config, "done", (s,), s, loss, t) for n, s, loss, t in rows]
    assert [r.number for r in winner.usable(results)] == [2, 1, 0, 3]
    assert winner.usable([result(9, 0.99, "failed")]) == []


def test_wilsons_interval_is_the_published_one() -> None:
    assert wilson(0.9, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)
    assert wilson(0.0, 10)[0] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("images", "classes", "size"),
    [(100, 2, "tiny"), (300, 2, "small"), (3000, 5, "medium"), (30000, 10, "large")],
)
def test_size_is_by_images_and_by_class(images, classes, size) -> None:
    assert size_class(np.arange(images) % classes) == size


def test_result_lines_are_plain_json(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    told = result(
        3,
        0.25,
        config=TrialConfig(
            Part("a"), Part("full", {"bottom": 0.1}), Part("mlp", {"hidden": 8}), {"lr": 1e-3}, 7
        ),
    )
    folder.append_trial(told)
    assert json.loads((tmp_path / "trials.jsonl").read_text())["config"]["seed"] == 7
    assert folder.trials() == [told]
