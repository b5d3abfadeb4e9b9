"""One trial does what it says: keeps what it scored, stops when told, resumes bit by bit."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoft import plugins
from autoft.errors import DataError
from autoft.export.artifact import load_weights
from autoft.network.build import build
from autoft.network.sources import in_folder
from autoft.search.engines import tasks
from autoft.search.finish import load_trial
from autoft.search.images import read_data, setup_of
from autoft.search.settings import Settings
from autoft.training import checkpoint, tune, underway
from autoft.training.evaluate import evaluate
from autoft.training.features import fingerprint, pooled_features
from autoft.training.job import Images, Precision, Setup, TrialJob
from autoft.training.losses import make_loss, weighted_cross_entropy
from autoft.training.metrics import score
from autoft.training.probe import fit_head
from autoft.training.recipe import probing
from autoft.training.trial import train_trial
from autoft.training.tune import steps_per_epoch
from autoft.values import Part, TrialConfig, TrialResult

PLAIN = make_loss("none", 0.0, np.ones(2))
PROBE = {"head_lr": 3e-3, "weight_decay": 0.1, "smoothing": 0.0}
TUNE = {
    "lr": 1e-3,
    "head_lr": 3e-3,
    "weight_decay": 0.02,
    "smoothing": 0.0,
    "augment": "crop_flip",
    "batch_size": 16,
    "optimizer": "adamw",
}


def read(folder):
    return read_data(Settings(dataset=str(folder), image_size=64), lambda *_, **__: None)


def setup_from(data, weights, folder) -> Setup:
    torch.set_num_threads(1)
    settings = Settings(dataset="x", image_size=64, metric="accuracy")
    setup = setup_of(settings, folder, data, in_folder(weights)[0], "cpu")
    return replace(setup, threads=1)


@pytest.fixture
def setup(photos, tiny_weights, tmp_path) -> Setup:
    return setup_from(read(photos), tiny_weights, tmp_path)


def job(number=0, strategy="full", head="linear", epochs=3, train=None, seconds=300.0) -> TrialJob:
    part = strategy if isinstance(strategy, Part) else Part(strategy)
    probe = part.name == "head_only"
    config = TrialConfig(
        Part("test_resnet.fixed"), part, Part(head), train or (PROBE if probe else TUNE), seed=5
    )
    return TrialJob(number, config, epochs, time.time() + seconds, Precision())


def go_on(report) -> bool:
    return True


def test_i14_images_that_change_fail_the_trial_and_the_next_one_runs(
    photos, tiny_weights, tmp_path, monkeypatch
) -> None:
    images = Path(shutil.copytree(photos, tmp_path / "images"))
    monkeypatch.setenv("AUTOFT_CACHE_LIMIT", "100KB")
    data = read(images)
    setup = setup_from(data, tiny_weights, tmp_path)
    path = images / data.catalog.paths[data.split.train()[0]]
    before = path.read_bytes()
    Image.new("RGB", (56, 48), "white").save(path)
    link = tasks.Link(lambda *_: None, go_on)
    (failed,) = tasks.train(link, setup, (job(epochs=1),))
    assert failed.status == "failed"
    assert "data_changed" in failed.error
    assert path.name in failed.error
    path.write_bytes(before)
    (fine,) = tasks.train(link, setup, (job(1, epochs=1),))
    assert fine.status == "done"


@pytest.mark.parametrize("strategy", ["head_only", "full"])
def test_the_weights_kept_are_the_weights_scored(setup, strategy) -> None:
    outcome = train_trial(setup, job(strategy=strategy), go_on)
    assert outcome.status == "done"
    assert outcome.score == outcome.scores[-1]
    assert outcome.score > 0.6  # three colours: chance is 0.33
    result = TrialResult(0, job(strategy=strategy).config, "done")
    network, backbone = load_trial(setup, result)
    again = evaluate(network, setup, setup.validation, setup.preprocess(backbone), Precision())
    assert again.score == outcome.score
    assert again.loss == pytest.approx(outcome.loss, abs=1e-5)


def test_a_head_only_trial_leaves_the_backbone_bit_equal(setup) -> None:
    train_trial(setup, job(strategy="head_only"), go_on)
    network, _ = load_trial(setup, TrialResult(0, job(strategy="head_only").config, "done"))
    original = build(setup.sources["test_resnet.fixed"]).module.state_dict()
    kept = network.backbone.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in original.items())


def test_a_frozen_prefix_is_bit_equal_after_a_trial(setup) -> None:
    frozen = Part("freeze", {"depth": 0.6, "bottom": 1.0})
    train_trial(setup, job(strategy=frozen, epochs=1), go_on)
    network, _ = load_trial(setup, TrialResult(0, job(strategy=frozen).config, "done"))
    original = build(setup.sources["test_resnet.fixed"]).module.state_dict()
    kept = network.backbone.state_dict()
    moved = {name for name, tensor in original.items() if not torch.equal(kept[name], tensor)}
    stages = network._stage_of_parameter
    assert {stages[name] for name in moved if name in stages} == {3, 4}
    assert not [name for name in moved if name.startswith(("conv1", "bn1", "layer1", "layer2"))]


def test_a_trial_cut_off_goes_on_and_ends_with_the_same_numbers(setup, tmp_path) -> None:
    whole = train_trial(setup, job(number=1, epochs=3), go_on)
    kept = {}

    def crash_in_the_third(report) -> bool:
        kept[report.epoch] = (tmp_path / "trials/0002/last.safetensors").exists()
        if report.epoch == 3:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        train_trial(setup, job(number=2, epochs=3), crash_in_the_third)
    assert kept == {1: False, 2: True, 3: True}
    seen = []
    resumed = train_trial(setup, job(number=2, epochs=3), lambda r: seen.append(r.epoch) or True)
    assert seen == [3]
    assert resumed.scores == whole.scores
    assert resumed.loss == whole.loss
    # Nobody has written how it ended: it goes on from there, and has nothing left to do.
    again = train_trial(setup, job(number=2, epochs=3), lambda _: pytest.fail("an epoch more"))
    assert (again.status, again.scores, again.loss) == ("done", whole.scores, whole.loss)


def test_another_trial_in_the_place_of_one_begins_anew(setup, tmp_path) -> None:
    train_trial(setup, job(number=2, epochs=1), go_on)
    assert (tmp_path / "trials/0002/last.safetensors").exists()
    seen = []
    train_trial(setup, job(number=2, epochs=2), lambda r: seen.append(r.epoch) or True)
    assert seen == [1, 2]


def test_a_trial_with_random_mixtures_goes_on_with_the_same_numbers(setup) -> None:
    how = {**TUNE, "augment": "trivial", "mix": "cutmix"}
    whole = train_trial(setup, job(number=1, epochs=2, train=how), go_on)

    def crash_in_the_second(report) -> bool:
        if report.epoch == 2:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        train_trial(setup, job(number=2, epochs=2, train=how), crash_in_the_second)
    resumed = train_trial(setup, job(number=2, epochs=2, train=how), go_on)
    assert (resumed.scores, resumed.loss) == (whole.scores, whole.loss)
    plain = train_trial(setup, job(number=3, epochs=2), go_on)
    assert plain.loss != whole.loss


@pytest.mark.parametrize("strategy", ["head_only", "full"])
def test_images_of_weight_0_teach_nothing(setup, strategy) -> None:
    """Half of the images have a wrong label: with weight 0 they do no harm."""
    part = setup.train
    wrong = np.arange(len(part)) % 2 == 0
    mislabelled = replace(part, labels=np.where(wrong, (part.labels + 1) % 3, part.labels))
    weighted = replace(mislabelled, weights=np.where(wrong, 0, 5).astype(np.float32))
    work = job(strategy=strategy)
    right = train_trial(replace(setup, train=weighted), work, go_on)
    harmed = train_trial(replace(setup, train=mislabelled), replace(work, number=1), go_on)
    assert right.loss < harmed.loss - 0.1


def test_a_trial_that_is_told_to_stop_stops(setup) -> None:
    outcome = train_trial(setup, job(epochs=5), lambda report: report.epoch < 2)
    assert outcome.status == "stopped"
    assert len(outcome.scores) == 2


def test_a_trial_ends_at_its_deadline_with_what_it_has(setup) -> None:
    outcome = train_trial(setup, job(seconds=-1.0), go_on)
    assert outcome.status == "failed"
    assert "deadline" in outcome.error
    began = time.time()

    def slow(report) -> bool:
        time.sleep(max(0.0, began + 4.0 - time.time()))
        return True

    outcome = train_trial(setup, replace(job(number=1), deadline=began + 3.5), slow)
    assert outcome.status == "stopped"
    assert len(outcome.scores) == 1


class Clock:
    """Stands still but where it is told to go on."""

    def __init__(self) -> None:
        self.now = time.time()

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr(tune, "time", stopped)
    monkeypatch.setattr(underway, "time", stopped)
    return stopped


def slowly(clock, then=lambda report: True):
    def report(report) -> bool:
        clock.now += 10.0
        return then(report)

    return report


def test_a_trial_that_is_slow_has_fewer_epochs_and_all_of_its_schedule(
    setup, clock, monkeypatch
) -> None:
    told, rates = [], []
    set_rates = tune.set_learning_rates

    def seen(optimizer, *rest) -> None:
        set_rates(optimizer, *rest)
        rates.append(max(group["lr"] for group in optimizer.param_groups))

    monkeypatch.setattr(tune, "set_learning_rates", seen)
    asked = replace(job(epochs=20), deadline=clock.now + 50.5)
    keep = slowly(clock, lambda report: told.append(report.epochs) or True)
    outcome = train_trial(setup, asked, keep)
    assert (outcome.status, len(outcome.scores)) == ("done", 5)
    assert told == [20, 20, 5, 5, 5]  # known after two
    assert rates[-1] < 0.05 * max(rates)  # the schedule came to its end


def test_a_trial_that_is_scored_again_has_the_epochs_that_it_had(setup, clock) -> None:
    asked = replace(job(epochs=4), deadline=clock.now + 35.0, of=0)
    outcome = train_trial(setup, asked, slowly(clock))
    assert (outcome.status, len(outcome.scores)) == ("done", 4)  # the last ends a little late


def test_a_trial_without_time_for_another_epoch_stops_there(setup, clock) -> None:
    asked = replace(job(epochs=20), deadline=clock.now + 25.0)
    outcome = train_trial(setup, asked, slowly(clock))
    assert (outcome.status, len(outcome.scores)) == ("stopped", 2)


def test_a_shortened_trial_that_was_cut_off_goes_on_with_its_schedule(
    setup, clock, tmp_path
) -> None:
    asked = replace(job(epochs=20), deadline=clock.now + 60.5)
    whole = train_trial(setup, asked, slowly(clock))

    def killed(report) -> bool:
        if report.epoch == 4:
            raise KeyboardInterrupt
        return True

    again = replace(setup, folder=tmp_path / "again")
    asked = replace(asked, deadline=clock.now + 60.5)
    with pytest.raises(KeyboardInterrupt):
        train_trial(again, asked, slowly(clock, killed))
    # The time of a search that goes on is another.
    outcome = train_trial(again, replace(asked, deadline=clock.now + 1000.0), slowly(clock))
    assert (outcome.status, outcome.scores) == ("done", whole.scores)
    assert len(whole.scores) == 6


@pytest.fixture
def poisoned(tmp_path, monkeypatch):
    """Install a head whose logits become NaN."""
    (tmp_path / "poison.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Poison(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * torch.tensor(float('nan'))\n"
        "def head(num_features, num_classes):\n    return Poison(num_features, num_classes)\n"
    )
    info = tmp_path / "poison-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: poison\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[autoft.heads]\npoison = poison:head\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.installed.cache_clear()
    yield
    plugins.installed.cache_clear()
    sys.modules.pop("poison", None)


@pytest.mark.parametrize("strategy", ["head_only", "full"])
def test_T08_a_loss_that_is_not_finite_ends_the_trial_cleanly(  # noqa: N802 - the row's id
    setup, poisoned, strategy
) -> None:
    outcome = train_trial(setup, job(strategy=strategy, head="poison"), go_on)
    assert outcome.status == "failed"
    assert "non_finite_loss" in outcome.error
    assert outcome.score is None
    assert (setup.folder / "trials/0000/done.json").exists()


def test_scratch_starts_from_random_weights(setup) -> None:
    train_trial(setup, job(strategy="scratch", epochs=1, train={**TUNE, "lr": 2e-5}), go_on)
    network, _ = load_trial(setup, TrialResult(0, job(strategy="scratch").config, "done"))
    original = build(setup.sources["test_resnet.fixed"]).module
    near = torch.corrcoef(
        torch.stack(
            [network.backbone.conv1[0].weight.flatten(), original.conv1[0].weight.flatten()]
        )
    )[0, 1]
    assert (
        abs(float(near.detach())) < 0.5
    )  # a learning rate of 2e-5 moves nothing: the start was another


def test_fitting_a_head_separates_what_can_be_separated() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 16, generator=generator) + 5 * torch.eye(16)[labels]
    head = torch.nn.Linear(16, 3)
    torch.nn.init.zeros_(head.weight)
    fit_head(head, features, labels, probing(), loss=PLAIN, seed=0)
    assert score("accuracy", labels.numpy(), head(features).argmax(1).numpy()) > 0.97


def test_a_head_listens_to_images_by_their_weights() -> None:
    features = torch.tensor([[5.0], [-5.0]]).repeat(50, 1)
    labels = torch.arange(100) // 2 % 2  # half of each kind is in each class
    weights = torch.where(torch.arange(100) % 2 == labels, 1.8, 0.2)
    head = torch.nn.Linear(1, 2)
    fit_head(head, features, labels, probing(), loss=PLAIN, seed=0, weights=weights)
    with torch.no_grad():
        share = head(torch.tensor([[5.0], [-5.0]])).softmax(1)
    assert share[0, 0] > 0.75
    assert share[1, 1] > 0.75


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_plain_labels_is_the_usual_one(smoothing) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 7, generator=generator) * 4
    labels = torch.randint(7, (64,), generator=generator)
    usual = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    one_hot = torch.nn.functional.one_hot(labels, 7).float()
    loss = weighted_cross_entropy(logits, one_hot, torch.ones(64), smoothing)
    assert abs(float(loss - usual)) <= 1e-6
    twice = weighted_cross_entropy(logits, one_hot, torch.full((64,), 2.0), smoothing)
    assert float(twice) == pytest.approx(2 * float(usual), rel=1e-6)


def test_images_count_alike_unless_weights_are_given() -> None:
    rows = np.arange(6)
    plain = Images(rows, rows % 2)
    assert plain.loss_weights().tolist() == [1.0] * 6
    assert plain.folds.tolist() == [0] * 6
    part = Images(rows, rows % 2, np.array([0, 1, 2, 3, 0, 0], np.float32), np.arange(6) % 3)
    assert part.loss_weights().dtype == np.float32
    assert part.loss_weights().tolist() == [0, 1, 2, 3, 0, 0]
    half = part.take(part.labels == 1)
    assert (half.rows.tolist(), half.folds.tolist()) == ([1, 3, 5], [1, 0, 2])
    assert half.loss_weights() == pytest.approx([0.75, 2.25, 0])
    with pytest.raises(DataError, match="weights of all 2 images"):
        part.take([0, 4]).loss_weights()


@pytest.mark.parametrize(
    ("images", "batch", "steps"), [(64, 32, 2), (65, 32, 2), (66, 32, 3), (2, 32, 1)]
)
def test_steps_of_an_epoch_match_the_batches(images, batch, steps) -> None:
    assert steps_per_epoch(images, batch) == steps


def test_cached_features_belong_to_their_images_alone(setup, photos, tmp_path) -> None:
    from PIL import Image, ImageOps

    other = tmp_path / "inverted"
    for path in sorted(photos.rglob("*.png")):
        target = other / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.invert(Image.open(path)).save(target)
    store = read(other).store
    backbone = build(setup.sources["test_resnet.fixed"])
    pre = setup.preprocess(backbone)

    def features(given: Setup) -> np.ndarray:
        return pooled_features(backbone.module, given, given.validation, pre, Precision())

    first = features(setup)
    assert not np.allclose(first, features(replace(setup, store=store)))
    assert np.array_equal(first, features(setup))


class Activated(torch.nn.Module):
    """A network that looks the same whatever its activation is."""

    def __init__(self, activation) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.activation = activation

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.activation(self.convolution(images)).mean(dim=(2, 3))


def test_equal_weights_with_another_activation_have_features_of_their_own(setup) -> None:
    pre = setup.preprocess(build(setup.sources["test_resnet.fixed"]))
    first, other = Activated(torch.relu), Activated(torch.tanh)
    assert repr(first) == repr(other)
    found = [
        pooled_features(module, setup, setup.validation, pre, Precision())
        for module in (first, other)
    ]
    assert not np.allclose(*found)


def test_a_fingerprint_is_the_same_for_the_same_network(setup) -> None:
    module = Activated(torch.relu).train()
    module.convolution.eval()
    first = fingerprint(module, setup)
    assert [each.training for each in module.modules()] == [True, False]
    again = Activated(torch.relu).to(memory_format=torch.channels_last)
    torch.set_num_threads(2)
    assert fingerprint(again, setup) == first
    torch.set_num_threads(1)
    with torch.no_grad():
        again.convolution.bias[0] += 1e-6
    assert fingerprint(again, setup) != first


def test_a_damaged_checkpoint_is_a_fresh_start(tmp_path) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"torn")
    net = torch.nn.Linear(2, 2)
    state, average = checkpoint.load_last(tmp_path, net, torch.optim.AdamW(net.parameters()))
    assert (state, average) == (checkpoint.State(), {})


@pytest.mark.shared
@pytest.mark.parametrize("name", ["mobilenetv2_100.in1k", "mobilenetv1_100.in1k"])
def test_real_weights_stay_bit_equal_where_frozen(setup, shared_root, name) -> None:
    sources, _ = in_folder(shared_root / "weights")
    setup = replace(setup, sources=sources)
    config = TrialConfig(
        Part(name), Part("freeze", {"depth": 0.5, "bottom": 1.0}), Part("linear"), TUNE, seed=1
    )
    work = TrialJob(0, config, 1, time.time() + 300, Precision(bf16=True, channels_last=True))
    outcome = train_trial(setup, work, go_on)
    assert outcome.status == "done"
    network, _ = load_trial(setup, TrialResult(0, config, "done"))
    original = build(sources[name]).module.state_dict()
    stages = network._stage_of_parameter
    half = round(0.5 * network.num_stages)
    moved = {
        n for n, t in network.backbone.state_dict().items() if not torch.equal(t, original[n])
    }
    assert {stages[n] for n in moved if n in stages} == set(range(half, network.num_stages))
    assert not [n for n in moved if "running" in n]  # statistics stay in the thawed stages, too
    load_weights(network, setup.folder / "trials/0000/scored.safetensors")
