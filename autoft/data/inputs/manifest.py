"""Read manifests: files whose rows name images with labels, parts, groups and weights."""

from __future__ import annotations

import errno
import os
import re
import stat
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from autoft.data.inputs.complaints import Complaints, Refused
from autoft.data.inputs.folders import leads_outside
from autoft.data.inputs.labelling import check_labels, label_text
from autoft.data.inputs.tables import Row, open_table
from autoft.data.pixels.decode import Progress
from autoft.data.reading import (
    NO_GROUP,
    PART_WORDS,
    PARTS,
    Listing,
    PartName,
    Reading,
    file_stat,
)
from autoft.errors import DataError, did_you_mean

NO_PATH: Final = "no path"
NO_TEXT: Final = "something else than a path (images inside of tables are read from hf:// only)"
NO_FILE: Final = "no such file (paths are relative to the manifest's folder)"
NO_REGULAR_FILE: Final = "no regular file"
URL: Final = "a URL (download the file and give its path)"
NOT_PLAIN: Final = "not a plain path (expected folders separated by /, no \\ and no NUL)"
OUTSIDE: Final = "a path out of the manifest's folder (allow it with --follow-outside)"
TWICE: Final = "the same path again"
TWO_LABELS: Final = "the same path again with another label"
BAD_SPLIT: Final = f"an unknown split (expected {', '.join(PART_WORDS)})"
BAD_WEIGHT: Final = "a weight that is no finite number above 0"

_EVERY: Final = 4096  # rows between two calls of a progress function
_FOLDERS: Final = 1 << 16  # folders remembered to lie below the root
_SMALLEST: Final = float(np.finfo(np.float32).tiny)
_LARGEST: Final = float(np.finfo(np.float32).max)
# What a plain relative path never has: empty, `.` and `..` pieces, NUL, \, and a scheme or drive.
_ODD: Final = re.compile(r"(^|/)\.{0,2}(/|$)|[\0\\]|^[A-Za-z][A-Za-z0-9+.-]*:")
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|(data|file|https?):")
_DRIVE: Final = re.compile(r"[A-Za-z]:")

Find = Callable[[object], tuple[str, os.stat_result]]
"""Turns the path of a row into the path below the root, and looks whether it is there."""


class Source(NamedTuple):
    """A manifest, and the part of those of its rows that name none."""

    file: Path
    part: PartName = ""


@dataclass
class _Columns:
    """The listing as it grows: arrays, and no object an image beside its path."""

    paths: list[str] = field(default_factory=list)
    labels: array[int] = field(default_factory=lambda: array("i"))
    parts: array[int] = field(default_factory=lambda: array("b"))
    groups: array[int] = field(default_factory=lambda: array("q"))
    weights: array[float] = field(default_factory=lambda: array("f"))
    stats: array[int] = field(default_factory=lambda: array("q"))
    lines: array[int] = field(default_factory=lambda: array("q"))
    label_codes: dict[str, int] = field(default_factory=dict)
    group_codes: dict[str, int] = field(default_factory=dict)


def read_manifest(file: Path, reading: Reading, progress: Progress | None = None) -> Listing:
    """List the images that a manifest names, in its order.

    `progress` is called with (rows read, rows), with 0 rows for a format that does not say.

    Raises:
        DataError: the manifest or rows of it cannot be used, with the numbers of the rows.
        MachineError: it is a Parquet file and pyarrow is absent.
    """
    listing = read_manifests(file.parent, [Source(file)], reading, progress)
    return replace(listing, name=file.stem)


def read_manifests(
    root: Path, sources: Sequence[Source], reading: Reading, progress: Progress | None = None
) -> Listing:
    """List the images of several manifests, each with paths relative to its own folder.

    The folders are `root` or below it; `progress` and errors are those of `read_manifest`.
    """
    columns, real = _Columns(), os.path.realpath(root)
    for source in sources:
        _read_source(columns, source, real, reading, progress)
    if not columns.paths:
        raise DataError(
            f"The manifest {str(sources[0].file)!r} names no image; expected a row for every "
            "image below the names of the columns."
        )
    names = sorted(columns.label_codes)
    position = {name: index for index, name in enumerate(names)}
    table = np.array([position[name] for name in columns.label_codes], np.int32)
    return Listing(
        name=Path(real).name,
        root=real,
        paths=tuple(columns.paths),
        label_names=tuple(names),
        labels=table[np.frombuffer(columns.labels, np.int32)],
        parts=np.frombuffer(columns.parts, np.int8),
        groups=np.frombuffer(columns.groups, np.int64),
        weights=np.frombuffer(columns.weights, np.float32),
        stats=np.frombuffer(columns.stats, np.int64).reshape(-1, 4),
        lines=np.frombuffer(columns.lines, np.int64),
    )


def _read_source(
    columns: _Columns, source: Source, root: str, reading: Reading, progress: Progress | None
) -> None:
    """Add the rows of one manifest, or say everything that is wrong with them."""
    unit = "row" if source.file.suffix.lower() == ".parquet" else "line"
    complaints, start, seen = Complaints(unit), len(columns.paths), 0
    table = open_table(source.file, complaints)
    find = _finder(root, source.file.parent, reading)
    for seen, row in enumerate(table.rows, 1):
        try:
            _add(columns, row, find, source.part)
        except Refused as refused:
            complaints.add(refused.kind, row.line, refused.detail)
        if progress and seen % _EVERY == 0:
            progress(seen, table.total)
    if progress:
        progress(seen, table.total)
    _check_twice(columns, start, complaints)
    check_labels(
        list(columns.label_codes),
        np.array(columns.labels[start:], np.int32),
        np.array(columns.lines[start:], np.int64),
        complaints,
    )
    if complaints:
        raise DataError(
            f"The manifest {str(source.file)!r} has {len(complaints):,} unusable rows: "
            f"{complaints.text()}. Mend or remove them."
        )


def _add(columns: _Columns, row: Row, find: Find, part: PartName) -> None:
    """Add one row; nothing of it where it is refused."""
    path, status = find(row.path)
    known = columns.label_codes
    code = known.get(row.label) if isinstance(row.label, str) else None
    label = label_text(row.label) if code is None else ""
    part_code = PARTS.index(_part(row.split, part))
    weight = 1.0 if row.weight is None else _weight(row.weight)
    columns.labels.append(known.setdefault(label, len(known)) if code is None else code)
    columns.paths.append(path)
    columns.parts.append(part_code)
    columns.groups.append(_group(columns.group_codes, row.group))
    columns.weights.append(weight)
    columns.stats.extend(file_stat(status))
    columns.lines.append(row.line)


def _finder(root: str, folder: Path, reading: Reading) -> Find:
    """Return the function that finds the images of a manifest in `folder`."""
    base = os.path.realpath(folder)
    prefix = "" if base == root else os.path.relpath(base, root) + "/"
    below: set[str] = set()  # folders seen to lie below the root
    follow = reading.follow_outside

    def find(value: object) -> tuple[str, os.stat_result]:
        if not isinstance(value, str):
            raise Refused(NO_PATH if value is None or value != value else NO_TEXT)
        path = _settled(value, follow) if _ODD.search(value) else value
        full = path if path.startswith("/") else f"{base}/{path}"
        try:
            status = os.stat(full) if follow else _stat_below(root, full, below)  # noqa: PTH116
        except OSError as error:
            gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
            kind = NO_FILE if gone else f"a file that cannot be read ({error.strerror})"
            raise Refused(kind, repr(path)) from error
        except ValueError as error:  # a surrogate that is no byte of a file name
            raise Refused(NO_FILE, repr(path)) from error
        if not stat.S_ISREG(status.st_mode):
            raise Refused(NO_REGULAR_FILE, repr(path))
        return (path if path.startswith("/") else prefix + path), status

    return find


def _stat_below(root: str, full: str, below: set[str]) -> os.stat_result:
    """Return the status of a file, links followed as long as they stay below `root`."""
    status = os.lstat(full)
    folder = full.rpartition("/")[0]
    if folder not in below:
        if leads_outside(root, folder):
            raise Refused(OUTSIDE, f"{full!r} through a link")
        if len(below) >= _FOLDERS:
            below.clear()
        below.add(folder)
    if not stat.S_ISLNK(status.st_mode):
        return status
    if leads_outside(root, full):
        raise Refused(OUTSIDE, f"{full!r} is a link")
    return os.stat(full)  # noqa: PTH116


def _settled(value: str, follow: bool) -> str:
    """Return an unusual path in its plain form, or refuse it."""
    pieces = value.split("/")
    if not value.strip():
        raise Refused(NO_PATH)
    if _URL.match(value):
        raise Refused(URL, repr(value))
    if "\0" in value or "\\" in value:
        raise Refused(NOT_PLAIN, repr(value))
    if value.startswith("/") or ".." in pieces or _DRIVE.match(value):
        if not follow:
            raise Refused(OUTSIDE, repr(value))
        return value
    return "/".join(piece for piece in pieces if piece not in ("", ".")) or "."


def _part(value: object, default: PartName) -> PartName:
    if value is None or value != value or value == "":
        return default
    word = str(value).strip().lower()
    if word in PART_WORDS:
        return PART_WORDS[word]
    if not word:
        return default
    raise Refused(BAD_SPLIT, f"{value!r}{did_you_mean(word, PART_WORDS)}")


def _group(codes: dict[str, int], value: object) -> int:
    if value is None or value != value or value == "":
        return NO_GROUP
    return codes.setdefault(str(value), len(codes))


def _weight(value: object) -> float:
    try:
        weight = float(value)  # type: ignore[arg-type]  # what is no number is refused
    except (TypeError, ValueError):
        weight = 0.0
    if isinstance(value, bool) or not _SMALLEST <= weight <= _LARGEST:
        raise Refused(BAD_WEIGHT, repr(value))
    return weight


def _check_twice(columns: _Columns, start: int, complaints: Complaints) -> None:
    """Complain of paths that occur twice, found by their hashes rather than in a set of them."""
    hashes = np.fromiter(map(hash, columns.paths[start:]), np.int64)
    order = np.argsort(hashes, kind="stable")
    same = hashes[order[1:]] == hashes[order[:-1]]
    doubtful = np.union1d(order[:-1][same], order[1:][same]) + start
    first: dict[str, int] = {}
    for index in doubtful.tolist():
        path = columns.paths[index]
        before = first.setdefault(path, index)
        if before != index:
            differ = columns.labels[before] != columns.labels[index]
            detail = f"{path!r}, also {columns.lines[before]}"
            complaints.add(TWO_LABELS if differ else TWICE, columns.lines[index], detail)
