"""What the weights of `autoft_mini` are worth: against none, and against weights of ImageNet.

For each data set and arm: logistic probes on frozen features, of the last stage and of all, and a
fine-tune. Its learning rate is the best of a grid by validation accuracy with the first seed; that
one is trained with the second seed as well. Test accuracy chooses nothing. Images, epochs, batches
and augmentation are the same in all arms. Seconds are of one core. Results are appended line by
line, so that the same command goes on where it was stopped.

    python benchmarks/quality/embedded.py --data DIR --weights DIR --results FILE.jsonl
    python benchmarks/quality/embedded.py --results FILE.jsonl --table docs/results/embedded.md
    python benchmarks/quality/embedded.py --data DIR --quick [--mini FILE] [--arm scratch]

The second writes the tables between two marks in the page. The third judges weights (a file in
place of the package's) in a minute and prints a line of JSON: few images, one rate. It leaves the
locked test parts alone, so that weights may be chosen by it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # trials side by side, one on each core
sys.path.append(str(Path(__file__).resolve().parents[1]))  # what all benchmarks share

from embedded_table import IMAGENET, MINI, SCRATCH, best_rate, tables
from lines import Row, measure_all, rows_of

if TYPE_CHECKING:
    from embedded_arms import Given

DATASETS = ("sign-digits", "flowers", "hymenoptera", "sample:digits")
SEEDS = (0, 1)
GRIDS = {
    MINI: (1e-3, 2e-3, 3e-3),
    SCRATCH: (1e-3, 2e-3, 3e-3),
    IMAGENET: (3e-4, 1e-3),
}
QUICK_RATES = {MINI: 2e-3, SCRATCH: 2e-3, IMAGENET: 3e-4}
STAGES = ("probe", "grid", "chosen")
IMAGES, EPOCHS = 100, 15  # of a class; over all of them
QUICK_IMAGES, QUICK_EPOCHS = 40, 16


def main() -> None:
    """Run what is missing, judge weights quickly, or write the tables."""
    parser = _parser()
    options = parser.parse_args()
    if not options.quick and not options.results:
        parser.error("--results is missing: the file that holds, or is to hold, the results")
    if not options.table and not options.data:
        parser.error("--data is missing: the folder that holds the data sets")
    if options.quick:
        _quick(options)
    elif options.table:
        from page import write_between

        write_between(options.table, "quality", tables(rows_of(options.results)))
    else:
        _run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--weights", type=Path, default=Path(), help="folder of the weights")
    parser.add_argument("--results", type=Path, help="lines of results")
    parser.add_argument("--table", type=Path, help="page to write the tables into")
    parser.add_argument("--quick", action="store_true", help="judge weights in a minute")
    parser.add_argument("--arm", default=MINI, choices=GRIDS, help="of --quick")
    parser.add_argument("--seed", type=int, default=0, help="of --quick")
    parser.add_argument("--mini", default="", help="file of weights, in place of the package's")
    parser.add_argument("--label", default="", help="what to call them [the name of the file]")
    parser.add_argument(
        "--fix", default="", help="answers for trials with them: norm_mode=train,l2sp=0.01"
    )
    parser.add_argument("--rates", default="", help="for autoft_mini and scratch: 1e-3,2e-3")
    parser.add_argument("--images", type=int, help="of a class to train on, at most")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--bf16", action="store_true", help="train in bf16")
    parser.add_argument("--only", default="", help="only the trials whose label holds this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--threads", type=int, default=1, help="of each job")
    parser.add_argument("--minutes", type=float, default=240.0)
    return parser


def _given(options: argparse.Namespace, images: int, epochs: int) -> Given:
    from embedded_arms import Given

    return Given(
        data=options.data,
        weights=options.weights,
        images=options.images or images,
        epochs=options.epochs or epochs,
        mini=options.mini,
        fixed=dict(_answer(text) for text in options.fix.split(",") if text),
        threads=options.threads,
        bf16=options.bf16,
    )


def _answer(text: str) -> tuple[str, Any]:
    """Read `name=value`: a number or a truth value where it is one, else words."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _label(options: argparse.Namespace) -> str:
    """Return what the arm of the embedded weights is called."""
    name = options.label or Path(options.mini).stem or MINI
    return f"{name}+{options.fix}" if options.fix else name


def _grid(options: argparse.Namespace, role: str) -> tuple[float, ...]:
    if options.rates and role != IMAGENET:
        return tuple(map(float, options.rates.split(",")))
    return GRIDS[role]


def _quick(options: argparse.Namespace) -> None:
    from embedded_arms import quick

    given = _given(options, QUICK_IMAGES, QUICK_EPOCHS)
    role, own = options.arm, _label(options)
    rate = _grid(options, role)[0] if options.rates else QUICK_RATES[role]
    told = {"label": own if role == MINI else role, "seed": options.seed, "rate": rate}
    sys.stdout.write(json.dumps(told | quick(given, role, rate, options.seed)) + "\n")


def _run(options: argparse.Namespace) -> None:
    """Measure what is missing, side by side, and append it."""
    measure_all(
        STAGES,
        partial(specs_of, options=options),
        partial(_measure, options),
        options.results,
        only=options.only,
        jobs=options.jobs,
        minutes=options.minutes,
    )


def specs_of(stage: str, rows: list[Row], options: argparse.Namespace) -> Iterator[Row]:
    """Yield what a stage still has to measure; what failed is tried again."""
    images = options.images or IMAGES
    done = {row["label"] for row in rows if "error" not in row}
    for dataset in DATASETS:
        for role in GRIDS:
            arm = _label(options) if role == MINI else role
            prefix = f"{dataset}/{arm}/{images}"
            grid = _grid(options, role)
            for rate, seed in _wanted(stage, grid, [r for r in rows if r["prefix"] == prefix]):
                label = f"{prefix}/{'probe' if rate is None else f'lr{rate:g}'}/{seed}"
                if label not in done:
                    yield {
                        "label": label,
                        "prefix": prefix,
                        "dataset": dataset,
                        "arm": arm,
                        "role": role,
                        "images": images,
                        "rate": rate,
                        "seed": seed,
                    }


def _wanted(
    stage: str, grid: tuple[float, ...], mine: list[Row]
) -> Iterator[tuple[float | None, int]]:
    """Yield rates (None: a probe) and seeds; the second seed goes to the rate that was best."""
    if stage == "probe":
        yield None, SEEDS[0]
    elif stage == "grid":
        yield from ((rate, SEEDS[0]) for rate in grid)
    else:
        chosen = best_rate(mine)
        yield from [] if chosen is None else [(chosen, seed) for seed in SEEDS[1:]]


def _measure(options: argparse.Namespace, spec: Row) -> Row:
    from embedded_arms import measure

    with tempfile.TemporaryDirectory() as folder:
        return measure(_given(options, IMAGES, EPOCHS), spec, Path(folder))


if __name__ == "__main__":
    main()
