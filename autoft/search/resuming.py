"""Which run folder a command works on, and whether the run in it may go on."""

from __future__ import annotations

import json
from pathlib import Path

from autoft.data.reading import SCHEMES
from autoft.errors import UsageError
from autoft.search.folder import FORMAT, RESULT, RunFolder
from autoft.search.settings import Settings

BEFORE_A_RUN = {"trials", "run.lock", "run.pid", "events.jsonl"}  # what a refused one leaves


def choose_folder(settings: Settings) -> Path:
    """Return the run folder: --out, or runs/<dataset>, taken up again if it is this search's.

    Without --out, a finished run is never touched: the next one gets the next number.
    """
    if settings.out:
        return Path(settings.out)
    stem = Path("runs") / _name_of(settings.dataset)
    number = 1
    while True:
        path = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        run = path / "run.json"
        if not run.exists():
            return path
        known = json.loads(run.read_text(encoding="utf-8"))["settings"]
        if known == settings.meaning() and not (path / RESULT).exists():
            return path
        number += 1


def _name_of(dataset: str) -> str:
    """Return a name for the run: the folder's, the file's without its suffixes, or the set's."""
    for scheme in SCHEMES:
        if dataset.startswith(scheme):
            return (
                dataset.removeprefix(scheme).split("@")[0].split(":")[0].split("/")[-1] or "data"
            )
    path = Path(dataset).resolve()
    return (path.name.split(".")[0] if path.is_file() else path.name) or "data"


def check_resumable(settings: Settings, folder: RunFolder) -> float:
    """Return the seconds that the run has already spent; 0 for a new one.

    Raises:
        UsageError: the folder holds a run that means something else (says what), or of a format
            that this version does not know, or files that are not a run's.
    """
    known = folder.read_json("run.json")
    if known is None:
        others = {p.name for p in folder.path.iterdir()} - BEFORE_A_RUN
        if others:
            raise UsageError(
                f"{folder.path} holds other files ({', '.join(sorted(others)[:3])}) and is no run "
                f"folder. Choose another --out."
            )
        return 0.0
    if known["format"] != FORMAT:
        raise UsageError(
            f"{folder.path} was written by another version of autoft (format {known['format']}, "
            f"this one knows {FORMAT}). Use that version, or another --out."
        )
    before, now = known["settings"], settings.meaning()
    changed = [f"{k} was {before.get(k)!r}, is {now[k]!r}" for k in now if before.get(k) != now[k]]
    if changed:
        raise UsageError(
            f"{folder.path} holds a run with other settings: {'; '.join(changed)}. Repeat the "
            f"settings to resume it, or choose another --out."
        )
    return spent(folder)


def spent(folder: RunFolder) -> float:
    """Return the seconds of all earlier commands, each up to its last event."""
    total = last = 0.0
    for event in folder.events():
        if event["kind"] == "phase" and event.get("name") == "start":
            total, last = total + last, 0.0
        last = max(last, float(event["at"]))
    return total + last
