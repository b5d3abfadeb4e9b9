"""Time: how many epochs a trial may have, what they will take, and when the search must end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from autoft.training.job import Outcome, Precision, Ranked, TrialJob
from autoft.values import TrialConfig

HEAD_ROUNDS = 4  # how often a head-only trial is scored while it trains
FIRST_SECONDS = 120.0  # that the first trial may take, however little time is left
HEAD_SECONDS = 4.0  # what one is expected to take before one was seen
MAX_EPOCHS = 20
MIN_STEPS = 300  # a full trial of a small data set gets at least so many optimiser steps
FULL_SHARE = 0.25  # of the time for trials: what one full fine-tune may take ...
FULL_EPOCHS = 3  # ... but that share may be doubled to reach so many epochs
SCRATCH_SHARE = 0.5  # where all there is are random or weak weights: they want more epochs
NOMINAL_BATCH = 32


@dataclass
class Budget:
    """What is left of the time and the number of trials; learns how long epochs really take.

    `deadline` is the wall-clock time (seconds since 1970) at which the last trial must have ended.
    `ranked` has the best backbone first.
    """

    deadline: float
    max_trials: int | None
    ranked: Mapping[str, Ranked]
    train_images: int
    validation_images: int
    began: float = field(default_factory=time.time)
    _pace: float = 1.0
    _head_seconds: float = HEAD_SECONDS
    first: bool = True  # no trial has ended yet
    _planned: dict[str, int] = field(default_factory=dict)

    def left(self) -> float:
        """Return the seconds until the last trial must have ended."""
        return self.deadline - time.time()

    def allows_another(self, trials: int) -> bool:
        """Tell whether another trial may start after `trials` of them."""
        if trials == 0:
            return True  # the linear probe is always trained, so that there is always a model
        return self.left() > 0 and (self.max_trials is None or trials < self.max_trials)

    def epochs(self, config: TrialConfig, trains_backbone: bool) -> int:
        """Return the number of epochs for `config`; 0 where it would not fit."""
        if not trains_backbone:
            return HEAD_ROUNDS if self.first or self.left() > self._head_seconds else 0
        affordable = int(max(0.0, self.left()) / self._epoch_seconds(config))
        return min(self._full_epochs(config), max(affordable, int(self.first)))

    def job(
        self, number: int, config: TrialConfig, epochs: int, precision: Precision | None = None
    ) -> TrialJob:
        """Return the job of a trial, with its deadline and its backbone's best number format.

        `precision` is given for a trial that was begun in another.
        """
        ranked = self.ranked.get(config.backbone.name)
        precision = precision or (ranked.precision if ranked else Precision())
        least = time.time() + FIRST_SECONDS if self.first else 0.0
        self.first = False
        return TrialJob(number, config, epochs, max(self.deadline, least), precision)

    def learn(self, job: TrialJob, outcome: Outcome, trains_backbone: bool) -> None:
        """Correct the expectation by what a trial really took."""
        if not outcome.scores or outcome.seconds <= 0:
            return
        if not trains_backbone:
            self._head_seconds = 0.5 * self._head_seconds + 0.5 * outcome.seconds
            return
        expected = self._expected_epoch(job.config) * len(outcome.scores)
        self._pace = 0.5 * self._pace + 0.5 * outcome.seconds / expected

    def plan(self, backbone: str, epochs: int) -> None:
        """Remember the epochs of a full trial of `backbone` from an earlier command."""
        self._planned[backbone] = max(epochs, self._planned.get(backbone, 0))

    def _full_epochs(self, config: TrialConfig) -> int:
        """Return the epochs of a full trial: per backbone always the same: rungs compare."""
        label = config.backbone.name
        if label not in self._planned:
            self._planned[label] = self._affordable_epochs(config)
        return self._planned[label]

    def _affordable_epochs(self, config: TrialConfig) -> int:
        whole = self._expected_epoch(config, frozen=0.0) * self._pace
        time_for_trials = self.deadline - self.began
        starts = next(iter(self.ranked.values())), self.ranked[config.backbone.name]
        knows_little = all(each.weak or not each.pretrained for each in starts)
        share = SCRATCH_SHARE if knows_little else FULL_SHARE
        affordable = int(share * time_for_trials / whole)
        stretched = min(FULL_EPOCHS, int(2 * share * time_for_trials / whole))
        steps = max(1, self.train_images // NOMINAL_BATCH)
        most = max(MAX_EPOCHS, -(-MIN_STEPS // steps))
        return max(1, min(most, max(affordable, stretched)))

    def _epoch_seconds(self, config: TrialConfig) -> float:
        return self._expected_epoch(config) * self._pace

    def _expected_epoch(self, config: TrialConfig, frozen: float | None = None) -> float:
        """Return the seconds of one epoch by the measured speeds of its backbone.

        A frozen share f of the work costs a third: forward only, (1 + 2 (1 - f)) / 3 in all.
        """
        ranked = self.ranked[config.backbone.name]
        share = frozen_share(config) if frozen is None else frozen
        training = self.train_images / ranked.trained_per_second * (1 + 2 * (1 - share)) / 3
        training *= 2 if config.train.get("sam") else 1
        return training + self.validation_images / ranked.images_per_second


def frozen_share(config: TrialConfig) -> float:
    """Return the share of stages that stay frozen, where the strategy states it as `depth`."""
    depth = config.strategy.params.get("depth", 0.0)
    return float(depth) if isinstance(depth, int | float) else 0.0
