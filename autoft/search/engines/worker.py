"""A long-lived worker process: torch is imported once, tasks come and go, and its death is seen.

The controlling process holds a `Worker`; the other end of its pipe runs `_serve`. Only values of
our own pass between them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from autoft.errors import AutoftError
from autoft.search.engines.tasks import Link
from autoft.training.job import Report

PARENT_CHECKED_EVERY = 1.0  # seconds
STOPPED_WITHIN = 3.0  # seconds that a worker gets to end by itself

Task = Callable[..., Any]


@dataclass(frozen=True)
class Message:
    """What a worker says: progress or a report while it works, then a result, error or crash."""

    kind: Literal["progress", "report", "result", "error", "bug", "died"]
    content: Any


class Worker:
    """A process of ours and the pipe to it; owns both."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, os.getpid()), daemon=True, name="autoft-worker"
        )
        self._process.start()
        theirs.close()

    @property
    def pipe(self) -> Connection[Any, Any]:
        """Return our end of the pipe, to wait on."""
        return self._pipe

    def send(self, task: Task, *arguments: Any) -> None:
        """Ask for `task(link, *arguments)`; messages follow."""
        try:
            self._pipe.send((task, arguments))
        except OSError:
            return  # it is dead; `receive` says so

    def answer(self, goes_on: bool) -> None:
        """Answer a report."""
        try:
            self._pipe.send(goes_on)
        except OSError:
            return

    def receive(self, timeout: float) -> Message | None:
        """Return the next message, or None after `timeout` seconds without one."""
        try:
            if not self._pipe.poll(timeout):
                return None
            message: Message = self._pipe.recv()
        except (EOFError, OSError):
            return Message("died", self._cause())
        return message

    def _cause(self) -> str:
        self._process.join(STOPPED_WITHIN)
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return (
                "the worker process was killed by SIGKILL, which is what the operating system "
                "does when memory runs out (then choose smaller --backbones, a smaller "
                "--image-size or fewer --workers)"
            )
        if code is not None and code < 0:
            return f"the worker process was killed by {signal.Signals(-code).name}"
        return f"the worker process ended with exit code {code}"

    def close(self) -> None:
        """Let the process end by itself, which an idle one does at once; else end it."""
        self._pipe.close()
        self._process.join(STOPPED_WITHIN)
        self._process.kill()

    def restart(self) -> None:
        """End the process at once and start another in its place."""
        self.kill()
        self._start()

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self._process.kill()
        self._process.join(STOPPED_WITHIN)
        self._pipe.close()


def _serve(pipe: Connection[Any, Any], parent: int) -> None:
    """Work through tasks until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controlling process decides what it means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    last = 0.0

    def progress(text: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2 or done >= total:
            last = time.monotonic()
            pipe.send(Message("progress", (text, done, total)))

    def report(state: Report) -> bool:
        try:
            pipe.send(Message("report", state))
            return bool(pipe.recv())
        except (EOFError, OSError):  # nobody is there: no trial is to be given up for that
            os._exit(1)

    while True:
        try:
            task, arguments = pipe.recv()
            message = _run(task, Link(progress, report), arguments)
            pipe.send(message)
        except (EOFError, OSError):
            return


def _run(task: Task, link: Link, arguments: tuple[Any, ...]) -> Message:
    try:
        return Message("result", task(link, *arguments))
    except AutoftError as error:
        return Message("error", (type(error), str(error)))
    except (EOFError, OSError) as error:
        if isinstance(error, EOFError | BrokenPipeError):
            raise
        return Message("bug", traceback.format_exc())
    except Exception:  # noqa: BLE001 - passed on whole; the controlling process shows it
        return Message("bug", traceback.format_exc())


def _follow(parent: int) -> None:
    """Leave no orphan: end when the controlling process is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECKED_EVERY)
    os._exit(1)
