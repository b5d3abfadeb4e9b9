"""`autoft leaderboard`: the trials of a run, best first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from autoft.cli.text import clean, columns, number

if TYPE_CHECKING:
    from rich.table import Table

EPILOG = """\
Examples:

  autoft leaderboard runs/flowers --top 10
  autoft leaderboard runs/flowers --csv trials.csv

It reads what is on the disk, so it can be asked while the search is running."""

PARTS = ("backbone", "strategy", "head")
COLUMNS = ("rank", "trial", "score", "mean", *PARTS, "epochs", "seconds", "status")
LESS = ("epochs", "seconds")
WIDE = 100
"""Characters that a terminal needs to show all columns; a narrower one does without LESS."""


def leaderboard(
    run: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")],
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write all rows to FILE.")
    ] = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="Show the N best.")] = 20,
) -> None:
    """Show the finished trials of a run, best first."""
    from autoft.api import load

    found = load(run)
    rows = found.leaderboard()
    if csv_file:
        from autoft.report.tables import write_leaderboard
        from autoft.selection import leaderboard as board

        write_leaderboard(csv_file, rows, board.COLUMNS)
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
    finals = any(row["mean"] is not None for row in rows)
    told = [name for name in COLUMNS if finals or name != "mean"]
    if not sys.stdout.isatty():
        typer.echo("\n".join(columns([told, *(_cells(row, told) for row in rows)])))
        return
    from rich.console import Console

    console = Console()
    names = [name for name in told if console.width >= WIDE or name not in LESS]
    console.print(_table(rows, names))


def _table(rows: list[dict[str, Any]], names: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for name in names:
        # Where the terminal is narrow the names are folded, never the numbers.
        rigid = name not in PARTS
        justify: Literal["left", "right"] = "right" if rigid and name != "status" else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=rigid)
    for row in rows:
        table.add_row(*map(Text, _cells(row, names)))
    return table


def _cells(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [_cell(name, row[name]) for name in names]


def _cell(name: str, value: Any) -> str:
    if name in ("score", "mean"):
        return number(value)
    if name == "seconds":
        return f"{value:.1f}"
    return clean(value)
