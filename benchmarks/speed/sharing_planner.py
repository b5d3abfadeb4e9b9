"""P14, P15: the way that the planner takes against the best of all, each tried."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from statistics import median

import numpy as np
from baseline import built
from generated import FOR_EVER, FORMAT, costs_of, forget, go_on, job_of, new_run, train_all
from goals import Line, Spent, spending

from autoft.search.budget import LIVE_MOST, Budget
from autoft.training import plan
from autoft.training.job import Costs, Mode, Ranked, Setup, Sharing
from autoft.values import Part, TrialConfig

WORKLOADS = (
    ("resnet18", 0.75, 2),
    ("resnet18", 0.25, 2),
    ("mobilenetv3_small_100", 0.75, 8),
    ("mobilenetv3_small_100", 0.5, 4),
    ("efficientnet_b0", 0.5, 3),
    ("vit_tiny_patch16_224", 0.5, 4),
)
TRAIN, VALIDATION = 64, 16  # images
TRIALS = LIVE_MOST  # that freeze the same stages, in every way
FIRST, LATER = "disk, the first", "disk, each later one"
KINDS = ("rerun", "live", "ram", FIRST, LATER)
NUMBERS = count()


@dataclass
class Workload:
    """TRIALS trials that freeze the same stages, and what each way takes for all of them."""

    setup: Setup
    config: TrialConfig
    costs: Costs
    epochs: int
    frozen: int
    views: int
    chosen: Mode
    predicted: dict[Mode, float]
    spent: dict[str, Spent]

    def measure(self) -> None:
        """Train in every way once more: one trial where all take the same, else as many."""
        for mode in ("rerun", "ram"):
            self._train(mode, 1, self.spent[mode])
        self._train("live", TRIALS, self.spent["live"])
        forget()
        self._train("disk", 1, self.spent[FIRST])
        self._train("disk", 1, self.spent[LATER])

    def _train(self, mode: Mode, trials: int, spent: Spent) -> None:
        """Train `trials` trials in `mode`; as a search does where that is what it chooses.

        So what is kept on the way, for trials that freeze less, is charged as well.
        """
        sharing = Sharing(mode, self.frozen, self.views if mode in ("ram", "disk") else 0)
        own = mode == "disk" == self.chosen
        jobs = [
            # Numbers are new: a trial that is there already would go on in the way it took.
            replace(
                job_of(next(NUMBERS), self.config, self.epochs, None if own else sharing),
                costs=self.costs,
            )
            for _ in range(trials)
        ]
        with spending(spent):
            train_all(self.setup, jobs, go_on)

    def seconds(self) -> dict[Mode, float]:
        """Return the seconds of all trials, by the clock, in every way."""
        took = {name: median(spent.clock) for name, spent in self.spent.items()}
        later = (TRIALS - 1) * took[LATER]
        return {
            "rerun": TRIALS * took["rerun"],
            "live": took["live"],
            "ram": TRIALS * took["ram"],
            "disk": took[FIRST] + later,
        }


def planner(setup: Setup, rounds: int) -> Iterator[Line]:
    """Train trials in every way, and compare the one that the planner takes with the best."""
    small = replace(
        setup,
        train=setup.train.take(np.arange(TRAIN)),
        validation=setup.validation.take(np.arange(VALIDATION)),
    )
    new_run(setup)
    regrets, against, told = [], [], []
    for model, depth, epochs in WORKLOADS:
        workload = _workload(small, model, depth, epochs)
        for _ in range(min(rounds, 2) + 1):
            workload.measure()
        seconds, chosen = workload.seconds(), workload.chosen
        regrets.append(seconds[chosen] / min(seconds.values()) - 1)
        against.append(seconds["rerun"] / seconds[chosen])
        told.append(
            {
                "model": model,
                "frozen": workload.frozen,
                "epochs": epochs,
                "chosen": chosen,
                "measured": seconds,
                "predicted for one": workload.predicted,
                "spent": {name: each.clock for name, each in workload.spent.items()},
            }
        )
    detail = {"workloads": told}
    chosen_for = ", ".join(f"{each['model']}/{each['frozen']}: {each['chosen']}" for each in told)
    yield Line(
        "P14",
        f"time lost against the best of all ways for {TRIALS} trials, the worst of {len(told)} "
        f"({chosen_for})",
        100 * max(regrets),
        15,
        5,
        "%",
        less=True,
        detail=detail,
    )
    yield Line("P15", "against running again, the worst of them", min(against), 0.95, 1.0)


def _workload(setup: Setup, model: str, depth: float, epochs: int) -> Workload:
    """Return trials and the way that a search would have them trained in."""
    backbone = built(setup, model, FORMAT)
    part = Part("freeze", {"depth": depth})
    recipe = {"head_first": False, "batch_size": 32}
    config = TrialConfig(Part(model), part, Part("linear"), recipe, seed=0)
    costs, room = costs_of(backbone, setup), plan.room_of("cpu")
    stages = len(backbone.stages)
    ranked = Ranked(model, precision=FORMAT, num_stages=stages, costs=costs)
    budget = Budget(time.time() + FOR_EVER, None, {model: ranked}, TRAIN, VALIDATION, room)
    frozen, work = budget.frozen(config), budget.work(config.train, epochs)
    alone = plan.choose(costs, frozen, work, room).mode
    return Workload(
        setup,
        config,
        costs,
        epochs,
        frozen,
        plan.views_for(costs, frozen, work),
        "live" if budget.together(config, epochs) > 1 else alone,
        dict(plan.predict(costs, frozen, replace(work, together=TRIALS), room)),
        {name: Spent() for name in KINDS},
    )
