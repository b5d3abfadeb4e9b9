"""Heads of one form, stacked: one matrix product for all of them, and its gradient by hand.

Tensors are (m, ...) for m heads. They are kept in units of each head's own learning rate: w is
held as w / rate. AdamW's step is then as long for all of them, whatever their rates, so that one
fused kernel takes it in place. Logits come out in the same units; the pack multiplies them by the
rates. Gradients are by w itself, so that the moments are those of a head trained by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from autoft.training.packs.forms import Form
from autoft.training.packs.inputs import Inputs, View
from autoft.training.recipe import Recipe

TINY = 1e-12  # below it a length counts as this one, as in torch's `normalize`


@dataclass(frozen=True)
class Member:
    """One head of a pack: where it stands among those given, what it is, how it is trained."""

    position: int
    head: nn.Module
    form: Form
    recipe: Recipe


class Stack(nn.Module):
    """Heads of one form that take the same `view` of the features; what all stacks have."""

    weight: nn.Parameter

    def __init__(self, members: Sequence[Member], view: View) -> None:
        super().__init__()
        self.members = list(members)
        self.view = view
        self.schedule = members[0].recipe.schedule
        device = members[0].form.weight.device
        recipes = [each.recipe for each in members]
        rates = [each.head_lr for each in recipes]
        decays = [each.head_lr * each.weight_decay for each in recipes]
        self.rate = torch.tensor(rates, dtype=torch.float32, device=device)
        self.decay = torch.tensor(decays, dtype=torch.float32, device=device)
        for name in members[0].form.parameters:
            stacked = torch.stack([each.form.parameters[name].detach() for each in members])
            unit = nn.Parameter(stacked / _column(self.rate, stacked), requires_grad=False)
            unit.grad = torch.zeros_like(unit)
            setattr(self, name, unit)

    def outputs(self, inputs: Inputs, logits: Tensor) -> None:
        """Write the logits of this step, in units of the rates, into `logits` (m, C, B)."""
        raise NotImplementedError

    def gradients(self, inputs: Inputs, slopes: Tensor) -> None:
        """Write the gradients of the parameters, given those by the logits (m, C, B)."""
        raise NotImplementedError

    def shrink(self, factor: float) -> None:
        """Decay the weights, as AdamW does before its step of `factor` x the learning rate."""
        for parameter in self.parameters():
            if parameter.ndim == 3:  # (m, outputs, inputs): biases and scales do not decay
                parameter.mul_(_column(1 - factor * self.decay, parameter))

    def keep(self, kept: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Go on with the heads of `kept` (m,) alone."""
        self.members = [
            each for each, stays in zip(self.members, kept.tolist(), strict=True) if stays
        ]
        self.rate, self.decay = self.rate[kept], self.decay[kept]
        for parameter in self.parameters():
            parameter.grad = None
            parameter.data = parameter.data[kept]
            parameter.grad = torch.zeros_like(parameter) if len(parameter) else None
            state = optimizer.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name] = state[name][kept]

    def write(self, inputs: Inputs) -> None:
        """Write the weights and the statistics into the heads themselves."""
        for name, units in self.named_parameters():
            whole = units * _column(self.rate, units)
            for member, own in zip(self.members, whole, strict=True):
                member.form.parameters[name].copy_(own)
        for member in self.members:
            if member.form.norm is not None:
                member.form.norm.load_state_dict(inputs.norms[self.view.norm].state_dict())


class Linear(Stack):
    """One layer: (m, C, F) and a bias (m, C)."""

    bias: nn.Parameter

    def outputs(self, inputs: Inputs, logits: Tensor) -> None:
        """Write the logits of this step into `logits` (m, C, B)."""
        features = inputs.of(self.view)
        torch.mm(self.weight.flatten(0, 1), features.T, out=logits.view(-1, len(features)))
        if hasattr(self, "bias"):
            logits += self.bias[:, :, None]

    def gradients(self, inputs: Inputs, slopes: Tensor) -> None:
        """Write the gradients of weights and biases."""
        _outer(slopes, inputs.of(self.view), self.weight)
        if hasattr(self, "bias"):
            torch.sum(slopes, dim=2, out=self.bias.grad)


class Cosine(Stack):
    """Directions (m, C, F) that unit features are compared with, and scales (m,)."""

    scale: nn.Parameter

    def outputs(self, inputs: Inputs, logits: Tensor) -> None:
        """Write scale x cosine into `logits` (m, C, B)."""
        features = inputs.of(self.view)
        rate = _column(self.rate, self.weight)
        self._lengths = (self.weight.norm(dim=2, keepdim=True) * rate).clamp_(min=TINY)
        self._directions = self.weight * (rate / self._lengths)
        flat = self._directions.flatten(0, 1)
        torch.mm(flat, features.T, out=logits.view(-1, len(features)))
        self._cosines = logits.clone()
        logits *= _column(self.scale, logits)

    def gradients(self, inputs: Inputs, slopes: Tensor) -> None:
        """Write the gradients: of a direction, what is at right angles to it."""
        scale = self.scale * self.rate
        torch.sum(slopes * self._cosines, dim=(1, 2), out=self.scale.grad)
        gradient = _outer(slopes * _column(scale, slopes), inputs.of(self.view), self.weight)
        along = (gradient * self._directions).sum(dim=2, keepdim=True)
        gradient.addcmul_(along, self._directions, value=-1).div_(self._lengths)


class Hidden(Stack):
    """A hidden layer (m, H, F), its biases (m, H), and a last layer (m, C, H) with (m, C)."""

    hidden_weight: nn.Parameter
    hidden_bias: nn.Parameter
    bias: nn.Parameter

    def outputs(self, inputs: Inputs, logits: Tensor) -> None:
        """Write the logits of this step into `logits` (m, C, B)."""
        features, form = inputs.of(self.view), self.members[0].form
        flat = torch.mm(self.hidden_weight.flatten(0, 1), features.T)
        self._before = flat.view(len(self.rate), -1, len(features))
        if hasattr(self, "hidden_bias"):
            self._before += self.hidden_bias[:, :, None]
        self._before *= _column(self.rate, self._before)
        activation = cast(nn.Module, form.activation)
        with torch.enable_grad():
            self._active = activation(self._before.requires_grad_())
        self._given = self._active.detach()
        self._mask = self._dropped(inputs)
        if self._mask is not None:
            self._given = self._given * self._mask
        torch.bmm(self.weight, self._given, out=logits)
        if hasattr(self, "bias"):
            logits += self.bias[:, :, None]

    def gradients(self, inputs: Inputs, slopes: Tensor) -> None:
        """Write the gradients of both layers."""
        torch.bmm(slopes, self._given.transpose(1, 2), out=self.weight.grad)
        if hasattr(self, "bias"):
            torch.sum(slopes, dim=2, out=self.bias.grad)
        back = torch.bmm(self.weight.transpose(1, 2), slopes)
        back *= _column(self.rate, back)
        if self._mask is not None:
            back *= self._mask
        (slope,) = torch.autograd.grad(self._active, self._before, back)
        _outer(slope, inputs.of(self.view), self.hidden_weight)
        if hasattr(self, "hidden_bias"):
            torch.sum(slope, dim=2, out=self.hidden_bias.grad)

    def _dropped(self, inputs: Inputs) -> Tensor | None:
        """Return (H, B) what the dropout leaves of the hidden layer; None: all."""
        rate = self.members[0].form.hidden_dropout
        if not rate or not inputs.training:
            return None
        return inputs.mask(rate, self.hidden_weight.shape[1]).T.contiguous()


def stack(members: Sequence[Member], view: View) -> Stack:
    """Stack heads of one form."""
    form = members[0].form
    if form.scale is not None:
        return Cosine(members, view)
    return Linear(members, view) if form.hidden_weight is None else Hidden(members, view)


def _outer(slopes: Tensor, features: Tensor, weight: nn.Parameter) -> Tensor:
    """Write the gradient of `weight` (m, O, F) by slopes (m, O, B) and features (B, F)."""
    gradient = cast(Tensor, weight.grad)
    torch.mm(slopes.flatten(0, 1), features, out=gradient.view(-1, features.shape[1]))
    return gradient


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` (m,) with as many dimensions as `like` (m, ...) has."""
    return values.view(-1, *[1] * (like.ndim - 1))
