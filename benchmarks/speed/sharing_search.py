"""P8, P9: a whole search, of 100 heads, 10 tails and 1 full fine-tune, against the plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from statistics import median

from baseline import built, head_epoch, tail_epoch
from generated import (
    BATCH,
    FORMAT,
    IMAGES,
    MODEL,
    costs_of,
    forget,
    go_on,
    head_jobs,
    job_of,
    new_run,
    plain_loop,
    steps_of_heads,
    train_all,
)
from goals import Line, Spent, spending

from autoft.network.build import build
from autoft.network.strategy import bind
from autoft.training.job import Report, Setup
from autoft.values import Part, TrialConfig

EPOCHS = 10  # of every trial


def search(setup: Setup, rounds: int) -> Iterator[Line]:
    """Train 100 heads, 10 tails as halving leaves them and 1 full fine-tune, of 10 epochs."""
    shared, full = Spent(), Spent()
    depth = 0.75
    plain_head, plain_tail = Spent(), Spent()
    with steps_of_heads(EPOCHS * IMAGES // BATCH):
        for _ in range(min(rounds, 3) + 1):
            forget()
            new_run(setup)
            with spending(shared):
                _mixed_search(setup, depth)
            with (
                plain_loop(setup, MODEL, frozen=None) as (backbone, head, optimizer),
                spending(plain_head),
            ):
                head_epoch(backbone, head, optimizer, setup, FORMAT, BATCH)
            cut_at = _frozen(setup, depth)
            with (
                plain_loop(setup, MODEL, frozen=cut_at) as (backbone, head, optimizer),
                spending(plain_tail),
            ):
                tail_epoch(backbone, head, optimizer, setup, FORMAT, 32, 0)
            with (
                plain_loop(setup, MODEL, frozen=0) as (backbone, head, optimizer),
                spending(full),
            ):
                tail_epoch(backbone, head, optimizer, setup, FORMAT, 32, 0)
    epochs_of_tails = sum(TAIL_EPOCHS)
    sides = {
        "heads": 100 * EPOCHS * median(plain_head.processor),
        "tails": epochs_of_tails * median(plain_tail.processor),
        "full": EPOCHS * median(full.processor),
    }
    plain = sum(sides.values())
    detail = {"shared": asdict(shared), "R": sides, "epochs of tails": epochs_of_tails}
    trials = f"100 heads x 10, 10 tails ({epochs_of_tails} epochs), 1 full x 10"
    what = f"{trials}: {shared} s, R {plain:.0f} s"
    yield Line("P8", what, plain / median(shared.processor), 8, 20, detail=detail)
    fine_tune = EPOCHS * median(full.processor)
    share = median(shared.processor) / fine_tune
    yield Line(
        "P9", f"the same in full fine-tunes ({fine_tune:.1f} s)", share, 2.5, 1.7, "", less=True
    )


# Of ten tails of as many epochs halving leaves three after two and one after six.
TAIL_EPOCHS = (2, 2, 2, 2, 2, 2, 2, 6, 6, 10)


def _mixed_search(setup: Setup, depth: float) -> None:
    train_all(setup, head_jobs(100), go_on, keep=1)
    costs = costs_of(built(setup, MODEL, FORMAT), setup)
    for number, epochs in enumerate(TAIL_EPOCHS, start=100):
        recipe = {"lr": 1e-4 * 1.2 ** (number - 100), "batch_size": 32}
        part = Part("freeze", {"depth": depth})
        config = TrialConfig(Part(MODEL), part, Part("linear"), recipe, seed=0)
        job = replace(job_of(number, config, EPOCHS), costs=costs)
        train_all(setup, [job], partial(_until, epochs))
    config = TrialConfig(Part(MODEL), Part("full"), Part("linear"), {"batch_size": 32}, seed=0)
    train_all(setup, [job_of(110, config, EPOCHS)], go_on)


def _until(epochs: int, report: Report) -> bool:
    """Stop a trial after so many of its epochs, as halving does."""
    return report.epoch < epochs


def _frozen(setup: Setup, depth: float) -> int:
    backbone = build(setup.sources[MODEL], pretrained=False, image_size=setup.image_size)
    return bind(Part("freeze", {"depth": depth}), len(backbone.stages)).frozen_prefix()
