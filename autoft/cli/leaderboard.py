"""`autoft leaderboard`: the trials of a run, best first."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from autoft.cli.text import clean, columns, number

EPILOG = """\
Examples:

  autoft leaderboard runs/flowers --top 10
  autoft leaderboard runs/flowers --csv trials.csv

It reads what is on the disk, so it can be asked while the search is running."""

COLUMNS = ("rank", "trial", "score", "backbone", "strategy", "head", "epochs", "seconds", "status")


def leaderboard(
    run: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")],
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write all rows to FILE.")
    ] = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="Show the N best.")] = 20,
) -> None:
    """Show the finished trials of a run, best first."""
    from autoft.api import load

    rows = load(run).leaderboard()
    if csv_file:
        _write(rows, csv_file)
        typer.echo(f"{len(rows)} trials written to {clean(csv_file)}.")
        return
    if not rows:
        typer.echo("No trial has finished yet.")
        return
    show(rows[:top])
    if len(rows) > top:
        typer.echo(f"{len(rows) - top} more: --top {len(rows)} shows all.")


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table on a terminal, as aligned plain columns elsewhere."""
    cells = [[_cell(name, row[name]) for name in COLUMNS] for row in rows]
    if not sys.stdout.isatty():
        typer.echo("\n".join(columns([list(COLUMNS), *cells])))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    for name in COLUMNS:
        right = name in ("rank", "trial", "score", "epochs", "seconds")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for line in cells:
        table.add_row(*map(Text, line))
    Console().print(table)


def _cell(name: str, value: Any) -> str:
    if name == "score":
        return number(value)
    return "-" if value is None else clean(value)


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    from autoft.data.cache import write_bytes_atomic

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes_atomic(path, text.getvalue().encode())
