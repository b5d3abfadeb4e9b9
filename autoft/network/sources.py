"""Where a backbone comes from: a plugin, a folder of weights, a file, or any name timm knows.

Nothing here builds one or imports torch; `autoft.network.build` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from autoft import plugins
from autoft.errors import DataError, UsageError, did_you_mean
from autoft.values import Value

ANY_ARCHITECTURE = "timm"  # the plugin that is asked for every name that is not a plugin's own
WEIGHTS_FILE = "model.safetensors"
MANIFEST = "MANIFEST.json"  # what `autoft weights pack` writes beside the sub-folders


@dataclass(frozen=True)
class Source:
    """A backbone by its label: the plugin that builds it, its options, and a file of weights.

    `pretrained=False` says that no weights can be had: it starts from random ones. `license` and
    `trained_on` are what is told of them: by a file of weights at once, by a plugin once they are
    here, as are the address that they are from, the file that was read, and its SHA-256.
    """

    label: str
    plugin: str
    options: Mapping[str, Value] = field(default_factory=dict)
    weights: str = ""
    pretrained: bool = True
    license: str = ""
    trained_on: str = ""
    origin: str = ""
    file: str = ""
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain data; `Source(**data)` is the inverse."""
        return asdict(self)


def in_folder(folder: Path) -> tuple[dict[str, Source], list[str]]:
    """Return the backbones that the sub-folders of `folder` hold, by label, and what was left out.

    A sub-folder with `config.json` and `model.safetensors` is a timm local directory. One with
    weights alone belongs to the installed plugin that its name begins with, up to the first dot;
    what it was trained on and its licence are in the manifest, else in the file itself.

    Raises:
        UsageError: there is no such folder, or no sub-folder of it holds weights.
    """
    if not folder.is_dir():
        raise UsageError(f"--weights {folder} is no folder. Name the folder that holds weights.")
    found: dict[str, Source] = {}
    notes: list[str] = []
    packed = read_manifest(folder)
    for sub in sorted(path for path in folder.iterdir() if (path / WEIGHTS_FILE).is_file()):
        if (sub / "config.json").is_file():
            found[sub.name] = _local(sub)
            continue
        owner = _owner(sub.name)
        if owner:
            file = str((sub / WEIGHTS_FILE).resolve())
            told = read_metadata(sub / WEIGHTS_FILE) | packed.get(sub.name, {})
            found[sub.name] = Source(
                sub.name,
                owner,
                weights=file,
                license=str(told.get("license") or ""),
                trained_on=str(told.get("source") or sub.name.partition(".")[2]),
            )
        else:
            notes.append(f"{sub.name}: no config.json, and no installed backbone plugin fits it")
    if not found:
        raise UsageError(
            f"--weights {folder} holds no backbone. Expected sub-folders with config.json and "
            f"{WEIGHTS_FILE}, as timm saves them."
        )
    return found, notes


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what `autoft weights pack` wrote of each sub-folder of `folder`; nothing without it.

    Raises:
        DataError: it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["backbones"]
        if all(isinstance(each, dict) for each in told.values()):
            return told
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    raise DataError(
        f"{path} cannot be read; expected what `autoft weights pack` wrote. Copy the folder "
        f"again, or delete this file: without it the weights are used as they are."
    )


def read_metadata(file: Path) -> dict[str, str]:
    """Return what a file of safetensors says of itself, such as `source` and `license`.

    Nothing for any other file, and for one that is not there or damaged: loading it says why.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def _local(folder: Path) -> Source:
    return Source(folder.name, ANY_ARCHITECTURE, {"model": f"local-dir:{folder.resolve()}"})


def _owner(label: str) -> str:
    architecture = label.partition(".")[0]
    names = [p.name for p in plugins.installed("backbone") if p.name != ANY_ARCHITECTURE]
    fitting = [n for n in names if n == architecture or n.endswith(f"_{architecture}")]
    return fitting[0] if len(fitting) == 1 else ""


def resolve(spec: str, local: Mapping[str, Source]) -> Source:
    """Return the backbone that a user's `spec` means, without building it.

    `spec` is a label in `local`, a plugin, a folder, an architecture of timm with or without a
    tag, or any of these followed by `@FILE` with weights of its own.

    Raises:
        PluginError: two packages declare the name.
    """
    name, _, file = spec.partition("@")
    if file:
        base = resolve(name, local)
        told = read_metadata(Path(file))
        return Source(
            spec,
            base.plugin,
            base.options,
            str(Path(file).resolve()),
            license=told.get("license", ""),
            trained_on=told.get("source", ""),
        )
    if name in local:
        return local[name]
    if name.startswith("local-dir:") or (Path(name) / "config.json").is_file():
        return _local(Path(name.removeprefix("local-dir:")))
    known = plugins.installed("backbone")
    if name in {n for p in known for n in (p.name, p.full_name)} and name != ANY_ARCHITECTURE:
        return Source(name, name)
    return Source(name, ANY_ARCHITECTURE, {"model": name})


def suggest(name: str, local: Mapping[str, Source]) -> str:
    """Return a did-you-mean sentence over local labels and plugins."""
    return did_you_mean(name, [*local, *(p.name for p in plugins.installed("backbone"))])
