"""What happens during a run, as values: written to `events.jsonl` and shown by the live view."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "phase",  # name, text: what is being done now
    "note",  # text: something the user should know
    "scan",  # headline, found, excluded, reasons, noticed, classes, image_size, the parts, folds
    "progress",  # text, done, total: of what takes longer than two seconds
    "backbone",  # name, score (None if left out), seconds, text
    "regime",  # name, text
    "trial_start",  # number, backbone, strategy, head, epochs; of, fold where it is scored again
    "epoch",  # number, epoch, epochs, score
    "trial_end",  # number, status, score, seconds, expected (seconds), error
    "best",  # number, score
    "finish",  # the contents of result.json
]


@dataclass(frozen=True)
class Event:
    """One thing that happened, `seconds` after the command began (`at` in the file)."""

    kind: Kind
    seconds: float
    data: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]
