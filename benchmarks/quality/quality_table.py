"""The tables of `search_quality.py`, from its lines of results."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import numpy as np
from lines import Row

AUTOFT = "autoft"
METHODS = {
    AUTOFT: "autoft search",
    "logistic": "logistic regression on the best backbone's features",
    "fastai": "fastai's `fine_tune`",
    "timm": "timm, layer decay",
    "optuna": "plain Optuna",
}
ELSEWHERE = {  # by AutoGluon MultiModal 1.6.3 and by logistic regression beside it
    "flowers": (0.923, 0.910, 10),
    "sign-digits": (0.990, 0.940, 10),
    "hymenoptera": (0.922, 0.948, 3),
}
NEAR = 0.01  # of the best known score: what Q3 asks the seconds to


def tables(rows: list[Row]) -> str:
    """Return all that can be said of the lines so far; a failure counts until it succeeded.

    Raises:
        ValueError: there is no line.
    """
    good = {row["label"]: row for row in rows if "error" not in row}
    if not good:
        raise ValueError("There is no line of results that succeeded; run the benchmark first.")
    parts = {
        name: [row for row in good.values() if row["part"] == name]
        for name in ("search", "same", "views")
    }
    found: list[str] = []
    for seconds in sorted({row["time"] for row in parts["search"]}, reverse=True):
        alike = [row for row in parts["search"] if row["time"] == seconds]
        found += _search(alike, seconds) if {row["method"] for row in alike} != {"optuna"} else []
    found += [reached] if (reached := _soon(parts["search"])) else []
    found += [_same(parts["same"])] if parts["same"] else []
    found += [_views(parts["views"])] if parts["views"] else []
    failed = {row["label"]: row["error"] for row in rows if row["label"] not in good}
    if failed:
        found.append("## Failed\n\n" + "\n".join(f"- {n}: {e}" for n, e in failed.items()))
    return "\n\n".join(found)


def _search(rows: list[Row], seconds: float) -> list[str]:
    check_splits(rows)
    datasets = sorted({row["dataset"] for row in rows})
    parts = [f"## In {seconds / 60:g} minutes", _beside(rows, datasets)]
    return parts + [_one(name, [r for r in rows if r["dataset"] == name]) for name in datasets]


def check_splits(rows: Sequence[Row]) -> None:
    """Refuse lines whose test parts differ.

    Raises:
        ValueError: two methods had another split of the same data set and seed.
    """
    known: dict[tuple[str, int], Row] = {}
    for row in rows:
        first = known.setdefault((row["dataset"], row["seed"]), row)
        if first["split"] != row["split"] or len(first["right"]) != len(row["right"]):
            raise ValueError(
                f"{row['label']} was scored on split {row['split']}, {first['label']} on "
                f"{first['split']}; expected the same. Measure both anew."
            )


def _beside(rows: list[Row], datasets: list[str]) -> str:
    """Return the table of all methods, and what autoft is ahead of each."""
    lines = [
        f"| test accuracy | {' | '.join(datasets)} | mean | autoft is ahead by |",
        f"|---|{'---|' * (len(datasets) + 2)}",
    ]
    told: list[str] = []
    for method, name in METHODS.items():
        mine = [row for row in rows if row["method"] == method]
        each = [[r["test"] for r in mine if r["dataset"] == dataset] for dataset in datasets]
        if not mine:
            continue
        cells = [f"{mean(values):.3f}" if values else "" for values in each]
        whole = f"**{mean(map(mean, each)):.3f}**" if all(each) else ""
        gains = _gains(rows, method)
        ahead = f"{100 * mean(g[0] for g in gains.values()):+.1f} points" if gains else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {whole} | {ahead} |")
        behind = [label for label, gain in gains.items() if gain[2] < 0]
        told += [f"behind {name} by more than the interval: {', '.join(behind)}"] if behind else []
    verdict = (
        "autoft is " + "; ".join(told) + "."
        if told
        else "autoft is behind no baseline by more than the interval of their difference."
    )
    return "\n".join(lines) + f"\n\n{verdict}"


def _gains(rows: list[Row], method: str) -> dict[str, list[float]]:
    """Return how far autoft is ahead of a method, with interval, by data set and seed."""
    mine = {(r["dataset"], r["seed"]): r for r in rows if r["method"] == AUTOFT}
    others = {(r["dataset"], r["seed"]): r for r in rows if r["method"] == method}
    if method == AUTOFT:
        return {}
    return {
        f"{key[0]} (seed {key[1]})": paired_difference(mine[key]["right"], others[key]["right"])
        for key in mine.keys() & others.keys()
    }


def _one(dataset: str, rows: list[Row]) -> str:
    n = rows[0]["n"]
    lines = [
        f"### {dataset}",
        "",
        f"{n[0]} to train, {n[1]} to validate, {n[2]} to test.",
        "",
        "| method | seed | test | interval | autoft ahead | validation | seconds | chosen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, name in METHODS.items():
        gains = _gains(rows, method)
        for row in sorted((r for r in rows if r["method"] == method), key=lambda r: r["seed"]):
            low, high = row["interval"]
            gain = gains.get(f"{dataset} (seed {row['seed']})")
            lines.append(
                f"| {name} | {row['seed']} | **{row['test']:.3f}** | {low:.3f} to {high:.3f} | "
                f"{_points(gain) if gain else ''} | {row['validation']:.3f} | "
                f"{row['seconds']:.0f} | {row['chosen']} |"
            )
    if dataset in ELSEWHERE:
        other, logistic, minutes = ELSEWHERE[dataset]
        lines += [
            "",
            f"For scale, from elsewhere, with another split (75/25) on a machine of this kind: "
            f"AutoGluon MultiModal 1.6.3 {other:.3f} in {minutes} minutes, logistic regression "
            f"{logistic:.3f}.",
        ]
    return "\n".join(lines)


def paired_difference(one: str, other: str) -> list[float]:
    """Return how much more often `one` is right, with a 95 % interval, of the same images.

    `one` and `other` have a digit for each image; the images are drawn again and again.
    """
    gains = np.array([int(a) - int(b) for a, b in zip(one, other, strict=True)])
    rng = np.random.default_rng(0)
    means = gains[rng.integers(0, len(gains), (4000, len(gains)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(gains.mean()), float(low), float(high)]


def _points(gain: Sequence[float]) -> str:
    value, low, high = (100 * each for each in gain)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def seconds_to(curve: Sequence[Sequence[float]], goal: float) -> float | None:
    """Return when a curve of [seconds, best so far] first reached `goal`; None if never."""
    return next((at for at, score in curve if score >= goal), None)


def _times(ratio: float, *, more: bool) -> str:
    """Return how many times as soon, so exact that a goal of five is not rounded to."""
    return f"{'> ' if more else ''}{ratio:.{1 if ratio >= 10 else 2}f}x"


def _soon(rows: list[Row]) -> str:
    """Return how soon autoft and plain Optuna came within a point of the best of both.

    Of each the line with the longest time counts: plain Optuna may be given more.
    """
    lines = [
        "## How soon",
        "",
        "Seconds to within 1 point of the best validation score that either reached. Both clocks "
        "start when images are decoded and backbones ranked: plain Optuna is given the ranking. "
        "By then autoft also has the features of its backbones, which it ranks by; measuring the "
        "regime is on its clock. Behind it its seconds from the start of the command.",
        "",
        "| data set | seed | best | autoft | of the command | plain Optuna | sooner |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = sorted(rows, key=lambda row: float(row["time"]))
    keys = sorted({(row["dataset"], row["seed"]) for row in rows})
    before = len(lines)
    for dataset, seed in keys:
        pair = {r["method"]: r for r in rows if (r["dataset"], r["seed"]) == (dataset, seed)}
        curves = [pair[name]["curve"] for name in (AUTOFT, "optuna") if name in pair]
        if len(curves) < 2 or not all(curves):
            continue
        best = max(curve[-1][1] for curve in curves)
        whole, other = (seconds_to(curve, best - NEAR) for curve in curves)
        ranked = pair[AUTOFT].get("ranked")  # lines of earlier versions do not have it
        own = None if whole is None or ranked is None else max(1.0, whole - ranked)
        most = pair["optuna"]["seconds"]
        ratio = "" if own is None else _times((other or most) / own, more=other is None)
        told = f"{_at(own)} | {_at(whole)} | {_at(other)} of {most:.0f}"
        lines.append(f"| {dataset} | {seed} | {best:.3f} | {told} | {ratio} |")
    return "\n".join(lines) if len(lines) > before else ""


def _at(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.0f}"


def _same(rows: list[Row]) -> str:
    lines = [
        "## The same trials",
        "",
        "The same four configurations, two heads and two tails behind three quarters of the "
        "stages, sharing as a search does, and running every frozen part "
        "again in each step; images of 128 pixels, 8 epochs, the best of each by validation. "
        "Seconds are the processor's.",
        "",
        "| data set | seed | shared: test of the best | of all | s | run again: test of the best "
        "| of all | s | best, difference in points | all, difference |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for dataset in sorted({row["dataset"] for row in rows}):
        mine = sorted((r for r in rows if r["dataset"] == dataset), key=lambda r: int(r["seed"]))
        for row in mine:
            sides = row["shared"], row["rerun"]
            cells = [
                f"{side['test']:.3f} | {mean(side['tests']):.3f} | {side['seconds']:.0f}"
                for side in sides
            ]
            lines.append(
                f"| {dataset} | {row['seed']} | {' | '.join(cells)} | "
                f"{_points(row['difference'])} | {_all_of(row):+.1f} |"
            )
        if len(mine) > 1:
            gain = 100 * mean(row["difference"][0] for row in mine)
            of_all = mean(_all_of(row) for row in mine)
            lines.append(f"| {dataset} | mean | | | | | | | **{gain:+.1f}** | {of_all:+.1f} |")
    return "\n".join(lines)


def _all_of(row: Row) -> float:
    """Return by how many points of test accuracy all trials differ, on average."""
    shared, rerun = (mean(row[side]["tests"]) for side in ("shared", "rerun"))
    return 100 * (shared - rerun)


SHOWN = ("validation", "loss", "test")  # of the arms that differ in views


def _views(rows: list[Row]) -> str:
    lines = [
        "## How many views",
        "",
        "A tail trained on so many kept views of each image, in turns; new: on new ones in every "
        "epoch, the frozen part run again. `mixup` mixes images, `manifold` what is kept of them. "
        "Means over seeds; the seconds, of the processor, hold what fills the store.",
        "",
        "Computed live, for several trials in step, it is `new` for a part of its price.",
        "",
        "| data set | backbone | cut | views | mix | validation | log-loss | test | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    keys = sorted({_arm(row) for row in rows})
    for key in keys:
        mine = [row for row in rows if _arm(row) == key]
        cells = [f"{mean(r[name] for r in mine):.3f}" for name in SHOWN]
        seconds = mean(r["seconds"] for r in mine)
        cut = f"{mine[0]['cut']} of {mine[0]['stages']}"
        lines.append(
            f"| {key[0]} | {key[1]} | {cut} | {key[4] or 'new'} | {key[3]} | "
            f"{' | '.join(cells)} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def _arm(row: Row) -> tuple[str, str, float, str, int]:
    return row["dataset"], row["backbone"], row["depth"], row["mix"], row["views"]
