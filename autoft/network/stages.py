"""Which stage every parameter and every module of a backbone belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from autoft.errors import PluginError
from autoft.network.parametrized import is_adapter, plain_name
from autoft.values import Backbone

NORM_TYPES = (
    nn.modules.batchnorm._NormBase,  # the common base of batch and instance norms
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


def stage_of_parameters(backbone: Backbone) -> dict[str, int]:
    """Return the stage index of every parameter name of `backbone.module`.

    Raises:
        PluginError: a stage names nothing, or the stages are no partition of the parameters.
    """
    names = [name for name, _ in backbone.module.named_parameters()]
    stages: dict[str, int] = {}
    claims: Counter[str] = Counter()
    for index, members in enumerate(backbone.stages):
        for member in members:
            held = [n for n in names if n == member or n.startswith(f"{member}.")]
            if not held and not _has_module(backbone.module, member):
                raise PluginError(
                    f"Stage {index} names '{member}', which is neither a parameter nor a "
                    f"submodule of the backbone. Correct the name."
                )
            claims.update(held)
            stages.update(dict.fromkeys(held, index))
    _check_partition(names, claims)
    _check_filled(backbone, stages)
    return stages


def _has_module(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_modules())


def _check_partition(names: list[str], claims: Counter[str]) -> None:
    missing = [name for name in names if name not in claims]
    if missing:
        raise PluginError(
            f"No stage names {missing[:3]} ({len(missing)} of {len(names)} parameters). Add them "
            f"to a stage, or they can be neither frozen nor tuned."
        )
    twice = [name for name, count in claims.items() if count > 1]
    if twice:
        raise PluginError(f"The parameters {twice[:3]} are in two stages. Each belongs in one.")


def _check_filled(backbone: Backbone, stages: dict[str, int]) -> None:
    empty = sorted(set(range(len(backbone.stages))) - set(stages.values()))
    if empty or not backbone.stages:
        raise PluginError(
            f"Stages {empty} hold no parameter. Merge them with a neighbour: a stage is what can "
            f"be frozen."
        )


def stage_of_modules(backbone: Backbone, stages: dict[str, int]) -> dict[str, int]:
    """Return the stage of every module that lies wholly in one stage.

    A module without parameters (activation, dropout, a norm without scale) belongs where the
    nearest enclosing module with parameters belongs; one that spans stages belongs to none.
    """
    owned: dict[str, int] = {}
    # Not by name: a module that is used in two places has one name among the parameters.
    stage_of = {id(each): stages[name] for name, each in backbone.module.named_parameters()}
    found: dict[nn.Module, set[int]] = {}
    for name, module in backbone.module.named_modules():
        below = _stages_below(module, stage_of, found)
        parent = name.rpartition(".")[0]
        if len(below) == 1:
            (owned[name],) = below
        elif not below and name and parent in owned:
            owned[name] = owned[parent]
    return owned


def _stages_below(
    module: nn.Module, stage_of: Mapping[int, int], found: dict[nn.Module, set[int]]
) -> set[int]:
    """Return the stages of all parameters of `module`; each of its parts is looked at once."""
    if module not in found:
        own = {stage_of[id(each)] for each in module.parameters(recurse=False)}
        parts = [_stages_below(child, stage_of, found) for child in module.children()]
        found[module] = own.union(*parts)
    return found[module]


def kind_of_parameters(module: nn.Module) -> dict[str, str]:
    """Return "norms", "biases", "adapters" or "weights" for every parameter name of `module`.

    Adapters are what parametrizations added to a tensor, which itself stays what it was.
    """
    kinds: dict[str, str] = {}
    for full, parameter in module.named_parameters():
        owner, _, name = plain_name(full).rpartition(".")
        part = module.get_submodule(owner)
        kind = type_before_parametrizations(part)
        norm = issubclass(kind, NORM_TYPES) or "norm" in kind.__name__.lower()
        if is_adapter(full):
            kinds[full] = "adapters"
        elif name.endswith("bias") and not norm:
            kinds[full] = "biases"
        else:  # vectors and lone numbers scale and shift as norms do, such as layer scales
            kinds[full] = "norms" if parameter.ndim <= 1 else "weights"
    return kinds
