"""Pooled features of a backbone, computed once for each image and kept for all who need them.

The cache is content-addressed: the same weights, images, view and number format give the same
features, in this run and in later ones, whatever part of the data asks for them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoft.data.views import evaluation_batches
from autoft.errors import DataError
from autoft.looking import evaluating, noise
from autoft.network.build import build
from autoft.network.folding import WORTH, folded
from autoft.network.pooling import Pooling, one_pass
from autoft.training.evaluate import EVALUATION_BATCH
from autoft.training.job import Images, Precision, Rows, Setup
from autoft.training.kept import Features, Kinds, Progress, remembered
from autoft.training.measures import UnfitWeights
from autoft.training.memory import MicroBatches
from autoft.training.precision import autocast, place
from autoft.values import Backbone, Preprocess

Run = Callable[[Tensor], dict[Hashable, Tensor]]
VERSION = 5
# What kept features may differ by from fresh ones, as a share of the largest: on a CPU in fp32,
# and in bf16 or on a GPU, where the batch decides how sums are made.
CLOSELY, LOOSELY = 1e-3, 3e-2


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

    `module` is that of a backbone, or a `Pooling` of one. Where features have to be computed for
    a `Pooling`, the pass gives every kind of pooling, and all are kept: whoever asks for another
    kind later finds it. `network` is the fingerprint of the backbone's module, where it is known.
    Numbers are rounded to fp16, unless that does not hold them.
    """
    pool = module if isinstance(module, Pooling) else None
    backbone = module if pool is None else pool.backbone
    asked = "native" if pool is None else pool.identity
    network = network or fingerprint(backbone, setup)

    def key_of(identity: Hashable) -> str:
        return cache_key(network, setup, (identity, pre, precision.bf16, flip))

    def passed(run: Run, rows: Rows) -> Iterator[Kinds]:
        once = _Pass(run, precision, torch.device(setup.device))
        backbone.eval()
        batches = evaluation_batches(setup.store, rows, pre, EVALUATION_BATCH, flip=flip)
        with folded(backbone, pre.image_size) if len(rows) >= WORTH else nullcontext():
            for images in batches:
                found = once.features(images).items()
                yield {key_of(identity): each for identity, each in found}

    def alone(images: Tensor) -> dict[Hashable, Tensor]:
        return {asked: module(images)}

    def compute(rows: Rows) -> Iterator[Kinds]:
        if pool is None or flip:  # nobody asks for mirrored images in several ways
            yield from passed(alone, rows)
            return
        with one_pass(pool.whole, pre.image_size, pool) as every:
            yield from passed(every, rows)

    def agrees(rows: Rows, kept: Features) -> bool:
        (fresh,) = (batch[key_of(asked)] for batch in passed(alone, rows))
        loose = precision.bf16 or torch.device(setup.device).type != "cpu"
        return _agree(kept, fresh, LOOSELY if loose else CLOSELY)

    return remembered(key_of(asked), part.rows, compute, progress, agrees)


class _Pass:
    """Takes batches through a network that gives several kinds of features at once."""

    def __init__(self, run: Run, precision: Precision, device: torch.device) -> None:
        self._run = run
        self._precision = precision
        self._device = device
        self._micro = MicroBatches()
        self._widths: dict[Hashable, int] = {}

    def features(self, images: Tensor) -> dict[Hashable, Features]:
        """Return features (N, F) of images (N, 3, S, S) by their identity."""
        with torch.inference_mode(), autocast(self._precision, self._device):
            joined = as_array(self._micro.outputs(self._joined, images))
        ends = np.cumsum(list(self._widths.values()))
        parts = np.split(joined, ends[:-1], axis=1)
        return dict(zip(self._widths, parts, strict=True))

    def _joined(self, images: Tensor) -> Tensor:
        made = self._run(place(images, self._precision, self._device))
        self._widths = {identity: each.shape[1] for identity, each in made.items()}
        return torch.cat([each.float() for each in made.values()], dim=1)


def _agree(kept: Features, fresh: Features, tolerance: float) -> bool:
    """Tell whether features (N, F) differ by less than a share of the largest."""
    if kept.shape != fresh.shape:
        return False
    largest = np.abs(fresh[np.isfinite(fresh)]).max(initial=0.0)
    return np.allclose(kept, fresh, rtol=0.0, atol=tolerance * largest, equal_nan=True)


def as_array(features: Tensor) -> Features:
    """Return a batch of features as fp32 (N, F) in main memory."""
    array: Features = features.float().cpu().numpy()
    return array


def cache_key(network: str, setup: Setup, view: object) -> str:
    """Return what tells this network (its fingerprint), images and view from all others."""
    kind = torch.device(setup.device).type
    libraries = torch.__version__, timm.__version__, np.__version__
    return digest(network, setup.store.key, kind, libraries, VERSION, view)


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
    return digest(weights_hash(module), parts_of(module), output.shape, _coarse(output))


def parts_of(module: nn.Module) -> str:
    """Return the parts of a network in words, without addresses, which differ in each process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(module))


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
