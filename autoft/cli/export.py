"""`autoft export`: write the model of a run in other formats, or another trial of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoft.cli.text import clean

EPILOG = """\
Examples:

  autoft export runs/flowers --formats onnx,pt2
  autoft export runs/flowers --trial 7 --out flowers-7

Each exported file is run beside the trained network on the validation images."""


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")],
    formats: Annotated[
        str,
        typer.Option("--formats", "--export", metavar="A,B", help="onnx, torchscript, pt2."),
    ] = "onnx,torchscript",
    trial: Annotated[
        int | None,
        typer.Option("--trial", metavar="N", min=0, help="Another trial than the winner."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to; not the run's best/.")
    ] = None,
) -> None:
    """Export the winner of a run, or another trial of it, with proof that the files agree."""
    from autoft.cli.live import LiveView
    from autoft.cli.summary import parity_line
    from autoft.search.run import export_trial

    names = [name.strip() for name in formats.split(",") if name.strip()]
    with LiveView() as view:
        folder = export_trial(run, formats=names, trial=trial, out=out, listen=view)
    typer.echo(f"The model is in {clean(folder)}.")
    typer.echo(parity_line(folder))
