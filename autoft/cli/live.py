"""The view of a running search: one live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from autoft.cli.text import clean, duration, number
from autoft.search.events import Event

ROWS = 15
QUIET = 10.0
"""Seconds between two plain lines about the same thing that is still going on."""


@dataclass(frozen=True)
class Row:
    """One trial as the table shows it."""

    number: int
    backbone: str
    strategy: str
    head: str
    epochs: int
    epoch: int = 0
    score: float | None = None
    state: str = "training"

    def cells(self) -> list[Text]:
        """Return the row as texts that rich does not read as markup."""
        epoch = f"{self.epoch}/{self.epochs}"
        names = (self.backbone, self.strategy, self.head)
        cells = [str(self.number), *names, epoch, number(self.score), self.state]
        return [Text(clean(cell), no_wrap=True, overflow="ellipsis") for cell in cells]


@dataclass
class State:
    """What has been heard so far."""

    phase: str = "starting"
    doing: str = ""
    best: str = ""
    rows: dict[int, Row] = field(default_factory=dict)

    def hear(self, event: Event) -> None:
        """Take in one event."""
        data = event.data
        if event.kind == "phase":
            self.phase, self.doing = data.get("text") or data["name"], ""
        elif event.kind == "progress":
            self.doing = _progress(data)
        elif event.kind == "backbone":
            self.doing = sentence(event)
        elif event.kind == "best":
            self.best = f"{number(data['score'])} (trial {data['number']})"
        elif event.kind == "trial_start":
            names = {name: data[name] for name in ("number", "backbone", "strategy", "head")}
            self.rows[data["number"]] = Row(**names, epochs=data["epochs"])
        elif event.kind in ("epoch", "trial_end") and data["number"] in self.rows:
            self._update(self.rows[data["number"]], data)

    def _update(self, row: Row, data: Mapping[str, Any]) -> None:
        score = row.score if data["score"] is None else data["score"]
        row = replace(row, score=score, state=data.get("status", row.state))
        self.rows[row.number] = replace(row, epoch=data.get("epoch", row.epoch))


class LiveView:
    """Listen to a search and show it; owns the terminal while it is entered.

    Progress is written to stderr, so that stdout holds results only. Whatever goes wrong with
    showing is told once and ends the view, never the search.
    """

    def __init__(self, budget: float | None = None, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._budget = budget
        self._started = time.monotonic()
        self._state = State()
        self._said: dict[str, float] = {}
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._broken = False

    def __enter__(self) -> LiveView:
        """Start the table, on a terminal."""
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self.table,
                refresh_per_second=2,
                transient=True,
            )
            self._safely(self._live.start)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._safely(self._live.stop)

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self._safely(lambda: self._show(event))

    def _safely(self, act: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            act()
        except Exception as error:  # noqa: BLE001  showing must not end what is shown
            self._broken = True
            self._tell_why(error)

    def _tell_why(self, error: Exception) -> None:
        live, self._live = self._live, None
        why = clean(f"{type(error).__name__}: {error}")
        # Where even this fails the terminal is gone, and there is nobody left to tell.
        with contextlib.suppress(Exception):
            if live is not None:
                live.stop()
            text = Text(f"The view stopped ({why}); the search goes on.")
            self._console.print(text, soft_wrap=True)

    def _show(self, event: Event) -> None:
        with self._lock:
            self._state.hear(event)
            if self._budget is not None and "left" in event.data:
                self._budget = event.seconds + event.data["left"]
            line = self._line(event)
        if line:
            self._console.print(Text(clean(line)), soft_wrap=True)

    def _line(self, event: Event) -> str:
        """Return the plain line for an event; empty where the table shows it, or said just now."""
        failed = event.data.get("status") == "failed"
        if self._live is not None and event.kind not in ("note", "scan", "regime") and not failed:
            return ""
        what = sentence(event)
        return f"[{duration(event.seconds)}] {what}" if what and self._is_news(event) else ""

    def _is_news(self, event: Event) -> bool:
        """Tell a note once, and what goes on for long now and then."""
        data = event.data
        if event.kind not in ("note", "progress", "epoch"):
            return True
        topic = str(data.get("text", event.kind))
        last = self._said.get(topic)
        if last is None:
            self._said[topic] = event.seconds
            return event.kind != "epoch"
        ended = event.kind == "progress" and 0 < data["total"] <= data["done"]
        news = ended or (event.kind != "note" and event.seconds - last >= QUIET)
        if news:
            self._said[topic] = event.seconds
        return news

    def table(self) -> Group:
        """Return what a terminal shows now: one line of state above the last trials."""
        with self._lock:
            rows = list(self._state.rows.values())
            header = self._header()
        table = Table(header_style="bold", expand=False)
        for name in ("trial", "backbone", "strategy", "head", "epoch", "score", "state"):
            right = name in ("trial", "epoch", "score")
            # Where the terminal is narrow the names give way, never the numbers.
            rigid = name not in ("backbone", "strategy", "head")
            table.add_column(name, justify="right" if right else "left", no_wrap=rigid)
        for row in rows[-ROWS:]:
            table.add_row(*row.cells())
        return Group(header, table) if rows else Group(header)

    def _header(self) -> Text:
        parts = [self._state.phase, self._state.doing]
        parts.append(f"best {self._state.best}" if self._state.best else "")
        if self._budget is not None:
            left = self._budget - (time.monotonic() - self._started)
            parts.append(f"{duration(left)} left")
        return Text(clean(" · ".join(part for part in parts if part)), style="bold")


def sentence(event: Event) -> str:
    """Return an event in plain words; empty where there is nothing to say."""
    speak = _SENTENCES.get(event.kind)
    return speak(event.data) if speak else ""


def _scan(data: Mapping[str, Any]) -> str:
    shown, excluded = "; ".join(data["reasons"]), data["excluded"]
    more = "; ..." if excluded > len(data["reasons"]) else ""
    out = f"; {excluded:,} left out ({shown}{more})" if excluded else ""
    folds = f" in {data['folds']} folds" if data["folds"] > 1 else ""
    return (
        f"{data['headline']}{out}; {data['train']:,} to train, {data['validation']:,} to validate"
        f"{folds}, {data['test']:,} to test"
    )


def _progress(data: Mapping[str, Any]) -> str:
    if not data["done"] and not data["total"]:
        return str(data["text"])
    total = f"/{data['total']:,}" if data["total"] else ""
    return f"{data['text']} {data['done']:,}{total}"


def _backbone(data: Mapping[str, Any]) -> str:
    found = "left out" if data["score"] is None else f"probe score {number(data['score'])}"
    text = f": {data['text']}" if data.get("text") else ""
    return f"backbone {data['name']}: {found} in {duration(data['seconds'])}{text}"


def _trial_start(data: Mapping[str, Any]) -> str:
    again = f" as trial {data['of']} on fold {data['fold']}" if "of" in data else ""
    return (
        f"trial {data['number']} starts{again}: {data['backbone']}, {data['strategy']}, "
        f"{data['head']}, {data['epochs']} epochs"
    )


def _trial_end(data: Mapping[str, Any]) -> str:
    why = f": {data['error']}" if data.get("error") else ""
    end = f"{data['status']}, score {number(data['score'])}, {duration(data['seconds'])}"
    return f"trial {data['number']} {end}{why}"


_SENTENCES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "phase": lambda data: str(data.get("text") or data["name"]),
    "note": lambda data: f"note: {data['text']}",
    "scan": _scan,
    "progress": _progress,
    "backbone": _backbone,
    "regime": lambda data: f"regime {data['name']}: {data['text']}",
    "trial_start": _trial_start,
    "epoch": lambda data: (
        f"trial {data['number']} epoch {data['epoch']}/{data['epochs']}, score "
        f"{number(data['score'])}"
    ),
    "trial_end": _trial_end,
    "best": lambda data: f"best so far {number(data['score'])} (trial {data['number']})",
}
