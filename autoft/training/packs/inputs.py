"""What every step gives to the heads of a pack: a batch, standardised, and with what is dropped.

All heads see the same batch and the same draws, so that what tells two of them apart is how they
are trained. They start from the state of torch's random numbers, and are what `nn.Dropout` would
draw from it on a processor; but with MKL on processors of Intel, and on a GPU, it draws others.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoft.training.packs.forms import Form


@dataclass(frozen=True)
class View:
    """How a stack takes the features: by which norm (-1: none), as directions, dropped out."""

    norm: int
    unit: bool
    dropout: float


class Inputs(nn.Module):
    """The norms that heads share, and the numbers that are drawn for their dropout."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.norms = nn.ModuleList()
        self._state = _generator(device)
        self._generators: dict[int, torch.Generator] = {}
        self._drawn: dict[int, Tensor] = {}
        self._views: dict[View, Tensor] = {}
        self._features = torch.empty(0)

    def view(self, form: Form) -> View:
        """Return how the heads of `form` take features, and be ready to give them so."""
        norm = -1 if form.norm is None else self._index_of(form.norm)
        return View(norm, form.scale is not None, form.dropout)

    @property
    def count(self) -> int:
        """Return of how many images the features are."""
        return len(self._features)

    def begin(self, features: Tensor) -> None:
        """Take the features (B, F) of a new step."""
        self._features = features
        self._views, self._drawn = {}, {}

    def of(self, view: View) -> Tensor:
        """Return the features (B, F) of this step as `view` says."""
        if view not in self._views:
            self._views[view] = self._look(view)
        return self._views[view]

    def mask(self, rate: float, width: int) -> Tensor:
        """Return (B, width): 0 with probability `rate`, else 1 / (1 - rate)."""
        if width not in self._drawn:
            self._drawn[width] = self._draw(width)
        return (self._drawn[width] < 1 - rate).to(self._features.dtype).div_(1 - rate)

    def _look(self, view: View) -> Tensor:
        if view.dropout and self.training:
            whole = self.of(View(view.norm, view.unit, 0.0))
            return whole * self.mask(view.dropout, whole.shape[1])
        if view.unit:
            return functional.normalize(self._features, dim=1)
        if view.norm < 0:
            return self._features
        standardised: Tensor = self.norms[view.norm](self._features)
        return standardised

    def _draw(self, width: int) -> Tensor:
        device = self._features.device
        if width not in self._generators:
            self._generators[width] = self._state.clone_state()
        shape = (len(self._features), width)
        # In double precision, as `bernoulli_` draws on a processor.
        return torch.rand(
            shape, generator=self._generators[width], dtype=torch.float64, device=device
        )

    def _index_of(self, norm: nn.BatchNorm1d) -> int:
        for index, known in enumerate(self.norms):
            if _same(known, norm):
                return index
        self.norms.append(copy.deepcopy(norm).train())
        return len(self.norms) - 1


def _generator(device: torch.device) -> torch.Generator:
    """Return random numbers that go on where torch's own are now, which stay there."""
    if device.type == "cuda":
        index = device.index or 0
        return torch.cuda.default_generators[index].clone_state()
    return torch.default_generator.clone_state()


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two norms do the same from here on."""
    mine, theirs = one.state_dict(), other.state_dict()
    return repr(one) == repr(other) and all(
        torch.equal(value, theirs[name]) for name, value in mine.items()
    )
