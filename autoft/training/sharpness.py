"""Sharpness-aware minimisation: the gradient where the loss nearby is worst.

Source: Foret et al. 2021, "Sharpness-Aware Minimization", arXiv 2010.01412.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autoft.network.assemble import has_statistics


def sharpness_aware(
    network: nn.Module, rho: float, gradients: Callable[[], Tensor]
) -> Callable[[], Tensor]:
    """Return what to call in place of `gradients`, which fills gradients and returns the loss.

    It computes gradients, climbs `rho` along them, computes them again there and comes back: two
    passes a step. The second leaves the statistics of batch norms alone. The loss returned is
    that of the first.
    """

    def twice() -> Tensor:
        loss = gradients()
        live = [p for p in network.parameters() if p.grad is not None]
        before = [p.detach().clone() for p in live]
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack([_norm(p.grad) for p in live]))
            for parameter in live:
                assert parameter.grad is not None
                parameter.add_(parameter.grad * (rho / (norm + 1e-12)))
        with _statistics_kept(network):
            gradients()
        with torch.no_grad():
            for parameter, value in zip(live, before, strict=True):
                parameter.copy_(value)
        return loss

    return twice


def _norm(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    norm: Tensor = torch.linalg.vector_norm(gradient.float())
    return norm


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Let batch norms in training mode normalise by the batch without remembering it."""
    norms = [m for m in network.modules() if has_statistics(m) and m.training]
    for norm in norms:
        norm.track_running_stats = False  # type: ignore[assignment]  # a flag of every batch norm
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True  # type: ignore[assignment]
