"""The split as a file: `path,label,part,fold,group`, written by autoft or by a person.

`part` is as seen from fold 0. Cells that a spreadsheet would take for a formula, and those that
begin with an apostrophe, get an apostrophe in front, which reading takes away again.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from autoft.data.cache.files import write_bytes_atomic
from autoft.data.cells import as_written, inert
from autoft.data.reading import PART_WORDS
from autoft.data.splits.rules import (
    TEST_PART,
    TRAIN,
    VAL,
    Flags,
    Integers,
    Splittable,
    amount,
    torn_groups,
)
from autoft.data.splits.split import (
    ALWAYS_TRAIN,
    MAX_FOLDS,
    TEST,
    Codes,
    Split,
    located,
    make_split,
    path_order,
)
from autoft.errors import DataError, did_you_mean

COLUMNS: Final = ("path", "label", "part", "fold", "group")
_SHOWN: Final = 10  # lines, images or classes named in a message
_NUMBER: Final = re.compile(r"(\d{1,9})(\.0*)?")  # 1.0 is what tables make of 1 beside empty cells
_EXPECTED: Final = (
    "expected each image of the dataset once, by its path below the dataset, and its part, one of "
    "train, validation and test: mend the file, or make a new one with `autoft data split`."
)


@dataclass(frozen=True)
class _Rows:
    """What a file says of every image, (N,) each; `lines` is 0 where it says nothing."""

    parts: Codes
    codes: Codes
    lines: Integers


@dataclass(frozen=True)
class _Parted:
    """The columns of a catalog with the parts that a file gives."""

    name: str
    root: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: Integers
    parts: Codes
    groups: Integers
    pinned: Flags


@dataclass
class _Problems:
    """The first few of what is wrong in a file, and how much there is."""

    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, text: str) -> None:
        """Keep `text` if it is among the first."""
        self.count += 1
        if self.count <= _SHOWN:
            self.shown.append(f"line {line}: {text}")


def write_split(path: Path, catalog: Splittable, split: Split) -> None:
    """Write `split` atomically, in the order of the paths; names not in UTF-8 keep their bytes.

    `fold` is empty where an image is never held out and in the test part, `group` where an image
    is alone.

    Raises:
        MachineError: the file cannot be written.
    """
    data = io.BytesIO()
    text = io.TextIOWrapper(data, "utf-8", "surrogateescape", newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    labels = [inert(name) for name in catalog.classes]
    alone = (np.bincount(catalog.groups) == 1).tolist()
    numbers: dict[int, int] = {}
    order = path_order(catalog.paths)
    columns = (order, catalog.labels[order], split.fold[order], catalog.groups[order])
    for index, label, fold, group in zip(*(column.tolist() for column in columns), strict=True):
        writer.writerow(
            (
                inert(catalog.paths[index]),
                labels[label],
                _part(fold),
                fold if fold >= 0 else "",
                "" if alone[group] else numbers.setdefault(group, len(numbers)),
            )
        )
    text.flush()
    write_bytes_atomic(path, data.getvalue())


def read_split(
    path: Path,
    catalog: Splittable,
    *,
    seed: int = 0,
    folds: int | None = None,
    allow_leak: bool = False,
    left_out: Collection[str] = (),
) -> Split:
    """Return the split in the file at `path`, which needs no columns but `path` and `part`.

    Labels and groups are the catalog's, whatever the file says. A file without folds gives parts
    as a dataset may: what it leaves out, validation or test, is made from `seed` and `folds`.
    `allow_leak`: groups may be in several parts. `left_out` are paths that the file may name
    although they are no images of the catalog.

    Raises:
        DataError: the file cannot be read or does not fit the catalog; with the lines.
    """
    rows = _read(path, catalog, left_out)
    if not allow_leak:
        _check_groups(path, catalog, rows)
    if rows.codes.max(initial=0) > 0:
        _check_folds(path, catalog, rows.codes)
        there = int(rows.codes.max()) + 1
        asked = folds is not None and folds != there
        notes = (f"The split has {there} folds: {folds} folds were asked for in vain.",)
        return located(catalog, rows.codes, there, notes if asked else ())
    parted = _Parted(
        name=catalog.name,
        root=str(path),
        classes=catalog.classes,
        paths=catalog.paths,
        labels=catalog.labels,
        parts=rows.parts,
        groups=catalog.groups,
        pinned=catalog.pinned,
    )
    return make_split(parted, seed, folds=folds, allow_leak=True)


def _read(path: Path, catalog: Splittable, left_out: Collection[str]) -> _Rows:
    place = {name: index for index, name in enumerate(catalog.paths)}
    number = len(catalog.paths)
    rows = _Rows(np.zeros(number, np.int8), np.zeros(number, np.int8), np.zeros(number, np.int64))
    problems = _Problems()
    known: dict[tuple[str, str], tuple[int, int] | str] = {}
    for line, name, *words in _lines(path):
        index = place.get(name, -1)
        if index < 0 and name in left_out:
            continue
        if index < 0:
            problems.add(line, f"{name!r} is no image of the dataset")
            continue
        if rows.lines[index]:
            problems.add(line, f"{name!r} is named again, after line {rows.lines[index]}")
            continue
        rows.lines[index] = line
        part, fold = words
        if (part, fold) not in known:
            known[part, fold] = _meaning(part, fold)
        meaning = known[part, fold]
        if isinstance(meaning, str):
            problems.add(line, meaning)
        else:
            rows.parts[index], rows.codes[index] = meaning
    _check_complete(path, catalog, rows, problems)
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str, str, str]]:
    """Yield line, path, part and fold of every row.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    last = 0
    try:
        # A spreadsheet may have put a byte order mark in front.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            at_path, at_part, at_fold = _columns(path, next(reader, []))
            width = max(at_path, at_part, at_fold) + 1
            last = reader.line_num
            for cells in reader:
                line, last = last + 1, reader.line_num
                if not cells:
                    continue
                # What a row that is too short gives, and at its end what an absent column gives.
                cells += [""] * max(width - len(cells), 1)
                name = cells[at_path]
                yield line, as_written(name), cells[at_part], cells[at_fold]
    except OSError as error:
        raise DataError(
            f"The split {str(path)!r} cannot be read ({error.strerror}); expected a CSV file with "
            "the columns path and part: check the path."
        ) from error
    except csv.Error as error:
        raise DataError(
            f"The split {str(path)!r} is no CSV after line {last} ({error}); {_EXPECTED}"
        ) from error


def _columns(path: Path, header: list[str]) -> tuple[int, int, int]:
    names = [cell.strip().lower() for cell in header]
    if "path" in names and "part" in names:
        fold = names.index("fold") if "fold" in names else -1
        return names.index("path"), names.index("part"), fold
    found = f"the columns {', '.join(map(repr, header))}" if header else "nothing"
    hints = [did_you_mean(each, names) for each in ("path", "part") if each not in names]
    if len(header) == 1 and (wrong := next((c for c in ";\t|" if c in header[0]), "")):
        hints = [f" It seems to be separated by {wrong!r}: save it with commas."]
    raise DataError(
        f"The split {str(path)!r} begins with {found}; expected a first line of names separated "
        f"by commas, among them path and part.{''.join(hints)}"
    )


def _meaning(word: str, number: str) -> tuple[int, int] | str:
    """Return the part and the code of a row that says `word` and `number`, or what is wrong."""
    word, number = word.strip(), number.strip()
    part = PART_WORDS.get(word.lower(), "")
    if not part:
        return f"unknown part {word!r}{did_you_mean(word.lower(), PART_WORDS)}"
    digits = _NUMBER.fullmatch(number)
    if number and (digits is None or int(digits[1]) >= MAX_FOLDS):
        return f"fold {number!r} is no number from 0 to {MAX_FOLDS - 1}"
    fold = int(digits[1]) if digits else None
    if part == "train" and fold != 0:
        return TRAIN, ALWAYS_TRAIN if fold is None else fold
    if part == "val" and not fold:
        return VAL, 0
    if part == "test" and fold is None:
        return TEST_PART, TEST
    return (
        f"{word!r} in fold {fold}, but 'validation' is fold 0, 'train' any other or none, "
        "and 'test' none"
    )


def _check_complete(path: Path, catalog: Splittable, rows: _Rows, problems: _Problems) -> None:
    texts = list(problems.shown)
    if problems.count > len(texts):
        texts.append(f"and {amount(problems.count - len(texts), 'more line')}")
    unnamed = np.flatnonzero(rows.lines == 0)
    if len(unnamed):
        shown = _listed([repr(catalog.paths[index]) for index in unnamed[: _SHOWN + 1]])
        texts.append(f"{amount(len(unnamed), 'image')} of the dataset not in it: {shown}")
    if texts:
        raise DataError(
            f"The split {str(path)!r} does not fit {catalog.root!r}: {'; '.join(texts)}; "
            f"{_EXPECTED}"
        )


def _check_groups(path: Path, catalog: Splittable, rows: _Rows) -> None:
    number, pairs = torn_groups(catalog.groups, rows.codes)
    if number:
        shown = "; ".join(
            " and ".join(f"line {rows.lines[i]} ({catalog.paths[i]!r})" for i in pair)
            for pair in pairs
        )
        raise DataError(
            f"The split {str(path)!r} separates {amount(number, 'group')} of images that belong "
            f"together, such as identical files: {shown}; expected each group in one part and "
            "fold, or the score is too good: move the images, or go on with --allow-leak."
        )


def _check_folds(path: Path, catalog: Splittable, codes: Codes) -> None:
    """Refuse folds that lack a class that the catalog has."""
    places: list[tuple[str, Flags]] = [("test", codes == TEST)]
    for fold in range(int(codes.max()) + 1):
        places.append((f"fold {fold}", codes == fold))
        places.append((f"the train part of fold {fold}", (codes != TEST) & (codes != fold)))
    used = np.unique(catalog.labels)
    texts = []
    for name, chosen in places:
        counts = np.bincount(catalog.labels[chosen], minlength=len(catalog.classes))
        if lacking := [repr(catalog.classes[label]) for label in used if not counts[label]]:
            texts.append(f"{name} has no image of {_listed(lacking)}")
    if texts:
        raise DataError(
            f"Classes are missing in the split {str(path)!r}: {_listed(texts)}; expected "
            "each class in the test part and in every fold: move some images, or use fewer folds."
        )


def _listed(texts: list[str]) -> str:
    return ", ".join([*texts[:_SHOWN], "..."] if len(texts) > _SHOWN else texts)


def _part(code: int) -> str:
    return {TEST: "test", 0: "validation"}.get(code, "train")
