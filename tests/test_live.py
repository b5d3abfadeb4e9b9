"""The live view shows a search on a terminal and in a log, and never ends it."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from autoft.cli.live import ROWS, LiveView
from autoft.search.events import Event, Kind

HOSTILE = "[/red]\x1b[2J\x07é[bold]"


def console(file: io.StringIO, *, terminal: bool) -> Console:
    return Console(file=file, force_terminal=terminal, width=120, color_system=None)


def trial(number: int, backbone: str = "resnet18") -> list[Event]:
    start: dict[str, Any] = {
        "backbone": backbone,
        "strategy": "freeze",
        "head": "linear",
        "epochs": 8,
    }
    end: dict[str, Any] = {
        "status": "done",
        "score": 0.5 + number / 100,
        "seconds": 3.0,
        "error": "",
    }
    return [
        event("trial_start", number=number, **start),
        event("epoch", number=number, epoch=3, epochs=8, score=0.25),
        event("trial_end", number=number, **end),
    ]


def event(kind: Kind, at: float = 1.0, **data: object) -> Event:
    return Event(kind, at, data)


def shown(events: list[Event], *, terminal: bool, budget: float | None = 900.0) -> str:
    """Return what the view leaves on the screen (terminal) or in the log while it is entered."""
    file = io.StringIO()
    made = console(file, terminal=terminal)
    with LiveView(budget, made) as view:
        for happened in events:
            view(happened)
        if terminal:
            file.truncate(0)
            made.print(view.table())
        return file.getvalue()


def test_terminal_table_shows_trials_best_and_time_left() -> None:
    begun = event("trial_start", number=4, backbone="vit", strategy="full", head="mlp", epochs=8)
    events = [event("phase", name="tails", text="training tails"), *trial(3), begun]
    text = shown([*events, event("best", number=3, score=0.53)], terminal=True)
    assert "training tails · best 0.5300 (trial 3) · 15:00 min left" in text
    assert "vit" in text
    assert "0/8" in text
    done = next(line for line in text.splitlines() if "resnet18" in line)
    assert [cell.strip() for cell in done.split("│")[1:-1]] == [
        "3", "resnet18", "freeze", "linear", "3/8", "0.5300", "done",
    ]  # fmt: skip


def test_narrow_terminal_shortens_names_and_never_numbers() -> None:
    file = io.StringIO()
    made = Console(file=file, force_terminal=True, width=72, color_system=None)
    with LiveView(None, made) as view:
        for happened in trial(3, backbone="mobilenetv4_conv_small.e2400_r224_in1k"):
            view(happened)
    lines = [line for line in file.getvalue().splitlines() if "mobilenetv4" in line]
    assert max(map(len, lines)) <= 72
    assert "…" in lines[-1]
    assert all(cell in lines[-1] for cell in (" 3/8 ", " 0.5300 ", " done "))


def test_table_keeps_to_the_last_trials() -> None:
    text = shown([e for n in range(40) for e in trial(n)], terminal=True)
    assert sum("resnet18" in line for line in text.splitlines()) == ROWS
    assert " 39 " in text


def test_log_has_one_line_per_event_and_no_control_characters() -> None:
    text = shown([*trial(3), event("best", number=3, score=0.53)], terminal=False)
    assert text.splitlines() == [
        "[1 s] trial 3 starts: resnet18, freeze, linear, 8 epochs",
        "[1 s] trial 3 done, score 0.5300, 3 s",
        "[1 s] best so far 0.5300 (trial 3)",
    ]
    assert "\r" not in text
    assert "\x1b" not in text


def test_long_lines_of_a_log_are_not_wrapped() -> None:
    text = shown([event("note", text="word " * 100)], terminal=False)
    assert len(text.splitlines()) == 1


def test_hostile_names_reach_neither_markup_nor_the_terminal() -> None:
    for terminal in (True, False):
        text = shown(trial(1, backbone=HOSTILE), terminal=terminal)
        assert r"[/red]\x1b[2J\x07é[bold]" in text
        assert "\x07" not in text
        assert "\x1b[2J" not in text


def test_same_note_is_told_once_and_slow_progress_now_and_then() -> None:
    notes = [event("note", text="3 images excluded") for _ in range(5)]
    steps = [event("progress", s, text="decoding", done=s, total=30) for s in range(1, 31)]
    lines = shown([*notes, *steps], terminal=False).splitlines()
    assert lines[0] == "[1 s] note: 3 images excluded"
    assert [line.split()[-1] for line in lines[1:]] == ["1/30", "11/30", "21/30", "30/30"]


def test_slow_epochs_give_a_sign_of_life() -> None:
    start, *_ = trial(1)
    epochs = [
        event("epoch", 20.0 * n, number=1, epoch=n, epochs=8, score=0.5) for n in range(1, 4)
    ]
    lines = shown([start, *epochs], terminal=False).splitlines()
    assert len(lines) == 3
    assert lines[-1] == "[1:00 min] trial 1 epoch 3/8, score 0.5000"


def test_event_that_cannot_be_shown_ends_the_view_and_not_the_search() -> None:
    for terminal in (True, False):
        file = io.StringIO()
        with LiveView(60.0, console(file, terminal=terminal)) as view:
            view(event("scan", found=3))
            view(event("note", text="goes on"))
        text = file.getvalue()
        assert text.count("The view stopped (KeyError") == 1
        if terminal:
            assert text.rstrip().endswith("the search goes on.")


def test_lost_terminal_does_not_end_the_search() -> None:
    file = io.StringIO()
    with LiveView(60.0, console(file, terminal=False)) as view:
        file.close()
        view(event("note", text="nobody reads this"))
        view(event("note", text="nor this"))
