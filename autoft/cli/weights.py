"""`autoft weights`: which weights are here, under which licence; fetch, verify and pack them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoft.cli.cache import size
from autoft.cli.flags import SEARCH, takes
from autoft.cli.text import clean, columns
from autoft.errors import DataError

if TYPE_CHECKING:
    from autoft.cli.live import LiveView
    from autoft.search.engines.weighing import Listed, Verified
    from autoft.search.settings import Settings

LIST_EPILOG = """\
Examples:

  autoft weights list
  autoft weights list --weights ./weights --json
  autoft weights list vit_small_patch14_dinov2.lvd142m

Without names: the built-in backbones, those of other packages, those in the
folder of --weights, and what timm has fetched before. Nothing is fetched."""

PULL_EPILOG = """\
Examples:

  autoft weights pull resnet18 convnext_nano
  autoft weights pull vit_small_patch14_dinov2.lvd142m --allow-license commercial

Prints the path and the SHA-256 of each file. A file that was damaged since
it was fetched is fetched again."""

VERIFY_EPILOG = """\
Examples:

  autoft weights verify
  autoft weights verify resnet18
  autoft weights verify ./carried

A folder made by `autoft weights pack` is compared with its MANIFEST.json.
The exit code is 3 if something is damaged or does not fit."""

PACK_EPILOG = """\
Examples:

  autoft weights pack resnet18 convnext_nano --out ./carried

Carry the folder to a machine without network, and use it there:

  autoft weights verify ./carried
  autoft search --dataset ./data --weights ./carried"""

HEADINGS = ("backbone", "tier", "licence", "commercial use", "trained on", "size", "state")
COMMERCIAL = {True: "yes", False: "no", None: "not known"}
BY_NAME = {flag.name: flag for flag in SEARCH}
LISTED = (BY_NAME["weights"],)
FETCHED = (BY_NAME["weights"], BY_NAME["allow_license"], BY_NAME["offline"])

Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Backbones, as --backbones.")]
SomeNames = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME...]", help="Backbones; all by default.")
]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")]

app = typer.Typer(help="List, fetch, verify and pack pre-trained weights.")


@app.callback()
def _weights() -> None:
    """List, fetch, verify and pack pre-trained weights."""


@app.command("list", epilog=LIST_EPILOG)
@takes(LISTED)
def list_weights(names: SomeNames = None, as_json: Json = False, **flags: Any) -> None:
    """List weights with their licence, and whether they are on this machine."""
    from autoft.search.weights import listing

    with _view(flags) as (settings, view):
        found = listing(settings, names or (), view)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=2))
        return
    for line in columns([list(HEADINGS), *map(_row, found)]):
        typer.echo(line)
    here = [each for each in found if each.state == "here"]
    total = size(sum(each.bytes for each in here))
    typer.echo(f"{len(found)} backbones, the weights of {len(here)} are here ({total}).", err=True)


@app.command("pull", epilog=PULL_EPILOG)
@takes(FETCHED)
def pull_weights(names: Names, **flags: Any) -> None:
    """Fetch weights into the cache."""
    from autoft.search.weights import pull

    with _view(flags) as (settings, view):
        for each in pull(settings, names, view):
            source = each.source
            typer.echo(clean(f"{source.label}  {source.sha256}  {source.file or source.plugin}"))
            for note in each.notes:
                typer.echo(clean(f"note: {note}"), err=True)


@app.command("verify", epilog=VERIFY_EPILOG)
@takes(LISTED)
def verify_weights(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME|DIR...]", help="Backbones or folders; all by default."),
    ] = None,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Hash weights and load them into their architecture."""
    from autoft.search.weights import verify

    found: list[Verified] = []
    with _view(flags) as (settings, view):
        for each in verify(settings, names or (), view):
            found.append(each)
            if not as_json:
                state = f"wrong: {each.wrong}" if each.wrong else "ok"
                typer.echo(clean(f"{each.name}  {each.sha256 or '-'}  {state}"))
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=2))
    wrong = [each.name for each in found if each.wrong]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(found)} weights cannot be used: {', '.join(wrong[:5])}. Fetch "
            f"them again with `autoft weights pull`, or copy the folder again."
        )


@app.command("pack", epilog=PACK_EPILOG)
@takes(FETCHED)
def pack_weights(
    names: Names,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")],
    **flags: Any,
) -> None:
    """Write a folder of weights that --weights reads, for a machine without network."""
    from autoft.search.weights import pack

    with _view(flags) as (settings, view):
        for folder in pack(settings, names, out, view):
            typer.echo(clean(out / folder))


@contextmanager
def _view(flags: dict[str, Any]) -> Iterator[tuple[Settings, LiveView]]:
    """Yield the settings of a command, which needs no dataset, and the view of its progress."""
    from autoft.cli.live import LiveView
    from autoft.cli.reading import settings_of

    settings = settings_of(".", flags)
    with LiveView(None) as view:
        yield settings, view


def _row(each: Listed) -> list[str]:
    state = f"{each.state}: {each.path}" if each.path else each.state
    licence = each.license or "unknown"
    shown = (each.name, each.tier or "-", licence, COMMERCIAL[each.commercial], each.source or "-")
    return [*map(clean, shown), size(each.bytes) if each.bytes else "-", clean(state)]
