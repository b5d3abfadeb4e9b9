"""Unpack zip and tar archives of datasets, trusting nothing that is written in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from autoft.data.cache.files import check_space, machine_errors
from autoft.data.inputs.folders import (
    IGNORED,
    MANIFEST_SUFFIXES,
    is_hidden,
    leads_outside,
    suffix_of,
)
from autoft.data.inputs.members import Member, checked, refusal, tar_members, zip_members
from autoft.data.inputs.stash import Stashed, stash
from autoft.data.pixels.decode import IMAGE_SUFFIXES, Progress

ARCHIVE_SUFFIXES: Final = (
    *(".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"),
)
MAX_MEMBERS: Final = 5_000_000
MAX_BYTES: Final = 1 << 40
MAX_MEMBER_BYTES: Final = 1 << 30  # more than any image of the allowed number of pixels
_CHUNK: Final = 1 << 20
_CHECK_EVERY: Final = 1 << 24  # bytes between two looks at the space on the disk
_EVERY: Final = 256  # members between two calls of a progress function


@dataclass
class _Unpacking:
    """What has been seen so far; links wait until no file can be written through them."""

    archive: Path
    folder: Path
    members: int = 0
    size: int = 0
    unchecked: int = 0
    ignored: int = 0
    links: list[tuple[str, str, str]] = field(default_factory=list)
    hard_links: list[tuple[str, str, str]] = field(default_factory=list)


def is_archive(path: Path) -> bool:
    """Tell by its name whether `path` is an archive that can be unpacked."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def stash_archive(archive: Path, progress: Progress | None = None) -> Stashed:
    """Return the images and manifests of an archive, unpacked into the cache once.

    `progress` is called with (members, all members), with 0 of all for a tar.

    Raises:
        DataError: the archive is damaged, encrypted or too large, or a member would land
            outside of it or is no file; it names the member.
        MachineError: the cache cannot be written, or has too little space.
    """
    path = Path(os.path.realpath(archive))
    status = path.stat()
    identity = [os.fspath(path), status.st_size, status.st_mtime_ns]
    # Images hardly get smaller in an archive, so that its size is about that of its files.
    return stash(
        path.name, identity, lambda folder: _unpack(path, folder, progress), status.st_size
    )


def _unpack(archive: Path, folder: Path, progress: Progress | None) -> dict[str, int]:
    state = _Unpacking(archive, folder)
    if archive.name.lower().endswith(".zip"):
        infos, members = zip_members(archive)
        total = len(infos)
        _check_total(state, sum(info.file_size for info in infos if _wanted(info.filename)))
    else:
        total, members = 0, tar_members(archive)
    for member in members:
        state.members += 1
        if state.members > MAX_MEMBERS:
            raise refusal(archive, f"has more than {MAX_MEMBERS:,} members")
        _take(state, member)
        if progress and state.members % _EVERY == 0:
            progress(state.members, total)
    _make_links(state)
    if progress:
        progress(state.members, total)
    return {IGNORED: state.ignored} if state.ignored else {}


def _take(state: _Unpacking, member: Member) -> None:
    """Write one member below the folder if it is wanted; refuse one that is not safe."""
    path = _safe_path(state.archive, member.name, member.name)
    target = state.folder / path
    if member.kind == "other":
        raise refusal(state.archive, f"holds {member.name!r}, which is a device or a pipe")
    if member.kind == "folder":
        if not is_hidden(path):
            with _landing(state, member.name, target):
                target.mkdir(parents=True, exist_ok=True)
    elif member.kind == "link":
        # Not checked as text: `a/..` is not `.` where `a` is a link; _make_links looks at it.
        state.links.append((member.name, path, member.target))
    elif not _wanted(path):
        state.ignored += 1
    elif member.kind == "hard link":
        origin = _safe_path(state.archive, member.target, member.name)
        state.hard_links.append((member.name, path, origin))
    else:
        _write(state, member, target)


def _write(state: _Unpacking, member: Member, target: Path) -> None:
    _check_size(state, member)
    left = member.size
    with _landing(state, member.name, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for chunk in _chunks(state.archive, member):
                left -= len(chunk)
                if left < 0:
                    raise refusal(
                        state.archive,
                        f"holds {member.name!r}, which has more than the {member.size:,} bytes "
                        "that it states",
                    )
                file.write(chunk)


def _check_size(state: _Unpacking, member: Member) -> None:
    """Refuse a member that is too large, or that makes the whole too large."""
    if not 0 <= member.size <= MAX_MEMBER_BYTES:
        raise refusal(
            state.archive,
            f"holds {member.name!r} of {member.size:,} bytes; of one file at most "
            f"{MAX_MEMBER_BYTES:,} are unpacked",
        )
    state.size += member.size
    state.unchecked += member.size
    if state.size > MAX_BYTES:
        raise refusal(state.archive, f"unpacks to more than {MAX_BYTES:,} bytes")
    if state.unchecked > _CHECK_EVERY:
        check_space(state.folder, member.size)
        state.unchecked = 0


def _check_total(state: _Unpacking, size: int) -> None:
    if size > MAX_BYTES:
        raise refusal(state.archive, f"unpacks to {size:,} bytes; at most {MAX_BYTES:,} are")
    check_space(state.folder, size)


def _chunks(archive: Path, member: Member) -> Iterator[bytes]:
    with checked(archive, member.name):
        stream = member.open()
        while stream and (chunk := stream.read(_CHUNK)):
            yield chunk


def _make_links(state: _Unpacking) -> None:
    """Make the links of the archive, hard ones first, and refuse those that lead out of it."""
    for name, path, origin in state.hard_links:
        source, target = state.folder / origin, state.folder / path
        if not source.is_file():
            raise refusal(state.archive, f"holds {name!r}, a hard link to no file in it")
        with _landing(state, name, target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.hardlink_to(source)
    made = [link for link in state.links if _make_link(state, *link)]
    for name, path, target_text in made:
        _check_link(state, name, state.folder / path, target_text)
    state.ignored += len(state.links) - len(made)
    for _, path, _ in made:
        link = state.folder / path
        if not _wanted(path) and not link.is_dir():
            link.unlink()
            state.ignored += 1


def _make_link(state: _Unpacking, name: str, path: str, target: str) -> bool:
    """Make one link, unless it is hidden or its name is taken; never through another link."""
    link = state.folder / path
    if any((state.folder / above).is_symlink() for above in PurePosixPath(path).parents):
        raise refusal(state.archive, f"holds {name!r}, which lies below a link")
    if is_hidden(path) or os.path.lexists(link):
        return False
    with _landing(state, name, link):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    return True


def _check_link(state: _Unpacking, name: str, link: Path, target: str) -> None:
    """Refuse a link that leads out of the archive, or whose end cannot be told."""
    root = os.path.realpath(state.folder)
    try:
        os.path.realpath(link, strict=True)
        outside = leads_outside(root, os.fspath(link))
    except FileNotFoundError:  # to something that was not wanted, or is not there
        outside = leads_outside(root, os.fspath(link))
    except OSError:  # a loop, or a path made too long to be followed
        outside = True
    if outside or Path(target).is_absolute():
        raise refusal(state.archive, f"holds {name!r}, a link out of it to {target!r}")


@contextmanager
def _landing(state: _Unpacking, name: str, target: Path) -> Iterator[None]:
    """Name the member where two of them cannot be beside each other."""
    with machine_errors(target):
        try:
            yield
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise refusal(
                state.archive, f"holds {name!r} where it also holds a file or a folder"
            ) from error


def _safe_path(archive: Path, path: str, member: str) -> str:
    """Return a path below the archive in plain form, or refuse one that leaves it."""
    pieces = path.split("/")
    if path.startswith("/") or ".." in pieces or re.match("[A-Za-z]:", path) or "\0" in path:
        raise refusal(archive, f"holds {member!r}, which would land outside of the dataset")
    return "/".join(piece for piece in pieces if piece not in ("", "."))


def _wanted(path: str) -> bool:
    return suffix_of(path) in IMAGE_SUFFIXES | MANIFEST_SUFFIXES and not is_hidden(path)
