"""Prediction with an exported ONNX file: onnxruntime, numpy and Pillow, never torch."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime

# protobuf, a requirement of onnx, ships no type information.
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from autoft.data.cache.files import write_bytes_atomic
from autoft.data.cells import inert
from autoft.data.pixels.decode import (
    INTERPOLATIONS,
    BadImage,
    Floats,
    Pixels,
    decode,
    in_threads,
    normalise,
    to_square,
)
from autoft.errors import DataError, UsageError
from autoft.values import Preprocess

CLASSES: Final = "autoft.classes"
PREPROCESS: Final = "autoft.preprocess"
MODEL_FILE: Final = "model.onnx"
_MAX_BYTES: Final = 2**31 - 1
# What a spreadsheet takes for the beginning of a formula.


@dataclass(frozen=True)
class Prediction:
    """The answer for one file; `error` says why there is none.

    `probabilities` has one number per class, in the order of `OnnxModel.classes`.
    """

    path: Path
    label: str
    probability: float
    probabilities: tuple[float, ...]
    error: str = ""


class OnnxModel:
    """An exported model; owns the onnxruntime session."""

    def __init__(
        self, session: onnxruntime.InferenceSession, classes: tuple[str, ...], pre: Preprocess
    ) -> None:
        self.classes = classes
        self.preprocess = pre
        self._session = session

    def predict(self, sources: Iterable[Path], batch_size: int = 16) -> Iterator[Prediction]:
        """Yield one Prediction per file, in order; an unreadable file does not stop the others.

        Raises:
            UsageError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise UsageError(f"The batch size is {batch_size}; expected 1 or more.")
        return self._predict(iter(sources), batch_size)

    def _predict(self, sources: Iterator[Path], batch_size: int) -> Iterator[Prediction]:
        while paths := list(itertools.islice(sources, batch_size)):
            decoded = list(in_threads(self._read, paths))
            good = [pixels for pixels in decoded if not isinstance(pixels, BadImage)]
            answers = iter(self._probabilities(np.stack(good)) if good else ())
            for path, pixels in zip(paths, decoded, strict=True):
                if isinstance(pixels, BadImage):
                    yield Prediction(path, "", 0.0, (), pixels.reason)
                else:
                    yield self._answer(path, next(answers))

    def _read(self, path: Path) -> Pixels | BadImage:
        try:
            return to_square(decode(path), self.preprocess.resize, self.preprocess.interpolation)
        except BadImage as error:
            return error

    def _probabilities(self, pixels: Pixels) -> Floats:
        images = normalise(pixels, self.preprocess)
        logits = self._session.run(["logits"], {"images": images})[0]
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: Floats = powers / powers.sum(axis=1, keepdims=True)
        return probabilities

    def _answer(self, path: Path, probabilities: Floats) -> Prediction:
        best = int(probabilities.argmax())
        numbers = tuple(probabilities.tolist())
        return Prediction(path, self.classes[best], numbers[best], numbers)


def load(path: Path) -> OnnxModel:
    """Open a run folder, an artifact folder or an .onnx file.

    Nothing but the one file is read: a model whose weights lie in other files is refused before
    onnxruntime sees it, because such a reference may point anywhere on the disk.

    Raises:
        UsageError: `path` is a folder without a model, or another kind of file.
        DataError: `path` is missing, or the file is damaged, was not written by autoft, or
            refers to other files.
    """
    file = _find(path)
    if file.stat().st_size > _MAX_BYTES:
        raise DataError(f"{file} is larger than 2 GiB; expected one ONNX file. Export it again.")
    content = file.read_bytes()
    classes, pre = _inspect(file, content)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise DataError(
            f"{file} cannot be loaded by onnxruntime: {error}. Expected a file exported by "
            "autoft; export it again."
        ) from error
    _check_shapes(file, session, len(classes), pre)
    return OnnxModel(session, classes, pre)


def top(prediction: Prediction, classes: Sequence[str], k: int) -> list[tuple[str, float]]:
    """Return the `k` likeliest labels with their probabilities; none for an unreadable file."""
    ranked = zip(classes, prediction.probabilities, strict=False)
    return sorted(ranked, key=lambda pair: -pair[1])[:k]


def write_csv(
    path: Path, predictions: Iterable[Prediction], classes: Sequence[str], k: int
) -> None:
    """Write path,label,probability[,label_2,probability_2...],error, `k` labels a row.

    Text that a spreadsheet would run as a formula gets a leading apostrophe. Names that are not
    UTF-8 are written with backslashes.
    """
    k = max(1, min(k, len(classes)))
    suffixes = ["", *(f"_{rank}" for rank in range(2, k + 1))]
    names = [f"{name}{suffix}" for suffix in suffixes for name in ("label", "probability")]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", *names, "error"])
    for prediction in predictions:
        ranked = top(prediction, classes, k)
        cells = [cell for label, p in ranked for cell in (inert(label), f"{p:.6f}")]
        cells += [""] * (len(names) - len(cells))
        writer.writerow([inert(str(prediction.path)), *cells, inert(prediction.error)])
    write_bytes_atomic(path, text.getvalue().encode("utf-8", "backslashreplace"))


def _messages(message: Message) -> Iterator[Any]:
    """Yield a protobuf message and all inside it, without looking into tensors."""
    yield message
    if isinstance(message, onnx.TensorProto):
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if isinstance(value, Message) else value:
                yield from _messages(part)


def _find(path: Path) -> Path:
    if not path.exists():
        raise DataError(
            f"{path} does not exist; expected a run folder, an artifact folder or an .onnx "
            "file. Check the spelling, or run `autoft search` first."
        )
    if path.is_file():
        if path.suffix != ".onnx":
            raise UsageError(f"{path} is no .onnx file; give {MODEL_FILE} or its folder.")
        return path
    for file in (path / "best" / MODEL_FILE, path / MODEL_FILE):
        if file.is_file():
            return file
    raise UsageError(
        f"{path} holds neither best/{MODEL_FILE} nor {MODEL_FILE}; expected a run folder or an "
        "artifact folder. If the search of this folder has not finished, repeat its command."
    )


def _inspect(file: Path, content: bytes) -> tuple[tuple[str, ...], Preprocess]:
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise DataError(
            f"{file} is no ONNX file, or it is damaged ({error}). Export it again."
        ) from error
    for part in _messages(model):
        if isinstance(part, onnx.TensorProto) and (
            part.data_location == onnx.TensorProto.EXTERNAL or part.external_data
        ):
            raise DataError(
                f"{file} keeps the tensor {part.name!r} in another file, which is refused: it "
                "could be any file of this machine. Expected one file; export it again."
            )
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    try:
        return _classes(metadata[CLASSES]), _preprocess(metadata[PREPROCESS])
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{file} does not say its {CLASSES} and {PREPROCESS} "
            f"({type(error).__name__}: {error}). Expected a file exported by autoft; without "
            "them labels and preprocessing would be guesses."
        ) from error


def _classes(text: str) -> tuple[str, ...]:
    classes = json.loads(text)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("the classes are no list of names")
    return tuple(classes)


def _preprocess(text: str) -> Preprocess:
    data = json.loads(text)
    known = {field.name: data[field.name] for field in fields(Preprocess)}
    known |= {name: tuple(float(part) for part in known[name]) for name in ("mean", "std")}
    pre = Preprocess(**known)
    sizes_fit = 1 <= int(pre.image_size) <= int(pre.resize)
    if not (sizes_fit and len(pre.mean) == len(pre.std) == 3):
        raise ValueError(f"impossible sizes in {pre}")
    if pre.interpolation not in INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {pre.interpolation!r}")
    return pre


def _check_shapes(
    file: Path, session: onnxruntime.InferenceSession, count: int, pre: Preprocess
) -> None:
    found = [
        (port.name, port.shape[1:]) for port in (*session.get_inputs(), *session.get_outputs())
    ]
    size = pre.image_size
    expected = [("images", [3, size, size]), ("logits", [count])]
    if found != expected:
        raise DataError(
            f"{file} has the inputs and outputs {found}; its own metadata make it {expected}. "
            "Expected a file exported by autoft; export it again."
        )
