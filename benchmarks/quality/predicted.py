"""What `autoft plan` says of a search, and what its phases and its trials took.

    python benchmarks/quality/predicted.py --runs DIR --data DIR --weights DIR --page FILE

`--runs` holds run folders that `search_quality.py --runs` kept. For each the plan of the same
search is made, and told beside what each phase of the search took. Those searches began with an
empty cache: they timed their backbones, which a plan has done for the search after it. Every trial
that trained its backbone is told beside what was expected of it by then: by the costs measured
before the search and by what earlier trials taught. Trials that the end of the time cut off
within an epoch are left out, as nobody knows what they would have taken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what all benchmarks share

from lines import Row, rows_of
from page import write_between

HEADS = "head_only"
TRIALS = "trials"  # heads, tails, full ones and further ones
WITHIN = 0.25  # of what it took


@dataclass(frozen=True)
class Trial:
    """A trial that trained its backbone: what it was, expected to take and took, in seconds."""

    what: str
    epochs: int
    expected: float
    took: float

    @property
    def off(self) -> float:
        """Return by which share of what it took the expectation was too high."""
        return self.expected / self.took - 1


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the data sets")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--page", type=Path, required=True, help="page to write into")
    asked = parser.parse_args()
    parts, every = list[str](), list[Trial]()
    for run in sorted(each for each in asked.runs.iterdir() if (each / "result.json").exists()):
        known = json.loads((run / "run.json").read_text("utf-8"))
        dataset = Path(known["settings"]["dataset"]).name
        trials = list(trials_of(run))
        every += trials
        words = ["--dataset", str(asked.data / dataset), "--weights", str(asked.weights)]
        plan, text = planned(words, asked)
        phases = phases_table(plan["phases"], phases_of(run))
        parts.append(f"## {dataset}\n\n```text\n{text}\n```\n\n{phases}\n\n{table(trials)}")
    write_between(asked.page, "plans", "\n\n".join([summary(every), *parts]))


def planned(words: Sequence[str], asked: argparse.Namespace) -> tuple[Row, str]:
    """Return what `autoft plan` says of ten minutes, as data and as a user reads it."""
    command = [sys.executable, "-m", "autoft", "plan", *words, "--time", "10m", "--offline"]
    command += ["--metric", "accuracy"]
    said = [
        subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout
        for more in ([], ["--json"])  # the second finds the speeds that the first measured
    ]
    text = said[0].strip().replace(f"{asked.data}/", "").replace(str(asked.weights), "weights")
    plan: Row = json.loads(said[1])
    return plan, text


def phases_of(run: Path) -> dict[str, float]:
    """Return the seconds that each phase took in a run; all trials but those of finals are one."""
    began, ends = dict[str, float](), 0.0
    for event in rows_of(run / "events.jsonl"):
        ends = event["at"]
        if event["kind"] == "phase":
            began.setdefault(event["name"], ends)
    finals = began.get("finals", began["finish"])
    return {
        "rank": began["profile"] - began["rank"],
        "regime": began["search"] - began["profile"],
        TRIALS: finals - began["search"],
        "finals": began["finish"] - finals,
        "finish": ends - began["finish"],
    }


def phases_table(plan: Sequence[Row], took: Mapping[str, float]) -> str:
    """Return a Markdown table of what was planned for each phase and what it took."""
    planned = dict.fromkeys(took, 0.0)
    for each in plan:
        planned[each["name"] if each["name"] in took else TRIALS] += each["seconds"]
    rows = [f"| {name} | {planned[name]:.0f} | {took[name]:.0f} |" for name in took]
    return "\n".join(["| Phase | Planned, s | Took, s |", "|---|---|---|", *rows])


def trials_of(run: Path) -> Iterator[Trial]:
    """Yield the trials of a run that trained their backbones and ended with an epoch."""
    known = {each["number"]: each for each in rows_of(run / "trials.jsonl")}
    for event in rows_of(run / "events.jsonl"):
        if event["kind"] != "trial_end" or event["score"] is None:
            continue
        trial = known[event["number"]]
        config, again = trial["config"], trial.get("of") is not None  # scored on another fold
        strategy = config["strategy"]
        reports = rows_of(run / "trials" / f"{event['number']:04d}" / "metrics.jsonl")
        if strategy["name"] == HEADS or again or _cut_off(reports, event["seconds"]):
            continue
        depth = strategy["params"].get("depth")
        what = f"{config['backbone']['name']}, {strategy['name']}"
        what += f" {depth:g}" if isinstance(depth, int | float) else ""
        yield Trial(what, len(reports), event["expected"], event["seconds"])


def _cut_off(reports: Sequence[Row], seconds: float) -> bool:
    """Tell whether a trial went on for more than half an epoch after its last."""
    ends = [0.0, *(each["seconds"] for each in reports)]
    usual = median(after - before for before, after in pairwise(ends))
    return seconds - ends[-1] > usual / 2


def summary(trials: Sequence[Trial]) -> str:
    """Return how many were expected well."""
    within = sum(abs(each.off) <= WITHIN for each in trials)
    expected, took = (sum(getattr(t, name) for t in trials) for name in ("expected", "took"))
    return (
        f"Of {len(trials)} trials {within} were expected within {WITHIN:.0%} of what they took. "
        f"All together were expected to take {expected:.0f} s and took {took:.0f} s "
        f"({expected / took - 1:+.0%})."
    )


def table(trials: Sequence[Trial]) -> str:
    """Return a Markdown table, a row a trial."""
    head = ["| Trial | Epochs | Expected, s | Took, s | |", "|---|---|---|---|---|"]
    rows = [
        f"| {t.what} | {t.epochs} | {t.expected:.0f} | {t.took:.0f} | {t.off:+.0%} |"
        for t in trials
    ]
    return "\n".join(head + rows)


if __name__ == "__main__":
    main()
