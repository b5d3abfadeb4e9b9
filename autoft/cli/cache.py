"""`autoft cache list` and `autoft cache clear`: what autoft keeps, and how to be rid of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from autoft.cli.text import clean, columns
from autoft.errors import UsageError

if TYPE_CHECKING:
    from autoft.data.cache.entries import Entry

LIST_EPILOG = """\
Examples:

  autoft cache list
  autoft cache list --json

The cache is in the folder AUTOFT_CACHE. When it grows beyond AUTOFT_CACHE_LIMIT (such as 50GB;
by default a fifth of the disk, at most 100 GB), what was used longest ago is removed."""

CLEAR_EPILOG = """\
Examples:

  autoft cache clear --older-than 7d
  autoft cache clear --kind pixels --yes

Everything in the cache can be made again; what a running command uses is kept."""

HEADINGS = ("kind", "what", "size", "last used", "in use")
DAY = 86400.0

app = typer.Typer(help="Show and clear what autoft keeps between commands.")


@app.callback()
def _cache() -> None:
    """Show and clear what autoft keeps between commands."""


@app.command("list", epilog=LIST_EPILOG)
def list_cache(
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")] = False,
) -> None:
    """List what is kept, with its size and when it was last used."""
    from autoft.data.cache.entries import cache_limit, entries
    from autoft.data.cache.files import cache_root

    found = sorted(entries(), key=lambda entry: entry.last_used, reverse=True)
    total, limit = sum(entry.bytes for entry in found), cache_limit()
    if as_json:
        rows = [{**asdict(entry), "last_used": _when(entry)} for entry in found]
        about = {"root": clean(cache_root()), "bytes": total, "limit": limit}
        typer.echo(json.dumps({**about, "entries": rows}, indent=2))
        return
    if found:
        for line in columns([list(HEADINGS), *map(_row, found)]):
            typer.echo(line)
    typer.echo(
        f"{len(found)} entries, {size(total)} of at most {size(limit)}, in {clean(cache_root())}.",
        err=True,
    )


@app.command("clear", epilog=CLEAR_EPILOG)
def clear_cache(
    kind: Annotated[
        str | None,
        typer.Option("--kind", metavar="KIND", help="pixels, datasets, features or scans only."),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="TIME", help="Only what was not used for 7d, 12h."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", metavar="", help="Do not ask on a terminal.")
    ] = False,
) -> None:
    """Remove what is kept, except for what a running command uses."""
    from autoft.data.cache.entries import clear
    from autoft.data.cache.files import cache_root

    age = None if older_than is None else _seconds(older_than)
    what = f"{kind or 'everything'} in {clean(cache_root())}"
    if older_than:
        what += f" that was not used for {clean(older_than)}"
    if not yes and sys.stdin.isatty() and not typer.confirm(f"Remove {what}?"):
        typer.echo("Nothing was removed.")
        return
    cleared = clear(kind, age)
    typer.echo(f"{_count(cleared.removed)} removed, {_bytes(cleared.removed)} freed.")
    if cleared.kept:
        names = ", ".join(f"{entry.kind}/{clean(entry.name)}" for entry in cleared.kept)
        typer.echo(f"Kept, for a running command uses it ({_bytes(cleared.kept)}): {names}.")


def size(count: int) -> str:
    """Return a number of bytes as `512 B`, `3.4 MB` or `12.0 GB`."""
    if count < 1000:
        return f"{count} B"
    value, units = count / 1000, ["kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}"


def _row(entry: Entry) -> list[str]:
    used = _when(entry).replace("T", " ")
    return [entry.kind, clean(entry.name), size(entry.bytes), used, "yes" if entry.held else "no"]


def _when(entry: Entry) -> str:
    return datetime.fromtimestamp(entry.last_used).isoformat(timespec="seconds")


def _count(found: Sequence[Entry]) -> str:
    return "1 entry" if len(found) == 1 else f"{len(found)} entries"


def _bytes(found: Sequence[Entry]) -> str:
    return size(sum(entry.bytes for entry in found))


def _seconds(text: str) -> float:
    """Return seconds for `7d`, `12h`, `30m` or `90s`."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY, "w": 7 * DAY}
    number, unit = text.strip().lower()[:-1], text.strip().lower()[-1:]
    if not number.isdecimal() or unit not in units:
        raise UsageError(
            f"--older-than is {text!r}; expected a whole number with a unit, such as 7d, 12h, 30m."
        )
    return int(number) * units[unit]
