"""`autoft data split`: which image is for training, selection and the locked test part."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autoft.cli.flags import READING, SEED, SPLITTING, takes
from autoft.cli.reading import keep_dataset, read, settings_of
from autoft.cli.text import clean, columns

EPILOG = """\
Examples:

  autoft data split ./flowers
  autoft data split ./flowers --seed 1 --out split.csv
  autoft search --dataset ./flowers --split split.csv

Identical images, near-duplicates (--near-dup) and images of one `group` of a
manifest stay together. The test part is drawn first, from the seed alone."""


@takes((SEED, *SPLITTING, *READING))
def split(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The dataset, as for --dataset.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the split as CSV.")
    ] = None,
    **flags: Any,
) -> None:
    """Make the split that a search would make, show it, and write it."""
    from autoft.data.splits.file import write_split
    from autoft.data.splits.split import summary
    from autoft.search.images import split_images

    settings = settings_of(path, flags)
    keep_dataset(path, out)
    catalog = read(path, flags).catalog
    made = split_images(settings, catalog)
    for line in columns([[clean(cell) for cell in row] for row in summary(catalog, made)]):
        typer.echo(line)
    for note in made.notes:
        typer.echo(f"note: {clean(note)}")
    typer.echo(f"split {made.hash}")
    if out:
        write_split(out, catalog, made)
        typer.echo(f"Written to {clean(out)}.", err=True)
