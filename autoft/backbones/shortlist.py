"""Named defaults, a few per size tier: well-proven networks with weights that are free to use.

`tier` is a fixed option that the search reads from the signature: a search on a CPU takes the
tier "nano", longer ones and GPUs take more. A third-party backbone that states a tier joins it.
"""

from __future__ import annotations

from autoft.backbones.timm import timm
from autoft.values import Backbone


def mobilenetv4_conv_small(*, pretrained: bool = True, tier: str = "nano") -> Backbone:
    """Build MobileNetV4-conv-small: 2.5M parameters, ImageNet-1k."""
    return timm(model="mobilenetv4_conv_small.e2400_r224_in1k", pretrained=pretrained)


def mobilenetv3_large_100(*, pretrained: bool = True, tier: str = "nano") -> Backbone:
    """Build MobileNetV3-large: 4.2M parameters, ImageNet-1k."""
    return timm(model="mobilenetv3_large_100.ra_in1k", pretrained=pretrained)


def resnet18(*, pretrained: bool = True, tier: str = "nano") -> Backbone:
    """Build ResNet-18: 11M parameters, ImageNet-1k."""
    return timm(model="resnet18.a1_in1k", pretrained=pretrained)


def efficientnet_b0(*, pretrained: bool = True, tier: str = "small") -> Backbone:
    """Build EfficientNet-B0: 4.0M parameters, ImageNet-1k."""
    return timm(model="efficientnet_b0.ra_in1k", pretrained=pretrained)


def convnext_nano(*, pretrained: bool = True, tier: str = "small") -> Backbone:
    """Build ConvNeXt-nano: 15M parameters, ImageNet-12k then 1k."""
    return timm(model="convnext_nano.in12k_ft_in1k", pretrained=pretrained)


def resnet50(*, pretrained: bool = True, tier: str = "small") -> Backbone:
    """Build ResNet-50: 24M parameters, ImageNet-1k."""
    return timm(model="resnet50.a1_in1k", pretrained=pretrained)


def convnext_tiny(*, pretrained: bool = True, tier: str = "base") -> Backbone:
    """Build ConvNeXt-tiny: 28M parameters, ImageNet-12k then 1k."""
    return timm(model="convnext_tiny.in12k_ft_in1k", pretrained=pretrained)


def vit_small(*, image_size: int = 224, pretrained: bool = True, tier: str = "base") -> Backbone:
    """Build ViT-S/16: 22M parameters, ImageNet-21k then 1k."""
    name = "vit_small_patch16_224.augreg_in21k_ft_in1k"
    return timm(model=name, image_size=image_size, pretrained=pretrained)


def convnext_base(*, pretrained: bool = True, tier: str = "large") -> Backbone:
    """Build ConvNeXt-base: 88M parameters, ImageNet-22k then 1k."""
    return timm(model="convnext_base.fb_in22k_ft_in1k", pretrained=pretrained)


def vit_base(*, image_size: int = 224, pretrained: bool = True, tier: str = "large") -> Backbone:
    """Build ViT-B/16: 86M parameters, ImageNet-21k then 1k."""
    name = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    return timm(model=name, image_size=image_size, pretrained=pretrained)
