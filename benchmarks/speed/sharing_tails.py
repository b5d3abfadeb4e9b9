"""P3, P4, P5: steps of training on what is kept against steps that run the prefix again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from statistics import median

import numpy as np
import torch
from baseline import CPU, built, step
from generated import FORMAT, job_of, prepared_trial
from goals import Line, Spent, spending

from autoft.data.views import evaluation_batches
from autoft.training.job import Setup, Sharing
from autoft.training.precision import place
from autoft.training.prefix import Shared
from autoft.values import Part, TrialConfig

# The last cut of each for P3, where small tensors cross for P4: network, frozen stages.
CUTS = (
    ("resnet18", 4, "P3", 1.8, 2.0),
    ("vit_tiny_patch16_224", 6, "P3", 1.8, 2.0),
    ("mobilenetv3_small_100", 4, "P4", 5.0, 8.0),
    ("mobilenetv3_small_100 by rows", 6, "P4", 5.0, 8.0),
    ("efficientnet_b0", 5, "P4", 3.5, 5.0),
    ("efficientnet_b0 by rows", 7, "P4", 3.5, 5.0),
)


def tails(setup: Setup, rounds: int) -> Iterator[Line]:
    """Time steps of training on what is kept against steps that run the prefix again."""
    for model, depth, goal, must, stretch in CUTS:
        yield from tail(setup, model, depth, goal, must, stretch, rounds)


def tail(
    setup: Setup, model: str, depth: int, goal: str, must: float, stretch: float, rounds: int
) -> Iterator[Line]:
    """Compare steps of one network whose first `depth` stages are frozen."""
    small = replace(setup, train=setup.train.take(np.arange(64)))
    stages = len(built(setup, model, FORMAT).stages)
    spent = {mode: Spent() for mode in ("kept", "rerun", "prefix", "tail", "scored")}
    step = _Steps(small, model, depth)
    for _ in range(rounds + 1):
        for mode, run in step.ways().items():
            with spending(spent[mode]):
                run()
    kept, rerun = median(spent["kept"].processor), median(spent["rerun"].processor)
    prefix, alone = median(spent["prefix"].processor), median(spent["tail"].processor)
    share = prefix / (prefix + median(spent["scored"].processor))
    what = f"{model}, {depth} of {stages} stages frozen, {share:.0%} of a forward pass: "
    sides = f"kept {spent['kept']} s, run again {spent['rerun']} s for {STEPS} steps"
    detail = {mode: asdict(each) for mode, each in spent.items()}
    yield Line(goal, what + sides, rerun / kept, must, stretch, detail=detail)
    ideal = (prefix + alone) / alone
    yield Line("P5", f"{model}: reached of {ideal:.2f}x", rerun / kept / ideal, 0.9, 0.97, "")


STEPS, STEP_BATCH = 4, 16


class _Steps:
    """The same steps of a tail, kept and run again, and both sides by themselves."""

    def __init__(self, setup: Setup, model: str, depth: int) -> None:
        config = TrialConfig(
            Part(model), Part("freeze", {"depth": 0.5}), Part("linear"), {"batch_size": 16}, seed=0
        )
        sharing = Sharing("disk", depth, 1)
        self.trial = prepared_trial(setup, job_of(0, config, 1, sharing), depth)
        self.shared = Shared(self.trial, sharing)
        self.read = self.shared.train_rows(0)
        self.rows = setup.train.rows[: STEPS * STEP_BATCH]
        self.images = next(
            evaluation_batches(setup.store, self.rows, self.trial.pre, len(self.rows))
        )
        self.targets = torch.eye(len(setup.classes))[
            torch.from_numpy(setup.train.labels[: len(self.rows)])
        ]
        self.held = self.read(self.rows)
        live = [p for p in self.trial.network.parameters() if p.requires_grad]
        self.trial.network.train()  # as it is told once in an epoch
        self.optimizer = torch.optim.AdamW(live, lr=0.0, fused=True)  # as trials have it

    def ways(self) -> dict[str, Callable[[], None]]:
        """Return what runs STEPS steps in each way."""
        behind = self.shared.divided.model
        return {
            "kept": lambda: self._train(behind, lambda at: self.read(self.rows[at])),
            "rerun": lambda: self._train(self.trial.network, lambda at: self.images[at]),
            "prefix": self._prefix,
            "tail": lambda: self._train(behind, lambda at: self.held[at]),
            "scored": self._score,
        }

    def _train(self, model: torch.nn.Module, given: Callable[[slice], torch.Tensor]) -> None:
        for number in range(STEPS):
            at = slice(number * STEP_BATCH, (number + 1) * STEP_BATCH)
            inputs = place(given(at), FORMAT, CPU)
            loss = torch.nn.functional.cross_entropy(model(inputs), self.targets[at])
            step(self.optimizer, loss)

    @torch.no_grad()
    def _score(self) -> None:
        for number in range(STEPS):
            at = slice(number * STEP_BATCH, (number + 1) * STEP_BATCH)
            self.shared.divided.model(self.held[at])

    def _prefix(self) -> None:
        for number in range(STEPS):
            at = slice(number * STEP_BATCH, (number + 1) * STEP_BATCH)
            self.shared.divided.through(self.images[at])
