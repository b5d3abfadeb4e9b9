"""The rows of a manifest, one after the other: CSV, TSV, JSON lines and Parquet."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

from autoft.data.inputs.complaints import Complaints
from autoft.data.inputs.extras import import_extra
from autoft.errors import DataError, did_you_mean

ROLES: Final = {
    "path": ("path", "file_name", "filename", "image_path", "image", "file"),
    "label": ("label", "class", "target"),
    "split": ("split",),
    "group": ("group",),
    "weight": ("weight",),
}
"""What a column may be called for what it holds; the first name wins over the others."""

WRONG_CELLS: Final = "another number of cells than the header"
NOT_OBJECT: Final = "no JSON object"
_SEPARATORS: Final = {".csv": ",", ".tsv": "\t"}
_NAMED: Final = {",": "','", "\t": "a tab", ";": "';'", "|": "'|'"}
_LONGEST: Final = 1 << 20  # characters of a line
_BATCH: Final = 4096  # rows of a Parquet file held at a time

Columns = dict[str, str]
"""The column of each role that a manifest has."""


class Row(NamedTuple):
    """What one row holds, as it was written; None where there is no such column."""

    line: int
    path: object
    label: object
    split: object
    group: object
    weight: object


class Table(NamedTuple):
    """A manifest that has been opened: its columns, its number of rows (0: unknown), its rows."""

    header: Sequence[str]
    total: int
    rows: Iterator[Row]


def open_table(path: Path, complaints: Complaints) -> Table:
    """Open a manifest; what is wrong with single rows goes to `complaints`.

    Raises:
        DataError: it cannot be read, is empty, or no column holds paths or labels.
        MachineError: it is a Parquet file and pyarrow is absent.
    """
    header, total = read_header(path)
    columns = find_columns(path, header)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return Table(header, total, _parquet_rows(path, columns))
    if suffix in _SEPARATORS:
        return Table(header, total, _csv_rows(path, header, columns, complaints))
    return Table(header, total, _json_rows(path, complaints))


def read_header(path: Path) -> tuple[list[str], int]:
    """Return the names of the columns (of JSON lines: of the first row), and the rows or 0.

    Raises:
        DataError: the manifest cannot be read, or it is empty.
        MachineError: it is a Parquet file and pyarrow is absent.
    """
    suffix, complaints = path.suffix.lower(), Complaints()
    if suffix == ".parquet":
        with _parquet(path) as file:
            return list(file.schema_arrow.names), file.metadata.num_rows
    for _, row in _csv_cells(path) if suffix in _SEPARATORS else _json_objects(path, complaints):
        return list(row), 0
    if complaints:
        raise DataError(
            f"The manifest {str(path)!r} has no row that can be read: {complaints.text()}; "
            'expected a line such as {"path": "cat/1.jpg", "label": "cat"} for every image.'
        )
    raise DataError(
        f"The manifest {str(path)!r} is empty; expected a row for every image with at least a "
        "path and a label."
    )


def find_columns(path: Path, header: Sequence[str]) -> Columns:
    """Return which column plays which role.

    Raises:
        DataError: none holds the paths or the labels, or it cannot be told which one does.
    """
    columns: Columns = {}
    for role, names in ROLES.items():
        found = [column for column in header if _plain(column) in names]
        exact = [column for column in found if _plain(column) == role]
        if len(exact or found) > 1:
            raise DataError(
                f"The manifest {str(path)!r} has several columns that could hold the {role}: "
                f"{', '.join(map(repr, exact or found))}; expected one: name it {role!r}."
            )
        columns |= dict.fromkeys([role], (exact or found)[0]) if found else {}
    for role in ("path", "label"):
        if role not in columns:
            raise DataError(_no_column(path, header, role))
    return columns


def _no_column(path: Path, header: Sequence[str], role: str) -> str:
    names = ROLES[role]
    text = (
        f"The manifest {str(path)!r} has no column for the {role} ({' or '.join(names)}), only "
        f"{', '.join(map(repr, header[:10]))}{', ...' if len(header) > 10 else ''}"
    )
    separator = _SEPARATORS.get(path.suffix.lower())
    for other in _NAMED:
        pieces = [_plain(piece.strip('"')) for piece in header[0].split(other)]
        if separator and len(header) == 1 and any(piece in names for piece in pieces):
            suffix = ", or call it .tsv" if other == "\t" else ""
            return f"{text}: it is separated by {_NAMED[other]}; expected {_NAMED[separator]}" + (
                f": save it with that separator{suffix}."
            )
    if separator and any("/" in column or "." in column for column in header):
        return f"{text}; expected a first line that names the columns, such as path,label."
    guess = next(filter(None, (did_you_mean(name, map(_plain, header)) for name in names)), "")
    return f"{text}; expected one: add it, or rename the column that holds it.{guess}"


def _plain(column: str) -> str:
    return column.strip().lower()


def _csv_rows(
    path: Path, header: Sequence[str], columns: Columns, complaints: Complaints
) -> Iterator[Row]:
    places = [header.index(columns[role]) if role in columns else -1 for role in ROLES]
    width = len(header)
    cells = _csv_cells(path)
    next(cells)
    for line, row in cells:
        if len(row) < width or any(row[width:]):
            complaints.add(WRONG_CELLS, line, f"{len(row)} for {width}")
        else:
            yield Row(line, *(row[place] if place >= 0 else None for place in places))


def _csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, cells) of every row that is not blank, the header among them."""
    with _text(path) as file:
        # Strict: a stray quotation mark is an error instead of a cell of several rows.
        reader = csv.reader(
            _lines(path, file), delimiter=_SEPARATORS[path.suffix.lower()], strict=True
        )
        last = 0
        try:
            for row in reader:
                if row:
                    yield last + 1, row
                last = reader.line_num
        except csv.Error as error:
            raise DataError(
                f"The manifest {str(path)!r} cannot be read at line {last + 1}: {error}; expected "
                'cells with a separator or a quotation mark in them as "...", with "" for a '
                "quotation mark."
            ) from error


def _json_rows(path: Path, complaints: Complaints) -> Iterator[Row]:
    found: dict[tuple[str, ...], list[str]] = {}  # rows may differ in what they name
    for line, item in _json_objects(path, complaints):
        keys = tuple(item)
        if keys not in found:
            names = {_plain(key): key for key in keys}
            found[keys] = [
                next((names[name] for name in known if name in names), "")
                for known in ROLES.values()
            ]
        yield Row(line, *map(item.get, found[keys]))


def _json_objects(path: Path, complaints: Complaints) -> Iterator[tuple[int, dict[str, object]]]:
    with _text(path) as file:
        for line, text in enumerate(_lines(path, file), 1):
            if not text.strip():
                continue
            try:
                item = json.loads(text)
            except (ValueError, RecursionError):
                item = None
            if isinstance(item, dict):
                yield line, item
            else:
                complaints.add(NOT_OBJECT, line, repr(text.strip()[:40]))


def _parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    line, names = 0, list(columns.values())
    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH, columns=names):
            held = {role: batch.column(name).to_pylist() for role, name in columns.items()}
            nothing = [None] * batch.num_rows
            for cells in zip(*(held.get(role, nothing) for role in ROLES), strict=True):
                line += 1
                yield Row(line, *cells)


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file; pyarrow raises OSError and subclasses of ValueError."""
    parquet = import_extra("pyarrow.parquet", "parquet", f"The manifest {str(path)!r}")
    # A stream, not a path: pyarrow knows no file names that are not UTF-8.
    with _readable(path), path.open("rb") as stream:
        yield parquet.ParquetFile(stream)


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """Open a manifest of lines; bytes that are not UTF-8 stay what they are, as in file names."""
    with _readable(path), path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(
                f"The manifest {str(path)!r} is written in UTF-16; expected UTF-8: save it as "
                "'CSV UTF-8', or convert it with iconv."
            )
    with (
        _readable(path),
        path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        yield text


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"The manifest {str(path)!r} cannot be read ({reason}); expected a whole "
            f"{path.suffix} file that you may read: check it, or write it again."
        ) from error


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    """Yield the physical lines; a file that is one endless line is not read into memory."""
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST), ""), 1):
        if len(line) == _LONGEST:
            raise DataError(
                f"Line {number} of the manifest {str(path)!r} has more than {_LONGEST:,} "
                "characters; expected one row a line."
            )
        yield line
