"""Find the image files of a dataset folder and read labels and parts off its layout."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from autoft.data.decode import IMAGE_SUFFIXES
from autoft.errors import DataError

PartName = Literal["", "train", "val", "test"]
PARTS: Final[Mapping[str, PartName]] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_IGNORED: Final = ("__MACOSX", "Thumbs.db", "desktop.ini")
_LAYOUT: Final = "expected <dataset>/<class>/image.jpg or <dataset>/train/<class>/image.jpg"


@dataclass(frozen=True)
class Placed:
    """An image file below the root, with the label and the part that its folders give it."""

    path: str
    label: str
    part: PartName


@dataclass
class Found:
    """What a walk saw: paths below the root with `/`, and the suffixes of other files."""

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    unusable: list[tuple[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def walk(root: Path) -> Found:
    """List what is below `root`; each folder is entered once, whatever links lead to it.

    Raises:
        DataError: a folder cannot be read.
    """
    found, visited = Found(), set()
    folders, links = [""], deque[str]()
    while folders or links:
        # Links last: a folder reached by a link and by itself belongs to its own class.
        prefix = folders.pop() if folders else links.popleft()
        folder = root / prefix
        status = folder.stat()
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        if prefix:
            found.folders.append(prefix)
        for entry in _entries(folder):
            path = f"{prefix}/{entry.name}" if prefix else entry.name
            if not entry.is_dir():
                _note_file(found, path, entry)
            elif not entry.is_symlink():
                folders.append(path)
            elif not root.is_relative_to(Path(entry.path).resolve()):
                links.append(path)
    return found


def place(root: Path, found: Found) -> tuple[list[Placed], list[tuple[str, str]]]:
    """Return the images with label and part, and (path, reason) of those in no class folder.

    Raises:
        DataError: there is no image, none in a class folder, or the layout is ambiguous.
    """
    if not found.images:
        raise DataError(_no_image(root, found))
    depth = 1 if _has_parts(root, found.images) else 0
    placed, loose = [], []
    for path in sorted(found.images):
        pieces = path.split("/")
        if len(pieces) < depth + 2:
            loose.append(path)
        else:
            part = PARTS[pieces[0].lower()] if depth else ""
            placed.append(Placed(path, pieces[depth], part))
    unlabelled = {path.split("/")[0] for path in loose if depth and "/" in path}
    unlabelled -= {item.path.split("/")[0] for item in placed}
    if unlabelled or not placed:
        where = ", ".join(repr(str(root / name)) for name in sorted(unlabelled) or [""])
        raise DataError(
            f"{where} holds {len(loose)} images but no class folders; {_LAYOUT}: sort the "
            "images into one folder per class, or move unlabelled ones out of the dataset."
            f"{better_root(root, found.images)}"
        )
    return placed, [(path, "not in a class folder") for path in loose]


def class_folders(found: Found, *, has_parts: bool) -> list[str]:
    """Return the folders that stand for a class, sorted, whether or not they hold images."""
    if not has_parts:
        return sorted(path for path in found.folders if "/" not in path)
    return sorted(
        path
        for path in found.folders
        if path.count("/") == 1 and path.split("/")[0].lower() in PARTS
    )


def better_root(root: Path, images: Iterable[str]) -> str:
    """Suggest a folder near `root` that does hold several class folders, or say nothing."""
    inner = {tuple(path.split("/")[:2]) for path in images if path.count("/") >= 2}
    tops = {pieces[0] for pieces in inner}
    if len(tops) == 1 and len(inner) > 1:
        return f" Did you mean {str(root / tops.pop())!r}?"
    try:
        siblings = [e for e in _entries(root.parent) if e.is_dir() and _holds_image(Path(e.path))]
    except DataError:
        return ""
    return f" Did you mean {str(root.parent)!r}?" if len(siblings) > 1 else ""


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in `folder`, without hidden files and the litter of desktops."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (e for e in entries if not e.name.startswith(".") and e.name not in _IGNORED),
                key=lambda entry: entry.name,
            )
    except OSError as error:
        mode = folder.stat().st_mode & 0o777
        raise DataError(
            f"The folder {str(folder)!r} cannot be read ({error.strerror}, mode {mode:#o}); "
            "expected read and execute permission: run chmod u+rx on it, or move it out."
        ) from error


def _note_file(found: Found, path: str, entry: os.DirEntry[str]) -> None:
    """Sort one name that is no folder into `found`."""
    suffix = PurePosixPath(path).suffix.lower()
    if not entry.is_file() and entry.is_symlink():
        found.unusable.append((path, "dangling link"))
    elif suffix not in IMAGE_SUFFIXES:
        found.others[suffix or "no suffix"] += 1
    elif entry.is_file():
        found.images.append(path)
    else:
        found.unusable.append((path, "not a regular file"))


def _has_parts(root: Path, images: Iterable[str]) -> bool:
    """Tell whether the first level of folders is train/val/test instead of the classes."""
    tops = {path.split("/")[0] for path in images if "/" in path}
    parts = {name for name in tops if name.lower() in PARTS}
    if {name.lower() for name in parts} > {"train"} and tops != parts:
        raise DataError(
            f"{str(root)!r} holds {sorted(parts)} beside {sorted(tops - parts)}, so that classes "
            f"and parts cannot be told apart; {_LAYOUT}: move the others into the parts or out."
        )
    return bool(parts) and tops == parts


def _no_image(root: Path, found: Found) -> str:
    others = ", ".join(f"{count} {suffix}" for suffix, count in found.others.most_common(5))
    seen = f"{others} files" if others else "no files"
    return (
        f"No images in {str(root)!r} ({len(found.folders)} folders and {seen} seen); {_LAYOUT} "
        f"with {' '.join(sorted(IMAGE_SUFFIXES))}: check the path, or convert the files."
    )


def _holds_image(folder: Path) -> bool:
    try:
        return any(Path(entry.name).suffix.lower() in IMAGE_SUFFIXES for entry in _entries(folder))
    except DataError:
        return False
