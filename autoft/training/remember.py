"""What was measured of a backbone on a data set, kept beside the features for the next search."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from autoft.data.cache.files import cache_root, write_json_atomic
from autoft.network.sources import Source
from autoft.training.features import digest, stages_of
from autoft.training.job import Setup
from autoft.values import Backbone

LIBRARIES = ("autoft", "torch", "timm", "numpy", "scikit-learn")


def key_of(setup: Setup, *parts: object) -> str:
    """Return what tells a measurement from all others: where, with what, on which pixels, `parts`.

    The machine counts, because speeds are measured too.
    """
    return place_of(setup, setup.store.key, setup.store.resize, *parts)


def place_of(setup: Setup, *parts: object) -> str:
    """Return what tells a measurement of `parts` from others, whatever data it is made for.

    That is the machine and its device, the number of threads, the libraries and the image size.
    """
    device = torch.device(setup.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    place = (platform.node(), device.type, name, setup.threads)
    library = tuple(version(each) for each in LIBRARIES)
    return digest(place, library, setup.image_size, *parts)


def identity(network: str, source: Source, backbone: Backbone) -> tuple[object, ...]:
    """Return what `key_of` needs to tell a backbone from all others.

    `network` is the fingerprint of its module. What is only told of it counts as well: it is in
    what is remembered.
    """
    asked = source.plugin, sorted(source.options.items()), source.pretrained
    told = backbone.source, backbone.license, backbone.mean, backbone.std
    return network, asked, told, stages_of(backbone)


def recall(kind: str, key: str, seconds: float = math.inf) -> dict[str, Any] | None:
    """Return what was kept under `key`; None if nothing was, or it is damaged.

    What is older than `seconds` is not known any more, however lately it was read.
    """
    path = cache_root() / "features" / f"{kind}-{key}.json"
    try:
        known: Any = json.loads(path.read_bytes())
        found, age = known["found"], time.time() - float(known["stored"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if not 0 <= age <= seconds:  # a time to come: the clock was wrong
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the cache drops first what was not used for longest
    return found if isinstance(found, dict) else None


def remember(kind: str, key: str, found: Mapping[str, Any]) -> None:
    """Keep plain data under `key`.

    Raises:
        MachineError: the cache cannot be written.
    """
    # The age of the file itself is that of its last use.
    kept = {"stored": time.time(), "found": found}
    write_json_atomic(cache_root() / "features" / f"{kind}-{key}.json", kept, indent=None)
