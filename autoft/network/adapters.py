"""Adapters: parameters that a strategy adds to a backbone and that are merged away in the end.

An adapter is a function that takes a Backbone, and by name those choices of the strategy that it
has parameters for, and returns the Backbone with parametrizations (torch.nn.utils.parametrize) on
some of its tensors. Nothing else is needed: a parametrization computes the tensor that the forward
pass uses, so that the same value can be written in its place. `low_rank` is the built-in one.
"""

from __future__ import annotations

import math
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import (
    ParametrizationList,
    is_parametrized,
    register_parametrization,
)

from autoft.errors import AutoftError, PluginError, UsageError
from autoft.looking import evaluating, noise
from autoft.network.parametrized import is_adapter, plain_name
from autoft.network.stages import stage_of_parameters
from autoft.network.strategy import BoundStrategy
from autoft.space import read_signature
from autoft.values import Backbone

TOLERANCE = 1e-5  # of the largest feature

Adapter = Callable[..., Any]  # what it returns is checked


class LowRank(nn.Module):
    """A weight (out, ...) plus a low-rank change of it: scale x B (out, rank) A (rank, rest).

    B starts at 0, so that the weight is what it was, bit for bit. A draws from torch's generator.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        rows, columns = _matrix(weight)
        self.scale = scale
        self.down = nn.Parameter(weight.detach().new_empty(rank, columns))
        self.up = nn.Parameter(weight.detach().new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight, in the precision of the weight also under autocast."""
        with torch.autocast(weight.device.type, enabled=False):
            change = (self.up * self.scale) @ self.down
            return weight + change.view(weight.shape)

    def extra_repr(self) -> str:
        """Show what is no tensor."""
        return f"rank={len(self.down)}, scale={self.scale:g}"


def low_rank(backbone: Backbone, *, rank: int = 8, alpha: float = 16.0) -> Backbone:
    """Add a change of `rank`, times alpha / rank, to linear and convolution weights, in place.

    Convolutions (out, in, h, w) are taken as matrices (out, in h w). Grouped ones are left alone:
    a filter of a depthwise convolution is a handful of numbers, and a low rank across filters that
    share no input would tie what has nothing in common. So are weights that have fewer numbers
    than their change would, that are tied to others, or that are parametrized already.

    Source: Hu et al. 2021, arXiv 2106.09685.

    Raises:
        UsageError: no weight is large enough for `rank`.
    """
    found = list(_adaptable(backbone.module, rank))
    if not found:
        raise UsageError(
            f"No linear layer or convolution of this backbone is large enough for adapters of "
            f"rank {rank}. Choose a smaller rank, or another strategy."
        )
    for owner, name in found:
        register_parametrization(owner, name, LowRank(getattr(owner, name), rank, alpha / rank))
    return backbone


def _adaptable(module: nn.Module, rank: int) -> Iterator[tuple[nn.Module, str]]:
    uses = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    for part in module.modules():
        name = _name_of_weight(part)
        if not name or is_parametrized(part, name):
            continue
        weight = getattr(part, name)
        rows, columns = _matrix(weight)
        if rank * (rows + columns) < rows * columns and uses[id(weight)] == 1:
            yield part, name


def _name_of_weight(part: nn.Module) -> str:
    if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1):
        return "weight"
    if isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
        return "in_proj_weight"
    return ""


def _matrix(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], math.prod(weight.shape[1:])


# --- what the core does with an adapter ---------------------------------------------------------


def adapt(backbone: Backbone, strategy: BoundStrategy, *, image_size: int = 0) -> Backbone:
    """Call the adapter of `strategy`, if it states one, and check that it keeps its contract.

    The module is adapted in place. The Backbone returned names the parameters by what they are
    called now. `image_size` (pixels) is what the module was built for, its own unless told.

    Raises:
        PluginError: the adapter is missing or fails, changes the features, or adds what cannot be
            merged.
        UsageError: it cannot do what was chosen, or finds nothing in this backbone to adapt.
    """
    if not strategy.adapter:
        return backbone
    label = f"The adapter '{strategy.adapter}' of the strategy '{strategy.part.name}'"
    size = image_size or backbone.image_size
    shapes = {name: tensor.shape for name, tensor in backbone.module.state_dict().items()}
    before = _features(backbone.module, size)
    adapted = _call(_resolve(label, strategy.adapter), label, backbone, strategy)
    adapted = replace(adapted, stages=_renamed(adapted))
    try:
        stage_of_parameters(adapted)
    except PluginError as error:
        raise PluginError(f"{label} cannot be used. {error}") from error
    _check_mergeable(label, shapes, adapted.module)
    _check_features(label, before, _features(adapted.module, size))
    return adapted


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of `module` with every adapter merged, under the names it had without.

    The tensors are those that the forward pass uses, bit for bit, and a plain build of the module
    can load them. Parametrizations without parameters of their own are the module's and stay.
    """
    adapted = sorted(_adapted(module), key=len)  # the outer ones of nested ones first
    merged: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            inside = next((each for each in adapted if name.startswith(f"{each}.")), None)
            if inside is None:
                merged[name] = tensor
            elif name == f"{inside}.original":
                merged[plain_name(name)] = _value(module, plain_name(name))
    return merged


def _adapted(module: nn.Module) -> Iterator[str]:
    """Yield the names of the lists of parametrizations that have parameters of their own."""
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, ParametrizationList) and any(list(p.parameters()) for p in part):
            yield name


def _value(module: nn.Module, name: str) -> Tensor:
    owner, _, tensor = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), tensor)
    return value


def _resolve(label: str, name: str) -> Adapter:
    try:
        function = pkgutil.resolve_name(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an import may raise SystemExit: it must not end us
        raise PluginError(
            f"{label} cannot be imported: {error!r}. It must name a function as "
            f"'package.module:function'."
        ) from error
    if not callable(function):
        raise PluginError(f"{label} is a {type(function).__name__}; a function was expected.")
    adapter: Adapter = function
    return adapter


def _call(adapter: Adapter, label: str, backbone: Backbone, strategy: BoundStrategy) -> Backbone:
    wanted = {parameter.name for parameter in read_signature(adapter)}
    choices = {name: value for name, value in strategy.choices.items() if name in wanted}
    try:
        adapted = adapter(backbone, **choices)
    except AutoftError:
        raise
    except Exception as error:  # a plugin may fail in any way
        raise PluginError(
            f"{label} failed: {type(error).__name__}: {error}. Choose another strategy, or tell "
            f"its author."
        ) from error
    if not isinstance(adapted, Backbone):
        raise PluginError(
            f"{label} returned a {type(adapted).__name__}; an autoft.Backbone was expected."
        )
    return adapted


def _renamed(backbone: Backbone) -> tuple[tuple[str, ...], ...]:
    """Return the stages with parametrized tensors under the name that holds all they became."""
    names = (name for name, _ in backbone.module.named_parameters())
    now = {plain_name(n): n.removesuffix(".original") for n in names if plain_name(n) != n}
    return tuple(tuple(now.get(name, name) for name in stage) for stage in backbone.stages)


def _check_mergeable(label: str, before: dict[str, torch.Size], module: nn.Module) -> None:
    if not any(is_adapter(name) for name, _ in module.named_parameters()):
        raise UsageError(
            f"{label} added no parameter to this backbone by torch.nn.utils.parametrize, so that "
            f"there is nothing to train. Choose another strategy, or a backbone that it suits."
        )
    after = {name: tensor.shape for name, tensor in merged_state(module).items()}
    wrong = sorted(n for n in before | after if before.get(n) != after.get(n))
    if wrong:
        raise PluginError(
            f"{label} cannot be merged away: it added, removed or reshaped {wrong[:3]}. Add "
            f"parameters by torch.nn.utils.parametrize alone, to tensors that have none yet."
        )


def _check_features(label: str, before: Tensor, after: Tensor) -> None:
    difference = float((after - before).abs().max()) if after.shape == before.shape else math.inf
    if not difference <= TOLERANCE * float(before.abs().max()):
        raise PluginError(
            f"{label} changes the features of the backbone at the start (largest difference "
            f"{difference:.3g}). Initialise what it adds so that they stay as they are."
        )


def _features(module: nn.Module, image_size: int) -> Tensor:
    """Return what `module` makes of one image of fixed noise, in eval mode, modes kept."""
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with evaluating(module), torch.no_grad(), exact:
        features: Tensor = module(noise(module, 1, image_size))
    return features
