"""The torchvision plugin with the real weights beside the checkout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from autoft.network.build import build
from autoft.network.sources import in_folder
from autoft.network.weights import load_weights
from autoft.plugins import load
from autoft.values import Backbone

NAME = "squeezenet1_0.in1k"
BEE, ANT = 309, 310  # classes of ImageNet-1k


def photographs(folder: Path, backbone: Backbone) -> Tensor:
    rows = []
    for file in sorted(folder.glob("*.jpg"))[:30]:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB").resize((224, 224)), np.float32) / 255
        rows.append((pixels - np.float32(backbone.mean)) / np.float32(backbone.std))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)


@pytest.mark.shared
def test_published_squeezenet_fits_but_for_its_classifier(shared_root):
    backbone = load("backbone", "tv_squeezenet1_0")(pretrained=False)
    left_out = load_weights(backbone.module, shared_root / "weights" / NAME / "model.safetensors")
    assert {name.partition(".")[0] for name in left_out} == {"classifier"}


@pytest.mark.shared
def test_published_squeezenet_and_its_classifier_know_ants_from_bees(shared_root):
    local, _ = in_folder(shared_root / "weights")
    backbone = build(local[NAME])
    state = load_file(shared_root / "weights" / NAME / "model.safetensors")
    weight, bias = (state[f"classifier.1.{part}"].float() for part in ("weight", "bias"))

    def share_of_ants(label: str) -> float:
        images = photographs(shared_root / "data" / "hymenoptera" / "train" / label, backbone)
        with torch.no_grad():
            features = backbone.module.eval().features(images)
        scores = torch.nn.functional.conv2d(features, weight, bias).relu().mean((2, 3))
        return float((scores[:, ANT] > scores[:, BEE]).float().mean())

    assert share_of_ants("ants") > 0.8
    assert share_of_ants("bees") < 0.2
