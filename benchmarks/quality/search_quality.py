"""What a search reaches beside fair baselines in the same wall time, and what sharing changes.

Three parts, one line of results for each piece, appended, so that the same command goes on where
it was stopped:

- `search`: `autoft search` as a user runs it, and four baselines, on each data set and seed,
  one at a time on all cores (the other parts may run side by side, with `--jobs`). All have the
  same split; each is scored on the locked test part once.
- `same`: the same list of configurations, with what is shared and with everything run again.
- `views`: tails on 1 to 8 kept views of each image, and on new ones in every epoch.

    python benchmarks/quality/search_quality.py --data DIR --weights DIR --results F.jsonl
    python benchmarks/quality/search_quality.py --results F.jsonl --table docs/results/quality.md

The second writes the tables between two marks in the page.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what all benchmarks share

from lines import Row, measure_all, rows_of
from quality_table import METHODS, tables

from autoft.search.settings import parse_time

if TYPE_CHECKING:
    from given import Given

DATASETS = ("hymenoptera", "sign-digits", "flowers")
PARTS = ("search", "same", "views")
VIEWS = (
    (0, "none"),
    (1, "none"),
    (2, "none"),
    (4, "none"),
    (8, "none"),
    (0, "mixup"),
    (4, "manifold"),
)
DEPTHS = (0.75,)
VIEWED = ("sign-digits",)
SAME = ("flowers", "sign-digits")
BACKBONES = ("mobilenetv2_100.in1k", "squeezenet1_0.in1k")
AFTER_RANKING = ("profile", "search")  # phases, whichever is first
OVER = 2.0  # times the time given, and a minute: a search that takes longer is ended


def main() -> None:
    """Run what is missing, or write the tables."""
    parser = _parser()
    options = parser.parse_args()
    if options.table:
        from page import write_between

        write_between(options.table, "quality", tables(rows_of(options.results)))
        return
    if not options.data or not options.weights:
        parser.error("--data and --weights are needed: the folders of data sets and weights")
    if options.jobs > 1 and "search" in options.parts.split(","):
        parser.error("--jobs is for the other parts: a search has the machine for itself")
    measure_all(
        options.parts.split(","),
        partial(specs_of, options=options),
        partial(_measure, options),
        options.results,
        only=options.only,
        jobs=options.jobs,
        minutes=options.minutes,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder that holds the data sets")
    parser.add_argument("--weights", type=Path, help="folder that holds the weights")
    parser.add_argument("--results", type=Path, required=True, help="lines of results")
    parser.add_argument("--table", type=Path, help="page to write the tables into")
    parser.add_argument("--time", type=parse_time, default=600.0, help="of each method [10m]")
    parser.add_argument("--datasets", default=",".join(DATASETS))
    parser.add_argument("--methods", default=",".join(METHODS), help="of the part search")
    parser.add_argument("--parts", default=",".join(PARTS), help="only these, in this order")
    parser.add_argument("--seeds", default="0", help="of the split as well: 0,1,2")
    parser.add_argument("--size", type=int, default=224, help="pixels of fine_tune and timm")
    parser.add_argument("--backbone", default=BACKBONES[0], help="the one with the best prior")
    parser.add_argument("--only", default="", help="only the lines whose label holds this")
    parser.add_argument("--jobs", type=int, default=1, help="lines at once, of a thread each")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing after these")
    parser.add_argument("--runs", type=Path, help="folder to keep the run folders of autoft in")
    return parser


def specs_of(part: str, rows: list[Row], options: argparse.Namespace) -> Iterator[Row]:
    """Yield what a part still has to measure; what failed is tried again."""
    done = {row["label"] for row in rows if "error" not in row}
    datasets = options.datasets.split(",")
    for seed in map(int, options.seeds.split(",")):
        for dataset in datasets:
            for more in _wanted(part, dataset, options):
                spec = {"part": part, "dataset": dataset, **more, "seed": seed}
                label = "/".join(str(value) for value in spec.values())
                if label not in done:
                    yield {"label": label, **spec}


def _wanted(part: str, dataset: str, options: argparse.Namespace) -> Iterator[Row]:
    if part == "search":
        yield from (
            {"method": method, "time": options.time} for method in options.methods.split(",")
        )
    elif part == "same" and dataset in SAME:
        yield {"backbone": options.backbone}
    elif part == "views" and dataset in VIEWED:
        for backbone in BACKBONES:
            for depth in DEPTHS:
                for count, mix in VIEWS:
                    yield {"backbone": backbone, "depth": depth, "views": count, "mix": mix}


def _measure(options: argparse.Namespace, spec: Row) -> Row:
    from given import Given

    from autoft.training.heap import settle

    settle()  # the baselines compute as fast as workers of autoft do
    given = Given(
        options.data,
        options.weights,
        options.time,
        options.size,
        options.backbone,
        0 if options.jobs == 1 else 1,
    )
    with tempfile.TemporaryDirectory() as folder:
        row = measure(given, spec, Path(folder))
        if options.runs and (run := Path(folder, "run")).is_dir():
            shutil.copytree(run, options.runs / spec["label"].replace("/", "-"))
        return row


def measure(given: Given, spec: Row, folder: Path) -> Row:
    """Return what one line of results says."""
    dataset, seed = spec["dataset"], spec["seed"]
    if spec["part"] == "same":
        from same_trials import same_trials

        return same_trials(given, dataset, seed, folder)
    if spec["part"] == "views":
        from same_trials import views

        return views(given, spec, folder)
    if spec["method"] == "autoft":
        return searched(given, dataset, seed, folder)
    if spec["method"] == "logistic":
        from logistic_best import logistic_best

        return logistic_best(given, dataset, seed, folder)
    if spec["method"] == "optuna":
        from plain_optuna import plain_optuna

        return plain_optuna(given, dataset, seed, folder)
    return _recipe(given, spec, folder)


def _recipe(given: Given, spec: Row, folder: Path) -> Row:
    from given import UPRIGHT, open_task, own_cache
    from recipes import fine_tune, layer_decay

    train = {"fastai": fine_tune, "timm": layer_decay}[spec["method"]]
    with own_cache(folder / "cache"):
        task = open_task(given, spec["dataset"], spec["seed"], folder, given.size)
        return train(given, task, spec["seed"], flips=spec["dataset"] not in UPRIGHT)


# --- autoft itself -------------------------------------------------------------------------------


def searched(given: Given, dataset: str, seed: int, folder: Path) -> Row:
    """Run `autoft search` with an empty cache and return what its run folder says.

    The seconds are of the whole command: its start, decoding, ranking, trials and exports.
    """
    run = folder / "run"
    words = {
        "dataset": given.data / dataset,
        "weights": given.weights,
        "time": f"{given.seconds:g}s",
        "out": run,
        "seed": seed,
        "metric": "accuracy",
    }
    command = [sys.executable, "-m", "autoft", "search", "--offline"]
    command += [text for name, value in words.items() for text in (f"--{name}", str(value))]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AUTOFT_")}
    began = time.monotonic()
    done = subprocess.run(
        command,
        env=kept | {"AUTOFT_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=OVER * given.seconds + 60,
        check=False,
    )
    seconds = time.monotonic() - began
    if done.returncode:
        return {"error": f"exit code {done.returncode}: {done.stderr.strip()[-500:]}"}
    return {"seconds": round(seconds, 1)} | read_run(run)


def read_run(run: Path) -> Row:
    """Return what a run folder says, in the words of the other methods."""
    from given import rights

    result = json.loads((run / "result.json").read_text("utf-8"))
    test, winner = result["test"], result["winner"]
    paths, known = _predictions(run / "predictions" / "test.csv")
    return {
        "test": test["value"],
        "interval": [test["low"], test["high"]],
        "right": rights(paths, known),
        "n": _counts(run, test["n"]),
        "classes": len(result["classes"]),
        "split": result["split"],
        "validation": result["score"],
        "chosen": f"{winner['backbone']}, {winner['strategy']}, {winner['head']}",
        "answers": winner["params"],
        "trials": result["trials"],
        "curve": curve_of(run / "events.jsonl"),
        "ranked": ranked_at(run / "events.jsonl"),
        "probe": result["baseline"],
    }


def _predictions(path: Path) -> tuple[list[str], list[bool]]:
    import csv

    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["path"] for row in rows], [row["label"] == row["predicted"] for row in rows]


def _counts(run: Path, test: int) -> list[int]:
    scans = [event for event in rows_of(run / "events.jsonl") if event["kind"] == "scan"]
    return [scans[-1]["train"], scans[-1]["validation"], test] if scans else [0, 0, test]


def curve_of(events: Path) -> list[list[float]]:
    """Return [seconds, best validation score so far] wherever it rose, from epochs and ends.

    What scored a trial again on another fold does not count.
    """
    best, curve, again = -1.0, list[list[float]](), set[int]()
    for event in rows_of(events):
        score = event.get("score")
        again |= {event["number"]} if "of" in event else set()
        counts = event["kind"] in ("epoch", "trial_end") and event["number"] not in again
        if counts and score is not None and score > best:
            best = score
            curve.append([event["at"], best])
    return curve


def ranked_at(events: Path) -> float:
    """Return the seconds at which images were decoded and backbones ranked."""
    phases = (each for each in rows_of(events) if each["kind"] == "phase")
    return next(each["at"] for each in phases if each["name"] in AFTER_RANKING)


if __name__ == "__main__":
    main()
