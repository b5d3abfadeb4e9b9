"""What the cache holds, who uses it, and what has to go when it grows too large.

Only what lies below the five kinds is autoft's; whatever else is in the folder is left alone.

<root>/<kind>/<entry>              a folder or a file; pixels, scans, features,
                                   activations, datasets
<root>/<kind>/.<entry>.used        its time is the entry's last use, its lock says by whom
<root>/<kind>/.building-<id>       an entry in the making, held by its maker
<root>/<kind>/.trash-<id>          an entry on its way out
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from autoft.data.cache.files import cache_root, existing, machine_errors, partition, sync_to_disk
from autoft.data.cache.holding import changed, claim, hold, release, use_of
from autoft.errors import MachineError, UsageError, did_you_mean

KINDS: Final = ("pixels", "datasets", "features", "activations", "scans")
LIMIT: Final = "AUTOFT_CACHE_LIMIT"
SHARE: Final = 0.2  # of the partition, at most MOST bytes, unless LIMIT says otherwise
MOST: Final = 100_000_000_000
_TAKEN: Final = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_BUILDING, _TRASH = ".building-", ".trash-"
_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: Final = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_STALE: Final = 86400.0  # seconds after which a temporary file has no writer any more


class NoRoom(MachineError):
    """What is to be kept fits neither the cache's budget nor the disk."""


@dataclass(frozen=True)
class Entry:
    """Something kept: what it is, its bytes, when it was last used (seconds), and if it is now."""

    kind: str
    name: str
    bytes: int
    last_used: float
    held: bool

    @property
    def path(self) -> Path:
        """Return the folder or file."""
        return cache_root() / self.kind / self.name


@dataclass(frozen=True)
class Cleared:
    """What `clear` removed, and what it left because a living process uses it."""

    removed: tuple[Entry, ...]
    kept: tuple[Entry, ...]


def cache_limit() -> int:
    """Return how many bytes the cache may hold: AUTOFT_CACHE_LIMIT, else a share of the disk.

    Raises:
        UsageError: the variable is no size.
    """
    if text := os.environ.get(LIMIT, "").strip():
        return _parse_size(text)
    return min(MOST, int(SHARE * shutil.disk_usage(existing(cache_root())).total))


@contextlib.contextmanager
def building(kind: str) -> Iterator[Path]:
    """Give a new folder, to be filled and then moved away by `publish`; what is left is removed.

    Raises:
        MachineError: the cache cannot be written.
    """
    folder = cache_root() / kind / f"{_BUILDING}{uuid.uuid4().hex}"
    hold(folder)  # first of all, so that nobody takes it for a leftover
    try:
        with machine_errors(folder):
            folder.mkdir()
        yield folder
    finally:
        _delete(folder)
        release(folder)


def publish(folder: Path, entry: Path, is_whole: Callable[[], bool]) -> None:
    """Move a folder whose files are whole and on the disk to its name, and hold it there.

    An entry that is there already, by another process, has the same content by its name: it is
    kept if `is_whole` says so, and replaced if not.

    Raises:
        MachineError: the cache cannot be written.
    """
    hold(entry)
    with machine_errors(entry):
        sync_to_disk(folder)
        while not _take_name(folder, entry):
            if is_whole():
                return
            if old := _rename_away(entry):
                _delete(old)
        sync_to_disk(entry.parent)


def discard(entry: Path) -> None:
    """Take a damaged entry away, also from those who hold it: what they have open stays open.

    Raises:
        MachineError: the cache cannot be written.
    """
    with machine_errors(entry):
        trash = _rename_away(entry)
    if trash:
        _delete(trash)


def entries() -> list[Entry]:
    """Return everything that the cache holds, by kind and name.

    Raises:
        MachineError: the cache cannot be read.
    """
    with machine_errors(cache_root()):
        return [
            Entry(path.parent.name, path.name, _size(path), *use_of(path))
            for path in _found()
            if not path.name.startswith(".")
        ]


def make_room(needed: int) -> None:
    """Evict what was used longest ago until `needed` more bytes fit the budget and the disk.

    Nothing is evicted where that would not suffice, and never what a living process holds.

    Raises:
        NoRoom: they do not fit.
        MachineError: the cache cannot be read or written.
        UsageError: AUTOFT_CACHE_LIMIT is no size.
    """
    _sweep()
    kept = entries()
    root = cache_root()
    with machine_errors(root):
        making = sum(_size(path) for path in _found() if path.name.startswith(_BUILDING))
    free, limit = shutil.disk_usage(existing(root)).free, cache_limit()
    total = making + sum(entry.bytes for entry in kept)
    missing = max(total + needed - limit, needed - free)
    oldest = sorted((e for e in kept if not e.held), key=lambda entry: entry.last_used)
    if missing <= sum(entry.bytes for entry in oldest):
        for entry in oldest:
            if missing <= 0:
                return
            if _remove(entry.path):
                missing -= entry.bytes
        if missing <= 0:
            return
    raise NoRoom(
        f"{needed:,} bytes more do not fit into the cache {str(root)!r}: it may hold {limit:,} "
        f"({LIMIT}) and {total - sum(e.bytes for e in oldest):,} of it are in use, and {free:,} "
        f"are free on the partition {str(partition(existing(root)))!r}; raise {LIMIT}, or set "
        "AUTOFT_CACHE to a folder on a larger disk."
    )


def clear(kind: str | None = None, older_than: float | None = None) -> Cleared:
    """Remove the entries of `kind`, those not used for `older_than` seconds, or all.

    Raises:
        MachineError: the cache cannot be written.
        UsageError: there is no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(
            f"The cache has no kind {kind!r}; expected one of {', '.join(sorted(KINDS))}."
            f"{did_you_mean(kind, KINDS)}"
        )
    _sweep()
    latest = math.inf if older_than is None else time.time() - older_than
    chosen = [e for e in entries() if kind in (None, e.kind) and e.last_used <= latest]
    removed = {entry: not entry.held and _remove(entry.path) for entry in chosen}
    return Cleared(
        tuple(entry for entry in chosen if removed[entry]),
        tuple(entry for entry in chosen if not removed[entry]),
    )


def _parse_size(text: str) -> int:
    """Return bytes for `800MB`, `1.5 GiB` or `1000000`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.lower())
    factor = {**_UNITS, **_BINARY}.get(match[2]) if match else None
    if match is None or factor is None:
        raise UsageError(
            f"{LIMIT} is {text!r}; expected a size such as 50GB, 800MB or 1.5TiB: correct it or "
            "unset it."
        )
    return int(float(match[1]) * factor)


def _found() -> list[Path]:
    """Return everything below the kinds, by kind and name; nothing beside them is looked at."""
    found = list[Path]()
    for kind in sorted(KINDS):
        folder = cache_root() / kind
        with machine_errors(folder), contextlib.suppress(FileNotFoundError):
            found += sorted(folder.iterdir())
    return found


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder; of what has just gone, none."""
    try:
        if not path.is_dir():
            return path.lstat().st_size
        with os.scandir(path) as found:
            return sum(
                _size(Path(entry.path))
                if entry.is_dir(follow_symlinks=False)
                else entry.stat(follow_symlinks=False).st_size
                for entry in found
            )
    except FileNotFoundError:
        return 0


def _remove(entry: Path) -> bool:
    """Remove an entry unless a living process holds it; tell whether it is gone."""
    with claim(entry) as free, machine_errors(entry):
        trash = _rename_away(entry) if free else None
    if trash:
        _delete(trash)
    return free


def _take_name(folder: Path, entry: Path) -> bool:
    """Give `folder` the name `entry`, or tell that there is one of that name."""
    try:
        folder.rename(entry)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        return False
    return True


def _rename_away(entry: Path) -> Path | None:
    """Take an entry from its name at once; deleting it may take a while."""
    trash = entry.with_name(f"{_TRASH}{uuid.uuid4().hex}")
    try:
        return entry.rename(trash)
    except FileNotFoundError:
        return None


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sweep() -> None:
    """Delete what processes that were killed have left behind."""
    with machine_errors(cache_root()):
        for path in _found():
            if path.name.startswith(_TRASH):
                _delete(path)
            elif path.name.startswith(_BUILDING):
                _remove(path)
            elif _is_marker(path) and not (entry := _entry_of(path)).exists():
                _remove(entry)
            elif re.fullmatch(r"\.[0-9a-f]{32}\.tmp", path.name) and _is_stale(path):
                _delete(path)


def _is_marker(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".used"


def _entry_of(marker: Path) -> Path:
    return marker.with_name(marker.name[1:].removesuffix(".used"))


def _is_stale(path: Path) -> bool:
    return time.time() - changed(path) > _STALE
