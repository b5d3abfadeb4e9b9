"""Pooled features of a backbone, computed once and kept for every trial that needs them.

The cache is content-addressed: the same weights, images, view and number format give the same
file, in this run and in later ones.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autoft.data.cache import cache_root, write_bytes_atomic
from autoft.data.views import evaluation_batches
from autoft.training.evaluate import EVALUATION_BATCH
from autoft.training.job import Images, Precision, Setup
from autoft.training.precision import autocast, place
from autoft.values import Preprocess

Features = NDArray[np.float32]
Progress = Callable[[int, int], None]
VERSION = 2


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
    path = _cache_path(module, setup, part, pre, precision, flip)
    cached = _read(path, len(part))
    if cached is not None:
        return cached
    batches = evaluation_batches(setup.store, part.rows, pre, EVALUATION_BATCH, flip=flip)
    device = torch.device(setup.device)
    parts: list[Features] = []
    module.eval()
    with torch.inference_mode(), autocast(precision, device):
        for images in batches:
            parts.append(module(place(images, precision, device)).float().cpu().numpy())
            if progress:
                progress(sum(map(len, parts)), len(part))
    features: Features = np.concatenate(parts)
    _write(path, features)
    return features


def _cache_path(
    module: nn.Module,
    setup: Setup,
    part: Images,
    pre: Preprocess,
    precision: Precision,
    flip: bool,
) -> Path:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(part.rows.tobytes())
    kind = torch.device(setup.device).type
    view = (VERSION, Path(setup.store.path).parent.name, pre, precision.bf16, flip, kind)
    digest.update(repr(view).encode())
    return cache_root() / "features" / f"{digest.hexdigest()[:32]}.npy"


def _read(path: Path, rows: int) -> Features | None:
    try:
        features: Features = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return features if len(features) == rows else None


def _write(path: Path, features: Features) -> None:
    buffer = io.BytesIO()
    np.save(buffer, features, allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, buffer.getvalue())
