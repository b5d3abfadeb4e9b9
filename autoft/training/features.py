"""Pooled features of a backbone, computed once for each image and kept for all who need them.

The cache is content-addressed: the same weights, images, view and number format give the same
features, in this run and in later ones, whatever part of the data asks for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoft.data.cache.entries import NoRoom, make_room
from autoft.data.cache.files import cache_root, write_bytes_atomic
from autoft.data.views import evaluation_batches
from autoft.errors import DataError
from autoft.looking import evaluating, noise
from autoft.network.build import build
from autoft.network.pooling import Pooling
from autoft.training.evaluate import EVALUATION_BATCH
from autoft.training.job import Images, Precision, Rows, Setup
from autoft.training.measures import UnfitWeights
from autoft.training.memory import MicroBatches
from autoft.training.precision import autocast, place
from autoft.values import Backbone, Preprocess

Features = NDArray[np.float32]
Progress = Callable[[int, int], None]
VERSION = 4
CHUNK = 64 * EVALUATION_BATCH  # images to a file: what a crash can cost


def built(setup: Setup, label: str, *, pretrained: bool = True) -> Backbone:
    """Build a backbone of `setup`, the same every time also where its weights are random.

    Raises:
        PluginError: it cannot be built.
        UnfitWeights: its file of weights does not fit.
    """
    torch.manual_seed(0)
    try:
        return build(setup.sources[label], pretrained=pretrained, image_size=setup.image_size)
    except DataError as error:
        raise UnfitWeights(str(error)) from error


def pooled_features(  # noqa: PLR0913 - two are of use to some callers only
    module: nn.Module,
    setup: Setup,
    part: Images,
    pre: Preprocess,
    precision: Precision,
    *,
    flip: bool = False,
    network: str = "",
    progress: Progress | None = None,
) -> Features:
    """Return features (N, num_features) of `part` in eval mode, from the cache where they are.

    `module` is that of a backbone, or a `Pooling` of one. `network` is the fingerprint of the
    backbone's module, where it is known.
    """
    device = torch.device(setup.device)
    backbone = module.backbone if isinstance(module, Pooling) else module
    identity = module.identity if isinstance(module, Pooling) else "native"

    def compute(rows: Rows) -> Iterator[Features]:
        backbone.eval()
        micro = MicroBatches()
        for images in evaluation_batches(setup.store, rows, pre, EVALUATION_BATCH, flip=flip):
            with torch.inference_mode(), autocast(precision, device):
                yield as_array(micro.outputs(on_device, images))

    def on_device(images: Tensor) -> Tensor:
        features: Tensor = module(place(images, precision, device))
        return features

    view = (identity, pre, precision.bf16, flip)
    key = cache_key(network or fingerprint(backbone, setup), setup, view)
    return remembered(key, part.rows, compute, progress)


def as_array(features: Tensor) -> Features:
    """Return a batch of features as fp32 (N, F) in main memory."""
    array: Features = features.float().cpu().numpy()
    return array


def cache_key(network: str, setup: Setup, view: object) -> str:
    """Return what tells this network (its fingerprint), images and view from all others."""
    kind = torch.device(setup.device).type
    return digest(network, setup.store.key, kind, VERSION, view)


def fingerprint(module: nn.Module, setup: Setup) -> str:
    """Return what tells a network from all others; it is on the device of `setup` afterwards.

    Weights do not tell what is done with them, and the names of parts not all of it: what the
    network makes of fixed noise counts, too.
    """
    images = noise(module.to(setup.device), 2, setup.image_size)
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    # inference_mode could leave tensors in the network that cannot be trained with.
    with evaluating(module), torch.no_grad(), exact:
        output = as_array(module(images))
    parts = re.sub(r" at 0x[0-9a-f]+", "", repr(module))  # addresses differ in each process
    return digest(weights_hash(module), parts, output.shape, _coarse(output))


def _coarse(output: Features) -> NDArray[np.float64]:
    """Return a few sums over features (N, F), (N, 4), to 3 digits of the largest.

    The last digits depend on the number of threads and the memory layout. Of few numbers,
    hardly ever one is rounded to the other side for that.
    """
    flat = output.reshape(len(output), -1)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (flat.shape[1], 4))
    sums: NDArray[np.float64] = flat @ signs
    scale = float(np.abs(sums).max())
    if not np.isfinite(scale) or scale == 0:
        return sums
    return np.round(sums, 2 - int(np.floor(np.log10(scale)))) + 0.0  # no -0.0


def stages_of(backbone: Backbone) -> tuple[tuple[str, ...], ...]:
    """Return the stages as plain values, whatever sequences the plugin made of them."""
    return tuple(map(tuple, backbone.stages))


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
    # Where there is no room they are computed again; a run does not fail for it.
    with contextlib.suppress(NoRoom):
        make_room(buffer.getbuffer().nbytes)
        write_bytes_atomic(path, buffer.getvalue())
