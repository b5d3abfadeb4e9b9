"""What a head is given of a backbone: its own features, another pooling, or those of all stages.

Average and maximum side by side: the practice of fastai. Generalised mean: Radenovic et al. 2018,
arXiv 1711.02512. The pooled features of all stages: a plain form of Head2Toe (Evci et al. 2022,
arXiv 2201.03529).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from autoft.errors import PluginError, UsageError, did_you_mean
from autoft.looking import evaluating, noise
from autoft.network.taps import Taps, places, tap, tapping
from autoft.values import Backbone

POOLS: Final = ("native", "avgmax", "gem")
"""How the last map of a backbone becomes features; native: as the weights were trained."""

KINDS: Final = (*POOLS, "stages")
EPSILON: Final = 1e-6  # the least activation that the generalised mean counts
START: Final = 3.0  # exponent of the generalised mean


class Pooling(nn.Module):
    """Map normalised images (N, 3, H, W) to features (N, num_features) of a backbone.

    `kind` is one of `KINDS`:

    - `native`: what the backbone itself returns.
    - `avgmax`, `gem`: of the last map with more than one position, which may be (N, C, H, W),
      (N, H, W, C) or tokens (N, T, C); class and register tokens are left out, since they stand
      for no place. Stages that come after that map, such as a norm behind the network's own
      pooling, take no part; `map_stage` is the last stage that does.
    - `stages`: averages of the end of every stage, input first, and what the backbone returns
      last, once; `unseen` names the stages whose end no module returns.

    The backbone is used, and is no part of this module: its parameters keep their names, and mode
    and device are its owner's. Modules that are put in or taken out later are not seen.

    Raises:
        UsageError: there is no such kind.
        PluginError: the backbone shows no map that could be pooled.
    """

    def __init__(
        self, backbone: Backbone, kind: str, image_size: int, taps: Taps | None = None
    ) -> None:
        """Learn what is pooled; with `taps`, which fit the kind, no more are put on."""
        super().__init__()
        if kind not in KINDS:
            raise UsageError(
                f"There is no pooling '{kind}'.{did_you_mean(kind, KINDS)} Choose one of: "
                f"{', '.join(KINDS)}."
            )
        self.kind = kind
        self.num_features = backbone.num_features
        self.map_stage = len(backbone.stages) - 1
        self.unseen: tuple[int, ...] = ()
        self.p = nn.Parameter(torch.tensor(START)) if kind == "gem" else None
        self._backbone = (backbone,)  # in a tuple, so that nothing of it is registered
        self._stages = tuple(map(tuple, backbone.stages))
        self._taps = None if kind == "native" else taps or tap(backbone, wants_map=wants_map(kind))
        self._seen: tuple[int, ...] = ()
        self._final_apart = False
        if self._taps:
            self._look(self._taps, image_size)

    @property
    def backbone(self) -> nn.Module:
        """Return the backbone's module."""
        return self._backbone[0].module

    @property
    def whole(self) -> Backbone:
        """Return the backbone with its stages."""
        return self._backbone[0]

    @property
    def identity(self) -> Hashable:
        """Return what tells these features from others of the same backbone."""
        if self.kind == "native":
            return self.kind
        return self.kind, self._stages, None if self.p is None else float(self.p.detach())

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, H, W) to features (N, num_features)."""
        return self.after(lambda: self.backbone(images))

    def after(self, run: Callable[[], Tensor]) -> Tensor:
        """Return features (N, num_features) of a pass that `run` makes through the backbone.

        It returns what the backbone returns, and may begin at a later stage, but before what is
        pooled.
        """
        if self._taps is None:
            return run()
        with self._taps.listening():
            return self.seen(run())

    def seen(self, final: Tensor) -> Tensor:
        """Return features (N, num_features) of the pass that the taps have just seen."""
        if self._taps is None:
            return final
        return self._joined(self._taps, final) if self.kind == "stages" else self._pooled()

    def _pooled(self) -> Tensor:
        """Pool the last map of the pass."""
        assert self._taps is not None
        seen, where = self._taps.map, None
        if seen is not None:
            where = places(seen, self._taps.channels_last)
        if seen is None or where is None:
            raise PluginError(
                f"The backbone shows no map of several positions, which the pooling '{self.kind}' "
                f"needs. Use larger images, or the pooling 'native'."
            )
        if seen.ndim == 3:
            seen = seen[:, int(getattr(self.backbone, "num_prefix_tokens", 0)) :]
        seen = seen.float()
        if self.p is None:
            return torch.cat([seen.mean(dim=where), seen.amax(dim=where)], dim=1)
        return generalised_mean(seen, self.p, where)

    def _joined(self, taps: Taps, final: Tensor) -> Tensor:
        """Join what the stages gave in the pass and, where it is something else, `final`."""
        parts = [taps.pooled[stage] for stage in self._seen]
        return torch.cat([*parts, final.float()] if self._final_apart else parts, dim=1)

    def _look(self, taps: Taps, image_size: int) -> None:
        """Learn from a pass of fixed noise which taps fire, layout and widths; changes nothing."""
        module = self.backbone
        images = noise(module, 2, image_size)
        with evaluating(module), torch.no_grad():
            with taps.listening():
                module(images)  # shows the memory layout, for the pass that counts
            with taps.listening():
                final = module(images)
                if self.kind == "stages":
                    self._measure(taps, final)
                else:
                    self.num_features = self._pooled().shape[1]
                    self.map_stage = taps.map_stage

    def _measure(self, taps: Taps, final: Tensor) -> None:
        self._seen = tuple(sorted(taps.pooled))
        count = len(self._stages)
        self.unseen = tuple(stage for stage in range(count) if stage not in taps.pooled)
        last = taps.pooled.get(count - 1)
        self._final_apart = last is None or not _same(last, final.float())
        self.num_features = self._joined(taps, final).shape[1]


@contextmanager
def one_pass(backbone: Backbone, image_size: int, asked: Pooling) -> Iterator[Poolings]:
    """Give what makes the features of every kind, and those of `asked`, in a single pass.

    A kind that the backbone does not show is left out. What is put on the backbone for it is
    taken off at the end of the block.
    """
    with ExitStack() as stack:
        maps, ends = (stack.enter_context(tapping(backbone, wants_map=w)) for w in (True, False))
        others = dict[str, Pooling]()
        for kind in KINDS:
            taps = maps if wants_map(kind) else ends
            # What nobody asked for must not stand in the way of what was, whatever ails it.
            with suppress(Exception):
                others[kind] = Pooling(backbone, kind, image_size, taps)
        yield Poolings(asked, tuple(others.values()), (maps, ends))


@dataclass(frozen=True)
class Poolings:
    """Every kind of pooling over the same pass; `asked` sees it by taps of its own."""

    asked: Pooling
    others: tuple[Pooling, ...]
    taps: tuple[Taps, ...]

    def __call__(self, images: Tensor) -> dict[Hashable, Tensor]:
        """Return features (N, F) of normalised images (N, 3, H, W) by `Pooling.identity`."""
        made = dict[Hashable, Tensor]()

        def run() -> Tensor:
            final: Tensor = self.asked.backbone(images)
            made.update({each.identity: each.seen(final) for each in self.others})
            return final

        with ExitStack() as stack:
            for taps in self.taps:
                stack.enter_context(taps.listening())
            features = self.asked.after(run)
        return {**made, self.asked.identity: features}


def wants_map(kind: str) -> bool:
    """Tell whether a kind pools the last map, and not the ends of stages."""
    return kind != "stages"


def generalised_mean(output: Tensor, p: Tensor, where: tuple[int, ...]) -> Tensor:
    """Return (mean of x^p)^(1/p) over the dimensions `where` of fp32 activations.

    Activations below a small positive number count as that. p = 1 is the mean, which lower p
    count as; a large p comes near the maximum. Activations are divided by their largest before
    the power and multiplied by it afterwards, so that none overflows.
    """
    p = p.clamp(min=1.0)
    activations = output.clamp(min=EPSILON)
    largest = activations.detach().amax(dim=where, keepdim=True)
    means = (activations / largest).pow(p).mean(dim=where, keepdim=True).pow(1 / p)
    pooled: Tensor = (largest * means).squeeze(where)
    return pooled


def _same(last: Tensor, final: Tensor) -> bool:
    """Tell whether the last stage's average is what the backbone returns."""
    if last.shape != final.shape or not final.any():
        return False
    return torch.allclose(last, final, rtol=1e-3, atol=1e-3 * float(final.abs().max()))
