"""Write one table of the goals P1 to P17 from what the benchmarks measured.

    PYTHONPATH=benchmarks python benchmarks/speed/summary.py RESULTS --page FILE

`RESULTS` is the folder into which the other benchmarks here wrote (`--json`). What each measured
where stands below the table. A goal that no file has is named.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from goals import Line, read_lines, table
from page import write_between

GOALS = tuple(f"P{number}" for number in range(1, 18))


def main() -> None:
    """Gather, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    text = summary(asked.results)
    sys.stderr.write(f"{text}\n")
    if asked.page:
        write_between(asked.page, "goals", text)


def summary(folder: Path) -> str:
    """Return the table, and what was measured where."""
    found = {file: json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))}
    files = [file for file, told in found.items() if "lines" in told]
    lines = [line for file in files for line in read_lines(file)]
    missing = [goal for goal in GOALS if goal not in {line.goal for line in lines}]
    parts = [table(sorted(lines, key=_number))]
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    parts += [f"`{file.name}`: {found[file]['about']}" for file in files]
    return "\n\n".join(parts)


def _number(line: Line) -> int:
    return int(line.goal.removeprefix("P"))


if __name__ == "__main__":
    main()
