"""Attention over tensors of any number of dimensions, for exporters that know four alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

attention: Callable[..., Tensor] = functional.scaled_dot_product_attention


class FoldedAttention(TorchFunctionMode):
    """Fold the leading dimensions of attention into one while the block runs, and unfold them.

    Networks with windows attend over (N, windows, heads, L, E), and some over (N, L, E): the same
    computation as over (N, heads, L, E), which is all that the ONNX exporter takes.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func`, attention in four dimensions."""
        given = dict(kwargs or {})
        if func is attention and len(args) >= 3 and args[0].ndim != 4:
            return _folded(args, given)
        return func(*args, **given)


def _folded(args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
    query, key, value = args[:3]
    rest = list(args[3:])
    mask = rest[0] if rest else given.get("attn_mask")
    if mask is not None and mask.ndim > 2:
        shape = (*query.shape[:-2], query.shape[-2], key.shape[-2])
        mask = _to_four(mask.expand(shape))
        if rest:
            rest[0] = mask
        else:
            given["attn_mask"] = mask
    out = attention(*map(_to_four, (query, key, value)), *rest, **given)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _to_four(tensor: Tensor) -> Tensor:
    """Return (..., L, E) as (N, heads, L, E)."""
    if tensor.ndim == 3:
        return tensor.unsqueeze(0)
    return tensor.flatten(0, tensor.ndim - 4)
