"""What a frozen prefix gives is kept, and training on it is training on the images."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr

from autoft.data.cache.entries import entries
from autoft.data.cache.files import cache_root
from autoft.data.inputs.sample import write_sample
from autoft.data.views import training_batches, view_batches
from autoft.errors import MachineError
from autoft.network.build import build
from autoft.network.cut import CannotCut
from autoft.network.sources import Source, in_folder
from autoft.search.finish import load_trial
from autoft.training import activations, divided, prefix, rowstore
from autoft.training.evaluate import evaluate
from autoft.training.job import Costs, Precision, Setup, Sharing, TrialJob
from autoft.training.rowstore import RowReader
from autoft.training.trial import train_trial
from autoft.values import Part, Preprocess, TrialConfig, TrialResult

SMALL = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet"]
MINI = "autoft_mini"
REAL = ["mobilenetv2_100.in1k", "mobilenetv1_100.in1k", "squeezenet1_0.in1k"]
FAST = {"lr": 1e-3, "head_lr": 3e-3, "batch_size": 16}
HALF = Part("freeze", {"depth": 0.5})


@pytest.fixture
def setup(small_setup) -> Setup:
    return small_setup


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """Return the folder where activations are kept, empty."""
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))
    return cache_root() / "activations"


def go_on(report) -> bool:
    return True


def job(backbone, sharing, *, number=0, epochs=3, strategy=HALF, **given) -> TrialJob:
    train = FAST | {"augment": "crop_flip"} | given
    config = TrialConfig(Part(backbone), strategy, Part("linear"), train, seed=5)
    return TrialJob(
        number, config, epochs, time.time() + 300, Precision(channels_last=True), sharing=sharing
    )


def trained(setup, folder, work):
    """Return how a trial ended in a run folder of its own, and the weights that were scored."""
    setup = replace(setup, folder=folder)
    outcome = train_trial(setup, work, go_on)
    assert outcome.status == "done", outcome.error
    place = folder / "trials" / f"{work.number:04d}"
    return outcome, load_file(place / "scored.safetensors"), place


def furthest(one, other) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def sharing_of(place: Path) -> dict:
    return json.loads((place / "sharing.json").read_text())


# --- views -------------------------------------------------------------------------------------


PRE = Preprocess(48, 64, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "bilinear")


def test_a_view_of_an_image_is_the_same_in_every_batch(setup) -> None:
    rows = setup.train.rows[:10]
    together = torch.cat(list(view_batches(setup.store, rows, PRE, "strong", 3, 10)))
    apart = torch.cat(list(view_batches(setup.store, rows[::-1].copy(), PRE, "strong", 3, 3)))
    assert torch.equal(together, apart.flip(0))
    other = torch.cat(list(view_batches(setup.store, rows, PRE, "strong", 4, 10)))
    assert all(not torch.equal(a, b) for a, b in zip(together, other, strict=True))


def test_epochs_take_the_views_in_turns(setup) -> None:
    rows = setup.train.rows[:12]

    def images(epoch: int) -> torch.Tensor:
        batches = training_batches(
            setup.store,
            rows,
            np.arange(12),
            PRE,
            num_classes=12,
            weights=np.ones(12, np.float32),
            augment="crop_flip",
            mix="none",
            batch_size=5,
            seed=1,
            epoch=epoch,
            views=2,
        )
        every = list(batches)
        order = torch.cat([each.targets.argmax(1) for each in every]).argsort()
        return torch.cat([each.images for each in every])[order]

    assert torch.equal(images(0), images(2))
    assert torch.equal(images(1), images(3))
    assert not torch.equal(images(0), images(1))


# --- the same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("mode", ["disk", "ram", "device"])
def test_kept_in_fp32_the_scores_are_those_of_running_again(
    setup, fixed, own_cache, tmp_path, model, mode
) -> None:
    depth = len(build(setup.sources[model], pretrained=False, image_size=64).stages) // 2
    again = trained(setup, tmp_path / "a", job(model, Sharing("rerun", depth, 2)))
    kept = trained(setup, tmp_path / "b", job(model, Sharing(mode, depth, 2, exact=True)))
    assert sharing_of(kept[2])["why"] == ""
    assert kept[0].scores == again[0].scores
    assert kept[0].loss == pytest.approx(again[0].loss, rel=1e-4, abs=1e-5)
    assert furthest(kept[1], again[1]) < 1e-4
    assert own_cache.exists() == (mode != "ram")


@pytest.mark.parametrize("model", SMALL)
def test_kept_in_bf16_the_scores_are_close_to_those_of_running_again(
    setup, fixed, own_cache, tmp_path, model
) -> None:
    depth = len(build(setup.sources[model], pretrained=False, image_size=64).stages) // 2
    bf16 = Precision(bf16=True, channels_last=True)
    again, kept = (
        trained(setup, tmp_path / mode, replace(job(model, how, lr=1e-4), precision=bf16))
        for mode, how in {"a": Sharing("rerun", depth, 2), "b": Sharing("disk", depth, 2)}.items()
    )
    assert sharing_of(kept[2])["why"] == ""
    assert kept[0].score == pytest.approx(again[0].score, abs=0.1)
    assert kept[0].loss == pytest.approx(again[0].loss, rel=0.1)


@pytest.mark.shared
@pytest.mark.parametrize("label", REAL)
def test_kept_activations_of_real_weights_give_the_same_trial(
    shared_root, photos, setup_in, own_cache, tmp_path, label
) -> None:
    setup = setup_in(photos, in_folder(shared_root / "weights")[0], tmp_path)
    setup = replace(setup, train=setup.train.take(np.arange(0, len(setup.train), 2)))
    depth = bound_depth(setup, label)

    def trial(folder, sharing):
        return trained(setup, tmp_path / folder, job(label, sharing, epochs=2, lr=1e-4))

    again = trial("a", Sharing("rerun", depth, 1))
    exact = trial("b", Sharing("disk", depth, 1, exact=True))
    half = trial("c", Sharing("disk", depth, 1))
    assert exact[0].scores == again[0].scores
    assert furthest(exact[1], again[1]) <= 1e-4
    assert half[0].loss == pytest.approx(again[0].loss, rel=0.03, abs=2e-3)
    assert half[0].score == pytest.approx(again[0].score, abs=0.05)


@pytest.mark.slow
def test_kept_in_fp16_fifty_trials_rank_as_those_that_run_again(
    setup_in, own_cache, tmp_path
) -> None:
    """The weights that autoft ships with, on 600 of its digits."""
    write_sample("digits", tmp_path / "digits")
    setup = setup_in(tmp_path / "digits", {MINI: Source(MINI, MINI)}, tmp_path)
    setup = replace(setup, train=setup.train.take(np.arange(600)))
    depth = bound_depth(setup, MINI)
    kinds = {"again": Sharing("rerun", depth, 1), "kept": Sharing("disk", depth, 1)}
    found: dict[str, list] = {kind: [] for kind in kinds}
    for number in range(50):
        share = number / 49
        recipe = {"lr": 2e-5 * 149**share, "head_lr": 1e-4 * 299**share}
        for kind, how in kinds.items():
            work = job(MINI, how, number=number, epochs=1, head_first=False, **recipe)
            outcome, _, place = trained(setup, tmp_path / kind, work)
            assert sharing_of(place)["why"] == ""
            found[kind].append((outcome.score, -outcome.loss))
    again, kept = ([score for score, _ in found[kind]] for kind in kinds)
    assert max(again) - min(again) > 0.25  # else there is nothing to rank
    assert spearmanr(again, kept).statistic >= 0.99
    best = [max(range(50), key=lambda number: found[kind][number]) for kind in kinds]
    assert best[0] == best[1]


def bound_depth(setup, label) -> int:
    from autoft.network.strategy import bind

    stages = build(setup.sources[label], pretrained=False, image_size=64).stages
    return bind(HALF, len(stages)).frozen_prefix()


@pytest.mark.parametrize(
    "option", [{"pool": "gem"}, {"pool": "avgmax"}, {"sam": 0.05}, {"ema": True}]
)
def test_kept_with_this_option_the_scores_are_the_same(
    setup, fixed, own_cache, tmp_path, option
) -> None:
    depth = bound_depth(setup, "test_resnet")
    again = trained(
        setup, tmp_path / "a", job("test_resnet", Sharing("rerun", depth, 1), **option)
    )
    how = Sharing("disk", depth, 1, exact=True)
    kept = trained(setup, tmp_path / "b", job("test_resnet", how, **option))
    assert sharing_of(kept[2])["why"] == ""
    assert kept[0].scores == again[0].scores
    assert furthest(kept[1], again[1]) < 1e-4


def test_what_was_scored_is_what_the_whole_network_scores(
    setup, fixed, own_cache, tmp_path
) -> None:
    depth = bound_depth(setup, "test_resnet")
    work = job("test_resnet", Sharing("disk", depth, 2))
    outcome, _, _ = trained(setup, tmp_path, work)
    network, backbone = load_trial(
        replace(setup, folder=tmp_path), TrialResult(0, work.config, "done")
    )
    pre = setup.preprocess(backbone)
    scored = evaluate(network, setup, setup.validation, pre, Precision())
    assert scored.score == outcome.score
    assert scored.loss == pytest.approx(outcome.loss, rel=0.01, abs=1e-3)


# --- sharing -----------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Return a list to which the number of images is added whenever a prefix runs over some."""
    counts: list[int] = []
    plain = prefix.Shared._computed

    def counting(self, rows, view):
        counts.append(len(rows))
        yield from plain(self, rows, view)

    monkeypatch.setattr(prefix.Shared, "_computed", counting)
    return counts


def test_a_prefix_runs_once_for_every_image_and_view_whatever_the_trials(
    setup, fixed, own_cache, tmp_path, computed
) -> None:
    how = Sharing("disk", bound_depth(setup, "test_resnet"), 2)
    trained(setup, tmp_path / "a", job("test_resnet", how, epochs=5))
    assert sum(computed) == 2 * len(setup.train) + len(setup.validation)
    computed.clear()
    trained(setup, tmp_path / "b", job("test_resnet", how, epochs=5, lr=1e-4))
    assert not computed
    trained(setup, tmp_path / "c", job("test_resnet", how, epochs=1, augment="crop"))
    assert sum(computed) == len(setup.train)  # other views; the validation images are known


def planned(setup, depth, **given) -> TrialJob:
    """Return a trial of a network whose frozen stages are worth keeping, with one view."""
    stages = len(build(setup.sources["test_resnet"], pretrained=False, image_size=64).stages)
    costs = Costs(
        prefix=tuple(0.01 * k for k in range(stages + 1)),
        tail=tuple(0.01 * (stages - k) for k in range(stages + 1)),
        score=tuple(0.003 * (stages - k) for k in range(stages + 1)),
        bytes=(0, *(1000 for _ in range(stages))),
    )
    part = Part("freeze", {"depth": depth / stages})
    given = {"augment": "none"} | given
    return replace(job("test_resnet", None, strategy=part, **given), costs=costs)


def test_what_crosses_earlier_cuts_is_kept_on_the_way(
    setup, fixed, own_cache, tmp_path, computed
) -> None:
    _, _, place = trained(setup, tmp_path / "a", planned(setup, 3))
    assert (sharing_of(place)["mode"], sharing_of(place)["cut"]) == ("disk", 3)
    computed.clear()
    # A trial that freezes less finds all that it needs, and it is what it would have made.
    kept = trained(setup, tmp_path / "b", planned(setup, 2))
    assert (sharing_of(kept[2])["mode"], sharing_of(kept[2])["cut"]) == ("disk", 2)
    assert not computed
    shutil.rmtree(own_cache)
    made = trained(setup, tmp_path / "c", planned(setup, 2))
    assert sum(computed) == len(setup.train) + len(setup.validation)
    assert kept[0].scores == made[0].scores
    assert furthest(kept[1], made[1]) == 0


def test_what_is_kept_on_the_way_is_not_held(setup, fixed, own_cache, tmp_path) -> None:
    work = planned(setup, 3)
    trained(setup, tmp_path / "a", replace(work, sharing=Sharing("disk", 3, 1)))
    own = {entry.path for entry in entries()}
    assert own
    shutil.rmtree(own_cache)
    trained(setup, tmp_path / "b", work)
    found = [entry for entry in entries() if entry.path not in own and entry.kind == "activations"]
    assert len(found) == 4  # of two cuts, images to train on and to validate
    assert not any(entry.held for entry in found)


def test_nothing_is_kept_twice_on_the_way(setup, fixed, own_cache, tmp_path, monkeypatch) -> None:
    trained(setup, tmp_path / "a", planned(setup, 3))
    asked: list[int] = []
    plain = divided.prefix_of
    monkeypatch.setattr(divided, "prefix_of", lambda *given: asked.append(1) or plain(*given))
    trained(setup, tmp_path / "b", planned(setup, 3, lr=1e-4))
    assert not asked
    trained(setup, tmp_path / "c", planned(setup, 3, augment="crop"))
    assert asked  # of other views nothing is there


def test_a_trial_on_another_fold_keeps_what_it_was_kept_by(
    setup, fixed, own_cache, tmp_path
) -> None:
    how = Sharing("ram", bound_depth(setup, "test_resnet"), 3)
    trained(setup, tmp_path, job("test_resnet", how))
    again = replace(job("test_resnet", None, number=1), fold=1, of=0)
    assert sharing_of(trained(setup, tmp_path, again)[2]) == sharing_of(
        tmp_path / "trials" / "0000"
    )


@pytest.mark.parametrize("broken", ["cut", "disk", "numbers"])
def test_what_cannot_be_kept_on_the_way_does_not_touch_the_trial(
    setup, fixed, own_cache, tmp_path, monkeypatch, broken
) -> None:
    alone = trained(
        setup, tmp_path / "a", replace(planned(setup, 3), sharing=Sharing("disk", 3, 1))
    )
    shutil.rmtree(own_cache)

    def refused(*_, **__):
        raise CannotCut("for the test")

    def full(*given, held=True):
        if not held:
            raise MachineError("for the test")
        return rowstore.writing(*given)

    place, name, instead = {
        "cut": (divided, "prefix_of", refused),
        "disk": (activations, "writing", full),
        "numbers": (activations, "fits_half", lambda _: False),
    }[broken]
    monkeypatch.setattr(place, name, instead)
    kept = trained(setup, tmp_path / "b", planned(setup, 3))
    assert (sharing_of(kept[2])["mode"], sharing_of(kept[2])["why"]) == ("disk", "")
    assert kept[0].scores == alone[0].scores
    assert furthest(kept[1], alone[1]) == 0
    keys = {path.name.partition("-")[0] for path in own_cache.glob("[!.]*")}
    assert len(keys) == 1  # of one cut


def test_a_trial_that_goes_on_keeps_its_views(setup, fixed, own_cache, tmp_path, computed) -> None:
    how = Sharing("disk", bound_depth(setup, "test_resnet"), 2)
    whole = trained(setup, tmp_path / "a", job("test_resnet", how, epochs=4))

    def crash_in_the_third(report) -> bool:
        if report.epoch == 3:
            raise KeyboardInterrupt
        return True

    cut_off = replace(setup, folder=tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        train_trial(cut_off, job("test_resnet", how, epochs=4), crash_in_the_third)
    computed.clear()
    goes_on = trained(setup, tmp_path / "b", job("test_resnet", None, epochs=4))
    assert goes_on[0].scores == whole[0].scores
    assert furthest(goes_on[1], whole[1]) == 0
    assert not computed  # and finds what it has kept of them


def test_large_activations_are_computed_in_small_chunks(
    setup, fixed, own_cache, tmp_path, computed, monkeypatch
) -> None:
    how = Sharing("disk", bound_depth(setup, "test_resnet"), 1)
    whole = trained(setup, tmp_path / "a", job("test_resnet", how))
    assert max(computed) == len(setup.train)
    shutil.rmtree(own_cache)
    computed.clear()
    monkeypatch.setattr(activations, "CHUNK_LEAST", 16)
    monkeypatch.setattr(activations, "CHUNK_BYTES", 20 * 1000)
    costs = Costs(*((1e-3,) * (how.cut + 1),) * 3, (1000,) * (how.cut + 1))
    again = trained(setup, tmp_path / "b", replace(job("test_resnet", how), costs=costs))
    assert max(computed) == 20
    assert again[0].scores == whole[0].scores


def test_a_view_that_is_not_made_in_time_stops_the_trial_with_what_it_has(
    setup, fixed, own_cache, tmp_path, monkeypatch
) -> None:
    how = Sharing("disk", bound_depth(setup, "test_resnet"), 2)
    work, plain, late = job("test_resnet", how, epochs=4), prefix.Shared._computed, []

    def slow(self, rows, view):
        for batch in plain(self, rows, view):
            if view.number == 1 and not late:  # in the middle of the second view
                late.append(work.deadline + activations.LATE + 1)
                monkeypatch.setattr("autoft.training.activations.time.time", lambda: late[0])
            yield batch

    monkeypatch.setattr(prefix.Shared, "_computed", slow)
    outcome = train_trial(replace(setup, folder=tmp_path / "a"), work, lambda _: True)
    assert len(list(own_cache.rglob("about.json"))) == 2  # of one view, and of the others
    assert (outcome.status, len(outcome.scores)) == ("stopped", 1)


def test_a_device_without_room_leaves_the_frozen_stages_to_run_again(
    setup, fixed, own_cache, tmp_path, monkeypatch
) -> None:
    how, notes = Sharing("device", bound_depth(setup, "test_resnet"), 1), []
    plain, held = activations._Held, []

    def full(rows, values):
        held.append(len(rows))
        if len(held) > 1:  # the first was computed, this one is brought to the device
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return plain(rows, values)

    monkeypatch.setattr(activations, "_Held", full)
    outcome = train_trial(
        replace(setup, folder=tmp_path / "a"),
        job("test_resnet", how),
        lambda report: notes.append(report.note) or True,
    )
    assert outcome.status == "done"
    assert "the device has no room" in notes[-1]
    assert sharing_of(tmp_path / "a" / "trials" / "0000")["mode"] == "rerun"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"mix": "mixup"}, "mix"),
        ({"mix": "cutmix"}, "mix"),
        ({"train_scale": 0.7}, "two sizes"),
    ],
)
def test_what_cannot_be_kept_is_run_again_and_told(
    setup, fixed, own_cache, tmp_path, given, reason
) -> None:
    how = Sharing("disk", bound_depth(setup, "test_resnet"), 1)
    _, _, place = trained(setup, tmp_path, job("test_resnet", how, **given))
    told = sharing_of(place)
    assert told["mode"] == "rerun"
    assert reason in told["why"]
    assert not own_cache.exists()


def test_what_is_kept_may_be_mixed(setup, fixed, own_cache, tmp_path, computed) -> None:
    depth = bound_depth(setup, "test_resnet")
    how = Sharing("disk", depth, 1, exact=True)
    plain = trained(setup, tmp_path / "a", job("test_resnet", how))
    mixed = trained(setup, tmp_path / "b", job("test_resnet", how, mix="manifold"))
    assert sharing_of(mixed[2])["mode"] == "disk"
    assert sum(computed) == len(setup.train) + len(setup.validation)  # the same rows serve both
    assert mixed[0].loss != plain[0].loss
    again = trained(
        setup, tmp_path / "c", job("test_resnet", Sharing("rerun", depth, 1), mix="manifold")
    )
    images = trained(
        setup, tmp_path / "d", job("test_resnet", Sharing("rerun", depth, 1), mix="mixup")
    )
    assert again[0].scores == images[0].scores  # nothing is kept: it is of the images


def test_a_head_on_all_stages_runs_all_of_them(setup, fixed, own_cache, tmp_path) -> None:
    how = Sharing("disk", bound_depth(setup, "test_resnet"), 1)
    work = job("test_resnet", how)
    work = replace(work, config=replace(work.config, head=Part("multilayer")))
    _, _, place = trained(setup, tmp_path, work)
    assert "all stages" in sharing_of(place)["why"]


# --- faults ------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


DAMAGE = {
    "deleted": lambda folder: shutil.rmtree(folder),
    "flipped": lambda folder: [flip(path) for path in files(folder)],
    "truncated": lambda folder: [
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) for path in files(folder)
    ],
    "of another version": lambda folder: [
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 0}))
        for path in folder.rglob("about.json")
    ],
}


@pytest.mark.parametrize("on_the_way", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_activations_damaged_in_mid_run_are_computed_again(
    setup, fixed, own_cache, tmp_path, damage, on_the_way
) -> None:
    how = Sharing("disk", bound_depth(setup, "test_resnet"), 2)
    work = job("test_resnet", how, epochs=4)
    if on_the_way:
        work = planned(setup, 3, epochs=4)
    whole = trained(setup, tmp_path / "a", work)
    shutil.rmtree(own_cache)

    def breaks(report) -> bool:
        if report.epoch == 2:
            DAMAGE[damage](own_cache)
        return True

    outcome = train_trial(replace(setup, folder=tmp_path / "b"), work, breaks)
    assert outcome.scores == whole[0].scores
    found = load_file(tmp_path / "b" / "trials" / "0000" / "scored.safetensors")
    assert furthest(found, whole[1]) < 1e-5


@pytest.mark.parametrize(("seconds", "mode"), [(0.0, "disk"), (0.02, "rerun")])
def test_where_reading_turns_out_slow_it_is_computed_again(
    setup, fixed, own_cache, tmp_path, monkeypatch, seconds, mode
) -> None:
    depth = bound_depth(setup, "test_resnet")
    stages = depth + 1
    costs = Costs(
        (1e-3,) * stages, (1e-3,) * stages, (1e-3,) * stages, (20_000,) * stages, view=1e-4
    )
    plain = RowReader.read

    def slowly(self, rows):
        time.sleep(seconds * len(rows))
        return plain(self, rows)

    monkeypatch.setattr(RowReader, "read", slowly)
    how = Sharing("disk", depth, 2, exact=True)
    again = trained(setup, tmp_path / "a", job("test_resnet", replace(how, mode="rerun")))
    work = replace(job("test_resnet", how), costs=costs)
    kept = trained(setup, tmp_path / "b", work)
    assert kept[0].scores == again[0].scores
    assert furthest(kept[1], again[1]) < 1e-4
    told = sharing_of(kept[2])
    assert told["mode"] == mode
    assert ("takes longer" in told["why"]) == (mode == "rerun")


def blocked(own_cache: Path, monkeypatch) -> None:
    own_cache.write_text("a file where a folder should be")


def full(own_cache: Path, monkeypatch) -> None:
    monkeypatch.setenv("AUTOFT_CACHE_LIMIT", "1kB")


def nowhere(own_cache: Path, monkeypatch) -> None:
    full(own_cache, monkeypatch)
    monkeypatch.setattr(activations, "SPARED", 1.0)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [(full, "no room"), (blocked, "cannot be written"), (nowhere, "not kept")],
)
def test_without_room_on_disk_or_anywhere_a_trial_goes_on(
    setup, fixed, own_cache, tmp_path, monkeypatch, spoil, told
) -> None:
    how = Sharing("disk", bound_depth(setup, "test_resnet"), 1)
    whole = trained(setup, tmp_path / "a", job("test_resnet", how))
    shutil.rmtree(own_cache)
    spoil(own_cache, monkeypatch)
    notes = []
    outcome = train_trial(
        replace(setup, folder=tmp_path / "b"),
        job("test_resnet", how),
        lambda r: notes.append(r.note) or True,
    )
    if spoil is nowhere:  # the prefix runs again, in fp32
        assert outcome.scores == pytest.approx(whole[0].scores, abs=0.05)
    else:
        assert outcome.scores == whole[0].scores
    assert told in notes[-1]
