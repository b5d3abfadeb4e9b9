"""What a worker can be asked about weights: to provide, list, fetch, verify and pack them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoft import plugins
from autoft.errors import AutoftError, MachineError, PluginError
from autoft.network import provide as work
from autoft.network.licenses import is_commercial
from autoft.network.provide import Provided, check, fetch, license_of, locate, sha256_of
from autoft.network.sources import ANY_ARCHITECTURE, WEIGHTS_FILE, Source, resolve
from autoft.search.engines.tasks import Link
from autoft.space import read_signature
from autoft.weights import Weights

CONFIG = "config.json"


@dataclass(frozen=True)
class Listed:
    """One backbone's weights: `state` is here, missing, or unknown where its plugin does not tell.

    `commercial` is None where the terms of the licence are not known, `tier` the size of default
    searches that take it, `place` where the file is looked for; `bytes` is 0 while it is missing.
    """

    name: str
    tier: str
    state: str
    license: str
    commercial: bool | None
    source: str
    bytes: int
    path: str
    place: str
    origin: str


@dataclass(frozen=True)
class LeftOut:
    """Why a backbone that was not asked for by name is left out, and the exit code of that."""

    text: str
    exit_code: int


@dataclass(frozen=True)
class Verified:
    """What became of weights when they were hashed and loaded; `wrong` says what is, if any."""

    name: str
    path: str
    sha256: str
    wrong: str
    notes: tuple[str, ...] = ()


def provide(
    link: Link, source: Source, allowed: Collection[str], image_size: int, asked: bool
) -> Provided | LeftOut:
    """Have the weights of a backbone here; why not, for one that was not asked for by name.

    Those of one that was asked for are loaded once, so that whatever is wrong with them is known
    before data is decoded.

    Raises:
        AutoftError: it was asked for, and cannot be had.
    """
    try:
        found = work.provide(source, allowed, link.progress)
    except AutoftError as error:
        if asked:
            raise
        return LeftOut(str(error), error.exit_code)
    except Exception as error:  # a plugin that nobody asked for may fail in any way
        if asked:
            raise
        text = f"The backbone '{source.label}' fails: {type(error).__name__}: {error}"
        return LeftOut(text, PluginError.exit_code)
    if not asked:
        return found
    return replace(found, notes=(*found.notes, *check(source, image_size)))


def listing(link: Link, sources: Sequence[Source], cached: bool) -> list[Listed]:
    """Describe the weights of `sources`, and with `cached` those that timm fetched before."""
    rows = [_describe(source) for source in sources]
    labels, paths = {row.name for row in rows}, {row.path for row in rows}
    for name, source in _fetched().items() if cached else ():
        row = _describe(source)
        if name not in labels and row.path not in paths:  # not under a plainer name of ours
            rows.append(row)
    return rows


def _fetched() -> dict[str, Source]:
    """Return the architectures of timm whose weights lie in the Hub's cache."""
    import timm
    from huggingface_hub import constants
    from timm.models import get_pretrained_cfg

    root = Path(constants.HF_HUB_CACHE)
    here = {path.name for path in root.glob("models--*")} if root.is_dir() else set()
    found: dict[str, Source] = {}
    for name in timm.list_pretrained() if here else ():
        config = get_pretrained_cfg(name)
        repo = (config.hf_hub_id or "").partition("@")[0] if config else ""
        if f"models--{repo.replace('/', '--')}" in here:
            source = resolve(name, {})
            weights = locate(source)
            if weights and weights.path:
                found[name] = replace(source, plugin=ANY_ARCHITECTURE, options={"model": name})
    return found


def _describe(source: Source) -> Listed:
    try:
        weights, tier = locate(source), _tier(source)
        license = license_of(source, weights)
    except AutoftError as error:
        return Listed(source.label, "", f"unusable: {error}", "", None, "", 0, "", "", "")
    found = weights or Weights("", "")
    state = "here" if found.path else "missing" if weights else "unknown"
    return Listed(
        name=source.label,
        tier=tier,
        state=state,
        license=license,
        commercial=is_commercial(license),
        source=found.source,
        bytes=Path(found.path).stat().st_size if found.path else 0,
        path=found.path,
        place=found.place,
        origin=found.origin,
    )


def _tier(source: Source) -> str:
    parameters = read_signature(plugins.load("backbone", source.plugin))
    found = {each.name: each.default for each in parameters}.get("tier", "")
    return str(found)


def pull(link: Link, source: Source, allowed: Collection[str]) -> Provided:
    """Fetch the weights of a backbone; a file that is not what was published is fetched again.

    Raises:
        UsageError: their licence is not allowed.
        MachineError: they cannot be fetched, or arrive damaged.
    """
    found = work.provide(source, allowed, link.progress)
    weights = locate(source)
    if weights is None:
        check(source)
        return found
    if found.source.sha256.startswith(weights.sha256):
        return found
    path = fetch(source, weights, link.progress, again=True)
    fetched = replace(found.source, file=str(path), sha256=sha256_of(path))
    if not fetched.sha256.startswith(weights.sha256):
        raise MachineError(
            f"The weights of '{source.label}' arrived damaged at {path}: SHA-256 {fetched.sha256} "
            f"and not {weights.sha256}. Run the command again."
        )
    return replace(found, source=fetched)


def verify(link: Link, source: Source, expected: str) -> Verified:
    """Hash the weights of a backbone and load them; `expected` is the SHA-256 of a manifest.

    Raises:
        MachineError: they are not here.
    """
    link.progress(f"verifying {source.label}", 0, 0)
    weights = locate(source)
    path = weights.path if weights else ""
    if weights is not None and not path:
        raise MachineError(
            f"The weights of '{source.label}' are not in {weights.place}. Run `autoft weights "
            f"pull {source.label}` with network."
        )
    digest = sha256_of(Path(path)) if path else ""
    right = expected or (weights.sha256 if weights else "")
    if not digest.startswith(right):
        wrong = f"SHA-256 is {digest}, expected {right}: the file was changed or is damaged"
        return Verified(source.label, path, digest, wrong)
    try:
        notes = check(source)
    except AutoftError as error:
        return Verified(source.label, path, digest, str(error))
    return Verified(source.label, path, digest, "", notes)


def pack(link: Link, source: Source, out: str, allowed: Collection[str]) -> dict[str, Any]:
    """Write a sub-folder of `out` with the weights of a backbone; return its part of the manifest.

    A file of safetensors is copied as it is. Any other is loaded, and what autoft uses of it is
    saved as safetensors.

    Raises:
        AutoftError: the weights cannot be had, or their licence is not allowed.
    """
    found = work.provide(source, allowed, link.progress)
    weights = locate(found.source)
    folder = Path(out) / _folder_name(source)
    folder.mkdir(parents=True, exist_ok=True)
    link.progress(f"packing {source.label}", 0, 0)
    file = folder / WEIGHTS_FILE
    base = _config_of(source)
    if weights and weights.path.endswith(".safetensors") and not (source.weights and base):
        shutil.copyfile(weights.path, file)
        config = dict(weights.config)
    else:
        _save(source, file)
        config = _without_classes(base)
    if config:
        (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return {
        "folder": folder.name,
        "sha256": sha256_of(file),
        "bytes": file.stat().st_size,
        "license": found.source.license,
        "source": weights.source if weights else "",
        "origin": found.source.origin,
        "origin_sha256": found.source.sha256,
        "plugin": source.plugin,
    }


def _folder_name(source: Source) -> str:
    """Return a name that `--weights` finds the architecture or the plugin by."""
    name, _, file = source.label.partition("@")
    if not file:
        return Path(name.removeprefix("local-dir:")).name.rpartition(":")[2]
    return f"{Path(name).name.rpartition(':')[2].partition('.')[0]}.{Path(file).stem}"


def _config_of(source: Source) -> Mapping[str, Any]:
    """Return what timm keeps beside the weights of the architecture, whatever file it loads."""
    published = locate(replace(source, weights=""))
    return published.config if published else {}


def _save(source: Source, file: Path) -> None:
    from safetensors.torch import save_file

    from autoft.network.build import build

    state = build(source).module.state_dict()
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, file)


def _without_classes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says that its file has no classifier."""
    if not config:
        return {}
    told = {k: v for k, v in config.get("pretrained_cfg", {}).items() if k != "label_offset"}
    told |= {"num_classes": 0, "custom_load": False}
    return {**config, "num_classes": 0, "pretrained_cfg": told}
