"""The profile: what frozen features know, which regime that is, and which labels look wrong."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from autoft.cli import profile as command
from autoft.cli.summary import regime_line
from autoft.data.cache.files import cache_root
from autoft.data.cache.holding import marker_of
from autoft.errors import DataError
from autoft.network.build import build
from autoft.network.sources import Source, in_folder
from autoft.report.tables import write_suspects
from autoft.search import prepare, sampling
from autoft.search.engines import tasks
from autoft.search.images import Data, read_data, setup_of
from autoft.search.portfolio import RECIPES, first_strategies
from autoft.search.profile import Profiled, run_profile
from autoft.search.session import Session
from autoft.search.settings import Settings
from autoft.selection import explain
from autoft.selection.regime import ADVICE, judge, likeness_of, regime_map
from autoft.training import features, profile, rank, speeds
from autoft.training.classify import cross_validate, divisions, logistic, nearest
from autoft.training.features import pooled_features
from autoft.training.job import Images, Precision, Ranked, Setup
from autoft.training.kept import remembered
from autoft.training.measures import Measured, OutOfFold, Sample, draw
from autoft.training.profile import calibrate
from autoft.training.rowstore import find_rows
from autoft.values import Backbone

RNG = np.random.default_rng(0)


def quiet(*_: object, **__: object) -> None:
    """Hear nothing."""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "own-cache"))
    return tmp_path / "own-cache"


@pytest.fixture
def data(photos) -> Data:
    return read_data(Settings(dataset=str(photos), image_size=64), quiet)


@pytest.fixture
def setup(data, tiny_weights, tmp_path) -> Setup:
    torch.set_num_threads(1)
    settings = Settings(dataset="x", image_size=64)
    made = setup_of(settings, tmp_path, data, in_folder(tiny_weights)[0], "cpu")
    return replace(made, threads=1)


def sample_of_labels(labels: np.ndarray, groups: np.ndarray | None = None) -> Sample:
    places = np.arange(len(labels))
    return Sample(places, labels, places if groups is None else groups, places)


# --- the control with random weights -----------------------------------------------------------


def test_random_norms_are_calibrated_on_the_data() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.1), nn.Dropout(0.5))
    images = 5 + 3 * torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calibrate(module, iter(images.split(8)))
    out = module(images)
    assert torch.allclose(out.mean(dim=(0, 2, 3)), torch.zeros(4), atol=0.1)
    assert torch.allclose(out.std(dim=(0, 2, 3)), torch.ones(4), atol=0.1)
    assert module[1].momentum == 0.1
    assert not any(each.training for each in module.modules())


# --- classifiers and their cross-validation -----------------------------------------------------


def clouds(classes: int = 3, count: int = 60, apart: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    labels = np.arange(count) % classes
    features = rng.normal(size=(count, 12)) + apart * np.eye(12)[labels]
    return features.astype(np.float32), labels


@pytest.mark.parametrize("fit", [logistic, nearest])
def test_what_can_be_told_is_told_and_noise_is_not(fit) -> None:
    features, labels = clouds(apart=8.0)
    assert cross_validate(fit, features, sample_of_labels(labels), 1, 2).mean == 1.0
    noise = np.random.default_rng(2).normal(size=(300, 12)).astype(np.float32)
    blind = cross_validate(fit, noise, sample_of_labels(np.arange(300) % 3), 1, 2).mean
    assert 0.2 < blind < 0.47


def test_cross_validation_is_the_same_every_time() -> None:
    features, labels = clouds(apart=1.0)
    first, again = (
        cross_validate(logistic, features, sample_of_labels(labels), 3, threads)
        for threads in (1, 4)
    )
    assert first.scores == again.scores
    assert len(first.scores) == 15
    assert np.array_equal(first.confidence, again.confidence)


def test_groups_are_never_in_both_sides_of_a_fold() -> None:
    labels, groups = np.arange(120) % 3, np.arange(120) // 6
    seen = []
    for known, held in divisions(sample_of_labels(labels, groups), 2):
        assert not set(groups[known]) & set(groups[held])
        seen += held.tolist()
    assert sorted(seen) == sorted([*range(120)] * 2)


def test_a_feature_that_knows_the_group_alone_is_worth_nothing() -> None:
    groups = np.arange(200) // 10
    labels = groups % 2
    features = np.eye(20, dtype=np.float32)[groups]
    leaking = cross_validate(logistic, features, sample_of_labels(labels), 1, 1).mean
    honest = cross_validate(logistic, features, sample_of_labels(labels, groups), 1, 1).mean
    assert leaking == 1.0
    assert honest < 0.7


def test_a_class_of_two_images_makes_two_folds() -> None:
    labels = np.array([0] * 20 + [1] * 2)
    assert len(list(divisions(sample_of_labels(labels), 1))) == 2


def test_a_fold_that_lacks_a_class_to_learn_is_no_crash() -> None:
    labels, groups = np.array([0] * 6 + [1] * 6), np.array([0, 1] * 6)  # two groups hold it all
    found = cross_validate(
        logistic, clouds(2, 12)[0], sample_of_labels(np.sort(labels), groups), 1, 1
    )
    assert all(0 <= score <= 1 for score in found.scores)


def test_a_near_neighbour_outvotes_two_far_ones() -> None:
    known = np.array([[1, 0], [-1, 0], [-1, 0.1], [1, 1], [1, 1.1], [0, 1]], np.float32)
    labels = np.array([0, 0, 0, 1, 1, 1])  # three vote: as many as the smallest class has
    found = nearest(known, labels, np.array([[1, 0.02], [1, 1]], np.float32))
    assert found.argmax(axis=1).tolist() == [0, 1]
    assert np.allclose(found.sum(axis=1), 1)


def test_many_classes_have_a_closed_form_that_is_as_good() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(1200) % 120
    centres = rng.normal(size=(120, 64))
    features = (2 * centres[labels] + rng.normal(size=(1200, 64))).astype(np.float32)
    found = logistic(features[:960], labels[:960], features[960:])
    assert found.shape == (240, 120)
    assert np.allclose(found.sum(axis=1), 1, atol=1e-4)
    assert (found.argmax(axis=1) == labels[960:]).mean() > 0.9


def test_images_of_weight_0_teach_the_probe_nothing() -> None:
    features, labels = clouds(apart=3.0, count=120)
    wrong = np.arange(120) % 2 == 0
    lied = np.where(wrong, (labels + 1) % 3, labels)
    weighted = logistic(features, lied, features, np.where(wrong, 0, 2).astype(np.float32))
    assert (weighted.argmax(axis=1) == labels).mean() > 0.95
    assert (logistic(features, lied, features).argmax(axis=1) == labels).mean() < 0.95


# --- the sample ---------------------------------------------------------------------------------


def test_a_sample_keeps_shares_and_is_part_of_a_larger_one() -> None:
    labels = np.array([0] * 900 + [1] * 90 + [2] * 8)
    rows, groups = np.arange(1000 - 2) + 7, np.full(998, -1)
    small, large = (draw(rows, labels, groups, limit) for limit in (100, 400))
    assert set(small.positions) < set(large.positions)
    counts = np.bincount(small.labels)
    assert counts.sum() == 100
    assert counts[2] == 5
    assert 75 <= counts[0] <= 90
    assert np.array_equal(small.rows, rows[small.positions])
    assert np.array_equal(small.labels, labels[small.positions])
    assert len(set(small.groups)) == len(small)  # no group: each image is one


def test_a_class_of_one_group_cannot_be_asked_for() -> None:
    labels, groups = np.array([0] * 10 + [1] * 10), np.array([*range(10), *[99] * 10])
    assert set(draw(np.arange(20), labels, groups, 100).labels) == {0}


def test_the_test_part_and_doubtful_labels_are_not_looked_at(data, setup, cache) -> None:
    test = set(data.catalog.rows[data.split.test].tolist())
    asked: set[int] = set()

    class Watched:
        rows, resize, key = data.store.rows, data.store.resize, data.store.key

        def read(self, rows: np.ndarray) -> np.ndarray:
            asked.update(rows.tolist())
            return data.store.read(rows)

    watched = replace(setup, store=Watched())
    pinned = np.arange(len(data.catalog)) == data.split.train()[0]
    doubtful = replace(data, catalog=replace(data.catalog, pinned=pinned))
    sample = sampling.sample_of(doubtful, 1000)
    profile.measure_pixels(watched, sample, 1)
    profile.measure_backbone(watched, "test_resnet.fixed", sample, 1, quiet)
    assert len(asked) == len(data.catalog) - len(test) - 1
    assert not asked & (test | {int(data.catalog.rows[pinned][0])})
    assert np.array_equal(data.catalog.labels[sample.positions], sample.labels)


def test_a_search_looks_at_what_its_time_affords(setup) -> None:
    def images(seconds: float, speed: float) -> int:
        ranked = Ranked("a", images_per_second=1.0, fp32_images_per_second=speed)
        return sampling.affordable(seconds, setup, ranked)

    assert images(7200, 50) == 1800
    assert images(72000, 50) == 5000
    assert images(3000, 50) == 750
    assert images(1200, 50) == 500  # 300 by its share: the least
    assert images(600, 50) == 300  # 500 would take a thirtieth of the time: twice the share
    assert images(120, 50) == 100


# --- what is measured ---------------------------------------------------------------------------


def test_a_backbone_is_measured_the_same_in_a_fresh_cache(
    setup, data, tmp_path, monkeypatch
) -> None:
    found = []
    for name in ("one", "two"):
        monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / name))
        sample = sampling.sample_of(data, 1000)
        found.append(profile.measure_backbone(setup, "test_resnet.fixed", sample, 2, quiet))
    first, again = found
    assert first.error == ""
    assert set(first.probes) == {"knn", "final", "stages", "random"}
    for name, probe in first.probes.items():
        assert probe.scores == again.probes[name].scores
        assert np.array_equal(probe.confidence, again.probes[name].confidence)
        assert probe.mean > 0.6  # three colours
    assert not np.array_equal(first.probes["random"].confidence, first.probes["stages"].confidence)


def test_what_was_measured_is_known_the_second_time(setup, data, cache, monkeypatch) -> None:
    sample = sampling.sample_of(data, 1000)
    first = profile.measure_backbone(setup, "test_resnet.fixed", sample, 1, quiet)
    pixels = profile.measure_pixels(setup, sample, 1)

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(profile, "cross_validate", never)
    again = profile.measure_backbone(setup, "test_resnet.fixed", sample, 1, quiet)
    assert again.error == ""
    assert again.to_json() == first.to_json()
    assert profile.measure_pixels(setup, sample, 1).to_json() == pixels.to_json()
    other = replace(sample, labels=np.roll(sample.labels, 1))
    assert (
        "AssertionError"
        in profile.measure_backbone(setup, "test_resnet.fixed", other, 1, quiet).error
    )


def test_a_backbone_that_fails_says_why_and_ends_nothing(setup, data, cache) -> None:
    sample = sampling.sample_of(data, 1000)
    broken = replace(setup, sources={"x": Source("x", "timm", {"model": "no_such_net"})})
    found = profile.measure_backbone(broken, "x", sample, 1, quiet)
    assert "no_such_net" in found.error
    assert found.exit_code == 2


def test_pixels_tell_colours_and_directions_apart() -> None:
    side = 64
    stripes = (torch.arange(side) // 4 % 2).float()
    across, down = stripes.expand(3, side, side), stripes[:, None].expand(3, side, side)
    seen = profile.look(torch.stack([across, down, across.roll(2, dims=2)]))
    edges = seen[:, 3 * 16 * 16 :]
    assert torch.nn.functional.cosine_similarity(edges[0], edges[2], dim=0) > 0.95
    assert torch.nn.functional.cosine_similarity(edges[0], edges[1], dim=0) < 0.2


# --- the cache of features ----------------------------------------------------------------------


def test_features_are_computed_once_an_image(cache) -> None:
    computed: list[int] = []

    def compute(rows: np.ndarray):
        computed.extend(rows.tolist())
        yield dict.fromkeys(("k", "other"), np.stack([rows, rows**2], axis=1).astype(np.float32))

    assert remembered("k", np.array([3, 1]), compute)[:, 0].tolist() == [3, 1]
    assert remembered("k", np.array([1, 2, 3, 2]), compute).tolist() == [
        [1, 1], [2, 4], [3, 9], [2, 4],
    ]  # fmt: skip
    assert computed == [1, 3, 2]
    assert remembered("other", np.array([1]), compute).tolist() == [[1, 1]]
    assert computed == [1, 3, 2]  # it came along
    remembered("other", np.array([4]), compute)
    assert computed == [1, 3, 2, 4]


def test_damaged_features_are_computed_anew_and_used_ones_are_young(cache) -> None:
    calls: list[int] = []

    def compute(rows: np.ndarray):
        calls.append(len(rows))
        yield {"k": rows[:, None].astype(np.float32)}

    rows = np.arange(4)
    remembered("k", rows, compute)
    (entry,) = (cache_root() / "features").glob("k-*")
    remembered("other", rows, lambda rows: iter([{"other": rows[:, None].astype(np.float32)}]))
    find_rows("features", "other")  # lets go of the first
    os.utime(marker_of(entry), (1, 1))
    remembered("k", rows, compute)
    assert marker_of(entry).stat().st_mtime > 1000
    (entry / "values").write_bytes((entry / "values").read_bytes()[:-2])
    assert remembered("k", rows, compute)[:, 0].tolist() == [0, 1, 2, 3]
    assert calls == [4, 4]


def test_features_of_a_part_come_from_those_of_the_whole(setup, cache) -> None:
    backbone = build(setup.sources["test_resnet.fixed"])
    pre = setup.preprocess(backbone)
    whole = pooled_features(backbone.module, setup, setup.train, pre, Precision())
    part = setup.train.take(np.array([5, 2, 9]))

    class Gone:
        rows, resize, key = setup.store.rows, setup.store.resize, setup.store.key

    got = pooled_features(backbone.module, replace(setup, store=Gone()), part, pre, Precision())
    assert np.array_equal(got, whole[[5, 2, 9]])


# --- ranking ------------------------------------------------------------------------------------


def part_of(count: int, folds: list[int]) -> Images:
    rows = np.arange(count)
    return Images(rows, rows % 3, folds=np.array(folds, np.int8))


def test_a_hold_out_is_asked_once_and_folds_are_asked_in_turn(setup) -> None:
    held = part_of(4, [0] * 4)
    whole = replace(setup, train=part_of(6, [-2] * 6), validation=held)
    _, divisions = rank.pool(whole)
    assert [(k.tolist(), a.tolist()) for k, a in divisions] == [([*range(6)], [*range(6, 10)])]
    folded = replace(setup, train=part_of(6, [1, 2, 1, 2, -2, 1]), validation=held)
    both, divisions = rank.pool(folded)
    assert len(both) == 10
    assert [sorted(a.tolist()) for _, a in divisions] == [[6, 7, 8, 9], [0, 2, 5], [1, 3]]
    for known, asked in divisions:
        assert sorted([*known, *asked]) == list(range(10))


def test_ranking_is_remembered_with_its_speeds(setup, cache, monkeypatch) -> None:
    assert len(np.unique(setup.train.folds)) == 4  # five folds with the validation part
    first = rank.rank_backbone(setup, "test_resnet.fixed", quiet)
    assert first.error == ""
    assert first.probe > 0.6
    keeps = rank.mirroring_keeps_labels(setup, first)
    for name in ("pooled_features", "logistic"):
        monkeypatch.delattr(rank, name)
    for name in ("choose", "fp32_per_second", "measure_costs"):
        monkeypatch.delattr(speeds, name)
    monkeypatch.setattr(speeds, "forward_per_second", lambda *_: first.images_per_second)
    again = rank.rank_backbone(setup, "test_resnet.fixed", quiet)
    assert replace(again, seconds=first.seconds) == first
    assert rank.mirroring_keeps_labels(setup, first) == keeps
    changed = replace(setup, metric="macro_f1")
    assert rank.rank_backbone(changed, "test_resnet.fixed", quiet).error  # not the same question


def remade(monkeypatch, **changes: object) -> None:
    """Have every backbone built with other facts."""
    plain = features.build

    def build_it(*arguments: object, **more: object) -> Backbone:
        return replace(plain(*arguments, **more), **changes)

    monkeypatch.setattr(features, "build", build_it)


def test_other_stages_or_another_license_are_ranked_anew(setup, cache, monkeypatch) -> None:
    first = rank.rank_backbone(setup, "test_resnet.fixed", quiet)
    stages = build(setup.sources["test_resnet.fixed"]).stages
    whole = (tuple(name for stage in stages for name in stage),)
    with monkeypatch.context() as patch:
        remade(patch, stages=whole)
        assert rank.rank_backbone(setup, "test_resnet.fixed", quiet).num_stages == 1
    with monkeypatch.context() as patch:
        remade(patch, license="another")
        assert rank.rank_backbone(setup, "test_resnet.fixed", quiet).license == "another"
    assert first.num_stages == len(stages) > 1
    assert first.license != "another"


def test_other_stages_are_measured_anew(setup, data, cache, monkeypatch) -> None:
    sample = sampling.sample_of(data, 1000)
    first = profile.measure_backbone(setup, "test_resnet.fixed", sample, 1, quiet)
    stages = build(setup.sources["test_resnet.fixed"]).stages
    remade(monkeypatch, stages=(tuple(name for stage in stages for name in stage),))
    again = profile.measure_backbone(setup, "test_resnet.fixed", sample, 1, quiet)
    assert not again.error
    confidence = [each.probes["stages"].confidence for each in (first, again)]
    assert not np.array_equal(*confidence)


def test_speeds_are_known_for_a_day(setup, cache, monkeypatch) -> None:
    first = rank.rank_backbone(setup, "test_resnet.fixed", quiet)
    (file,) = (cache_root() / "features").glob("speed-*.json")
    kept = json.loads(file.read_text())
    monkeypatch.setattr(speeds, "fp32_per_second", lambda *_: 12345.0)
    monkeypatch.setattr(speeds, "forward_per_second", lambda *_: first.images_per_second)

    def speed_after(seconds: float) -> float:
        file.write_text(json.dumps({**kept, "stored": kept["stored"] - seconds}))
        return rank.rank_backbone(setup, "test_resnet.fixed", quiet).fp32_images_per_second

    assert speed_after(23 * 3600) != 12345.0  # and the file is as if new
    assert speed_after(25 * 3600) == 12345.0


def changed_images(setup: Setup) -> Setup:
    """Return `setup` with images that cannot be read any more."""

    class Changed:
        rows, resize, key = setup.store.rows, setup.store.resize, "changed"

        def read(self, rows: np.ndarray) -> np.ndarray:
            raise DataError("data_changed: 'a.png' is another file since the data were read")

    return replace(setup, store=Changed())


def test_images_that_changed_are_not_the_fault_of_backbones(setup, data, cache) -> None:
    changed, sample = changed_images(setup), sampling.sample_of(data, 1000)

    def call(_: object, setup: Setup, label: str, limit: int, timed: bool) -> Ranked:
        return rank.rank_backbone(setup, label, quiet, limit or rank.MAX_IMAGES, timed=timed)

    with pytest.raises(DataError, match="data_changed"):
        prepare.rank(Settings(dataset="d"), changed, call, quiet, 60.0)
    with pytest.raises(DataError, match="data_changed"):
        profile.measure_backbone(changed, "test_resnet.fixed", sample, 1, quiet)


def test_weights_that_do_not_fit_are_left_out(setup, cache) -> None:
    good, file = setup.sources["test_resnet.fixed"], setup.folder / "unfit.safetensors"
    save_file({"another.weight": torch.zeros(3)}, file)
    unfit = replace(good, label="unfit", weights=str(file))
    given = replace(setup, sources={"unfit": unfit, good.label: good})
    found = rank.rank_backbone(given, "unfit", quiet)
    assert found.exit_code == DataError.exit_code
    assert found.error

    def call(_: object, setup: Setup, label: str, limit: int, timed: bool) -> Ranked:
        return rank.rank_backbone(setup, label, quiet, limit or rank.MAX_IMAGES, timed=timed)

    _, ranked = prepare.rank(Settings(dataset="d"), given, call, quiet, 60.0)
    assert [each.label for each in ranked] == [good.label]


def test_weights_reach_the_ranking_probe(setup, cache) -> None:
    part = setup.train
    wrong = np.arange(len(part)) % 3 > 0
    lied = replace(part, labels=np.where(wrong, (part.labels + 1) % 3, part.labels))
    lied = replace(lied, folds=np.full(len(part), -2, np.int8))
    weighted = replace(lied, weights=np.where(wrong, 0, 5).astype(np.float32))
    scores = [
        rank.rank_backbone(replace(setup, train=each), "test_resnet.fixed", quiet).probe
        for each in (weighted, lied)
    ]
    assert scores[0] > scores[1] + 0.2


# --- the regime ---------------------------------------------------------------------------------


def measured(label: str, spread: float = 0.0, **means: float) -> Measured:
    steps = spread * np.array([-1, -0.5, 0, 0.5, 1])
    nobody = np.zeros(0, np.float32)
    probes = {
        name: OutOfFold(tuple((mean + steps).tolist()), nobody, nobody.astype(np.int64))
        for name, mean in means.items()
    }
    return Measured(label, probes)


PIXELS = measured("", majority=0.5, pixels=0.5)


@pytest.mark.parametrize(
    ("probe", "name", "likeness"),
    [
        (0.95, "small-similar", "similar"),
        (0.55, "small-dissimilar", "dissimilar"),
        (0.3, "small-dissimilar", "dissimilar"),
        (0.7, "ambiguous", "ambiguous"),
    ],
)
def test_likeness_is_what_features_add_to_controls(probe, name, likeness) -> None:
    found = measured("a", knn=0.3, final=probe, stages=probe, random=0.4)
    profile = judge(np.arange(300) % 2, PIXELS, [found])
    assert (profile.name, profile.likeness) == (name, likeness)
    assert profile.similarity == pytest.approx((probe - 0.5) / 0.5)
    low, high = profile.speaking.interval
    assert low == pytest.approx(high)  # folds that agree


def test_a_random_network_that_knows_as_much_is_a_control() -> None:
    found = measured("a", knn=0.9, final=0.9, stages=0.95, random=0.88)
    likeness = likeness_of(found, PIXELS)
    assert likeness.similarity == pytest.approx((0.9 - 0.88) / 0.12)
    assert likeness.depth_gain == pytest.approx(0.5)
    assert judge(np.arange(300) % 2, PIXELS, [found]).likeness == "dissimilar"


def test_the_interval_holds_s_and_widens_with_the_folds() -> None:
    widths = []
    for spread in (0.02, 0.1):
        found = measured("a", spread, knn=0.8, final=0.7, stages=0.7, random=0.5)
        likeness = likeness_of(found, PIXELS)
        low, high = likeness.interval
        assert low < likeness.similarity < high
        widths.append(high - low)
    assert widths[0] < widths[1] / 2


def test_a_task_that_pixels_solve_measures_no_likeness() -> None:
    easy = measured("", majority=0.5, pixels=0.97)
    found = measured("a", knn=0.99, final=1.0, stages=1.0, random=0.9)
    profile = judge(np.arange(30000) % 2, easy, [found])
    assert (profile.name, profile.likeness) == ("small-similar", "easy")
    assert profile.similarity is None
    assert "too easy" in " ".join(explain.measured(profile))


def test_the_backbone_that_knows_most_speaks_and_others_are_shown() -> None:
    good = measured("good", knn=0.9, final=0.8, stages=0.8, random=0.5)
    bad = measured("bad", knn=0.5, final=0.6, stages=0.6, random=0.5)
    failed = Measured("gone", error="cannot be had", exit_code=4)
    profile = judge(np.arange(300) % 2, PIXELS, [bad, good, failed])
    assert [each.backbone for each in profile.backbones] == ["good", "bad"]
    assert profile.similarity == pytest.approx(0.8)
    assert profile.failed == {"gone": "cannot be had"}
    plain = json.loads(json.dumps(profile.to_json()))
    assert plain["backbone"] == "good"
    assert plain["similarity"] == pytest.approx(0.8)
    assert plain["control"] == 0.5


@pytest.mark.parametrize(("source", "name"), [("procedural", "weak-weights"), ("in1k", "")])
def test_weak_weights_are_a_regime_of_their_own_and_it_is_said(source, name) -> None:
    found = replace(measured("a", knn=0.9, final=0.8, stages=0.8, random=0.5), source=source)
    profile = judge(np.arange(300) % 2, PIXELS, [found])
    assert profile.name == (name or "small-similar")
    assert profile.likeness == "similar"  # to what they saw; the numbers stay what they are
    told = " ".join(explain.measured(profile))
    assert ("saw generated images and no photograph" in told) is bool(name)
    other = replace(found, label="b", source="in1k")
    better = replace(other, probes=measured("b", knn=0.95, final=0.9, stages=0.9).probes)
    assert judge(np.arange(300) % 2, PIXELS, [found, better]).name == "small-similar"
    nearly = replace(other, probes=measured("b", knn=0.89, final=0.7, stages=0.8).probes)
    told = judge(np.arange(300) % 2, PIXELS, [found, nearly])
    weak = found.source == "procedural"
    assert [each.backbone for each in told.backbones] == (["b", "a"] if weak else ["a", "b"])


def test_a_backbone_that_fails_stops_no_profile_and_none_left_does(
    photos, tiny_weights, monkeypatch
) -> None:
    real = tasks.measure_backbone
    failing: set[str] = {"autoft_mini"}

    def call(self, worker, task, *arguments):
        if task is real and arguments[1] in failing:
            return Measured(arguments[1], error=f"{arguments[1]} fails", exit_code=3)
        return plain(self, worker, task, *arguments)

    plain = Session.call
    monkeypatch.setattr(Session, "call", call)
    settings = Settings(dataset=str(photos), weights=str(tiny_weights), image_size=64)
    profile = run_profile(settings, quiet, 60).profile
    assert profile.failed == {"autoft_mini": "autoft_mini fails"}
    failing |= {"test_resnet.fixed", "test_byobnet.fixed"}
    with pytest.raises(DataError, match=r"test_byobnet\.fixed fails"):  # of the user's own folder
        run_profile(settings, quiet, 60)


def test_without_weights_the_size_alone_is_told() -> None:
    profile = judge(np.arange(300) % 2, PIXELS, [Measured("a", error="not to be had")])
    assert (profile.name, profile.size, profile.similarity) == ("no-weights", "small", None)
    assert set(profile.controls) == {"majority", "pixels"}
    assert judge(np.arange(300) % 2, None, (), weights=True).name == "ambiguous"


def test_the_map_marks_one_place_where_a_regime_is_known() -> None:
    found = measured("a", knn=0.9, final=0.8, stages=0.8, random=0.5)
    for labels, marked in ((300, "[small-similar]"), (6000, "[ambiguous]")):
        profile = judge(np.arange(labels) % 2, PIXELS, [found])
        cells = [cell for row in regime_map(profile) for cell in row if cell.startswith("[")]
        assert cells == [marked]
        weak = judge(np.arange(labels) % 2, PIXELS, [replace(found, source="procedural")])
        assert regime_map(weak) == [
            [cell.replace("[", " ").replace("]", " ") for cell in row]
            for row in regime_map(profile)
        ]


@pytest.mark.parametrize("name", RECIPES)
def test_every_regime_has_words_and_first_strategies(name) -> None:
    assert ADVICE[name]
    assert first_strategies(name)
    agreed = {"text": "t", "first": list(first_strategies(name)), "agreed": True}
    assert "agreed" in regime_line(agreed, "full")
    otherwise = {**agreed, "agreed": False}
    assert "found otherwise" in regime_line(otherwise, "gradual")
    assert "found otherwise" in regime_line({**otherwise, "tried": True}, "gradual")
    assert regime_line({**otherwise, "tried": False}, "head_only") == (
        f"Regime: t; what is usual for it ({', '.join(first_strategies(name))}) was not tried."
    )


# --- the command, and wrong labels --------------------------------------------------------------


@pytest.fixture(scope="module")
def flipped(photos, tmp_path_factory) -> tuple[Path, set[str]]:
    """The photos with every fifth label wrong, and the paths of those."""
    root = tmp_path_factory.mktemp("flipped")
    wrong = set()
    classes = sorted(path.name for path in photos.iterdir())
    for path in sorted(photos.rglob("*.png")):
        label, number = path.parent.name, int(path.stem)
        given = classes[(classes.index(label) + 1) % 3] if number % 5 == 0 else label
        target = root / given / f"{label}-{path.name}"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
        wrong |= {f"{given}/{target.name}"} if given != label else set()
    return root, wrong


def auc(positive: list[float], negative: list[float]) -> float:
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    return sum(pairs) / len(pairs)


def test_d29_flipped_labels_are_doubted_first(flipped, tiny_weights) -> None:
    root, wrong = flipped
    settings = Settings(dataset=str(root), weights=str(tiny_weights), image_size=64)
    found = run_profile(settings, quiet, 5000)
    doubt = {each.path: 1 - each.confidence for each in found.ranking}
    assert len(doubt) == 96  # of 120: the test part is not judged
    flips = [value for path, value in doubt.items() if path in wrong]
    others = [value for path, value in doubt.items() if path not in wrong]
    assert len(flips) > 10
    assert auc(flips, others) > 0.9
    assert [each.confidence for each in found.ranking] == sorted(1 - d for d in doubt.values())
    assert {each.path for each in found.suspects} <= set(doubt)


@pytest.mark.slow
def test_d29_a_search_on_flipped_labels_finishes(flipped, tiny_weights, tmp_path) -> None:
    import autoft

    run = autoft.search(
        flipped[0], weights=tiny_weights, out=tmp_path / "run", time=150, trials=3, image_size=64
    )
    regime = run.result["regime"]
    assert regime["backbone"] in {"test_resnet.fixed", "test_byobnet.fixed", "autoft_mini"}
    assert set(regime) >= {"similarity", "interval", "depth_gain", "control", "first", "agreed"}
    assert regime["agreed"] == (run.result["winner"]["strategy"] in regime["first"])


def run_command(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(command.profile)
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_tells_the_regime_and_writes_suspects(flipped, tiny_weights, tmp_path) -> None:
    root, _ = flipped
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    file = tmp_path / "doubt.csv"
    flags = ("--weights", tiny_weights, "--image-size", 64, "--suspects", file)
    shown = run_command(root, *flags)
    assert "Similarity S =" in shown
    assert "90 % interval" in shown
    assert "excludes nothing" in shown
    assert "tiny, small" in shown
    rows = list(csv.DictReader(file.open()))
    assert set(rows[0]) == {"path", "label", "predicted", "confidence"}
    assert all(row["label"] != row["predicted"] for row in rows)
    plain = json.loads(run_command(root, *flags, "--json"))
    assert plain["images"] == 96
    assert [each["path"] for each in plain["suspects"]] == [row["path"] for row in rows]
    assert sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*")) == before


def test_without_other_weights_the_embedded_ones_speak_and_it_is_said(
    photos, monkeypatch, tmp_path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    shown = run_command(photos, "--image-size", 64, "--offline")
    assert re.search(r"^autoft_mini +procedural ", shown, flags=re.MULTILINE)
    assert "autoft_mini knows most" in shown
    assert "saw generated images and no photograph" in shown
    assert "A search tries full or scratch first" in shown


def test_too_few_images_are_said_to_be_too_few() -> None:
    none = judge(np.arange(6) % 3, None, (), weights=True)
    shown = command.lines(Profiled(none, first_strategies(none.name), (), ""))
    text = "\n".join(shown)
    assert "6 images in 3 classes" in text
    assert "too few to measure" in text
    assert "two images each" in text
    assert "\n\n\n" not in text


def test_a_table_of_suspects_is_inert(tmp_path) -> None:
    file = tmp_path / "s.csv"
    write_suspects(file, [("=cmd()/\udcff.png", "+1", "@x", 0.25)])
    (row,) = csv.DictReader(file.open(encoding="utf-8"))
    assert row["path"] == "'=cmd()/\\udcff.png"
    assert (row["label"], row["predicted"], row["confidence"]) == ("'+1", "'@x", "0.25")


@pytest.mark.shared
def test_photographs_are_like_imagenet(shared_root, tmp_path) -> None:
    small = tmp_path / "few"
    for path in sorted((shared_root / "data/hymenoptera/train").rglob("*.jpg"))[::4]:
        target = small / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").resize((128, 128)).save(target)
    settings = Settings(
        dataset=str(small),
        weights=str(shared_root / "weights"),
        backbones="mobilenetv2_100.in1k",
        image_size=128,
    )
    found = run_profile(settings, quiet, 5000).profile
    assert found.likeness == "similar"
    assert found.speaking.untapped == ()
