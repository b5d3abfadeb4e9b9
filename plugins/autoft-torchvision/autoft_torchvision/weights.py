"""Fetch torchvision's weights: from its cache, or from the network where that is allowed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.hub import HASH_REGEX, download_url_to_file
from torchvision.models import WeightsEnum
from torchvision.models.vision_transformer import interpolate_embeddings

from autoft import MachineError
from autoft.weights import Told, Weights, offline, quiet

POSITIONS = "encoder.pos_embedding"
PATCH_SIZE = 16
COCO_BODY = "backbone.body."

State = Mapping[str, Tensor]


def fetch(weights: WeightsEnum, name: str) -> State:
    """Return the state dict of `weights`; `name` is the backbone's, for messages.

    A file in torch's cache is used as it is. Only tensors are read from it: code in it never runs.

    Raises:
        MachineError: the file is absent and cannot be downloaded, or it is damaged.
    """
    path = download(weights, name, quiet, again=False)
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        reason = f"it cannot be read ({type(error).__name__}); if it is damaged, delete it"
        raise _explain(weights, name, reason) from error
    return state


def published_file(weights: WeightsEnum, name: str, source: str) -> Weights:
    """Return what is known of the file of `weights` before it is read; `name` is the backbone's.

    torchvision states no licence for weights.
    """
    file = cached(weights)
    start = HASH_REGEX.search(file.name)
    return Weights(
        origin=weights.url,
        place=str(file.parent),
        path=str(file) if file.is_file() else "",
        source=source,
        sha256=start[1] if start else "",
        get=lambda told, again: download(weights, name, told, again=again),
    )


def download(weights: WeightsEnum, name: str, told: Told, *, again: bool) -> Path:
    """Return the file of `weights` in torch's cache, fetched if it is not there.

    Raises:
        MachineError: it is absent and cannot be downloaded, or arrives damaged.
    """
    path = cached(weights)
    if path.is_file() and not again:
        return path
    if switch := offline():
        raise _explain(weights, name, f"{switch}=1 forbids the network")
    start = HASH_REGEX.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(weights.url, str(path), start[1] if start else None, progress=False)
    except Exception as error:  # urllib raises what sockets raise, torch a RuntimeError
        raise _explain(weights, name, f"downloading failed ({error})") from error
    size = path.stat().st_size
    told(size, size)
    return path


def cached(weights: WeightsEnum) -> Path:
    """Return where torch keeps, or would keep, the file of `weights`."""
    url: str = weights.url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def _explain(weights: WeightsEnum, name: str, reason: str) -> MachineError:
    return MachineError(
        f"The weights of '{name}' could not be loaded from {cached(weights)}: {reason}. Put the "
        f"file of {weights.url} there, or name a file of your own as '{name}@FILE'."
    )


def fetch_coco_body(weights: WeightsEnum, name: str) -> State:
    """Return the ResNet-50 inside a Faster R-CNN checkpoint under a plain ResNet-50's names.

    Raises:
        MachineError: as `fetch`.
    """
    state = fetch(weights, name)
    return {
        key.removeprefix(COCO_BODY): tensor
        for key, tensor in state.items()
        if key.startswith(COCO_BODY)
    }


def fit(state: State, module: nn.Module, image_size: int = 0) -> State:
    """Return what of `state` belongs to `module`, position embeddings at `image_size` pixels.

    The count of batches that a frozen batch norm does not have starts at 0.
    """
    own = module.state_dict()
    counts = {key: own[key] for key in own if key.endswith("num_batches_tracked")}
    kept = counts | {key: tensor for key, tensor in state.items() if key in own}
    if POSITIONS in kept and image_size:
        kept = interpolate_embeddings(image_size, PATCH_SIZE, OrderedDict(kept))
    return kept
