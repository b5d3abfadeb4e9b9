"""Ctrl-C and SIGTERM: the first asks the run to end in order, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from autoft.errors import Interrupted


class Stop:
    """Whether the user asked to stop; `check` raises where waiting any longer is no use."""

    def __init__(self) -> None:
        self.asked = False
        self.then: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Raise Interrupted if the user asked to stop."""
        if self.asked:
            raise Interrupted("Stopped; nothing is lost, the same command goes on from here.")

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            os._exit(Interrupted.exit_code)  # workers see that their parent is gone
        self.asked = True
        self.then()


@contextmanager
def listen_for_stop() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a `Stop` while the block runs (main thread only)."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {
        number: signal.signal(number, stop._handle) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
