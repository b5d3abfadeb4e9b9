"""Record what a network computes between the modules that lie wholly in one stage.

A real forward pass is watched: the tensors are real, so that shapes, branches and loops of the
network's own code run as ever. Modules of one stage are single steps; what is computed outside of
them, and parameters read there (a class token), are steps, too. Three passes are compared: two
batch sizes tell which numbers depend on the batch, training mode tells which depend on the mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoft.errors import AutoftError
from autoft.looking import evaluating, noise
from autoft.network.stages import stage_of_parameters
from autoft.values import Backbone

IMAGES = 0  # the first step
BATCHES = (2, 3)  # neither divides the other
Kind = Literal["images", "module", "function", "method", "tensor", "item"]


class CannotCut(AutoftError):
    """A backbone cannot be divided at a cut; its prefix is then run again instead."""


@dataclass(frozen=True)
class Slot:
    """The tensor that step `at` gave."""

    at: int


@dataclass(frozen=True)
class Batch:
    """A whole number that depends on the batch size N: `times` * N + `plus`."""

    times: int
    plus: int


@dataclass(frozen=True)
class Mode:
    """A value that depends on whether the module `holder` is in training mode."""

    holder: str
    evaluating: Any
    training: Any


@dataclass(frozen=True)
class Step:
    """One computation. `target` is a module's, parameter's or method's name, or a function.

    `args` hold a Slot for every tensor. `stage` is that of the parameters which the step itself
    reads, -1 without; `holder` names the module whose code ran. `shape` is that of the result.
    """

    kind: Kind
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    stage: int = -1
    holder: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """The steps of a forward pass, their results' shapes for both BATCHES, and the output."""

    steps: tuple[Step, ...]
    shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    output: Any


def trace(backbone: Backbone, image_size: int) -> Trace:
    """Return the steps of `backbone` for images of this size, and any batch size.

    Parameters, buffers, modes and the random state are as before afterwards.

    Raises:
        CannotCut: it computes something that cannot be followed; says what.
    """
    module = backbone.module
    first, second = (_noise(module, count, image_size) for count in BATCHES)
    with preserved(module), torch.no_grad():
        small, large = _recorded(backbone, first), _recorded(backbone, second)
        module.train()
        training = _recorded(backbone, first)
    return _joined(small, large, training)


def _noise(module: nn.Module, count: int, image_size: int) -> Tensor:
    return noise(module, count, image_size, seed=count)


@contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Evaluate in the block; put modes, buffers and the random state back when it ends."""
    buffers = [(each, each.detach().clone()) for each in module.buffers()]
    devices = {each.device.index for each in module.parameters() if each.is_cuda}
    try:
        forked = torch.random.fork_rng(devices=sorted(index or 0 for index in devices))
        with forked, evaluating(module):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


# --- one pass ------------------------------------------------------------------------------------


def _recorded(backbone: Backbone, images: Tensor) -> _Tape:
    stages = stage_of_parameters(backbone)
    stage_of = {id(each): stages[name] for name, each in backbone.module.named_parameters()}
    tape = _Tape(backbone.module, stages, images)
    with ExitStack() as stack:
        for name, module in backbone.module.named_modules():
            inside = {stage_of[id(each)] for each in module.parameters()}
            one = bool(name) and len(inside) <= 1
            before, after = tape.leaf(name, max(inside, default=-1)) if one else tape.span(name)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(
                module.register_forward_hook(after, with_kwargs=True, always_call=True).remove
            )
        with tape:
            tape.output = backbone.module(images)
    tape.output = tape.refer(tape.output)
    return tape


class _Tape(TorchFunctionMode):
    """The steps of one forward pass; owns the tensors, so that no id is used twice."""

    def __init__(self, module: nn.Module, stages: Mapping[str, int], images: Tensor) -> None:
        super().__init__()
        self._names: dict[int, tuple[str, int]] = {
            id(tensor): (name, -1) for name, tensor in module.named_buffers()
        } | {id(tensor): (name, stages[name]) for name, tensor in module.named_parameters()}
        self._slots: dict[int, int] = {id(images): IMAGES}
        self._alive: list[Tensor] = [images]
        self._holders: list[str] = [""]
        self._inside: list[str] = []
        self._given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.steps: list[Step] = [Step("images", "", shape=tuple(images.shape))]
        self.output: Any = None

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `function`; outside of modules that are one step, note it."""
        kwargs = kwargs or {}
        if self._inside:
            return function(*args, **kwargs)
        known = len(self.steps)
        name = getattr(function, "__name__", "")
        given = (self.refer(args), self.refer(kwargs))
        result = function(*args, **kwargs)
        if name == "__setitem__":
            self._add(Step("function", assigned, *given), args[0])
        elif _has_tensor(result):
            self._add(_call(function, name, *given), result)
        else:  # a shape, a number: part of later steps, if at all
            self._forget(known)
        return result

    def leaf(self, name: str, stage: int) -> tuple[Callable[..., None], Callable[..., None]]:
        """Return the hooks of a module that is one step."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._inside:
                self._given = (self.refer(args), self.refer(kwargs))
            self._inside.append(name)

        def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            self._inside.pop()
            if not self._inside:
                self._add(Step("module", name, *self._given, stage=stage), result)

        return before, after

    def span(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """Return the hooks of a module that spans stages: its own code is what is recorded."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._holders.append(name)

        def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            self._holders.pop()

        return before, after

    def refer(self, value: Any) -> Any:
        """Return `value` with a Slot for every tensor in it."""
        if isinstance(value, Tensor):
            return Slot(self._slots[id(value)] if id(value) in self._slots else self._read(value))
        if isinstance(value, tuple | list):
            members = [self.refer(each) for each in value]
            return members if isinstance(value, list) else tuple(members)
        if isinstance(value, dict):
            return {key: self.refer(each) for key, each in value.items()}
        if isinstance(value, slice):
            return slice(*(self.refer(each) for each in (value.start, value.stop, value.step)))
        return value.item() if isinstance(value, np.generic) else value

    def _read(self, tensor: Tensor) -> int:
        """Add the step that reads a parameter, a buffer, or a tensor made elsewhere."""
        name, stage = self._names.get(id(tensor), (None, -1))
        target = tensor.detach().clone() if name is None else name
        self._add(Step("tensor", target, stage=stage), tensor)
        return self._slots[id(tensor)]

    def _add(self, step: Step, result: Any) -> None:
        at = len(self.steps)
        holder = self._holders[-1]
        if isinstance(result, Tensor):
            self.steps.append(replace(step, holder=holder, shape=tuple(result.shape)))
            self._slots[id(result)] = at
            self._alive.append(result)
            return
        self.steps.append(replace(step, holder=holder))
        items = result.items() if isinstance(result, dict) else enumerate(result)
        for key, each in items if isinstance(result, dict | tuple | list) else ():
            if _has_tensor(each):
                self._add(Step("item", key, (Slot(at),)), each)

    def _forget(self, known: int) -> None:
        """Take back the reading of tensors that were asked for no more than a shape."""
        del self.steps[known:]
        self._slots = {key: at for key, at in self._slots.items() if at < known}


def assigned(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """Assign to a part of `tensor` and return it, so that later steps depend on this one."""
    tensor[index] = value
    return tensor


def _call(function: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Step:
    if name == "__get__":  # an attribute, such as `x.T`
        owner: Any = function.__self__  # type: ignore[attr-defined]  # of a method of a descriptor
        return Step("function", getattr, (*args[:1], owner.__name__))
    if getattr(Tensor, name, None) is function and args and isinstance(args[0], Slot):
        return Step("method", name, args, kwargs)
    return Step("function", function, args, kwargs)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_tensor(each) for each in value.values())
    if isinstance(value, tuple | list):
        return any(_has_tensor(each) for each in value)
    return isinstance(value, Tensor)


# --- three passes as one -------------------------------------------------------------------------


def _joined(small: _Tape, large: _Tape, training: _Tape) -> Trace:
    for other, what in ((large, "batches of other sizes"), (training, "training mode")):
        for one, two in zip(small.steps, other.steps, strict=False):
            if (one.kind, _plain(one)) != (two.kind, _plain(two)):
                raise CannotCut(f"it computes other things for {what}, from {_words(two)} on")
        if len(small.steps) != len(other.steps):
            raise CannotCut(f"it computes more or fewer things for {what}")
    steps = tuple(
        _one_of(*three) for three in zip(small.steps, large.steps, training.steps, strict=True)
    )
    shapes = tuple((a.shape, b.shape) for a, b in zip(small.steps, large.steps, strict=True))
    if not isinstance(small.output, Slot):
        raise CannotCut(f"it returns a {type(small.output).__name__}, not one tensor of features")
    return Trace(steps, shapes, small.output)


def _plain(step: Step) -> object:
    return "a tensor" if isinstance(step.target, Tensor) else step.target


def _one_of(small: Step, large: Step, training: Step) -> Step:
    if isinstance(small.target, Tensor):
        for other in (large, training):
            if small.shape != other.shape or not torch.equal(small.target, other.target):
                raise CannotCut(
                    f"a tensor {small.shape} that depends on the images was computed where it "
                    f"could not be seen, before {_words(small)}"
                )
    three = [(each.args, dict(each.kwargs)) for each in (small, large, training)]
    args, kwargs = _merged(small, *three)
    return replace(small, args=args, kwargs=kwargs)


def _merged(step: Step, small: Any, large: Any, training: Any) -> Any:
    """Return one value for the three that a step was given."""
    alike = type(small) is type(large) is type(training)
    if alike and isinstance(small, tuple | list) and len(small) == len(large) == len(training):
        members = [_merged(step, *three) for three in zip(small, large, training, strict=True)]
        return members if isinstance(small, list) else tuple(members)
    if alike and isinstance(small, dict) and small.keys() == large.keys() == training.keys():
        return {key: _merged(step, small[key], large[key], training[key]) for key in small}
    if alike and isinstance(small, slice):
        parts = ((each.start, each.stop, each.step) for each in (small, large, training))
        return slice(*(_merged(step, *three) for three in zip(*parts, strict=True)))
    return _one_value(step, small, large, training)


def _one_value(step: Step, small: Any, large: Any, training: Any) -> Any:
    if small is large is training or small == large == training:
        return small
    if small == large:
        return Mode(step.holder, small, training)
    whole = all(type(each) is int for each in (small, large))
    if whole and small == training:
        times = (large - small) // (BATCHES[1] - BATCHES[0])
        return Batch(times, small - times * BATCHES[0])
    raise CannotCut(
        f"{_words(step)} is given {small!r} for {BATCHES[0]} images and {large!r} for {BATCHES[1]}"
    )


def _words(step: Step) -> str:
    if step.kind == "tensor":
        return "the reading of " + ("a tensor" if isinstance(step.target, Tensor) else step.target)
    name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", "?")
    where = f" in '{step.holder}'" if step.holder else ""
    return f"the {step.kind} '{name}'{where}"


def slots_of(value: Any) -> Iterator[int]:
    """Yield the steps whose results a step's arguments hold; -1 for the batch size."""
    if isinstance(value, Slot):
        yield value.at
    elif isinstance(value, Batch):
        yield -1
    elif isinstance(value, slice):
        yield from slots_of((value.start, value.stop, value.step))
    elif isinstance(value, Mapping):
        yield from slots_of(tuple(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            yield from slots_of(cast("Any", each))
