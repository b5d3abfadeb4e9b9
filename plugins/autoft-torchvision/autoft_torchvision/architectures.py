"""torchvision's architectures without their classifiers, and their stages.

Parameters keep torchvision's names, so that any file of weights made with torchvision fits; what
it holds under `classifier`, `fc`, `head` or `heads` has no counterpart here and is left out.

A stage ends where the resolution changes: four or five in a convolutional network, so that a
freeze depth means about the same on all of them. A ViT has one resolution; its twelve layers go in
pairs behind the patch embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torchvision.models import get_model, vgg
from torchvision.models.convnext import LayerNorm2d

from autoft import UsageError

Stages = tuple[tuple[str, ...], ...]

VGG_LAYERS = {"vgg16": "D", "vgg19": "E"}  # torchvision's letters for the depths of VGG
PYRAMID: Stages = (  # ConvNeXt and Swin: each downsampling belongs to the stage that it opens
    ("features.0",),
    ("features.1",),
    ("features.2", "features.3"),
    ("features.4", "features.5"),
    ("features.6", "features.7"),
)


class Body(NamedTuple):
    """A network without its classifier: images (N, 3, H, W) -> features (N, num_features)."""

    module: nn.Module
    stages: Stages
    num_features: int


class Averaged(nn.Module):
    """Convolutional features (N, F, h, w), averaged over space to (N, F)."""

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to features (N, F)."""
        features: Tensor = self.avgpool(self.features(images))
        return features.flatten(1)


def body_of(name: str, image_size: int = 0) -> Body:
    """Build torchvision's architecture `name` with random weights and without its classifier.

    Raises:
        UsageError: `image_size` (pixels) does not fit the architecture.
    """
    if name == "vit_b_16":
        return vit(name, image_size)
    family = next(start for start in FAMILIES if name.startswith(start))
    return FAMILIES[family](name)


def vgg_body(name: str) -> Body:
    """Build the convolutions of a VGG, averaged over space: 512 features.

    torchvision's own VGG flattens 7 x 7 positions to 25,088 features for a classifier of 124M
    parameters, which is not built here; the start values of the convolutions are the same.
    """
    plain = name.removesuffix("_bn")
    features = vgg.make_layers(vgg.cfgs[VGG_LAYERS[plain]], batch_norm=name.endswith("_bn"))
    for layer in features:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return Body(Averaged(features), _split(features, _is_pool), 512)


def squeezenet(name: str) -> Body:
    """Build a SqueezeNet up to its last fire module: 512 features."""
    features: nn.Sequential = get_model(name, weights=None).features
    return Body(Averaged(features), _split(features, _is_pool), 512)


def resnet(name: str) -> Body:
    """Build a ResNet without `fc`."""
    module = get_model(name, weights=None)
    num_features: int = module.fc.in_features
    module.fc = nn.Identity()
    stem = ("conv1", "bn1")
    return Body(module, (stem, ("layer1",), ("layer2",), ("layer3",), ("layer4",)), num_features)


def mobile(name: str) -> Body:
    """Build a MobileNet or an EfficientNet up to its pooled features, without `classifier`."""
    module = get_model(name, weights=None)
    num_features: int = module.features[-1].out_channels
    module.classifier = nn.Identity()
    return Body(module, _split(module.features, _halves), num_features)


def convnext(name: str) -> Body:
    """Build a ConvNeXt without `classifier`; its final norm stays, without scale and shift.

    torchvision keeps the final norm inside `classifier`. A head that begins with a linear map can
    express its scale and shift; without the norm itself, features would differ wildly in size.
    """
    module = get_model(name, weights=None)
    num_features: int = module.classifier[-1].in_features
    norm = LayerNorm2d(num_features, eps=module.classifier[0].eps, elementwise_affine=False)
    module.classifier = nn.Sequential(norm, nn.Flatten(1))
    return Body(module, PYRAMID, num_features)


def swin(name: str) -> Body:
    """Build a Swin transformer without `head`."""
    module = get_model(name, weights=None)
    num_features: int = module.head.in_features
    module.head = nn.Identity()
    return Body(module, (*PYRAMID[:-1], (*PYRAMID[-1], "norm")), num_features)


def vit(name: str, image_size: int) -> Body:
    """Build a vision transformer for images of `image_size` pixels, without `heads`.

    Raises:
        UsageError: `image_size` is no multiple of the patch size.
    """
    if image_size <= 0 or image_size % 16:
        raise UsageError(
            f"tv_{name} cuts images into patches of 16 pixels, and image_size={image_size} is no "
            f"multiple of 16. Choose {max(16, round(image_size / 16) * 16)}."
        )
    module = get_model(name, weights=None, image_size=image_size)
    module.heads = nn.Identity()
    embedding = ("class_token", "conv_proj", "encoder.pos_embedding")
    layers = [f"encoder.layers.{layer}" for layer, _ in module.encoder.layers.named_children()]
    pairs = [tuple(layers[start : start + 2]) for start in range(0, len(layers), 2)]
    stages = (embedding, *pairs[:-1], (*pairs[-1], "encoder.ln"))
    return Body(module, stages, module.hidden_dim)


FAMILIES: dict[str, Callable[[str], Body]] = {
    "vgg": vgg_body,
    "resnet": resnet,
    "squeezenet": squeezenet,
    "mobilenet": mobile,
    "efficientnet": mobile,
    "convnext": convnext,
    "swin": swin,
}


def _split(features: nn.Sequential, begins: Callable[[nn.Module], bool]) -> Stages:
    """Cut `features` before every child for which `begins` is true."""
    stages: list[list[str]] = [[]]
    for name, child in features.named_children():
        if begins(child) and stages[-1]:
            stages.append([])
        if next(child.parameters(), None) is not None:
            stages[-1].append(f"features.{name}")
    return tuple(tuple(stage) for stage in stages if stage)


def _is_pool(module: nn.Module) -> bool:
    return isinstance(module, nn.MaxPool2d)


def _halves(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in module.modules())
