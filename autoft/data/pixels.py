"""The pixel store: every image decoded once into one memory-mapped array that all share."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from filelock import FileLock

from autoft.data.cache import cache_root, check_space, machine_errors, write_json_atomic
from autoft.data.catalog import Catalog, Excluded, Item
from autoft.data.decode import BadImage, Pixels, Progress, decode, in_threads, to_square

STORE_VERSION: Final = 1
CHECKED_ROWS: Final = 64
_PIXELS: Final = "pixels.u8"
_STORE: Final = "store.json"


@dataclass(frozen=True)
class PixelStore:
    """Decoded images in the file `path`: uint8 (rows, resize, resize, 3), row = `Item.row`."""

    path: str
    rows: int
    resize: int

    @cached_property
    def array(self) -> np.memmap[Any, np.dtype[np.uint8]]:
        """Map the file, read-only, at the first use in each process."""
        shape = (self.rows, self.resize, self.resize, 3)
        return np.memmap(self.path, np.uint8, "r", shape=shape)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the path, never the pixels."""
        return {column.name: getattr(self, column.name) for column in fields(self)}


def open_store(
    catalog: Catalog,
    resize: int,
    *,
    interpolation: str = "bilinear",
    progress: Progress | None = None,
    workers: int | None = None,
) -> tuple[PixelStore, tuple[Excluded, ...]]:
    """Return the store of a catalog and the images that could not be decoded.

    Decodes only where the cache has no whole store of the same files. Image `item` is row
    `item.row`; an excluded image is a row of zeros, for the caller to drop by
    `catalog.without`. `progress` is called with (decoded, images).

    Raises:
        MachineError: the cache has too little space or cannot be written.
        UsageError: `interpolation` is unknown.
    """
    folder = cache_root() / "pixels" / _key(catalog, resize, interpolation)
    rows = 1 + max(item.row for item in catalog.items)
    store = PixelStore(str(folder / _PIXELS), rows, resize)
    with machine_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # Two searches on one dataset: the second waits and then finds the store complete.
    with FileLock(folder / "lock"):
        excluded = _read_excluded(folder, store)
        if excluded is None:
            (folder / _STORE).unlink(missing_ok=True)
            check_space(folder, _bytes(store))
            decoded = _decode_all(catalog, resize, interpolation, progress, workers)
            excluded = _write(folder, store, decoded)
    return store, excluded


def _key(catalog: Catalog, resize: int, interpolation: str) -> str:
    # With the root: two datasets can share names, sizes and (unpacked) times.
    parts = [STORE_VERSION, catalog.root, catalog.fingerprint(), resize, interpolation]
    return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()[:32]


def _bytes(store: PixelStore) -> int:
    return store.rows * store.resize * store.resize * 3


def _decode_all(
    catalog: Catalog,
    resize: int,
    interpolation: str,
    progress: Progress | None,
    workers: int | None,
) -> Iterable[tuple[Item, Pixels | Excluded]]:
    """Decode with threads, in the order of the items."""

    def read(item: Item) -> tuple[Item, Pixels | Excluded]:
        try:
            return item, to_square(decode(catalog.open(item)), resize, interpolation)
        except BadImage as error:
            return item, Excluded(item.path, error.reason)

    return in_threads(read, catalog.items, workers=workers, progress=progress)


def _write(
    folder: Path, store: PixelStore, decoded: Iterable[tuple[Item, Pixels | Excluded]]
) -> tuple[Excluded, ...]:
    """Write the pixels, then `store.json`, which says that they are whole."""
    excluded = []
    # Written as a file, not through a map: there a full disk would kill the process by SIGBUS.
    with machine_errors(folder), (folder / _PIXELS).open("wb") as file:
        file.truncate(_bytes(store))
        for item, pixels in decoded:
            if isinstance(pixels, Excluded):
                excluded.append(pixels)
                continue
            file.seek(item.row * pixels.size)
            file.write(pixels.tobytes())
        file.flush()
        os.fsync(file.fileno())
    about = {
        "version": STORE_VERSION,
        "shape": [store.rows, store.resize, store.resize, 3],
        "excluded": [[entry.path, entry.reason] for entry in excluded],
        "checksum": _checksum(store),
    }
    write_json_atomic(folder / _STORE, about)
    return tuple(excluded)


def _read_excluded(folder: Path, store: PixelStore) -> tuple[Excluded, ...] | None:
    """Return what a whole store excluded, or None where it has to be built."""
    try:
        about = json.loads((folder / _STORE).read_bytes())
        whole = (folder / _PIXELS).stat().st_size == _bytes(store)
        if whole and about["checksum"] == _checksum(store):
            return tuple(Excluded(*entry) for entry in about["excluded"])
    except (OSError, ValueError, LookupError, TypeError):
        return None  # absent or damaged: it can be made again
    return None


def _checksum(store: PixelStore) -> str:
    """Hash some rows all over the file; reading all would cost what the store saves."""
    array = np.memmap(store.path, np.uint8, "r", shape=(store.rows, _bytes(store) // store.rows))
    rows = np.unique(np.linspace(0, store.rows - 1, CHECKED_ROWS).astype(np.int64))
    return hashlib.sha256(array[rows].tobytes()).hexdigest()
