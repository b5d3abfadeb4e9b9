"""Results as lines of JSON: measured side by side, appended one by one, gone on with later."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TOLD = ("label", "test", "seconds", "error")
TASKS = 20  # of a process, which is then replaced: what libraries keep does not pile up


def rows_of(path: Path) -> list[Row]:
    """Return the lines of results that there are."""
    text = path.read_text("utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def measure_all(
    stages: Iterable[str],
    specs_of: Callable[[str, list[Row]], Iterable[Row]],
    measure: Callable[[Row], Row],
    results: Path,
    *,
    only: str,
    jobs: int,
    minutes: float,
) -> None:
    """Measure what each stage wants after the lines so far, in `jobs` processes; append it.

    `measure` is a module's function, or `partial` of one: it goes to other processes. Specs whose
    label does not hold `only` are left out. After `minutes` no further line is waited for.
    """
    until = time.time() + 60 * minutes
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=TASKS) as pool:
        for stage in stages:
            specs = [spec for spec in specs_of(stage, rows_of(results)) if only in spec["label"]]
            for row in pool.imap_unordered(partial(_guarded, measure), specs):
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                sys.stderr.write(f"{ {name: row[name] for name in TOLD if name in row} }\n")
                if time.time() > until:
                    pool.terminate()
                    return


def _guarded(measure: Callable[[Row], Row], spec: Row) -> Row:
    try:
        return spec | measure(spec)
    except Exception as error:  # noqa: BLE001 - one trial must not end the others
        return spec | {"error": f"{type(error).__name__}: {error}"}
