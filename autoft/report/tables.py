"""Tables of a run as CSV: the leaderboard, and every prediction of the winner."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoft.data.cache.files import write_bytes_atomic
from autoft.data.cells import inert

DECIMALS = 6


def write_leaderboard(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write `leaderboard.csv`; a choice that a trial did not face is an empty cell.

    `columns` come first, then every choice by name.
    """
    others = sorted({name for row in rows for name in row} - set(columns))
    _write(path, [*columns, *others], rows)


def write_predictions(
    path: Path,
    paths: Sequence[str],
    labels: Sequence[str],
    classes: Sequence[str],
    probabilities: NDArray[np.float32],
) -> None:
    """Write one row per image: path, label, predicted class, and the probability of each class."""
    rows = [
        {
            "path": name,
            "label": label,
            "predicted": classes[int(row.argmax())],
            **{f"p_{index}": round(float(p), DECIMALS) for index, p in enumerate(row)},
        }
        for name, label, row in zip(paths, labels, probabilities, strict=True)
    ]
    columns = ["path", "label", "predicted", *(f"p_{i}" for i in range(len(classes)))]
    _write(path, columns, rows)


def write_suspects(path: Path, doubted: Sequence[tuple[str, str, str, float]]) -> None:
    """Write one row per doubted label: path, label, predicted class, confidence in the label."""
    columns = ("path", "label", "predicted", "confidence")
    rows = [
        {
            **dict(zip(columns, row[:3], strict=False)),
            "confidence": round(row[3], DECIMALS),
        }
        for row in doubted
    ]
    _write(path, columns, rows)


def _write(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {k: inert(cell) if isinstance(cell, str) else cell for k, cell in row.items()}
        writer.writerow(cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    # file names need not be UTF-8: what is not becomes an escape that stays readable
    write_bytes_atomic(path, buffer.getvalue().encode("utf-8", "backslashreplace"))
