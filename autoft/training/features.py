"""Pooled features of a backbone, computed once for each image and kept for all who need them.

The cache is content-addressed: the same weights, images, view and number format give the same
features, in this run and in later ones, whatever part of the data asks for them.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoft.data.cache.files import cache_root, write_bytes_atomic
from autoft.data.views import evaluation_batches
from autoft.training.evaluate import EVALUATION_BATCH
from autoft.training.job import Images, Precision, Rows, Setup
from autoft.training.precision import autocast, place
from autoft.values import Preprocess

Features = NDArray[np.float32]
Progress = Callable[[int, int], None]
VERSION = 3
CHUNK = 64 * EVALUATION_BATCH  # images to a file: what a crash can cost


def pooled_features(
    module: nn.Module,
    setup: Setup,
    part: Images,
    pre: Preprocess,
    precision: Precision,
    *,
    flip: bool = False,
    progress: Progress | None = None,
) -> Features:
    """Return features (N, num_features) of `part` in eval mode, from the cache where they are."""
    device = torch.device(setup.device)

    def compute(rows: Rows) -> Iterator[Features]:
        module.eval()
        for images in evaluation_batches(setup.store, rows, pre, EVALUATION_BATCH, flip=flip):
            with torch.inference_mode(), autocast(precision, device):
                yield as_array(module(place(images, precision, device)))

    view = ("final", pre, precision.bf16, flip)
    return remembered(cache_key(module, setup, view), part.rows, compute, progress)


def as_array(features: Tensor) -> Features:
    """Return a batch of features as fp32 (N, F) in main memory."""
    array: Features = features.float().cpu().numpy()
    return array


def cache_key(module: nn.Module, setup: Setup, view: object) -> str:
    """Return what tells these weights, images and view from all others, in hex digits."""
    kind = torch.device(setup.device).type
    return digest(weights_hash(module), setup.store.key, kind, VERSION, view)


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers of `module`, by name."""
    hashed = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        hashed.update(name.encode())
        # As bytes: numpy has no bf16.
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()


def digest(*parts: object) -> str:
    """Return 32 hex digits that differ where the parts, arrays or values, differ."""
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            hashed.update(repr((part.shape, part.dtype.str)).encode())
            hashed.update(part.tobytes())
        else:
            hashed.update(repr(part).encode())
    return hashed.hexdigest()[:32]


def remembered(
    key: str,
    rows: Rows,
    compute: Callable[[Rows], Iterator[Features]],
    progress: Progress | None = None,
) -> Features:
    """Return the features (N, F) of `rows`: known ones from the cache, the others by `compute`.

    `compute` yields features in the order of the rows that it is given. What is computed is kept
    in files of `CHUNK` images, so that what is cut off is not lost.
    """
    table = _Table(rows)
    table.read(key)
    missing = table.missing()
    done = len(rows) - len(missing)
    for start in range(0, len(missing), CHUNK):
        chunk, batches = missing[start : start + CHUNK], list[Features]()
        for batch in compute(chunk):
            batches.append(batch)
            done += len(batch)
            if progress:
                progress(done, len(rows))
        features: Features = np.concatenate(batches)
        _write(_folder() / f"{key}-{digest(chunk)}.npz", chunk, features)
        table.fill(chunk, features)
    return table.features()


class _Table:
    """Features by row, filled bit by bit; holds each once, however many there are."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self._places = np.unique(rows, return_inverse=True)
        self._filled = np.zeros(len(self._rows), np.bool_)
        self._features: Features = np.zeros((len(self._rows), 0), np.float32)

    def read(self, key: str) -> None:
        """Fill in what files of `key` hold."""
        for path in sorted(_folder().glob(f"{key}-*.npz")):
            if self._filled.all():
                return
            try:
                with np.load(path, allow_pickle=False) as file:
                    self.fill(file["rows"], file["features"])
                os.utime(path)  # the cache drops first what was not used for longest
            except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
                continue  # damaged, or dropped meanwhile: it can be made again

    def fill(self, rows: Rows, features: Features) -> None:
        """Take in features (N, F) of `rows`; those not asked for are left out."""
        if not self._filled.any():
            self._features = np.zeros((len(self._rows), features.shape[1]), np.float32)
        places = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        asked = self._rows[places] == rows
        self._features[places[asked]] = features[asked]
        self._filled[places[asked]] = True

    def missing(self) -> Rows:
        """Return the rows that are not filled in, ascending."""
        return self._rows[~self._filled]

    def features(self) -> Features:
        """Return the features in the order in which the rows were asked for."""
        if np.array_equal(self._places, np.arange(len(self._rows))):
            return self._features
        ordered: Features = self._features[self._places]
        return ordered


def _folder() -> Path:
    return cache_root() / "features"


def _write(path: Path, rows: Rows, features: Features) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, rows=rows, features=features)
    write_bytes_atomic(path, buffer.getvalue())
