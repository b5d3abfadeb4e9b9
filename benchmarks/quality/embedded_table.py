"""The tables of `embedded.py`, from its lines of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean
from typing import Any

from lines import Row

MINI, SCRATCH, IMAGENET = "autoft_mini", "scratch", "squeezenet1_0.in1k"
ROLES = (MINI, SCRATCH, IMAGENET)
NAMES = {SCRATCH: "the same, random", IMAGENET: IMAGENET}

Cell = tuple[str, str]  # data set and arm
MEASURES = {"last": "probe, last", "stages": "probe, all", "tuned": "fine-tuned"}

HEAD = """### {images} images a class

Written by `benchmarks/quality/embedded.py`; {epochs} epochs in batches of 32, {precision}. The
probes are logistic regressions on frozen features, of the last stage and of all stages together
(of the random network with its norms set to these images). Fine-tuned: validation accuracy of the
first seed, by which the rate was chosen, and test accuracy, mean (and each seed). Test accuracy
chose nothing. Seconds are those of one core for one fine-tune. "edge": the best rate was the least
or the largest that was tried.
"""


def best_rate(rows: Iterable[Row]) -> float | None:
    """Return the learning rate that was best by validation with the first seed, if there is one.

    Of equal accuracies the lower log-loss wins.
    """
    tried = [row for row in rows if row["rate"] is not None and row["seed"] == 0]
    good = [row for row in tried if "error" not in row]
    best = max(good, key=lambda row: (row["validation"], -row["loss"]), default=None)
    return None if best is None else float(best["rate"])


def tables(rows: list[Row]) -> str:
    """Return Markdown: for every number of images a table of the arms, and what lies between them.

    Raises:
        ValueError: nothing was measured.
    """
    # A label that was tried again counts by its last line.
    latest = {row["label"]: row for row in rows}
    good = [row for row in latest.values() if "error" not in row]
    failed = [f"- {row['label']}: {row['error']}" for row in latest.values() if "error" in row]
    if not good:
        raise ValueError("The results hold no trial that went well; run the benchmark first.")
    good.sort(key=lambda row: (row["dataset"], ROLES.index(row["role"]), row["arm"]))
    parts = []
    for images in sorted({row["images"] for row in good}, reverse=True):
        mine = [row for row in good if row["images"] == images]
        parts += [_head(mine, images), _counts(mine), _table(mine), *_differences(mine)]
    return "\n".join([*parts, *(["Failed:\n", *failed] if failed else [])])


def _head(rows: list[Row], images: int) -> str:
    tuned = [row for row in rows if row["rate"] is not None]
    epochs = " or ".join(map(str, sorted({row["epochs"] for row in tuned}))) or "no"
    formats = " and ".join(sorted({row["precision"] for row in tuned})) or "no fine-tune yet"
    return HEAD.format(images=images, epochs=epochs, precision=formats)


def _counts(rows: list[Row]) -> str:
    """Return how many images and classes the data sets have."""
    lines = [
        "| data set | classes | train | validation | test | pixels |",
        "|---|---|---|---|---|---|",
    ]
    for dataset in _unique(row["dataset"] for row in rows):
        tuned = [row for row in rows if row["dataset"] == dataset and row["rate"] is not None]
        for row in tuned[:1]:
            cells = [dataset, row["classes"], *row["n"], row["image_size"]]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> str:
    lines = [
        "| data set | arm | probe, last | probe, all | fine-tuned: validation | test | rate | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for dataset, arm in _unique((row["dataset"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["dataset"], row["arm"]) == (dataset, arm)]
        cells = [dataset, NAMES.get(arm, arm), *_probe_cells(mine), *_tuned_cells(mine)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _probe_cells(mine: list[Row]) -> list[str]:
    found = next((row for row in mine if row["rate"] is None), None)
    return [f"{found[kind]:.3f}" if found else "" for kind in ("last", "stages")]


def _tuned_cells(mine: list[Row]) -> list[str]:
    chosen = _chosen(mine)
    if not chosen:
        return [""] * 4
    tried = [row["rate"] for row in mine if row["rate"] is not None and row["seed"] == 0]
    rate = chosen[0]["rate"]
    edge = " (edge)" if len(tried) > 1 and rate in (min(tried), max(tried)) else ""
    tests = [row["test"] for row in chosen]
    each = f" ({', '.join(f'{test:.3f}' for test in tests)})" if len(tests) > 1 else ""
    return [
        f"{chosen[0]['validation']:.3f}",
        f"**{mean(tests):.3f}**{each}",
        f"{rate:g}{edge}",
        f"{mean(row['seconds'] for row in chosen):.0f}",
    ]


def _chosen(mine: list[Row]) -> list[Row]:
    """Return the fine-tunes at the chosen rate, one a seed, first seed first."""
    rate = best_rate(mine)
    chosen = [row for row in mine if row["rate"] == rate and rate is not None]
    return sorted(chosen, key=lambda row: int(row["seed"]))


def _value(mine: list[Row], kind: str) -> float | None:
    """Return test accuracy: of a probe, or the mean over the seeds of the fine-tune."""
    if kind == "tuned":
        tests = [row["test"] for row in _chosen(mine)]
        return mean(tests) if tests else None
    return next((float(row[kind]) for row in mine if row["rate"] is None), None)


def _differences(rows: list[Row]) -> list[str]:
    """Return a table and a sentence for every set of embedded weights."""
    cells: dict[Cell, list[Row]] = {}
    for row in rows:
        cells.setdefault((row["dataset"], row["arm"]), []).append(row)
    datasets = _unique(row["dataset"] for row in rows)
    parts = []
    for arm in _unique(row["arm"] for row in rows if row["role"] == MINI):

        def gap(dataset: str, more: str, less: str, kind: str) -> float | None:
            values = [_value(cells.get((dataset, each), []), kind) for each in (more, less)]
            return None if None in values else 100 * (values[0] - values[1])  # type: ignore[operator]

        sides = [(arm, SCRATCH), (IMAGENET, arm)]
        parts.append(_gaps(datasets, sides, gap))
        parts.append(_statement(datasets, arm, gap))
    return parts


Gap = Callable[[str, str, str, str], float | None]


def _gaps(datasets: list[str], sides: list[tuple[str, str]], gap: Gap) -> str:
    heads = [
        f"{NAMES.get(more, more)} - {NAMES.get(less, less)}: {kind}"
        for more, less in sides
        for kind in MEASURES.values()
    ]
    lines = [
        f"| points of test accuracy | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for dataset in datasets:
        cells = [_points(gap(dataset, *side, kind)) for side in sides for kind in MEASURES]
        lines.append(f"| {dataset} | {' | '.join(cells)} |")
    means = [_points(_mean(datasets, side, kind, gap)) for side in sides for kind in MEASURES]
    lines.append(f"| **mean** | {' | '.join(means)} |")
    return "\n".join(lines) + "\n"


def _statement(datasets: list[str], arm: str, gap: Gap) -> str:
    """Say in a sentence what fine-tunes give; nothing where they are not measured."""
    against = [gap(dataset, arm, SCRATCH, "tuned") for dataset in datasets]
    known = [value for value in against if value is not None]
    if not known:
        return ""
    ahead = sum(value > 0 for value in known)
    text = (
        f"Fine-tuned, `{arm}` is ahead of the same network from random weights on {ahead} of "
        f"{len(known)} data sets; the mean difference is {_points(mean(known))} points (least "
        f"{_points(min(known))}, most {_points(max(known))})."
    )
    behind = _mean(datasets, (IMAGENET, arm), "tuned", gap)
    if behind is not None:
        text += f" That of `{IMAGENET}` to it is {_points(behind)} points."
    return text + "\n"


def _mean(datasets: list[str], side: tuple[str, str], kind: str, gap: Gap) -> float | None:
    values = [gap(dataset, *side, kind) for dataset in datasets]
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
