"""`autoft data`: look at a dataset before anything is trained on it."""

from __future__ import annotations

import typer

from autoft.cli import profile, scan, split

app = typer.Typer(help="Scan, split and profile a dataset.")


@app.callback()
def _data() -> None:
    """Scan, split and profile a dataset."""


for module in (scan, split, profile):
    app.command(epilog=module.EPILOG)(getattr(module, module.__name__.rpartition(".")[2]))
