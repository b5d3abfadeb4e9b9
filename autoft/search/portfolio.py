"""The first trials, by regime: well-tried configurations before anything is sampled.

The linear probe is always first, so that there is a model and a baseline within the first minute.
Weights that saw generated images alone have recipes of their own, whatever the data: everything
trained at the rate of training from scratch. So they were measured in docs/results/embedded.md.
Answers not given here are at the defaults of the plugins. The order is a prior and excludes
nothing; docs/architecture.md says where it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from autoft.search.configs import Space
from autoft.selection.regime import NEAR, Profile, merit
from autoft.training.job import Ranked
from autoft.values import Value

Answers = dict[str, Value]

PROBE: Answers = {"strategy": "head_only"}
HEADS: tuple[Answers, ...] = (
    {"strategy": "head_only", "head": "norm_linear"},
    {"strategy": "head_only", "head": "multilayer"},
    {"strategy": "head_only", "head": "cosine"},
    {"strategy": "head_only", "head": "mlp"},
)
USUAL_HEAD: Answers = {"head": "linear"}
FULL: Answers = {"strategy": "full", "strategy.full.bottom": 0.1, "train.lr": 3e-4}
LIGHT: Answers = {"strategy": "full", "strategy.full.bottom": 0.03, "train.lr": 1e-4}
HIGH: Answers = {"strategy": "full", "strategy.full.bottom": 1.0, "train.lr": 5e-4}
HALF: Answers = {"strategy": "freeze", "strategy.freeze.depth": 0.5, "train.lr": 3e-4}
WHOLE: Answers = {"train.train_scale": 1.0}  # so that what is frozen can be kept
DEEP: Answers = {
    "strategy": "freeze",
    "strategy.freeze.depth": 0.75,
    "train.lr": 1e-4,
    **WHOLE,
}
LAST: Answers = {
    "strategy": "freeze",
    "strategy.freeze.depth": 0.9,
    "train.lr": 3e-4,
    **WHOLE,
}
SHALLOW: Answers = {"strategy": "freeze", "strategy.freeze.depth": 0.25, "train.lr": 3e-4}
NORMS: Answers = {"strategy": "norm_bias", "train.lr": 1e-3}
CLOSE: Answers = LIGHT | {"train.l2sp": 1e-2}
LEARNING: Answers = HIGH | {"train.norm_mode": "train"}
MEASURED: Answers = {"strategy": "rgn", "train.lr": 5e-4}
EARLY: Answers = {"strategy": "surgical", "strategy.surgical.where": 0.0}
ADAPTED: Answers = {"strategy": "lora", "train.lr": 1e-3}
LATER: Answers = {"strategy": "probe_then_tune"}
GRADUAL: Answers = {"strategy": "gradual"}
FIRST = 2  # recipes that count as what a regime advises
SCRATCH_LR = 2e-3
SCRATCH: Answers = {"strategy": "scratch", "train.lr": SCRATCH_LR, "train.augment": "crop"}

WEAK_LR, WEAK_HIGH_LR, WEAK_LOW_LR = SCRATCH_LR, 3e-3, 1e-3
USUAL_WEAK: Answers = {"train.lr": WEAK_LR, "train.norm_mode": "train"}
EVENLY: Answers = {"strategy": "full", "strategy.full.bottom": 1.0}
FASTER: Answers = EVENLY | {"train.lr": WEAK_HIGH_LR}
SLOWER: Answers = EVENLY | {"train.lr": WEAK_LOW_LR}
ALL_STAGES: Answers = EVENLY | {"head": "multilayer"}
FIXED_STEM: Answers = {
    "strategy": "freeze",
    "strategy.freeze.depth": 0.25,
    "strategy.freeze.bottom": 1.0,
}

RECIPES: Mapping[str, tuple[Answers, ...]] = {
    "small-similar": (
        DEEP,
        CLOSE,
        HALF,
        LAST,
        NORMS,
        FULL,
        ADAPTED,
        GRADUAL,
        LATER,
        MEASURED,
        EARLY,
    ),
    "small-dissimilar": (
        HALF,
        SHALLOW,
        HIGH,
        DEEP,
        LAST,
        MEASURED,
        LEARNING,
        NORMS,
        FULL,
        EARLY,
        GRADUAL,
        LATER,
        ADAPTED,
    ),
    "large-similar": (
        FULL,
        HALF,
        DEEP,
        LAST,
        HIGH,
        LATER,
        GRADUAL,
        NORMS,
        MEASURED,
        ADAPTED,
        EARLY,
    ),
    "large-dissimilar": (LEARNING, FULL, SHALLOW, SCRATCH, GRADUAL, MEASURED, EARLY, NORMS, LATER),
    "ambiguous": (HALF, FULL, DEEP, LAST, HIGH, NORMS, MEASURED, GRADUAL, ADAPTED, LATER, EARLY),
    "weak-weights": (EVENLY, SCRATCH, FASTER, SLOWER, ALL_STAGES, FIXED_STEM, GRADUAL),
    "no-weights": (SCRATCH,),
}


def portfolio(space: Space, regime: Profile, ranked: Sequence[Ranked]) -> Iterator[Answers]:
    """Yield the first configurations, best backbone first; those the space lacks are left out.

    Probes, then all heads on the best backbone, which take seconds together; then what trains a
    backbone: the regime's first recipe, strategies of third parties, the second backbone, the
    other recipes, and every strategy that has had no turn, but for training from scratch.
    """
    best, recipes = ranked[0].label, RECIPES[regime.name]
    # Of those that only a few images were looked at of, features would have to be made first.
    known = [each for each in ranked[:3] if each.images >= ranked[0].images]
    wanted: list[Answers] = [{**PROBE, "backbone": each.label} for each in known]
    heads = (*HEADS, *({**PROBE, "head": name} for name in sorted(space.third_party_heads)))
    theirs: list[Answers] = [
        {"strategy": n} for n, info in space.strategies.items() if not info.builtin
    ]
    wanted += [{**answers, "backbone": best} for answers in (*heads, recipes[0], *theirs)]
    close = _close(ranked)
    wanted += [{**_suited(each, regime.name), "backbone": each.label} for each in close]
    wanted += [{**answers, "backbone": best} for answers in recipes[1:]]
    had = {answers["strategy"] for answers in wanted}
    wanted += [
        {"strategy": name, "backbone": best}
        for name, info in space.strategies.items()
        if name not in had and info.pretrained
    ]
    for answers in wanted:
        given = answers if "head" in answers else answers | _usual_head(space)
        if given["strategy"] in space.strategies and given.get("head", "") in {*space.heads, ""}:
            yield given


def usual_of(ranked: Sequence[Ranked]) -> dict[str, Answers]:
    """Return by backbone what is usual for it where a configuration does not say."""
    return {each.label: USUAL_WEAK for each in ranked if each.weak}


def first_strategies(regime: str) -> tuple[str, ...]:
    """Return the strategies that a regime puts first: of the first two of its recipes.

    Where training the head alone is part of its advice, that of the linear probe is another.
    """
    probe = (PROBE,) if regime == "small-similar" else ()
    named = (str(answers["strategy"]) for answers in (*probe, *RECIPES[regime][:FIRST]))
    return tuple(dict.fromkeys(named))


def _usual_head(space: Space) -> Answers:
    return USUAL_HEAD if USUAL_HEAD["head"] in space.heads else {}


def _suited(ranked: Ranked, regime: str) -> Answers:
    """Return the first recipe of the `regime`, or what suits the weights where they are others.

    Where weak weights spoke for the data, nothing is known of it to those that are not weak.
    """
    if ranked.weak:
        return RECIPES["weak-weights"][0]
    return RECIPES["ambiguous" if regime == "weak-weights" else regime][0]


def _close(ranked: Sequence[Ranked]) -> Sequence[Ranked]:
    """Return the second backbone if it is within two points of the first.

    One that weak weights displaced has four: less is no clear lead of theirs.
    """
    best = ranked[0]
    return [
        each
        for each in ranked[1:2]
        if each.probe >= merit(best.probe, weak=best.weak and not each.weak) - NEAR
    ]
