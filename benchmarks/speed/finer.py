"""A plugin of the benchmark: mobile networks of timm with every row of blocks as a stage.

autoft's own stages begin where the resolution falls. These are what a package may declare that
wants deeper cuts: the last stage is what lies behind the last row but one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from autoft import plugins
from autoft.backbones.timm import timm
from autoft.values import Backbone

NAME = "finer"
ROWS = "blocks"


def finer(*, model: str = "", pretrained: bool = False) -> Backbone:
    """Build an EfficientNet or MobileNetV3 of timm: a stem, and a stage for each row of blocks."""
    backbone = timm(model=model, pretrained=pretrained)
    named = dict(backbone.module.named_children())
    names = [name for name, each in named.items() if any(True for _ in each.parameters())]
    at = names.index(ROWS)
    rows = [[f"{ROWS}.{name}"] for name, _ in named[ROWS].named_children()]
    stages = [names[:at], *rows[:-1], [*rows[-1], *names[at + 1 :]]]
    return Backbone(backbone.module, stages, backbone.num_features, backbone.image_size)


def install(folder: Path) -> None:
    """Lay a package with this plugin into `folder`, and that on the path."""
    info = folder / f"{NAME}_stages-1.0.dist-info"
    info.mkdir(parents=True)
    told = f"Metadata-Version: 2.1\nName: {NAME}-stages\nVersion: 1.0\n"
    (info / "METADATA").write_text(told, encoding="utf-8")
    entries = f"[autoft.backbones]\n{NAME} = {__name__}:{finer.__name__}\n"
    (info / "entry_points.txt").write_text(entries, encoding="utf-8")
    sys.path.append(str(folder))
    plugins.installed.cache_clear()
