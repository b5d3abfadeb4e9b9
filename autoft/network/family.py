"""What kind of network a backbone is, as far as training goes by it."""

from __future__ import annotations

from torch import nn


def is_transformer(module: nn.Module) -> bool:
    """Tell whether attention over tokens is what a network is made of.

    Such networks want smaller learning rates. Convolutional networks with a few attention pools
    or squeeze-and-excitation blocks, which some call attention too, are none.
    """
    mixers = [m for m in module.modules() if _is_attention(m)]
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    return len(mixers) >= 2 and len(mixers) > len(convolutions) / 2


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    maps = any(hasattr(module, name) for name in ("qkv", "q", "query", "qkv_proj"))
    return "attention" in type(module).__name__.lower() and maps
