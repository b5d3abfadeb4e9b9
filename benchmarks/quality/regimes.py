"""Was the regime right? Profile data sets, search each with every backbone alone, compare.

    python benchmarks/quality/regimes.py --weights WEIGHTS --out DIR flowers=160s digits=130s

Each argument is a data set (a path) and the time of its searches. What DIR holds already is not
done again, so that an interrupted comparison goes on. The Markdown table goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HEADS = (
    "data set", "backbone", "S (90 %)", "D", "regime", "first strategies", "best strategy found",
    "validation", "test", "probe", "agreed",
)  # fmt: skip


def autoft(*words: object) -> str:
    """Run a command and return what it printed."""
    command = [sys.executable, "-m", "autoft", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def profiled(dataset: Path, weights: Path, out: Path) -> dict[str, Any]:
    """Return the profile of a data set with every backbone of `weights`."""
    file = out / f"profile-{dataset.name}.json"
    if not file.exists():
        words = ("data", "profile", dataset, "--weights", weights, "--offline", "--json")
        file.write_text(autoft(*words), encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def searched(dataset: Path, weights: Path, out: Path, backbone: str, time: str) -> dict[str, Any]:
    """Return the result of a search with one backbone."""
    run = out / "runs" / f"{dataset.name}-{backbone}"
    if not (run / "result.json").exists():
        words = ("search", "--dataset", dataset, "--weights", weights, "--backbones", backbone)
        more = ("--offline", "--image-size", 128, "--time", time, "--export", "onnx", "--out", run)
        autoft(*words, *more)
    found: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return found


def row(name: str, profile: dict[str, Any], result: dict[str, Any]) -> str:
    """Return one line of the table: the profile of a backbone beside what its search found."""
    regime, winner = result["regime"], result["winner"]
    own = next(b for b in profile["backbones"] if b["backbone"] == winner["backbone"])
    low, high = own["interval"]
    test, probe = result["test"], result["baseline"]["test"]
    cells = (
        name,
        winner["backbone"],
        f"{own['similarity']:.2f} ({low:.2f} to {high:.2f})",
        f"{own['depth_gain']:.2f}",
        regime["name"],
        ", ".join(regime["first"]),
        f"{winner['strategy']} ({sum(result['trials'].values())} trials)",
        f"{result['score']:.3f}",
        f"{test['value']:.3f} [{test['low']:.3f}, {test['high']:.3f}]",
        f"{probe['value']:.3f}",
        "yes" if regime["agreed"] else "no",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("datasets", nargs="+", metavar="PATH=TIME")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbones", type=lambda text: text.split(","), help="only these")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    table = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    for argument in given.datasets:
        path, _, time = argument.rpartition("=")
        profile = profiled(Path(path), given.weights, given.out)
        for name in given.backbones or [each["backbone"] for each in profile["backbones"]]:
            found = searched(Path(path), given.weights, given.out, name, time)
            table.append(row(Path(path).name, profile, found))
    sys.stdout.write("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
