"""One self-contained ONNX file: the network, its classes and its preprocessing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Final

import onnx
import torch
from torch import nn

from autoft.data.cache.files import write_bytes_atomic
from autoft.errors import MachineError
from autoft.export.pt2 import exporting, quiet, to_program
from autoft.export.runtime import CLASSES, PREPROCESS
from autoft.values import Preprocess

# A protobuf message ends at 2 GiB; 32 MiB are left for the graph beside the weights.
MAX_BYTES: Final = 2**31 - 2**25
RULE: Final = (
    "Decode the first frame, apply the EXIF orientation, composite alpha on white, convert to "
    "8-bit RGB, resize the centre square of the shorter side's length to (resize, resize) with "
    "antialiasing, crop the centre (image_size, image_size), divide by 255, subtract mean, "
    "divide by std, order as channels, height, width."
)


def to_onnx(model: nn.Module, path: Path, pre: Preprocess, metadata: Mapping[str, str]) -> None:
    """Write `model` as one ONNX file: "images" float32 (N, 3, S, S) to "logits" (N, C), any N.

    `metadata` is stored in the file as `metadata_props`; `metadata_of` makes it.

    Raises:
        MachineError: the weights do not fit into one ONNX file (2 GB).
        PluginError: the exporter cannot follow the network.
    """
    _check_size(model)
    with exporting("ONNX", model), quiet():
        program = torch.onnx.export(
            to_program(model, pre),
            (),
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
        )
        if program is None:
            raise RuntimeError("torch.onnx.export returned no program")
        proto = program.model_proto
        onnx.helper.set_model_props(proto, dict(metadata))
        content = proto.SerializeToString()
    write_bytes_atomic(path, content)


def metadata_of(
    classes: Sequence[str], pre: Preprocess, extra: Mapping[str, str]
) -> dict[str, str]:
    """Return what makes an exported file usable alone: classes in index order, preprocessing.

    All values are text; JSON in ASCII, so that every folder name survives, UTF-8 or not.
    """
    return {
        CLASSES: json.dumps(list(classes)),
        PREPROCESS: json.dumps(asdict(pre) | {"rule": RULE}),
        "autoft.version": version("autoft"),
        **extra,
    }


def _check_size(model: nn.Module) -> None:
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(4 * tensor.numel() for tensor in tensors)
    if size > MAX_BYTES:
        raise MachineError(
            f"The weights take {size / 2**30:.2f} GiB and one ONNX file holds at most "
            f"{MAX_BYTES / 2**30:.2f} GiB. Use the pt2 file, or search smaller backbones."
        )
