"""Datasets of the Hugging Face Hub, fetched once and kept as the encoded files that they hold."""

from __future__ import annotations

import os
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from autoft.data.inputs.extras import import_extra
from autoft.data.inputs.folders import suffix_of
from autoft.data.inputs.stash import Fetched, Stashed, stash, write_images
from autoft.data.inputs.tables import ROLES
from autoft.data.pixels.decode import IMAGE_SUFFIXES, Progress
from autoft.data.reading import PART_WORDS, PartName
from autoft.errors import AutoftError, DataError, MachineError, UsageError
from autoft.weights import offline

HUB_PREFIX: Final = "hf://"
NO_IMAGE: Final = "rows without an image"
NO_LABEL: Final = "rows without a label"
_HUB: Final = "https://huggingface.co"
_LOOK_SECONDS: Final = 3.0
_BATCH: Final = 64  # images in memory at a time
_VERSION: Final = 1  # raise it when what is written changes
_NAME: Final = re.compile(
    r"(?:datasets/)?(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@]+))?(?::(?P<config>.+))?"
)


class _Columns(NamedTuple):
    """The columns of the Hub's table that hold the image and its label, and the label's names."""

    image: str
    label: str
    names: Sequence[str] | None


def stash_hub(dataset: str, progress: Progress | None = None) -> Stashed:
    """Return the images of `hf://owner/name[@revision][:config]`, and a manifest beside them.

    Without a revision the newest is taken, once: later runs see the same files until the cache is
    cleared. The bytes of the images are those of the Hub.

    Raises:
        UsageError: the name is none, or the dataset has several configurations.
        DataError: there is no such dataset, or its columns or splits do not say what is what.
        MachineError: the library, the network or space in the cache is missing.
    """
    found = _NAME.fullmatch(dataset.removeprefix(HUB_PREFIX))
    if not found:
        raise UsageError(
            f"{dataset!r} names no dataset of the Hugging Face Hub; expected "
            "hf://owner/name, hf://owner/name@revision or hf://owner/name:config."
        )
    name, revision, config = found["name"], found["revision"], found["config"]
    return stash(
        name,
        [HUB_PREFIX, _VERSION, name, revision, config],
        lambda folder: _fill(_load(dataset, name, revision, config), dataset, folder, progress),
    )


def _load(dataset: str, name: str, revision: str | None, config: str | None) -> Mapping[str, Any]:
    """Return the tables of a dataset by split; without network, what the library has kept."""
    library = import_extra("datasets", "hf", f"The dataset {dataset!r}")
    unreachable = _unreachable()
    with _explained(dataset, unreachable), _network(library, allowed=not unreachable):
        # Without network the library takes whatever revision it has: each gets a place of its own.
        kept = Path(library.config.HF_DATASETS_CACHE)
        place = kept / f"revision-{revision.replace('/', '--')}" if revision else kept
        # The full address: a bare name could also be a folder in the working directory.
        tables: Mapping[str, Any] = library.load_dataset(
            f"hf://datasets/{name}", name=config, revision=revision, cache_dir=str(place)
        )
    return tables


@contextmanager
def _explained(dataset: str, unreachable: str) -> Iterator[None]:
    """Say in a sentence what the library raises."""
    try:
        yield
    except ConnectionError as error:
        raise MachineError(
            f"The dataset {dataset!r} cannot be fetched ({unreachable or _plain(error)}) and is "
            "not kept on this machine; expected the network, or a dataset fetched before: go "
            "online once, or give a folder of images."
        ) from error
    except FileNotFoundError as error:  # also the library's own, of which it is the base
        raise DataError(
            f"The dataset {dataset!r} was not found ({_plain(error)}); expected one at "
            f"{_HUB}/datasets that you may read: check the name and the revision, or log in "
            "with hf auth login."
        ) from error
    except OSError as error:
        raise MachineError(
            f"The dataset {dataset!r} cannot be fetched ({_plain(error)}); expected the Hub to "
            "answer and space in its cache: try again later, or give a folder of images."
        ) from error
    except ValueError as error:
        raise UsageError(
            f"The dataset {dataset!r} cannot be chosen like that ({_plain(error)}); expected "
            "hf://owner/name:config with a configuration that it has."
        ) from error
    except AutoftError:
        raise
    except Exception as error:  # whatever a damaged or old dataset makes the library raise
        raise DataError(
            f"The dataset {dataset!r} cannot be read ({type(error).__name__}: {_plain(error)}); "
            "expected tables of images with labels, and no script: download its files, and "
            "give them."
        ) from error


def _plain(error: Exception) -> str:
    """Return what the library says, in one line."""
    return " ".join(str(error).split())


def _unreachable() -> str:
    """Say why the Hub is not to be asked, or nothing."""
    if variable := offline():
        return f"{variable}=1 forbids the network"
    return out_of_reach()


def out_of_reach() -> str:
    """Say that the Hub does not answer, or nothing.

    Its clients retry for a minute where there is no network; one short look saves that. Behind a
    proxy nothing can be said, and they are left to try.
    """
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return ""
    hub = urlsplit(os.environ.get("HF_ENDPOINT", _HUB))
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname or "", port), _LOOK_SECONDS).close()
    except OSError as error:
        return f"{hub.hostname} cannot be reached: {error.strerror or error}"
    return ""


@contextmanager
def _network(library: Any, *, allowed: bool) -> Iterator[None]:
    """Keep the library from the network in the block, if not allowed."""
    before = library.config.HF_HUB_OFFLINE
    library.config.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        library.config.HF_HUB_OFFLINE = before


def _fill(
    tables: Mapping[str, Any], dataset: str, folder: Path, progress: Progress | None
) -> dict[str, int]:
    library = import_extra("datasets", "hf", f"The dataset {dataset!r}")
    parts = _parts(dataset, list(tables))
    columns = _columns(dataset, library, tables[next(iter(parts))].features)
    counts = Counter(
        {f"in the split {name!r}": len(tables[name]) for name in set(tables) - {*parts}}
    )
    total = sum(len(tables[name]) for name in parts)
    images = (
        image
        for name, part in parts.items()
        for image in _images(library, tables[name], columns, part, counts)
    )
    with _explained(dataset, ""):
        write_images(folder, images, total, progress)
    return dict(counts)


def _images(
    library: Any, table: Any, columns: _Columns, part: PartName, counts: Counter[str]
) -> Iterator[Fetched]:
    """Yield the encoded images of a split; `counts` takes the rows that have none or no label."""
    table = table.select_columns([columns.image, columns.label])
    table = table.cast_column(columns.image, library.Image(decode=False))
    for batch in table.iter(batch_size=_BATCH):
        for image, label in zip(batch[columns.image], batch[columns.label], strict=True):
            data = _bytes(image)
            text = _label(label, columns.names)
            if data is None or text is None:
                counts[NO_IMAGE if data is None else NO_LABEL] += 1
                continue
            suffix = suffix_of(image.get("path") or "")
            yield Fetched(data, text, part, suffix if suffix in IMAGE_SUFFIXES else "")


def _bytes(image: Mapping[str, Any] | None) -> bytes | None:
    if not image:
        return None
    data: bytes | None = image.get("bytes")
    if data is None and image.get("path"):
        return Path(image["path"]).read_bytes()
    return data


def _label(value: Any, names: Sequence[str] | None) -> str | None:
    if value is None or (names is not None and value < 0):  # -1 stands for a label kept secret
        return None
    return str(value) if names is None else names[value]


def _parts(dataset: str, splits: Sequence[str]) -> dict[str, PartName]:
    """Return the part of every split that is one; a single split may have any name."""
    parts: dict[str, PartName] = {
        name: PART_WORDS[name.lower()] for name in splits if name.lower() in PART_WORDS
    }
    if not parts and len(splits) == 1:
        return {splits[0]: ""}
    if not parts:
        raise DataError(
            f"The splits of {dataset!r} are called {', '.join(map(repr, splits))}; expected one "
            f"split, or some of {', '.join(PART_WORDS)}: save it as a folder or manifest."
        )
    return parts


def _columns(dataset: str, library: Any, features: Mapping[str, Any]) -> _Columns:
    """Find the column of images and the one of labels by their types, then by their names."""
    images = [name for name, kind in features.items() if isinstance(kind, library.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, library.ClassLabel)]
    labels = labels or [
        name
        for name, kind in features.items()
        if isinstance(kind, library.Value) and re.match("u?int|(large_)?string|bool", kind.dtype)
    ]
    image = _only(dataset, features, images, "path", "image")
    label = _only(dataset, features, labels, "label", "label")
    return _Columns(image, label, getattr(features[label], "names", None))


def _only(
    dataset: str, features: Mapping[str, Any], found: Sequence[str], role: str, what: str
) -> str:
    known = [name for name in found if name.lower() in ROLES[role]]
    for choice in (found, known):
        if len(choice) == 1:
            return choice[0]
    columns = ", ".join(f"{name!r} ({kind})" for name, kind in features.items())
    several = f"several columns could hold the {what}: {', '.join(map(repr, found))}"
    raise DataError(
        f"In {dataset!r} {several if found else f'no column holds the {what}'}; its columns are "
        f"{columns}. Expected one image and one label for each row: save the columns that you "
        "mean as a folder or manifest."
    )
