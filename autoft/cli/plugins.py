"""`autoft plugins list`: every backbone, strategy and head, and whether it can be used."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from autoft import inspection
from autoft.cli.text import clean, columns
from autoft.errors import UsageError, did_you_mean
from autoft.plugins import GROUPS, Plugin, installed, shadowed

EPILOG = """\
Examples:

  autoft plugins list
  autoft plugins list --kind strategy
  autoft plugins list --check --json

The list is made without importing a plugin. --check imports those of other
packages in a process of their own: that runs their code."""

COLUMNS = ("kind", "name", "package", "version", "state")

app = typer.Typer(help="Show the installed backbones, strategies and heads.")


@dataclass(frozen=True)
class Listed:
    """A plugin and its state: ok, reserved name, or broken with the reason."""

    plugin: Plugin
    state: str


@app.callback()
def _plugins() -> None:
    """Show the installed backbones, strategies and heads."""


@app.command("list", epilog=EPILOG)
def list_plugins(
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KIND", help="backbone, strategy or head.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")] = False,
    check: Annotated[
        bool, typer.Option("--check", metavar="", help="Import the plugins of other packages.")
    ] = False,
) -> None:
    """List every backbone, strategy and head with its package and its state."""
    if kind is not None and kind not in GROUPS:
        known = ", ".join(GROUPS)
        raise UsageError(
            f"There is no kind of plugin '{kind}'.{did_you_mean(kind, GROUPS)} Known: {known}."
        )
    listed = survey([kind] if kind else list(GROUPS), check=check)
    if as_json:
        rows = [{**asdict(item.plugin), "state": item.state} for item in listed]
        typer.echo(json.dumps(rows, indent=2))
        return
    _show(listed)


def survey(kinds: list[str], *, check: bool = False) -> list[Listed]:
    """Return every plugin of `kinds` with its state; `check` imports third-party ones."""
    plugins = [plugin for kind in kinds for plugin in installed(kind)]
    broken = {plugin: inspection.why_broken(plugin) for plugin in plugins}
    if check:
        from autoft.cli.probing import probe

        sound = [plugin for plugin in plugins if not plugin.builtin and not broken[plugin]]
        broken |= probe(sound)
    return [Listed(plugin, _state(plugin, broken[plugin])) for plugin in plugins]


def _state(plugin: Plugin, why: str) -> str:
    if why:
        return f"broken: {why}"
    clash = shadowed(plugin)
    return clash or "ok"


def _show(listed: list[Listed]) -> None:
    names = ("kind", "name", "package", "version")
    rows = [
        [*(clean(getattr(item.plugin, name)) for name in names), clean(item.state)]
        for item in listed
    ]
    lines = columns([list(COLUMNS), *rows])
    for line, item in zip(lines, [None, *listed], strict=True):
        colour = "red" if item and item.state.startswith("broken") else None
        typer.secho(line, fg=colour if sys.stdout.isatty() else None)
    broken = sum(item.state.startswith("broken") for item in listed)
    typer.echo(f"{len(listed)} plugins, {broken} broken.", err=True)
