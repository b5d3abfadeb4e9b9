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

from autoft.training.job import Report, Setup
from autoft.values import Part, TrialConfig

EPOCHS = 10  # of every trial
# Network, and how many stages the tails freeze: all but the last, as autoft divides it and finer.
SEARCHES = ((MODEL, 4), (f"{MODEL} by rows", 6))
# Of ten tails of as many epochs halving leaves three after two and one after six.
TAIL_EPOCHS = (2, 2, 2, 2, 2, 2, 2, 6, 6, 10)


def search(setup: Setup, rounds: int) -> Iterator[Line]:
    """Train 100 heads, 10 tails as halving leaves them and 1 full fine-tune, of 10 epochs."""
    for model, cut in SEARCHES:
        yield from _search(setup, model, cut, min(rounds, 3))


def _search(setup: Setup, model: str, cut: int, rounds: int) -> Iterator[Line]:
    whole, profile = Spent(), Spent()
    plain = {side: Spent() for side in ("heads", "tails", "full")}
    with steps_of_heads(EPOCHS * IMAGES // BATCH):
        for _ in range(rounds + 1):
            forget()
            new_run(setup)
            with spending(whole):
                _mixed_search(setup, model, cut, profile)
            for side, spent in plain.items():
                _plain_epoch(setup, model, cut, side, spent)
    once = {side: median(spent.processor) for side, spent in plain.items()}
    fine_tune, epochs = EPOCHS * once["full"], sum(TAIL_EPOCHS)
    sides = {
        "heads": 100 * EPOCHS * once["heads"],
        "tails": epochs * once["tails"],
        "full": fine_tune,
    }
    shared, again = median(whole.processor), sum(sides.values())
    detail = {"shared": asdict(whole), "profile": asdict(profile), "R": sides}
    stages = len(built(setup, model, FORMAT).stages)
    what = (
        f"{model}: 100 heads x 10, 10 tails behind {cut} of {stages} stages ({epochs} epochs), "
        f"1 full x 10: {whole} s, R {again:.0f} s"
    )
    yield Line("P8", what, again / shared, 8, 20, detail=detail)
    what = f"{model}: the same in full fine-tunes ({fine_tune:.1f} s)"
    yield Line("P9", what, shared / fine_tune, 2.5, 1.7, "", less=True)


def _plain_epoch(setup: Setup, model: str, cut: int, side: str, spent: Spent) -> None:
    """Time an epoch of the plain loop: of a head, a tail or everything."""
    frozen = {"heads": None, "tails": cut, "full": 0}[side]
    with (
        plain_loop(setup, model, frozen=frozen) as (backbone, head, optimizer),
        spending(spent),
    ):
        if frozen is None:
            head_epoch(backbone, head, optimizer, setup, FORMAT, BATCH)
        else:
            tail_epoch(backbone, head, optimizer, setup, FORMAT, 32, 0)


def _mixed_search(setup: Setup, model: str, cut: int, profile: Spent) -> None:
    train_all(setup, head_jobs(100, model), go_on, keep=1)
    backbone = built(setup, model, FORMAT)
    with spending(profile):
        costs = costs_of(backbone, setup)
    part = Part("freeze", {"depth": cut / len(backbone.stages)})
    for number, epochs in enumerate(TAIL_EPOCHS, start=100):
        recipe = {"lr": 1e-4 * 1.2 ** (number - 100), "batch_size": 32}
        config = TrialConfig(Part(model), part, Part("linear"), recipe, seed=0)
        job = replace(job_of(number, config, EPOCHS), costs=costs)
        train_all(setup, [job], partial(_until, epochs))
    config = TrialConfig(Part(model), Part("full"), Part("linear"), {"batch_size": 32}, seed=0)
    train_all(setup, [job_of(110, config, EPOCHS)], go_on)


def _until(epochs: int, report: Report) -> bool:
    """Stop a trial after so many of its epochs, as halving does."""
    return report.epoch < epochs
