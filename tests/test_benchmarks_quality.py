"""The benchmark of quality: each baseline learns, keeps to its plan, and the page says what is."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks" / "quality"
MAJORITY = 0.45  # three classes of the same size, and a little

pytestmark = pytest.mark.usefixtures("scripts")


@pytest.fixture
def given(photos, tiny_weights):
    from given import Given

    # One thread, as in all tests: two only wait for each other.
    return Given(
        photos.parent, tiny_weights, 600.0, size=64, backbone="test_resnet.fixed", threads=1
    )


@pytest.fixture
def task(given, photos, tmp_path):
    from given import open_task, own_cache

    with own_cache(tmp_path / "cache"):
        yield open_task(given, photos.name, 0, tmp_path, 64)


def check(row, task):
    assert row["test"] > MAJORITY
    assert row["interval"][0] <= row["test"] <= row["interval"][1]
    assert len(row["right"]) == row["n"][2] == len(task.test)
    assert row["right"].count("1") == round(row["test"] * len(task.test))
    assert 0 <= row["validation"] <= 1
    assert row["split"] == task.split


@pytest.mark.parametrize("recipe", ["fine_tune", "layer_decay"])
def test_a_recipe_learns_in_the_epochs_that_fit(recipe, given, task, monkeypatch):
    import recipes

    # Random weights learn nothing at a ten-thousandth of a rate.
    monkeypatch.setattr(recipes, "LAYER_DECAY", 0.95)
    monkeypatch.setattr(recipes, "TIMM_RATE", 5e-2)
    monkeypatch.setattr(recipes, "FASTAI_RATE", 2e-2)
    monkeypatch.setattr(recipes, "BATCH", 16)
    monkeypatch.setattr(recipes, "planned_epochs", lambda *_: 10)
    row = getattr(recipes, recipe)(given, task, 0, flips=True)
    check(row, task)
    assert row["epochs"] == len(row["curve"]) == (11 if recipe == "fine_tune" else 10)
    assert row["validation"] == row["curve"][-1][1]


def test_epochs_follow_from_the_measured_seconds():
    from recipes import SPARE, planned_epochs

    assert planned_epochs(100.0, 10.0) == int(10 * (1 - SPARE))
    assert planned_epochs(100.0, 20.0) == 4
    assert planned_epochs(5.0, 10.0) == 1
    assert planned_epochs(-3.0, 10.0) == 1


def test_timing_an_epoch_leaves_the_network_as_it_was(given, task):
    import recipes
    import torch
    from recipe_views import timm_views

    network = recipes._model(given, num_classes=3)
    training = recipes._ready(given, task, network, timm_views(flips=True), 0.1, 0)
    optimizer = recipes._timm_adamw(network)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert training.epoch_seconds(optimizer) > 0
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    assert not optimizer.state


def test_the_rates_of_one_cycle_rise_and_fall_by_group():
    import recipes
    import torch

    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "layer": n} for n in range(3)]
    optimizer = torch.optim.AdamW(groups)
    write = recipes._one_cycle(optimizer, recipes._slice(1e-3, frozen=False), 0.3, 5)

    def rates(progress):
        write(progress)
        return [group["lr"] for group in optimizer.param_groups]

    assert rates(0.3) == pytest.approx([1e-5, 1e-4, 1e-3])
    assert optimizer.param_groups[0]["betas"][0] == pytest.approx(0.85)
    assert rates(0.0) == pytest.approx([2e-6, 2e-5, 2e-4])
    assert optimizer.param_groups[0]["betas"][0] == pytest.approx(0.95)
    assert max(rates(1.0)) < 1e-7


def test_timm_rates_warm_up_and_go_down_by_layer(given, task):
    import recipes

    optimizer = recipes._timm_adamw(recipes._model(given, num_classes=3))
    write = recipes._warm_cosine(optimizer, 50)
    write(0.1)
    highest = max(group["lr"] for group in optimizer.param_groups)
    lowest = min(group["lr"] for group in optimizer.param_groups)
    top = 5e-4 * np.sqrt(64 / 512)
    assert highest == pytest.approx(top * (1 + np.cos(0.1 * np.pi)) / 2)
    assert lowest < highest
    write(0.0)
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(1e-5)
    write(1.0)
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(0.0)


def test_the_frozen_epoch_trains_head_and_norms_alone(given):
    import recipes
    from torch import nn

    body = recipes._model(given, num_classes=0, global_pool="")
    network = nn.Sequential(body, recipes._fastai_head(body, 3))
    kinds = [(p.ndim, frozen) for p, frozen in recipes._body_parameters(network)]
    assert len(kinds) == len(list(body.parameters()))
    assert all(frozen for ndim, frozen in kinds if ndim > 1)
    assert not all(frozen for _, frozen in kinds)
    groups = recipes._layer_groups(network)
    assert sum(map(len, groups)) == len(list(network.parameters()))
    assert all(groups)


@pytest.mark.parametrize("name", ["fastai_views", "timm_views"])
def test_views_are_images_that_differ(name):
    import recipe_views
    import torch

    pixels = torch.randint(0, 256, (1, 72, 72, 3), dtype=torch.uint8).repeat(6, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    draw = getattr(recipe_views, name)(flips=True)
    views = draw(pixels, 64, generator)
    assert views.shape == (6, 3, 64, 64)
    assert views.dtype == torch.float32
    assert 0 <= float(views.min()) <= float(views.max()) <= 1
    assert not torch.equal(views[0], views[1])
    again = draw(pixels, 64, torch.Generator().manual_seed(0))
    assert torch.equal(views, again)


def test_views_keep_the_picture_and_mirror_only_where_they_may():
    import recipe_views
    import torch

    pixels = torch.zeros(40, 72, 72, 3, dtype=torch.uint8)
    pixels[:, :, :24] = 255  # bright on the left
    for draw in (recipe_views.fastai_views, recipe_views.timm_views):
        sides = {}
        for flips in (False, True):
            views = draw(flips=flips)(pixels, 64, torch.Generator().manual_seed(1))
            left, right = views[..., :16].mean((1, 2, 3)), views[..., -16:].mean((1, 2, 3))
            sides[flips] = int((right > left + 0.05).sum())
        assert sides[False] == 0
        assert sides[True] > 5


def test_logistic_regression_chooses_among_the_backbones(given, photos, task, tmp_path):
    from logistic_best import STRENGTHS, logistic_best

    row = logistic_best(given, photos.name, 0, tmp_path / "own")
    check(row, task)
    assert row["tried"] == 2 * len(STRENGTHS)
    assert row["chosen"].startswith(("test_resnet", "test_byobnet"))


def test_plain_optuna_trains_until_the_time_is_over(given, photos, task, tmp_path):
    from dataclasses import replace

    from plain_optuna import plain_optuna

    row = plain_optuna(replace(given, seconds=30.0), photos.name, 0, tmp_path / "own")
    assert "error" not in row
    check(row, task)
    assert row["seconds"] >= 30
    scores = [score for _, score in row["curve"]]
    assert scores == sorted(scores)
    assert scores[-1] >= row["validation"]
    assert len(list((tmp_path / "own" / "trials").iterdir())) == 1  # the best one's weights
    assert not (tmp_path / "own" / "trial-cache").exists()


def test_a_plain_head_runs_the_network_again_and_its_body_stays(given, task):
    import time

    import plain_optuna
    import torch

    from autoft.network.build import build
    from autoft.search.finish import load_trial
    from autoft.training.job import TrialJob
    from autoft.values import Part, TrialConfig, TrialResult

    config = TrialConfig(
        Part(given.backbone), Part("head_only"), Part("linear"), {"head_lr": 2e-2}
    )
    job = TrialJob(0, config, 12, time.time() + 600)
    reports = []
    outcome = plain_optuna.train_head(task.setup, job, lambda r: reports.append(r) or True)
    assert outcome.status == "done"
    assert len(reports) == 12
    assert outcome.score > MAJORITY
    network, _ = load_trial(task.setup, TrialResult(0, config, "done"))
    source = task.setup.sources[given.backbone]
    fresh = build(source, image_size=64).module.state_dict()
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, fresh[name]), name
    stopped = plain_optuna.train_head(task.setup, job, lambda _: False)
    assert stopped.status == "stopped"
    assert len(stopped.scores) == 1


def test_a_trial_of_plain_optuna_gets_a_quarter_of_the_time():
    from plain_optuna import MAX_EPOCHS, planned_epochs

    assert planned_epochs(600.0, 30.0) == 5
    assert planned_epochs(600.0, 90.0) == 3
    assert planned_epochs(600.0, 200.0) == 1
    assert planned_epochs(600.0, 1.0) == MAX_EPOCHS


def test_one_cache_does_not_see_another(tmp_path):
    from given import CACHE, own_cache

    before = os.environ.get(CACHE)
    with own_cache(tmp_path / "a"):
        assert os.environ[CACHE] == str(tmp_path / "a")
        with own_cache(tmp_path / "b"):
            assert os.environ[CACHE] == str(tmp_path / "b")
        assert os.environ[CACHE] == str(tmp_path / "a")
    assert os.environ.get(CACHE) == before


@pytest.mark.slow
def test_a_search_is_read_from_its_folder_and_has_the_same_split(given, photos, task, tmp_path):
    from dataclasses import replace

    from search_quality import searched

    row = searched(replace(given, seconds=30.0), photos.name, 0, tmp_path / "own")
    assert "error" not in row, row
    check(row, task)
    assert row["n"] == [len(task.setup.train), len(task.setup.validation), len(task.test)]
    scores = [score for _, score in row["curve"]]
    assert scores
    assert scores == sorted(scores)


def test_a_search_that_fails_is_an_error(given, tmp_path):
    from search_quality import searched

    row = searched(given, "no-such-folder", 0, tmp_path)
    assert "exit code" in row["error"]


def test_the_curve_holds_what_rose(tmp_path):
    from search_quality import curve_of

    events = [
        {"at": 1.0, "kind": "backbone", "score": 0.99},
        {"at": 2.0, "kind": "epoch", "number": 0, "score": 0.5},
        {"at": 3.0, "kind": "epoch", "number": 1, "score": 0.4},
        {"at": 4.0, "kind": "trial_end", "number": 1, "score": None},
        {"at": 5.0, "kind": "trial_end", "number": 2, "score": 0.6},
        {"at": 5.0, "kind": "best", "number": 2, "score": 0.6},
        {"at": 6.0, "kind": "trial_start", "number": 3, "of": 2, "fold": 1},
        {"at": 7.0, "kind": "epoch", "number": 3, "score": 0.9},  # on another fold
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n", "utf-8")
    assert curve_of(tmp_path / "events.jsonl") == [[2.0, 0.5], [5.0, 0.6]]


def test_the_clock_that_is_compared_starts_behind_the_ranking(tmp_path):
    from search_quality import ranked_at

    events = [{"at": 1.0, "kind": "phase", "name": "rank"}]
    events += [{"at": 5.0, "kind": "phase", "name": "profile"}]
    events += [{"at": 9.0, "kind": "phase", "name": "search"}]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n", "utf-8")
    assert ranked_at(tmp_path / "events.jsonl") == 5.0


def row(method, right, dataset="flowers", seed=0, **more):
    test = right.count("1") / len(right)
    known = {
        "label": f"search/{dataset}/{method}/600/{seed}",
        "part": "search",
        "dataset": dataset,
        "method": method,
        "time": 600.0,
        "seed": seed,
        "test": test,
        "interval": [test - 0.1, min(1.0, test + 0.1)],
        "right": right,
        "n": [100, 20, len(right)],
        "split": "abc",
        "validation": 0.8,
        "seconds": 600.0,
        "chosen": "this one",
        "curve": [[100.0, 0.7], [500.0, 0.8]],
        "ranked": 50.0,
    }
    return known | more


def cells(text, start):
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_says_who_is_ahead_and_by_how_much():
    from quality_table import tables

    rows = [row("autoft", "1" * 95 + "0" * 5), row("timm", "1" * 60 + "0" * 40)]
    text = tables(rows)
    assert cells(text, "| timm, layer decay | 0.600")[-1] == "+35.0 points"
    assert "behind no baseline" in text
    assert "AutoGluon MultiModal 1.6.3 0.923 in 10 minutes" in text
    assert "with another split" in text
    worse = tables([row("autoft", "1" * 60 + "0" * 40), row("timm", "1" * 95 + "0" * 5)])
    assert "behind timm, layer decay by more than the interval: flowers (seed 0)" in worse


def test_the_page_has_no_mean_where_a_data_set_is_missing():
    from quality_table import tables

    rows = [
        row("autoft", "1101"),
        row("autoft", "1101", dataset="sign-digits"),
        row("timm", "1101"),
    ]
    text = tables(rows)
    assert cells(text, "| autoft search | 0.750")[3] == "**0.750**"
    assert cells(text, "| timm, layer decay | 0.750")[3] == ""


def test_seconds_to_near_the_best_of_both_are_compared():
    from quality_table import tables

    own = row("autoft", "1101", curve=[[20.0, 0.6], [50.0, 0.895]], ranked=10.0)
    other = row("optuna", "1101", curve=[[20.0, 0.6], [500.0, 0.9]])
    assert cells(tables([own, other]), "| flowers | 0 | 0.900")[3:] == [
        "40",
        "50",
        "500 of 600",
        "12.5x",
    ]
    never = row("optuna", "1101", curve=[[20.0, 0.6]])
    told = ["40", "50", "never of 600", "> 15.0x"]
    assert cells(tables([own, never]), "| flowers | 0 | 0.895")[3:] == told
    longer = never | {"label": "longer", "time": 2400.0, "seconds": 2400.0}
    text = tables([own, never, longer])
    assert cells(text, "| flowers | 0 | 0.895")[3:] == ["40", "50", "never of 2400", "> 60.0x"]
    assert "In 40 minutes" not in text


def test_lines_of_another_split_are_refused():
    from quality_table import tables

    with pytest.raises(ValueError, match="expected the same"):
        tables([row("autoft", "1101"), row("timm", "1101", split="other")])


def test_what_failed_is_listed_until_it_succeeds():
    from quality_table import tables

    failed = {"label": row("timm", "1")["label"], "part": "search", "error": "killed"}
    assert "killed" in tables([row("autoft", "1101"), failed])
    assert "killed" not in tables([failed, row("autoft", "1101"), row("timm", "1101")])
    with pytest.raises(ValueError, match="run the benchmark"):
        tables([failed])


def test_same_trials_and_views_have_their_tables():
    from quality_table import paired_difference, tables

    shared = {"validation": 0.9, "test": 0.85, "tests": [0.75, 0.85], "seconds": 10.0}
    same = {
        "label": "same/flowers/x/0",
        "part": "same",
        "dataset": "flowers",
        "seed": 0,
        "shared": shared,
        "rerun": shared | {"seconds": 100.0},
        "difference": paired_difference("1101", "1101"),
    }
    viewed = [
        {
            "label": f"views/flowers/b/0.5/{count}/0",
            "part": "views",
            "dataset": "flowers",
            "backbone": "b",
            "depth": 0.5,
            "views": count,
            "mix": "none",
            "seed": 0,
            "validation": 0.9,
            "loss": 0.3,
            "test": 0.8,
            "seconds": 5.0,
            "cut": 3,
            "stages": 6,
        }
        for count in (0, 4)
    ]
    better = {**shared, "tests": [0.85, 0.95]}
    again = same | {"label": "same/flowers/x/1", "seed": 1, "shared": better}
    again |= {"difference": [0.01, 0.0, 0.02]}
    text = tables([same, again, *viewed])
    assert cells(text, "| flowers | mean")[-2:] == ["**+0.5**", "+5.0"]
    assert cells(text, "| flowers | 0 | 0.850")[2:5] == ["0.850", "0.800", "10"]
    assert cells(text, "| flowers | 0 | 0.850")[-2:] == ["+0.0 (+0.0 to +0.0)", "+0.0"]
    told = ["none", "0.900", "0.300", "0.800", "5"]
    assert cells(text, "| flowers | b | 3 of 6 | 4")[4:] == told
    assert "| 3 of 6 | new |" in text


def test_the_interval_of_a_difference_is_of_pairs():
    from quality_table import paired_difference

    one = "1" * 90 + "0" * 10
    assert paired_difference(one, one) == [0.0, 0.0, 0.0]
    gain, low, high = paired_difference(one, "1" * 80 + "0" * 20)
    assert gain == pytest.approx(0.1)
    assert 0.03 < low < gain < high < 0.17


def options(**more):
    known = {
        "datasets": "flowers,hymenoptera",
        "methods": "autoft,timm",
        "seeds": "0,1",
        "time": 600.0,
        "backbone": "b",
    }
    return argparse.Namespace(**known | more)


def test_what_is_done_is_not_wanted_again_and_what_failed_is():
    from search_quality import specs_of

    every = list(specs_of("search", [], options()))
    assert len({spec["label"] for spec in every}) == 8
    done, failed = every[0], every[1] | {"error": "killed"}
    left = [spec["label"] for spec in specs_of("search", [done, failed], options())]
    assert done["label"] not in left
    assert failed["label"] in left
    assert [s["dataset"] for s in specs_of("same", [], options(seeds="0"))] == ["flowers"]
    counts = [
        s["views"] for s in specs_of("views", [], options(seeds="0", datasets="sign-digits"))
    ]
    assert sorted(set(counts)) == [0, 1, 2, 4, 8]


def test_a_part_of_other_time_is_another_line():
    from search_quality import specs_of

    short = next(iter(specs_of("search", [], options(time=60.0))))
    assert short["label"] != next(iter(specs_of("search", [], options())))["label"]


def test_the_test_part_is_that_of_the_searches_split(given, photos, task, tmp_path):
    from given import open_task

    small = open_task(given, photos.name, 0, tmp_path, 32)
    other = open_task(given, photos.name, 1, tmp_path, 64)
    assert small.split == task.split
    assert small.paths == task.paths
    assert other.split != task.split
    assert not set(task.test.rows) & set(task.setup.train.rows)
    assert not set(task.test.rows) & set(task.setup.validation.rows)


def test_a_trial_that_the_end_cut_off_says_nothing_of_what_was_expected(tmp_path):
    from predicted import summary, table, trials_of

    ends, lines = {0: 20.0, 1: 26.0, 2: 5.0, 3: 20.0}, []
    for number in ends:
        name = "head_only" if number == 2 else "freeze"
        params = {"depth": 0.5} if name == "freeze" else {}
        config = {"backbone": {"name": "b"}, "strategy": {"name": name, "params": params}}
        again = {"of": 0} if number == 3 else {}  # on another fold
        lines.append({"number": number, "config": config} | again)
        folder = tmp_path / "trials" / f"{number:04d}"
        folder.mkdir(parents=True)
        told = [{"seconds": seconds} for seconds in (10.0, 19.5)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, told)), "utf-8")
    (tmp_path / "trials.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    events = [
        {"kind": "trial_end", "number": n, "score": 0.5, "seconds": took, "expected": 22.0}
        for n, took in ends.items()
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)), "utf-8")
    found = list(trials_of(tmp_path))
    assert [each.what for each in found] == ["b, freeze 0.5"]
    assert table(found).endswith("| b, freeze 0.5 | 2 | 22 | 20 | +10% |")
    assert "Of 1 trials 1 were expected within 25%" in summary(found)
