"""The finals: the best trials are scored again on other folds, and the average decides."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autoft.search.budget import Budget
from autoft.search.configs import Space, StrategyInfo
from autoft.search.director import Director
from autoft.search.finals import SHARE, START_SECONDS, standard_error
from autoft.search.folder import RunFolder
from autoft.search.study import Study
from autoft.selection import winner
from autoft.selection.leaderboard import leaderboard
from autoft.training import checkpoint
from autoft.training.job import Outcome, Ranked, TrialJob
from autoft.training.trial import train_trial
from autoft.values import Part, TrialConfig, TrialResult

HEAD, FULL = Part("head_only"), Part("full")


def result(number, score, *, strategy=HEAD, **more) -> TrialResult:
    config = TrialConfig(Part("a"), strategy, Part("linear"), {})
    scores = () if score is None else (score,)
    told = TrialResult(number, config, "done", scores, score, loss=1.0, seconds=1.0, epochs=1)
    return replace(told, **more)


# --- who wins ------------------------------------------------------------------------------------


def order(*results) -> list[int]:
    return [each.number for each in winner.usable(results)]


def test_the_mean_over_folds_decides_among_finalists() -> None:
    trials = [result(0, 0.90), result(1, 0.95), result(2, 0.93), result(3, 0.94)]
    again = [
        result(4, 0.90, of=1, fold=1),
        result(5, 0.99, of=2, fold=1),
        result(6, 0.70, of=1, fold=2),
        result(7, 0.97, of=2, fold=2),
    ]
    assert order(*trials) == [1, 3, 2, 0]
    assert order(*trials, *again) == [2, 1, 3, 0]  # others come after all finalists
    first = winner.finals([*trials, *again])[0]
    assert (first.trial, first.folds, first.scores) == (2, (0, 1, 2), (0.93, 0.99, 0.97))
    assert first.mean == pytest.approx(0.9633, abs=1e-4)


def test_only_folds_that_all_finalists_have_are_compared() -> None:
    trials = [result(0, 0.95), result(1, 0.94)]
    again = [
        result(2, 0.90, of=0, fold=1),
        result(3, 0.95, of=1, fold=1),
        result(4, 1.0, of=0, fold=2),
    ]
    assert [each.folds for each in winner.finals([*trials, *again])] == [(0, 1)] * 2
    assert order(*trials, *again) == [1, 0]


@pytest.mark.parametrize(
    "again",
    [
        [],
        [(1, 1, "done")],  # one alone: nothing to compare with
        [(1, 1, "done"), (2, 1, "done")],  # the best was not scored again
        [(0, 1, "failed"), (1, 1, "done"), (2, 1, "done")],
        [(0, 1, "done"), (1, 2, "done")],  # not on the same folds
    ],
)
def test_without_a_comparison_the_first_fold_decides(again) -> None:
    trials = [result(0, 0.95), result(1, 0.94), result(2, 0.93)]
    more = [
        result(10 + number, 0.99, of=of, fold=fold, status=status)
        for number, (of, fold, status) in enumerate(again)
    ]
    assert winner.finals([*trials, *more]) == []
    assert order(*trials, *more) == [0, 1, 2]


def test_equal_means_are_ordered_by_loss_then_by_cost() -> None:
    trials = [result(0, 0.9, loss=0.5), result(1, 0.9, loss=0.3), result(2, 0.9, loss=0.3)]
    trials[2] = replace(trials[2], seconds=0.5)
    again = [result(3 + n, 0.9, of=n, fold=1, loss=trials[n].loss) for n in range(3)]
    assert order(*trials, *again) == [2, 1, 0]


def test_the_leaderboard_has_the_mean_of_finalists_and_no_row_for_their_folds() -> None:
    trials = [result(0, 0.90), result(1, 0.95), result(2, None, status="failed")]
    again = [result(3, 0.99, of=0, fold=1), result(4, 0.85, of=1, fold=1)]
    rows = leaderboard([*trials, *again])
    assert [(row["trial"], row["folds"], row["mean"]) for row in rows] == [
        (0, 2, pytest.approx(0.945)),
        (1, 2, pytest.approx(0.90)),
        (2, None, None),
    ]


# --- who is called -------------------------------------------------------------------------------


def make_director(path, *, folds=5, seconds=1000.0, images=50, trials=3) -> Director:
    (path / "trials").mkdir(exist_ok=True)
    strategies = {
        "head_only": StrategyInfo((), False, True, True),
        "full": StrategyInfo((), True, True, True),
    }
    space = Space(("a",), strategies, {"linear": ()}, (), ())
    ranked = {"a": Ranked("a", images_per_second=1e6, trained_per_second=1e6)}
    study = Study(space, 0)  # before the clock runs: it imports Optuna
    budget = Budget(time.time() + seconds, trials, ranked, 100, images)
    director = Director(
        RunFolder(path), space, study, budget, 0, (), lambda *_, **__: None, folds=folds
    )
    director.resume()
    return director


def tell(director: Director, *results: TrialResult) -> None:
    """Have the director know trials that ended, as if it had begun them."""
    for each in results:
        job = TrialJob(each.number, each.config, each.epochs, time.time() + 60)
        checkpoint.start(director.folder.trial(each.number), job, pretrained=True)
        director._begin(job)
        scored = (each.status, each.scores, each.score, each.loss, each.seconds)
        director.on_outcome(Outcome(each.number, *scored))


def tell_close(director: Director) -> None:
    """Have the director know two trials that are close, and one that took long and is not."""
    last = result(2, 0.70, strategy=FULL, seconds=400.0)
    tell(director, result(0, 0.90), result(1, 0.94, strategy=FULL), last)


def rest(director: Director, score=0.9, seconds=1.0) -> list[tuple[int | None, int]]:
    """Run until there is no more; return which trials were scored again on which folds."""
    found = []
    while jobs := director.next_jobs():
        for job in jobs:
            found.append((job.of, job.fold))
            director.on_outcome(Outcome(job.number, "done", (score,), score, 1.0, seconds))
    return found


def test_what_is_as_good_as_the_best_by_chance_is_scored_on_all_folds(tmp_path) -> None:
    director = make_director(tmp_path)
    tell_close(director)
    assert 0.94 - 2 * standard_error(0.94, 50) < 0.90
    assert rest(director) == [(n, fold) for fold in (1, 2, 3, 4) for n in (1, 0)]
    assert len(director.results) == 3
    assert len(director.study._study.trials) == 3  # it is told of trials alone
    known = director.folder.trials()
    assert [(each.of, each.fold) for each in known[3:5]] == [(1, 1), (0, 1)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"folds": 1}, "a hold-out has no other fold"),
        ({"images": 5000}, "the difference is more than chance"),
    ],
)
def test_nobody_is_called_where(change, why, tmp_path) -> None:
    director = make_director(tmp_path, **change)
    tell_close(director)
    assert rest(director) == [], why


def test_finals_take_no_more_than_their_share_and_leave_out_what_takes_longest(tmp_path) -> None:
    director = make_director(tmp_path, seconds=299)  # and 701 that trials took
    long = result(1, 0.91, strategy=FULL, seconds=600.0)
    tell(director, result(0, 0.90), long, result(2, 0.92, strategy=FULL, seconds=100.0))
    finals = director.finals
    assert SHARE * finals._whole(director.results) == pytest.approx(250, abs=1)
    # Two rounds of the best and the probe fit into 250 s, and none with the long one.
    needed = 2 * (2 * START_SECONDS + 100 + finals.expected(director.results[0]))
    assert director.budget.reserved == pytest.approx(needed, abs=1)
    assert director.budget.left() == pytest.approx(299 - needed, abs=2)
    assert director.budget.remaining() == pytest.approx(299, abs=2)
    assert rest(director, seconds=100.0) == [(2, 1), (0, 1), (2, 2), (0, 2)]


def test_the_best_is_never_left_out(tmp_path) -> None:
    director = make_director(tmp_path, seconds=599, trials=2)
    tell(director, result(0, 0.90), result(1, 0.91, strategy=FULL, seconds=400.0))
    assert director.budget.reserved == 0
    assert rest(director) == []


def test_a_best_that_was_stopped_is_not_compared(tmp_path) -> None:
    director = make_director(tmp_path)
    stopped = result(1, 0.94, strategy=FULL, status="stopped")
    tell(director, result(0, 0.92), stopped, result(2, 0.91, strategy=FULL, seconds=10.0))
    director.budget.max_trials = 3
    tell(director, result(3, 0.70, strategy=FULL, seconds=400.0))
    assert rest(director) == []


def test_heads_alone_have_no_time_set_aside_for_them(tmp_path) -> None:
    director = make_director(tmp_path, trials=8)
    tell(director, result(0, 0.90), result(1, 0.91))
    assert director.budget.reserved == 0
    tell(director, result(2, 0.70, strategy=FULL))
    assert director.budget.reserved > 0


def test_a_final_that_fails_is_not_tried_on_other_folds(tmp_path) -> None:
    director = make_director(tmp_path)
    trials = [result(n, 0.9, strategy=FULL, seconds=20.0) for n in (1, 2)]
    tell(director, result(0, 0.95), *trials, result(3, 0.5, strategy=FULL, seconds=400.0))
    found = []
    while jobs := director.next_jobs():
        found += [(job.of, job.fold) for job in jobs]
        for job in jobs:
            ended = Outcome(job.number, "failed", error="for the test")
            if job.of != 1:
                ended = Outcome(job.number, "done", (0.9,), 0.9, 1.0, 1.0)
            director.on_outcome(ended)
    assert [pair for pair in found if pair[0] == 1] == [(1, 1)]
    assert (2, 2) in found


def test_where_the_best_fails_the_finals_end(tmp_path) -> None:
    director = make_director(tmp_path)
    trials = [result(n, 0.9, strategy=FULL, seconds=20.0) for n in (1, 2)]
    tell(director, result(0, 0.95), *trials, result(3, 0.5, strategy=FULL, seconds=400.0))
    (job,) = director.next_jobs()
    assert job.of == 0
    director.on_outcome(Outcome(job.number, "failed", error="for the test"))
    assert director.next_jobs() == ()


def test_a_final_has_as_many_epochs_as_the_trial_had(tmp_path) -> None:
    director = make_director(tmp_path)
    curve = (0.5,) * 6 + (0.94,)
    shortened = result(1, 0.94, strategy=FULL, scores=curve, epochs=10)
    tell(director, result(0, 0.90), shortened, result(2, 0.70, strategy=FULL, seconds=400.0))
    (job,) = director.next_jobs()
    assert (job.of, job.epochs) == (1, 7)


def test_several_seats_need_less_time(tmp_path) -> None:
    director = make_director(tmp_path, seconds=2000)
    trials = [result(n, 0.9, strategy=FULL, seconds=20.0) for n in (1, 2)]
    tell(director, result(0, 0.9, seconds=5.0), *trials)
    alone = director.budget.reserved
    assert alone == pytest.approx(4 * 3 * (20 + START_SECONDS))
    director.finals.seats = 3
    director.finals.reserve(winner.usable(director.results), director.baseline())
    assert director.budget.reserved == pytest.approx(alone / 3)


def test_weights_of_those_who_were_scored_again_are_kept(tmp_path) -> None:
    director = make_director(tmp_path, trials=3)
    tell(director, result(0, 0.90), result(1, 0.91), result(2, 0.70, strategy=FULL, seconds=400.0))
    for number in range(3):
        weights(director, number).touch()
    while jobs := director.next_jobs():
        (job,) = jobs
        weights(director, job.number).parent.mkdir()
        weights(director, job.number).touch()
        director.on_outcome(Outcome(job.number, "done", (0.9,), 0.9, 1.0, 1.0))
        assert not weights(director, job.number).exists()
    assert len(director.finals.again) == 8
    tell(director, *(result(number, 0.95) for number in range(20, 24)))
    assert [weights(director, number).exists() for number in range(3)] == [True, True, False]


def weights(director: Director, number: int) -> Path:
    return director.folder.trial(number) / "scored.safetensors"


def test_finals_wait_for_trials_that_run_and_run_side_by_side(tmp_path) -> None:
    director = make_director(tmp_path, trials=3)
    tell(director, result(0, 0.90), result(1, 0.91))
    (last,) = director.next_jobs()
    assert last.of is None
    assert director.next_jobs() == ()
    director.on_outcome(Outcome(last.number, "done", (0.5,), 0.5, 1.0, 200.0))
    jobs = director.next_jobs() + director.next_jobs()
    assert [(job.of, job.fold) for job in jobs] == [(1, 1), (0, 1)]
    assert all(job.number > last.number for job in jobs)


def test_a_search_that_goes_on_scores_again_only_what_was_not(tmp_path) -> None:
    director = make_director(tmp_path)
    tell_close(director)
    (done,) = director.next_jobs()
    checkpoint.start(director.folder.trial(done.number), done, pretrained=True)
    director.on_outcome(Outcome(done.number, "done", (0.9,), 0.9, 1.0, 1.0))
    (cut,) = director.next_jobs()  # killed before it ends
    checkpoint.start(director.folder.trial(cut.number), cut, pretrained=True)
    again = make_director(tmp_path)
    found = rest(again)
    assert found[0] == (cut.of, cut.fold)
    assert (done.of, done.fold) not in found
    assert len(found) == 7
    assert winner.finals(again.folder.trials())[0].folds == (0, 1, 2, 3, 4)


# --- what is trained and scored ------------------------------------------------------------------


def test_holding_out_another_fold_moves_images_and_loses_none(small_setup) -> None:
    every = {*small_setup.train.rows, *small_setup.validation.rows}
    held = [small_setup.holding_out(fold) for fold in range(5)]
    assert held[0] is small_setup
    for fold, setup in enumerate(held):
        assert (setup.validation.folds == fold).all()
        assert not set(setup.train.rows) & set(setup.validation.rows)
        assert {*setup.train.rows, *setup.validation.rows} == every
    rows = np.concatenate([setup.validation.rows for setup in held])
    assert sorted(rows) == sorted(every)


def test_a_trial_on_another_fold_is_the_trial_of_a_run_with_that_split(
    small_setup, fixed, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))
    for strategy in (HEAD, Part("freeze", {"depth": 0.5})):
        config = TrialConfig(Part("test_resnet"), strategy, Part("linear"), {}, seed=3)
        job = TrialJob(0, config, 2, time.time() + 300)
        outcomes = [
            train_trial(replace(setup, folder=tmp_path / name), given, lambda _: True)
            for name, setup, given in (
                ("a", small_setup, replace(job, fold=2, of=0)),
                ("b", small_setup.holding_out(2), job),
                ("c", small_setup, job),
            )
        ]
        assert outcomes[0].scores == outcomes[1].scores
        assert outcomes[0].loss == outcomes[1].loss
        assert outcomes[0].loss != outcomes[2].loss


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_ends_with_finals_and_says_so(
    run, photos, tiny_weights, tmp_path, monkeypatch, workers
) -> None:
    # A search of seconds would leave them too little.
    monkeypatch.setattr("autoft.search.finals.SHARE", 0.8)
    monkeypatch.setattr("autoft.search.finals.START_SECONDS", 0.0)
    out = tmp_path / "run"
    words = ["--dataset", photos, "--weights", tiny_weights, "--out", out, "--time", "120s"]
    words += ["--offline", "--trials", 4, "--device", "cpu", "--image-size", 64]
    words += ["--workers", workers, "--folds", 3]
    code, _, told = run("search", *words)
    assert code == 0, told
    found = json.loads((out / "result.json").read_text())
    assert sum(found["trials"].values()) == 4
    finals = found["finals"]
    assert found["phases"]["finals"]["trials"] >= len(finals) * (len(finals[0]["folds"]) - 1) > 0
    assert found["winner"]["trial"] == finals[0]["trial"]
    assert finals[0]["mean"] == max(each["mean"] for each in finals)
    assert "as good as the best by what chance may do" in told
    assert f"Trial {finals[0]['trial']} wins." in told
    kept = {int(path.parent.name) for path in out.glob("trials/*/scored.safetensors")}
    assert found["winner"]["trial"] in kept
    assert max(kept) < 4  # of the other folds no weights are kept
    rows = list(csv.DictReader((out / "leaderboard.csv").open()))
    assert len(rows) == 4
    assert rows[0]["trial"] == str(finals[0]["trial"])
    code, shown, _ = run("leaderboard", out)
    assert "mean" in shown.splitlines()[0]
