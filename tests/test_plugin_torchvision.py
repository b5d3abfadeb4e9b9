"""The torchvision plugin with the real weights beside the checkout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoft import plugins
from autoft.network.build import build
from autoft.network.sources import in_folder
from autoft.network.weights import load_weights

NAME = "squeezenet1_0.in1k"


@pytest.mark.shared
def test_published_squeezenet_fits_but_for_its_classifier(shared_root):
    backbone = plugins.load("backbone", "tv_squeezenet1_0")(pretrained=False)
    left_out = load_weights(backbone.module, shared_root / "weights" / NAME / "model.safetensors")
    assert {name.partition(".")[0] for name in left_out} == {"classifier"}


@pytest.mark.shared
def test_published_squeezenet_tells_photographs_apart_where_random_weights_do_not(shared_root):
    from PIL import Image

    local, _ = in_folder(shared_root / "weights")

    def features(*, pretrained: bool):
        torch.manual_seed(0)
        backbone = build(local[NAME], pretrained=pretrained)
        rows = []
        for label in ("ants", "bees"):
            files = sorted((shared_root / "data/hymenoptera/train" / label).glob("*.jpg"))[:40]
            for file in files:
                with Image.open(file) as image:
                    pixels = np.asarray(image.convert("RGB").resize((128, 128)), np.float32) / 255
                rows.append((pixels - backbone.mean) / backbone.std)
        images = torch.tensor(np.stack(rows), dtype=torch.float32).permute(0, 3, 1, 2)
        with torch.no_grad():
            found = backbone.module.eval()(images)
        return torch.nn.functional.normalize(found - found.mean(0), dim=1)

    def nearest_neighbour(rows) -> float:
        labels = torch.arange(80) // 40
        likeness = rows @ rows.T
        likeness.fill_diagonal_(-1)
        return float((labels[likeness.argmax(1)] == labels).float().mean())

    assert nearest_neighbour(features(pretrained=True)) > 0.75
    assert nearest_neighbour(features(pretrained=False)) < 0.75
