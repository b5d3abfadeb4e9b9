"""Epochs that end in time: a slow trial has fewer of them, and all of its schedule."""

from __future__ import annotations

import pytest

from autoft.training.pace import Pace

SIDE, SCALE = 224, 0.7  # 160 pixels of 224: 0.51 of the pixels
SHARE = (160 / 224) ** 2


def test_nothing_is_known_before_the_first_epoch():
    assert Pace(SIDE, 1.0).epochs_within(0.0, 0, 7) == 7


@pytest.mark.parametrize(
    ("seconds", "epochs"), [(1000.0, 20), (90.0, 10), (89.0, 9), (10.0, 2), (9.9, 1), (-5.0, 1)]
)
def test_as_many_epochs_as_end_in_time(seconds, epochs):
    pace = Pace(SIDE, 1.0)
    pace.note(0, 20, training=8.0, scoring=2.0)
    assert pace.epochs_within(seconds, 1, 20) == epochs


def test_epochs_that_see_images_whole_take_longer():
    pace = Pace(SIDE, SCALE)
    pace.note(0, 10, training=10 * SHARE, scoring=1.0)  # 10 s for whole images
    # Of ten epochs the last two see images whole, of seven the last.
    ten, seven = 7 * 10 * SHARE + 2 * 10 + 9, 5 * 10 * SHARE + 10 + 6
    assert pace.epochs_within(ten + 0.1, 1, 10) == 10
    assert pace.epochs_within(ten - 0.1, 1, 10) == 9
    assert pace.epochs_within(seven + 0.1, 1, 10) == 7


def test_a_busy_moment_counts_by_its_share_of_all_epochs():
    pace = Pace(SIDE, 1.0)
    pace.note(0, 10, training=30.0, scoring=0.0)
    assert pace.epochs_within(80.0, 1, 10) == 3
    for epoch in range(1, 5):
        pace.note(epoch, 10, training=10.0, scoring=0.0)  # 14 s on average by now
    assert pace.epochs_within(40.0, 5, 10) == 7
