"""Load a file of weights into a backbone: safetensors, or a .pth that holds tensors only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoft.errors import DataError

WRAPPERS = ("state_dict", "model", "model_state_dict", "model_ema", "state_dict_ema")


def load_weights(module: nn.Module, path: Path) -> list[str]:
    """Load `path` into `module` and return the names of tensors that were left out.

    Only the tensors of a classifier that was taken away are left out: of a part that `module` does
    not have at all, or where it has nn.Identity now.

    Raises:
        DataError: the file is damaged, holds more than tensors, or does not fit (names them).
    """
    state = _read(path)
    own = module.state_dict()
    left_out = [name for name in state if name not in own and _is_gone(name, module)]
    fitting = {name: tensor for name, tensor in state.items() if name not in left_out}
    problems = _differences(own, fitting)
    if problems:
        raise DataError(
            f"The weights in {path} do not fit this backbone: {'; '.join(problems[:3])}"
            f"{f' and {len(problems) - 3} more' if len(problems) > 3 else ''}. Choose the "
            f"architecture that they were trained with."
        )
    module.load_state_dict(fitting)
    return left_out


def _is_gone(name: str, module: nn.Module) -> bool:
    """Tell whether `module` has nothing, or a placeholder, where the tensor `name` lay."""
    children = dict(module.named_modules())
    first, *below = name.split(".")[:-1] or [name]
    if not any(own.partition(".")[0] == first for own in module.state_dict()):
        return True
    paths = [".".join([first, *below[:depth]]) for depth in range(len(below) + 1)]
    return any(isinstance(children.get(path), nn.Identity) for path in paths)


def _differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    missing = [
        f"'{name}' is missing"
        for name in own
        if name not in given and not name.endswith("num_batches_tracked")
    ]
    unknown = [f"'{name}' is unknown to it" for name in given if name not in own]
    shapes = [
        f"'{name}' has shape {tuple(given[name].shape)}, expected {tuple(own[name].shape)}"
        for name in given
        if name in own and given[name].shape != own[name].shape
    ]
    return shapes + unknown + missing


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"There is no file of weights at {path}. Check the path.")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise DataError(
            f"The weights in {path} cannot be read as safetensors: {error}. The file is damaged; "
            f"copy or fetch it again."
        ) from error
    except Exception as error:  # damage shows as any of a dozen exceptions
        raise DataError(
            f"The weights in {path} cannot be read: the file is damaged or holds more than "
            f"tensors, and code in it is never run. Save a plain state_dict, best as safetensors."
        ) from error
    return _unwrap(path, loaded)


def _unwrap(path: Path, loaded: Any) -> dict[str, Tensor]:  # whatever a file holds
    for wrapper in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded:
        raise DataError(f"{path} holds no state_dict. Save `model.state_dict()`.")
    state = {_plain(str(name)): value for name, value in loaded.items()}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _plain(name: str) -> str:
    """Return the name of a tensor without what data-parallel training and compiling add."""
    while (short := name.removeprefix("module.").removeprefix("_orig_mod.")) != name:
        name = short
    return name
