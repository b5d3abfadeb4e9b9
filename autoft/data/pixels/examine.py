"""The one pass over the files of a dataset: each is read once, hashed, decoded and stored."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from autoft.data.cache.entries import NoRoom, building, make_room
from autoft.data.cache.holding import hold, release
from autoft.data.pixels import scans
from autoft.data.pixels.decode import (
    BadImage,
    Pixels,
    Progress,
    check_interpolation,
    in_threads,
    look,
    read_size,
    to_square,
)
from autoft.data.pixels.ondemand import DecodedOnTheFly, on_the_fly
from autoft.data.pixels.scans import Files, Scan
from autoft.data.pixels.store import (
    PIXELS,
    Store,
    StoreWriter,
    checksum,
    find_store,
    row_bytes,
    store_key,
)
from autoft.data.reading import Listing

MISSING: Final = "missing"
UNREADABLE: Final = "cannot be read"
SAMPLE: Final = 512
LARGE: Final = 2**26  # bytes of a file that is not taken into memory as a whole
_DISK_FULL: Final = "the disk became full while the images were being decoded"


@dataclass(frozen=True)
class Examined:
    """What was seen of the images of a `Listing`; columns in its order, (N,).

    `digests` are the SHA-256 of the files, (N, 32); zeros for one that could not be read. `sizes`
    is (N, 2), width and height in pixels after EXIF orientation; zeros for what is no image.
    `noticed` holds the flags `decode.Noticed`. `rows` are the places in the store, the same for
    identical files; -1 for an image that cannot be used, whose `reasons` (by position) say why.
    """

    digests: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int32]
    noticed: npt.NDArray[np.uint16]
    rows: npt.NDArray[np.int64]
    reasons: Mapping[int, str]


@dataclass(frozen=True)
class _Seen:
    """One file: `pixels` are there if they are to be stored, with their checksum `total`."""

    digest: bytes = b""
    size: tuple[int, int] = (0, 0)
    noticed: int = 0
    reason: str = ""
    pixels: Pixels | None = None
    total: int = 0


@dataclass(frozen=True)
class _Square:
    """What is kept of an image: a square of `resize` pixels."""

    resize: int
    interpolation: str


def examine(
    listing: Listing,
    resize: int,
    *,
    interpolation: str = "bilinear",
    progress: Progress | None = None,
    workers: int | None = None,
    waiting: Callable[[], None] | None = None,
) -> tuple[Examined, Store]:
    """Look at every file of a listing, and return what was seen and the decoded images.

    What a command before has seen of the same files, in the same state, is not looked at again.
    Where the cache has no room for the images they are decoded on the fly. `progress` is called
    with (files done, distinct files); `workers` are threads, by default one a core. `waiting` is
    called once if another process looks at the same files for more than a moment.

    Raises:
        MachineError: the cache cannot be written.
        UsageError: `interpolation` or AUTOFT_CACHE_LIMIT is unknown.
    """
    check_interpolation(interpolation)
    square = _Square(resize, interpolation)
    files = scans.distinct_files(listing.stats)
    path = scans.scan_path(listing)
    with scans.locked(path, waiting), _held(path):
        scan = _known_scan(path, listing, files)
        store = None if scan is None else _known_store(listing, files, scan, square)
        if scan is None or store is None:
            expected = len(files.first) if scan is None else len(scan.of_rows())
            with _quiet(), ExitStack() as stack:
                writer, why = _writer(stack, expected, resize)
                wanted = None if writer is None else square
                seen = _look_at_all(listing, files, wanted, progress, workers)
                scan = _collect(seen, len(files.first), writer)
                store = _new_store(listing, files, scan, square, writer, why)
            scans.save(path, scan)
        else:
            _shrink()  # now that what was found is held
    return _expand(scan, files), store


def median_short_side(listing: Listing, sample: int = SAMPLE) -> int:
    """Return the median shorter side in pixels by the headers of a sample; 0 if none is whole."""
    count = min(sample, len(listing))
    chosen = np.unique(np.linspace(0, len(listing) - 1, count).astype(np.int64))

    def measure(position: int) -> int:
        try:
            return min(read_size(Path(listing.root, listing.paths[position])))
        except BadImage:
            return 0

    with _quiet():
        sides = [side for side in in_threads(measure, chosen.tolist()) if side]
    return int(np.median(sides)) if sides else 0


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keep a scan from eviction for as long as it is being used."""
    hold(path)
    try:
        yield
    finally:
        release(path)


def _shrink() -> None:
    """Bring a cache that has grown beyond its limit back to it, as far as nobody uses it."""
    with contextlib.suppress(NoRoom):
        make_room(0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Pillow finds odd in a file from standard error; what matters is noticed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _writer(stack: ExitStack, rows: int, resize: int) -> tuple[StoreWriter | None, str]:
    """Open a store in the making, or say why there is no room for one."""
    try:
        make_room(rows * row_bytes(resize))
    except NoRoom as error:
        return None, str(error)
    folder = stack.enter_context(building(PIXELS))
    return stack.enter_context(StoreWriter(folder, rows, resize)), ""


def _look_at_all(
    listing: Listing,
    files: Files,
    square: _Square | None,
    progress: Progress | None,
    workers: int | None,
) -> Iterable[_Seen]:
    """Return what is seen of every distinct file, in order; pixels where `square` is given."""

    def see(position: int) -> _Seen:
        return _see(Path(listing.root, listing.paths[position]), square)

    return in_threads(see, files.first.tolist(), workers=workers, progress=progress)


def _see(path: Path, square: _Square | None) -> _Seen:
    try:
        with path.open("rb", buffering=0) as file:
            source, digest = _take(file)
            return _decode(source, path, digest, square)
    except (FileNotFoundError, NotADirectoryError):
        return _Seen(reason=MISSING)
    except OSError as error:
        return _Seen(reason=f"{UNREADABLE} ({error.strerror or error})")


def _take(file: io.FileIO) -> tuple[BinaryIO, bytes]:
    """Return what to decode from, and the SHA-256 of all bytes."""
    if os.fstat(file.fileno()).st_size > LARGE:
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(0)
        return file, digest
    data = file.readall()
    return io.BytesIO(data), hashlib.sha256(data).digest()


def _decode(source: BinaryIO, path: Path, digest: bytes, square: _Square | None) -> _Seen:
    try:
        looked = look(source, path.suffix)
    except BadImage as error:
        return _Seen(digest, reason=error.reason)
    if square is None:
        return _Seen(digest, looked.size, looked.noticed)
    pixels = to_square(looked.image, square.resize, square.interpolation)
    return _Seen(digest, looked.size, looked.noticed, pixels=pixels, total=checksum(pixels))


def _collect(seen: Iterable[_Seen], count: int, writer: StoreWriter | None) -> Scan:
    """Number the distinct images in order, and write each to its row."""
    digests = np.zeros((count, 32), np.uint8)
    sizes = np.zeros((count, 2), np.int32)
    noticed = np.zeros(count, np.uint16)
    rows = np.full(count, -1, np.int64)
    reasons: dict[int, str] = {}
    known: dict[bytes, int] = {}
    for number, one in enumerate(seen):
        if one.digest:
            digests[number] = np.frombuffer(one.digest, np.uint8)
        if one.reason:
            reasons[number] = one.reason
            continue
        sizes[number], noticed[number] = one.size, one.noticed
        row = known.setdefault(one.digest, len(known))
        rows[number] = row
        if writer is not None and one.pixels is not None and row == writer.rows:
            writer.add(one.pixels, one.total)
    return Scan(digests, sizes, noticed, rows, reasons)


def _new_store(
    listing: Listing,
    files: Files,
    scan: Scan,
    square: _Square,
    writer: StoreWriter | None,
    why: str,
) -> Store:
    """Give the store that was written its name, unless there is one of the same images."""
    if writer is not None:
        key = _key(scan, square)
        store = find_store(key, writer.rows, square.resize) or writer.publish(key)
        if store is not None:
            return store
    return _on_the_fly(listing, files, scan, square, why or _DISK_FULL)


def _known_scan(path: Path, listing: Listing, files: Files) -> Scan | None:
    """Return what is known of the files, unless one that could not be read now can."""
    scan = scans.load(path, len(files.first))
    if scan is None:
        return None
    for number, reason in scan.reasons.items():
        if reason.startswith((MISSING, UNREADABLE)):
            unread = Path(listing.root, listing.paths[files.first[number]])
            with contextlib.suppress(OSError), unread.open("rb") as file:
                file.read(1)
                return None
    return scan


def _known_store(listing: Listing, files: Files, scan: Scan, square: _Square) -> Store | None:
    """Return the decoded images, or None where they have to be, and can be, made."""
    rows = len(scan.of_rows())
    if store := find_store(_key(scan, square), rows, square.resize):
        return store
    try:
        make_room(rows * row_bytes(square.resize))
    except NoRoom as error:
        return _on_the_fly(listing, files, scan, square, str(error))
    return None


def _on_the_fly(
    listing: Listing, files: Files, scan: Scan, square: _Square, why: str
) -> DecodedOnTheFly:
    used = scan.of_rows()
    paths = [listing.paths[position] for position in files.first[used].tolist()]
    digests = scan.digests[used]
    return on_the_fly(listing.root, paths, digests, square.resize, square.interpolation, why)


def _key(scan: Scan, square: _Square) -> str:
    return store_key(scan.digests[scan.of_rows()], square.resize, square.interpolation)


def _expand(scan: Scan, files: Files) -> Examined:
    """Return what was seen of the distinct files for every path."""
    which = files.which
    rows = scan.rows[which]
    bad = np.flatnonzero(rows < 0).tolist()
    reasons = {position: scan.reasons[int(which[position])] for position in bad}
    return Examined(scan.digests[which], scan.sizes[which], scan.noticed[which], rows, reasons)
