"""`autoft resume`: go on with a search from its run folder."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from autoft.cli.flags import RESUME, takes
from autoft.cli.search import command_line
from autoft.cli.search import run as run_and_show
from autoft.errors import UsageError

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
    from autoft.search.settings import read_settings

    saved = _saved_settings(open_run(run).path)
    given = {name: value for name, value in flags.items() if value is not None}
    # The saved settings count as flags: the environment of today must not change the run.
    settings = read_settings({**saved, **given, "out": str(run)})
    typer.echo(command_line(settings), err=True)
    run_and_show(settings)


def _saved_settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}. Repeat the `autoft search` command of the run with "
            f"--out {folder} instead."
        ) from error
