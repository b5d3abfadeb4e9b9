"""Join an architecture, its weights and what they were trained with into a Backbone."""

from __future__ import annotations

from typing import Any

from torchvision.models import WeightsEnum, get_model_weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from autoft import Backbone
from autoft.weights import Function, Weights, published
from autoft_torchvision.architectures import Body, body_of, resnet
from autoft_torchvision.weights import fetch, fetch_coco_body, fit, published_file

PREFIX = "tv_"
COCO_IMAGE_SIZE = 224


def from_torchvision(function: Function) -> Function:
    """Let a backbone's function tell the file that torchvision publishes for it, by its name."""

    def locate() -> Weights:
        return published_file(get_model_weights(name).DEFAULT, f"{PREFIX}{name}", "in1k")

    name = function.__name__.removeprefix(PREFIX)
    return published(locate)(function)


def locate_coco() -> Weights:
    """Return the file of the Faster R-CNN that holds the ResNet-50 trained on COCO."""
    weights = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    return published_file(weights, "tv_resnet50_coco", "coco")


def build(name: str, *, pretrained: bool, image_size: int = 0) -> Backbone:
    """Build torchvision's `name` with its recommended ImageNet weights, or with random ones.

    `image_size` (pixels) is for networks whose position embedding has a fixed size.

    Raises:
        MachineError: the weights are neither cached nor to be had.
        UsageError: `image_size` does not fit the architecture.
    """
    weights: WeightsEnum = get_model_weights(name).DEFAULT
    state = fetch(weights, f"{PREFIX}{name}") if pretrained else {}
    body = body_of(name, image_size)
    if pretrained:
        body.module.load_state_dict(fit(state, body.module, image_size))
    return _describe(body, weights, image_size)


def _describe(body: Body, weights: WeightsEnum, image_size: int) -> Backbone:
    view: Any = weights.transforms()
    return Backbone(
        module=body.module,
        stages=body.stages,
        num_features=body.num_features,
        image_size=image_size or view.crop_size[0],
        mean=tuple(view.mean),
        std=tuple(view.std),
        interpolation=view.interpolation.value,
        crop=view.crop_size[0] / view.resize_size[0],
        source="in1k",
    )


def build_coco(*, pretrained: bool) -> Backbone:
    """Build the ResNet-50 body of Faster R-CNN with its COCO weights, or with random ones.

    The detector saw whole images of 800 pixels; 224 is a size at which classifying is affordable.

    Raises:
        MachineError: the weights are neither cached nor to be had.
    """
    weights = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    state = fetch_coco_body(weights, "tv_resnet50_coco") if pretrained else {}
    body = resnet("resnet50")
    if pretrained:
        body.module.load_state_dict(fit(state, body.module))
    return Backbone(
        module=body.module,
        stages=body.stages,
        num_features=body.num_features,
        image_size=COCO_IMAGE_SIZE,
        source="coco",
    )
