"""P1, P2, P10: many heads together against the plain loop, cold and warm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from statistics import median

from baseline import head_epoch, tail_epoch
from generated import (
    BATCH,
    FORMAT,
    IMAGES,
    MODEL,
    forget,
    go_on,
    head_jobs,
    new_run,
    plain_loop,
    steps_of_heads,
    train_all,
)
from goals import Line, Spent, spending

from autoft.training.job import Setup

HEADS, HEAD_EPOCHS = 32, 20


def heads(setup: Setup, rounds: int) -> Iterator[Line]:
    """Train HEADS heads for HEAD_EPOCHS epochs, cold and warm, against the plain loop."""
    cold, warm, plain, full = Spent(), Spent(), Spent(), Spent()
    steps = HEAD_EPOCHS * IMAGES // BATCH
    with steps_of_heads(steps):
        for _ in range(rounds + 1):
            forget()
            for spent in (cold, warm):
                new_run(setup)
                with spending(spent):
                    train_all(setup, head_jobs(HEADS), go_on, keep=1)
            with (
                plain_loop(setup, MODEL, frozen=None) as (backbone, head, optimizer),
                spending(plain),
            ):
                head_epoch(backbone, head, optimizer, setup, FORMAT, BATCH)
            with (
                plain_loop(setup, MODEL, frozen=0) as (backbone, head, optimizer),
                spending(full),
            ):
                tail_epoch(backbone, head, optimizer, setup, FORMAT, 32, 0)
    whole = median(plain.processor) * HEADS * HEAD_EPOCHS
    detail = {
        "model": MODEL,
        "cold": asdict(cold),
        "warm": asdict(warm),
        "R, an epoch of one head": asdict(plain),
        "an epoch of a full fine-tune": asdict(full),
    }
    what = f"{HEADS} heads x {HEAD_EPOCHS} epochs, {MODEL}, {IMAGES} images"
    sides = f"cold {cold} s, R {whole:.0f} s ({HEADS * HEAD_EPOCHS} x {plain} s)"
    yield Line("P1", f"{what}: {sides}", whole / median(cold.processor), 150, 400, detail=detail)
    share = median(cold.processor) / median(full.processor)
    yield Line("P2", f"the same in full epochs ({full} s)", share, 0.5, 0.3, "epochs", less=True)
    again = median(cold.processor) / median(warm.processor)
    yield Line("P10", f"the same with a warm cache: {warm} s", again, 5, 8)
