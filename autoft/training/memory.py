"""Batches that do not fit into the memory: taken in parts, with the same effect.

A batch is worked on whole until that fails for want of memory. Then it is repeated from its start
in parts of half the size, and all later ones are taken in such parts. The gradient of a batch is
the sum over its parts, so that a step is that of the whole batch whatever the memory holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoft.data.views import Batch
from autoft.errors import MachineError

# What CPU allocators, cuBLAS, cuDNN and the driver say in errors of no type of their own.
COMPLAINTS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "out_of_memory",
    "STATUS_ALLOC_FAILED",
)

Split = tuple[int, ...]


class MicroBatches:
    """Owns how many images fit at once; `size` is that number, 0 as long as whole batches do.

    It only ever falls: what was too much once is not tried again.
    """

    size = 0

    def gradients(
        self, network: nn.Module, batch: Batch, loss: Callable[[Batch], Tensor]
    ) -> Tensor:
        """Fill the gradients of `network` for `batch`; return its loss, detached.

        `loss` returns a mean over the images that it is given. Earlier gradients are dropped. A
        batch that is repeated draws the same random numbers, and what a failed attempt did to
        running statistics is undone. Batch norms in training see one part at a time: their
        statistics are of fewer images, and a part has two images at least.

        Raises:
            MachineError: the memory does not hold the smallest part.
        """
        training = [module for module in network.modules() if module.training]
        least = 2 if any(isinstance(module, _BatchNorm) for module in training) else 1
        start = _Start.of(network, training)

        def attempt(split: Split) -> Tensor:
            network.zero_grad(set_to_none=True)
            return _accumulated(batch, split, loss)

        def undo() -> None:
            network.zero_grad(set_to_none=True)
            start.restore()

        return self._fitted(attempt, undo, len(batch), least)

    def outputs(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return `function(images)`, (N, ...), of a function that takes each image by itself.

        Raises:
            MachineError: the memory does not hold one image.
        """

        def attempt(split: Split) -> Tensor:
            if len(split) == 1:
                return function(images)
            return torch.cat([function(part) for part in torch.split(images, list(split))])

        return self._fitted(attempt, lambda: None, len(images), 1)

    def _fitted(
        self, attempt: Callable[[Split], Tensor], undo: Callable[[], None], rows: int, least: int
    ) -> Tensor:
        while True:
            split = split_of(rows, self.size, least)
            try:
                return attempt(split)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
            # Only here is the error gone, and with it the tensors of the frames that it went by.
            undo()
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
                torch.cuda.empty_cache()
            self._halve(split, rows, least, reason)

    def _halve(self, split: Split, rows: int, least: int, reason: str) -> None:
        half = max(1, split[0] // 2)
        if split_of(rows, half, least)[0] == split[0]:
            raise MachineError(
                f"The memory is too small for a batch in parts of {split[0]} images, and parts "
                f"cannot be smaller ({reason}). Choose a smaller --image-size or smaller "
                f"--backbones, or end what else uses the memory."
            )
        self.size = half


def split_of(rows: int, size: int, least: int) -> Split:
    """Return the sizes of the fewest and most even parts of `rows`, the largest first.

    Parts have at most `size` images (0: any number), and one more where some would have fewer
    than `least` otherwise.
    """
    wanted = -(-rows // size) if size else 1
    count = max(1, min(wanted, rows // least))
    short, longer = divmod(rows, count)
    return (short + 1,) * longer + (short,) * (count - longer)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` says that a device or the machine has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in COMPLAINTS)


def _accumulated(batch: Batch, split: Split, loss: Callable[[Batch], Tensor]) -> Tensor:
    if len(split) == 1:
        whole = loss(batch)
        whole.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return whole.detach()
    tensors = batch.images, batch.targets, batch.weights
    columns = [torch.split(each, list(split)) for each in tensors]
    total: Tensor | None = None
    for images, targets, weights in zip(*columns, strict=True):
        value = loss(Batch(images, targets, weights)) * (len(images) / len(batch))
        value.backward()  # type: ignore[no-untyped-call]
        total = value.detach() if total is None else total + value.detach()
        del value
    assert total is not None
    return total


@dataclass(frozen=True)
class _Start:
    """What a forward pass in training changes: random numbers and running statistics."""

    device: torch.device
    random: Tensor
    random_on_device: Tensor | None
    buffers: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, network: nn.Module, training: list[nn.Module]) -> _Start:
        device = next(network.parameters()).device
        on_gpu = device.type == "cuda"
        buffers = [buffer for module in training for buffer in module.buffers(recurse=False)]
        return cls(
            device,
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if on_gpu else None,
            [(buffer, buffer.clone()) for buffer in buffers],
        )

    @torch.no_grad()
    def restore(self) -> None:
        torch.set_rng_state(self.random)
        if self.random_on_device is not None:
            torch.cuda.set_rng_state(self.random_on_device, self.device)
        for buffer, before in self.buffers:
            buffer.copy_(before)
