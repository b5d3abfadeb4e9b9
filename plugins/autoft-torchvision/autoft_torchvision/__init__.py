"""The backbones of torchvision for autoft: one function for each, named `tv_` and its name there.

The prefix keeps them apart from timm's architectures, which have the same names.
"""

from __future__ import annotations

from autoft import Backbone
from autoft.weights import published
from autoft_torchvision.build import build, build_coco, from_torchvision, locate_coco


@from_torchvision
def tv_vgg16(*, pretrained: bool = True) -> Backbone:
    """Build VGG-16: 14.7M parameters, ImageNet-1k; its features are averaged to 512."""
    return build("vgg16", pretrained=pretrained)


@from_torchvision
def tv_vgg16_bn(*, pretrained: bool = True) -> Backbone:
    """Build VGG-16 with batch norm: 14.7M parameters, ImageNet-1k; features averaged to 512."""
    return build("vgg16_bn", pretrained=pretrained)


@from_torchvision
def tv_vgg19(*, pretrained: bool = True) -> Backbone:
    """Build VGG-19: 20.0M parameters, ImageNet-1k; its features are averaged to 512."""
    return build("vgg19", pretrained=pretrained)


@from_torchvision
def tv_vgg19_bn(*, pretrained: bool = True) -> Backbone:
    """Build VGG-19 with batch norm: 20.0M parameters, ImageNet-1k; features averaged to 512."""
    return build("vgg19_bn", pretrained=pretrained)


@from_torchvision
def tv_resnet18(*, pretrained: bool = True) -> Backbone:
    """Build ResNet-18: 11.2M parameters, ImageNet-1k."""
    return build("resnet18", pretrained=pretrained)


@from_torchvision
def tv_resnet34(*, pretrained: bool = True) -> Backbone:
    """Build ResNet-34: 21.3M parameters, ImageNet-1k."""
    return build("resnet34", pretrained=pretrained)


@from_torchvision
def tv_resnet50(*, pretrained: bool = True) -> Backbone:
    """Build ResNet-50: 23.5M parameters, ImageNet-1k."""
    return build("resnet50", pretrained=pretrained)


@published(locate_coco)
def tv_resnet50_coco(*, pretrained: bool = True) -> Backbone:
    """Build the ResNet-50 body of Faster R-CNN (FPN): 23.5M parameters, COCO detection.

    Its frozen batch norms become ordinary ones with the same statistics, which can be tuned.
    """
    return build_coco(pretrained=pretrained)


@from_torchvision
def tv_resnet101(*, pretrained: bool = True) -> Backbone:
    """Build ResNet-101: 42.5M parameters, ImageNet-1k."""
    return build("resnet101", pretrained=pretrained)


@from_torchvision
def tv_resnet152(*, pretrained: bool = True) -> Backbone:
    """Build ResNet-152: 58.1M parameters, ImageNet-1k."""
    return build("resnet152", pretrained=pretrained)


@from_torchvision
def tv_squeezenet1_0(*, pretrained: bool = True) -> Backbone:
    """Build SqueezeNet 1.0: 0.7M parameters, ImageNet-1k."""
    return build("squeezenet1_0", pretrained=pretrained)


@from_torchvision
def tv_squeezenet1_1(*, pretrained: bool = True) -> Backbone:
    """Build SqueezeNet 1.1: 0.7M parameters, ImageNet-1k; 2.4 times less computation than 1.0."""
    return build("squeezenet1_1", pretrained=pretrained)


@from_torchvision
def tv_mobilenet_v2(*, pretrained: bool = True) -> Backbone:
    """Build MobileNetV2: 2.2M parameters, ImageNet-1k."""
    return build("mobilenet_v2", pretrained=pretrained)


@from_torchvision
def tv_mobilenet_v3_small(*, pretrained: bool = True) -> Backbone:
    """Build MobileNetV3-small: 0.9M parameters, ImageNet-1k."""
    return build("mobilenet_v3_small", pretrained=pretrained)


@from_torchvision
def tv_mobilenet_v3_large(*, pretrained: bool = True) -> Backbone:
    """Build MobileNetV3-large: 3.0M parameters, ImageNet-1k."""
    return build("mobilenet_v3_large", pretrained=pretrained)


@from_torchvision
def tv_efficientnet_b0(*, pretrained: bool = True) -> Backbone:
    """Build EfficientNet-B0: 4.0M parameters, ImageNet-1k."""
    return build("efficientnet_b0", pretrained=pretrained)


@from_torchvision
def tv_convnext_tiny(*, pretrained: bool = True) -> Backbone:
    """Build ConvNeXt-tiny: 27.8M parameters, ImageNet-1k."""
    return build("convnext_tiny", pretrained=pretrained)


@from_torchvision
def tv_convnext_small(*, pretrained: bool = True) -> Backbone:
    """Build ConvNeXt-small: 49.5M parameters, ImageNet-1k."""
    return build("convnext_small", pretrained=pretrained)


@from_torchvision
def tv_swin_t(*, pretrained: bool = True) -> Backbone:
    """Build Swin-T: 27.5M parameters, ImageNet-1k."""
    return build("swin_t", pretrained=pretrained)


@from_torchvision
def tv_swin_v2_t(*, pretrained: bool = True) -> Backbone:
    """Build Swin-V2-T: 27.6M parameters, ImageNet-1k, 256 pixels."""
    return build("swin_v2_t", pretrained=pretrained)


@from_torchvision
def tv_vit_b_16(*, image_size: int = 224, pretrained: bool = True) -> Backbone:
    """Build ViT-B/16: 85.8M parameters, ImageNet-1k.

    `image_size` (pixels, a multiple of 16) is what the network will see; position embeddings of
    pre-trained weights are interpolated to it.
    """
    return build("vit_b_16", pretrained=pretrained, image_size=image_size)
