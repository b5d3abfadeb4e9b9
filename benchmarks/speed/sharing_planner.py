"""P14, P15: the way that the planner takes against the best of all, each tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import numpy as np
from baseline import built
from generated import FORMAT, costs_of, forget, go_on, job_of
from goals import Line, Spent, spending

from autoft.network.strategy import bind
from autoft.search.budget import LIVE_MOST
from autoft.training import plan
from autoft.training.job import Mode, Setup, Sharing
from autoft.training.trial import train_trials
from autoft.values import Part, TrialConfig

WORKLOADS = (
    ("resnet18", 0.75, 2),
    ("resnet18", 0.25, 4),
    ("mobilenetv3_small_100", 0.75, 8),
    ("mobilenetv3_small_100", 0.5, 2),
    ("efficientnet_b0", 0.5, 3),
    ("vit_tiny_patch16_224", 0.5, 4),
)


def planner(setup: Setup, rounds: int) -> Iterator[Line]:
    """Train trials in every way, and compare the one that the planner takes with the best."""
    small = replace(
        setup,
        train=setup.train.take(np.arange(128)),
        validation=setup.validation.take(np.arange(32)),
    )
    regrets, against, told = [], [], []
    for model, depth, epochs in WORKLOADS:
        backbone = built(small, model, FORMAT)
        frozen = bind(Part("freeze", {"depth": depth}), len(backbone.stages)).frozen_prefix()
        costs = costs_of(backbone, small)
        work = plan.Work(len(small.train), len(small.validation), epochs, True, False)
        room = plan.room_of("cpu")
        chosen = plan.choose(costs, frozen, work, room)
        if chosen.mode == "rerun":  # as a search asks then
            work = replace(work, together=LIVE_MOST)
            chosen = plan.choose(costs, frozen, work, room)
        views = plan.views_for(costs, frozen, work)
        config = TrialConfig(
            Part(model),
            Part("freeze", {"depth": depth}),
            Part("linear"),
            {"head_first": False, "batch_size": 32},
            seed=0,
        )
        modes: tuple[Mode, ...] = ("rerun", "live", "ram", "disk")
        spent = {mode: Spent() for mode in modes}
        for _ in range(min(rounds, 2) + 1):
            for mode, each in spent.items():
                forget()
                sharing = Sharing(mode, frozen, views if mode in ("ram", "disk") else 0)
                count = LIVE_MOST if mode == "live" else 1
                jobs = [job_of(number, config, epochs, sharing) for number in range(count)]
                with spending(each):
                    train_trials(small, jobs, go_on)
        seconds = {mode: median(each.clock) for mode, each in spent.items()}
        seconds["live"] /= LIVE_MOST
        regrets.append(seconds[chosen.mode] / min(seconds.values()) - 1)
        against.append(seconds["rerun"] / seconds[chosen.mode])
        predicted = dict(plan.predict(costs, frozen, replace(work, together=LIVE_MOST), room))
        told.append(
            {
                "model": model,
                "frozen": frozen,
                "epochs": epochs,
                "chosen": chosen.mode,
                "measured": seconds,
                "predicted": predicted,
            }
        )
    detail = {"workloads": told}
    chosen_for = ", ".join(f"{each['model']}/{each['frozen']}: {each['chosen']}" for each in told)
    yield Line(
        "P14",
        f"time lost against the best of all ways, the worst of {len(told)} ({chosen_for})",
        100 * max(regrets),
        15,
        5,
        "%",
        less=True,
        detail=detail,
    )
    yield Line("P15", "against running again, the worst of them", min(against), 0.95, 1.0)
