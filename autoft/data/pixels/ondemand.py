"""Images that are decoded each time they are asked for, where the disk cannot keep them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from autoft.data.cache.entries import building, publish
from autoft.data.cache.files import cache_root, machine_errors, write_json_atomic
from autoft.data.cache.holding import hold, release
from autoft.data.pixels.decode import Pixels, decode, in_threads, to_square
from autoft.data.pixels.store import PIXELS, Digests, Rows, store_key
from autoft.errors import DataError, MachineError

THREADS: Final = min(8, os.cpu_count() or 1)
PAUSE: Final = 0.1  # seconds before a file is tried again
_ABOUT: Final = "files.json"
_PATHS: Final = "paths.npy"
_ENDS: Final = "ends.npy"
_DIGESTS: Final = "digests.npy"


@dataclass(frozen=True)
class DecodedOnTheFly:
    """A `Store` that decodes from the files of the dataset; `path` is a folder that lists them.

    `why` says why the images could not be kept.
    """

    path: str
    rows: int
    resize: int
    key: str
    why: str = field(default="", compare=False)

    def read(self, rows: Rows) -> Pixels:
        """Return `rows`, uint8 (B, resize, resize, 3), decoded in threads.

        Raises:
            DataError: `data_changed`: a file is not what it was when the data were read.
            MachineError: the list of the files is gone from the cache.
        """
        files = self._files
        pixels = np.empty((len(rows), self.resize, self.resize, 3), np.uint8)
        squares = in_threads(files.square, np.asarray(rows).tolist(), workers=THREADS)
        for place, square in enumerate(squares):
            pixels[place] = square
        return pixels

    @cached_property
    def _files(self) -> _Files:
        return _Files(self)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the path, never the list."""
        return {column.name: getattr(self, column.name) for column in fields(self)}


def on_the_fly(
    root: str, paths: Sequence[str], digests: Digests, resize: int, interpolation: str, why: str
) -> DecodedOnTheFly:
    """Return a store of the files `paths` below `root`, whose SHA-256 are `digests` (rows, 32).

    Raises:
        MachineError: the cache has no room even for the list of them, or cannot be written.
    """
    key = store_key(digests, resize, interpolation)
    names = [path.encode("utf-8", "surrogatepass") for path in paths]
    place = hashlib.sha256(b"\0".join([root.encode("utf-8", "surrogatepass"), *names]))
    entry = cache_root() / PIXELS / f"{key}-{place.hexdigest()[:12]}"
    store = DecodedOnTheFly(str(entry), len(paths), resize, key, why)
    hold(entry)
    if not (entry / _ABOUT).is_file():
        release(entry)
        with building(PIXELS) as folder, machine_errors(folder):
            np.save(folder / _PATHS, np.frombuffer(b"".join(names), np.uint8))
            np.save(folder / _ENDS, np.cumsum([len(name) for name in names], dtype=np.int64))
            np.save(folder / _DIGESTS, digests)
            write_json_atomic(folder / _ABOUT, {"root": root, "interpolation": interpolation})
            publish(folder, entry, (entry / _ABOUT).is_file)
    return store


class _Files:
    """The files of the rows in this process; the arrays are maps, shared by all processes."""

    def __init__(self, store: DecodedOnTheFly) -> None:
        entry = Path(store.path)
        with contextlib.suppress(MachineError):  # a cache that this process can only read
            hold(entry)
        try:
            about = json.loads((entry / _ABOUT).read_bytes())
            self._paths, self._ends, self._digests = (
                np.load(entry / name, "r", allow_pickle=False)
                for name in (_PATHS, _ENDS, _DIGESTS)
            )
            self._root, self._interpolation = Path(about["root"]), str(about["interpolation"])
        except (OSError, EOFError, ValueError, LookupError) as error:
            (entry / _ABOUT).unlink(missing_ok=True)
            raise MachineError(
                f"The list of images in {store.path!r} was damaged or is gone; repeat the "
                "command, which writes it anew."
            ) from error
        self._resize = store.resize

    def square(self, row: int) -> Pixels:
        """Decode one row; what has changed is tried twice, for files come and go on networks."""
        path = self._path(row)
        data = self._known(path, row)
        if data is None:
            time.sleep(PAUSE)
            data = self._known(path, row)
        if data is None:
            what = "has changed" if path.exists() else "is gone"
            raise DataError(
                f"data_changed: {str(path)!r} {what} since the data were read; restore it, or "
                "start a new run with another --out."
            )
        image = decode(io.BytesIO(data))  # it could be decoded when the data were read
        return to_square(image, self._resize, self._interpolation)

    def _known(self, path: Path, row: int) -> bytes | None:
        """Return the content of the file if it is what it was."""
        try:
            data = path.read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).digest() == self._digests[row].tobytes() else None

    def _path(self, row: int) -> Path:
        start = int(self._ends[row - 1]) if row else 0
        name: bytes = self._paths[start : self._ends[row]].tobytes()
        return self._root / name.decode("utf-8", "surrogatepass")
