"""Divide a backbone after its first stages: a prefix that can be frozen and a tail that learns.

Both are graphs over the modules and parameters of the backbone itself. Every computation belongs
to the last stage whose parameters it depends on; what the two sides share and no image changes,
such as a table of positions, is computed on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from autoft.looking import noise
from autoft.network.tracing import (
    BATCHES,
    IMAGES,
    Batch,
    CannotCut,
    Mode,
    Slot,
    Step,
    Trace,
    preserved,
    slots_of,
    trace,
)
from autoft.values import Backbone

__all__ = ["CannotCut", "cut", "every_cut", "prefix_of", "why_uncut"]

CHECKED_BATCHES = (4, 1)
TOLERANCE = 1e-5  # of the largest feature, where the CPU computes
TOLERANCE_ELSEWHERE = 2e-3  # graphics cards may round to 10 bits and choose other algorithms
ROWS = 1e-3  # the same between batches of two sizes, for which convolutions round differently
_traces: WeakKeyDictionary[nn.Module, tuple[object, Trace]] = WeakKeyDictionary()


def cut(
    backbone: Backbone, k: int, image_size: int | None = None
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return the first `k` stages of `backbone` and the rest, which share its parameters.

    `prefix(images)` maps images (N, 3, H, W) to a tuple of tensors (N, ...), row i of which comes
    from image i alone; `tail(*tensors)` maps these to the features of the backbone, in eval mode
    and in training. The tail leaves the tensors as they are, so that they can be kept. With
    `k` = the number of stages the prefix gives the features and the tail returns them.

    The modules are those of the backbone: what sets their modes and thaws their parameters there
    does it here. Calling `train()` or `eval()` on one side changes its modules on the other, too,
    if they have no parameters and run on both. Move the backbone to its device first.

    Args:
        backbone: what to divide.
        k: how many stages the prefix has, 1 to all.
        image_size: H = W in pixels, that of the backbone unless told; holds for this size only.

    Raises:
        CannotCut: says why; checked with two batch sizes, so that no wrong cut is returned.
    """
    _check_stage(backbone, k)
    return _cut(backbone, k, _Whole(backbone, image_size or backbone.image_size))


def every_cut(
    backbone: Backbone, image_size: int | None = None
) -> Iterator[tuple[fx.GraphModule, fx.GraphModule] | CannotCut]:
    """Yield the cuts after 1, 2, ... all stages as `cut` returns them, or why there is none."""
    whole = _Whole(backbone, image_size or backbone.image_size)
    for k in range(1, len(backbone.stages) + 1):
        try:
            yield _cut(backbone, k, whole)
        except CannotCut as error:
            yield error


def prefix_of(
    backbone: Backbone, cuts: Sequence[int], image_size: int | None = None
) -> fx.GraphModule:
    """Return what runs the first stages once and gives what crosses after each of `cuts`.

    It maps images (N, 3, H, W) to a tuple of what the prefix of `cut` gives after so many stages,
    in the order of `cuts`, which ascend.

    Raises:
        CannotCut: says why; what it gives is compared with what the prefixes give.
    """
    for k in cuts:
        _check_stage(backbone, k)
    try:
        return _prefix_of(backbone, cuts, image_size or backbone.image_size)
    except Exception as error:  # a network's own code may fail in any way
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CannotCut(f"The cuts {list(cuts)} cannot be made in one pass: {first}") from error


def _prefix_of(backbone: Backbone, cuts: Sequence[int], image_size: int) -> fx.GraphModule:
    found = _traced(backbone, image_size)
    build = _Builder(backbone.module, found)
    build.begin()
    given = tuple(_crossed(build, _sides(found, k), copied=k != cuts[-1]) for k in cuts)
    prefix = build.finished("Prefix", given)
    with preserved(backbone.module), torch.no_grad():
        images = noise(backbone.module, CHECKED_BATCHES[0], image_size)
        for k, tensors in zip(cuts, prefix(images), strict=True):
            alone, _ = _divide(backbone.module, found, k)(())
            for one, expected in zip(tensors, alone(images), strict=True):
                _check_close(one, expected, f"what crosses after stage {k - 1} on the way")
    return prefix


def why_uncut(backbone: Backbone, image_size: int | None = None) -> str:
    """Return why `backbone` cannot be cut after every stage; "" if it can."""
    cuts = every_cut(backbone, image_size)
    return next((str(each) for each in cuts if isinstance(each, CannotCut)), "")


def _check_stage(backbone: Backbone, k: int) -> None:
    if not 1 <= k <= len(backbone.stages):
        raise ValueError(f"k={k} is no number of stages from 1 to {len(backbone.stages)}")


class _Whole:
    """The backbone as it is, and what it makes of fixed images, for all cuts of it."""

    def __init__(self, backbone: Backbone, image_size: int) -> None:
        self.module = backbone.module
        self.image_size = image_size
        self._features: list[tuple[Tensor, Tensor]] = []

    def features(self) -> list[tuple[Tensor, Tensor]]:
        """Return images (N, 3, S, S) and their features, for each of CHECKED_BATCHES."""
        if not self._features:
            for count in CHECKED_BATCHES:
                images = noise(self.module, count, self.image_size, seed=10 + count)
                self._features.append((images, self.module(images)))
        return self._features


def _cut(backbone: Backbone, k: int, whole: _Whole) -> tuple[fx.GraphModule, fx.GraphModule]:
    try:
        sides = _divide(backbone.module, _traced(backbone, whole.image_size), k)
        with preserved(backbone.module), torch.no_grad():
            prefix, tail = sides(())
            changed = _changed_inputs(prefix, tail, whole.features()[0][0])
            if changed:
                prefix, tail = sides(changed)
            _verify(prefix, tail, whole.features())
    except CannotCut as error:
        raise CannotCut(f"The backbone cannot be cut after stage {k - 1}: {error}.") from error
    except Exception as error:  # a network's own code may fail in any way
        first = next(iter(str(error).strip().splitlines()), "")
        raise CannotCut(
            f"The backbone cannot be cut after stage {k - 1}: {type(error).__name__}: {first}."
        ) from error
    return prefix, tail


def _traced(backbone: Backbone, image_size: int) -> Trace:
    module = backbone.module
    key = (
        image_size,
        tuple(map(tuple, backbone.stages)),
        tuple((name, type(each)) for name, each in module.named_modules()),
        tuple((each.device, each.dtype) for each in module.parameters()),
    )
    known = _traces.get(module)
    if known is None or known[0] != key:
        known = (key, trace(backbone, image_size))
        _traces[module] = known
    return known[1]


# --- what lies on which side ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Where each step belongs: its `stage`, and whether any image changes its result."""

    stage: tuple[int, ...]
    imaged: tuple[bool, ...]


@dataclass(frozen=True)
class _Crossing:
    """A tensor that crosses: from step `at`, with `times` rows an image along dimension `dim`."""

    at: int
    dim: int
    times: int


@dataclass(frozen=True)
class _Sides:
    """The steps before and behind a cut, and what crosses it."""

    early: tuple[int, ...]
    late: tuple[int, ...]
    crossing: tuple[_Crossing, ...]


def _plan(found: Trace) -> _Plan:
    stage: list[int] = []
    imaged: list[bool] = []
    for at, step in enumerate(found.steps):
        before = [slot for slot in slots_of((step.args, step.kwargs)) if slot >= 0]
        stage.append(max([step.stage, *(stage[slot] for slot in before)]))
        imaged.append(at == IMAGES or any(imaged[slot] for slot in before))
    return _Plan(tuple(stage), tuple(imaged))


def _divide(
    module: nn.Module, found: Trace, k: int
) -> Callable[[Sequence[int]], tuple[fx.GraphModule, fx.GraphModule]]:
    """Return what builds both sides; it is told which of the crossing tensors to copy first."""
    sides = _sides(found, k)

    def build(copied: Sequence[int]) -> tuple[fx.GraphModule, fx.GraphModule]:
        return (
            _prefix(_Builder(module, found), sides),
            _tail(_Builder(module, found), sides, copied),
        )

    return build


def _sides(found: Trace, k: int) -> _Sides:
    plan = _plan(found)
    early = [at for at, on in enumerate(plan.imaged) if on and plan.stage[at] < k]
    late = [at for at, on in enumerate(plan.imaged) if on and plan.stage[at] >= k]
    used = {
        slot for at in late for slot in slots_of((found.steps[at].args, found.steps[at].kwargs))
    }
    used.add(found.output.at)
    crossing = tuple(_crossing(found, at) for at in early if at in used)
    return _Sides(tuple(early), tuple(late), crossing)


def _crossing(found: Trace, at: int) -> _Crossing:
    small, large = found.shapes[at]
    varying = [
        dim for dim, pair in enumerate(zip(small, large, strict=False)) if len(set(pair)) > 1
    ]
    if len(small) == len(large) and len(varying) == 1:
        dim = varying[0]
        times, rest = divmod(small[dim], BATCHES[0])
        if not rest and times * BATCHES[1] == large[dim]:
            return _Crossing(at, dim, times)
    raise CannotCut(f"a tensor {small} crosses that has no rows for single images")


def _prefix(build: _Builder, sides: _Sides) -> fx.GraphModule:
    build.begin()
    return build.finished("Prefix", _crossed(build, sides))


def _crossed(build: _Builder, sides: _Sides, *, copied: bool = False) -> tuple[fx.Node, ...]:
    """Return the nodes of what crosses; `copied` where what runs later may change it in place."""
    for at in sides.early:
        build.node(at)
    outputs = []
    for each in sides.crossing:
        node = build.node(each.at)
        if each.dim:
            node = build.graph.call_method("movedim", (node, each.dim, 0))
        if each.times > 1:
            node = build.graph.call_method("unflatten", (node, 0, (-1, each.times)))
        outputs.append(build.graph.call_method("clone", (node,)) if copied else node)
    return tuple(outputs)


def _tail(build: _Builder, sides: _Sides, copied: Sequence[int]) -> fx.GraphModule:
    count = len(sides.crossing)
    inputs = [build.graph.placeholder(f"crossing_{index}") for index in range(count)]
    build.batch = build.graph.call_method("size", (inputs[0], 0))
    for index, (node, each) in enumerate(zip(inputs, sides.crossing, strict=True)):
        if index in copied:
            node = build.graph.call_method("clone", (node,))
        if each.times > 1:
            node = build.graph.call_method("flatten", (node, 0, 1))
        if each.dim:
            node = build.graph.call_method("movedim", (node, 0, each.dim))
        build.nodes[each.at] = node
    for at in sides.late:
        build.node(at)
    return build.finished("Tail", build.node(build.found.output.at))


class _Mode(nn.Module):
    """Gives one of two values, by the mode of a module that is not part of this one."""

    def __init__(self, holder: nn.Module, mode: Mode) -> None:
        super().__init__()
        self._holder = (holder,)  # not registered: `train()` on a side must not reach it
        self._mode = mode

    def forward(self) -> Any:
        """Return the value for the holder's present mode."""
        return self._mode.training if self._holder[0].training else self._mode.evaluating


class _Builder:
    """A graph in the making: the nodes of steps by number, and what the graph refers to."""

    def __init__(self, module: nn.Module, found: Trace) -> None:
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.found = found
        self.batch: fx.Node | None = None
        self._module = module
        self._targets: dict[str, Any] = {}

    def begin(self) -> None:
        """Take images."""
        images = self.graph.placeholder("images")
        self.nodes[IMAGES] = images
        self.batch = self.graph.call_method("size", (images, 0))

    def node(self, at: int) -> fx.Node:
        """Return the node of step `at`, made with what it needs if it is not there yet."""
        if at not in self.nodes:
            self.nodes[at] = self._made(at, self.found.steps[at])
        return self.nodes[at]

    def _made(self, at: int, step: Step) -> fx.Node:
        args, kwargs = self._argument(step.args), self._argument(dict(step.kwargs))
        if step.kind == "module":
            self._targets[step.target] = self._module.get_submodule(step.target)
            return self.graph.call_module(step.target, args, kwargs)
        if step.kind == "method":
            return self.graph.call_method(step.target, args, kwargs)
        if step.kind == "item":
            return self.graph.call_method("__getitem__", (*args, step.target))
        if step.kind == "tensor":
            return self._read(at, step)
        return self.graph.call_function(step.target, args, kwargs)

    def _read(self, at: int, step: Step) -> fx.Node:
        if isinstance(step.target, Tensor):
            name, value = f"_constant_{at}", step.target
        else:
            holder, _, own = step.target.rpartition(".")
            name, value = step.target, getattr(self._module.get_submodule(holder), own)
        self._targets[name] = value
        return self.graph.get_attr(name)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Slot):
            return self.node(value.at)
        if isinstance(value, Batch):
            return self._number(value)
        if isinstance(value, Mode):
            name = f"_mode_{len(self._targets)}"
            self._targets[name] = _Mode(self._module.get_submodule(value.holder), value)
            return self.graph.call_module(name)
        if isinstance(value, tuple | list):
            members = [self._argument(each) for each in value]
            return members if isinstance(value, list) else tuple(members)
        if isinstance(value, dict):
            return {key: self._argument(each) for key, each in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._argument, (value.start, value.stop, value.step)))
        return value

    def _number(self, value: Batch) -> Any:
        number: Any = self.batch
        if value.times != 1:
            number = self.graph.call_function(_times, (number, value.times))
        if value.plus:
            number = self.graph.call_function(_plus, (number, value.plus))
        return number

    def finished(self, name: str, output: Any) -> fx.GraphModule:
        """Return the graph as a module."""
        self.graph.output(output)
        if self.batch is not None and not self.batch.users:
            self.graph.erase_node(self.batch)
        return fx.GraphModule(self._targets, self.graph, class_name=name)


def _times(number: int, factor: int) -> int:
    return number * factor


def _plus(number: int, summand: int) -> int:
    return number + summand


# --- proof ---------------------------------------------------------------------------------------


def _changed_inputs(prefix: nn.Module, tail: nn.Module, images: Tensor) -> list[int]:
    """Return which of the crossing tensors the tail modifies."""
    given = _kept(prefix(images))
    versions = [each._version for each in given]
    tail(*given)
    return [i for i, each in enumerate(given) if each._version != versions[i]]


def _kept(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors as they come back from where they were stored: apart and contiguous."""
    return [each.clone(memory_format=torch.contiguous_format) for each in tensors]


def _verify(prefix: nn.Module, tail: nn.Module, features: Sequence[tuple[Tensor, Tensor]]) -> None:
    for images, expected in features:
        given = prefix(images)
        _check_close(tail(*_kept(given)), expected, f"the features of {len(images)} images")
        if len(images) > 1:
            for one, every in zip(prefix(images[-1:]), given, strict=True):
                _check_close(one, every[-1:], "what crosses for an image alone", ROWS)


def _check_close(found: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    if found.shape != expected.shape:
        raise CannotCut(f"{what} have shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    if not expected.is_floating_point():
        if torch.equal(found, expected):
            return
        raise CannotCut(f"{what} are not equal")
    share = tolerance if expected.device.type == "cpu" else TOLERANCE_ELSEWHERE
    difference = float((found - expected).abs().max())
    if not difference <= share * max(float(expected.abs().max()), 1e-30):
        raise CannotCut(f"{what} differ by {difference:.3g}")
