"""What each family of the generator and each image is worth, at small scale.

    python benchmarks/pretrain/ablate.py --data DIR --out DIR
    python benchmarks/pretrain/ablate.py --out DIR --page docs/results/embedded.md

Every variant is trained with the same number of views of 32 pixels, but for those that are about
this number, and judged on the data sets in --data by the quick mode of
benchmarks/quality/embedded.py, with two seeds. What --out holds already is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what all benchmarks share

from page import write_between

HERE: Final = Path(__file__).resolve().parent
VIEWS = 120_000
SEEDS = (0, 1)
VARIANTS: Final[dict[str, tuple[str, ...]]] = {
    "all families": (),
    "no objects": ("--objects", "nothing"),
    "contours alone": ("--objects", "contours"),
    "fractals alone": ("--objects", "fractals"),
    "1/f noise behind": ("--grounds", "noise"),
    "1,000 images": ("--distinct", "1000"),
    "a quarter of the views": ("--views", str(VIEWS // 4)),
    "with contrast": ("--contrast", "0.5"),
}
SCRATCH = "random weights"
KINDS: Final = {"last": "probe, last stage", "stages": "probe, all stages", "tuned": "fine-tuned"}


def main() -> None:
    """Train and judge what is missing, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder that holds the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of weights and results")
    parser.add_argument("--page", type=Path, help="write the table into this page")
    options = parser.parse_args()
    if options.page:
        write_between(options.page, "ablation", table(options.out))
        return
    if not options.data:
        parser.error("--data DIR is needed, or --page to write the table of what was measured")
    for name, words in VARIANTS.items():
        weights = trained(options.out, name, words)
        for seed in SEEDS:
            judged(options, name, seed, ("--mini", str(weights), "--label", name))
    for seed in SEEDS:
        judged(options, SCRATCH, seed, ("--arm", "scratch"))


def trained(out: Path, name: str, words: tuple[str, ...]) -> Path:
    """Return the weights of a variant, trained if they are not there."""
    folder = out / _slug(name)
    file = folder / "autoft_mini.safetensors"
    if not file.exists():
        usual = (
            "--views",
            str(VIEWS),
            "--sizes",
            "32:1",
            "--threads",
            "1",
            "--pool",
            "4096",
            "--bf16",
        )
        _run(HERE / "train.py", "--out", str(folder), *usual, *words)
    return file


def judged(options: argparse.Namespace, name: str, seed: int, words: tuple[str, ...]) -> None:
    """Judge weights with one seed, if that was not done."""
    file = options.out / f"{_slug(name)}-{seed}.json"
    if file.exists():
        return
    judge = HERE.parent / "quality" / "embedded.py"
    told = _run(judge, "--data", str(options.data), "--quick", "--seed", str(seed), *words)
    file.write_text(told.strip().splitlines()[-1] + "\n", encoding="utf-8")


def table(out: Path) -> str:
    """Return the table: of each kind the mean over the data sets and seeds, in percent."""
    lines = [f"| variant | {' | '.join(KINDS.values())} |", f"|---|{'---|' * len(KINDS)}"]
    for name in (SCRATCH, *VARIANTS):
        files = [out / f"{_slug(name)}-{seed}.json" for seed in SEEDS]
        told: list[dict[str, Any]] = [json.loads(f.read_text("utf-8")) for f in files]
        cells = []
        for kind in KINDS:
            values = [100 * each["mean"][kind] for each in told]
            half = (max(values) - min(values)) / 2
            cells.append(f"{sum(values) / len(values):.1f} ± {half:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _slug(name: str) -> str:
    return "-".join(name.replace("/", " ").replace(",", "").split())


def _run(script: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *words], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
