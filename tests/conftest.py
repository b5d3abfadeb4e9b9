"""What all tests share: no network, a cache of their own, and the data beside the checkout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
KEPT = ("AUTOFT_SHARED",)


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the developer's settings and cache out of the tests, also out of their processes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AUTOFT_")]:
            if name not in KEPT:
                patch.delenv(name)
        patch.setenv("AUTOFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_root() -> Path:
    """Return the folder of photographs and weights: AUTOFT_SHARED, or `shared` by the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    root = Path(os.environ.get("AUTOFT_SHARED", beside))
    if not (root / "data").is_dir() or not (root / "weights").is_dir():
        pytest.skip(f"{root} holds no data and weights; set AUTOFT_SHARED to a folder that does")
    return root
