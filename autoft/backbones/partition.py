"""The stages of any timm network: measured, not looked up.

One forward pass of shapes alone tells in which order parameters are first used and how many
positions (pixels or tokens) they work on. A stage begins where that number falls for good; a
network whose blocks all work on the same positions is divided evenly.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from autoft.looking import evaluating

Stages = tuple[tuple[str, ...], ...]

MOST = 12
LEAST = 4
EVEN = 6  # pieces of a network that has no pyramid: a ViT of 12 blocks gives 6 pairs
DROP = 1.5  # a class token more or less is no new resolution
LATE = 3 / 4  # of a block's calls: where in it the resolution may fall
SMALL = 64  # pixels, where the pass must be computed for real
BATCH = 2
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_known: dict[object, Stages] = {}


@dataclass(frozen=True)
class Call:
    """A computation that first used the parameters `names`, on so many `positions` an image.

    None: it does not tell, as a norm does not.
    """

    names: tuple[str, ...]
    positions: float | None


def stages_of(module: nn.Module) -> Stages:
    """Return 4 to 12 stages of a timm network, input first, where it has so many parts.

    They follow the order of the forward pass and hold every parameter once, as names of modules
    where a whole module lies in a stage. A pyramid has a stem and one stage a resolution; what
    runs after the last block joins the last stage. Weights do not matter; `module` may be on the
    meta device. Found once for each architecture.

    Raises:
        RuntimeError: the network ran neither at its own size nor at a small one.
    """
    key = (type(module), tuple((name, each.shape) for name, each in module.named_parameters()))
    if key not in _known:
        calls = _measured(module)
        starts = _starts(module, calls)
        _known[key] = _named(module, _placed(module, calls, starts))
    return _known[key]


# --- what runs when, and on how much -------------------------------------------------------------


def _measured(module: nn.Module) -> list[Call]:
    own = _own_size(module)
    problem: Exception | None = None
    with evaluating(module), torch.no_grad():
        for size, device in ((own, "meta"), (SMALL, ""), (own, "")):
            try:
                return _watched(module, size, device)
            except Exception as error:  # noqa: BLE001 - it may dislike shapes or a size in any way
                problem = error
    raise RuntimeError(f"{type(module).__name__} does not run at {own} or {SMALL} pixels") from (
        problem
    )


def _own_size(module: nn.Module) -> int:
    embed = getattr(module, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if isinstance(size, tuple | list) and size:
        return int(size[0])
    config: Mapping[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    return int(tuple(config.get("input_size", (3, 224, 224)))[-1])


def _watched(module: nn.Module, size: int, device: str) -> list[Call]:
    """Run `module` on the meta device, which computes nothing, or where it is ("")."""
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    tensors = parameters | dict(module.named_buffers())
    if device:
        tensors = {name: torch.empty_like(each, device=device) for name, each in tensors.items()}
    place = device or next(iter(tensors.values())).device
    images = torch.zeros(BATCH, 3, size, size, device=place)
    watch = _Watch({id(tensors[name]): name for name in parameters}, images)
    with watch:
        functional_call(module, tensors, (images,))
    return watch.calls


class _Watch(TorchFunctionMode):
    """Notes the first computation with each parameter, and what depends on the images."""

    def __init__(self, names: dict[int, str], images: Tensor) -> None:
        super().__init__()
        self._unseen = dict(names)
        self._from_images = {id(images): images}  # kept, so that no id is used twice
        self.calls: list[Call] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `function` and note the parameters among its arguments."""
        result = function(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor)]
        if not outputs:  # asking for a shape is no use
            return result
        taken = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        seen = any(id(leaf) in self._from_images for leaf in taken)
        if seen:
            self._from_images |= {id(leaf): leaf for leaf in outputs}
        new = dict.fromkeys(id(leaf) for leaf in taken if id(leaf) in self._unseen)
        if new:
            names = tuple(self._unseen.pop(key) for key in new)
            self.calls.append(Call(names, _positions(function, outputs[0]) if seen else None))
        return result


def _positions(function: Callable[..., Any], output: Tensor) -> float | None:
    """Return on how many positions of an image a convolution or a linear layer works."""
    name = getattr(function, "__name__", "")
    if name == "conv2d":
        return float(math.prod(output.shape[2:]))
    if name == "linear":
        return output.numel() / (BATCH * output.shape[-1])
    return None


# --- where stages begin --------------------------------------------------------------------------


def _starts(module: nn.Module, calls: Sequence[Call]) -> list[int]:
    """Return the calls with which stages begin; the first is 0."""
    levels = _levels(calls)
    stem = _stem_end(module, calls)
    drops = [at for at in range(1, len(calls)) if levels[at] * DROP <= levels[at - 1]]
    drops = [at for at in drops if at >= stem]
    starts = [0, stem] if stem else [0]
    spans = _spans(calls)
    for at, following in pairwise([*drops, len(calls)]):
        begin = _block_start(module, spans, calls[at].names[0], at, starts[-1], following)
        if begin > starts[-1]:
            starts.append(begin)
    body = len(starts) - (1 if stem else 0)
    if len(starts) < LEAST or body < LEAST - 1:
        starts = _divided(module, calls, starts, 1 if stem else 0)
    return _at_most(starts, len(calls))


def _levels(calls: Sequence[Call]) -> list[float]:
    """Return the positions still worked on from each call on: never rising.

    A squeeze to one position is no drop, nor is the last pooling: what follows joins what was
    before. A median over five takes out what works on maps of attention.
    """
    told = [at for at, call in enumerate(calls) if (call.positions or 0) > 1]
    if not told:
        return [1.0] * len(calls)
    raw = [calls[at].positions or 0.0 for at in told]
    # A layer that mixes tokens has channels for positions: none are more than at the beginning.
    capped = [min(raw[0], each) for each in raw]
    padded = [*capped[:1] * 2, *capped, *capped[-1:] * 2]
    smooth = [median(padded[at : at + 5]) for at in range(len(capped))]
    levels = [0.0] * len(calls)
    highest = 0.0
    for at, level in zip(reversed(told), reversed(smooth), strict=True):
        highest = max(highest, level)
        levels[at] = highest
    current = highest
    for at, level in enumerate(levels):
        current = level or current  # a norm works on what the convolution before it made
        levels[at] = current
    return levels


def _stem_end(module: nn.Module, calls: Sequence[Call]) -> int:
    """Return the first call after the stem; 0: there is none."""
    stem = _declared_stem(module) or _leading(module)
    end = 0
    while end < len(calls) and calls[end].names[0] in stem:
        end += 1
    return end if end <= len(calls) / 2 else 0


def _declared_stem(module: nn.Module) -> set[str]:
    """Return the parameters of the stem that timm's authors declare, if they do."""
    from timm.models import group_parameters

    try:
        matcher = module.group_matcher(coarse=True)  # type: ignore[operator]  # timm's contract
        groups = group_parameters(module, matcher, reverse=False)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
        return set()
    return set(groups[min(groups)]) if groups else set()


def _leading(module: nn.Module) -> set[str]:
    """Return the parameters that lie in no container of the root: not in a row of blocks."""
    rows = {name for name, child in module.named_children() if isinstance(child, _CONTAINERS)}
    return {name for name, _ in module.named_parameters() if name.split(".")[0] not in rows}


def _spans(calls: Sequence[Call]) -> dict[str, tuple[int, int]]:
    """Return the first and the last call of every module by name."""
    spans: dict[str, tuple[int, int]] = {}
    for at, call in enumerate(calls):
        for name in call.names:
            while "." in name:
                name = name.rpartition(".")[0]
                spans[name] = (spans.get(name, (at, at))[0], at)
    return spans


def _block_start(
    module: nn.Module,
    spans: Mapping[str, tuple[int, int]],
    name: str,
    at: int,
    previous: int,
    following: int,
) -> int:
    """Return where the largest module begins in which the positions fall at call `at`.

    Blocks reduce the resolution in their midst: cut before them. It lies between the beginning
    of the `previous` stage and the `following` drop, and no row of blocks lies before `at`.
    """
    begin = at
    while "." in name:
        name = name.rpartition(".")[0]
        start, end = spans[name]
        if start < previous or end >= following:
            break
        if _is_late(module.get_submodule(name), name, spans, at):
            break
        begin = min(begin, start)
    return begin


def _is_late(part: nn.Module, name: str, spans: Mapping[str, tuple[int, int]], at: int) -> bool:
    """Tell whether most of `part` runs before call `at`, so that it belongs to what was before."""
    start, end = spans[name]
    children = [(own, spans.get(f"{name}.{own}")) for own, _ in part.named_children()]
    before = [own for own, span in children if span and span[1] < at]
    rows = [own for own in before if isinstance(part.get_submodule(own), _CONTAINERS)]
    return bool(children) and (bool(rows) or at - start > LATE * (end + 1 - start))


def _divided(
    module: nn.Module, calls: Sequence[Call], starts: Sequence[int], first: int
) -> list[int]:
    """Divide the stages from the `first` on into about six, each by the size that it has."""
    ends = [*starts[1:], len(calls)]
    total = len(calls) - starts[first]
    found = list(starts[: first + 1])
    for begin, end in zip(starts[first:], ends[first:], strict=True):
        wanted = max(1, round(EVEN * (end - begin) / total))
        found += [begin, *_even(_units(module, calls, begin, end, wanted), wanted)]
    return sorted(set(found))


def _units(
    module: nn.Module, calls: Sequence[Call], begin: int, end: int, wanted: int
) -> list[int]:
    """Return where the parts of a stretch of calls begin: as coarse as gives `wanted` of them."""
    depths = {at: _depth(module, calls[at - 1], calls[at]) for at in range(begin + 1, end)}
    best = [begin]
    for depth in sorted({depth for depth in depths.values() if depth is not None}):
        cuts = [at for at, own in depths.items() if own is not None and own <= depth]
        units = _without_crumbs([begin, *cuts], end)
        if len(units) > len(best):
            best = units
        if len(best) >= min(wanted, LEAST):
            break
    return best


def _depth(module: nn.Module, before: Call, after: Call) -> int | None:
    """Return how deep the container lies whose children a boundary separates; None: in a block."""
    first, second = (call.names[0].split(".")[:-1] for call in (before, after))
    common = 0
    while common < min(len(first), len(second)) and first[common] == second[common]:
        common += 1
    holder = module.get_submodule(".".join(second[:common]))
    return common if common == 0 or isinstance(holder, _CONTAINERS) else None


def _without_crumbs(starts: Sequence[int], end: int) -> list[int]:
    """Join parts that are far smaller than the usual one to the part before them."""
    sizes = [after - at for at, after in pairwise([*starts, end])]
    usual = median(sizes)
    kept: list[int] = []
    carry = False  # the first part is a crumb: the second begins where it did
    for at, size in zip(starts, sizes, strict=True):
        if carry or not kept:
            kept = kept or [at]
            carry = size < usual / 4
        elif size >= usual / 4:
            kept.append(at)
    return kept


def _even(units: Sequence[int], wanted: int) -> list[int]:
    pieces = min(wanted, len(units))
    return [units[round(piece * len(units) / pieces)] for piece in range(pieces)]


def _at_most(starts: Sequence[int], end: int) -> list[int]:
    left = list(starts)
    while len(left) > MOST:
        ends = [*left[1:], end]
        joint = [ends[i + 1] - left[i] for i in range(len(left) - 1)]
        del left[joint.index(min(joint)) + 1]
    return left


# --- names ---------------------------------------------------------------------------------------


def _placed(module: nn.Module, calls: Sequence[Call], starts: Sequence[int]) -> dict[str, int]:
    """Return the stage of every parameter; one that never runs lies where its neighbours do."""
    stages = {
        name: bisect_right(starts, at) - 1 for at, call in enumerate(calls) for name in call.names
    }
    for name, _ in module.named_parameters():
        if name not in stages:
            stages[name] = _neighbour(name, stages)
    return stages


def _neighbour(name: str, stages: Mapping[str, int]) -> int:
    while "." in name:
        name = name.rpartition(".")[0]
        around = [stage for other, stage in stages.items() if other.startswith(f"{name}.")]
        if around:
            return max(around)
    return 0


def _named(module: nn.Module, placed: Mapping[str, int]) -> Stages:
    """Return the names of each stage: of whole modules, else of single parameters."""
    stages: list[list[str]] = [[] for _ in range(max(placed.values()) + 1)]

    def descend(part: nn.Module, prefix: str) -> None:
        inside = {
            placed[name]
            for name in (f"{prefix}{own}" for own, _ in part.named_parameters())
            if name in placed
        }
        if len(inside) == 1 and prefix:
            stages[inside.pop()].append(prefix[:-1])
            return
        for own, _ in part.named_parameters(recurse=False):
            if f"{prefix}{own}" in placed:
                stages[placed[f"{prefix}{own}"]].append(f"{prefix}{own}")
        for own, child in part.named_children():
            descend(child, f"{prefix}{own}.")

    descend(module, "")
    return tuple(tuple(names) for names in stages if names)
