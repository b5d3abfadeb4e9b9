"""Named defaults, a few per size tier: well-proven networks with weights that are free to use.

`tier` is a fixed option that the search reads from the signature: a search on a CPU takes the
tier "nano", longer ones and GPUs take more. A third-party backbone that states a tier joins it.
`model` names timm's architecture and the tag of its weights; `top1` is what these score on
ImageNet-1k in per cent, from timm's table of results, by which backbones are told apart before any
image is seen.
"""

from __future__ import annotations

from autoft.backbones.files import locate
from autoft.backbones.timm import timm
from autoft.values import Backbone
from autoft.weights import published


@published(locate)
def mobilenetv4_conv_small(
    *,
    model: str = "mobilenetv4_conv_small.e2400_r224_in1k",
    pretrained: bool = True,
    tier: str = "nano",
    top1: float = 73.8,
) -> Backbone:
    """Build MobileNetV4-conv-small: 2.5M parameters, ImageNet-1k."""
    return timm(model=model, pretrained=pretrained)


@published(locate)
def mobilenetv3_large_100(
    *,
    model: str = "mobilenetv3_large_100.ra_in1k",
    pretrained: bool = True,
    tier: str = "nano",
    top1: float = 75.8,
) -> Backbone:
    """Build MobileNetV3-large: 4.2M parameters, ImageNet-1k."""
    return timm(model=model, pretrained=pretrained)


@published(locate)
def resnet18(
    *,
    model: str = "resnet18.a1_in1k",
    pretrained: bool = True,
    tier: str = "nano",
    top1: float = 73.2,
) -> Backbone:
    """Build ResNet-18: 11M parameters, ImageNet-1k."""
    return timm(model=model, pretrained=pretrained)


@published(locate)
def efficientnet_b0(
    *,
    model: str = "efficientnet_b0.ra_in1k",
    pretrained: bool = True,
    tier: str = "small",
    top1: float = 77.7,
) -> Backbone:
    """Build EfficientNet-B0: 4.0M parameters, ImageNet-1k."""
    return timm(model=model, pretrained=pretrained)


@published(locate)
def convnext_nano(
    *,
    model: str = "convnext_nano.in12k_ft_in1k",
    pretrained: bool = True,
    tier: str = "small",
    top1: float = 82.9,
) -> Backbone:
    """Build ConvNeXt-nano: 15M parameters, ImageNet-12k then 1k."""
    return timm(model=model, pretrained=pretrained)


@published(locate)
def resnet50(
    *,
    model: str = "resnet50.a1_in1k",
    pretrained: bool = True,
    tier: str = "small",
    top1: float = 81.2,
) -> Backbone:
    """Build ResNet-50: 24M parameters, ImageNet-1k."""
    return timm(model=model, pretrained=pretrained)


@published(locate)
def convnext_tiny(
    *,
    model: str = "convnext_tiny.in12k_ft_in1k",
    pretrained: bool = True,
    tier: str = "base",
    top1: float = 84.5,
) -> Backbone:
    """Build ConvNeXt-tiny: 28M parameters, ImageNet-12k then 1k."""
    return timm(model=model, pretrained=pretrained)


@published(locate)
def vit_small(
    *,
    model: str = "vit_small_patch16_224.augreg_in21k_ft_in1k",
    image_size: int = 224,
    pretrained: bool = True,
    tier: str = "base",
    top1: float = 81.4,
) -> Backbone:
    """Build ViT-S/16: 22M parameters, ImageNet-21k then 1k."""
    return timm(model=model, image_size=image_size, pretrained=pretrained)


@published(locate)
def convnext_base(
    *,
    model: str = "convnext_base.fb_in22k_ft_in1k",
    pretrained: bool = True,
    tier: str = "large",
    top1: float = 86.3,
) -> Backbone:
    """Build ConvNeXt-base: 88M parameters, ImageNet-22k then 1k."""
    return timm(model=model, pretrained=pretrained)


@published(locate)
def vit_base(
    *,
    model: str = "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    image_size: int = 224,
    pretrained: bool = True,
    tier: str = "large",
    top1: float = 85.1,
) -> Backbone:
    """Build ViT-B/16: 86M parameters, ImageNet-21k then 1k."""
    return timm(model=model, image_size=image_size, pretrained=pretrained)
