"""Measure what sharing is worth against a plain loop (goals P1-P5, P8-P10 and P14-P16).

    python benchmarks/speed/sharing.py [--only PART ...] [--json FILE] [--page FILE]

Baseline R is a plain loop: the frozen part runs in `no_grad` in every step, one trial after the
other, from the same decoded images. Both sides train the same configurations for the same epochs
on generated photographs with random weights (speed does not depend on them), take turns,
`--rounds` times after one that warms up, and are told in seconds of processor time: the median
and, in brackets, the least and the most. What autoft takes includes building the backbone and
making what it keeps; "cold" begins with an empty cache, "warm" with what an earlier search left.
Trials of R that differ in numbers alone are measured once or twice and multiplied, which the
table says. It wants a machine that does nothing else: the load that it found is told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from baseline import CPU, built, head_epoch, step, tail_epoch
from page import write_between
from PIL import Image
from precision import middle

from autoft.data.cache.files import cache_root
from autoft.data.views import evaluation_batches
from autoft.network.build import build
from autoft.network.sources import Source
from autoft.network.stages import stage_of_parameters
from autoft.network.strategy import bind
from autoft.search.budget import LIVE_MOST
from autoft.search.images import read_data, setup_of
from autoft.search.settings import Settings
from autoft.training import plan, probe
from autoft.training.costs import crossing_bytes, measure_costs, view_seconds
from autoft.training.job import Costs, Mode, Precision, Setup, Sharing, TrialJob
from autoft.training.precision import place
from autoft.training.prefix import Shared
from autoft.training.rowstore import Layout, find_rows, writing
from autoft.training.trial import begin, prepare, train_trials
from autoft.training.underway import Trial
from autoft.values import Backbone, Part, TrialConfig

MODEL = "mobilenetv3_small_100"
CLASSES, IMAGES, PIXELS, BATCH = 10, 256, 224, 64
HEADS, HEAD_EPOCHS = 32, 20
FORMAT = Precision(channels_last=True)
# A cut at about 75 to 80 % of the work for P3, at small tensors for P4: model and work before it.
CUTS = (
    ("resnet18", 0.77, "P3", 1.8, 2.0),
    ("vit_tiny_patch16_224", 0.76, "P3", 1.8, 2.0),
    ("mobilenetv3_small_100", 0.94, "P4", 5.0, 8.0),
    ("efficientnet_b0", 0.87, "P4", 3.5, 5.0),
)
FOR_EVER = 1e5  # seconds: no deadline


@dataclass
class Spent:
    """Seconds of the processor and by the clock of one kind of work, a number a round.

    The first round warms up and is dropped.
    """

    processor: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    warm: bool = False

    def add(self, processor: float, clock: float) -> None:
        """Take in what a round took."""
        if self.warm:
            self.processor.append(processor)
            self.clock.append(clock)
        self.warm = True

    def __str__(self) -> str:
        """Return the median of the processor's seconds, and the range."""
        return middle(self.processor, 2)


@dataclass
class Line:
    """A row of the table: a goal, what was measured, and what it had to be."""

    goal: str
    what: str
    value: float
    must: float
    stretch: float
    unit: str = "x"
    less: bool = False
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Return which of the two columns is reached."""
        reached = [
            self.value <= bound if self.less else self.value >= bound
            for bound in (self.must, self.stretch)
        ]
        return "stretch" if reached[1] else "must" if reached[0] else "**missed**"


@contextmanager
def spending(spent: Spent) -> Iterator[None]:
    """Note what the block takes of the processor and by the clock."""
    clock, processor = time.perf_counter(), time.process_time()
    yield
    spent.add(time.process_time() - processor, time.perf_counter() - clock)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    load = os.getloadavg()[0]
    found: list[Line] = []
    with tempfile.TemporaryDirectory() as folder, _own_cache(Path(folder)):
        setup = generated(Path(folder), asked.threads)
        for name in asked.only:
            for line in PARTS[name](setup, asked.rounds):
                found.append(line)
                sys.stderr.write(f"{row(line)}\n")
                tell(asked, found, load)


def tell(asked: argparse.Namespace, found: list[Line], load: float) -> None:
    """Write what was found so far."""
    about = {
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "threads": asked.threads,
        "torch": torch.__version__,
        "rounds": asked.rounds,
        "load": [round(each, 1) for each in (load, os.getloadavg()[0])],
    }
    if asked.json:
        told = about | {"lines": [asdict(each) | {"verdict": each.verdict} for each in found]}
        asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if asked.page:
        write_between(asked.page, "sharing", f"{heading(about)}\n\n{table(found)}\n")


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    before = os.environ.get("AUTOFT_CACHE")
    os.environ["AUTOFT_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ["AUTOFT_CACHE"]
        else:
            os.environ["AUTOFT_CACHE"] = before


def forget() -> None:
    """Drop what the cache keeps beside the decoded images."""
    for kind in ("features", "activations"):
        shutil.rmtree(cache_root() / kind, ignore_errors=True)


def generated(folder: Path, threads: int) -> Setup:
    """Return a setup of IMAGES training images of CLASSES classes, and half as many held out."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        place = folder / "images" / f"class-{label}"
        place.mkdir(parents=True)
        for index in range(48):
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            coarse[..., label % 3] //= 2
            image = Image.fromarray(coarse).resize(
                (PIXELS + 32, PIXELS + 32), Image.Resampling.BICUBIC
            )
            image.save(place / f"{index}.png")
    settings = Settings(dataset=str(folder / "images"), image_size=PIXELS, metric="accuracy")
    data = read_data(settings, lambda *_, **__: None)
    models = {MODEL, *(model for model, *_ in CUTS)}
    sources = {name: Source(name, "timm", {"model": name}, pretrained=False) for name in models}
    setup = replace(setup_of(settings, folder / "run", data, sources, "cpu"), threads=threads)
    every = np.arange(len(setup.train))
    return replace(
        setup, train=setup.train.take(every[:IMAGES]), validation=setup.validation.take(every[:64])
    )


# --- heads: P1, P2, P10 --------------------------------------------------------------------------


def heads(setup: Setup, rounds: int) -> Iterator[Line]:
    """Train HEADS heads for HEAD_EPOCHS epochs, cold and warm, against the plain loop."""
    cold, warm, plain, full = Spent(), Spent(), Spent(), Spent()
    steps = HEAD_EPOCHS * IMAGES // BATCH
    with _steps_of_heads(steps):
        for _ in range(rounds + 1):
            forget()
            with spending(cold):
                train_trials(setup, head_jobs(HEADS, HEAD_EPOCHS), _go_on, keep=1)
            with spending(warm):
                train_trials(setup, head_jobs(HEADS, HEAD_EPOCHS), _go_on, keep=1)
            with (
                _plain(setup, MODEL, frozen=None) as (backbone, head, optimizer),
                spending(plain),
            ):
                head_epoch(backbone, head, optimizer, setup, FORMAT, BATCH)
            with (
                _plain(setup, MODEL, frozen=0) as (backbone, head, optimizer),
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


def head_jobs(count: int, epochs: int) -> list[TrialJob]:
    """Return trials that train heads alone, each with a rate and a decay of its own."""
    shares = [index / max(count - 1, 1) for index in range(count)]
    recipes = [
        {"head_lr": 1e-4 * 300**share, "weight_decay": 1e-4 * 3000 ** (share * 7 % 1)}
        for share in shares
    ]
    configs = [
        TrialConfig(Part(MODEL), Part("head_only"), Part("linear"), recipe, seed=0)
        for recipe in recipes
    ]
    return [_job(number, config, 1) for number, config in enumerate(configs)]


@contextmanager
def _steps_of_heads(steps: int) -> Iterator[None]:
    """Have heads trained for `steps`, as the plain loop does, and not for as long as pays."""
    before = probe.EPOCHS, probe.MIN_STEPS
    probe.EPOCHS, probe.MIN_STEPS = 0, steps
    try:
        yield
    finally:
        probe.EPOCHS, probe.MIN_STEPS = before


def _job(
    number: int, config: TrialConfig, epochs: int, sharing: Sharing | None = None
) -> TrialJob:
    deadline = time.time() + FOR_EVER
    return TrialJob(number, config, epochs, deadline, FORMAT, sharing=sharing)


def _go_on(_: object) -> bool:
    return True


@contextmanager
def _plain(setup: Setup, model: str, frozen: int | None) -> Iterator[Any]:
    """Give a backbone of which `frozen` stages (None: all) are frozen, a head, an optimiser."""
    backbone = built(setup, model, FORMAT)
    stages = stage_of_parameters(backbone)
    for name, parameter in backbone.module.named_parameters():
        parameter.requires_grad_(frozen is not None and stages[name] >= frozen)
    head = torch.nn.Linear(backbone.num_features, len(setup.classes))
    live = [each for each in backbone.module.parameters() if each.requires_grad]
    yield backbone, head, torch.optim.AdamW([*live, *head.parameters()], lr=1e-4)


# --- tails: P3, P4, P5 ---------------------------------------------------------------------------


def tails(setup: Setup, rounds: int) -> Iterator[Line]:
    """Time steps of training on what is kept against steps that run the prefix again."""
    for model, wanted, goal, must, stretch in CUTS:
        yield from tail(setup, model, wanted, goal, must, stretch, rounds)


def tail(
    setup: Setup, model: str, wanted: float, goal: str, must: float, stretch: float, rounds: int
) -> Iterator[Line]:
    """Compare steps of one network at the cut that has about the `wanted` share before it."""
    small = replace(setup, train=setup.train.take(np.arange(64)))
    backbone = built(setup, model, FORMAT)
    costs = _costs(backbone, setup)
    shares = [each / costs.prefix[-1] for each in costs.prefix]
    depth = min(range(1, len(shares) - 1), key=lambda k: abs(shares[k] - wanted))
    spent = {mode: Spent() for mode in ("kept", "rerun", "prefix", "tail")}
    step = _Steps(small, model, depth)
    for _ in range(rounds + 1):
        for mode, run in step.ways().items():
            with spending(spent[mode]):
                run()
    kept, rerun = median(spent["kept"].processor), median(spent["rerun"].processor)
    prefix, alone = median(spent["prefix"].processor), median(spent["tail"].processor)
    what = f"{model}, {depth} of {len(shares) - 1} stages ({shares[depth]:.0%} of the work): "
    sides = f"kept {spent['kept']} s, run again {spent['rerun']} s for {STEPS} steps"
    detail = {mode: asdict(each) for mode, each in spent.items()}
    yield Line(goal, what + sides, rerun / kept, must, stretch, detail=detail)
    ideal = (prefix + alone) / alone
    yield Line("P5", f"{model}: reached of {ideal:.2f}x", rerun / kept / ideal, 0.9, 0.97, "")


STEPS, STEP_BATCH = 4, 16


class _Steps:
    """The same steps of a tail in four ways: kept, run again, and both sides by themselves."""

    def __init__(self, setup: Setup, model: str, depth: int) -> None:
        self.setup, self.model, self.depth = setup, model, depth
        config = TrialConfig(
            Part(model), Part("freeze", {"depth": 0.5}), Part("linear"), {"batch_size": 16}, seed=0
        )
        sharing = Sharing("disk", depth, 1)
        self.trial = prepared_trial(setup, _job(0, config, 1, sharing), depth)
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
        self.optimizer = torch.optim.AdamW(live, lr=0.0)

    def ways(self) -> dict[str, Callable[[], None]]:
        """Return what runs STEPS steps in each way."""
        behind = self.shared.divided.model
        return {
            "kept": lambda: self._train(behind, lambda at: self.read(self.rows[at])),
            "rerun": lambda: self._train(self.trial.network, lambda at: self.images[at]),
            "prefix": self._prefix,
            "tail": lambda: self._train(behind, lambda at: self.held[at]),
        }

    def _train(self, model: torch.nn.Module, given: Callable[[slice], torch.Tensor]) -> None:
        self.trial.network.train()
        for number in range(STEPS):
            at = slice(number * STEP_BATCH, (number + 1) * STEP_BATCH)
            inputs = place(given(at), FORMAT, CPU)
            loss = torch.nn.functional.cross_entropy(model(inputs), self.targets[at])
            step(self.optimizer, loss)

    def _prefix(self) -> None:
        for number in range(STEPS):
            at = slice(number * STEP_BATCH, (number + 1) * STEP_BATCH)
            self.shared.divided.through(self.images[at])


def prepared_trial(setup: Setup, job: TrialJob, depth: int) -> Trial:
    """Return a trial whose first `depth` stages are frozen, ready to train."""
    trial = prepare(setup, job, begin(setup, job), _go_on, time.monotonic())
    stages = trial.network.num_stages
    rates = [0.0] * depth + [1.0] * (stages - depth)
    trial.network.set_rates(rates, norm_mode="affine")
    return trial


def _costs(backbone: Backbone, setup: Setup) -> Costs:
    crossing, _ = crossing_bytes(backbone, setup.image_size)
    view = view_seconds(setup, backbone)
    return measure_costs(backbone, setup.image_size, CPU, FORMAT, crossing=crossing, view=view)


# --- a whole search: P8, P9 ----------------------------------------------------------------------


def search(setup: Setup, rounds: int) -> Iterator[Line]:
    """Train 100 heads, 10 tails as halving leaves them and 1 full fine-tune, of 10 epochs."""
    shared, full = Spent(), Spent()
    depth = 0.75
    plain_head, plain_tail = Spent(), Spent()
    with _steps_of_heads(10 * IMAGES // BATCH):
        for _ in range(min(rounds, 3) + 1):
            forget()
            with spending(shared):
                _mixed_search(setup, depth)
            with (
                _plain(setup, MODEL, frozen=None) as (backbone, head, optimizer),
                spending(plain_head),
            ):
                head_epoch(backbone, head, optimizer, setup, FORMAT, BATCH)
            cut_at = _frozen(setup, depth)
            with (
                _plain(setup, MODEL, frozen=cut_at) as (backbone, head, optimizer),
                spending(plain_tail),
            ):
                tail_epoch(backbone, head, optimizer, setup, FORMAT, 32, 0)
            with (
                _plain(setup, MODEL, frozen=0) as (backbone, head, optimizer),
                spending(full),
            ):
                tail_epoch(backbone, head, optimizer, setup, FORMAT, 32, 0)
    epochs_of_tails = sum(TAIL_EPOCHS)
    sides = {
        "heads": 1000 * median(plain_head.processor),
        "tails": epochs_of_tails * median(plain_tail.processor),
        "full": 10 * median(full.processor),
    }
    plain = sum(sides.values())
    detail = {"shared": asdict(shared), "R": sides, "epochs of tails": epochs_of_tails}
    trials = f"100 heads x 10, 10 tails ({epochs_of_tails} epochs), 1 full x 10"
    what = f"{trials}: {shared} s, R {plain:.0f} s"
    yield Line("P8", what, plain / median(shared.processor), 8, 20, detail=detail)
    fine_tune = 10 * median(full.processor)
    share = median(shared.processor) / fine_tune
    yield Line(
        "P9", f"the same in full fine-tunes ({fine_tune:.1f} s)", share, 2.5, 1.7, "", less=True
    )


# Of ten tails halving leaves three after two epochs and one after six.
TAIL_EPOCHS = (2, 2, 2, 2, 2, 2, 2, 6, 6, 10)


def _mixed_search(setup: Setup, depth: float) -> None:
    train_trials(setup, head_jobs(100, 10), _go_on, keep=1)
    costs = _costs(built(setup, MODEL, FORMAT), setup)
    for number, epochs in enumerate(TAIL_EPOCHS, start=100):
        recipe = {"lr": 1e-4 * 1.2 ** (number - 100), "batch_size": 32}
        part = Part("freeze", {"depth": depth})
        config = TrialConfig(Part(MODEL), part, Part("linear"), recipe, seed=0)
        train_trials(setup, [replace(_job(number, config, epochs), costs=costs)], _go_on)
    config = TrialConfig(Part(MODEL), Part("full"), Part("linear"), {"batch_size": 32}, seed=0)
    train_trials(setup, [_job(110, config, 10)], _go_on)


def _frozen(setup: Setup, depth: float) -> int:
    backbone = build(setup.sources[MODEL], pretrained=False, image_size=setup.image_size)
    return bind(Part("freeze", {"depth": depth}), len(backbone.stages)).frozen_prefix()


# --- the planner: P14, P15 -----------------------------------------------------------------------


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
        costs = _costs(backbone, small)
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
                jobs = [_job(number, config, epochs, sharing) for number in range(count)]
                with spending(each):
                    train_trials(small, jobs, _go_on)
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


# --- memory: P16 ---------------------------------------------------------------------------------


def memory(setup: Setup, _: int) -> Iterator[Line]:
    """Measure what a process that reads a store adds to its own memory."""
    rows = np.arange(4096)
    layout = Layout(((16384,),), "float16")
    values = np.zeros((512, 16384), np.float16)
    for start in range(0, len(rows), 512):
        chunk = rows[start : start + 512]
        with writing("activations", "bench", chunk, layout) as writer:
            writer.add(values)
            writer.publish()
    reader = find_rows("activations", "bench")
    assert reader is not None
    reader.read(rows[:64])
    before = _private()
    for start in range(0, len(rows), 64):
        reader.read(rows[start : start + 64])
    added = _private() - before
    size = len(rows) * layout.row_bytes
    what = f"memory of its own after reading {size / 1e6:.0f} MB: {added / 1e6:.1f} MB"
    yield Line("P16", what, 100 * max(0, added) / size, 1.0, 0.5, "%", less=True)


def _private() -> int:
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    lines = [line.split() for line in text.splitlines() if line.startswith("Private_")]
    return sum(1024 * int(words[1]) for words in lines)


# --- the page ------------------------------------------------------------------------------------


PARTS: dict[str, Callable[[Setup, int], Iterator[Line]]] = {
    "heads": heads,
    "tails": tails,
    "search": search,
    "planner": planner,
    "memory": memory,
}


def heading(about: dict[str, Any]) -> str:
    """Return what was measured where."""
    return (
        f"{about['rounds']} rounds in turns after one that warms up; {about['threads']} thread(s) "
        f"of {about['processors']} {about['machine']} cores, torch {about['torch']}. Load "
        f"{about['load'][0]} before and {about['load'][1]} after."
    )


def table(found: list[Line]) -> str:
    """Return a Markdown table, a row a goal."""
    head = ["| Goal | What | Measured | Must | Stretch | Reached |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *map(row, found)])


def row(line: Line) -> str:
    """Return a row of the table."""
    sign, unit = "<=" if line.less else ">=", f" {line.unit}" if line.unit else ""
    return (
        f"| {line.goal} | {line.what} | **{line.value:.3g}{unit}** | {sign} {line.must:g} | "
        f"{sign} {line.stretch:g} | {line.verdict} |"
    )


if __name__ == "__main__":
    main()
