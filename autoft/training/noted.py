"""What a trial notes of how it comes by what its frozen stages give; read without torch, too."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from autoft.data.cache.files import write_json_atomic
from autoft.training.job import Sharing

SHARING = "sharing.json"  # in the folder of the trial


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
