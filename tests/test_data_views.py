from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.transforms import v2

from autoft.data import augment as augmenting
from autoft.data.augment import AUGMENTS, JITTER, MIXES, jitter, mixed, random_views
from autoft.data.pixels.decode import normalise
from autoft.data.views import evaluation_batches, training_batches
from autoft.errors import UsageError
from autoft.space import read_signature
from autoft.training import recipe
from autoft.values import Preprocess

SIDE, COUNT, CLASSES = 40, 21, 21
PRE = Preprocess(image_size=32, resize=SIDE)
PLAIN = Preprocess(32, SIDE, mean=(0, 0, 0), std=(1, 1, 1))  # leaves pixels / 255
ROWS = np.arange(COUNT)
ONES = np.ones(COUNT, np.float32)
GREEN = [20.0, 200.0, 60.0]


@dataclass(frozen=True)
class InMemory:
    """A store as far as views need one."""

    pixels: np.ndarray

    @property
    def resize(self) -> int:
        return self.pixels.shape[1]

    def read(self, rows):
        return self.pixels[rows]


@pytest.fixture
def store():
    rng = np.random.default_rng(0)
    return InMemory(rng.integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8))


def batches_of(store, augment="strong", mix="none", **changed):
    given = {
        "rows": ROWS,
        "labels": ROWS,
        "pre": PRE,
        "num_classes": CLASSES,
        "weights": ONES,
        "batch_size": 4,
        "seed": 1,
        "epoch": 0,
    }
    given |= changed
    return training_batches(store, augment=augment, mix=mix, **given)


def epoch(store, augment="strong", mix="none", **changed):
    return list(batches_of(store, augment, mix, **changed))


def test_evaluation_equals_the_decoder_bit_for_bit(store):
    rows = np.array([5, 2, 20, 20, 0])
    batches = list(evaluation_batches(store, rows, PRE, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert all(b.is_contiguous(memory_format=torch.channels_last) for b in batches)
    together = torch.cat(batches)
    assert together.dtype == torch.float32
    np.testing.assert_array_equal(together.numpy(), normalise(store.read(rows), PRE))
    mirrored = torch.cat(list(evaluation_batches(store, rows, PRE, batch_size=2, flip=True)))
    assert torch.equal(mirrored, together.flip(-1))


def test_evaluation_equals_the_decoder_for_every_value_and_usual_normalisation():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    for mean, std in (
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ):
        pre = Preprocess(16, 16, mean, std)
        [batch] = evaluation_batches(InMemory(every), np.array([0]), pre, batch_size=1)
        np.testing.assert_array_equal(batch.numpy(), normalise(every, pre))


def test_without_augmentation_training_sees_what_scoring_sees(store):
    batches = epoch(store, "none", batch_size=7)
    images = torch.cat([batch.images for batch in batches])
    rows = torch.cat([batch.targets for batch in batches]).argmax(1).numpy()
    assert sorted(rows) == list(ROWS)
    np.testing.assert_array_equal(images.numpy(), normalise(store.read(rows), PRE))


@pytest.mark.parametrize(
    ("augment", "mix"), [(a, "none") for a in AUGMENTS] + [("none", m) for m in MIXES[1:]]
)
def test_seed_and_epoch_alone_decide_the_batches(store, augment, mix):
    generators = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = epoch(store, augment, mix)
    for _ in range(2):  # the second time beside a consumer that draws, and one batch in
        again = batches_of(store, augment, mix)
        for batch, same in zip(first, again, strict=True):
            assert batch.images.shape == (4, 3, 32, 32)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.images.dtype == batch.targets.dtype == batch.weights.dtype
            assert torch.equal(batch.images, same.images)
            assert torch.equal(batch.targets, same.targets)
            assert torch.equal(batch.weights, same.weights)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1])
    for other in (epoch(store, augment, mix, seed=2), epoch(store, augment, mix, epoch=1)):
        assert not torch.equal(other[0].images, first[0].images)
        assert not torch.equal(other[0].targets, first[0].targets)


def test_batches_of_an_epoch_are_augmented_differently():
    same = InMemory(np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8))
    zeros = np.zeros(COUNT, np.int64)
    images = torch.cat([b.images for b in epoch(same, "shift_flip", rows=zeros, batch_size=7)])
    assert len(torch.unique(images.flatten(1), dim=0)) > 15


def test_a_last_batch_of_one_image_is_dropped(store):
    assert [len(batch) for batch in epoch(store)] == [4] * 5
    assert [len(batch) for batch in epoch(store, batch_size=19)] == [19, 2]


# --- where the image is cut ---------------------------------------------------------------------


def positions(augment, count=400):
    """Coordinates in -1..1 that each output pixel was taken from: red = x, green = y."""
    ramp = np.broadcast_to(np.linspace(0, 240, SIDE).round().astype(np.uint8), (SIDE, SIDE))
    pixels = np.stack([ramp, ramp.T, ramp], axis=2)
    rows = np.arange(count)
    batches = training_batches(
        InMemory(np.repeat(pixels[None], count, axis=0)),
        rows,
        rows,
        PLAIN,
        num_classes=count,
        weights=np.ones(count, np.float32),
        augment=augment,
        mix="none",
        batch_size=count,
        seed=0,
        epoch=0,
    )
    return next(batches).images * 255 / 120 - 1


def test_crops_cover_the_stated_area_and_ratio_of_the_whole_square():
    taken = positions("crop")
    width = (taken[:, 0, 16, -1] - taken[:, 0, 16, 0]) / 2 * 32 / 31 * (SIDE - 1) / SIDE
    height = (taken[:, 1, -1, 16] - taken[:, 1, 0, 16]) / 2 * 32 / 31 * (SIDE - 1) / SIDE
    area = width * height
    assert 0.42 < area.min() < 0.55
    assert area.max() > 0.85
    ratio = width / height
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.43
    assert taken[:, 0].min() < -0.95
    assert taken[:, 0].max() > 0.95


def test_shifts_cut_whole_pixels_everywhere():
    pixels = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(1, SIDE, SIDE, 1)
    pixels = np.concatenate([pixels & 255, pixels >> 8, pixels & 255], axis=3).astype(np.uint8)
    rows = np.zeros(300, np.int64)
    [batch] = epoch(
        InMemory(pixels), "shift_flip", rows=rows, labels=rows, pre=PLAIN, batch_size=300,
        weights=np.ones(300, np.float32),
    )  # fmt: skip
    values = (batch.images * 255).round().to(torch.int64)
    place = values[:, 0] + 256 * values[:, 1]
    step = place[:, 0, 1] - place[:, 0, 0]
    assert set(step.tolist()) == {1, -1}
    corners = torch.minimum(place[:, 0, 0], place[:, 0, -1])
    assert set((corners // SIDE).tolist()) == set(range(SIDE - 32 + 1))
    assert set((corners % SIDE).tolist()) == set(range(SIDE - 32 + 1))
    rising = corners[:, None, None] + SIDE * torch.arange(32)[:, None] + torch.arange(32)
    assert torch.equal(torch.where(step[:, None, None] > 0, place, place.flip(-1)), rising)


def test_a_crop_is_resized_as_torchvision_resizes_it():
    pixels = torch.from_numpy(
        np.random.default_rng(3).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    )
    boxes = np.array([[3, 5, 30, 20], [0, 1, 40, 37]])
    cut = list(augmenting._cut(pixels, boxes, np.array([False, True]), 32))
    for image, (top, left, height, width), made in zip(pixels, boxes, cut, strict=True):
        planes = image.permute(2, 0, 1).contiguous()
        expected = v2.functional.resized_crop(planes, top, left, height, width, [32, 32])
        expected = expected.flip(-1) if top == 0 else expected
        difference = made.permute(2, 0, 1).int() - expected.int()
        assert difference.abs().max() <= 1


def test_only_flipping_augmentations_mirror_and_then_half_the_images():
    def mirrored(augment):
        taken = positions(augment)
        return (taken[:, 0, 16, -1] < taken[:, 0, 16, 0]).float().mean().item()

    for augment in recipe.UPRIGHT:
        assert mirrored(augment) == 0
    for augment in ("shift_flip", "crop_flip", "strong"):
        assert 0.4 < mirrored(augment) < 0.6


# --- colours and more ---------------------------------------------------------------------------


def test_strong_changes_colours_within_the_range_of_pixels():
    grey = InMemory(np.full((COUNT, SIDE, SIDE, 3), 128, np.uint8))
    [batch] = epoch(grey, "strong", pre=PLAIN, batch_size=COUNT)
    level = batch.images[:, 0, 0, 0] / (128 / 255)
    assert level.min() < 0.85
    assert level.max() > 1.15
    assert level.sub(1).abs().max() <= JITTER + 1e-5
    bright = InMemory(np.full((COUNT, SIDE, SIDE, 3), 250, np.uint8))
    [batch] = epoch(bright, "strong", pre=PLAIN, batch_size=COUNT)
    assert batch.images.max() == 1


def test_jitter_is_brightness_then_contrast_then_saturation():
    image = torch.rand(5, 4, 3, generator=torch.Generator().manual_seed(0)) * 50 + 100

    def luma(x):
        return (x * torch.tensor([0.299, 0.587, 0.114])).sum(-1, keepdim=True)

    for brightness, contrast, saturation in np.random.default_rng(7).uniform(0.7, 1.3, (4, 3)):
        x = image * brightness
        x = luma(x).mean() * (1 - contrast) + x * contrast
        x = luma(x) * (1 - saturation) + x * saturation
        made = jitter(image.clone(), brightness, contrast, saturation)
        torch.testing.assert_close(made, x.clamp(0, 255))


OPERATIONS = [
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
    "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
]  # fmt: skip


@pytest.mark.parametrize("level", [-1.0, -0.5, 0.0, 0.3, 1.0])
def test_trivial_does_what_torchvision_does_at_the_same_strength(level):
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (3, 32, 32), dtype=np.uint8))
    theirs = v2.TrivialAugmentWide()
    assert sorted(OPERATIONS) == sorted(theirs._AUGMENTATION_SPACE)
    for name, operation in zip(OPERATIONS, augmenting._OPERATIONS, strict=True):
        if name.startswith("Translate"):
            continue  # in proportion to the image, see below
        strengths, signed = theirs._AUGMENTATION_SPACE[name]
        bins = strengths(31, 32, 32)
        strength = 0.0 if bins is None else float(bins[round(abs(level) * 30)])
        expected = theirs._apply_image_or_video_transform(
            image,
            name,
            -strength if signed and level < 0 else strength,
            v2.InterpolationMode.BILINEAR,
            {torch.Tensor: GREEN},
        )
        made = operation(image, level, GREEN)
        assert made.dtype == torch.uint8, name
        assert (made.int() - expected.int()).abs().max() <= 1, name


def test_trivial_shifts_by_a_seventh_of_the_side_at_most():
    image = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (3, 56, 56), dtype=np.uint8)
    )
    right = augmenting._OPERATIONS[OPERATIONS.index("TranslateX")](image, 1.0, GREEN)
    assert torch.equal(right[:, :, 8:], image[:, :, :-8])
    assert (right[:, :, :8] == torch.tensor(GREEN)[:, None, None]).all()
    up = augmenting._OPERATIONS[OPERATIONS.index("TranslateY")](image, -1.0, GREEN)
    assert torch.equal(up[:, :-8], image[:, 8:])


def test_trivial_uses_every_operation_in_both_directions_and_fills():
    rng = np.random.default_rng(0)
    images = (torch.zeros(32, 32, 3, dtype=torch.uint8) for _ in range(500))
    used = set()
    whole = augmenting._OPERATIONS

    def noted(index):
        def operation(image, level, fill):
            used.add((index, level > 0, level < 0))
            return whole[index](image, level, fill)

        return operation

    spied = tuple(noted(index) for index in range(len(whole)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmenting, "_OPERATIONS", spied)
        made = torch.stack(list(augmenting._trivial(images, 500, rng, GREEN)))
    assert {(index, True, False) for index in range(14)} <= used
    assert {(index, False, True) for index in range(14)} <= used
    corners = {tuple(image[0, -1].tolist()) for image in made}
    assert (20, 200, 60) in corners


# --- mixtures, targets and weights --------------------------------------------------------------


def test_targets_are_one_hot_and_weights_follow_their_images(store):
    weights = np.linspace(0, 2, COUNT, dtype=np.float32)
    for batch in epoch(store, "none", weights=weights):
        rows = batch.targets.argmax(1)
        assert torch.equal(batch.targets, functional.one_hot(rows, CLASSES).float())
        np.testing.assert_array_equal(batch.weights.numpy(), weights[rows.numpy()])


@pytest.mark.parametrize("mix", ["mixup", "manifold", "cutmix"])
def test_a_mixture_holds_the_share_of_each_image_that_its_target_says(mix):
    """Image i is all of the value 10 i: its target can be read off the pixels."""
    flat = InMemory(
        np.repeat(np.arange(COUNT, dtype=np.uint8)[:, None] * 10, SIDE * SIDE * 3, axis=1).reshape(
            COUNT, SIDE, SIDE, 3
        )
    )
    halved = 0
    for number in range(30):
        for batch in epoch(flat, "none", mix, pre=PLAIN, epoch=number):
            worth = batch.targets @ (torch.arange(CLASSES) * 10 / 255).to(torch.float32)
            torch.testing.assert_close(batch.images.mean((1, 2, 3)), worth, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(batch.targets.sum(1), torch.ones(4))
            torch.testing.assert_close(batch.weights, torch.ones(4))
            halved += int(((batch.targets > 0.2).sum(1) == 2).sum())
    assert halved > 20


def test_cutmix_pastes_one_box_and_mixup_blends_everywhere():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 32, 32, 3).clone()
    targets = torch.eye(4)
    seen = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cut, _, _ = mixed(images.clone(), targets, torch.ones(4), "cutmix", rng)
        assert set(cut.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
        for index, image in enumerate(cut):
            pasted = (image[..., 0] != index).nonzero()
            if len(pasted):
                height, width = (pasted.max(0).values - pasted.min(0).values + 1).tolist()
                assert height * width == len(pasted)
                seen.add((height, width))
        rng = np.random.default_rng(seed)
        blend, _, _ = mixed(images.clone(), targets, torch.ones(4), "mixup", rng)
        assert all(len(image.unique()) == 1 for image in blend)
    assert len(seen) > 10


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_the_loss_of_a_mixture_is_that_of_both_labels_each_with_its_weight(mix):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 8, 8, 3, generator=generator)
    weights = torch.tensor([0.0, 2.0, 1.0, 0.5, 0.0, 3.0])
    logits = torch.randn(6, 6, generator=generator)
    rng = np.random.default_rng(5)
    _, targets, scales = mixed(images.clone(), torch.eye(6), weights, mix, rng)
    _, shares, _ = mixed(
        images.clone(), torch.eye(6), torch.ones(6), mix, np.random.default_rng(5)
    )
    losses = -logits.log_softmax(1)
    by_label = (shares * weights * losses).sum(1)
    torch.testing.assert_close(scales * (targets * losses).sum(1), by_label)
    assert not scales.isnan().any()
    assert not targets.isnan().any()


# --- threads and errors -------------------------------------------------------------------------


def test_an_abandoned_epoch_leaves_no_thread(store):
    before = threading.active_count()
    batches = batches_of(store, "crop", batch_size=2)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_an_error_of_the_background_thread_reaches_the_consumer(store):
    with pytest.raises(IndexError):
        epoch(store, rows=np.array([0, 1, 2, COUNT]), labels=ROWS[:4])


def test_what_cannot_be_is_a_usage_error(store):
    with pytest.raises(UsageError, match="Did you mean 'crop_flip'"):
        epoch(store, "crop_flips")
    with pytest.raises(UsageError, match="Did you mean 'cutmix'"):
        epoch(store, "none", "cutmixx")
    large = Preprocess(image_size=SIDE + 1, resize=SIDE)
    for batches in (
        evaluation_batches(store, ROWS, large, 4),
        *(batches_of(store, augment, pre=large) for augment in AUGMENTS),
    ):
        with pytest.raises(UsageError, match="at most 40"):
            next(batches)


def test_i12_the_smallest_stores_can_be_augmented():
    tiny = InMemory(np.random.default_rng(0).integers(0, 256, (4, 1, 1, 3), dtype=np.uint8))
    for augment in AUGMENTS:
        for mix in MIXES:
            [batch] = epoch(
                tiny, augment, mix, rows=ROWS[:4], labels=ROWS[:4], pre=Preprocess(1, 1)
            )
            assert batch.images.shape == (4, 3, 1, 1)
            assert batch.images.isfinite().all()


def test_the_recipe_offers_what_the_views_know():
    known = {parameter.name: parameter for parameter in read_signature(recipe.tuning)}
    assert known["augment"].range.options == AUGMENTS
    assert known["mix"].range.options == MIXES


# --- smaller images ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AUGMENTS)
def test_a_smaller_view_shows_what_the_whole_one_does(name) -> None:
    ramp = np.linspace(0, 255, 96).astype(np.uint8)
    pixels = np.broadcast_to(ramp[None, :, None, None], (4, 96, 96, 3)).copy()
    pixels[:, :, :, 1] = pixels[:, :, :, 0].transpose(0, 2, 1)

    def views(size: int) -> torch.Tensor:
        rng = np.random.default_rng(0)
        return torch.stack(list(random_views(pixels, size, name, rng, [0.0] * 3, 80))).float()

    whole, small = views(80), views(40)
    assert small.shape == (4, 40, 40, 3)
    again = torch.nn.functional.interpolate(
        whole.permute(0, 3, 1, 2), (40, 40), mode="bilinear", antialias=True
    ).permute(0, 2, 3, 1)
    if name in ("strong", "trivial"):  # their colours and moves draw by what they are given
        return
    assert (small - again).abs().mean() < 2
