"""Measure how long the light commands take to start, beside an empty Python.

The commands are run in turns, so that a slow moment of the machine meets all of them alike. The
table goes to stdout: medians, fastest and slowest of the runs, in seconds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 7
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "autoft --version": ["-m", "autoft", "--version"],
    "autoft --help": ["-m", "autoft", "--help"],
    "autoft plugins list": ["-m", "autoft", "plugins", "list"],
}


def measure() -> dict[str, list[float]]:
    """Return the seconds of every run by command; the first, which fills caches, is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS + 1):
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in seconds.items()}


def table(seconds: dict[str, list[float]]) -> str:
    """Return the measurements as a Markdown table."""
    lines = [f"| command ({RUNS} runs) | median s | fastest | slowest |", "|---|---|---|---|"]
    for name, times in seconds.items():
        cells = (statistics.median(times), min(times), max(times))
        lines.append(f"| `{name}` | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table(measure()) + "\n")
