"""Where the weights of timm's architectures are: in a folder, in a cache, or at an address."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

from autoft.errors import DataError, MachineError, UsageError, did_you_mean
from autoft.weights import Told, Weights, offline

LOCAL: Final = "local-dir:"
SAFE, PLAIN = "model.safetensors", "pytorch_model.bin"
_NOT_KEPT: Final = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_SHA256_START: Final = re.compile(r"-([0-9a-f]{8,64})\.")  # in the names of torch's own files


def locate(*, model: str) -> Weights:
    """Return the file of weights that timm's `model` is built with, without the network.

    Raises:
        UsageError: timm does not know it, or nothing was published for it.
        DataError: the folder that it names has no readable config.json.
    """
    check_name(model)
    if model.startswith(LOCAL):
        return _in_folder(Path(model.removeprefix(LOCAL)))
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(model)
    if config is None or not config.has_weights:
        raise UsageError(
            f"timm has no pre-trained weights for '{model}'. Choose an architecture that has, or "
            f"give weights of your own as '{model}@FILE'."
        )
    known = {k: v for k, v in asdict(config).items() if v is not None and k not in _NOT_KEPT}
    told = {
        "source": config.tag or "",
        "license": config.license or "",
        "config": {
            "architecture": known.pop("architecture", model.partition(".")[0]),
            "num_classes": config.num_classes,
            "pretrained_cfg": known,
        },
    }
    if config.hf_hub_id:
        return _of_hub(model, config.hf_hub_id, _names(config), told)
    return _of_address(model, config.url, told)


def check_name(model: str) -> None:
    """Refuse a name that means nothing to timm.

    Raises:
        UsageError: there is no such architecture or tag (with the closest).
        DataError: the folder that it names has no readable config.json.
    """
    import timm as library

    if not model:
        raise UsageError("The backbone 'timm' needs the name of an architecture.")
    if model.startswith(LOCAL):
        read_config(Path(model.removeprefix(LOCAL)))
        return
    architecture, _, tag = model.partition(".")
    if not library.is_model(architecture):
        hint = did_you_mean(architecture, library.list_models())
        raise UsageError(
            f"timm has no architecture '{architecture}'.{hint} "
            f"`python -c 'import timm; print(timm.list_models())'` lists them."
        )
    tags = [name.partition(".")[2] for name in library.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UsageError(
            f"timm's '{architecture}' has no weights tagged '{tag}'.{did_you_mean(tag, tags)} "
            f"It has: {', '.join(tags) or 'none'}."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a timm local directory.

    Raises:
        DataError: it is missing, damaged or names no architecture.
    """
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict) and isinstance(config["architecture"], str):
            return config
    except (OSError, ValueError, LookupError):
        pass
    raise DataError(
        f"{folder / 'config.json'} cannot be read as what timm saves beside weights; expected "
        f"JSON with 'architecture' and 'pretrained_cfg'. Save the model again, or leave it out."
    )


def _in_folder(folder: Path) -> Weights:
    config = read_config(folder)
    told = config.get("pretrained_cfg", config)  # older ones have one level
    found = [folder / name for name in (SAFE, PLAIN) if (folder / name).is_file()]
    return Weights(
        origin=str(folder),
        place=str(folder),
        path=str(found[0]) if found else "",
        source=str(told.get("tag") or ""),
        license=str(told.get("license") or ""),
        config=config,
    )


def _names(config: Any) -> Sequence[str]:
    """Return what the file may be called on the Hub, safetensors first."""
    name = config.hf_hub_filename or PLAIN
    if config.custom_load == "hf":  # of a format that only its model reads
        return (name,)
    safe = {
        name.replace("pytorch_model.bin", SAFE),
        re.sub(r"\.(bin|pth|pt)$", ".safetensors", name),
    }
    return (*sorted(safe - {name}), name)


def _of_hub(model: str, repo: str, names: Sequence[str], told: Mapping[str, Any]) -> Weights:
    from huggingface_hub import constants, try_to_load_from_cache

    repo, _, revision = repo.partition("@")
    place = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    found = (try_to_load_from_cache(repo, name, revision=revision or None) for name in names)
    path = next((path for path in found if isinstance(path, str)), "")
    blob = Path(path).resolve().name if path else ""  # the Hub's files are kept under their hash
    return Weights(
        origin=f"hf://{repo}{f'@{revision}' if revision else ''}",
        place=str(place),
        path=path,
        sha256=blob if _SHA256.fullmatch(blob) else "",
        get=partial(_download, model, repo, revision or None, names, place),
        **told,
    )


def _download(
    model: str,
    repo: str,
    revision: str | None,
    names: Sequence[str],
    place: Path,
    told: Told,
    again: bool,
) -> Path:
    """Fetch the first of `names` that the repository has.

    Raises:
        MachineError: the network is forbidden or fails.
    """
    if switch := offline():
        raise _missing(model, f"{switch}=1 forbids the network", place)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        try:
            return Path(
                hf_hub_download(
                    repo,
                    name,
                    revision=revision,
                    library_name="timm",
                    force_download=again,
                    tqdm_class=_bar(told),
                )
            )
        except EntryNotFoundError:
            continue
        except Exception as error:  # the client raises what its parts raise, all kinds
            raise _missing(model, _plain(error), place) from error
    raise _missing(model, f"{repo} holds none of {', '.join(names)}", place)


def _bar(told: Told) -> Any:
    """Return a class of progress bars as the Hub's client wants it, which draws nothing."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.here, self.all = int(options.get("initial") or 0), int(options.get("total") or 0)
            super().__init__(*arguments, **options | {"disable": True})  # type: ignore[no-untyped-call]  # tqdm has no types

        def update(self, n: float | None = 1) -> bool | None:
            self.here += int(n or 0)
            told(self.here, self.all)
            return None

    return Bar


def _of_address(model: str, url: Any, told: Mapping[str, Any]) -> Weights:
    from torch.hub import get_dir

    address, name = url if isinstance(url, tuple) else (url, url.rpartition("/")[2])
    file = Path(get_dir()) / "checkpoints" / name
    start = _SHA256_START.search(name)
    return Weights(
        origin=address,
        place=str(file.parent),
        path=str(file) if file.is_file() else "",
        sha256=start[1] if start else "",
        get=partial(_download_address, model, address, file),
        **told,
    )


def _download_address(model: str, address: str, file: Path, told: Told, again: bool) -> Path:
    """Fetch `address` as torch does, into torch's cache.

    Raises:
        MachineError: the network is forbidden or fails.
    """
    if file.is_file() and not again:
        return file
    if switch := offline():
        raise _missing(model, f"{switch}=1 forbids the network", file.parent)
    from torch.hub import download_url_to_file

    start = _SHA256_START.search(file.name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(address, str(file), start[1] if start else None, progress=False)
    except Exception as error:  # urllib raises what sockets raise, and torch a RuntimeError
        raise _missing(model, _plain(error), file.parent) from error
    told(file.stat().st_size, file.stat().st_size)
    return file


def _missing(model: str, reason: str, place: Path) -> MachineError:
    return MachineError(
        f"The weights of '{model}' are not on this machine and cannot be fetched ({reason}); they "
        f"were looked for in {place}. Run `autoft weights pull {model}` with network, or give a "
        f"folder of weights with --weights."
    )


def _plain(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else repr(error)
