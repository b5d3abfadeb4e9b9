"""One command at work on a run folder: it tells what happens and waits for workers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from autoft.errors import MachineError
from autoft.search.engines.worker import Message, Worker
from autoft.search.events import Event, Listener
from autoft.search.folder import RunFolder
from autoft.search.settings import Settings
from autoft.search.stop import Stop

NOT_WRITTEN = {"progress"}  # events that only a live view needs


@dataclass
class Session:
    """One command at work on a run folder."""

    settings: Settings
    folder: RunFolder
    listen: Listener
    stop: Stop
    began: float
    spent: float = 0.0  # seconds of earlier commands on the same run

    def emit(self, kind: Any, **data: Any) -> None:
        """Tell the listener and the run folder what happened.

        Raises:
            Interrupted: the user asked to stop, and this is progress of what takes long.
        """
        if kind == "progress":
            self.stop.check()
        event = Event(kind, time.monotonic() - self.began, data)
        if kind not in NOT_WRITTEN:
            self.folder.append_event(event)
        self.listen(event)

    def note(self, text: str) -> None:
        """Tell the user a sentence."""
        self.emit("note", text=text)

    def left(self) -> float:
        """Return the seconds left of the run's time."""
        return self.settings.time - self.spent - (time.monotonic() - self.began)

    def call(self, worker: Worker, task: Any, *arguments: Any) -> Any:
        """Have a worker do something and wait for it.

        Raises:
            AutoftError: what the task raised; Interrupted if the user asked to stop meanwhile.
        """
        worker.send(task, *arguments)
        return self.wait(worker)

    def wait(self, worker: Worker) -> Any:
        """Wait for the result of what a worker was sent; raises as `call` does."""
        while True:
            message = worker.receive(0.25)
            if self.stop.asked:
                worker.kill()
                self.stop.check()
            if message is None:
                continue
            if message.kind == "progress":
                text, done, total = message.content
                self.emit("progress", text=text, done=done, total=total)
            else:
                return _content(message)


def _content(message: Message) -> Any:
    if message.kind == "result":
        return message.content
    if message.kind == "error":
        kind, text = message.content
        raise kind(text)
    if message.kind == "died":
        raise MachineError(
            f"A worker could not go on: {message.content}. Repeat the command to go on."
        )
    raise RuntimeError(message.content)


@contextmanager
def a_worker() -> Iterator[Worker]:
    """Hold a worker while the block runs; one that still works when it fails is ended at once."""
    worker = Worker()
    try:
        yield worker
    except BaseException:
        worker.kill()
        raise
    worker.close()
