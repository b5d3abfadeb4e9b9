"""Which images a profile looks at: as many as the time affords, and none of the test part."""

from __future__ import annotations

import numpy as np

from autoft.data.splits.split import TEST
from autoft.search.images import Data
from autoft.training.job import Ranked, Setup
from autoft.training.measures import REPEATED_BELOW, REPEATS, Sample, draw

SHARE = 0.01  # of the time of a search for its regime
LEAST, MOST = 500, 5000  # images
HARDLY = 100  # images: with fewer the numbers would mean nothing
PATIENT = 1800.0  # seconds from which a search divides a small sample several times


def sample_of(data: Data, limit: int) -> Sample:
    """Return a sample of about `limit` images; none of the test part, or whose label is in doubt.

    It is empty where fewer than two classes could be both learnt and asked for.
    """
    catalog = data.catalog
    usable = np.flatnonzero((data.split.fold != TEST) & ~catalog.pinned)
    sample = draw(catalog.rows[usable], catalog.labels[usable], catalog.groups[usable], limit)
    several = len(np.unique(sample.labels)) > 1
    return sample.take(np.arange(len(sample) if several else 0), usable)


def affordable(seconds: float, setup: Setup, ranked: Ranked) -> int:
    """Return how many images can be profiled in a search of `seconds`.

    Each passes through the network and through its random twin. At least `LEAST` are looked at,
    unless these alone would take more than twice the share of the time; then at least `HARDLY`.
    """
    on_cpu = setup.device == "cpu"
    speed = ranked.fp32_images_per_second if on_cpu else ranked.images_per_second
    share = int(SHARE * seconds * speed / 2)
    return min(MOST, max(share, min(LEAST, 2 * share), HARDLY))


def repeats_for(sample: Sample, seconds: float = PATIENT) -> int:
    """Return how often a sample is divided anew in a search of `seconds`: more if it is small."""
    return REPEATS if len(sample) < REPEATED_BELOW and seconds >= PATIENT else 1
