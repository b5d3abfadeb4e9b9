"""`autoft plan`: what a search would do, and what it costs in seconds and bytes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autoft.cli.flags import SEARCH, takes
from autoft.cli.text import clean, columns, duration

if TYPE_CHECKING:
    from autoft.search.plan import Candidate, Phase, Plan, Way

EPILOG = """\
Examples:

  autoft plan --dataset sample:digits --time 2m
  autoft plan --dataset ./flowers --time 15m --weights ./weights
  autoft plan --dataset ./flowers --json

The images are decoded and the backbones are timed, which a search of the same
images finds done. No weights are fetched and nothing is trained."""

FLAGS = tuple(flag for flag in SEARCH if flag.name != "dry_run")
MEGABYTE = 1e6


@takes(FLAGS)
def plan(
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")] = False,
    **flags: Any,
) -> None:
    """Say what a search would do and what it costs; time backbones, train nothing."""
    from autoft.cli.live import LiveView
    from autoft.search.plan import make_plan
    from autoft.search.settings import read_settings

    config = flags.pop("config")
    settings = read_settings(flags, Path(config) if config else None)
    with LiveView(None) as view:
        found = make_plan(settings, view)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    _show(found)


def _show(found: Plan) -> None:
    for sentence in (*found.there, *(f"Note: {text}" for text in found.notes)):
        typer.echo(clean(sentence))
    download = sum(each.download for each in found.candidates)
    typer.echo(f"To be fetched: {_size(download) if download else 'nothing'}.")
    _table(
        "Backbones",
        ["backbone", "weights", "to fetch", "forward/s", "trained/s", "format", "whole step"],
        [_candidate(each) for each in found.candidates],
    )
    _table("Phases", ["phase", "trials", "time", "kept", "why"], list(map(_phase, found.phases)))
    best = clean(found.candidates[0].label)
    _table(
        f"Trials that freeze the first stages of {best} (whole ones: {found.epochs} epochs)",
        ["frozen", "epochs", "share", "to keep", "way", "views", "time", "again", "why"],
        [_way(each) for each in found.ways],
    )
    room = found.room
    typer.echo(
        f"May be kept: {_size(room.ram)} in memory, {_size(room.disk)} on the disk, "
        f"{_size(room.device)} on the device; read at {room.bandwidth / 1e9:.1f} GB/s."
    )


def _candidate(each: Candidate) -> list[str]:
    known, costs = each.measured, each.measured.costs
    form = "bf16" if known.precision.bf16 else "fp32"
    return [
        each.label,
        each.weights,
        f"about {_size(each.download)}" if each.download else "-",
        f"{known.images_per_second:.0f}",
        f"{known.trained_per_second:.0f}",
        form + (" channels_last" if known.precision.channels_last else ""),
        f"{1e3 * costs.tail[0]:.1f} ms/image" if costs else "-",
    ]


def _phase(each: Phase) -> list[str]:
    trials = str(each.trials) if each.trials else "-"
    kept = _size(each.bytes) if each.bytes else "-"
    return [each.name, trials, duration(each.seconds), kept, each.why]


def _way(each: Way) -> list[str]:
    return [
        f"{each.frozen}",
        f"{each.epochs}",
        f"{each.share:.0%}",
        _size(each.bytes),
        "re-run" if each.mode == "rerun" else each.mode,
        str(each.views or "-"),
        duration(each.seconds),
        duration(each.again),
        each.why,
    ]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / MEGABYTE:.1f} MB"


def _table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    """Print a table: with lines on a terminal, as plain columns anywhere else."""
    if not rows:
        return
    console = Console()
    cells = [[clean(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        typer.echo("\n".join(["", f"{title}:", *columns([heads, *cells])]))
        return
    table = Table(title=title, title_justify="left")
    for name in heads:
        table.add_column(name)
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table)
