"""What the stages of a backbone cost on this machine, measured in a few seconds.

For the cuts after its stages: the forward pass of what lies before, a step of training of what
follows, its forward pass, and the bytes that cross. Where a backbone has many stages some cuts are
timed, and those between lie on a line from one to the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from autoft.data.views import view_batches
from autoft.looking import evaluating
from autoft.network.cut import CannotCut, cut, every_cut
from autoft.network.stages import kind_of_parameters, stage_of_parameters
from autoft.training import recipe
from autoft.training.job import Costs, Precision, Setup
from autoft.training.memory import is_out_of_memory
from autoft.training.optim import CLIP, can_fuse, take
from autoft.training.precision import autocast, memory_format, noise_batch, place, prepared
from autoft.values import Backbone

BATCH = 8  # images
MOST_TIMED = 5  # cuts between the first stage and the last
ROUNDS = 2  # the best counts; one before them warms up
PATIENCE = 4.0  # seconds after which no further round begins
CLASSES = 10  # of the head whose steps are timed
TRIAL_BATCH = 32  # images of a step of a trial, which says by how much the others are too fast
TRIAL_ROUNDS = 2  # of it, after one that warms up
LONG_STEP = 2.0  # seconds of it: then arithmetic is most of it, which goes by the pixels
HALF = 2  # bytes of a number in fp16
VIEWED = 48  # images of which views are made
VIEWED_AT_ONCE = 16

Spent = tuple[float, float, float]
"""Seconds per image: prefix forward, step of the tail, tail forward."""


def crossing_bytes(backbone: Backbone, image_size: int) -> tuple[tuple[int, ...], str]:
    """Return the bytes in fp16 that cross for an image after 0 ... S stages, and why some cannot.

    Places are 0 where there is no cut; the reason is the first one, "" if every cut is possible.
    """
    found, why = [0], ""
    images = torch.zeros(1, 3, image_size, image_size)
    images = images.to(next(backbone.module.parameters()).device)
    for each in every_cut(backbone, image_size):
        if isinstance(each, CannotCut):
            why = why or str(each)
            found.append(0)
            continue
        with evaluating(backbone.module), torch.no_grad():
            found.append(HALF * sum(tensor.numel() for tensor in each[0](images)))
    return tuple(found), why


def measure_costs(
    backbone: Backbone,
    image_size: int,
    device: torch.device,
    precision: Precision,
    *,
    crossing: Sequence[int],
    view: float = 0.0,
) -> Costs:
    """Time the cuts of `backbone`, which is on `device` and in the layout of `precision` then.

    `crossing` are the bytes of each cut, `view` the seconds of an augmented view. Networks are
    timed in eval mode with fp32 parameters, as trials run them; what was frozen stays so. The
    numbers are made to grow with the prefix and to fall with the tail, as they must. Cuts are
    timed on few images and without an optimiser; one whole step of a trial says what that adds,
    and another what is saved on smaller images.
    """
    backbone.module.to(device).to(memory_format=memory_format(precision))
    last = len(backbone.stages)
    batch = BATCH
    while True:
        try:
            with prepared(backbone.module):
                runs = _Runs(backbone, image_size, device, precision, batch)
                timed, vectors = runs.timed({k: bool(crossing[k]) for k in _timed_cuts(last)})
                whole, smaller = runs.steps_of_a_trial()
            break
        except Exception as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
        batch //= 2
    prefix, tail, score = _between(backbone, timed)
    slower = max(1.0, whole / timed[0][1])
    tail = [slower * each for each in tail]
    return Costs(
        # A busy moment makes a timing too long, never too short: the lower neighbour is right.
        prefix=tuple(np.minimum.accumulate(prefix[::-1])[::-1].tolist()),
        tail=tuple(np.minimum.accumulate(tail).tolist()),
        score=tuple(np.minimum.accumulate(score).tolist()),
        bytes=tuple(crossing),
        view=view,
        smaller=smaller,
        vectors=vectors,
    )


def view_seconds(setup: Setup, backbone: Backbone) -> float:
    """Return what a processor takes for one augmented view of an image of the training part."""
    rows, pre = setup.train.rows[:VIEWED], setup.preprocess(backbone)
    batches = view_batches(setup.store, rows, pre, "crop_flip", 0, VIEWED_AT_ONCE)
    began = time.perf_counter()
    seen = sum(len(batch) for batch in batches)
    return (time.perf_counter() - began) / max(1, seen)


class _Runs:
    """Times the two sides of a backbone at several cuts on one batch of noise.

    All that is timed takes turns, so that a busy moment is one for all of it.
    """

    def __init__(
        self,
        backbone: Backbone,
        image_size: int,
        device: torch.device,
        precision: Precision,
        batch: int,
    ) -> None:
        self._backbone, self._size = backbone, image_size
        self._device, self._precision = device, precision
        self._images = place(noise_batch(batch, image_size, device), precision, device)
        self._stage_of = stage_of_parameters(backbone)

    def timed(self, divided: Mapping[int, bool]) -> tuple[dict[int, Spent], float]:
        """Return the costs of every cut; of those that are not divided they are estimated.

        Behind them stands the share of its time that a step of the whole takes where only norms
        and biases are trained: the gradients of all other weights are left out, but not the way
        back through them.
        """
        last, module = len(self._backbone.stages), self._backbone.module
        works: dict[tuple[int, str], Callable[[], object]] = {
            (0, "score"): lambda: self._run(module, self._images),
            (0, "tail"): self._whole_step(0),
            (last, "tail"): self._head_step(),
        }
        if vectors := self._vectors():
            works[0, "vectors"] = self._step_of(vectors)
        inner = [k for k in divided if 0 < k < last]
        for k in inner:
            works |= self._both_sides(k) if divided[k] else {(k, "frozen"): self._whole_step(k)}
        best = self._race(works)
        forward, step = best[0, "score"], best[0, "tail"]
        found = {0: (0.0, step, forward)}
        for k in inner:
            if divided[k]:
                found[k] = (best[k, "prefix"], best[k, "tail"], best[k, "score"])
            else:
                found[k] = _estimated(forward, step, best[k, "frozen"])
        found[last] = (forward, best[last, "tail"], 0.0)
        return found, min(1.0, best.get((0, "vectors"), step) / step)

    def steps_of_a_trial(self) -> tuple[float, float]:
        """Return the seconds per image of a step as a trial takes it, and a share of them.

        A trial has more images than what else is timed, clips the gradient and moves parameters:
        here copies of them. The share is what a step takes on the smaller images that a recipe
        may ask for: at least that of the pixels, and more where much else than arithmetic takes
        time. 0 seconds where the memory does not hold a step: it will be taken in parts.
        """
        size = recipe.smaller(self._size, recipe.SMALLER)
        pixels = (size / self._size) ** 2
        try:
            works = [self._step_of_a_trial(self._size)]
            whole = self._seconds(works[0], TRIAL_BATCH)  # which warms up
            if TRIAL_BATCH * whole <= LONG_STEP and size < self._size:
                works += self._step_on_smaller(size)
            best = [math.inf] * len(works)
            for _ in range(TRIAL_ROUNDS):
                now = (self._seconds(work, TRIAL_BATCH) for work in works)
                best = list(map(min, best, now))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return 0.0, pixels
        share = best[-1] / best[0] if len(best) > 1 else pixels
        return best[0], min(1.0, max(pixels, share))

    def _step_on_smaller(self, size: int) -> list[Callable[[], None]]:
        """Return a step on images of `size` pixels, warmed up; none if they are refused."""
        try:
            work = self._step_of_a_trial(size)
            work()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return []  # a network may refuse another size in any way
        return [work]

    def _step_of_a_trial(self, size: int) -> Callable[[], None]:
        images = noise_batch(TRIAL_BATCH, size, self._device)
        images = place(images, self._precision, self._device)
        module = self._backbone.module
        trained = list(module.parameters())
        copies = [each.detach().clone().requires_grad_() for each in trained]
        optimizer = torch.optim.AdamW(copies, fused=can_fuse(copies))

        def step() -> None:
            gradients = self._learn(lambda: module(images), trained)
            for each, gradient in zip(copies, gradients, strict=True):
                each.grad = gradient
            nn.utils.clip_grad_norm_(copies, CLIP)
            take(optimizer)

        return step

    def _both_sides(self, k: int) -> dict[tuple[int, str], Callable[[], object]]:
        prefix, tail = cut(self._backbone, k, self._size)
        with torch.no_grad(), autocast(self._precision, self._device):
            given = prefix(self._images)
        trained = self._behind(k)
        return {
            (k, "prefix"): lambda: self._run(prefix, self._images),
            (k, "tail"): lambda: self._learn(lambda: tail(*given), trained),
            (k, "score"): lambda: self._run(tail, *given),
        }

    def _whole_step(self, k: int) -> Callable[[], None]:
        """Return a step of the whole network whose first `k` stages are frozen."""
        return self._step_of(self._behind(k))

    def _step_of(self, trained: list[nn.Parameter]) -> Callable[[], None]:
        """Return a step of the whole network that trains these parameters alone."""
        module = self._backbone.module

        def step() -> None:
            module.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            self._learn(lambda: module(self._images), trained)
            module.requires_grad_(True)

        return step

    def _head_step(self) -> Callable[[], object]:
        """Return a step of a linear head on features."""
        head = nn.Linear(self._backbone.num_features, CLASSES).to(self._device)
        features = torch.zeros(len(self._images), self._backbone.num_features).to(self._device)
        return lambda: self._learn(lambda: head(features), list(head.parameters()))

    def _behind(self, k: int) -> list[nn.Parameter]:
        named = self._backbone.module.named_parameters()
        return [each for name, each in named if self._stage_of[name] >= k]

    def _vectors(self) -> list[nn.Parameter]:
        """Return the norms and biases of the backbone."""
        module = self._backbone.module
        kinds = kind_of_parameters(module)
        named = module.named_parameters()
        return [each for name, each in named if kinds[name] in ("norms", "biases")]

    def _run(self, side: Callable[..., object], *given: Tensor) -> None:
        with torch.no_grad(), autocast(self._precision, self._device):
            side(*given)

    def _learn(
        self, forward: Callable[[], Tensor], trained: list[nn.Parameter]
    ) -> tuple[Tensor | None, ...]:
        with autocast(self._precision, self._device):
            output = forward()
        loss = output.float().square().mean()
        # Not `backward`: gradients that somebody else holds are not touched.
        return torch.autograd.grad(loss, trained, allow_unused=True)

    def _race(
        self, works: Mapping[tuple[int, str], Callable[[], object]]
    ) -> dict[tuple[int, str], float]:
        """Return the seconds per image of the best of a few rounds; the first warms up."""
        best = dict.fromkeys(works, math.inf)
        began = time.perf_counter()
        for number in range(1 + ROUNDS):
            for name, work in works.items():
                spent = self._seconds(work, len(self._images))
                best[name] = min(best[name], spent) if number else math.inf
            if number and time.perf_counter() - began > PATIENCE:
                break
        return best

    def _seconds(self, work: Callable[[], object], images: int) -> float:
        """Return what `work` takes for each of its images."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return (time.perf_counter() - start) / images

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _estimated(forward: float, step: float, frozen: float) -> Spent:
    """Return the costs of a cut that there is not, from a step of the network frozen so far.

    A whole step is a forward and a backward pass; frozen, the latter ends at the tail. The share
    of the backward pass that is left is taken to be that of the forward pass.
    """
    backward = max(step - forward, 1e-12)
    left = min(1.0, max(0.0, (frozen - forward) / backward))
    score = left * forward
    return forward - score, score + left * backward, score


def _timed_cuts(last: int) -> list[int]:
    """Return which cuts of 0 ... `last` are timed: all, or some evenly between both ends."""
    inner = list(range(1, last))
    if len(inner) > MOST_TIMED:
        picked = np.linspace(1, last - 1, MOST_TIMED).round().astype(int)
        inner = sorted(set(picked.tolist()))
    return [0, *inner, last]


def _between(
    backbone: Backbone, timed: dict[int, Spent]
) -> tuple[list[float], list[float], list[float]]:
    """Return the three costs at every cut: as timed, or on a line between their neighbours.

    Stages count the same on it: how many parameters one has says little of its time.
    """
    places = list(timed)
    every = range(len(backbone.stages) + 1)
    columns = zip(*timed.values(), strict=True)
    prefix, tail, score = (np.interp(every, places, column).tolist() for column in columns)
    return prefix, tail, score
