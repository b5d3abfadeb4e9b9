"""Read a dataset for a command, with progress on stderr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoft.errors import UsageError

if TYPE_CHECKING:
    from autoft.data.dataset import Dataset
    from autoft.search.settings import Settings


def settings_of(path: str, flags: Mapping[str, Any]) -> Settings:
    """Return the settings that `path` and the flags of a command state.

    Raises:
        UsageError: a flag or its value cannot be.
    """
    from autoft.search.settings import read_settings

    return read_settings({"dataset": path, **flags})


def keep_dataset(path: str, target: Path | None) -> None:
    """Refuse to write `target` over the dataset or into it.

    Raises:
        UsageError: naming both.
    """
    there = Path(path).expanduser().resolve()
    if target is not None and there.exists() and target.resolve().is_relative_to(there):
        raise UsageError(
            f"{str(target)!r} lies in the dataset {path!r}, which is never written to: choose "
            "another place."
        )


def read(path: str, flags: Mapping[str, Any]) -> Dataset:
    """Read every image of the dataset at `path` once.

    Raises:
        AutoftError: a search would refuse it.
    """
    import time

    from autoft.cli.live import LiveView
    from autoft.data.dataset import name_images, read_images
    from autoft.search.events import Event

    settings, began = settings_of(path, flags), time.monotonic()
    reading = settings.reading()
    with LiveView(None) as view:

        def tell(text: str, done: int, total: int) -> None:
            data = {"text": text, "done": done, "total": total}
            view(Event("progress", time.monotonic() - began, data))

        listing = name_images(settings.dataset, reading, tell)
        return read_images(listing, reading, settings.image_size, tell)
