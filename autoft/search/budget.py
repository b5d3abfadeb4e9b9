"""Time: how many epochs a trial may have, what they will take, and when the search must end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from autoft import plugins
from autoft.errors import AutoftError
from autoft.network.strategy import Treatment, bind
from autoft.training import plan
from autoft.training.job import Costs, Mode, Outcome, Precision, Ranked, Sharing, TrialJob
from autoft.training.plan import Room, Work
from autoft.training.recipe import SMALLER, area
from autoft.values import Part, TrialConfig, Value, is_of_images

HEAD_ROUNDS = 4  # how often a head-only trial is scored while it trains
FIRST_SECONDS = 120.0  # that the first trial may take, however little time is left
HEAD_SECONDS = 4.0  # what one is expected to take before one was seen
MAX_EPOCHS = 20
MIN_STEPS = 300  # a full trial of a small data set gets at least so many optimiser steps
FULL_SHARE = 0.25  # of the time for trials: what one full fine-tune may take
TAIL_SHARE = 0.2  # what a trial may take that runs a tail alone: it is one of many
SCRATCH_SHARE = 0.5  # where all there is are random or weak weights: they want more epochs
GOOD_EPOCHS = 10  # one trial of so many is worth more than several of fewer: it may take ...
STRETCHED_SHARE = 1.0  # ... so much to get them
HOPED = 1.1  # of the time that is left a trial may be planned for: a slow one has fewer epochs
LEAST_EPOCHS = 3  # with fewer, fine-tuning hardly gains on the head that it begins with
NOMINAL_BATCH = 32
USUAL_AUGMENT = "crop_flip"  # where a configuration does not say
DOUBTED = 3.0  # times too slow a backbone may be said to be, until one was trained
MOVES = 3.0  # times the pace so far is the most that one trial says
START_SECONDS = 1.0  # to build a network and fit its head, before the first epoch
LIVE_MOST = 4  # trials that take their steps together: more save little more
LIVE_SHARE = 0.5  # of what is left of the time, for all of them
NO_ROOM = Room(0, 0, 0, 1.0)

AskTreatment = Callable[[Part, int], Treatment]
"""Tells what a strategy of others leaves alone in a backbone of so many stages."""


def nothing_known(_strategy: Part, _num_stages: int) -> Treatment:
    """Say that everything is trained, as far as is known."""
    return Treatment()


@dataclass
class Budget:
    """What is left of the time and the number of trials; learns how long epochs really take.

    `deadline` is the wall-clock time (seconds since 1970) at which the last trial must have ended.
    `ranked` has the best backbone first; `room` is where workers may keep what is shared. The
    backbones of `smaller` train on smaller images where a configuration does not say. `ask` is
    asked about strategies that others wrote: they may need torch, which is not imported here.
    """

    deadline: float
    max_trials: int | None
    ranked: Mapping[str, Ranked]
    train_images: int
    validation_images: int
    room: Room = NO_ROOM
    smaller: frozenset[str] = frozenset()
    ask: AskTreatment = nothing_known
    began: float = field(default_factory=time.time)
    _pace: float = 1.0
    _head_seconds: float = HEAD_SECONDS
    first: bool = True  # no trial has ended yet
    reserved: float = 0.0  # seconds for the finals
    _planned: dict[tuple[str, int], int] = field(default_factory=dict)
    _treatments: dict[str, Treatment] = field(default_factory=dict)
    _kept: dict[tuple[str, int, Value], int] = field(default_factory=dict)  # views, by trials
    _taught: bool = False  # by a trial that trained a backbone

    def left(self) -> float:
        """Return the seconds for trials that are yet to begin, but what is `reserved`."""
        return self.remaining() - self.reserved

    def remaining(self) -> float:
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
        affordable = self._fitting(config, self.full_epochs(config))
        return max(affordable, int(self.first or self._worth_a_try(config)))

    def expected(
        self, config: TrialConfig, epochs: int, trains_backbone: bool, together: int = 1
    ) -> float:
        """Return the seconds that a trial of so many epochs is expected to take.

        Of several that take their steps `together` it is what each adds.
        """
        if not trains_backbone:
            return self._head_seconds * epochs / HEAD_ROUNDS
        return self._pace * self._measured(config, epochs, together)

    def together(self, config: TrialConfig, epochs: int) -> int:
        """Return how many trials that freeze as `config` does take their steps together.

        Where what is frozen is kept, or hardly costs anything, each is trained by itself.
        """
        ranked = self.ranked[config.backbone.name]
        if ranked.costs is None or ranked.precision.compiled:
            return 1
        most = LIVE_MOST if self._mode(config, epochs, 1) == "rerun" else 1
        for count in range(most, 1, -1):
            seconds = count * self.expected(config, epochs, True, count)
            live = self._mode(config, epochs, count) == "live"
            if live and seconds <= LIVE_SHARE * self.left():
                return count
        return 1

    def _mode(self, config: TrialConfig, epochs: int, together: int) -> Mode:
        costs = self.ranked[config.backbone.name].costs
        assert costs is not None  # measured
        work = self._work_of(config, epochs, together)
        return plan.choose(costs, self.frozen(config), work, self.room).mode

    def job(
        self,
        number: int,
        config: TrialConfig,
        epochs: int,
        precision: Precision | None = None,
        together: int = 1,
    ) -> TrialJob:
        """Return the job of a trial, with its deadline and its backbone's best number format.

        `precision` is given for a trial that was begun in another; `together` trials take their
        steps together.
        """
        ranked = self.ranked.get(config.backbone.name)
        precision = precision or (ranked.precision if ranked else Precision())
        least = time.time() + FIRST_SECONDS if self.first else 0.0
        self.first = False
        costs = ranked.costs if ranked else None
        deadline = max(self.deadline, least)
        sharing = Sharing("live", self.frozen(config)) if together > 1 else None
        return TrialJob(number, config, epochs, deadline, precision, costs, sharing, together)

    def learn(self, job: TrialJob, outcome: Outcome, trains_backbone: bool) -> None:
        """Correct the expectation by what a trial really took."""
        if outcome.seconds <= 0 or job.together > 1:  # how many went on with it is not known
            return
        if not trains_backbone:
            if outcome.scores:
                self._head_seconds = 0.5 * self._head_seconds + 0.5 * outcome.seconds
            return
        epochs = max(1, len(outcome.scores))
        pace = outcome.seconds / self._measured(job.config, epochs)
        if not outcome.scores:  # cut off: the first epoch takes longer than this, if it says more
            pace = max(pace, self._pace)
        self._taught = self._taught or bool(outcome.scores) or pace > self._pace
        # What one trial took may be a busy moment, or features that had to be made first.
        pace = min(max(pace, self._pace / MOVES), self._pace * MOVES)
        self._pace = 0.5 * self._pace + 0.5 * pace

    def note_kept(self, config: TrialConfig, views: int) -> None:
        """Remember how many views a trial has kept on the disk: those after it find them."""
        key = self._place_of(config)
        self._kept[key] = max(self._kept.get(key, 0), views)

    def plan(self, config: TrialConfig, epochs: int) -> None:
        """Remember the epochs of a trial of an earlier command."""
        key = self._key(config)
        self._planned[key] = max(epochs, self._planned.get(key, 0))

    def full_epochs(self, config: TrialConfig) -> int:
        """Return the epochs of a trial that is not stopped.

        They are the same for all trials of a backbone that freeze as much of it: rungs compare.
        """
        key = label, frozen = self._key(config)
        if key not in self._planned:
            whole = self.whole_epochs(label)
            self._planned[key] = max(whole, self._tail_epochs(config)) if frozen else whole
        return self._planned[key]

    def _key(self, config: TrialConfig) -> tuple[str, int]:
        """Return what trials have in common that have as many epochs."""
        label = config.backbone.name
        ranked = self.ranked.get(label)
        known = ranked is not None and ranked.costs is not None
        return label, self.frozen(config) if known else 0

    def whole_epochs(self, label: str) -> int:
        """Return the epochs that a trial of the whole backbone affords."""
        whole = self._whole_epoch(self.ranked[label]) * self._pace
        starts = next(iter(self.ranked.values())), self.ranked[label]
        knows_little = all(each.weak or not each.pretrained for each in starts)
        share = SCRATCH_SHARE if knows_little else FULL_SHARE
        return self._afforded(share, lambda epochs: whole * epochs)

    def _tail_epochs(self, config: TrialConfig) -> int:
        """Return the epochs that a trial of a tail affords, which are cheaper than whole ones."""
        return self._afforded(TAIL_SHARE, lambda epochs: self.expected(config, epochs, True))

    def _afforded(self, share: float, seconds: Callable[[int], float]) -> int:
        """Return how many epochs `share` of the time buys, or more of it where these are few."""
        usual = self._within(share, seconds)
        stretched = min(GOOD_EPOCHS, self._within(STRETCHED_SHARE, seconds))
        return max(1, usual, stretched)

    def _within(self, share: float, seconds: Callable[[int], float]) -> int:
        allowed = share * (self.deadline - self.began)
        fit = (n for n in range(self._most_epochs(), 0, -1) if seconds(n) <= allowed)
        return next(fit, 0)

    def _most_epochs(self) -> int:
        steps = max(1, self.train_images // NOMINAL_BATCH)
        return max(MAX_EPOCHS, -(-MIN_STEPS // steps))

    def _fitting(self, config: TrialConfig, most: int) -> int:
        """Return how many of `most` epochs fit into what is left of the time, or nearly do."""
        left, hope = self.left(), self._hope(config)

        def fits(epochs: int) -> bool:
            hoped = hope if epochs > LEAST_EPOCHS else 1.0
            return self.expected(config, epochs, True) <= hoped * left

        return next((n for n in range(most, 0, -1) if fits(n)), 0)

    def _hope(self, config: TrialConfig) -> float:
        """Return what share of the time that is left a trial may be planned for.

        Its pace is known soon where nothing has to be kept first. Finals are not to wait for it.
        """
        known = self.ranked[config.backbone.name].costs is not None
        keeps = known and self._mode(config, GOOD_EPOCHS, 1) != "rerun"
        return 1.0 if self.reserved or keeps else HOPED

    def _worth_a_try(self, config: TrialConfig) -> bool:
        """Tell whether one epoch might fit after all: no trial has said yet how long they take.

        What was measured in a busy moment must not exclude all training.
        """
        return not self._taught and self.expected(config, 1, True) <= DOUBTED * self.left()

    def _whole_epoch(self, ranked: Ranked) -> float:
        """Return the measured seconds of an epoch of everything, augmented anew."""
        scale = SMALLER if ranked.label in self.smaller else 1.0
        if ranked.costs is not None:
            work = self.work({"train_scale": scale}, GOOD_EPOCHS)  # the last see images whole
            return plan.predict(ranked.costs, 0, work, self.room)["rerun"] / GOOD_EPOCHS
        trained = area(scale) * self.train_images / ranked.trained_per_second
        return trained + self.validation_images / ranked.images_per_second

    def _measured(self, config: TrialConfig, epochs: int, together: int = 1) -> float:
        """Return the seconds of a trial by the measured speeds of its backbone.

        Without costs of its stages a frozen share f of the work costs a third: forward only,
        (1 + 2 (1 - f)) / 3 in all.
        """
        ranked = self.ranked[config.backbone.name]
        if ranked.costs is not None:
            work = self._work_of(config, epochs, together)
            costs, cut = self.costs(config), self.frozen(config)
            return START_SECONDS + plan.seconds(costs, cut, work, self.room)
        share = (1 + 2 * (1 - self.frozen(config) / max(1, ranked.num_stages))) / 3
        pixels = area(float(config.train.get("train_scale", 1.0)))
        training = pixels * _steps(config) * share * self.train_images / ranked.trained_per_second
        return epochs * (training + self.validation_images / ranked.images_per_second)

    def costs(self, config: TrialConfig) -> Costs:
        """Return the costs of the backbone as they are for a trial: of its steps, above all."""
        costs = self.ranked[config.backbone.name].costs
        assert costs is not None  # measured
        share = costs.vectors if self._treatment(config).vectors_alone else 1.0
        return replace(costs, tail=tuple(_steps(config) * share * each for each in costs.tail))

    def _work_of(self, config: TrialConfig, epochs: int, together: int = 1) -> Work:
        work = self.work(config.train, epochs, together)
        return replace(work, kept=self._kept.get(self._place_of(config), 0))

    def _place_of(self, config: TrialConfig) -> tuple[str, int, Value]:
        """Return what trials have in common that can use the same kept views."""
        augment = config.train.get("augment", USUAL_AUGMENT)
        return config.backbone.name, self.frozen(config), augment

    def work(self, train: Mapping[str, Value], epochs: int, together: int = 1) -> Work:
        """Return what a trial with these answers of the recipe has to do."""
        return Work(
            self.train_images,
            self.validation_images,
            epochs,
            train.get("augment", USUAL_AUGMENT) != "none",
            is_of_images(str(train.get("mix", "none"))),
            smaller=float(train.get("train_scale", 1.0)) < 1,
            together=together,
        )

    def frozen(self, config: TrialConfig) -> int:
        """Return how many leading stages stay frozen."""
        return min(self._treatment(config).frozen, self.ranked[config.backbone.name].num_stages)

    def _treatment(self, config: TrialConfig) -> Treatment:
        """Return what the strategy leaves alone; the answer is remembered."""
        num_stages = max(1, self.ranked[config.backbone.name].num_stages)
        key = repr((config.strategy, num_stages))
        if key not in self._treatments:
            own = _own(config.strategy, num_stages)
            self._treatments[key] = own or self.ask(config.strategy, num_stages)
        return self._treatments[key]


def _steps(config: TrialConfig) -> int:
    """Return how many passes a step takes: sharpness-aware ones look twice."""
    return 2 if config.train.get("sam") else 1


def _own(strategy: Part, num_stages: int) -> Treatment | None:
    """Return what a strategy that comes with autoft leaves alone; None of others."""
    try:
        if plugins.find("strategy", strategy.name).builtin:
            return bind(strategy, num_stages).treatment()
    except AutoftError:
        return Treatment()  # it is gone or a choice is wrong: its trial says so
    return None
