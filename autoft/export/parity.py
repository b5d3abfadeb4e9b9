"""The proof that an exported file gives the answers of the network that was scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import onnxruntime
import torch
from torch import Tensor, nn

from autoft.data.cache.files import write_json_atomic
from autoft.errors import DataError, UsageError, did_you_mean
from autoft.export.pt2 import portable, quiet
from autoft.export.torchscript import deprecation_known

# An absolute difference of logits would reject sound files (1e-4 is usual for some networks).
TOLERANCE: Final = 1e-3

Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parity:
    """How one exported file compares with the eager network on `n` images.

    `label_agreement` is a share in [0, 1]. `max_probability_difference` is 1 where an answer
    was not a number or had another shape. `error` is why the file could not be run, if so.
    """

    format: str
    n: int
    label_agreement: float
    max_probability_difference: float
    passed: bool
    error: str = ""


@dataclass(frozen=True)
class _Compared:
    agreed: int
    difference: float
    error: str = ""


def check_parity(
    model: nn.Module, files: Mapping[str, Path], batches: Callable[[], Iterator[Tensor]]
) -> list[Parity]:
    """Run `model` (fp32, CPU, eval) and every file over the same images, once, side by side.

    `files` maps "onnx", "torchscript" or "pt2" to a file; read only files that you wrote, since
    the last two can execute code. `batches` yields normalised float32 images (N, 3, S, S). A
    file that cannot be loaded or run is a failed proof, not an exception.

    Raises:
        UsageError: a format is unknown.
        DataError: there was no image to compare on.
    """
    runners = {name: _runner(name, path) for name, path in files.items()}
    eager = portable(model)
    compared: dict[str, list[_Compared]] = {name: [] for name in runners}
    count = 0
    with torch.inference_mode():
        for batch in batches():
            # In the order of memory in which those who run a file usually pass images.
            images = batch.to("cpu", torch.float32).contiguous()
            expected = eager(images)
            count += len(images)
            for name, run in runners.items():
                compared[name].append(_compare(run, images, expected))
    if not count:
        raise DataError(
            "Parity of the exported files was asked for on 0 images; expected at least one. "
            "Pass the validation images."
        )
    return [_verdict(name, count, parts) for name, parts in compared.items()]


def write_parity(path: Path, parities: Sequence[Parity]) -> None:
    """Write the proofs as JSON, a list of objects."""
    write_json_atomic(path, [asdict(parity) for parity in parities])


def _verdict(name: str, count: int, parts: Sequence[_Compared]) -> Parity:
    agreed = sum(part.agreed for part in parts)
    difference = max(part.difference for part in parts)
    error = next((part.error for part in parts if part.error), "")
    passed = agreed == count and difference <= TOLERANCE and not error
    return Parity(name, count, agreed / count, difference, passed, error)


def _compare(run: Runner, images: Tensor, expected: Tensor) -> _Compared:
    try:
        logits = run(images)
    except Exception as error:  # noqa: BLE001 - each runtime has its own; all are a failed proof
        return _Compared(0, 1.0, f"{type(error).__name__}: {error}")
    if logits.shape != expected.shape:
        shapes = f"logits {tuple(logits.shape)}, expected {tuple(expected.shape)}"
        return _Compared(0, 1.0, shapes)
    difference = (logits.float().softmax(1) - expected.softmax(1)).abs()
    # max() would drop a NaN, and NaN is no JSON: it counts as the largest difference there is.
    worst = float(difference.nan_to_num(nan=1.0).max())
    return _Compared(int((logits.argmax(1) == expected.argmax(1)).sum()), worst)


def _runner(name: str, path: Path) -> Runner:
    if name not in _LOADERS:
        raise UsageError(
            f"Unknown export format {name!r}; expected one of {', '.join(_LOADERS)}."
            f"{did_you_mean(name, _LOADERS)}"
        )
    try:
        return _LOADERS[name](path)
    except Exception as error:  # noqa: BLE001 - each runtime has its own; all are a failed proof
        return partial(_fail, error)


def _fail(error: Exception, _images: Tensor) -> Tensor:
    raise error


def _load_onnx(path: Path) -> Runner:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _load_torchscript(path: Path) -> Runner:
    with deprecation_known():
        # torch.jit is not typed.
        module: Runner = torch.jit.load(  # type: ignore[no-untyped-call]
            path, map_location="cpu"
        )
    return module


def _load_pt2(path: Path) -> Runner:
    with quiet():
        return torch.export.load(path).module()


_LOADERS: Final[dict[str, Callable[[Path], Runner]]] = {
    "onnx": _load_onnx,
    "torchscript": _load_torchscript,
    "pt2": _load_pt2,
}
