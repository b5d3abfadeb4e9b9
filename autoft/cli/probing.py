"""Import plugins in a process of their own, where they may crash, exit, print or hang.

The parent runs `python -m autoft.cli.probing REPORT kind=name...`. The child writes one line of
JSON per plugin to REPORT as it goes, so that whatever ends it is blamed on the next plugin, and
the rest is tried in a new process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from autoft.errors import AutoftError
from autoft.plugins import Plugin

PATIENCE = 60.0
"""Seconds that one plugin may take to be imported."""


def probe(plugins: Sequence[Plugin], patience: float = PATIENCE) -> dict[Plugin, str]:
    """Import each plugin elsewhere and read its signature; return why not, or empty strings."""
    found: dict[Plugin, str] = {}
    waiting = list(plugins)
    while waiting:
        answers, end = _run(waiting, patience)
        found |= dict(zip(waiting, answers, strict=False))
        waiting = waiting[len(answers) :]
        if waiting:
            found[waiting.pop(0)] = end
    return found


def _run(plugins: Sequence[Plugin], patience: float) -> tuple[list[str], str]:
    """Return the answers of one child, in order, and how it ended if some are missing."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report")
        report.touch()
        names = [f"{plugin.kind}={plugin.full_name}" for plugin in plugins]
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(report), *names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            end = _wait(child, report, patience)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        lines = report.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines], end


def _wait(child: subprocess.Popen[bytes], report: Path, patience: float) -> str:
    """Wait for the child while its report grows; say how it ended."""
    size, since = 0, time.monotonic()
    while child.poll() is None:
        if report.stat().st_size != size:
            size, since = report.stat().st_size, time.monotonic()
        if time.monotonic() - since > patience:
            return f"its import did not end within {patience:g} s"
        time.sleep(0.05)
    code = child.returncode
    if code < 0:
        return f"its import ended the process with {signal.Signals(-code).name}"
    return f"its import ended the process with exit code {code}"


def _answer(kind: str, name: str) -> str:
    from autoft.plugins import load
    from autoft.space import read_signature

    try:
        read_signature(load(kind, name))
    except AutoftError as error:
        return str(error)
    return ""


def _child(report: str, names: Sequence[str]) -> None:
    with Path(report).open("w", encoding="utf-8") as file:
        for kind, _, name in (given.partition("=") for given in names):
            file.write(json.dumps(_answer(kind, name)) + "\n")
            file.flush()
        file.flush()
    os._exit(0)  # a plugin's threads and exit handlers are not waited for


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2:])
