"""What all tests share: no network, a cache of their own, and the data beside the checkout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# A Ray cluster of our own, whatever else runs on this machine.
os.environ["RAY_ADDRESS"] = "local"
# Small networks on small batches: two threads only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
KEPT = ("AUTOFT_SHARED",)
SMALL = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet")


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


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 3 x 40 generated images, whose classes are told apart by colour."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, colour in {
        "red": (200, 60, 60),
        "green": (60, 180, 60),
        "blue": (60, 60, 200),
    }.items():
        (root / label).mkdir()
        for index in range(40):
            pixels = rng.normal(colour, 60, (48, 56, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / label / f"{index:02d}.png")
    return root


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a --weights folder with two small networks whose weights are random but fixed."""
    import timm
    import torch

    root = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(["test_resnet", "test_byobnet"]):
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=10)
        timm.models.save_for_hf(model, root / f"{name}.fixed", safe_serialization=True)
    return root


@pytest.fixture(scope="session")
def setup_in() -> Callable[..., Any]:
    """Return what makes a setup of a data set at 64 pixels, with backbones, in a run folder."""
    import torch

    from autoft.search.images import read_data, setup_of
    from autoft.search.settings import Settings

    def make(dataset: Path, sources: Mapping[str, Any], folder: Path) -> Any:
        torch.set_num_threads(1)
        settings = Settings(dataset=str(dataset), image_size=64, metric="accuracy")
        data = read_data(settings, lambda *_, **__: None)
        return replace(setup_of(settings, folder, data, sources, "cpu"), threads=1)

    return make


@pytest.fixture(scope="session")
def tiny_sources(tiny_weights: Path) -> Mapping[str, Any]:
    """Return the two small networks as a search finds them."""
    from autoft.network.sources import in_folder

    return in_folder(tiny_weights)[0]


@pytest.fixture(scope="module")
def small_setup(
    photos: Path, setup_in: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Return a setup of generated photographs with small networks of five families."""
    from autoft.network.sources import Source

    sources = {name: Source(name, "timm", {"model": name}) for name in SMALL}
    return setup_in(photos, sources, tmp_path_factory.mktemp("run"))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return what installs a module of plugins here and in the processes that are started."""
    from autoft import plugins

    modules: list[str] = []

    def installed(module: str, code: str, kind: str, names: Iterable[str]) -> None:
        root, package = tmp_path / "site", module.replace("_", "-")
        info = root / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (root / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        points = "".join(f"{name} = {module}:{name}\n" for name in names)
        (info / "entry_points.txt").write_text(f"[autoft.{kind}]\n{points}")
        monkeypatch.syspath_prepend(str(root))
        monkeypatch.setenv("PYTHONPATH", str(root))
        plugins.installed.cache_clear()
        modules.append(module)

    yield installed
    plugins.installed.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make random weights count as pre-trained and be the same in every build."""
    import torch

    from autoft.network.build import build

    def seeded(source: Any, *, pretrained: bool = True, image_size: int = 0) -> Any:
        torch.manual_seed(0)
        return build(source, pretrained=False, image_size=image_size)

    monkeypatch.setattr("autoft.training.trial.build", seeded)
    return seeded


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Return what runs a command in this process, in a folder of its own: code, output, errors."""
    from autoft.cli.main import main

    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        told = capsys.readouterr()
        assert "Traceback" not in told.err, told.err
        return code, told.out, told.err

    return call


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the benchmarks in the folder `SCRIPTS` of a test module find each other, as when run."""
    before, folder = set(sys.modules), request.module.SCRIPTS
    monkeypatch.setattr(sys, "path", [str(folder.parent), str(folder), *sys.path])
    yield
    for name in set(sys.modules) - before:  # those in other folders have modules of these names
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder.parent)):
            del sys.modules[name]
