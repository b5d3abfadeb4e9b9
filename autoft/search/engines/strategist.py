"""Asks strategies that others wrote what they leave alone, in a process of their own.

The controlling process needs to know before a trial begins what it will cost. Code of others may
import torch, end its process or never return: none of that is to hold up a search.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from autoft.network.strategy import Treatment
from autoft.search.engines import tasks
from autoft.search.engines.worker import Worker
from autoft.search.stop import Stop
from autoft.values import Part

PATIENCE = 15.0  # seconds for an answer, in which torch can be imported; a hung trial has longer
LOOK_EVERY = 0.25
SILENT = (
    "The strategy '{}' did not say in time what it leaves frozen: its trials are planned as if it "
    "trained everything."
)


class Strategist:
    """A worker that begins with the first question and ends with the block.

    `tell` is given a sentence for the user.
    """

    def __init__(self, stop: Stop, tell: Callable[[str], None]) -> None:
        self._stop = stop
        self._tell = tell
        self._worker: Worker | None = None
        self._silent = set[str]()

    def __enter__(self) -> Strategist:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: object, _at: TracebackType | None
    ) -> None:
        if self._worker is not None:
            self._worker.close()

    def ask(self, strategy: Part, num_stages: int) -> Treatment:
        """Return what a strategy leaves alone, nothing as far as is known of one that is silent.

        One that gave no answer is not asked again: its trials are planned as whole ones.
        """
        if strategy.name in self._silent or self._stop.asked:
            return Treatment()
        self._worker = self._worker or Worker()
        self._worker.send(tasks.treatment, strategy, num_stages)
        answer = self._answer(self._worker)
        if answer is None:
            self._worker.kill()
            self._worker = None
            self._silent.add(strategy.name)
            self._tell(SILENT.format(strategy.name))
        return answer or Treatment()

    def _answer(self, worker: Worker) -> Treatment | None:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and not self._stop.asked:
            message = worker.receive(LOOK_EVERY)
            if message is not None:
                found = message.content if message.kind == "result" else None
                return found if isinstance(found, Treatment) else None
        return None
