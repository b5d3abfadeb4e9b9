"""Datasets that torchvision can fetch, kept as files and a manifest."""

from __future__ import annotations

import inspect
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from autoft.data.inputs.folders import suffix_of
from autoft.data.inputs.stash import Fetched, Stashed, stash, write_images
from autoft.data.pixels.decode import Progress
from autoft.data.reading import PartName
from autoft.errors import DataError, MachineError, UsageError, did_you_mean
from autoft.weights import offline

TORCHVISION_PREFIX: Final = "torchvision:"
_VERSION: Final = 1  # raise it when what is written changes
_DOWNLOADS: Final = ".downloads"

_Parts = Mapping[PartName, Mapping[str, object]]


def _splits(**words: str) -> _Parts:
    """Return the parts of a dataset that is asked for them with `split=<word>`."""
    known: dict[str, PartName] = {"train": "train", "val": "val", "test": "test"}
    return {known[part]: {"split": word} for part, word in words.items()}


_FLAG: Final[_Parts] = {"train": {"train": True}, "test": {"train": False}}
_TWO: Final = _splits(train="train", test="test")
_THREE: Final = _splits(train="train", val="val", test="test")
_WHOLE: Final[_Parts] = {"": {}}
DATASETS: Final[Mapping[str, _Parts]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS"), _FLAG),
    **dict.fromkeys(("Food101", "GTSRB", "STL10", "SVHN"), _TWO),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2"), _THREE),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "FakeData", "SEMEION"), _WHOLE),
    "Country211": _splits(train="train", val="valid", test="test"),
    "Imagenette": _splits(train="train", val="val"),
    "OxfordIIITPet": _splits(train="trainval", test="test"),
    "SUN397": _WHOLE,
}
"""What can be asked for, and with which arguments torchvision gives each part of it."""


def stash_torchvision(dataset: str, progress: Progress | None = None) -> Stashed:
    """Return the images of `torchvision:<name>`, and a manifest beside them.

    Files that torchvision unpacks keep their bytes; what it holds as arrays becomes PNG.

    Raises:
        UsageError: there is no such dataset of images with one label each.
        MachineError: it cannot be downloaded, or the cache cannot be written.
    """
    name = dataset.removeprefix(TORCHVISION_PREFIX)
    if name not in DATASETS:
        raise UsageError(
            f"There is no dataset {dataset!r}; expected {TORCHVISION_PREFIX}<name> with one of "
            f"{', '.join(sorted(DATASETS))}.{_guess(name)}"
        )
    identity = [TORCHVISION_PREFIX, _VERSION, name]
    return stash(name, identity, lambda folder: _fill(name, folder, progress))


def _guess(name: str) -> str:
    exact = {known.lower(): known for known in DATASETS}
    return did_you_mean(exact.get(name.lower(), name), DATASETS)


def _fill(name: str, folder: Path, progress: Progress | None) -> dict[str, int]:
    tables = {
        part: _open(name, folder / _DOWNLOADS, choice) for part, choice in DATASETS[name].items()
    }
    total = sum(len(table) for table in tables.values())
    images = (image for part, table in tables.items() for image in _images(name, table, part))
    write_images(folder, images, total, progress)
    shutil.rmtree(folder / _DOWNLOADS, ignore_errors=True)
    return {}


def _open(name: str, downloads: Path, choice: Mapping[str, object]) -> Any:
    """Return one part of a dataset, downloaded first where it has to be."""
    from torchvision import datasets  # here, because importing it takes seconds

    source = getattr(datasets, name)
    accepted = inspect.signature(source).parameters
    options: dict[str, Any] = {"root": downloads, "download": True, "loader": Path}
    options = {key: value for key, value in options.items() if key in accepted}
    if "download" in options and (variable := offline()):
        raise _unfetched(name, f"{variable}=1 forbids the network")
    try:
        return source(**options, **choice)
    except (OSError, RuntimeError, ImportError, EOFError) as error:
        raise _unfetched(name, str(error)) from error


def _unfetched(name: str, reason: str) -> MachineError:
    return MachineError(
        f"torchvision could not fetch {name} ({reason}); expected the network and what the "
        "dataset needs: try again later, or give a folder of images."
    )


def _images(name: str, table: Any, part: PartName) -> Iterator[Fetched]:
    names: Sequence[str] | None = getattr(table, "classes", getattr(table, "categories", None))
    for index in range(len(table)):
        image, target = table[index]
        label = names[int(target)] if names else str(int(target))
        if isinstance(image, Path):
            yield Fetched(image.read_bytes(), label, part, suffix_of(image.name))
        elif isinstance(image, Image.Image):
            file = io.BytesIO()
            image.save(file, "png", compress_level=1)
            yield Fetched(file.getvalue(), label, part, ".png")
        else:
            raise DataError(
                f"torchvision's {name} gives {type(image).__name__} instead of images; expected "
                "a version of torchvision that autoft knows: update both."
            )
