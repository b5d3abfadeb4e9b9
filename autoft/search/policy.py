"""What is tried next, and why: phases by what they are expected to gain in a second.

Pure arithmetic on the results so far. A trial belongs to one of three phases: "heads" train on
frozen features, "tails" keep a frozen prefix, "full" trials keep none.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

from autoft.search.configs import Space
from autoft.selection.winner import usable
from autoft.training.job import TrialJob
from autoft.values import TrialConfig, TrialResult, Value

Phase = Literal["heads", "tails", "full"]
PHASES: tuple[Phase, ...] = ("heads", "tails", "full")

KEPT = 3  # trials whose weights stay on the disk, beside the baseline
WINDOW = 20  # the latest trials of a phase, by which it is judged
PRIOR = 2  # imagined trials as good as the best so far: a phase with few is thought well of
ROOM = 0.2  # of the errors that are left: by how much scores are imagined to differ
LEAST_ROOM = 0.002
PATIENCE = 8  # trials without a gain after which a phase is expected to give a quarter
EXHAUSTED = 200  # trials without a gain after which a phase is left
RECENT = 5  # trials from which the seconds of the next are told

PACK_SECONDS = 5.0  # that a pack of heads may take
PACK_LEAST, PACK_MOST = 4, 32  # heads
PACK_MODELLED = 4  # of them are proposed by the model, which takes long; the others at random
TOGETHER = 4  # times as fast as by itself is a head in a pack, before that was seen
GIVEN_ALIKE = ("augment", "mix", "batch_size", "pool", "train_scale")
HEAD_START = ("head_lr", "weight_decay", "smoothing")


@dataclass(frozen=True)
class Share:
    """What a phase took and gave: its trials, their seconds, and by how much it raised the best.

    The first score of all is a start and no gain.
    """

    trials: int = 0
    seconds: float = 0.0
    gained: float = 0.0


def phase_of(strategy: str, space: Space) -> Phase:
    """Return the phase of trials with `strategy`; of one no longer installed the usual is said."""
    known = space.strategies.get(strategy)
    if known is None:
        return "full"
    if not known.trains_backbone:
        return "heads"
    return "tails" if known.keeps_prefix else "full"


def of_phase(results: Iterable[TrialResult], phase: Phase, space: Space) -> list[TrialResult]:
    """Return the results of a phase."""
    return [each for each in results if phase_of(each.config.strategy.name, space) == phase]


def shares(results: Sequence[TrialResult], space: Space) -> dict[Phase, Share]:
    """Return what each phase took and gave, from results in the order in which they ended."""
    found = {phase: Share() for phase in PHASES}
    best: float | None = None
    for result in results:
        phase = phase_of(result.config.strategy.name, space)
        gain = 0.0
        if result.status != "failed" and result.score is not None:
            gain = 0.0 if best is None else max(0.0, result.score - best)
            best = result.score if best is None else max(best, result.score)
        old = found[phase]
        found[phase] = Share(old.trials + 1, old.seconds + result.seconds, old.gained + gain)
    return found


def shares_json(
    results: Sequence[TrialResult], space: Space, again: Sequence[TrialResult]
) -> dict[str, Any]:
    """Return what each phase took and gave as `result.json` holds it.

    The last are the finals, in which trials were scored `again`.
    """
    finals = Share(len(again), sum(each.seconds for each in again))
    found = [*shares(results, space).items(), ("finals", finals)]
    return {
        phase: asdict(Share(share.trials, round(share.seconds, 1), round(share.gained, 4)))
        for phase, share in found
    }


def order(
    results: Sequence[TrialResult],
    space: Space,
    expected_seconds: Callable[[Phase], float],
) -> list[Phase]:
    """Return the phases to choose from, the one first that promises most in a second.

    Phases without strategies, and those that gave nothing for long, are left out.
    `expected_seconds` is asked for a phase that has no trial yet.
    """
    rated: list[tuple[float, int, Phase]] = []
    for place, phase in enumerate(PHASES):
        if not strategies_of(phase, space):
            continue
        own = of_phase(results, phase, space)
        if trials_since_gain(results, own) >= EXHAUSTED:
            continue
        took = seconds_of_next(own) if own else expected_seconds(phase)
        rated.append((-expected_gain(results, own) / max(took, 1e-3), place, phase))
    return [phase for _, _, phase in sorted(rated)]


def expected_gain(results: Sequence[TrialResult], own: Sequence[TrialResult]) -> float:
    """Return by how much the next trial of a phase is expected to raise the best score.

    `own` are the phase's. The expected improvement under a normal distribution that is fitted to
    the latest of them and to a few imagined ones, as good as the best. Trials that gained nothing
    tell against the next more than the distribution knows: the chance that the next of n sets a
    record falls as 1/n, and so does by how much; hence the square of 1 / (1 + n / PATIENCE).
    """
    best = max((r.score for r in usable(results) if r.score is not None), default=0.0)
    scores = [r.score for r in own if r.status == "done" and r.score is not None][-WINDOW:]
    room = max(ROOM * (1 - best), LEAST_ROOM)
    count = len(scores) + PRIOR
    mean = (sum(scores) + PRIOR * best) / count
    spread = sum((score - mean) ** 2 for score in scores)
    spread += PRIOR * ((best - mean) ** 2 + room**2)
    deviation = math.sqrt(spread / count)
    unit, z = NormalDist(), (mean - best) / deviation
    improvement = deviation * (z * unit.cdf(z) + unit.pdf(z))
    return float(improvement / (1 + trials_since_gain(results, own) / PATIENCE) ** 2)


def trials_since_gain(results: Sequence[TrialResult], own: Sequence[TrialResult]) -> int:
    """Return how many trials of a phase ended since one of them was the best of all so far."""
    numbers, since = {result.number for result in own}, 0
    best = -math.inf
    for result in results:
        gains = result.status != "failed" and (result.score or 0.0) > best
        if gains:
            best = result.score or 0.0
        if result.number in numbers:
            since = 0 if gains else since + 1
    return since


def seconds_of_next(own: Sequence[TrialResult]) -> float:
    """Return what the next trial of a phase will take, as the latest did that had a score."""
    recent = [result.seconds for result in own if result.scores][-RECENT:]
    recent = recent or [result.seconds for result in own[-RECENT:]]
    return sum(recent) / len(recent)


def strategies_of(phase: Phase, space: Space) -> list[str]:
    """Return the strategies of a phase."""
    return [name for name in space.strategies if phase_of(name, space) == phase]


def draw(names: Sequence[str], scores: Mapping[str, float], seed: int) -> str:
    """Return one of `names`: the best by its score with 1/2, the next with 1/4, and so on.

    Those without a score come first: they were never tried.
    """
    ranked = sorted(names, key=lambda name: -scores.get(name, math.inf))
    weights = [2.0**-place for place in range(len(ranked))]
    return random.Random(seed).choices(ranked, weights)[0]


def best_by(
    results: Iterable[TrialResult], name_of: Callable[[TrialConfig], str]
) -> dict[str, float]:
    """Return the best score of each name that `name_of` gives; failed trials count as 0."""
    found: dict[str, float] = {}
    for result in results:
        name, score = name_of(result.config), result.score or 0.0
        found[name] = max(found.get(name, 0.0), score if result.status != "failed" else 0.0)
    return found


def in_common(config: TrialConfig) -> dict[str, Value]:
    """Return the answers that trials give alike which take their steps together with `config`.

    By these they freeze the same stages, see the same batches and pool a map behind the cut.
    """
    owned = f"strategy.{config.strategy.name}."
    named = {"backbone", "strategy", "head", *(f"train.{name}" for name in GIVEN_ALIKE)}
    return {
        name: value
        for name, value in config.answers().items()
        if name in named or name.startswith(owned)
    }


def pack_size(own: Sequence[TrialResult], left: float) -> int:
    """Return how many heads are trained together next: as many as take a few seconds.

    `own` are the head trials so far, `left` the seconds until the last must have ended.
    """
    if not own:
        return 1
    took = max(seconds_of_next(own), 1e-3)
    took /= TOGETHER if len(own) <= TOGETHER else 1
    affordable = int(max(0.0, left) / (2 * took))
    return max(1, min(max(PACK_LEAST, int(PACK_SECONDS / took)), PACK_MOST, affordable))


def head_start(results: Sequence[TrialResult], space: Space, job: TrialJob) -> dict[str, Value]:
    """Return the answers of the best head so far on the job's backbone, for its own to begin with.

    A head of the same kind is preferred. Empty where there is none, or it trains a head alone.
    """
    if phase_of(job.config.strategy.name, space) == "heads":
        return {}
    heads = [
        result
        for result in usable(results)
        if result.config.backbone.name == job.config.backbone.name
        and phase_of(result.config.strategy.name, space) == "heads"
    ]
    same = [each for each in heads if each.config.head.name == job.config.head.name]
    for best in (same or heads)[:1]:
        how = best.config.train
        return {name: how[name] for name in HEAD_START if name in how}
    return {}
