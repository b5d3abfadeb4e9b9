"""Find the image files of a dataset folder and read labels and parts off its layout."""

from __future__ import annotations

import errno
import os
import sys
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from autoft.data.pixels.decode import IMAGE_SUFFIXES, Progress
from autoft.data.reading import (
    NO_GROUP,
    PART_WORDS,
    PARTS,
    Excluded,
    Listing,
    Reading,
    file_stat,
)
from autoft.errors import DataError

IGNORED: Final = "ignored"
IN_SUBFOLDERS: Final = "in sub-folders"
DANGLING: Final = "missing (dangling link)"
MANIFEST_SUFFIXES: Final = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"})
_LITTER: Final = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
_LAYOUT: Final = "expected <dataset>/<class>/image.jpg or <dataset>/train/<class>/image.jpg"
_SHOWN: Final = 5  # links named in a message


@dataclass
class Found:
    """What a walk saw; paths are below the root, with `/`.

    `stats` has four numbers an image, as `Listing.stats`; `manifests` are those at the top;
    `outside` are links that leave the root; `others` counts the suffixes of other files and
    `litter` what is hidden or left by desktops (a folder counts once).
    """

    root: str
    images: list[str] = field(default_factory=list)
    stats: array[int] = field(default_factory=lambda: array("q"))
    folders: list[str] = field(default_factory=list)
    manifests: list[str] = field(default_factory=list)
    unusable: list[Excluded] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    litter: int = 0

    def ignored(self) -> int:
        """Return the number of files and folders that are neither images nor looked into."""
        return self.litter + self.others.total()


def walk(root: Path, reading: Reading, progress: Progress | None = None) -> Found:
    """List what is below `root`; each folder is entered once, whatever links lead to it.

    Raises:
        DataError: a folder cannot be read, or a link leaves the root and may not.
    """
    found, visited = Found(os.path.realpath(root)), set()
    folders, links = [""], deque[str]()
    while folders or links:
        # Links last: a folder reached by a link and by itself belongs to its own class.
        prefix = folders.pop() if folders else links.popleft()
        try:
            status = os.stat(_below(found.root, prefix))  # noqa: PTH116 - no Path per folder
        except OSError as error:
            raise _closed(_below(found.root, prefix).rpartition("/")[0], error) from error
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        if prefix:
            found.folders.append(prefix)
        deeper, linked = _note_entries(found, prefix, reading)
        folders += deeper
        links += linked
        if progress:
            progress(len(found.images), 0)
    _check_outside(found)
    return found


def place(found: Found) -> Listing:
    """Give every image the label and the part that its folders say.

    Raises:
        DataError: there is no image, none in a class folder, or the layout is ambiguous.
    """
    if not found.images:
        raise DataError(_no_image(found))
    depth = 1 if _has_parts(found) else 0
    order = sorted(range(len(found.images)), key=found.images.__getitem__)
    kept, labels, parts, loose, deeper = [], [], [], [], 0
    for index in order:
        pieces = found.images[index].split("/", depth + 2)
        if len(pieces) < depth + 2:
            loose.append(found.images[index])
            continue
        kept.append(index)
        labels.append(sys.intern(pieces[depth]))
        parts.append(PART_WORDS[pieces[0].lower()] if depth else "")
        deeper += len(pieces) > depth + 2
    _check_loose(found, loose, [found.images[index] for index in kept], bool(depth))
    names = sorted(set(labels))
    number = {name: index for index, name in enumerate(names)}
    excluded = [*found.unusable, *(Excluded(path, "not in a class folder") for path in loose)]
    counts = {IGNORED: found.ignored(), IN_SUBFOLDERS: deeper}
    return Listing(
        name=Path(found.root).name,
        root=found.root,
        paths=tuple(found.images[index] for index in kept),
        label_names=tuple(names),
        labels=np.array([number[label] for label in labels], np.int32),
        parts=np.array([PARTS.index(part) for part in parts], np.int8),
        groups=np.full(len(kept), NO_GROUP, np.int64),
        weights=np.ones(len(kept), np.float32),
        stats=np.frombuffer(found.stats, np.int64).reshape(-1, 4)[kept],
        empty=tuple(sorted(_class_names(found, bool(depth)) - set(names))),
        excluded=tuple(sorted(excluded)),
        counts={name: count for name, count in counts.items() if count},
    )


def better_root(root: Path, images: Iterable[str]) -> str:
    """Suggest a folder near `root` that does hold several class folders, or say nothing."""
    inner = {tuple(path.split("/")[:2]) for path in images if path.count("/") >= 2}
    tops = {pieces[0] for pieces in inner}
    if len(tops) == 1 and len(inner) > 1:
        return f" Did you mean {str(root / tops.pop())!r}?"
    try:
        siblings = [
            entry
            for entry in _entries(str(root.parent))
            if not _is_litter(entry.name) and entry.is_dir() and _holds_image(entry.path)
        ]
    except DataError:
        return ""
    return f" Did you mean {str(root.parent)!r}?" if len(siblings) > 1 else ""


def leads_outside(root: str, path: str) -> bool:
    """Tell whether `path`, links followed, is not below the real path `root`."""
    target = os.path.realpath(path)
    return not (target == root or target.startswith(root.rstrip("/") + "/"))


def suffix_of(name: str) -> str:
    """Return the last suffix of a file name in lower case, such as `.jpg`, or nothing."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - no Path per file


def is_hidden(path: str) -> bool:
    """Tell whether a folder or file on the way is hidden or what desktops leave behind."""
    return any(map(_is_litter, path.split("/")))


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name in _LITTER


def _note_entries(found: Found, prefix: str, reading: Reading) -> tuple[list[str], list[str]]:
    """Sort what is in one folder into `found`; return the folders in it and the linked ones."""
    folders, links = [], []
    for entry in _entries(_below(found.root, prefix)):
        path = f"{prefix}/{entry.name}" if prefix else entry.name
        if _is_litter(entry.name):
            found.litter += 1
        elif not _is_folder(entry):
            _note_file(found, path, entry, reading)
        elif not entry.is_symlink():
            folders.append(path)
        elif _may_enter(found, path, entry, reading):
            links.append(path)
    return folders, links


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link through a closed folder; what is said of files says it too
        return False


def _entries(folder: str) -> Sequence[os.DirEntry[str]]:
    """Return what is in `folder`, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _closed(folder, error) from error


def _closed(folder: str, error: OSError) -> DataError:
    mode = Path(folder).stat().st_mode & 0o777
    return DataError(
        f"The folder {folder!r} cannot be read ({error.strerror}, mode {mode:#o}); "
        "expected read and execute permission: run chmod u+rx on it, or move it out."
    )


def _below(root: str, path: str) -> str:
    return f"{root.rstrip('/')}/{path}" if path else root


def _note_file(found: Found, path: str, entry: os.DirEntry[str], reading: Reading) -> None:
    """Sort one name that is no folder into `found`."""
    suffix = suffix_of(entry.name)
    try:
        status = entry.stat()
    except OSError as error:
        dangling = entry.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        reason = DANGLING if dangling else f"cannot be read ({error.strerror})"
        found.unusable.append(Excluded(path, reason))
        return
    if suffix not in IMAGE_SUFFIXES:
        found.others[suffix or "no suffix"] += 1
        if suffix in MANIFEST_SUFFIXES and "/" not in path:
            found.manifests.append(path)
    elif not entry.is_file():
        found.unusable.append(Excluded(path, "not a regular file"))
    elif (
        not reading.follow_outside and entry.is_symlink() and leads_outside(found.root, entry.path)
    ):
        found.outside.append(path)
    else:
        found.images.append(path)
        found.stats.extend(file_stat(status))


def _may_enter(found: Found, path: str, entry: os.DirEntry[str], reading: Reading) -> bool:
    """Tell whether a linked folder is to be walked; never one that the root lies in."""
    if not leads_outside(found.root, entry.path):
        return True
    if not reading.follow_outside:
        found.outside.append(path)
        return False
    return leads_outside(os.path.realpath(entry.path), found.root)


def _check_outside(found: Found) -> None:
    if found.outside:
        shown = ", ".join(
            f"{path!r} -> {os.path.realpath(_below(found.root, path))!r}"
            for path in sorted(found.outside)[:_SHOWN]
        )
        more = f" and {len(found.outside) - _SHOWN} more" if len(found.outside) > _SHOWN else ""
        raise DataError(
            f"Links in {found.root!r} lead out of it ({len(found.outside)}): {shown}{more}; "
            "expected everything below one folder: allow it with --follow-outside, or copy the "
            "files in."
        )


def _has_parts(found: Found) -> bool:
    """Tell whether the first level of folders is train/val/test instead of the classes."""
    tops = {path.split("/", 1)[0] for path in found.images if "/" in path}
    parts = {name for name in tops if name.lower() in PART_WORDS}
    if {name.lower() for name in parts} > {"train"} and tops != parts:
        raise DataError(
            f"{found.root!r} holds {sorted(parts)} beside {sorted(tops - parts)}, so that "
            f"classes and parts cannot be told apart; {_LAYOUT}: move the others into the parts "
            "or out."
        )
    return bool(parts) and tops == parts


def _check_loose(
    found: Found, loose: Sequence[str], placed: Sequence[str], has_parts: bool
) -> None:
    """Refuse a dataset, or a part of one, whose images are in no class folder."""
    unlabelled = {path.split("/")[0] for path in loose if has_parts and "/" in path}
    unlabelled -= {path.split("/", 1)[0] for path in placed}
    if placed and not unlabelled:
        return
    root = Path(found.root)
    where = ", ".join(repr(str(root / name)) for name in sorted(unlabelled) or [""])
    raise DataError(
        f"{where} holds {len(loose)} images but no class folders; {_LAYOUT}: sort the "
        "images into one folder per class, or move unlabelled ones out of the dataset."
        f"{_manifest_hint(found) or better_root(root, found.images)}"
    )


def _class_names(found: Found, has_parts: bool) -> set[str]:
    """Return the names of the folders that stand for a class, with images or not."""
    if not has_parts:
        return {path for path in found.folders if "/" not in path}
    pieces = (path.split("/") for path in found.folders)
    return {p[1] for p in pieces if len(p) == 2 and p[0].lower() in PART_WORDS}


def _no_image(found: Found) -> str:
    others = ", ".join(f"{count} {suffix}" for suffix, count in found.others.most_common(5))
    unusable = [f"{entry.path!r}: {entry.reason}" for entry in found.unusable]
    return (
        f"No images in {found.root!r} ({len(found.folders)} folders and "
        f"{f'{others} files' if others else 'no files'} seen"
        f"{''.join(f'; {text}' for text in unusable[:_SHOWN])}"
        f"{'; ...' if len(unusable) > _SHOWN else ''}); {_LAYOUT} with "
        f"{' '.join(sorted(IMAGE_SUFFIXES))}: check the path, or convert the files."
        f"{_manifest_hint(found)}"
    )


def _manifest_hint(found: Found) -> str:
    if not found.manifests:
        return ""
    manifest = Path(found.root, min(found.manifests))
    return f" If {manifest.name!r} lists the images, give that file: --dataset {str(manifest)!r}."


def _holds_image(folder: str) -> bool:
    try:
        return any(suffix_of(entry.name) in IMAGE_SUFFIXES for entry in _entries(folder))
    except DataError:
        return False
