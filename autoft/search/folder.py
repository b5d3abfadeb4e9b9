"""The run folder: everything of one search, readable with `cat`, movable, resumable.

`trials.jsonl` is the truth: one finished trial per line, appended and synced. A torn last line (a
full disk, a power cut) is cut off before the next append. Only the controlling process writes it.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from autoft.data.cache.files import write_bytes_atomic, write_json_atomic
from autoft.errors import MachineError, UsageError
from autoft.search.events import Event
from autoft.search.settings import Settings
from autoft.training.job import Outcome, Precision, Report, TrialJob
from autoft.training.noted import SCORED, noted_sharing
from autoft.values import TrialConfig, TrialResult

FORMAT = 4  # of the run folder, raised when an older autoft could not read it
RESULT = "result.json"


@dataclass(frozen=True)
class RunFolder:
    """The places in a run folder, and how they are read and written."""

    path: Path

    @property
    def best(self) -> Path:
        """Return the folder of the artifact."""
        return self.path / "best"

    def trial(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.path / "trials" / f"{number:04d}"

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the contents of a JSON file of the folder, or None where it is absent."""
        try:
            loaded: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.path / name} cannot be read: {error}.") from error
        return loaded

    def views_kept(self, number: int) -> int:
        """Return how many views of each image a trial was to keep in the cache; 0 if none."""
        noted = noted_sharing(self.trial(number))
        return noted.views if noted is not None and noted.mode in ("disk", "device") else 0

    def reports(self, number: int) -> dict[int, Report]:
        """Return what a trial wrote after its epochs, by epoch and in order, in all commands.

        A curve is no truth: a line that a crash of the machine has spoilt is left out.
        """
        found: dict[int, Report] = {}
        path = self.trial(number) / "metrics.jsonl"
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with suppress(ValueError, TypeError):
                report = Report(**json.loads(line))
                found[report.epoch] = report
        return dict(sorted(found.items()))

    def has_weights(self, number: int) -> bool:
        """Tell whether the weights are kept that the latest score of a trial belongs to."""
        return (self.trial(number) / SCORED).exists()

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON file of the folder, whole or not at all."""
        write_json_atomic(self.path / name, data)

    def write_settings(self, settings: Settings) -> None:
        """Write `config.toml`; `autoft search --config` reads it back."""
        lines = [
            f"{name} = {json.dumps(value)}"
            for name, value in settings.model_dump(mode="json").items()
            if value is not None
        ]
        write_bytes_atomic(self.path / "config.toml", ("\n".join(lines) + "\n").encode())

    def append_trial(self, result: TrialResult) -> None:
        """Add one finished trial to the truth and sync it to the disk."""
        _append_line(self.path / "trials.jsonl", result.to_json(), sync=True)

    def trials(self) -> list[TrialResult]:
        """Return the finished trials in the order in which they ended."""
        return [TrialResult.from_json(line) for line in read_lines(self.path / "trials.jsonl")]

    def begun(self, number: int) -> TrialJob | None:
        """Return the job of a trial as it was begun, but for its deadline; None: it never was.

        What a crash of the machine has left empty was not begun either.
        """
        try:
            data = self.read_json(f"trials/{number:04d}/config.json")
        except UsageError as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            return None
        if not data:
            return None
        return TrialJob(
            number,
            TrialConfig.from_json(data["config"]),
            int(data["epochs"]),
            0.0,
            Precision(**data["precision"]),
            head_start=data["head_start"],
            fold=data["fold"],
            of=data["of"],
        )

    def append_event(self, event: Event) -> None:
        """Add one event to `events.jsonl`."""
        data = {"at": round(event.seconds, 3), "kind": event.kind, **event.data}
        _append_line(self.path / "events.jsonl", data, sync=False)

    def events(self) -> list[dict[str, Any]]:
        """Return all events of the run, over all its commands."""
        return read_lines(self.path / "events.jsonl")


def stopped(number: int, reports: Mapping[int, Report]) -> Outcome:
    """Return how a trial ended that goes no further than these reports, by epoch."""
    told = [report for _, report in sorted(reports.items())]
    scores, last = tuple(each.score for each in told), told[-1]
    return Outcome(number, "stopped", scores, last.score, last.loss, last.seconds)


_whole: set[Path] = set()
"""Files whose last line is whole: this process looked, and what it wrote since was written."""


def _append_line(path: Path, data: Mapping[str, Any], *, sync: bool) -> None:
    if path not in _whole:
        _cut_torn_tail(path)
    _whole.discard(path)
    try:
        with path.open("ab") as file:
            file.write(json.dumps(data, allow_nan=False).encode() + b"\n")
            file.flush()
            if sync:
                os.fsync(file.fileno())
        _whole.add(path)
    except OSError as error:
        raise MachineError(
            f"{path} cannot be written: {error.strerror}. Free some space and repeat the command; "
            f"it goes on where it stopped."
        ) from error


def _cut_torn_tail(path: Path) -> None:
    """Cut what follows the last newline: the rest of a line that was never finished."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        whole = path.read_bytes().rfind(b"\n") + 1
        file.truncate(whole)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole JSON lines of a file; none where it is absent."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise UsageError(
            f"{path} holds a line that is no JSON: {error}. Remove that line and repeat."
        ) from error


@contextmanager
def claim(path: Path) -> Iterator[RunFolder]:
    """Hold the run folder for this process alone, making it where needed.

    The lock is the operating system's: it falls with its holder, however that dies.

    Raises:
        MachineError: another process holds it (says which), or the folder cannot be made.
    """
    _whole.clear()  # another process may have written meanwhile
    try:
        (path / "trials").mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / "run.lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        holder = _holder(path)
        raise MachineError(
            f"{path} is in use by {holder}. Wait for it, stop it, or choose another --out."
        ) from error
    except OSError as error:
        raise MachineError(f"The run folder {path} cannot be made: {error.strerror}.") from error
    try:
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        (path / "run.pid").write_text(holder, encoding="utf-8")
        yield RunFolder(path)
    finally:
        (path / "run.pid").unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    try:
        data = json.loads((path / "run.pid").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "another process"
    return f"process {data['pid']} on {data['host']}"


def open_run(path: Path) -> RunFolder:
    """Return the run folder at `path` for reading.

    Raises:
        UsageError: there is no run at `path`.
    """
    if not (path / "run.json").is_file():
        raise UsageError(
            f"{path} is no run folder: it has no run.json. `autoft search --out {path}` makes one."
        )
    return RunFolder(path)
