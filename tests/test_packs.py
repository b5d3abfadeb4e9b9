"""Heads that train together: as if each were alone, whatever the others are, do or suffer."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoft.heads.classifiers import cosine, linear, mlp, multilayer, norm_linear
from autoft.training import probe
from autoft.training.losses import make_loss
from autoft.training.packs import Round, best_pack_size, size, train_pack
from autoft.training.packs.criteria import Criteria
from autoft.training.packs.forms import form_of
from autoft.training.packs.size import most_in_memory
from autoft.training.probe import NonFiniteLoss, fit_head
from autoft.training.recipe import BALANCES, Recipe, probing
from autoft.training.ridge import PENALTIES, ridge

F, C, N = 20, 4, 130


@pytest.fixture(autouse=True)
def _short_and_on_one_thread(monkeypatch):
    """Train for 150 steps, one by one and together."""
    before = torch.get_num_threads()
    monkeypatch.setattr(probe, "MIN_STEPS", 150)
    monkeypatch.setattr(functional, "dropout", dropped)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dropped(given: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
    """Draw as torch does on most processors; on some, MKL draws others."""
    if not training or p == 0:
        return given
    return given * (torch.rand(given.shape, dtype=torch.float64) < 1 - p) / (1 - p)


def data(features: int = F, classes: int = C) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, labels of uneven classes and weights of mean 1 of overlapping classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (N,), generator=generator)
    labels[:40] = 0
    centres = 0.7 * torch.randn(classes, features, generator=generator)
    weights = 0.2 + torch.rand(N, generator=generator)
    noise = torch.randn(N, features, generator=generator)
    return noise + centres[labels], labels, weights / weights.mean()


FEATURES, LABELS, WEIGHTS = data()
COUNTS = torch.bincount(LABELS, WEIGHTS, minlength=C)


def alone(head: nn.Module, recipe: Recipe, seed: int = 0, **more) -> nn.Module:
    """Train `head` as it is done one by one."""
    torch.manual_seed(7)
    loss = make_loss(recipe.balance, recipe.smoothing, COUNTS)
    fit_head(head, FEATURES, LABELS, recipe, loss=loss, seed=seed, weights=WEIGHTS, **more)
    return head


def together(heads, recipes, **more):
    torch.manual_seed(7)
    given = {"counts": COUNTS, "seed": 0, "weights": WEIGHTS, "size": 32, **more}
    return train_pack(heads, FEATURES, LABELS, recipes, **given)


def apart(one: nn.Module, other: nn.Module) -> float:
    """Return the largest difference of weights and statistics."""
    mine, theirs = one.state_dict(), other.state_dict()
    return max(float((value - theirs[name]).abs().max()) for name, value in mine.items())


def all_heads() -> list[nn.Module]:
    torch.manual_seed(3)
    return [
        linear(F, C),
        norm_linear(F, C),
        cosine(F, C),
        mlp(F, C, hidden=32),
        multilayer(F, C),
        norm_linear(F, C, dropout=0.4),
        mlp(F, C, hidden=32, dropout=0.0),
        mlp(F, C, hidden=24, dropout=0.5),
        cosine(F, C, scale=8.0),
        nn.Linear(F, C, bias=False),
        nn.Sequential(nn.Linear(F, 12, bias=False), nn.ReLU(inplace=True), nn.Linear(12, C)),
    ]


@pytest.mark.parametrize("balance", BALANCES)
def test_heads_of_all_kinds_end_as_if_each_had_been_alone(balance) -> None:
    heads = all_heads()
    recipes = [
        Recipe(
            head_lr=(1e-4, 1e-3, 8e-3)[index % 3],
            weight_decay=(0.3, 1e-3)[index % 2],
            smoothing=(0.0, 0.1)[index // 2 % 2],
            balance=balance,
            pool="native",
            schedule=("cosine", "wsd")[index // 3 % 2],
        )
        for index in range(len(heads))
    ]
    packed = copy.deepcopy(heads)
    outcomes = together(packed, recipes)
    assert {each.together for each in outcomes} == {len(heads)}
    for start, recipe, head in zip(copy.deepcopy(heads), recipes, packed, strict=True):
        reference = alone(copy.deepcopy(start), recipe)
        assert apart(reference, head) <= 1e-4
        assert apart(start, head) > 1e-3


def test_losses_and_rates_mix_in_one_pack() -> None:
    recipes = [replace(probing(), balance=balance, smoothing=0.05) for balance in BALANCES]
    packed = [norm_linear(F, C) for _ in BALANCES]
    together(packed, recipes)
    for recipe, head in zip(recipes, packed, strict=True):
        assert apart(alone(norm_linear(F, C), recipe), head) <= 1e-4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_by_hand_are_those_of_the_losses(smoothing) -> None:
    logits = 3 * torch.randn(len(BALANCES), C, 16, generator=torch.Generator().manual_seed(1))
    labels, weights = LABELS[:16], WEIGHTS[:16]
    recipes = [replace(probing(), balance=name, smoothing=smoothing) for name in BALANCES]
    losses, slopes = Criteria(recipes, COUNTS, logits.device)(logits, labels, weights)
    targets = functional.one_hot(labels, C).float()
    for index, recipe in enumerate(recipes):
        own = logits[index].T.clone().requires_grad_()
        expected = make_loss(recipe.balance, smoothing, COUNTS)(own, targets, weights)
        expected.backward()
        torch.testing.assert_close(losses[index], expected.detach())
        torch.testing.assert_close(slopes[index].T, own.grad)


def test_a_head_that_fails_is_named_and_the_others_do_not_notice() -> None:
    # Decay by 1e10 a step soon leaves the numbers that there are.
    failing = probing(head_lr=1e10, weight_decay=1.0)
    recipes = [probing(), failing, probing(head_lr=1e-3, balance="focal")]
    for make in (linear, norm_linear, cosine, mlp):
        torch.manual_seed(0)
        start = [make(F, C) for _ in recipes]
        heads, fewer = copy.deepcopy(start), copy.deepcopy(start)
        outcomes = together(heads, recipes)
        together([fewer[0], fewer[2]], [recipes[0], recipes[2]])
        if make is not cosine:  # its directions lose their length before they are no numbers
            with pytest.raises(NonFiniteLoss) as failed:
                alone(start[1], recipes[1])
            assert outcomes[1].error == str(failed.value)
        assert re.fullmatch(r"non_finite_loss at step \d+ \(head_lr=1e\+10\)", outcomes[1].error)
        assert outcomes[1].rounds == 0
        for index in (0, 2):
            assert (outcomes[index].error, outcomes[index].rounds) == ("", 1)
            assert apart(heads[index], fewer[index]) <= 1e-5


def test_a_pack_in_which_all_fail_says_so_of_each() -> None:
    outcomes = together([linear(F, C) for _ in range(3)], [probing(head_lr=1e38)] * 3)
    assert all("non_finite_loss at step" in each.error for each in outcomes)


def test_heads_are_dropped_between_rounds_and_the_others_go_on() -> None:
    recipes = [probing(head_lr=rate) for rate in (1e-4, 1e-3, 3e-3, 1e-2)]
    heads = [mlp(F, C, hidden=16, dropout=0.0), linear(F, C), norm_linear(F, C), linear(F, C)]
    start, told = copy.deepcopy(heads), list[Round]()
    held_out = FEATURES[:30] + 0.1

    def halve(now: Round) -> list[bool]:
        told.append(now)
        for position, logits in zip(now.heads, now.logits, strict=True):
            twin = copy.deepcopy(heads[position]).eval()
            with torch.no_grad():
                torch.testing.assert_close(logits, twin(held_out), rtol=1e-4, atol=1e-4)
        best = sorted(now.losses)[: len(now.losses) // 2] if now.index < 3 else now.losses
        return [loss in best for loss in now.losses]

    outcomes = together(heads, recipes, rounds=4, held_out=held_out, after_round=halve)
    assert [len(now.heads) for now in told] == [4, 2, 1, 1]
    for position, (head, recipe) in enumerate(zip(start, recipes, strict=True)):
        finished = outcomes[position].rounds
        reference = alone(
            head, recipe, rounds=4, after_round=lambda index, _, last=finished: index < last
        )
        assert apart(reference, heads[position]) <= 1e-4
    assert sorted(each.rounds for each in outcomes) == [1, 1, 2, 4]
    assert all(each.seconds > 0 for each in outcomes)
    longest = max(outcomes, key=lambda each: each.rounds)
    assert longest.seconds == max(each.seconds for each in outcomes)


class Own(nn.Module):
    """A head that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(F, 8), nn.Linear(8, C)

    def forward(self, features: Tensor) -> Tensor:
        hidden = functional.dropout(self.first(features).sin(), 0.2, self.training)
        logits: Tensor = self.last(hidden)
        return logits


def test_heads_of_others_train_by_themselves_and_keep_their_places() -> None:
    torch.manual_seed(1)
    heads = [Own(), norm_linear(F, C), Own(), norm_linear(F, C, dropout=0.3)]
    recipes = [probing(head_lr=rate) for rate in (1e-3, 1e-2, 2e-3, 5e-3)]
    packed, told = copy.deepcopy(heads), list[Round]()

    def watch(now: Round) -> list[bool]:
        told.append(now)
        return [True] * len(now.heads)

    outcomes = together(packed, recipes, rounds=2, after_round=watch, held_out=FEATURES[:5])
    assert [each.together for each in outcomes] == [1, 2, 1, 2]
    assert sorted((now.index, now.heads) for now in told) == [
        (1, (0,)),
        (1, (1, 3)),
        (1, (2,)),
        (2, (0,)),
        (2, (1, 3)),
        (2, (2,)),
    ]
    for start, recipe, head in zip(heads, recipes, packed, strict=True):
        assert apart(alone(start, recipe), head) <= 1e-4


def test_a_head_of_others_that_fails_is_named_and_may_be_stopped() -> None:
    outcomes = together([Own(), Own()], [probing(head_lr=1e38), probing()])
    assert "head_lr=1e+38" in outcomes[0].error
    assert outcomes[1].error == ""
    (stopped,) = together([Own()], [probing()], rounds=5, after_round=lambda _: [False])
    assert (stopped.rounds, stopped.error) == (1, "")


def test_batch_sizes_and_the_size_of_packs_divide_heads_without_changing_them() -> None:
    recipes = [replace(probing(), batch_size=batch) for batch in (64, 16, 64, 16, 64, 500)]
    heads = [norm_linear(F, C, dropout=0.1 * index) for index in range(len(recipes))]
    outcomes = together(heads, recipes, size=2)
    assert [each.together for each in outcomes].count(2) == 4
    assert outcomes[5].together == 1
    for index, recipe in enumerate(recipes):
        reference = alone(norm_linear(F, C, dropout=0.1 * index), recipe)
        assert apart(reference, heads[index]) <= 1e-4


def test_random_numbers_stay_where_they_were() -> None:
    heads = [Own(), norm_linear(F, C, dropout=0.2), norm_linear(F, C, dropout=0.2)]
    before = torch.get_rng_state()
    size._seconds.cache_clear()
    for most in (4, None):
        train_pack(heads, FEATURES, LABELS, [probing()] * 3, counts=COUNTS, seed=0, size=most)
        assert torch.equal(torch.get_rng_state(), before)


class Noisy(nn.Module):
    """A cosine that is noisy in training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(C, F)), nn.Parameter(torch.tensor(4.0))

    def forward(self, features: Tensor) -> Tensor:
        noisy = features + torch.randn_like(features) if self.training else features
        directions = functional.normalize(self.weight, dim=1)
        return self.scale * functional.normalize(noisy, dim=1) @ directions.T


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _frozen() -> nn.Module:
    head = mlp(F, C)
    next(head.parameters()).requires_grad_(False)
    return head


def _hooked() -> nn.Module:
    head = linear(F, C)
    head.register_forward_hook(lambda module, given, output: 2 * output)
    return head


@pytest.mark.parametrize(
    "head",
    [
        Noisy(),
        Doubled(F, C),
        _frozen(),
        _hooked(),
        linear(F, C).double(),
        nn.utils.parametrizations.weight_norm(nn.Linear(F, C)),
        nn.Sequential(nn.BatchNorm1d(F), nn.Linear(F, C)),
        nn.Sequential(nn.BatchNorm1d(F, affine=False, track_running_stats=False), nn.Linear(F, C)),
        nn.Sequential(
            nn.Dropout(0.1), nn.Linear(F, 9), nn.GELU(), nn.Dropout(0.1), nn.Linear(9, C)
        ),
        nn.Sequential(nn.Dropout(1.0), nn.Linear(F, C)),
        nn.Sequential(nn.Linear(F, 9), nn.Linear(9, C)),
        nn.Sequential(nn.Linear(F, 9), nn.LayerNorm(9), nn.Linear(9, C)),
        nn.Sequential(nn.Linear(F, C), nn.ReLU()),
        nn.Sequential(),
        nn.Identity(),
        Own(),
    ],
    ids=lambda head: type(head).__name__,
)
def test_heads_that_do_more_than_is_known_are_not_stacked(head) -> None:
    assert form_of(head, F) is None


def test_asking_a_head_what_it_is_leaves_it_as_it_was() -> None:
    for head in all_heads():
        before = copy.deepcopy(head.state_dict())
        assert form_of(head, F) is not None
        assert head.training
        assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_statistics_that_were_begun_are_gone_on_with() -> None:
    begun = norm_linear(F, C)
    begun(FEATURES + 5)
    heads = [begun, norm_linear(F, C)]
    start = copy.deepcopy(heads)
    recipe = probing()
    together(heads, [recipe, recipe])
    for before, after in zip(start, heads, strict=True):
        assert apart(alone(before, recipe), after) <= 1e-4


def test_as_many_recipes_as_heads_are_wanted() -> None:
    with pytest.raises(ValueError, match="2 heads and 1 recipes"):
        together([linear(F, C), linear(F, C)], [probing()])


def test_the_size_of_a_pack_is_the_fastest_and_may_be_one(monkeypatch) -> None:
    seconds = {1: 3.0, 8: 2.0, 32: 1.0, 128: 5.0}
    monkeypatch.setattr(size, "_seconds", lambda count, *_: seconds[count])
    device = torch.device("cpu")
    assert best_pack_size(F, C, 64, device) == 32
    assert best_pack_size(F, C, 64, device, most=12) == 12
    assert best_pack_size(F, C, 64, device, most=5) == 5
    assert best_pack_size(F, C, 64, device, most=1) == 1
    seconds[1] = 0.5
    assert best_pack_size(F, C, 64, device) == 1


def test_what_was_timed_is_not_timed_again(monkeypatch) -> None:
    chosen = best_pack_size(F, C, 16, torch.device("cpu"), most=8)
    assert chosen in (1, 8)
    monkeypatch.setattr(size, "_together", None)
    assert best_pack_size(F, C, 16, torch.device("cpu"), most=8) == chosen


def test_large_heads_share_the_memory_of_a_pack(monkeypatch) -> None:
    forms = [form_of(head, F) for head in (linear(F, C), mlp(F, C, hidden=50))]
    weights = 50 * F + 50 + C * 50 + C
    monkeypatch.setattr(size, "MEMORY", 3 * 4 * 4 * weights)
    assert most_in_memory(forms) == 3
    assert most_in_memory(forms[:1]) == 3 * weights // (C * F + C)
    monkeypatch.setattr(size, "MEMORY", 0)
    assert most_in_memory(forms) == 1
    monkeypatch.setattr(size, "_seconds", lambda *_: pytest.fail("nothing to choose from"))
    outcomes = together([mlp(F, C) for _ in range(2)], [probing()] * 2, size=None)
    assert [each.together for each in outcomes] == [1, 1]


def test_whole_numbers_will_do_in_a_recipe() -> None:
    recipe = probing(head_lr=1, weight_decay=0, smoothing=0)
    heads = [norm_linear(F, C) for _ in range(2)]
    together(heads, [recipe] * 2)
    reference = alone(norm_linear(F, C), recipe)
    assert apart(reference, heads[1]) <= 1e-3  # of weights of about 20


def test_a_pack_of_unsaid_size_trains_all_heads() -> None:
    heads = [linear(F, C) for _ in range(3)]
    outcomes = together(heads, [probing()] * 3, size=None)
    assert all(each.rounds == 1 for each in outcomes)
    assert apart(alone(linear(F, C), probing()), heads[2]) <= 1e-4


def test_ridge_takes_the_penalty_that_left_out_images_ask_for() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    signal = np.eye(3)[labels] + 0.8 * rng.normal(size=(60, 3))
    noise = rng.normal(size=(60, 200))  # more features than images
    known = np.hstack([3 * signal, noise]).astype(np.float32)
    asked_labels = np.arange(300) % 3
    asked = np.hstack(
        [3 * (np.eye(3)[asked_labels] + 0.8 * rng.normal(size=(300, 3))), np.zeros((300, 200))]
    ).astype(np.float32)
    found = ridge(known, labels, asked)
    assert found.shape == (300, 3)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    assert (found.argmax(axis=1) == asked_labels).mean() > 0.6


def test_ridge_leaves_columns_for_classes_that_it_never_saw_and_heeds_weights() -> None:
    features = np.array([[0.0], [1.0]] * 20, np.float32)
    labels = np.array([1, 3] * 20)
    found = ridge(features, labels, features[:2])
    assert found.shape == (2, 4)
    assert found.argmax(axis=1).tolist() == [1, 3]
    assert found[:, [0, 2]].max() == 0
    assert ridge(features, np.full(40, 2), features[:1]).tolist() == [[0, 0, 1]]
    mixed = np.zeros((40, 1), np.float32)
    weights = np.where(labels == 3, 1.8, 0.2).astype(np.float32)
    assert ridge(mixed, labels, mixed[:1], weights)[0, 3] > 0.8


@pytest.mark.parametrize("shape", [(90, 30), (40, 60), (50, 50)])
def test_ridge_agrees_with_scikit_learn(shape) -> None:
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    count, width = shape
    labels = np.arange(count) % 3
    known = (rng.normal(size=(3, width))[labels] + 2 * rng.normal(size=shape)).astype(np.float32)
    known[:, 1], known[:, 2] = known[:, 0], 7.0  # twice the same, and always the same
    asked = rng.normal(size=(9, width)).astype(np.float32)
    weights = np.where(np.arange(count) % 7 == 0, 0, 0.2 + rng.random(count)).astype(np.float32)
    scaler = StandardScaler().fit(known)
    model = RidgeCV(alphas=[each * count for each in PENALTIES])
    model.fit(scaler.transform(known), np.eye(3)[labels], sample_weight=weights)
    scores = np.clip(model.predict(scaler.transform(asked)), 1e-4, None)
    expected = scores / scores.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(ridge(known, labels, asked, weights), expected, atol=1e-5)


def test_ridge_refuses_features_that_are_no_numbers() -> None:
    features = np.array([[0.0], [np.nan]] * 3, np.float32)
    with pytest.raises(ValueError, match="NaN"):
        ridge(features, np.array([0, 1] * 3), features)


@pytest.mark.shared
def test_real_features_give_the_same_heads(shared_root) -> None:
    import timm
    from PIL import Image
    from timm.models import load_checkpoint

    backbone = timm.create_model("mobilenetv2_100", num_classes=0)
    path = next((shared_root / "weights" / "mobilenetv2_100.in1k").glob("*.safetensors"))
    load_checkpoint(backbone, str(path), strict=False)
    paths = sorted((shared_root / "data" / "hymenoptera").rglob("*.jpg"))[::4][:90]
    names = sorted({each.parent.name for each in paths})
    labels = torch.tensor([names.index(each.parent.name) for each in paths])
    pixels = [np.asarray(Image.open(each).convert("RGB").resize((96, 96))) for each in paths]
    with torch.inference_mode():
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
        features = torch.cat([backbone.eval()(each) for each in images.split(30)]).clone()
    counts = torch.bincount(labels)
    width, classes = features.shape[1], len(names)
    torch.manual_seed(0)
    heads = [linear(width, classes), norm_linear(width, classes), cosine(width, classes)]
    heads += [mlp(width, classes, hidden=64, dropout=0.0), multilayer(width, classes)]
    recipes = [probing(head_lr=rate) for rate in (1e-2, 3e-3, 1e-3, 1e-3, 1e-3)]
    packed = copy.deepcopy(heads)
    torch.manual_seed(7)
    train_pack(packed, features, labels, recipes, counts=counts, seed=0, size=8)
    for head, recipe, other in zip(heads, recipes, packed, strict=True):
        torch.manual_seed(7)
        loss = make_loss(recipe.balance, recipe.smoothing, counts)
        fit_head(head, features, labels, recipe, loss=loss, seed=0)
        assert apart(head, other) <= 1e-4
