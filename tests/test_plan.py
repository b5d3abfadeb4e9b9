"""Measured costs, what is planned with them, and speeds that are looked at before believed."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

from autoft.data.cache.files import cache_root
from autoft.network.build import build
from autoft.network.sources import resolve
from autoft.search.budget import Budget
from autoft.training import rank, speeds
from autoft.training.costs import crossing_bytes, measure_costs
from autoft.training.job import Costs, Outcome, Precision, Ranked, Setup
from autoft.training.plan import (
    Room,
    Work,
    bytes_kept,
    choose,
    on_the_way,
    predict,
    room_of,
    seconds,
    views_for,
)
from autoft.values import Part, TrialConfig

COSTS = Costs(
    prefix=(0.0, 1e-3, 4e-3, 9e-3, 10e-3),
    tail=(30e-3, 27e-3, 18e-3, 3e-3, 1e-5),
    score=(10e-3, 9e-3, 6e-3, 1e-3, 0.0),
    bytes=(0, 1_000_000, 100_000, 10_000, 500),
    view=5e-4,
)
WORK = Work(1000, 200, 12, augmented=True, mixed=False)
WIDE = Room(ram=10**11, disk=10**11, device=10**11, bandwidth=1e9)


@pytest.mark.parametrize(
    ("epochs", "augmented", "views"),
    [(1, True, 4), (12, True, 4), (13, True, 5), (24, True, 8), (90, True, 8), (90, False, 1)],
)
def test_views_grow_with_the_epochs(epochs, augmented, views) -> None:
    assert views_for(COSTS, 2, replace(WORK, epochs=epochs, augmented=augmented)) == views


@pytest.mark.parametrize(("epochs", "views"), [(1, 1), (3, 1), (6, 2), (12, 4)])
def test_behind_a_deep_cut_making_views_takes_no_longer_than_training(epochs, views) -> None:
    assert views_for(COSTS, 3, replace(WORK, epochs=epochs)) == views  # 9 ms to make, 3 to train


def test_costs_of_a_trial_are_those_of_its_parts() -> None:
    found = predict(COSTS, 3, WORK, WIDE)
    assert found["rerun"] == pytest.approx(12 * (1000 * 12e-3 + 200 * 10e-3))
    made = 4 * 1000 * 9e-3 + 200 * 9e-3
    assert found["ram"] == pytest.approx(made + 12 * (1000 * 3e-3 + 200 * 1e-3))
    assert found["disk"] == pytest.approx(found["ram"] + bytes_kept(COSTS, 3, WORK) / 1e9)
    slow = replace(WIDE, bandwidth=1e6)  # 10 ms to read what takes 3 ms to train
    assert predict(COSTS, 3, WORK, slow)["disk"] > 12 * 1000 * 10e-3


def test_a_thread_that_makes_views_may_be_what_takes_longest() -> None:
    found = predict(replace(COSTS, view=20e-3), 3, WORK, WIDE)
    assert found["rerun"] == pytest.approx(12 * (1000 * 20e-3 + 200 * 10e-3))
    assert found["ram"] < found["rerun"] / 2  # each view is made once


def test_what_others_made_costs_nothing() -> None:
    kept = predict(COSTS, 3, replace(WORK, kept=4), WIDE)["disk"]
    assert kept == pytest.approx(12 * (1000 * 3e-3 + 200 * 1e-3))


@pytest.mark.parametrize(
    ("cut", "work", "room", "modes"),
    [
        (3, {}, {}, {"rerun", "ram", "disk", "device"}),
        (3, {"mixed": True}, {}, {"rerun"}),
        (0, {}, {}, {"rerun"}),
        (3, {}, {"ram": 0, "device": 0}, {"rerun", "disk"}),
        (3, {}, {"disk": 0}, {"rerun", "ram"}),
        (3, {}, {"ram": 0, "disk": 0}, {"rerun"}),
        (3, {}, {"ram": 41_000_000, "disk": 0}, {"rerun"}),
        (3, {}, {"ram": 42_000_000, "disk": 0}, {"rerun", "ram"}),
        (3, {"kept": 4}, {"ram": 0, "disk": 0, "device": 0}, {"rerun", "disk"}),
    ],
)
def test_a_way_that_does_not_fit_is_none(cut, work, room, modes) -> None:
    given, there = replace(WORK, **work), replace(WIDE, **room)
    assert set(predict(COSTS, cut, given, there)) == modes
    assert choose(COSTS, cut, given, there).mode in modes


@pytest.mark.parametrize(
    ("cut", "bytes_", "room", "kept"),
    [
        (3, {}, {}, (2,)),
        (3, {1: 1000}, {}, (2,)),  # behind the first cut a trial would save less than 5 %
        (3, {2: 0}, {}, ()),  # the network cannot be divided there
        (3, {}, {"disk": 10**9}, ()),  # 440 MB are more than a tenth of it
        (3, {}, {"speed": 1e8}, ()),  # 1 ms beside the 9 ms that the prefix takes
        (1, {}, {}, ()),
    ],
)
def test_earlier_cuts_are_kept_on_the_way_where_that_is_nearly_free(
    cut, bytes_, room, kept
) -> None:
    sizes = tuple(bytes_.get(place, size) for place, size in enumerate(COSTS.bytes))
    costs = replace(COSTS, bytes=sizes)
    speed = room.pop("speed", 2e9)
    assert on_the_way(costs, cut, WORK, replace(WIDE, **room), speed) == kept


def test_there_is_no_sharing_where_there_is_no_cut() -> None:
    uncut = replace(COSTS, bytes=(0, 0, 0, 0, 500))
    assert set(predict(uncut, 3, WORK, WIDE)) == {"rerun"}


def test_to_compute_again_is_chosen_unless_another_saves_clearly() -> None:
    assert choose(COSTS, 3, replace(WORK, epochs=1), WIDE) == choose(COSTS, 0, WORK, WIDE)
    tight = replace(WIDE, ram=10**10, disk=10**10, device=0)
    assert choose(COSTS, 1, WORK, tight).mode == "rerun"  # a tenth lies before it: 4 GB for it
    chosen = choose(COSTS, 3, WORK, replace(WIDE, device=0))
    assert (chosen.mode, chosen.cut, chosen.views) == ("disk", 3, 4)


def test_the_choice_is_never_far_from_the_best_way() -> None:
    for cut in range(5):
        for epochs in (1, 3, 12, 40):
            for ram, disk in ((0, 0), (10**8, 0), (0, 10**8), (10**11, 10**11)):
                for bandwidth in (1e6, 1e8, 1e9):
                    work = replace(WORK, epochs=epochs)
                    room = Room(ram, disk, 0, bandwidth)
                    found = predict(COSTS, cut, work, room)
                    taken = found[choose(COSTS, cut, work, room).mode]
                    assert taken == seconds(COSTS, cut, work, room)
                    worth = COSTS.prefix[cut] >= 0.25 * COSTS.prefix[-1]
                    assert taken <= 1.0527 * min(found.values()) or not worth
                    assert taken <= found["rerun"]  # never slower than sharing nothing


def test_there_is_room_on_this_machine() -> None:
    room = room_of("cpu")
    assert room.ram > 0
    assert room.disk > 0
    assert room.device == 0
    assert room.bandwidth > 1e6


# --- measured ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_prefixes_grow_and_tails_fall(name) -> None:
    torch.set_num_threads(1)
    backbone = build(resolve(name, {}), pretrained=False, image_size=64)
    crossing, why = crossing_bytes(backbone, 64)
    stages = len(backbone.stages)
    assert why == ""
    assert len(crossing) == stages + 1
    assert crossing[-1] == 2 * backbone.num_features
    before = [each.requires_grad for each in backbone.module.parameters()]
    cpu = torch.device("cpu")
    costs = measure_costs(backbone, 64, cpu, Precision(channels_last=True), crossing=crossing)
    assert [each.requires_grad for each in backbone.module.parameters()] == before
    assert len(costs.prefix) == len(costs.tail) == len(costs.score) == stages + 1
    assert list(costs.prefix) == sorted(costs.prefix)
    assert list(costs.tail) == sorted(costs.tail, reverse=True)
    assert costs.tail[0] > costs.prefix[-1] > 0  # a step is more than a forward pass
    assert costs.tail[-1] < 0.5 * costs.tail[0]
    assert costs.bytes == crossing
    assert costs.smaller == 1.0  # 64 pixels are the least


def test_steps_on_smaller_images_are_timed() -> None:
    torch.set_num_threads(1)
    backbone = build(resolve("test_resnet", {}), pretrained=False, image_size=128)
    crossing = (0,) * (len(backbone.stages) + 1)
    costs = measure_costs(backbone, 128, torch.device("cpu"), Precision(), crossing=crossing)
    assert 0.3 < costs.smaller <= 1.0


def test_a_step_of_norms_and_biases_trains_nothing_else() -> None:
    backbone = build(resolve("test_resnet", {}), pretrained=False, image_size=64)
    trained: set[frozenset[str]] = set()

    def note(module, _) -> None:
        live = (name for name, each in module.named_parameters() if each.requires_grad)
        trained.add(frozenset(live))

    backbone.module.register_forward_pre_hook(note)
    crossing = (0,) * (len(backbone.stages) + 1)
    costs = measure_costs(backbone, 64, torch.device("cpu"), Precision(), crossing=crossing)
    assert 0 < costs.vectors <= 1  # how much less it takes is for benchmarks
    every = dict(backbone.module.named_parameters())
    assert {name for name, each in every.items() if each.ndim == 1} in trained
    assert all(each.requires_grad for each in every.values())


def test_costs_of_a_network_that_cannot_be_cut_are_estimated() -> None:
    torch.set_num_threads(1)
    backbone = build(resolve("test_resnet", {}), pretrained=False, image_size=64)
    crossing = (0,) * (len(backbone.stages) + 1)
    costs = measure_costs(backbone, 64, torch.device("cpu"), Precision(), crossing=crossing)
    assert list(costs.prefix) == sorted(costs.prefix)
    assert costs.tail[0] > costs.tail[-2] > 0
    assert choose(costs, 2, WORK, WIDE).mode == "rerun"


@pytest.fixture
def setup(photos, tiny_sources, setup_in, tmp_path, monkeypatch) -> Setup:
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))
    return setup_in(photos, tiny_sources, tmp_path)


@pytest.mark.parametrize(("factor", "anew"), [(1.0, False), (0.1, True), (10.0, True)])
def test_a_wrong_record_of_speed_is_measured_anew(setup, monkeypatch, factor, anew) -> None:
    first = rank.rank_backbone(setup, "test_resnet.fixed", lambda *_: None)
    assert first.error == ""
    assert first.costs is not None
    (file,) = (cache_root() / "features").glob("speed-*.json")
    kept = json.loads(file.read_text())
    timed = kept["found"]["timed"]
    timed["images_per_second"] *= factor
    timed["trained_per_second"] = 123.0
    file.write_text(json.dumps(kept))
    monkeypatch.setattr(speeds, "forward_per_second", lambda *_: first.images_per_second)
    again = rank.rank_backbone(setup, "test_resnet.fixed", lambda *_: None)
    assert (again.trained_per_second != 123.0) is anew
    assert again.probe == first.probe
    if not anew:
        assert again.costs == first.costs


# --- the budget -------------------------------------------------------------------------------

FULL = TrialConfig(Part("a"), Part("full"), Part("linear"), {})
DEEP = replace(FULL, strategy=Part("freeze", {"depth": 0.75}))


def make_budget(left: float, costs: Costs | None = None, speed: float = 10.0) -> Budget:
    ranked = Ranked(
        "a", images_per_second=speed, trained_per_second=speed, num_stages=4, costs=costs
    )
    return Budget(time.time() + left, None, {"a": ranked}, 1000, 200, room=WIDE, first=False)


@pytest.mark.parametrize("costs", [None, replace(COSTS, tail=tuple(4 * t for t in COSTS.tail))])
def test_one_wrong_measurement_does_not_exclude_all_training(costs) -> None:
    budget = make_budget(60.0, costs)
    expected = budget.expected(FULL, 1, True)
    assert 60 < expected < 180
    assert budget.epochs(FULL, True) == 1
    assert make_budget(expected / 4, costs).epochs(FULL, True) == 0  # not plausible


def test_a_trial_that_was_faster_or_cut_off_teaches_the_budget() -> None:
    budget = make_budget(60.0)
    job = budget.job(1, FULL, 1)
    budget.learn(job, Outcome(1, "done", (0.5,), 0.5, 1.0, 12.0), True)
    assert budget.expected(FULL, 1, True) < 120
    slow = make_budget(300.0)
    before = slow.expected(FULL, 1, True)
    slow.learn(job, Outcome(1, "failed", (), seconds=1000.0), True)
    assert slow.expected(FULL, 1, True) >= 2 * before  # one trial may be a busy moment
    slow.learn(job, Outcome(2, "failed", (), seconds=1000.0), True)
    assert slow.epochs(FULL, True) == 0
    early = make_budget(300.0)
    early.learn(job, Outcome(1, "failed", (), seconds=1.0), True)  # says nothing
    assert early.expected(FULL, 1, True) == before


def test_tails_are_known_to_be_cheap() -> None:
    budget = make_budget(1000.0, COSTS)
    assert budget.frozen(DEEP) == 3
    assert budget.frozen(FULL) == 0
    tail, whole = (budget.expected(each, 12, True) for each in (DEEP, FULL))
    assert tail < 0.3 * whole
    assert budget.job(0, DEEP, 3).costs == COSTS


def test_what_a_trial_has_kept_is_not_charged_to_the_next() -> None:
    budget = make_budget(1000.0, COSTS)
    other = replace(DEEP, train={"augment": "crop"})
    first, before = (budget.expected(each, 12, True) for each in (DEEP, other))
    budget.note_kept(DEEP, 4)
    made = 4 * 1000 * COSTS.prefix[3] + 200 * COSTS.prefix[3]
    assert first - budget.expected(DEEP, 12, True) == pytest.approx(made, rel=0.01)
    assert budget.expected(other, 12, True) == pytest.approx(before)  # other views
    assert budget.expected(FULL, 12, True) == pytest.approx(
        make_budget(1e3, COSTS).expected(FULL, 12, True)
    )


def test_smaller_images_take_the_share_of_time_that_was_measured() -> None:
    small = replace(WORK, smaller=True)
    found = predict(replace(COSTS, smaller=0.7), 0, small, WIDE)["rerun"]
    step = (10 * 0.7 + 2) / 12 * COSTS.tail[0]  # the last fifth of the epochs sees them whole
    assert found == pytest.approx(12 * (1000 * step + 200 * COSTS.score[0]))
    assert set(predict(COSTS, 3, small, WIDE)) == {"rerun"}  # nothing kept serves both sizes


# --- the command ------------------------------------------------------------------------------


def test_the_plan_of_the_sample_names_phases_and_ways(run, tmp_path) -> None:
    words = ("--dataset", "sample:digits", "--time", "2m", "--backbones", "autoft_mini")
    code, out, err = run("plan", *words, "--offline")
    assert code == 0, err
    for word in ("rank", "regime", "heads", "tails", "full", "further", "finish"):
        assert f"\n{word}" in out
    assert "To be fetched: nothing." in out
    assert "1150 to train" in out
    assert not (tmp_path / "runs").exists()
    code, out, _ = run("plan", *words, "--json")
    found = json.loads(out)
    assert code == 0
    assert {"phases", "ways", "candidates", "room"} <= set(found)
    stages = found["candidates"][0]["measured"]["num_stages"]
    assert [each["frozen"] for each in found["ways"]] == list(range(1, stages))
    assert sum(each["seconds"] for each in found["phases"]) <= 121


def test_weights_that_are_not_here_are_not_fetched(run, photos) -> None:
    words = ("--dataset", photos, "--image-size", "64", "--backbones", "resnet18")
    code, out, err = run("plan", *words)
    assert code == 0, err
    assert "To be fetched: 4" in out  # some 45 MB
    assert "missing" in out
