"""What was measured of a backbone on a data set, kept beside the features for the next search."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from autoft.data.cache.files import cache_root, write_json_atomic
from autoft.training.features import digest
from autoft.training.job import Setup

LIBRARIES = ("autoft", "torch", "timm", "numpy", "scikit-learn")


def key_of(setup: Setup, *parts: object) -> str:
    """Return what tells a measurement from all others: where, with what, on which pixels, `parts`.

    The machine counts, because speeds are measured too.
    """
    device = torch.device(setup.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    place = (platform.node(), device.type, name, setup.threads)
    library = tuple(version(each) for each in LIBRARIES)
    return digest(place, library, setup.store.key, setup.store.resize, setup.image_size, *parts)


def recall(kind: str, key: str) -> dict[str, Any] | None:
    """Return what was kept under `key`; None if nothing was, or it is damaged."""
    path = cache_root() / "features" / f"{kind}-{key}.json"
    try:
        known: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the cache drops first what was not used for longest
    return known if isinstance(known, dict) else None


def remember(kind: str, key: str, found: Mapping[str, Any]) -> None:
    """Keep plain data under `key`.

    Raises:
        MachineError: the cache cannot be written.
    """
    write_json_atomic(cache_root() / "features" / f"{kind}-{key}.json", found, indent=None)
