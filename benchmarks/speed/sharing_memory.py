"""P16: the memory of its own that a process takes which reads a store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from goals import Line

from autoft.training.job import Setup
from autoft.training.rowstore import Layout, find_rows, writing


def memory(setup: Setup, _: int) -> Iterator[Line]:
    """Measure what a process that reads a store adds to its own memory."""
    rows = np.arange(4096)
    layout = Layout(((16384,),), "float16")
    values = np.zeros((512, 16384), np.float16)
    for start in range(0, len(rows), 512):
        chunk = rows[start : start + 512]
        with writing("activations", "bench", chunk, layout) as writer:
            writer.add(values)
            writer.publish()
    reader = find_rows("activations", "bench")
    assert reader is not None
    reader.read(rows[:64])
    before = _private()
    for start in range(0, len(rows), 64):
        reader.read(rows[start : start + 64])
    added = _private() - before
    size = len(rows) * layout.row_bytes
    what = f"memory of its own after reading {size / 1e6:.0f} MB: {added / 1e6:.1f} MB"
    yield Line("P16", what, 100 * max(0, added) / size, 1.0, 0.5, "%", less=True)


def _private() -> int:
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    lines = [line.split() for line in text.splitlines() if line.startswith("Private_")]
    return sum(1024 * int(words[1]) for words in lines)
