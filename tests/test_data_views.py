from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from autoft.data.decode import normalise
from autoft.data.pixels import PixelStore
from autoft.data.views import (
    AUGMENTS,
    JITTER,
    _jitter,
    evaluation_batches,
    training_batches,
)
from autoft.errors import UsageError
from autoft.values import Preprocess

SIDE, COUNT = 40, 21
PRE = Preprocess(image_size=32, resize=SIDE)
ROWS = np.arange(COUNT)
LABELS = np.arange(COUNT) * 10


def store_of(folder, pixels):
    pixels.tofile(folder / "pixels.u8")
    return PixelStore(str(folder / "pixels.u8"), len(pixels), pixels.shape[1])


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    return store_of(tmp_path, rng.integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8))


def epoch(store, augment="strong", *, rows=ROWS, labels=LABELS, seed=1, number=0, batch_size=4):
    return list(
        training_batches(
            store,
            rows,
            labels,
            PRE,
            augment=augment,
            batch_size=batch_size,
            seed=seed,
            epoch=number,
        )
    )


def test_evaluation_equals_the_decoder_bit_for_bit(store):
    rows = np.array([5, 2, 20, 20, 0])
    batches = list(evaluation_batches(store, rows, PRE, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    together = torch.cat(batches)
    assert together.dtype == torch.float32
    np.testing.assert_array_equal(together.numpy(), normalise(store.array[rows], PRE))
    mirrored = torch.cat(list(evaluation_batches(store, rows, PRE, batch_size=2, flip=True)))
    assert torch.equal(mirrored, together.flip(-1))


def test_without_augmentation_training_sees_what_scoring_sees(store):
    images, labels = (
        torch.cat(part) for part in zip(*epoch(store, "none", batch_size=7), strict=True)
    )
    rows = labels.numpy() // 10
    assert sorted(rows) == list(ROWS)
    np.testing.assert_array_equal(images.numpy(), normalise(store.array[rows], PRE))


@pytest.mark.parametrize("augment", AUGMENTS)
def test_seed_and_epoch_alone_decide_the_batches(store, augment):
    first, again = epoch(store, augment), epoch(store, augment)
    for (images, labels), (same_images, same_labels) in zip(first, again, strict=True):
        assert images.shape == (4, 3, 32, 32)
        assert images.is_contiguous()
        assert labels.dtype == torch.int64
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    for other in (epoch(store, augment, seed=2), epoch(store, augment, number=1)):
        assert not torch.equal(other[0][0], first[0][0])
        assert not torch.equal(other[0][1], first[0][1])


def test_a_last_batch_of_one_image_is_dropped(store):
    assert [len(labels) for _, labels in epoch(store)] == [4] * 5
    assert [len(labels) for _, labels in epoch(store, batch_size=19)] == [19, 2]


def positions(tmp_path, augment, count=400):
    """Coordinates in -1..1 that each output pixel was taken from: red = x, green = y."""
    ramp = np.broadcast_to(np.linspace(0, 240, SIDE).round().astype(np.uint8), (SIDE, SIDE))
    pixels = np.stack([ramp, ramp.T, ramp], axis=2)
    store = store_of(tmp_path, np.repeat(pixels[None], count, axis=0))
    plain = Preprocess(32, SIDE, mean=(0, 0, 0), std=(1, 1, 1))
    rows = np.arange(count)
    batches = training_batches(
        store, rows, rows, plain, augment=augment, batch_size=count, seed=0, epoch=0
    )
    return next(batches)[0] * 255 / 120 - 1


def test_crops_cover_the_stated_area_and_ratio_of_the_whole_square(tmp_path):
    taken = positions(tmp_path, "crop")
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


def test_only_flipping_augmentations_mirror_and_then_half_the_images(tmp_path):
    def mirrored(augment):
        taken = positions(tmp_path, augment)
        return (taken[:, 0, 16, -1] < taken[:, 0, 16, 0]).float().mean().item()

    assert mirrored("crop") == 0
    assert 0.4 < mirrored("crop_flip") < 0.6
    assert 0.4 < mirrored("strong") < 0.6


def test_strong_changes_colours_within_the_range_of_pixels(tmp_path):
    grey = store_of(tmp_path, np.full((COUNT, SIDE, SIDE, 3), 128, np.uint8))
    plain = Preprocess(32, SIDE, mean=(0, 0, 0), std=(1, 1, 1))
    images, _ = next(
        training_batches(
            grey, ROWS, LABELS, plain, augment="strong", batch_size=COUNT, seed=0, epoch=0
        )
    )
    level = images[:, 0, 0, 0] / (128 / 255)
    assert level.min() < 0.85
    assert level.max() > 1.15
    assert level.sub(1).abs().max() <= 0.3 + 1e-5
    assert images.min() >= 0
    assert images.max() <= 1


def test_jitter_is_brightness_then_contrast_then_saturation():
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 50 + 100
    factors = np.random.default_rng(7).uniform(1 - JITTER, 1 + JITTER, (3, 5, 1, 1, 1))
    brightness, contrast, saturation = torch.from_numpy(factors.astype(np.float32))

    def luma(x):
        return (x * torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(1, keepdim=True)

    x = images * brightness
    x = luma(x).mean((2, 3), keepdim=True) * (1 - contrast) + x * contrast
    x = luma(x) * (1 - saturation) + x * saturation
    torch.testing.assert_close(_jitter(images.clone(), np.random.default_rng(7)), x.clamp(0, 255))


def test_an_abandoned_epoch_leaves_no_thread(store):
    before = threading.active_count()
    batches = training_batches(
        store, ROWS, LABELS, PRE, augment="crop", batch_size=2, seed=0, epoch=0
    )
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_an_error_of_the_background_thread_reaches_the_consumer(store):
    with pytest.raises(IndexError):
        epoch(store, rows=np.array([0, 1, 2, COUNT]), labels=LABELS[:4])


def test_what_cannot_be_is_a_usage_error(store):
    with pytest.raises(UsageError, match="Did you mean 'crop_flip'"):
        epoch(store, "crop_flips")
    large = Preprocess(image_size=SIDE + 1, resize=SIDE)
    for batches in (
        evaluation_batches(store, ROWS, large, 4),
        training_batches(
            store, ROWS, LABELS, large, augment="crop", batch_size=4, seed=0, epoch=0
        ),
    ):
        with pytest.raises(UsageError, match="at most 40"):
            next(batches)
