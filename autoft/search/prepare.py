"""From settings to a setup: which backbones there are, and how good each is to start from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from autoft import plugins
from autoft.data import doctor
from autoft.data.inputs.hub import out_of_reach
from autoft.data.splits.split import TEST
from autoft.errors import AutoftError, DataError, MachineError, UsageError
from autoft.network.provide import Provided
from autoft.network.sources import Source, in_folder, resolve, suggest
from autoft.search.budget import GOOD_EPOCHS, Budget
from autoft.search.configs import Space
from autoft.search.engines import tasks, weighing
from autoft.search.engines.tasks import Begun, Described, Names
from autoft.search.engines.weighing import LeftOut
from autoft.search.engines.worker import Worker
from autoft.search.folder import RunFolder
from autoft.search.images import Data
from autoft.search.portfolio import usual_of
from autoft.search.sampling import affordable, repeats_for, sample_of
from autoft.search.session import Session
from autoft.search.settings import Settings
from autoft.selection.regime import Profile, judge, merit
from autoft.training.job import Ranked, Setup
from autoft.training.plan import share_of_smaller
from autoft.training.recipe import AUGMENTS, SMALLER, UPRIGHT

LARGE = 20_000  # training images from which random weights may win and batch norms may learn
EMBEDDED = "autoft_mini"  # comes with autoft
BEHIND = 0.10  # a backbone whose probe is further behind the best is not searched
FEW = 200  # images of each part, for a first look at several backbones
FINALISTS = 2  # of them are looked at again, on all images
SMALLER_PAY = 0.8  # of the time is the most that training on smaller images may take
UNSURE = 0.03  # by how much a first look may be wrong
SECOND_SHARE, OTHERS_SHARE = 0.4, 0.25  # of the time for ranking: later, no more are looked at
LONG = 3600.0  # seconds from which a larger tier pays
BEGINS_WEAK = (
    f"The search starts from {EMBEDDED}, which comes with autoft and saw generated images alone; "
    f"weights of photographs know more."
)
MISSING = "Missing weights can be given with --weights DIR, or fetched in a run with network."

Emit = Callable[..., None]
Call = Callable[..., Any]


def local_sources(settings: Settings) -> tuple[dict[str, Source], list[str]]:
    """Return the backbones in --weights by label, and what was left out there and why.

    Raises:
        UsageError: --weights holds none.
    """
    return in_folder(Path(settings.weights)) if settings.weights else ({}, [])


def asked_sources(settings: Settings, local: Mapping[str, Source]) -> dict[str, Source]:
    """Return the backbones that were asked for by name."""
    return {spec: replace(resolve(spec, local), label=spec) for spec in settings.backbones}


def default_sources(
    settings: Settings, local: Mapping[str, Source], described: Described, device: str
) -> dict[str, Source]:
    """Return those in --weights, or of the size that fits device and time, and the embedded."""
    tier = default_tier(device, settings.time)
    names = [name for name, each in described.tiers.items() if each == tier]
    return with_embedded(local or {name: resolve(name, {}) for name in names})


def with_embedded(sources: Mapping[str, Source]) -> dict[str, Source]:
    """Return `sources`, and last the backbone that comes with autoft: it is ranked in seconds."""
    return dict(sources) | ({} if EMBEDDED in sources else {EMBEDDED: resolve(EMBEDDED, {})})


def default_tier(device: str, seconds: float) -> str:
    """Return the size of backbone that the device can fine-tune several times in the time."""
    if device == "cpu":
        return "nano" if seconds < LONG else "small"
    return "small" if seconds < LONG else "base"


def ask_to_begin(worker: Worker, settings: Settings, asked: Mapping[str, Source]) -> None:
    """Have a worker find devices and plugins and build what was asked for, while data is read."""
    size = settings.image_size or 0
    worker.send(tasks.begin, settings.device, names(settings), tuple(asked.values()), size)


def begun_by(session: Session, worker: Worker, local: Mapping[str, Source]) -> Begun:
    """Wait for what `ask_to_begin` asked for.

    Raises:
        AutoftError: the first thing that was asked for and cannot be had.
    """
    try:
        begun: Begun = session.wait(worker)
    except UsageError as error:
        raise with_hint(error, session.settings, local) from error
    return begun


def with_hint(error: UsageError, settings: Settings, local: Mapping[str, Source]) -> UsageError:
    """Return `error` with the closest backbone here that the user may have meant."""
    if "Did you mean" in str(error):
        return error
    hints = [suggest(name, local) for name in settings.backbones if name not in local]
    return UsageError(f"{error}{''.join(hints)}")


def provide(
    settings: Settings, sources: Mapping[str, Source], call: Call, emit: Emit
) -> dict[str, Source]:
    """Have the weights here before data is decoded; return the backbones that can be had.

    What is told of each: the file, its SHA-256, its address, its licence.

    Raises:
        AutoftError: a backbone that was asked for by name cannot be had, or none at all can, or
            none has a licence among those allowed.
    """
    asked = bool(settings.backbones)
    emit("phase", name="weights", text=f"weights of {len(sources)} backbones")
    found: dict[str, Source] = {}
    left_out: list[LeftOut] = []
    for label, source in sources.items():
        each: Provided | LeftOut = call(
            weighing.provide, source, settings.allow_license, settings.image_size or 0, asked
        )
        if isinstance(each, LeftOut):
            emit("note", text=f"Left out: {each.text}")
            left_out.append(each)
            continue
        found[label] = each.source
        for note in each.notes:
            emit("note", text=note)
    refused = any(each.exit_code == UsageError.exit_code for each in left_out)
    if refused and not found and settings.allow_license:
        raise UsageError(
            f"No backbone here has weights that --allow-license "
            f"{','.join(settings.allow_license)} allows. Allow more, or name --backbones; "
            f"`autoft weights list` shows their licences."
        )
    if not found:  # not even the embedded one, which is last; the first may be of their folder
        reason = left_out[0 if settings.weights else -1]
        raise error_of(reason.exit_code, reason.text)
    if list(found) == [EMBEDDED] and any(e.exit_code == MachineError.exit_code for e in left_out):
        emit("note", text=MISSING)
    return found


def best_prior(setup: Setup, priors: Mapping[str, float]) -> str:
    """Return the backbone that is best by what its weights are known for; "" if none is.

    A folder of one's own that is called as published weights are, with a tag, holds those.
    """
    known = {
        label: priors[label]
        for label, source in setup.sources.items()
        if source.pretrained
        and label in priors
        and ("." in label or not (source.weights or source.options))
    }
    return max(known, key=known.__getitem__, default="")


def rank(
    settings: Settings, setup: Setup, call: Call, emit: Emit, seconds: float, prior: str = ""
) -> tuple[Setup, list[Ranked]]:
    """Measure the backbones; return the setup with those that can be used, best first.

    Where there are several, a few images tell which of them are worth a pass over all. After
    `seconds`, those that were not yet measured are left out, if one can be used. The backbone
    `prior` is searched however its probe is: frozen features may tell little of what it can learn.

    Raises:
        AutoftError: a backbone that was asked for by name cannot be used, or none can.
        DataError: the images cannot be read, whatever the backbone.
    """
    emit("phase", name="rank", text=f"ranking {len(setup.sources)} backbones")
    measured: list[Ranked] = []
    few, began = first_look(setup), time.monotonic()
    for label in setup.sources:
        if time.monotonic() > began + seconds and any(not each.error for each in measured):
            emit("note", text=f"No time to rank {label} and what follows: left out.")
            break
        measured.append(_rank_one(label, setup, call, emit, few, timed=not few))
    failed = [each for each in measured if each.error]
    usable = sorted((each for each in measured if not each.error), key=_order)
    near = _near(usable, prior)
    if few and near:
        again = _looked_at_again(near, setup, call, emit, began, seconds, prior)
        failed += [each for each in again if each.error]
        near = _near([each for each in again if not each.error], prior)
        usable = near + [each for each in usable if each.label not in {e.label for e in again}]
    if failed and (settings.backbones or not near):
        raise error_of(failed[0].exit_code, failed[0].error)  # the embedded one is last
    begins_weak = [each.label for each in usable] == [EMBEDDED] and usable[0].weak
    if begins_weak and not (settings.backbones or setup.sources[EMBEDDED].weights):
        emit("note", text=BEGINS_WEAK)
    return replace(setup, sources=_keep_sources(setup, usable)), near


def first_look(setup: Setup) -> int:
    """Return how many images of each part a first look at the backbones takes; 0: all at once."""
    return FEW if len(setup.sources) > 1 and len(setup.train) > 2 * FEW else 0


def _near(usable: Sequence[Ranked], prior: str) -> list[Ranked]:
    """Return the backbones that are worth searching, of those that are sorted."""
    return [
        each for each in usable if each.probe >= usable[0].probe - BEHIND or each.label == prior
    ]


def _looked_at_again(
    near: Sequence[Ranked],
    setup: Setup,
    call: Call,
    emit: Emit,
    began: float,
    seconds: float,
    prior: str,
) -> list[Ranked]:
    """Rank the best, and what may be as good, on all images; time the others, which come after.

    The best that can be used is always looked at: its features are needed anyway, for heads. So
    is the best by its `prior`. `began` (monotonic) is when ranking began, which may take
    `seconds`: of others there are as many as there is time for.
    """
    whole, few, late = list[Ranked](), list[Ranked](), list[str]()
    for place, each in enumerate(near):
        spent = time.monotonic() - began
        ends = spent + max((other.seconds for other in whole), default=0.0)
        close = place < FINALISTS and each.probe >= near[0].probe - UNSURE
        none_yet = all(other.error for other in whole)
        if none_yet or (close and ends < SECOND_SHARE * seconds):
            whole.append(_rank_one(each.label, setup, call, emit, 0))
        elif spent < OTHERS_SHARE * seconds or each.label == prior:
            few.append(_rank_one(each.label, setup, call, emit, FEW))
        else:
            late.append(each.label)
    if late:
        emit("note", text=f"No time to search with {', '.join(late)} as well.")
    return [*sorted(whole, key=_order), *few]


def _keep_sources(setup: Setup, usable: Sequence[Ranked]) -> dict[str, Source]:
    """Write where all backbones are from; return those that can be used, or were in a trial.

    A trial of an earlier command may win although its backbone is not among today's.
    """
    folder = RunFolder(setup.folder)
    known = known_sources(folder) | dict(setup.sources)
    tried = {result.config.backbone.name for result in folder.trials()}
    written = {k: v.to_json() for k, v in known.items() if k in tried or k in setup.sources}
    folder.write_json("sources.json", written)
    labels = [each.label for each in usable]
    labels += [label for label in known if label in tried and label not in labels]
    return {label: known[label] for label in labels}


def error_of(exit_code: int, text: str) -> AutoftError:
    """Return the error that a worker returned as plain data."""
    kinds = {kind.exit_code: kind for kind in (UsageError, DataError, MachineError)}
    return kinds.get(exit_code, MachineError)(text)


def known_sources(folder: RunFolder) -> dict[str, Source]:
    """Return the backbones that a run was made with."""
    return {k: Source(**v) for k, v in (folder.read_json("sources.json") or {}).items()}


def _rank_one(
    label: str, setup: Setup, call: Call, emit: Emit, limit: int, *, timed: bool = True
) -> Ranked:
    ranked: Ranked = call(tasks.rank, setup, label, limit, timed)
    emit(
        "backbone",
        name=label,
        score=None if ranked.error else ranked.probe,
        seconds=ranked.seconds,
        text=ranked.error,
        measured=asdict(ranked),
    )
    if ranked.uncut:
        emit(
            "note", text=f"{label}: {ranked.uncut} What its frozen stages compute cannot be kept."
        )
    return ranked


def _order(ranked: Ranked) -> tuple[float, bool, float]:
    """Return what backbones are sorted by; weak weights are first only where clearly ahead."""
    return -merit(ranked.probe, weak=ranked.weak), ranked.weak, -ranked.balanced_knn


def measure_regime(
    settings: Settings, setup: Setup, data: Data, ranked: Sequence[Ranked], call: Call, emit: Emit
) -> Profile:
    """Say which regime the data is in, by the backbone that knows most of it.

    Where the best has weights that saw photographs, weaker ones have no say, and the other way.

    Raises:
        DataError: the images cannot be read, whatever the backbone.
    """
    usable = [each for each in ranked if each.pretrained and each.weak == ranked[0].weak]
    pixels, found = None, []
    if usable:
        best = max(usable, key=lambda each: max(each.balanced_probe, each.balanced_knn))
        sample = sample_of(data, affordable(settings.time, setup, best))
        repeats = repeats_for(sample, settings.time)
        emit("phase", name="profile", text=f"profiling {len(sample):,} images with {best.label}")
        if len(sample):
            pixels = call(tasks.measure_pixels, setup, sample, repeats)
            found = [call(tasks.measure_backbone, setup, best.label, sample, repeats)]
    labels = data.catalog.labels[data.split.fold != TEST]
    profile = judge(labels, pixels, found, weights=bool(usable), weak=ranked[0].weak)
    for reason in profile.failed.values():
        emit("note", text=f"The regime is not known: {reason}")
    emit("regime", name=profile.name, text=profile.text, similarity=profile.similarity)
    return profile


def augmentations(setup: Setup, best: Ranked, call: Call) -> tuple[str, ...]:
    """Return the augmentations that keep labels: none that mirrors or turns if that changes them.

    Mixtures are for every data set: they say which share of each label they hold.
    """
    return AUGMENTS if call(tasks.mirroring_keeps_labels, setup, best) else UPRIGHT


def narrowed(
    space: Space,
    settings: Settings,
    setup: Setup,
    ranked: Sequence[Ranked],
    imbalance: float,
    augments: tuple[str, ...],
) -> Space:
    """Narrow what is installed to what fits: scratch only where it can win, or was asked for.

    `imbalance` is by how many times the largest class is larger than the smallest.
    """
    pretrained, weak = any(each.pretrained for each in ranked), ranked[0].weak
    large = len(setup.train) >= LARGE
    strategies = {
        name: info
        for name, info in space.strategies.items()
        if settings.strategies
        or (info.pretrained and pretrained)
        or (not info.pretrained and (large or weak or not pretrained))
        or not info.trains_backbone
    }
    return replace(
        of_backbones(space, ranked),
        strategies=strategies,
        augments=augments,
        imbalanced=imbalance > doctor.IMBALANCED,
        metric=setup.metric,
        large=large,
    )


def of_backbones(space: Space, ranked: Sequence[Ranked]) -> Space:
    """Narrow what depends on the backbones to those that were measured, best first."""
    return replace(
        space,
        backbones=tuple(each.label for each in ranked),
        batch_norms=frozenset(each.label for each in ranked if each.batch_norms),
        blank=frozenset(each.label for each in ranked if not each.pretrained),
        mapless=frozenset(each.label for each in ranked if not each.map_seen),
        rigid=frozenset(each.label for each in ranked if not each.resizable),
        usual=usual_of(ranked),
    )


def hurried(space: Space, budget: Budget) -> Space:
    """Have backbones train on smaller images where the time buys only few epochs of whole ones.

    It is a default: the search may find otherwise. The budget expects it from then on.
    """
    slow = [
        label
        for label in space.backbones
        if label not in space.rigid
        and budget.whole_epochs(label) <= GOOD_EPOCHS
        and _smaller_pay(budget.ranked[label])
    ]
    budget.smaller = frozenset(slow)
    usual = {label: {**space.usual.get(label, {}), "train.train_scale": SMALLER} for label in slow}
    return replace(space, usual={**space.usual, **usual})


def _smaller_pay(ranked: Ranked) -> bool:
    """Tell whether smaller images save enough: what is frozen cannot be kept of two sizes."""
    costs = ranked.costs
    return costs is None or share_of_smaller(costs, GOOD_EPOCHS) <= SMALLER_PAY


def names(settings: Settings) -> Names:
    """Return the strategies and heads to choose among: those asked for, or all installed."""
    return Names(
        settings.strategies or _reachable("strategy"),
        settings.heads or _reachable("head"),
        bool(settings.strategies),
        bool(settings.heads),
    )


def _reachable(kind: str) -> tuple[str, ...]:
    found = plugins.installed(kind)
    return tuple(p.full_name if plugins.shadowed(p) else p.name for p in found)


def wants_network(settings: Settings, emit: Emit) -> bool:
    """Tell whether weights may be fetched: not with --offline, and not where the hub is far."""
    if settings.offline or (settings.weights and not settings.backbones):
        return not settings.offline
    if why := out_of_reach():
        emit("note", text=f"{why}; going on offline.")
    return not why


@contextmanager
def network(*, allowed: bool) -> Iterator[None]:
    """Keep every library of the workers begun in the block from the network, if not allowed."""
    names = () if allowed else ("HF_HUB_OFFLINE", "AUTOFT_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
