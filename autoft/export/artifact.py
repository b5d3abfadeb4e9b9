"""The artifact folder: weights, the exported files by name, and a README that is enough."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from autoft.data.cache.files import write_bytes_atomic, write_json_atomic
from autoft.errors import DataError
from autoft.export.onnx import RULE, to_onnx
from autoft.export.pt2 import to_pt2
from autoft.export.torchscript import to_torchscript
from autoft.values import Preprocess

Exporter = Callable[[nn.Module, Path, Preprocess, Mapping[str, str]], None]

FORMATS: Final[dict[str, tuple[str, Exporter]]] = {
    "onnx": ("model.onnx", to_onnx),
    "torchscript": ("model.ts", to_torchscript),
    "pt2": ("model.pt2", to_pt2),
}
_SHOWN: Final = 5  # tensors named in an error


def write_weights(model: nn.Module, path: Path) -> None:
    """Write all parameters and buffers as safetensors, floating ones as float32.

    Tensors that share memory are written once each under every name, which `load_weights` needs.
    """
    write_bytes_atomic(path, save({k: _plain(v) for k, v in model.state_dict().items()}))


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` in place from safetensors; names and shapes must be exactly the model's.

    Device and dtype stay the model's.

    Raises:
        DataError: the file is missing, damaged, or of another network (the tensors are named).
    """
    try:
        found = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"The weights {path} cannot be read: {error}. Expected a safetensors file written "
            "by autoft; restore it, or repeat the search."
        ) from error
    expected = model.state_dict()
    common = sorted(found.keys() & expected.keys())
    faults = [
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} is unknown to the network" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in common
            if found[name].shape != expected[name].shape
        ),
    ]
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise DataError(
            f"The weights {path} belong to another network: {'; '.join(faults[:_SHOWN])}{more}. "
            f"Expected the {len(expected)} tensors of {type(model).__name__}; use the weights "
            "of the same backbone, head and number of classes."
        )
    model.load_state_dict(found)


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write `model.json` and `README.md`, what a stranger needs to use the model and judge it.

    `card` has the keys backbone, strategy, head, params, classes, preprocess, metric, score,
    test {value, low, high, n} or None, source, license, versions and parity (list of objects).
    """
    write_json_atomic(folder / "model.json", card)
    # Class names are folder names: not always UTF-8.
    write_bytes_atomic(folder / "README.md", _readme(card).encode("utf-8", "backslashreplace"))


def _plain(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def _readme(card: Mapping[str, Any]) -> str:
    classes = card["classes"]
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    return _README.format(
        backbone=card["backbone"],
        strategy=card["strategy"],
        head=card["head"],
        params=_block(card["params"]),
        count=len(classes),
        classes=_block(classes),
        metric=card["metric"],
        score=card["score"],
        test=_test(card["test"], card["metric"]),
        snippet=SNIPPET,
        preprocess=_block(card["preprocess"]),
        rule=RULE,
        parity=_parity(card["parity"]),
        source=card["source"] or "unknown",
        license=card["license"] or "not stated by the plugin",
        versions=versions,
    )


def _test(test: Mapping[str, Any] | None, metric: str) -> str:
    if test is None:
        return "It was not measured on test images."
    return (
        f"On {test['n']} test images, read once and never used for training or choosing, its "
        f"{metric} is **{test['value']:.4f}** (95 % interval {test['low']:.4f} to "
        f"{test['high']:.4f})."
    )


def _parity(parities: Sequence[Mapping[str, Any]]) -> str:
    if not parities:
        return "No exported file was compared with the trained network."
    rows = [
        f"| {p['format']} | {p['n']} | {p['label_agreement']:.2%} | "
        f"{p['max_probability_difference']:.1e} | {'passed' if p['passed'] else 'FAILED'} |"
        for p in parities
    ]
    head = "| format | images | equal labels | largest difference of a probability | proof |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def _block(value: object) -> str:
    """Return JSON on one line: as a code block it makes any class name inert in Markdown."""
    return "    " + json.dumps(value, ensure_ascii=False)


SNIPPET: Final = """\
import json, sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx")
meta = session.get_modelmeta().custom_metadata_map
classes, pre = json.loads(meta["autoft.classes"]), json.loads(meta["autoft.preprocess"])
image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
method = Image.Resampling[pre["interpolation"].upper()]
image = ImageOps.fit(image, (pre["resize"], pre["resize"]), method)
start, size = (pre["resize"] - pre["image_size"]) // 2, pre["image_size"]
pixels = np.float32(image)[start : start + size, start : start + size] / 255
pixels = (pixels - np.float32(pre["mean"])) / np.float32(pre["std"])
logits = session.run(["logits"], {"images": pixels.transpose(2, 0, 1)[None]})[0][0]
probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
for index in probabilities.argsort()[::-1][:3]:
    print(f"{probabilities[index]:.6f}", classes[index])
"""

_README: Final = """\
# An image classifier made by autoft

A `{backbone}` backbone with a `{head}` head, fine-tuned with the strategy `{strategy}`, tells
{count} classes apart. {test}
On the validation images it was chosen by, its {metric} is {score:.4f}, which flatters it.

Classes, in the order of the outputs:

{classes}

## Predict

In this folder, with autoft:

    autoft predict . image.jpg

Without autoft, `pip install onnxruntime numpy pillow` and `python snippet.py image.jpg` with
this as `snippet.py` (for images of 8 bits a channel; autoft itself scales 16 bits):

```python
{snippet}```

## Preprocessing

{rule}

{preprocess}

## The files

`model.onnx` needs only onnxruntime and knows its classes and preprocessing. `model.safetensors`
holds the weights that were scored. `model.pt2` (torch.export) and `model.ts` (TorchScript), where
present, can execute code when loaded: take them from nobody you do not trust. Each exported
file was compared with the trained network on the same images:

{parity}

## Where it comes from

Pre-trained weights: {source}. License of those weights: {license}.
Made with {versions}. Hyperparameters:

{params}
"""
