"""Train many heads on the same minibatches: those that can be stacked at once, others in turn.

Each head ends up as `probe.fit_head` would leave it from the present state of torch's random
numbers, but for rounding. Heads with dropout do so where `inputs.py` draws as torch does;
elsewhere they are equal in distribution only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from autoft.training import probe
from autoft.training.losses import make_loss
from autoft.training.packs.forms import Form, form_of
from autoft.training.packs.pack import Pack
from autoft.training.packs.size import best_pack_size, most_in_memory
from autoft.training.packs.stacks import Member
from autoft.training.recipe import Recipe

ASKED = 256  # images held out that are asked about at once: hidden layers of many heads are large


@dataclass(frozen=True)
class Round:
    """What heads that train together have come to at the end of round `index`, from 1 on.

    `heads` are their positions among those that `train_pack` was given, `losses` their mean
    training losses of late, `logits` what each says, in evaluation, of the features held out,
    (N, C) in main memory (None where nothing is held out). `seconds` is what each took so far.
    """

    index: int
    heads: tuple[int, ...]
    losses: tuple[float, ...]
    logits: tuple[Tensor | None, ...]
    seconds: tuple[float, ...]


AfterPackRound = Callable[[Round], Sequence[bool]]
"""Told of a round, with the heads as they are then; returns which of `Round.heads` go on."""


@dataclass(frozen=True)
class PackOutcome:
    """How the training of one head ended.

    `rounds` is how many were finished, `loss` the mean training loss of late, `seconds` its share
    of the time. `error` says why it failed ("": it did not); its weights are then those before the
    step that failed. `together` is how many heads began with it at once, 1 for one by itself.
    """

    rounds: int = 0
    loss: float = float("nan")
    seconds: float = 0.0
    error: str = ""
    together: int = 1


@dataclass(frozen=True)
class Data:
    """What all heads of a pack are trained on, and what they are asked after every round."""

    features: Tensor
    labels: Tensor
    weights: Tensor
    counts: Tensor
    held_out: Tensor | None
    seed: int
    rounds: int
    after_round: AfterPackRound | None


Given = tuple[int, nn.Module, Recipe]
"""A head: where it stands among those given, itself, how it is trained."""


def train_pack(  # noqa: PLR0913 (data, recipes and what is asked for by name)
    heads: Sequence[nn.Module],
    features: Tensor,
    labels: Tensor,
    recipes: Sequence[Recipe],
    *,
    counts: Tensor,
    seed: int,
    weights: Tensor | None = None,
    held_out: Tensor | None = None,
    rounds: int = 1,
    after_round: AfterPackRound | None = None,
    size: int | None = None,
) -> list[PackOutcome]:
    """Train `heads` in place, each by its recipe, on features (N, F) and labels (N,).

    Heads whose layers are known train together, those of one batch size at most `size` at once
    (None: as many as `best_pack_size` finds fastest and memory allows); others follow one by one.
    `counts` (C,) are the images of each class, for the losses; `weights` (N,), of mean 1, scale
    the loss of each image (None: all are 1). After each of `rounds` equal parts `after_round` is
    told what those that train together have come to, and says which go on. A head whose loss is
    no longer a number, or that raises, ends alone; the others do not notice. Torch's own random
    numbers stay where they are.
    """
    if len(recipes) != len(heads):
        raise ValueError(f"{len(heads)} heads and {len(recipes)} recipes; expected as many")
    weights = torch.ones(len(features)).to(features) if weights is None else weights
    data = Data(features, labels, weights, counts, held_out, seed, rounds, after_round)
    outcomes: dict[int, PackOutcome] = {}
    given = list(zip(range(len(heads)), heads, recipes, strict=True))
    packs, others = _divided(given, data, size)
    devices = [features.device.index or 0] if features.device.type == "cuda" else []
    for members in packs:
        outcomes |= _together(members, data)
    for position, head, recipe in others:
        with torch.random.fork_rng(devices):  # each draws as if it were the first
            outcomes[position] = _alone(position, head, recipe, data)
    return [outcomes[position] for position in range(len(heads))]


def _divided(
    given: Sequence[Given], data: Data, size: int | None
) -> tuple[list[list[Member]], list[Given]]:
    """Return the heads that train together, pack by pack, and those that train alone."""
    alike: dict[tuple[int, int], list[Member]] = {}
    for position, head, recipe in given:
        form = _form(head, data.features.shape[1])
        if form is not None and recipe.head_lr > 0 and data.features.dtype == torch.float32:
            key = (min(recipe.batch_size, len(data.features)), len(form.weight))
            alike.setdefault(key, []).append(Member(position, head, form, recipe))
    packs = list[list[Member]]()
    for (batch, classes), members in alike.items():
        most = size or _fastest(members, classes, batch, data.features)
        packs += [part for part in _parts(members, most) if len(part) > 1]
    stacked = {each.position for part in packs for each in part}
    return packs, [each for each in given if each[0] not in stacked]


def _form(head: nn.Module, num_features: int) -> Form | None:
    """Return the form of a head; None where it cannot even be asked: training it says why."""
    try:
        return form_of(head, num_features)
    except Exception:  # noqa: BLE001 - a head of somebody else may raise anything at all
        return None


def _fastest(members: list[Member], classes: int, batch: int, features: Tensor) -> int:
    """Return how many of `members` are best trained at once on features (N, F)."""
    width, device = features.shape[1], features.device
    fitting = min(len(members), most_in_memory([each.form for each in members]))
    return best_pack_size(width, classes, batch, device, fitting)


def _parts(members: list[Member], size: int) -> list[list[Member]]:
    """Cut into parts of at most `size`, as even as can be; heads of one form stay together."""
    form_first = sorted(members, key=lambda each: (repr(each.form.layers), each.position))
    count = -(-len(members) // size)
    edges = [len(members) * part // count for part in range(count + 1)]
    return [form_first[start:end] for start, end in pairwise(edges)]


@torch.no_grad()
def _together(members: list[Member], data: Data) -> dict[int, PackOutcome]:
    """Train heads in one pack, and return how each ended."""
    pack = Pack(members, data.counts).train()
    ledger = _Ledger(members)
    batch = min(members[0].recipe.batch_size, len(data.features))
    count = len(data.features)
    total = probe.steps_of(count, batch)
    for step, drawn in enumerate(probe.minibatches(count, batch, total, data.seed)):
        chosen = drawn.to(data.features.device)
        labels, weights = data.labels[chosen], data.weights[chosen]
        losses, slopes = pack.losses(data.features[chosen], labels, weights)
        while not (finite := torch.isfinite(losses)).all():
            ledger.failed(pack, finite, step)
            if not pack.members:
                return ledger.outcomes
            losses, slopes = pack.again(labels, weights)
        pack.step(losses, slopes, step / total)
        if done := probe.round_ended(step, total, data.rounds):
            ledger.told(pack, done, data)
            if not pack.members:
                break
    return ledger.outcomes


class _Ledger:
    """How the heads of a pack are getting on, and what they took of its time."""

    def __init__(self, members: Sequence[Member]) -> None:
        began = PackOutcome(together=len(members))
        self.outcomes = {each.position: began for each in members}
        self._since = time.perf_counter()

    def failed(self, pack: Pack, finite: Tensor, step: int) -> None:
        """Take the heads whose loss is no number out of the pack."""
        self._charge(pack)
        pack.write()
        for member, fine in zip(pack.members, finite.tolist(), strict=True):
            if not fine:
                self._note(member.position, error=probe.failure(step, member.recipe))
        pack.keep(finite)

    def told(self, pack: Pack, index: int, data: Data) -> None:
        """Tell of a round, and take out of the pack those that are not to go on."""
        pack.write()
        logits = _held_out_logits(pack, data.held_out)
        self._charge(pack)
        losses = pack.mean_losses.tolist()
        heads = tuple(each.position for each in pack.members)
        for head, loss in zip(heads, losses, strict=True):
            self._note(head, rounds=index, loss=loss)
        if data.after_round is not None:
            seconds = tuple(self.outcomes[head].seconds for head in heads)
            go_on = data.after_round(Round(index, heads, tuple(losses), logits, seconds))
            kept = torch.tensor([bool(each) for each in go_on])
            if not kept.all():
                pack.keep(kept.to(data.features.device))
        self._since = time.perf_counter()

    def _charge(self, pack: Pack) -> None:
        now = time.perf_counter()
        share = (now - self._since) / len(pack.members)
        self._since = now
        for each in pack.members:
            before = self.outcomes[each.position].seconds
            self._note(each.position, seconds=before + share)

    def _note(self, position: int, **changes: Any) -> None:
        self.outcomes[position] = replace(self.outcomes[position], **changes)


def _held_out_logits(pack: Pack, features: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return what each head says, in evaluation, of `features` (N, F): (N, C) in main memory."""
    if features is None:
        return (None,) * len(pack.members)
    pack.eval()
    parts = [pack(part).transpose(1, 2).cpu() for part in torch.split(features, ASKED)]
    pack.train()
    return tuple(torch.cat(parts, dim=1))


def _alone(position: int, head: nn.Module, recipe: Recipe, data: Data) -> PackOutcome:
    """Train one head by itself, and return how it ended."""
    outcome, since = PackOutcome(), time.perf_counter()
    not_its_own: list[BaseException] = []

    def told(index: int, loss: float) -> bool:
        nonlocal outcome, since
        head.eval()
        with torch.no_grad():
            logits = None if data.held_out is None else head(data.held_out).float().cpu()
        head.train()
        seconds = outcome.seconds + time.perf_counter() - since
        outcome = PackOutcome(index, loss, seconds)
        now = Round(index, (position,), (loss,), (logits,), (seconds,))
        try:
            goes_on = data.after_round is None or bool(data.after_round(now)[0])
        except BaseException as error:
            not_its_own.append(error)
            raise
        since = time.perf_counter()
        return goes_on

    try:
        probe.fit_head(
            head,
            data.features,
            data.labels,
            recipe,
            loss=make_loss(recipe.balance, recipe.smoothing, data.counts),
            seed=data.seed,
            weights=data.weights,
            rounds=data.rounds,
            after_round=told,
        )
    except BaseException as error:  # a head of somebody else may raise anything at all
        if error in not_its_own or isinstance(error, KeyboardInterrupt):
            raise
        told_of = str(error) if isinstance(error, probe.NonFiniteLoss) else in_words(error)
        seconds = outcome.seconds + time.perf_counter() - since
        return replace(outcome, seconds=seconds, error=told_of)
    return outcome


def in_words(error: BaseException) -> str:
    """Return what a plugin raised, on one line."""
    told = (str(error).strip() or repr(error)).splitlines()[0]
    return f"{type(error).__name__}: {told[:500]}"
