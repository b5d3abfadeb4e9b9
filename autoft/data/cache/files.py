"""Where autoft keeps what can be made again, and how it writes files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import platformdirs

from autoft.errors import MachineError

DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


def cache_root() -> Path:
    """Return the cache folder: `autoft` in the folder AUTOFT_CACHE, else in the user's cache."""
    chosen = os.environ.get("AUTOFT_CACHE") or platformdirs.user_cache_dir()
    # A folder of our own: what is in it may be deleted. Workers may run elsewhere: absolute.
    return Path(chosen).expanduser().absolute() / "autoft"


def write_bytes_atomic(path: Path, data: bytes, *, synced: bool = True) -> None:
    """Write `data` to `path` so that a reader or a crash sees all of it or the old file.

    Without `synced` that is so of readers alone: if the machine crashes it may be empty or gone.

    Raises:
        MachineError: the disk is full, or the folder cannot be written.
    """
    # A short name of its own: `path` may already have the longest name the disk allows.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    with machine_errors(path):
        try:
            with _created(temporary) as file:
                file.write(data)
                if synced:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if synced:
            sync_to_disk(path.parent)


def _created(path: Path) -> BinaryIO:
    """Open a new file, in a folder that is made where there is none."""
    try:
        return path.open("xb")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")


def write_json_atomic(
    path: Path, obj: object, *, indent: int | None = 2, synced: bool = True
) -> None:
    """Write `obj` as JSON in ASCII, atomically; not-finite floats, unknown to JSON, as null.

    `synced` is that of `write_bytes_atomic`.

    Raises:
        MachineError: the disk is full, or the folder cannot be written.
    """
    text = json.dumps(_finite(obj), indent=indent, allow_nan=False)
    write_bytes_atomic(path, (text + "\n").encode("ascii"), synced=synced)


def check_space(folder: Path, needed: int) -> None:
    """Refuse to start writing `needed` bytes where they do not fit.

    Raises:
        MachineError: naming the bytes needed, the bytes free and the partition.
    """
    place = existing(folder)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise MachineError(
            f"{needed:,} bytes are needed in {str(folder)!r} and {free:,} are free on the "
            f"partition {str(partition(place))!r}; free some, or set AUTOFT_CACHE to a folder "
            "on a larger disk."
        )


@contextlib.contextmanager
def machine_errors(path: Path) -> Iterator[None]:
    """Turn an OSError met while writing `path` into a MachineError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            disk = str(partition(existing(path)))
            raise MachineError(
                f"{str(path)!r} could not be written: the partition {disk!r} is full; "
                "free some space there, or point --out or AUTOFT_CACHE to another disk."
            ) from error
        raise MachineError(
            f"{str(path)!r} could not be written ({error.strerror}); expected a folder that you "
            "may write to: change its permissions, or choose another."
        ) from error


def _finite(obj: object) -> object:
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    if isinstance(obj, Mapping):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_finite(value) for value in obj]
    return obj


def existing(path: Path) -> Path:
    """Return `path` or its closest parent that exists."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if place.exists()), path)


def partition(place: Path) -> Path:
    """Return where the disk that holds `place` is mounted."""
    return next((p for p in (place, *place.parents) if p.is_mount()), place)


def sync_to_disk(path: Path) -> None:
    """Make what was written to a file, or a rename in a folder, outlive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
