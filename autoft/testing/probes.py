"""Instruments of the checks: one thread, no network, a record of which parameter ran when."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, since batches of two are too small for more.

    With as many threads as cores, checks take several times as long while other processes run.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def blocked_network() -> Iterator[list[str]]:
    """Refuse every look-up and connection over IP; yield the list of what was attempted.

    The refusal is an AssertionError, which code that expects a failing network does not catch.
    """
    attempts: list[str] = []

    def refuse(target: object) -> None:
        attempts.append(str(target))
        raise AssertionError(f"The network is blocked here, and {target} was to be reached.")

    def getaddrinfo(host: object, *rest: object, **options: object) -> None:
        refuse(host)

    def connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            refuse(address)
        plain_connect(self, address)

    look_up, plain_connect = socket.getaddrinfo, socket.socket.connect
    replace: Callable[[object, str, object], None] = setattr
    replace(socket, "getaddrinfo", getaddrinfo)
    replace(socket.socket, "connect", connect)
    try:
        yield attempts
    finally:
        replace(socket, "getaddrinfo", look_up)
        replace(socket.socket, "connect", plain_connect)


def first_uses(module: nn.Module, images: Tensor) -> list[list[str]]:
    """Return the parameters of `module` in the order in which a forward pass first uses them.

    Each entry holds the names that one torch function used for the first time. Functions are
    watched and not modules, since a parameter such as a class token has no layer of its own.
    """
    recorder = _Recorder({id(parameter): name for name, parameter in module.named_parameters()})
    with recorder:
        module(images)
    return recorder.calls


class _Recorder(TorchFunctionMode):
    """Notes the first computation that takes each parameter."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._unseen = dict(names)
        self.calls: list[list[str]] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `function` and note the parameters among its arguments."""
        result = function(*args, **(kwargs or {}))
        # Asking a parameter for its shape or dtype is not a use: no tensor comes of it.
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_iter(result)):
            taken = [leaf for leaf in tree_iter((args, kwargs)) if id(leaf) in self._unseen]
            if taken:
                self.calls.append([self._unseen.pop(key) for key in {id(leaf) for leaf in taken}])
        return result
