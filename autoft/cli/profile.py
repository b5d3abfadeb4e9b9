"""`autoft data profile`: which regime a dataset is in, and which labels look wrong."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoft.cli.flags import READING, SEARCH, SEED, SPLITTING, takes
from autoft.cli.reading import keep_dataset, settings_of
from autoft.cli.text import clean, columns

if TYPE_CHECKING:
    from autoft.search.profile import Profiled, Suspect
    from autoft.selection.regime import Likeness, Profile, Spread

EPILOG = """\
Examples:

  autoft data profile ./flowers
  autoft data profile ./flowers --weights ./weights --json
  autoft data profile labels.csv --suspects doubtful.csv

Nothing is trained but small classifiers on frozen features, and the test part
is not looked at. The second time, what was measured is known at once."""

SHOWN = 10  # doubted labels
ASKED = ("weights", "backbones", "allow_license", "device", "offline")
SOURCES = tuple(flag for flag in SEARCH if flag.name in ASKED)
NAMES = {
    "majority": "largest class",
    "pixels": "pixels",
    "random": "random weights",
    "knn": "k-NN",
    "final": "probe",
    "stages": "all stages",
}


@takes((*SOURCES, SEED, *SPLITTING, *READING))
def profile(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The dataset, as for --dataset.")],
    images: Annotated[
        int, typer.Option("--images", metavar="N", min=20, help="Look at about N images.")
    ] = 5000,
    suspects: Annotated[
        Path | None,
        typer.Option("--suspects", metavar="FILE", help="Write the doubted labels as CSV."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")] = False,
    **flags: Any,
) -> None:
    """Measure size and likeness to what weights were trained on, and doubt labels."""
    from autoft.cli.live import LiveView
    from autoft.search.profile import run_profile

    settings = settings_of(path, flags)
    keep_dataset(path, suspects)
    with LiveView(None) as view:
        found = run_profile(settings, view, images)
    if suspects:
        from autoft.report.tables import write_suspects

        rows = [
            (each.path, each.label, each.predicted, each.confidence) for each in found.suspects
        ]
        write_suspects(suspects, rows)
        typer.echo(f"{len(rows):,} doubted labels written to {clean(suspects)}.", err=True)
    if as_json:
        typer.echo(json.dumps(_plain(found), indent=2))
        return
    for line in lines(found):
        typer.echo(clean(line))


def lines(found: Profiled) -> list[str]:
    """Return what is shown of a profile."""
    from autoft.selection import explain
    from autoft.selection.regime import regime_map

    known = found.profile
    scores = columns(_scores(known))
    return [
        explain.counted(known),
        *(["", *scores] if scores else []),
        "",
        *explain.measured(known),
        "",
        *columns(regime_map(known)),
        "",
        *explain.implied(known, found.first),
        *_suspects(found),
    ]


def _scores(known: Profile) -> list[list[str]]:
    """Return a row for each backbone; nothing where none was measured."""
    if not known.backbones:
        return []
    heads = ["backbone", "trained on", "S", "90 % interval", "D", *NAMES.values(), "seconds"]
    return [heads, *(_row(each) for each in known.backbones)]


def _row(each: Likeness) -> list[str]:
    s = "-" if each.similarity is None else f"{each.similarity:.2f}"
    interval = (
        "-" if each.interval is None else f"{each.interval[0]:.2f} to {each.interval[1]:.2f}"
    )
    scores = [_spread(each.scores.get(name)) for name in NAMES]
    names = [clean(each.backbone), clean(each.source) or "-"]
    return [*names, s, interval, f"{each.depth_gain:.2f}", *scores, f"{each.seconds:.0f}"]


def _spread(score: Spread | None) -> str:
    return "-" if score is None else f"{score.mean:.3f} ± {score.sd:.3f}"


def _suspects(found: Profiled) -> list[str]:
    doubted, seen = found.suspects, len(found.ranking)
    if not doubted:
        return []
    heads = ["confidence", "label", "looks like", "path"]
    rows = [_suspect(each) for each in doubted[:SHOWN]]
    more = "--suspects FILE writes them all" if len(doubted) > SHOWN else "--json lists them"
    by = NAMES.get(found.judge, found.judge)
    return [
        "",
        f"Of {seen:,} labels {len(doubted):,} look like another class to the best classifier "
        f"({by}), the most doubted first; it errs too, so look before you change one ({more}).",
        *columns([heads, *rows]),
    ]


def _suspect(each: Suspect) -> list[str]:
    names = map(clean, (each.label, each.predicted, each.path))
    return [f"{each.confidence:.3f}", *names]


def _plain(found: Profiled) -> dict[str, Any]:
    return {
        **found.profile.to_json(),
        "first": list(found.first),
        "judge": found.judge,
        "suspects": [asdict(each) for each in found.suspects],
    }
