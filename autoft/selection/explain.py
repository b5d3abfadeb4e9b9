"""A profile in plain words: what was measured, where on the map the data is, what it implies."""

from __future__ import annotations

from collections.abc import Sequence

from autoft.selection.regime import (
    ADVICE,
    DEEP,
    DISSIMILAR,
    SIMILAR,
    TOO_EASY,
    Likeness,
    Profile,
)


def counted(profile: Profile) -> str:
    """Say how much there is of what."""
    return (
        f"{profile.images:,} images in {profile.classes:,} classes beside the test part; the "
        f"median class has {profile.median:,.0f}, the largest {profile.imbalance:.1f} times the "
        f"smallest. That is {profile.size}."
    )


def measured(profile: Profile) -> list[str]:
    """Say what was measured, and what the numbers mean."""
    speaking = profile.speaking
    if speaking is None:
        return [
            f"{profile.images:,} images in {profile.classes:,} classes beside the test part are "
            "too few to measure: at least two classes need two images each, of different groups "
            "and with labels not in doubt. The regime is told by size alone; add images."
        ]
    return [
        f"{profile.measured:,} images were looked at; every number is a balanced accuracy on "
        f"images held out, the mean over the folds. {speaking.backbone} knows most of them and "
        f"speaks for the data.",
        *_similar(speaking),
        *_weak(speaking),
        *_deep(speaking),
        *_untapped(speaking),
    ]


def implied(profile: Profile, first: Sequence[str]) -> list[str]:
    """Say what usually works there, what is tried first, and that nothing is excluded."""
    return [
        f"What usually works there: {ADVICE[profile.name]}. A search tries {_listed(first)} "
        "first.",
        "This is a prior: it orders the first trials, and excludes nothing. What works best is "
        "what the search measures, and it says at the end whether it agreed.",
    ]


def _similar(speaking: Likeness) -> list[str]:
    scores = speaking.scores
    controls = [
        f"the largest class alone gives {scores['majority'].mean:.3f}",
        f"pixels {scores['pixels'].mean:.3f}",
    ]
    if "random" in scores:
        controls += [f"the same network with random weights {scores['random'].mean:.3f}"]
    known = f"its pre-trained features {speaking.best:.3f}, and {_listed(controls, 'and')}."
    if speaking.similarity is None or speaking.interval is None:
        return [
            f"The task is too easy to measure likeness: {known} Where the controls leave less "
            f"than {TOO_EASY:.0%} error, any recipe will do, and the lightest is advised."
        ]
    low, high = speaking.interval
    share = (
        f"of the error that the best of these controls leaves, what the network was pre-trained "
        f"on removes {speaking.similarity:.0%}"
    )
    if speaking.similarity < 0:
        share = "the pre-trained features know less than the best of these controls"
    return [
        f"What is known of the classes: {known}",
        f"Similarity S = {speaking.similarity:.2f} (90 % interval {low:.2f} to {high:.2f}): "
        f"{share}. Similar from {SIMILAR:.2f}, dissimilar below {DISSIMILAR:.2f}.",
    ]


def _weak(speaking: Likeness) -> list[str]:
    if not speaking.weak:
        return []
    return [
        f"The weights of {speaking.backbone} saw generated images and no photograph: what they "
        f"do not know says more of them than of the data, so that no place on the map is marked. "
        f"--weights DIR gives others."
    ]


def _deep(speaking: Likeness) -> list[str]:
    more = "earlier stages know much that the last does not" if speaking.depth_gain > DEEP else ""
    less = "the earlier stages add little to the last features"
    return [
        f"Depth gain D = {speaking.depth_gain:.2f}: the features of all stages together give "
        f"{speaking.scores['stages'].mean:.3f}; {more or less}."
    ]


def _untapped(speaking: Likeness) -> list[str]:
    if not speaking.untapped:
        return []
    stages = _listed([str(stage) for stage in speaking.untapped], "and")
    return [f"Left out of that: stage {stages}, whose output cannot be seen."]


def _listed(words: Sequence[str], join: str = "or") -> str:
    return f" {join} ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""
