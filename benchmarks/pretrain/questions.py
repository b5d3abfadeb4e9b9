"""What the network is asked of a generated image, and how wrong its answers are."""

from __future__ import annotations

from typing import Final

import torch
from rendering import TASKS, UNKNOWN, Rendered
from shapes import NUM_CLASSES
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from autoft.backbones.mini import STAGES, autoft_mini

PROJECTED = 128
TEMPERATURE = 0.15
OBJECTS_WEIGHT = 2.0  # which objects are seen counts as two questions
WIDTH: Final = STAGES[-1][0]


class Pretrained(nn.Module):
    """The backbone, a linear answer to each question, and a projection for contrast."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = autoft_mini(pretrained=False).module
        self.answers = nn.Linear(WIDTH, sum(TASKS.values()))
        self.objects = nn.Linear(WIDTH, NUM_CLASSES)
        self.projection = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, PROJECTED)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return answers (N, sum of tasks), objects (N, classes), projections (N, PROJECTED)."""
        features = self.backbone(images).float()
        with torch.autocast(images.device.type, enabled=False):  # few numbers, and all count
            return self.answers(features), self.objects(features), self.projection(features)


def losses(
    model: nn.Module, batch: Rendered, images: Tensor, contrast: float
) -> dict[str, Tensor]:
    """Return the loss of each question, and with `contrast` that of pairs of views."""
    answers, objects, projected = model(images)
    found: dict[str, Tensor] = {}
    for index, (name, logits) in enumerate(
        zip(TASKS, answers.split(list(TASKS.values()), dim=1), strict=True)
    ):
        total = F.cross_entropy(
            logits, batch.answers[:, index], ignore_index=UNKNOWN, reduction="sum"
        )
        found[name] = total / (batch.answers[:, index] != UNKNOWN).sum().clamp(min=1)
    number = batch.present.sum(1, keepdim=True)
    target = batch.present / number.clamp(min=1)  # each object that is seen, alike
    total = -(target * objects.log_softmax(dim=1)).sum()
    found["objects"] = OBJECTS_WEIGHT * total / (number > 0).sum().clamp(min=1)
    if contrast:
        found["contrast"] = contrast * info_nce(projected)
    return found


def info_nce(projected: Tensor) -> Tensor:
    """Return how badly the two views of an image, half a batch apart, find each other."""
    unit = F.normalize(projected, dim=1)
    with torch.autocast(projected.device.type, enabled=False):
        alike = unit @ unit.T / TEMPERATURE
    alike.fill_diagonal_(-1e4)
    count = len(unit)
    other = torch.arange(count, device=unit.device).roll(count // 2)
    return F.cross_entropy(alike, other)
