"""The heads that train together: what they give, what they lose by it, and a step of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from autoft.training import probe
from autoft.training.optim import schedule
from autoft.training.packs.criteria import Criteria
from autoft.training.packs.inputs import Inputs, View
from autoft.training.packs.stacks import Member, Stack, stack


class Pack(nn.Module):
    """Stacks of heads of one batch size; everything (M, ...) is in the order of `members`."""

    def __init__(self, members: Sequence[Member], counts: Tensor) -> None:
        super().__init__()
        device = members[0].form.weight.device
        self.inputs = Inputs(device)
        self.stacks = _stacked(members, self.inputs)
        self.criteria = Criteria([each.recipe for each in self.members], counts, device)
        self.mean_losses = torch.empty(0)  # (M,) once a step is done
        self.optimizer = torch.optim.AdamW(
            [{"params": list(each.parameters()), "stack": each} for each in self.stacks],
            weight_decay=0.0,  # each head has its own: see `Stack.shrink`
            fused=True,
        )

    @property
    def members(self) -> list[Member]:
        """Return the heads that are still in."""
        return [member for each in self.stacks for member in each.members]

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (M, C, N) of features (N, F)."""
        self.inputs.begin(features)
        return self._logits()

    def losses(self, features: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses (M,) of a batch, and their gradients by the logits (M, C, B).

        Heads may be dropped afterwards, and `again` be asked for without drawing anew.
        """
        self.inputs.begin(features)
        return self.again(labels, weights)

    def again(self, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and gradients of the features that came last."""
        return self.criteria(self._logits(), labels, weights)

    def step(self, losses: Tensor, slopes: Tensor, progress: float) -> None:
        """Move all heads by their gradients, `progress` in [0, 1) of the run being done."""
        for each, part in self._parts(slopes):
            each.gradients(self.inputs, part)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule(group["stack"].schedule, progress)
            group["stack"].shrink(group["lr"])
        self.optimizer.step()
        before = self.mean_losses if len(self.mean_losses) else losses
        self.mean_losses = before.lerp(losses, probe.NEWEST)

    def keep(self, kept: Tensor) -> None:
        """Go on with the heads of `kept` (M,) alone; the others cost nothing from here on."""
        for each, part in self._parts(kept):
            if not part.all():
                each.keep(part, self.optimizer)
        self.stacks = [each for each in self.stacks if each.members]
        self.criteria.keep(kept)
        if len(self.mean_losses):
            self.mean_losses = self.mean_losses[kept]

    def write(self) -> None:
        """Write weights and statistics into the heads themselves."""
        for each in self.stacks:
            each.write(self.inputs)

    def _logits(self) -> Tensor:
        some = self.stacks[0].weight
        logits = some.new_empty(len(self.members), some.shape[1], self.inputs.count)
        for each, part in self._parts(logits):
            each.outputs(self.inputs, part)
            part *= each.rate[:, None, None]
        return logits

    def _parts(self, tensor: Tensor) -> Iterator[tuple[Stack, Tensor]]:
        """Yield each stack with what of `tensor` (M, ...) is of its heads."""
        sizes = [len(each.members) for each in self.stacks]
        yield from zip(self.stacks, torch.split_with_sizes(tensor, sizes), strict=True)


def _stacked(members: Sequence[Member], inputs: Inputs) -> list[Stack]:
    """Put heads of one form, one view of the features and one schedule into a stack each."""
    alike: dict[tuple[View, object], list[Member]] = {}
    for each in members:
        rest = (each.form.layers, each.recipe.schedule)
        alike.setdefault((inputs.view(each.form), rest), []).append(each)
    return [stack(group, view) for (view, _), group in alike.items()]
