"""Scan a manifest of a million rows: seconds, peak memory, and how often progress was told.

The rows name different paths, which are hard links to a few images, since a million photographs
have no place here: what is measured is the price of a row, not of decoding. The table goes to
stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = 100
CLASSES = 10
A_FOLDER = 10_000  # links in one folder
SCRIPT = """
import pathlib, re, sys
from autoft.cli.main import main
code = main(sys.argv[1:])
status = pathlib.Path("/proc/self/status").read_text()
print(re.search(r"VmHWM:\\s+(\\d+)", status)[1], file=sys.stderr)
sys.exit(code)
"""


def make(root: Path, rows: int) -> Path:
    """Write `IMAGES` images, links to them, and the manifest that names the links."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    with (root / "labels.csv").open("w", encoding="utf-8") as manifest:
        manifest.write("path,label\n")
        for row in range(rows):
            folder = f"{row // A_FOLDER:04d}"
            if row % A_FOLDER == 0:
                (root / folder).mkdir()
            number = row % IMAGES
            os.link(root / f"{number}.png", root / folder / f"{row}.png")
            manifest.write(f"{folder}/{row}.png,{number % CLASSES}\n")
    return root / "labels.csv"


def scan(manifest: Path, cache: Path) -> tuple[float, int, int, dict[str, object]]:
    """Return seconds, peak bytes, lines of progress and the report of one `autoft data scan`."""
    words = ["data", "scan", str(manifest), "--json"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "AUTOFT_CACHE": str(cache)},
    )
    seconds = time.perf_counter() - began
    *told, peak = done.stderr.splitlines()
    lines = sum(bool(re.match(r"\[.*\] (listing|decoding)", line)) for line in told)
    return seconds, int(peak) * 1024, lines, json.loads(done.stdout)


def main() -> None:
    """Measure a first scan and a second one, which finds everything in the cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    table = [
        "| rows | scan | seconds | peak MB | progress lines | usable |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "data").mkdir()
        manifest = make(root / "data", rows)
        for which in ("first", "second"):
            seconds, peak, lines, report = scan(manifest, root / "cache")
            cells = (f"{rows:,}", which, f"{seconds:.1f}", f"{peak / 1e6:.0f}", lines)
            table.append("| " + " | ".join(map(str, cells)) + f" | {report['usable']:,} |")
    sys.stdout.write("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
