"""TorchScript, for programs that read nothing else: deprecated by torch, so it comes last."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

# Public, but torch.jit does not list it for type checkers.
from torch.jit import TracerWarning  # type: ignore[attr-defined]

from autoft.data.cache.files import write_bytes_atomic
from autoft.errors import MachineError
from autoft.export.pt2 import example, exporting, portable
from autoft.values import Preprocess


def to_torchscript(
    model: nn.Module, path: Path, pre: Preprocess, metadata: Mapping[str, str] | None = None
) -> None:
    """Trace `model` for float32 images (N, 3, S, S), any N, and write it for `torch.jit.load`.

    `metadata` becomes the file's extra files.

    Raises:
        MachineError: Python 3.14 or newer, where torch does not support TorchScript.
        PluginError: the network cannot be traced, or the trace holds for one batch size only.
    """
    if sys.version_info >= (3, 14):
        raise MachineError(
            f"TorchScript is not supported by torch on Python {sys.version_info[0]}."
            f"{sys.version_info[1]}; it needs 3.13 or older. Use the ONNX or the pt2 file."
        )
    twin = portable(model)
    with exporting("TorchScript", model), torch.no_grad(), deprecation_known():
        # torch.jit is not typed.
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            twin, example(pre), check_trace=False
        )
        _check_batch_sizes(twin, traced, pre)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer, _extra_files=dict(metadata or {}))
    write_bytes_atomic(path, buffer.getvalue())


@contextlib.contextmanager
def deprecation_known() -> Iterator[None]:
    """Silence torch.jit's own deprecation text and the tracer's remarks, and nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supp)")
        # It says that a shape was taken for a constant; `_check_batch_sizes` finds out.
        warnings.simplefilter("ignore", TracerWarning)
        yield


def _check_batch_sizes(twin: nn.Module, traced: torch.jit.ScriptModule, pre: Preprocess) -> None:
    for count in (1, 3):
        images = example(pre, count)
        torch.testing.assert_close(traced(images), twin(images), rtol=1e-3, atol=1e-3)
