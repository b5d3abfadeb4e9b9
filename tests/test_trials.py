"""Whole trials with every strategy: what is frozen stays bit-equal, what is cut off goes on."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from autoft import plugins
from autoft.network.build import build
from autoft.network.rates import KINDS
from autoft.network.sources import in_folder
from autoft.network.stages import kind_of_parameters, stage_of_modules, stage_of_parameters
from autoft.network.strategy import bind
from autoft.search.finish import load_trial
from autoft.training.evaluate import evaluate
from autoft.training.job import Precision, Setup, TrialJob
from autoft.training.trial import train_trial
from autoft.values import Part, TrialConfig, TrialResult

SMALL = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet"]
REAL = ["mobilenetv2_100.in1k", "mobilenetv1_100.in1k", "squeezenet1_0.in1k"]
STRATEGIES = [p.name for p in plugins.installed("strategy") if p.builtin]
FAST = {"lr": 1e-3, "head_lr": 3e-3, "batch_size": 16, "augment": "crop_flip"}


def go_on(report) -> bool:
    return True


def job(backbone, strategy, *, number=0, epochs=1, train=None, seed=5) -> TrialJob:
    part = strategy if isinstance(strategy, Part) else Part(strategy)
    how = {} if part.name == "head_only" else FAST | (train or {})
    config = TrialConfig(Part(backbone), part, Part("linear"), how, seed=seed)
    return TrialJob(number, config, epochs, time.time() + 300, Precision())


def check_frozen(setup: Setup, work: TrialJob, original) -> None:
    """Train and compare with the network before: all that had the rate 0 must be bit-equal."""
    outcome = train_trial(setup, work, go_on)
    assert outcome.status == "done", outcome.error
    network, backbone = load_trial(setup, TrialResult(work.number, work.config, "done"))
    before, after = original.module.state_dict(), network.backbone.state_dict()
    strategy = bind(work.config.strategy, len(backbone.stages))
    seen = [strategy.rates(step / 200) for step in range(200)]
    stages, kinds = stage_of_parameters(backbone), kind_of_parameters(backbone.module)
    live = {
        (stage, kind)
        for rates in seen
        for stage, each in enumerate(rates)
        for kind in KINDS
        if getattr(each, kind) > 0
    }
    live |= {(stage, "weights") for stage, kind in live if kind == "adapters" and strategy.adapter}
    frozen = [name for name in stages if (stages[name], kinds[name]) not in live]
    moved = [name for name in frozen if not torch.equal(before[name], after[name])]
    assert not moved
    assert len(live) == 0 or any(
        not torch.equal(before[n], after[n]) for n in stages if n not in frozen
    )
    modules = stage_of_modules(backbone, stages)
    still = {s for s in range(len(backbone.stages)) if not any((s, k) in live for k in KINDS)}
    for name, _ in network.backbone.named_buffers():
        pretrained = work.config.strategy.name != "scratch"
        if pretrained or modules.get(name.rpartition(".")[0]) in still:
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", SMALL)
def test_what_a_strategy_freezes_is_bit_equal_after_an_epoch(
    small_setup, fixed, tmp_path, model, strategy
) -> None:
    original = fixed(small_setup.sources[model], image_size=64)
    check_frozen(replace(small_setup, folder=tmp_path), job(model, strategy), original)


@pytest.mark.shared
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "scratch"])
@pytest.mark.parametrize("label", REAL)
def test_what_a_strategy_freezes_of_real_weights_is_bit_equal_after_an_epoch(
    shared_root, photos, setup_in, tmp_path, label, strategy
) -> None:
    setup = setup_in(photos, in_folder(shared_root / "weights")[0], tmp_path)
    few = setup.train.take(np.arange(0, len(setup.train), 2))
    check_frozen(replace(setup, train=few), job(label, strategy), build(setup.sources[label]))


OPTIONS = {
    "ema": {"ema": True},
    "sam": {"sam": 0.05},
    "l2sp": {"l2sp": 0.1},
    "wsd": {"schedule": "wsd"},
    "sgd": {"optimizer": "sgd"},
    "train": {"norm_mode": "train"},
    "frozen": {"norm_mode": "frozen"},
    "gem": {"pool": "gem"},
    "avgmax": {"pool": "avgmax"},
    "focal": {"balance": "focal"},
    "logit_adjust": {"balance": "logit_adjust"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_trial_with_this_option_learns_and_keeps_what_it_scored(
    small_setup, tmp_path, option
) -> None:
    setup = replace(small_setup, folder=tmp_path)
    work = job("test_resnet", "scratch", epochs=8, train=OPTIONS[option] | {"lr": 3e-3})
    outcome = train_trial(setup, work, go_on)
    assert outcome.score > 0.5, outcome  # three colours: chance is 0.33
    network, backbone = load_trial(setup, TrialResult(0, work.config, "done"))
    again = evaluate(network, setup, setup.validation, setup.preprocess(backbone), Precision())
    assert again.score == outcome.score
    assert again.loss == pytest.approx(outcome.loss, abs=1e-5)


@pytest.mark.parametrize("case", ["ema", "sam", "l2sp", "gem", "rgn", "lora", "gradual"])
def test_a_trial_cut_off_ends_with_the_numbers_of_one_that_was_not(
    small_setup, fixed, tmp_path, case
) -> None:
    setup = replace(small_setup, folder=tmp_path)
    strategy = case if case in STRATEGIES else "full"
    model, train = "test_convnext" if case == "lora" else "test_resnet", OPTIONS.get(case, {})
    whole = train_trial(setup, job(model, strategy, number=1, epochs=3, train=train), go_on)

    def crash(report) -> bool:
        if report.epoch == 2:
            raise KeyboardInterrupt
        return True

    cut = job(model, strategy, number=2, epochs=3, train=train)
    with pytest.raises(KeyboardInterrupt):
        train_trial(setup, cut, crash)
    resumed = train_trial(setup, cut, go_on)
    assert (resumed.scores, resumed.loss) == (whole.scores, whole.loss)
    one, two = (load_file(tmp_path / f"trials/000{n}/scored.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_anchor_holds_weights_near_where_they_began(small_setup, fixed, tmp_path) -> None:
    setup = replace(small_setup, folder=tmp_path)
    start = fixed(setup.sources["test_resnet"], image_size=64).module.state_dict()
    distances = []
    for number, l2sp in enumerate((0.0, 0.1)):
        work = job("test_resnet", "full", number=number, epochs=6, train={"l2sp": l2sp})
        train_trial(setup, work, go_on)
        kept = load_file(tmp_path / f"trials/000{number}/scored.safetensors")
        moved = [kept[f"backbone.{n}"] - t for n, t in start.items() if t.is_floating_point()]
        distances.append(float(torch.cat([t.flatten() for t in moved]).norm()))
    assert 0 < distances[1] < 0.9 * distances[0]


def test_low_rank_changes_are_merged_into_plain_weights(small_setup, fixed, tmp_path) -> None:
    setup = replace(small_setup, folder=tmp_path)
    train_trial(setup, job("test_convnext", "lora", epochs=2), go_on)
    kept = load_file(tmp_path / "trials/0000/scored.safetensors")
    plain = fixed(setup.sources["test_convnext"], image_size=64).module.state_dict()
    assert {n.removeprefix("backbone.") for n in kept if n.startswith("backbone.")} == set(plain)
    moved = [n for n, t in plain.items() if not torch.equal(kept[f"backbone.{n}"], t)]
    assert moved
    assert all(plain[name].ndim >= 2 for name in moved)


def test_a_head_on_all_stages_takes_their_features(small_setup, fixed, tmp_path) -> None:
    setup = replace(small_setup, folder=tmp_path)
    for number, strategy in enumerate(("head_only", "scratch")):
        work = job("test_resnet", strategy, number=number, epochs=4)
        work = replace(work, config=replace(work.config, head=Part("multilayer")))
        outcome = train_trial(setup, work, go_on)
        assert outcome.score > 0.5
        network, _ = load_trial(setup, TrialResult(number, work.config, "done"))
        assert network.pool.num_features > network.backbone.num_features


@pytest.mark.parametrize(("strategy", "told"), [("scratch", "none"), ("full", "r160_in1k")])
def test_only_weights_that_had_a_part_in_it_are_told_of(
    small_setup, fixed, tmp_path, strategy, told
) -> None:
    setup = replace(small_setup, folder=tmp_path)
    work = job("test_resnet", strategy)
    train_trial(setup, work, go_on)
    _, backbone = load_trial(setup, TrialResult(0, work.config, "done"))
    assert backbone.source == told
    assert (backbone.license == "none") is (told == "none")
