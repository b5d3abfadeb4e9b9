"""How large the gradients of each stage are beside its weights: what some strategies go by.

Source: Lee et al. 2022, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", arXiv
2210.11466 (Auto-RGN).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from autoft.network.assemble import Network

BATCHES = 5


def relative_norms(network: Network, fills: Iterable[Callable[[], Tensor]]) -> tuple[float, ...]:
    """Return ||gradient|| / ||weights|| of every stage, the mean over `fills`.

    Each of `fills` drops the gradients that there are and fills in those of a batch. Norms and
    biases have no say. The network is in eval mode and wholly thawed meanwhile;
    afterwards rates, modes and gradients are as if nothing had been.
    """
    rates, mode, training = network.rates, network.norm_mode, network.training
    network.set_rates([1.0] * network.num_stages, norm_mode="affine")
    network.eval()
    sums = torch.zeros(network.num_stages, dtype=torch.float64)
    count = 0
    try:
        for fill in fills:
            fill()
            sums += torch.tensor(_of_stages(network), dtype=torch.float64)
            count += 1
    finally:
        network.zero_grad(set_to_none=True)
        network.train(training)
        network.set_rates(rates, norm_mode=mode)
    return tuple((sums / max(count, 1)).tolist())


def _of_stages(network: Network) -> list[float]:
    gradients, weights = [0.0] * network.num_stages, [0.0] * network.num_stages
    for (stage, kind), parameters in network.groups().items():
        if kind != "weights":
            continue
        for parameter in parameters:
            if parameter.grad is not None:
                gradients[stage] += float(parameter.grad.float().square().sum())
                weights[stage] += float(parameter.detach().float().square().sum())
    return [(g / w) ** 0.5 if w > 0 else 0.0 for g, w in zip(gradients, weights, strict=True)]
