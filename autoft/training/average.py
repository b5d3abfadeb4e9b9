"""An exponential moving average of a network's weights and buffers, scored in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SPAN = 0.1  # share of the run that the average looks back on


class Average:
    """Holds the average of every floating-point tensor of a network's state.

    The decay is 1 - 1 / (SPAN x steps): published decays such as 0.9998 average thousands of
    steps, which a fine-tune of hundreds does not have. It starts low, (1 + t) / (10 + t), so that
    the start is forgotten. Batch-norm statistics are averaged like weights.
    """

    def __init__(self, network: nn.Module, steps: int) -> None:
        self._decay = max(0.0, 1.0 - 1.0 / max(1.0, SPAN * steps))
        self._tensors = {name: t.detach().clone() for name, t in _floating(network).items()}
        self.seen = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the weights after a step."""
        decay = min(self._decay, (1 + self.seen) / (10 + self.seen))
        self.seen += 1
        for name, tensor in _floating(network).items():
            self._tensors[name].lerp_(tensor, 1 - decay)  # of equal tensors: bit-equal

    @contextmanager
    def in_place_of(self, network: nn.Module) -> Iterator[None]:
        """Give `network` the averaged tensors while the block runs."""
        kept = {name: tensor.detach().clone() for name, tensor in _floating(network).items()}
        _write(network, self._tensors)
        try:
            yield
        finally:
            _write(network, kept)

    def state(self) -> dict[str, Tensor]:
        """Return what `load` takes."""
        return {**self._tensors, "seen": torch.tensor(self.seen)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from an earlier state."""
        self.seen = int(state["seen"])
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])


def _floating(network: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in network.state_dict().items() if t.is_floating_point()}


@torch.no_grad()
def _write(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in _floating(network).items():
        tensor.copy_(tensors[name])
