"""What of a trial's folder is of concern without torch: how it shares, and that it is done."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from autoft.data.cache.files import write_json_atomic
from autoft.training.job import Sharing

SHARING = "sharing.json"  # in the folder of the trial
LAST = "last.safetensors"  # its latest state
SCORED = "scored.safetensors"  # the weights that its latest score belongs to


def note_sharing(folder: Path, sharing: Sharing, why: str) -> None:
    """Write `sharing.json`: how a trial comes by what its frozen stages give, or `why` not."""
    write_json_atomic(folder / SHARING, asdict(sharing) | {"why": why})


def noted_sharing(folder: Path) -> Sharing | None:
    """Return what `note_sharing` wrote, for a trial that goes on; None if nothing was."""
    try:
        known = json.loads((folder / SHARING).read_bytes())
        return Sharing(**{name: known[name] for name in asdict(Sharing())})
    except (OSError, ValueError, LookupError, TypeError):
        return None


def drop_state(folder: Path) -> None:
    """Drop the latest state, once it is written how the trial ended: until then it may go on."""
    (folder / LAST).unlink(missing_ok=True)
