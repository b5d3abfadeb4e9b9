"""From what the user names to the images and labels that are there: any kind of dataset."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from autoft.data.inputs.archive import ARCHIVE_SUFFIXES, is_archive, stash_archive
from autoft.data.inputs.folders import (
    IGNORED,
    MANIFEST_SUFFIXES,
    Found,
    is_hidden,
    place,
    suffix_of,
    walk,
)
from autoft.data.inputs.hub import HUB_PREFIX, stash_hub
from autoft.data.inputs.manifest import Source, read_manifest, read_manifests
from autoft.data.inputs.sample import SAMPLE_PREFIX, stash_sample
from autoft.data.inputs.stash import MANIFEST, Stashed
from autoft.data.inputs.tables import find_columns, read_header
from autoft.data.inputs.vision import TORCHVISION_PREFIX, stash_torchvision
from autoft.data.pixels.decode import Progress
from autoft.data.reading import PART_WORDS, Listing, Reading
from autoft.errors import DataError, UsageError, did_you_mean

UNLABELLED_METADATA: Final = "metadata files without labels"
UNLISTED: Final = "images in no row of the table"
_METADATA: Final = tuple(f"metadata{suffix}" for suffix in sorted(MANIFEST_SUFFIXES))
_PREFIXES: Final = (SAMPLE_PREFIX, HUB_PREFIX, TORCHVISION_PREFIX)
_KINDS: Final = (
    "expected a folder with one folder of images per class, a manifest "
    f"({' '.join(sorted(MANIFEST_SUFFIXES))}), an archive ({' '.join(ARCHIVE_SUFFIXES)}), "
    "hf://owner/name, torchvision:<name> or sample:digits"
)


def list_dataset(dataset: str, reading: Reading, progress: Progress | None = None) -> Listing:
    """Name the images of a dataset and their labels; no image is opened.

    `dataset` is a folder, a manifest, an archive, `hf://owner/name[@revision][:config]`,
    `torchvision:<name>` or `sample:<name>`. `progress` is called with (done, total) of what
    takes longest, with a total of 0 where it is not known.

    Raises:
        UsageError: there is no such kind of dataset, or no such name.
        DataError: the dataset, or rows of its manifest, cannot be used.
        MachineError: a package, the network or space in the cache is missing.
    """
    if dataset.startswith(SAMPLE_PREFIX):
        name = dataset.removeprefix(SAMPLE_PREFIX)
        return _named(_list_folder(stash_sample(name).files, reading, progress), name)
    if dataset.startswith(HUB_PREFIX):
        return _list_fetched(dataset, stash_hub(dataset, progress), reading, progress)
    if dataset.startswith(TORCHVISION_PREFIX):
        return _list_fetched(dataset, stash_torchvision(dataset, progress), reading, progress)
    path = _existing(dataset)
    if path.is_dir():
        return _list_folder(Path(os.path.realpath(path)), reading, progress)
    if suffix_of(path.name) in MANIFEST_SUFFIXES:
        return read_manifest(path, reading, progress)
    if is_archive(path):
        return _list_archive(path, reading, progress)
    raise DataError(f"The dataset {str(path)!r} is a file of another kind; {_KINDS}.")


def _existing(dataset: str) -> Path:
    """Return the path of a dataset on disk."""
    path = Path(os.path.abspath(os.path.expanduser(dataset)))  # noqa: PTH100, PTH111
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", dataset)
        if scheme:
            start = re.match(r"[^:]*:(//)?", dataset)
            guess = did_you_mean(start.group() if start else "", _PREFIXES)
            raise UsageError(
                f"Datasets cannot be read from {dataset!r}; {_KINDS}.{guess}"
            ) from error
        raise DataError(
            f"The dataset {str(path)!r} does not exist; {_KINDS}: check the path."
            f"{_sibling_hint(path)}"
        ) from error
    except OSError as error:
        raise DataError(
            f"The dataset {str(path)!r} cannot be reached ({error.strerror}); expected a path "
            "that you may read: check the permissions of the folders above it."
        ) from error
    return path


def _sibling_hint(path: Path) -> str:
    try:
        close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)  # noqa: PTH208
    except (OSError, ValueError):
        return ""
    return f" Did you mean {str(path.parent / close[0])!r}?" if close else ""


def _list_fetched(
    dataset: str, stashed: Stashed, reading: Reading, progress: Progress | None
) -> Listing:
    listing = read_manifest(stashed.files / MANIFEST, reading, progress)
    return _named(listing, dataset.partition(":")[2].lstrip("/"), stashed.counts)


def _list_archive(archive: Path, reading: Reading, progress: Progress | None) -> Listing:
    stashed = stash_archive(archive, progress)
    # Others wrote what is in there: no path may lead out of it, whatever is allowed.
    reading = replace(reading, follow_outside=False)
    try:
        listing = _list_unpacked(_inner(stashed.files), reading, progress)
    except DataError as error:
        raise DataError(f"Of the archive {str(archive)!r}, unpacked: {error}") from error
    name = archive.name
    for suffix in sorted(ARCHIVE_SUFFIXES, key=len):
        name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    return _named(listing, name, stashed.counts)


def _inner(folder: Path) -> Path:
    """Step into the only folder at the top of what was unpacked, unless images lie right in it."""
    top = [entry for entry in folder.iterdir() if not is_hidden(entry.name)]
    if len(top) != 1 or not top[0].is_dir() or top[0].is_symlink():
        return folder
    holds = [entry for entry in top[0].iterdir() if not is_hidden(entry.name)]
    more = any(e.is_dir() or suffix_of(e.name) in MANIFEST_SUFFIXES for e in holds)
    return top[0] if more else folder


def _list_unpacked(folder: Path, reading: Reading, progress: Progress | None) -> Listing:
    """List a folder whose one manifest at the top counts, whatever it is called."""
    found = [
        entry
        for entry in folder.iterdir()
        if suffix_of(entry.name) in MANIFEST_SUFFIXES and entry.name not in _METADATA
    ]
    if len(found) == 1 and _has_labels(found[0]):
        listing = read_manifest(found[0], reading, progress)
        return _named(listing, listing.name, _unlisted(walk(folder, reading), listing))
    return _list_folder(folder, reading, progress)


def _list_folder(root: Path, reading: Reading, progress: Progress | None) -> Listing:
    """List a folder by its Hugging Face metadata where it has some with labels, else by itself."""
    sources = _metadata(root)
    labelled = [source for source in sources if _has_labels(source.file)]
    if labelled and len(labelled) < len(sources):
        without = next(source.file for source in sources if source not in labelled)
        raise DataError(
            f"{str(without)!r} has no label column, and {str(labelled[0].file)!r} has one; "
            "expected labels in the metadata of every part: add the column, or move the part out."
        )
    if labelled:
        listing = read_manifests(root, labelled, reading, progress)
        return _named(listing, root.name, _unlisted(walk(root, reading), listing))
    found = walk(root, reading, progress)
    try:
        listing = place(found)
    except DataError as error:
        if not sources or not found.images:
            raise
        raise DataError(
            f"{str(sources[0].file)!r} has no label column, only "
            f"{', '.join(map(repr, read_header(sources[0].file)[0]))}, and {str(root)!r} has no "
            "class folders; expected either: add a column 'label', or sort the images into one "
            "folder per class."
        ) from error
    return _named(listing, root.name, {UNLABELLED_METADATA: len(sources)} if sources else {})


def _metadata(root: Path) -> list[Source]:
    """Return the metadata files of a folder, or else those of its train/val/test folders."""
    top = _metadata_in(root)
    if top:
        return [Source(top)]
    parts = sorted(
        entry
        for entry in _children(root)
        if entry.name.lower() in PART_WORDS and os.path.isdir(entry)  # noqa: PTH112
    )
    inner = [(folder, _metadata_in(folder)) for folder in parts]
    sources = [Source(f, PART_WORDS[folder.name.lower()]) for folder, f in inner if f]
    missing = [folder for folder, file in inner if not file]
    if sources and missing and any(_has_labels(source.file) for source in sources):
        raise DataError(
            f"{str(sources[0].file)!r} names images and labels, and {str(missing[0])!r} holds no "
            "such file; expected one in every part: add it, or move the part out."
        )
    return sources


def _metadata_in(folder: Path) -> Path | None:
    # Not Path.is_file, which raises where the folder is closed; the walk says so better.
    found = [folder / name for name in _METADATA if os.path.isfile(folder / name)]  # noqa: PTH113
    if len(found) > 1:
        raise DataError(
            f"{str(folder)!r} holds {' and '.join(file.name for file in found)}; expected one of "
            "them: remove the others, or give one as the dataset."
        )
    return found[0] if found else None


def _children(root: Path) -> list[Path]:
    try:
        return list(root.iterdir())
    except OSError:  # said by the walk, with the permissions
        return []


def _has_labels(manifest: Path) -> bool:
    header, _ = read_header(manifest)
    try:
        find_columns(manifest, header)
    except DataError:
        return False
    return True


def _unlisted(found: Found, listing: Listing) -> Mapping[str, int]:
    """Count what lies in the folder and is in no row."""
    rest = len(set(found.images).difference(listing.paths))
    # The metadata files are not images, and not ignored either.
    ignored = found.ignored() - sum(
        count for suffix, count in found.others.items() if suffix in MANIFEST_SUFFIXES
    )
    return {key: n for key, n in ((UNLISTED, rest), (IGNORED, ignored)) if n}


def _named(listing: Listing, name: str, counts: Mapping[str, int] | None = None) -> Listing:
    """Return the listing under the name that the user knows, with more counts."""
    total = Counter(listing.counts) + Counter(counts or {})
    return replace(listing, name=name, counts=dict(total))
