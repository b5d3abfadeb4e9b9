"""Batch norms taken into the convolutions before them, while a network only computes.

In eval mode a batch norm multiplies each channel and adds to it, which the convolution before it
can do with other weights. On a CPU, where it is a pass through memory of its own, networks with
many are a good deal faster so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from autoft.looking import evaluating, noise

CLOSE = 1e-4  # of the largest number: so far what is computed may differ, else nothing is folded
WORTH = 100  # images from which it pays
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)  # not their subclasses, which may use the weights otherwise
NORMS = (nn.BatchNorm2d, BatchNormAct2d)

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


@contextmanager
def folded(module: nn.Module, image_size: int) -> Iterator[None]:
    """Have `module` compute faster, in eval mode, what it does; the block is for no training.

    Its parts, hooks and parameters are the same afterwards. What it makes of noise is compared:
    where that differs by more than rounding, nothing is folded.
    """
    images = noise(module, 2, image_size)
    with evaluating(module), torch.no_grad():
        expected, pairs = _looked_at(module, images)
        undo = [_fold(*pair) for pair in pairs]
        if undo and not _close(module(images), expected):
            _undone(undo)
    try:
        yield
    finally:
        _undone(undo)


def _undone(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def _close(found: Any, expected: Any) -> bool:
    if isinstance(expected, list | tuple):
        return all(map(_close, found, expected))
    if not isinstance(expected, Tensor):
        return False
    allowed = CLOSE * float(expected.abs().max())
    return float((found - expected).abs().max()) <= allowed


def _looked_at(module: nn.Module, images: Tensor) -> tuple[Any, list[Pair]]:
    """Return what `module` gives, and each batch norm that takes what a convolution gives.

    Only those that run once count.
    """
    given: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # outputs, held: their ids stay their own
    found: list[Pair] = []
    counts: dict[nn.Module, int] = {}

    def after_convolution(conv: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)  # hooked below
        counts[conv] = counts.get(conv, 0) + 1
        given[id(output)] = conv, output

    def before_norm(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        counts[norm] = counts.get(norm, 0) + 1
        if inputs and id(inputs[0]) in given:
            found.append((given[id(inputs[0])][0], norm))

    handles = []
    for each in module.modules():
        if type(each) in CONVOLUTIONS:
            handles.append(each.register_forward_hook(after_convolution))
        elif type(each) in NORMS and each.running_var is not None:
            handles.append(each.register_forward_pre_hook(before_norm))
    try:
        output = module(images)
    finally:
        for handle in handles:
            handle.remove()
    once = [pair for pair in found if counts[pair[0]] == 1 and counts[pair[1]] == 1]
    return output, once if len({id(conv) for conv, _ in once}) == len(once) else []


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Callable[[], None]:
    """Have `conv` do what `norm` does, and `norm` what comes after it; return what undoes it."""
    weight, bias = conv.weight, conv.bias
    assert norm.running_mean is not None  # it has statistics
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean
    if norm.affine:
        scale = scale * norm.weight.double()
    shift = shift * scale + (norm.bias if norm.affine else 0.0)
    scaled = (weight.double() * scale[:, None, None, None]).to(weight.dtype)
    conv.weight = nn.Parameter(scaled, requires_grad=False)
    conv.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
    vars(norm)["forward"] = _after(norm)  # hooks are on the module still

    def undo() -> None:
        conv.weight, conv.bias = weight, bias
        del vars(norm)["forward"]  # that of the class is back

    return undo


def _after(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """Return what `norm` does besides the norm: timm's may have an activation in it."""
    if isinstance(norm, BatchNormAct2d):
        drop, act = norm.drop, norm.act
        return lambda images: act(drop(images))
    return lambda images: images
