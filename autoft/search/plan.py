"""What a search will do and what it costs, before anything is paid but reading the images.

Backbones are timed, with their weights or, where these are not here, with random ones: nothing is
fetched and nothing is trained. What was decoded and timed is kept for the search to come.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoft import plugins
from autoft.data.splits.split import TEST
from autoft.network.sources import Source
from autoft.search import images, prepare
from autoft.search.budget import HEAD_SECONDS, LIVE_MOST, AskTreatment, Budget
from autoft.search.configs import Space, read_fixed
from autoft.search.engines import tasks, weighing
from autoft.search.engines.strategist import Strategist
from autoft.search.engines.weighing import Listed
from autoft.search.engines.worker import Worker
from autoft.search.events import Listener
from autoft.search.finals import SHARE as FINALS_SHARE
from autoft.search.finals import START_SECONDS
from autoft.search.folder import RunFolder
from autoft.search.images import Data
from autoft.search.portfolio import portfolio
from autoft.search.run import LEAST_SHARE as LEAST_SHARE_OF_TIME
from autoft.search.run import RANKING_SHARE, finish_seconds, what_there_is
from autoft.search.sampling import SHARE
from autoft.search.session import Session, a_worker
from autoft.search.settings import Settings
from autoft.search.stop import listen_for_stop
from autoft.selection.regime import judge
from autoft.space import Float, read_signature, searched
from autoft.training.job import MAX_IMAGES, Costs, Ranked, Setup
from autoft.training.plan import LEAST_SHARE, Room, Work, bytes_kept, choose, predict
from autoft.values import Part, TrialConfig

BATCH = 32
FP32 = 4  # bytes of a parameter in a file of weights
RANK = "One pass over the images for each backbone: probes decide which is best."
REGIME = f"At most {SHARE:.0%} of the time says what the images are like."
FINALS = "The best are scored again on other folds, where chance may have chosen among them."
FINISH = "Exports, their proof, and one reading of the test part."
FREEZE = "freeze"  # the strategy of autoft that freezes the first stages, by its `depth`
GOES_ON = 0.55  # of a trial is trained on the average: two of three stop at a rung


@dataclass(frozen=True)
class Candidate:
    """A backbone: whether its weights are here, the bytes to fetch, and its speed here.

    The bytes of weights that are not here are those of its parameters in fp32.
    """

    label: str
    weights: str
    download: int
    measured: Ranked


@dataclass(frozen=True)
class Phase:
    """A part of the search: about how many trials, seconds, and bytes kept; and why."""

    name: str
    trials: int
    seconds: float
    bytes: int
    why: str


@dataclass(frozen=True)
class Way:
    """How trials that freeze the first `frozen` stages come by what these give, and why.

    They have the usual recipe and `epochs`. `share` of the forward pass lies before the cut;
    `seconds` and `again` are those of a whole trial in the chosen way and computing again. Where
    nothing is kept, several may take their steps together: `seconds` are what each adds then.
    """

    frozen: int
    epochs: int
    share: float
    bytes: int
    mode: str
    views: int
    seconds: float
    again: float
    why: str


@dataclass(frozen=True)
class Plan:
    """Everything that can be said of a search before it is made."""

    there: tuple[str, ...]
    notes: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    epochs: int
    phases: tuple[Phase, ...]
    ways: tuple[Way, ...]
    room: Room


def make_plan(settings: Settings, listen: Listener) -> Plan:
    """Read the images, time the backbones and say what a search would do; trains nothing.

    Raises:
        AutoftError: what the search itself would refuse at once.
    """
    began = time.monotonic()
    notes: list[str] = []

    def heard(event: Any) -> None:
        if event.kind == "note":
            notes.append(str(event.data["text"]))
        listen(event)

    with listen_for_stop() as stop, tempfile.TemporaryDirectory() as folder:
        session = Session(settings, RunFolder(Path(folder)), heard, stop, began)
        with prepare.network(allowed=False), a_worker() as worker:
            return _plan(session, worker, notes)


def _plan(session: Session, worker: Worker, notes: Sequence[str]) -> Plan:
    settings = session.settings
    local, left_out = prepare.local_sources(settings)
    asked = prepare.asked_sources(settings, local)
    prepare.ask_to_begin(worker, settings, asked)
    data = images.read_data(settings, session.emit)
    begun = prepare.begun_by(session, worker, local)
    for reason in (*begun.described.broken, *left_out):
        session.emit("note", text=f"Left out: {reason}")
    device = begun.devices[0]
    sources = asked or prepare.default_sources(settings, local, begun.described, device)
    setup = images.setup_of(settings, session.folder.path, data, sources, device)

    def call(task: Any, *arguments: Any) -> Any:
        return session.call(worker, task, *arguments)

    candidates = _candidates(session, setup, call)
    room: Room = call(tasks.room, device)
    fixed = read_fixed(begun.described.space, settings.fix)
    space = replace(begun.described.space, fixed=fixed)
    with Strategist(session.stop, session.note) as strategist:
        ask = strategist.ask
        epochs, phases, ways = _costed(settings, setup, data, space, candidates, room, ask)
    session.stop.check()
    there = tuple(what_there_is(settings, data))
    return Plan(there, tuple(notes), candidates, epochs, phases, ways, room)


def _candidates(session: Session, setup: Setup, call: Callable[..., Any]) -> tuple[Candidate, ...]:
    """Time every backbone; one that cannot be built is left out, or an error where all are."""
    found, failed = list[Candidate](), list[Ranked]()
    session.emit("phase", name="rank", text=f"timing {len(setup.sources)} backbones")
    for label, source in setup.sources.items():
        (listed,) = call(weighing.listing, (source,), False)
        timed = replace(setup, sources={label: _as_it_is_here(source, listed)})
        measured: Ranked = call(tasks.measure_speeds, timed, label)
        if measured.error:
            failed.append(measured)
            session.emit("note", text=f"Left out: {measured.error}")
            continue
        fetched = FP32 * measured.parameters if listed.state == "missing" else 0
        found.append(Candidate(label, listed.state, fetched, measured))
    if failed and (session.settings.backbones or not found):
        raise prepare.error_of(failed[0].exit_code, failed[0].error)
    return tuple(found)


def _as_it_is_here(source: Source, listed: Listed) -> Source:
    return source if listed.state == "here" else replace(source, pretrained=False)


def _costed(
    settings: Settings,
    setup: Setup,
    data: Data,
    space: Space,
    candidates: Sequence[Candidate],
    room: Room,
    ask: AskTreatment,
) -> tuple[int, tuple[Phase, ...], tuple[Way, ...]]:
    """Return the epochs of a full trial, the phases, and how every cut is shared."""
    # Which is best is known when they are ranked: the search is planned with the first.
    ranked = [replace(each.measured, pretrained=True) for each in candidates]
    best = ranked[0]
    ranking = _ranking(settings, setup, ranked)
    finish = finish_seconds(settings, setup, data, ranked)
    regime = SHARE * settings.time
    left = max(0.0, settings.time - ranking - regime)
    trials = max(left - finish, LEAST_SHARE_OF_TIME * left)
    finish = left - trials
    budget = Budget(
        deadline=time.time() + trials,
        max_trials=settings.trials,
        ranked={each.label: each for each in ranked},
        train_images=len(setup.train),
        validation_images=len(setup.validation),
        room=room,
        ask=ask,
    )
    space = prepare.hurried(prepare.of_backbones(space, ranked), budget)
    epochs = budget.whole_epochs(best.label)
    labels = data.catalog.labels[data.split.fold != TEST]
    prior = portfolio(space, judge(labels, None, (), weights=True, weak=best.weak), ranked)
    configs = (space.default(answers, seed=0) for answers in prior)
    shared = _phases(budget, space, configs, trials, settings.trials, room, data.split.folds)
    phases = (
        Phase(
            "rank",
            0,
            ranking,
            _features(setup, ranked),
            RANK,
        ),
        Phase(
            "regime",
            0,
            regime,
            0,
            REGIME,
        ),
        *shared,
        Phase("finish", 0, finish, 0, FINISH),
    )
    few = settings.trials is not None and settings.trials < LIVE_MOST
    alone = few or settings.engine != "local" or best.precision.compiled
    return epochs, phases, _ways(budget, space, best, 1 if alone else LIVE_MOST)


def _ranking(settings: Settings, setup: Setup, ranked: Sequence[Ranked]) -> float:
    seconds = sum(1 + count / each.images_per_second for each, count in _looked_at(setup, ranked))
    return min(RANKING_SHARE * settings.time, seconds)


def _features(setup: Setup, ranked: Sequence[Ranked]) -> int:
    looked_at = _looked_at(setup, ranked)
    return sum(each.costs.bytes[-1] * count for each, count in looked_at if each.costs)


def _looked_at(setup: Setup, ranked: Sequence[Ranked]) -> list[tuple[Ranked, int]]:
    """Return on how many images each backbone is ranked; the first are taken for the best."""
    few, parts = prepare.first_look(setup), (setup.train, setup.validation)
    most = sum(min(MAX_IMAGES, len(part)) for part in parts)
    least = sum(min(few, len(part)) for part in parts) if few else most
    best = ranked[: prepare.FINALISTS]
    return [(each, most if each in best else least) for each in ranked]


def _phases(
    budget: Budget,
    space: Space,
    configs: Iterator[TrialConfig],
    seconds: float,
    most: int | None,
    room: Room,
    folds: int,
) -> Iterator[Phase]:
    """Walk through the first trials while there is time; yield the phases with what they take."""
    unstopped = list[float]()  # trials that train a backbone, if they are not stopped
    spent, counts, kept = dict.fromkeys(WHY, 0.0), dict.fromkeys(WHY, 0), dict.fromkeys(WHY, 0)
    for config in configs:
        trains = space.strategies[config.strategy.name].trains_backbone
        epochs = budget.epochs(config, trains)
        whole = budget.expected(config, epochs, trains)
        needed = whole * (GOES_ON if trains and unstopped else 1.0)  # the first goes on
        full = most is not None and sum(counts.values()) >= most
        if full or not epochs or sum(spent.values()) + needed > seconds:
            continue
        ranked = budget.ranked[config.backbone.name]
        frozen = budget.frozen(config) if trains else 0
        name = "heads" if not trains else "tails" if frozen else "full"
        spent[name] += needed
        counts[name] += 1
        unstopped += [whole] if trains else []
        if frozen and ranked.costs:
            work = budget.work(config.train, epochs)
            way = choose(ranked.costs, frozen, work, room)
            stored = bytes_kept(ranked.costs, frozen, work) if way.mode != "rerun" else 0
            kept[name] = max(kept[name], stored)
    for name, why in WHY.items():
        yield Phase(name, counts[name], spent[name], kept[name], why)
    rest = seconds - sum(spent.values())
    finals = _finals(min(FINALS_SHARE * seconds, rest), min(unstopped, default=0.0), folds)
    rest -= finals.seconds
    done = max(1, sum(counts.values()))
    more = int(rest / max(sum(spent.values()) / done, 0.1))
    more = more if most is None else min(more, most - sum(counts.values()))
    yield Phase("further", max(0, more), rest, 0, "What gains most per second by then.")
    yield finals


def _finals(most: float, trial: float, folds: int) -> Phase:
    """Return the phase in which the best are scored again: a probe, and a `trial` if that fits."""
    each = 2 * START_SECONDS + HEAD_SECONDS + trial
    rounds = min(folds - 1, int(most / each))
    return Phase("finals", 2 * rounds, rounds * each, 0, FINALS)


WHY: Mapping[str, str] = {
    "heads": "Heads alone, on features that are computed once.",
    "tails": "The first stages stay frozen; what they give is kept where that saves time.",
    "full": "Everything is trained: nothing can be shared.",
}


def _ways(budget: Budget, space: Space, best: Ranked, together: int) -> tuple[Way, ...]:
    """Return how each cut is shared, where so many trials could take their steps together."""
    names = [name for name, info in space.strategies.items() if info.trains_backbone]
    if best.costs is None or not names:
        return ()
    usual = space.default({"backbone": best.label, "strategy": names[0]}, seed=0)

    found = list[Way]()
    depths = searched(read_signature(plugins.load("strategy", FREEZE)))["depth"]
    assert isinstance(depths, Float)
    for cut in range(1, best.num_stages):
        depth = min(max(cut / best.num_stages, depths.low), depths.high)
        freezes = Part(FREEZE, {"depth": depth})
        config = replace(usual, backbone=Part(best.label), strategy=freezes)
        if budget.frozen(config) == cut:  # of many stages some are between two depths
            work = budget.work(usual.train, budget.full_epochs(config))
            found.append(_way(budget.costs(config), cut, work, budget.room, together))
    return tuple(found)


def _way(costs: Costs, cut: int, work: Work, room: Room, together: int) -> Way:
    chosen = choose(costs, cut, work, room)
    if chosen.mode == "rerun":
        work = replace(work, together=together)
        chosen = choose(costs, cut, work, room)
    found = predict(costs, cut, work, room)
    share = costs.prefix[cut] / costs.prefix[-1] if costs.prefix[-1] else 0.0
    again, needed = found["rerun"], bytes_kept(costs, cut, work)
    if chosen.mode != "rerun":
        where = f" where {work.together} trials are in step" if chosen.mode == "live" else ""
        why = f"saves {1 - found[chosen.mode] / again:.0%} of {again:.0f} s{where}"
    elif not costs.bytes[cut]:
        why = "the network cannot be divided here"
    elif work.mixed:
        why = "images are mixed: what is made of each is not kept"
    elif work.smaller:
        why = "most epochs see smaller images: of two sizes nothing is kept"
    elif set(found) <= {"rerun", "live"}:
        why = f"{needed / 1e6:,.0f} MB fit neither memory nor disk"
    elif min(found.values()) >= 0.95 * again:
        why = "keeping would save less than 5 %"
    else:
        why = f"less than {LEAST_SHARE:.0%} of the work lies before it"
    seconds = found[chosen.mode]
    return Way(cut, work.epochs, share, needed, chosen.mode, chosen.views, seconds, again, why)
