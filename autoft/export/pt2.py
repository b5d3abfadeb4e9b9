"""The `.pt2` file of torch.export, and what the other exporters need of it.

torch.export traces with a symbolic batch size; ONNX is made from the very same program.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from autoft.data.cache.files import write_bytes_atomic
from autoft.errors import AutoftError, PluginError
from autoft.export.attention import FoldedAttention
from autoft.values import Preprocess

_LOGGERS: Final = ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir")


def to_pt2(
    model: nn.Module, path: Path, pre: Preprocess, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `model` as a torch.export archive for float32 images (N, 3, S, S), any N.

    `metadata` becomes the archive's extra files. The file contains pickles: read only your own.

    Raises:
        PluginError: torch.export cannot follow the network.
    """
    with exporting("pt2", model), quiet():
        program = to_program(model, pre)
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files=dict(metadata or {}))
    write_bytes_atomic(path, buffer.getvalue())


def to_program(model: nn.Module, pre: Preprocess) -> ExportedProgram:
    """Return the graph of `model` in eval mode, float32, on CPU, with a symbolic batch size."""
    images = example(pre)
    with FoldedAttention():
        program = torch.export.export(
            portable(model), (images,), dynamic_shapes=({0: Dim("batch")},), strict=False
        )
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                # The files would say where the source lies on this machine.
                node.meta.pop("stack_trace", None)
    return program


def portable(model: nn.Module) -> nn.Module:
    """Return a float32 CPU copy of `model` in eval mode; `model` itself is not touched."""
    twin = copy.deepcopy(model).to("cpu", torch.float32)
    return twin.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def example(pre: Preprocess, count: int = 2) -> Tensor:
    """Return fixed noise (count, 3, S, S); 2, since a tracer may take 1 for a constant."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, pre.image_size, pre.image_size, generator=generator)


@contextlib.contextmanager
def exporting(kind: str, model: nn.Module) -> Iterator[None]:
    """Turn whatever an exporter raises into one sentence, with the cause attached.

    Raises:
        PluginError: anything but an AutoftError was raised inside.
    """
    try:
        yield
    except AutoftError:
        raise
    except Exception as error:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # exporters colour what they say
        first = next(iter(plain.strip().splitlines()), "")
        raise PluginError(
            f"The {kind} export of {type(model).__name__} failed with {type(error).__name__}: "
            f"{first}. Expected a network that torch.export can follow with any batch size; "
            "leave this format out, or exclude the backbone or head and search again."
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' warnings, prints and log lines off the terminal."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        sink = io.StringIO()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
