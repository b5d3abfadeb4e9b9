"""`autoft predict`: label images with an exported model, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoft.cli.text import clean
from autoft.errors import DataError

if TYPE_CHECKING:
    from autoft.export.runtime import Prediction

EPILOG = """\
Examples:

  autoft predict runs/flowers photo.jpg
  autoft predict runs/flowers/best photos/ --top 3
  autoft predict model.onnx photos/ --csv predictions.csv

An image that cannot be read is named on stderr and does not stop the others;
the exit code is 3 then."""


def predict(
    artifact: Annotated[
        Path,
        typer.Argument(help="Run folder, artifact folder or .onnx file.", metavar="ARTIFACT"),
    ],
    images: Annotated[
        list[Path],
        typer.Argument(help="Images, or folders of images.", metavar="IMAGES..."),
    ],
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="OUT", help="Write the predictions to OUT.")
    ] = None,
    top: Annotated[
        int, typer.Option("--top", metavar="K", min=1, help="Show the K likeliest classes.")
    ] = 1,
) -> int:
    """Label images with the exported model of a run (ONNX Runtime; torch is not imported)."""
    from autoft.api import find_images
    from autoft.export import runtime

    files = find_images(images)
    model = runtime.load(artifact)
    predictions = list(_shown(model.predict(files), model.classes, top))
    if csv_file:
        runtime.write_csv(csv_file, predictions, model.classes, top)
        typer.echo(f"{len(predictions)} rows written to {clean(csv_file)}.", err=True)
    unread = sum(bool(prediction.error) for prediction in predictions)
    if unread:
        typer.echo(f"Error: {unread} of {len(predictions)} images could not be read.", err=True)
    return DataError.exit_code if unread else 0


def _shown(
    predictions: Iterable[Prediction], classes: tuple[str, ...], top: int
) -> Iterator[Prediction]:
    """Print each prediction as it arrives and pass it on."""
    from autoft.export import runtime

    for prediction in predictions:
        if prediction.error:
            typer.echo(f"{clean(prediction.path)}: {clean(prediction.error)}", err=True)
        else:
            ranked = runtime.top(prediction, classes, top)
            answer = "  ".join(f"{clean(label)} {chance:.4f}" for label, chance in ranked)
            typer.echo(f"{clean(prediction.path)}  {answer}")
        yield prediction
