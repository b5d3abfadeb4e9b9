"""`autoft resume`: go on with a search from its run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autoft.cli.flags import RESUME, takes
from autoft.cli.search import command_line
from autoft.cli.search import run as run_and_show

EPILOG = """\
Examples:

  autoft resume runs/flowers
  autoft resume runs/flowers --time 1h"""


@takes(RESUME)
def resume(
    run: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")], **flags: Any
) -> None:
    """Go on with a search that was stopped; what it has spent of its time counts."""
    from autoft.search.folder import open_run
    from autoft.search.settings import read_saved

    settings = read_saved(open_run(run).path, **{**flags, "out": str(run)})
    typer.echo(command_line(settings), err=True)
    run_and_show(settings)
