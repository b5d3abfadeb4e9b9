"""Epochs that end in time: a slow trial has fewer of them, and all of its schedule."""

from __future__ import annotations

import pytest

from autoft.training.pace import Pace

SIDE, SCALE = 224, 0.7  # 160 pixels of 224: 0.51 of the pixels
SHARE = (160 / 224) ** 2


def pace_of(*seconds: float, scale: float = 1.0, scoring: float = 0.0) -> Pace:
    pace = Pace(SIDE, scale)
    for epoch, training in enumerate(seconds):
        pace.note(epoch, 10, training, scoring)
    return pace


@pytest.mark.parametrize("seconds", [(), (100.0,)])
def test_one_epoch_alone_says_nothing(seconds):
    assert pace_of(*seconds).epochs_within(0.0, len(seconds), 7) == 7


@pytest.mark.parametrize(
    ("seconds", "epochs"), [(1000.0, 20), (80.0, 10), (79.0, 9), (10.0, 3), (9.9, 2), (-5.0, 2)]
)
def test_as_many_epochs_as_end_in_time(seconds, epochs):
    assert pace_of(8.0, 8.0, scoring=2.0).epochs_within(seconds, 2, 20) == epochs


def test_epochs_that_see_images_whole_take_longer():
    pace = pace_of(10 * SHARE, 10 * SHARE, scale=SCALE, scoring=1.0)  # 10 s for whole images
    # Of ten epochs the last two see images whole, of seven the last.
    ten, seven = 6 * 10 * SHARE + 2 * 10 + 8, 4 * 10 * SHARE + 10 + 5
    assert pace.epochs_within(ten + 0.1, 2, 10) == 10
    assert pace.epochs_within(ten - 0.1, 2, 10) == 9
    assert pace.epochs_within(seven + 0.1, 2, 10) == 7


def test_a_busy_moment_does_not_count():
    assert pace_of(10.0, 90.0, 10.0).epochs_within(70.0, 3, 10) == 10
