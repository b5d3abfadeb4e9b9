"""The members of zip and tar archives, as they are written there, and what is wrong with them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, Literal, NamedTuple

from autoft.errors import DataError

_MAX_LINK: Final = 4096  # bytes of a path
_HEADERS: Final = 1 << 24  # bytes that the parser of a tar may ask for at once
_REST: Final = 1 << 20  # bytes looked at behind the end of a tar
# What the standard library raises on damaged archives.
_DAMAGED: Final = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(ValueError, NotImplementedError, RuntimeError, LookupError, OverflowError),
)

Kind = Literal["file", "folder", "link", "hard link", "other"]


class Member(NamedTuple):
    """A name in an archive; `size` in bytes is what it states, `open` gives its bytes."""

    name: str
    kind: Kind
    size: int
    open: Callable[[], IO[bytes] | None]
    target: str = ""


def zip_members(archive: Path) -> tuple[list[zipfile.ZipInfo], Iterator[Member]]:
    """Return what a zip states of its members, and the members.

    Raises:
        DataError: it is damaged or encrypted.
    """
    with checked(archive):
        file = zipfile.ZipFile(archive)
    infos = file.infolist()
    for info in infos:
        if info.flag_bits & 1:
            raise refusal(archive, f"is encrypted ({info.filename!r})")
    return infos, _zip_each(archive, file, infos)


def tar_members(archive: Path) -> Iterator[Member]:
    """Yield the members of a tar, compressed or not; each must be read before the next.

    Raises:
        DataError: it is damaged or cut off.
    """
    with (
        checked(archive),
        _decompressed(archive) as stream,
        tarfile.open(fileobj=_Frugal(stream), mode="r:") as file,  # type: ignore[call-overload]
    ):
        while info := file.next():
            file.members.clear()  # it would keep all of them
            yield Member(
                info.name,
                _tar_kind(info),
                info.size,
                partial(file.extractfile, info),
                info.linkname,
            )
        # The parser takes a cut and a bad header for the end, which really is zeros and no more.
        stream.seek(file.offset)
        rest = stream.read(_REST)
        if len(rest) < tarfile.BLOCKSIZE or any(rest):
            raise tarfile.ReadError("it is cut off, or a header in it is not valid")


@contextmanager
def checked(archive: Path, member: str = "") -> Iterator[None]:
    """Turn what the parsers raise on damaged archives into a DataError."""
    try:
        yield
    except _DAMAGED as error:
        where = f" at {member!r}" if member else ""
        raise DataError(
            f"The archive {str(archive)!r} cannot be read{where} ({error!s}); "
            "expected a whole zip or tar file: fetch it again, or check it with another program."
        ) from error


def refusal(archive: Path, reason: str) -> DataError:
    """Return the error for an archive that is not to be unpacked."""
    return DataError(
        f"The archive {str(archive)!r} {reason}; nothing was kept of it. Expected image files "
        "and manifests below one folder: unpack it yourself and give the folder, if you trust it."
    )


def _zip_each(
    archive: Path, file: zipfile.ZipFile, infos: list[zipfile.ZipInfo]
) -> Iterator[Member]:
    with file:
        for info in infos:
            mode = info.external_attr >> 16
            # Some archivers of Windows write backslashes between folders.
            name, open_ = info.filename.replace("\\", "/"), partial(file.open, info)
            if name.endswith("/"):
                yield Member(name, "folder", 0, open_)
            elif stat.S_ISLNK(mode):
                with checked(archive, name), file.open(info) as stream:
                    target = os.fsdecode(stream.read(_MAX_LINK))
                yield Member(name, "link", 0, open_, target)
            elif stat.S_IFMT(mode) in (0, stat.S_IFREG):
                yield Member(name, "file", info.file_size, open_)
            else:
                yield Member(name, "other", 0, open_)


def _tar_kind(info: tarfile.TarInfo) -> Kind:
    if info.isreg():
        return "file"
    if info.isdir():
        return "folder"
    if info.issym():
        return "link"
    return "hard link" if info.islnk() else "other"


class _Frugal:
    """A stream that refuses to read much at once: a header may state any size for a name."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.seek = stream.seek
        self.tell = stream.tell

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes or, at the end, fewer."""
        if not 0 <= size <= _HEADERS:
            raise tarfile.ReadError(f"a header in it states {size:,} bytes")
        return self._stream.read(size)


def _decompressed(archive: Path) -> Any:
    """Open a tar by how it begins, whatever it is called."""
    with archive.open("rb") as file:
        start = file.read(6)
    for magic, opener in (
        (b"\x1f\x8b", gzip.open),
        (b"BZh", bz2.open),
        (b"\xfd7zXZ\0", lzma.open),
    ):
        if start.startswith(magic):
            return opener(archive, "rb")
    return archive.open("rb")
