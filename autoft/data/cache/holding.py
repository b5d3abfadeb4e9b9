"""Who uses an entry of the cache: a lock on a file beside it, which falls with its holder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from autoft.data.cache.files import machine_errors

_UNLOCKABLE: Final = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_MOMENT: Final = 0.005  # seconds

_held: dict[str, int] = {}
"""The open markers of this process by path; their locks fall when it ends, however it ends."""
_holding = threading.Lock()


def hold(entry: Path) -> None:
    """Mark an entry as used now, and keep it from eviction for as long as this process lives.

    Hold an entry first and then look whether it is there: what is held does not go away.

    Raises:
        MachineError: the cache cannot be written.
    """
    marker = marker_of(entry)
    with _holding, machine_errors(marker):
        marker.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _held.get(str(marker))
        if descriptor is None or not _names(marker, descriptor):
            _held[str(marker)] = _shared(marker)
        os.utime(marker)


def release(entry: Path) -> None:
    """Undo what `hold` did for this process."""
    marker = marker_of(entry)
    with _holding:
        descriptor = _held.pop(str(marker), None)
    if descriptor is not None:
        os.close(descriptor)
    with claim(entry):
        pass  # where there is no entry, its marker goes too


@contextlib.contextmanager
def claim(entry: Path) -> Iterator[bool]:
    """Tell whether no living process holds `entry`, and keep it so inside; for who removes it.

    Raises:
        MachineError: the cache cannot be written.
    """
    marker = marker_of(entry)
    if not marker.parent.is_dir():
        yield True  # there is nothing left to hold
        return
    with machine_errors(entry):
        descriptor = _exclusive(marker)
    if descriptor is None:
        yield False
        return
    try:
        yield True
        with machine_errors(entry):
            if not os.path.lexists(entry):
                marker.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def use_of(entry: Path) -> tuple[float, bool]:
    """Return when `entry` was last used, and whether a living process holds it."""
    marker = marker_of(entry)
    try:
        descriptor = os.open(marker, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return changed(entry), False
    try:
        with _holding:
            own = _held.get(str(marker))
            held_here = own is not None and _names(marker, own)
        if held_here:
            return os.fstat(descriptor).st_mtime, True
        free = _is_free(descriptor)
        if not free:  # or another process asks the same at this moment, by the same lock
            time.sleep(_MOMENT)
            free = _is_free(descriptor)
        return os.fstat(descriptor).st_mtime, not free
    finally:
        os.close(descriptor)


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def marker_of(entry: Path) -> Path:
    """Return the file whose lock and time speak for `entry`."""
    return entry.with_name(f".{entry.name}.used")


def _shared(marker: Path) -> int:
    """Open `marker` and lock it with others; a disk that knows no locks needs none here."""
    while True:
        descriptor = _opened(marker)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in _UNLOCKABLE:
                os.close(descriptor)
                raise
        if _names(marker, descriptor):
            return descriptor
        os.close(descriptor)  # the entry was removed in between, and the marker with it


def _exclusive(marker: Path) -> int | None:
    """Open `marker` and lock it alone, or return None where another holds it or might."""
    descriptor = _opened(marker)
    if _is_free(descriptor) and _names(marker, descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _opened(marker: Path) -> int:
    return os.open(marker, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _names(path: Path, descriptor: int) -> bool:
    """Tell whether `path` is still the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def changed(path: Path) -> float:
    """Return when `path` was last written, in seconds; 0 for what is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
