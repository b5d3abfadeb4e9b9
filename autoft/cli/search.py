"""`autoft search`: find the best fine-tuned model for a folder of labelled images."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from autoft.cli.flags import SEARCH, takes
from autoft.cli.text import clean

if TYPE_CHECKING:
    from autoft.search.settings import Settings

EPILOG = """\
Examples:

  autoft search --dataset sample:digits --time 2m
  autoft search --dataset ./flowers --time 15m --out runs/flowers
  autoft search --dataset ./xray --metric balanced_accuracy --dry-run
  autoft search --dataset ./birds --heads linear,mlp --device cuda:0,1

The same command again resumes a run that was stopped. Every setting can also
come from the environment (AUTOFT_SEED=1) or from --config; a flag wins over
both."""


@takes(SEARCH)
def search(**flags: Any) -> None:
    """Find the best fine-tuned model for a folder of labelled images."""
    dry_run, config = flags.pop("dry_run"), flags.pop("config")
    from autoft.search.settings import read_settings

    settings = read_settings(flags, Path(config) if config else None)
    typer.echo(command_line(settings), err=True)
    if dry_run:
        from autoft.search.run import dry_run as plan

        for sentence in plan(settings):
            typer.echo(clean(sentence))
        return
    run(settings)


def run(settings: Settings) -> None:
    """Run a search with the live view and show what it found."""
    from autoft.cli.live import LiveView
    from autoft.cli.summary import show
    from autoft.search.run import run_search

    started = time.time()
    with LiveView(settings.time) as view:
        folder = run_search(settings, view)
    show(folder, started)


def command_line(settings: Settings) -> str:
    """Return the command that states every setting, ready to paste."""
    words = ["autoft", "search"]
    for name, value in settings.model_dump(mode="json").items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or value is False or value == []:
            continue
        words.append(flag)
        if value is not True:
            words.append(_word(name, value))
    return clean(shlex.join(words))


def _word(name: str, value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}s" if name == "time" else str(value)
