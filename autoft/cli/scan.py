"""`autoft data scan`: what a dataset holds, and what of it cannot be used and why."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from autoft.cli.flags import READING, takes
from autoft.cli.reading import read
from autoft.cli.text import clean, columns

EPILOG = """\
Examples:

  autoft data scan ./flowers
  autoft data scan labels.csv --near-dup 6
  autoft data scan flowers.zip --max-bad 1 --json

Every file is decoded once; a search of the same images finds them decoded.
The exit code is 3 where a search would refuse the images, or could not split
them."""

SHOWN = 20  # lines of each kind
KINDS = (
    ("excluded", "left out", "because"),
    ("duplicate_files", "same bytes as", "an earlier image"),
    ("conflicting_files", "same bytes, other label", "labelled"),
    ("near_duplicate_files", "looks like", "an earlier image"),
)


@takes(READING)
def scan(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The dataset, as for --dataset.")],
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")] = False,
    **flags: Any,
) -> None:
    """Decode every image once; count, and name what cannot be used and why."""
    from autoft.data import doctor
    from autoft.data.splits.split import make_split

    dataset = read(path, flags)
    known = doctor.report(dataset.catalog) | {"image_size": dataset.image_size}
    if as_json:
        typer.echo(json.dumps(known, indent=2))
    else:
        _show(known)
    make_split(dataset.catalog, seed=0, allow_leak=bool(flags["allow_leak"]))


def _show(known: dict[str, Any]) -> None:
    from autoft.data import doctor

    typer.echo(doctor.headline(known))
    for line in (*_classes(known), *_noticed(known), *_files(known)):
        typer.echo(clean(line))
    for sentence in doctor.warnings(known):
        typer.echo(clean(f"warning: {sentence}"))


def _classes(known: dict[str, Any]) -> list[str]:
    ordered = sorted(known["classes"].items(), key=lambda pair: (-pair[1], pair[0]))
    rows = [[clean(name), f"{count:,}"] for name, count in ordered[:SHOWN]]
    return ["", *columns([["class", "images"], *rows]), *_more(len(ordered))]


def _noticed(known: dict[str, Any]) -> list[str]:
    if not known["noticed"]:
        return []
    rows = [[words, f"{count:,}"] for words, count in sorted(known["noticed"].items())]
    return ["", *columns([["noticed", "files"], *rows])]


def _files(known: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for kind, first, second in KINDS:
        if entries := known[kind]:
            rows = [[clean(cell) for cell in entry] for entry in entries[:SHOWN]]
            heads = [first, second, *(["bits"] if len(entries[0]) == 3 else [])]
            lines += ["", *columns([heads, *rows]), *_more(len(entries))]
    return lines


def _more(count: int) -> list[str]:
    return [f"... and {count - SHOWN:,} more (--json lists them)"] if count > SHOWN else []
