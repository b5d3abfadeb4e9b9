"""The tables and the plot of `strategies.py`, from its lines of results."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """Of one strategy: its trials at the default and at what was chosen, by seed, and seconds."""

    default: list[Row]
    chosen: list[Row]
    seconds: float


PLOT = "freeze_depth.svg"
SMALL = 128  # pixels: larger images are of trials on all of a data set
HEAD = """# Strategies on photographs

Written by `benchmarks/quality/strategies.py`. Trained on at most {train} images of each data set at {size}
pixels with real ImageNet weights, {epochs} epochs (ants and bees {small}) in batches of 16, the head
`linear`, everything else at its default. Validation accuracy on {held} images chooses; test accuracy is that of the locked part
and chooses nothing. Two seeds: mean (and both). "Searched": the best by validation of the default and
{points} more configurations of the strategy's own parameters and the learning rate, tried with the first
seed; the chosen one is trained with the second as well. Seconds are CPU seconds of one core for one trial.
Every strategy that trains the backbone starts from a fitted head (LP-FT), `scratch` excepted. Test accuracy
on 153 to 736 images has a standard error of 3 to 1.5 points; the chosen one may be worse by it than the default.
`scratch` was not searched. All lines are in `benchmarks/quality/results/strategies.jsonl`. They were measured in
three sittings on two kinds of processors beside other work: take the seconds as rough.
"""  # noqa: E501 (lines of the page, not of code)


def write(rows: list[Row], folder: Path, points: int) -> None:
    """Write `strategies.md` and the plot into `folder`; `points` were searched beside defaults."""
    whole = [row for row in rows if "test" in row and row["image_size"] > SMALL]
    good = [row for row in rows if "test" in row and row not in whole]
    sizes = [row["n"] for row in good]
    some = good[0]
    parts = [
        HEAD.format(
            train=max(n[0] for n in sizes),
            held=max(n[1] for n in sizes),
            size=some["image_size"],
            epochs=_epochs(good, small=False),
            small=_epochs(good, small=True),
            points=points,
        )
    ]
    parts.append(_together(good))
    for dataset, backbone in _pairs(good):
        mine = [r for r in good if (r["dataset"], r["backbone"]) == (dataset, backbone)]
        parts.append(_table(dataset, backbone, mine))
    plot(good, folder / PLOT)
    parts.append(
        "## Freeze depth\n\nTest accuracy by the share of stages that `freeze` keeps frozen; 0 is "
        f"`full`, 1 is `head_only`. One seed.\n\n![freeze depth]({PLOT})\n"
    )
    parts += [_whole(whole)] if whole else []
    failed = [f"- {row['label']}: {row['error']}" for row in rows if "error" in row]
    parts += ["## Failed\n\n" + "\n".join(failed) + "\n"] if failed else []
    (folder / "strategies.md").write_text("\n".join(parts), encoding="utf-8")


def _epochs(rows: list[Row], *, small: bool) -> int:
    mine = (r for r in rows if (r["dataset"] == "hymenoptera") is small)
    return max(int(row["epochs"]) for row in mine)


def _whole(rows: list[Row]) -> str:
    """Return the table of trials on all images at full size."""
    lines = [
        "## On all images",
        "",
        "Defaults, batches of 32. Validation by epoch shows that the last epoch is not picked.",
        "",
        "| trial | images | pixels | validation by epoch | test | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        curve = ", ".join(f"{score:.3f}" for score in row["curve"])
        name, n, size = row["label"], row["n"], row["image_size"]
        lines.append(
            f"| {name} | {n[0]} + {n[1]}, {n[2]} | {size} | {curve} | **{row['test']:.3f}** | "
            f"{row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _pairs(rows: list[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["dataset"], row["backbone"]) for row in rows))


def _table(dataset: str, backbone: str, rows: list[Row]) -> str:
    n = rows[0]["n"]
    lines = [
        f"## {dataset}, {backbone}",
        "",
        f"{n[0]} to train, {n[1]} to validate, {n[2]} to test.",
        "",
        "| strategy | default: validation | test | searched: validation | test | chosen | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for strategy, own in _found(rows).items():
        cells = [
            f"`{strategy}`",
            _both(own.default, "validation"),
            _both(own.default, "test"),
            _both(own.chosen, "validation"),
            _both(own.chosen, "test"),
            _answers(own.chosen[0]) if own.chosen else "",
            f"{own.seconds:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _found(rows: list[Row]) -> dict[str, Found]:
    """Return what was found of each strategy on one data set with one backbone."""
    by_strategy: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["stage"] != "depth":
            by_strategy[row["strategy"]].append(row)
    found = {}
    for strategy, mine in by_strategy.items():
        tried = [row for row in mine if row["seed"] == 0]
        best = max(tried, key=lambda row: (row["validation"], -row["loss"]))
        searched = any(row["stage"] == "search" for row in mine)
        found[strategy] = Found(
            [row for row in mine if row["stage"] == "default"],
            [row for row in mine if searched and row["answers"] == best["answers"]],
            mean(row["seconds"] for row in mine),
        )
    return found


def _together(rows: list[Row]) -> str:
    """Return the table of means over all pairs of data set and backbone."""
    pairs = _pairs(rows)
    each = [_found([r for r in rows if (r["dataset"], r["backbone"]) == pair]) for pair in pairs]
    lines = [
        "## All together",
        "",
        f"Means over the {len(pairs)} pairs of data set and backbone below.",
        "",
        "| strategy | default: test | searched: test | s |",
        "|---|---|---|---|",
    ]
    means = []
    for strategy in dict.fromkeys(name for found in each for name in found):
        mine = [found[strategy] for found in each if strategy in found]
        default = mean(_mean(own.default) for own in mine)
        chosen = [_mean(own.chosen) for own in mine if own.chosen]
        told = f"{mean(chosen):.3f}" if len(chosen) == len(pairs) else ""
        seconds = mean(own.seconds for own in mine)
        means.append((default, f"| `{strategy}` | {default:.3f} | {told} | {seconds:.0f} |"))
    lines += [line for _, line in sorted(means, reverse=True)]
    return "\n".join(lines) + "\n"


def _mean(rows: list[Row]) -> float:
    return mean(row["test"] for row in rows)


def _both(rows: list[Row], what: str) -> str:
    values = [row[what] for row in rows]
    each = f" ({', '.join(f'{value:.3f}' for value in values)})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{each}" if values else ""


def _answers(row: Row) -> str:
    if row["stage"] == "default":
        return "default"
    return ", ".join(
        f"{name.rpartition('.')[2]} {value:.2g}"
        if isinstance(value, float)
        else f"{name.rpartition('.')[2]} {value}"
        for name, value in row["answers"].items()
    )


def plot(rows: list[Row], path: Path) -> None:
    """Draw test accuracy over freeze depth, one line for each data set and backbone."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "autoft"  # the same file for the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for dataset, backbone in _pairs(rows):
        mine = [r for r in rows if (r["dataset"], r["backbone"]) == (dataset, backbone)]
        points = {
            r["answers"].get("strategy.depth", 0.0): r["test"]
            for r in mine
            if r["stage"] == "depth"
        }
        heads = [
            r["test"] for r in mine if r["strategy"] == "head_only" and r["stage"] == "default"
        ]
        points |= {1.0: heads[0]} if heads else {}
        line = "-" if backbone.startswith("mobile") else "--"
        xs = sorted(points)
        axes.plot(xs, [points[x] for x in xs], line, marker="o", label=f"{dataset}, {backbone}")
    axes.set_xlabel("freeze depth (share of stages)")
    axes.set_ylabel("test accuracy")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)  # not over a line
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    text = path.read_text("utf-8")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", "utf-8")
