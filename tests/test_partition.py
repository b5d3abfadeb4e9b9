"""Stages mean the same in every family: in order, a partition, one a resolution or even pieces."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from autoft import plugins
from autoft.testing import backbones as checks


def plugin(name: str):
    function = plugins.load("backbone", "timm")

    def build(*, image_size: int = 0, pretrained: bool = False):
        return function(model=name, image_size=image_size, pretrained=pretrained)

    return build


def stages(name: str):
    return [list(stage) for stage in plugin(name)().stages]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]),
        (
            "vgg11",
            [
                ["features.0"],
                ["features.3"],
                ["features.6", "features.8"],
                ["features.11", "features.13"],
                ["features.16", "features.18", "pre_logits"],
            ],
        ),
        ("convnext_atto", [["stem"], *([f"stages.{i}"] for i in range(3)), ["stages.3", "head"]]),
        (
            "mobilenetv2_100",
            [
                ["conv_stem", "bn1"],
                ["blocks.0"],
                ["blocks.1"],
                ["blocks.2"],
                ["blocks.3", "blocks.4"],
                ["blocks.5", "blocks.6", "conv_head", "bn2"],
            ],
        ),
        (
            "efficientnet_b0",
            [
                ["conv_stem", "bn1"],
                ["blocks.0"],
                ["blocks.1"],
                ["blocks.2"],
                ["blocks.3", "blocks.4"],
                ["blocks.5", "blocks.6", "conv_head", "bn2"],
            ],
        ),
        (
            "densenet121",
            [
                ["features.conv0", "features.norm0"],
                *([f"features.denseblock{i}", f"features.transition{i}"] for i in (1, 2, 3)),
                ["features.denseblock4", "features.norm5"],
            ],
        ),
        ("regnetx_002", [["stem"], ["s1"], ["s2"], ["s3"], ["s4"]]),
        (
            "swin_tiny_patch4_window7_224",
            [["patch_embed"], ["layers.0"], ["layers.1"], ["layers.2"], ["layers.3", "norm"]],
        ),
        (
            "vit_tiny_patch16_224",
            [
                ["cls_token", "pos_embed", "patch_embed"],
                *([f"blocks.{i}", f"blocks.{i + 1}"] for i in range(0, 10, 2)),
                ["blocks.10", "blocks.11", "norm"],
            ],
        ),
    ],
)
def test_stages_are_a_stem_and_one_a_resolution_or_even_pieces(name, expected) -> None:
    assert stages(name) == expected


def test_a_mixer_whose_token_layers_have_other_widths_is_divided_evenly() -> None:
    found = stages("mixer_s32_224")
    assert found[0] == ["stem"]
    assert [name for stage in found[1:] for name in stage] == [
        *(f"blocks.{i}" for i in range(8)),
        "norm",
    ]
    assert {len([name for name in stage if name != "norm"]) for stage in found[1:]} == {1, 2}


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenetv2_100", "test_vit", "test_convnext", "test_byobnet", "regnetx_002"],
)
def test_stages_follow_the_forward_pass_and_hold_every_parameter_once(name) -> None:
    checks.check_stages_partition_parameters(plugin(name))
    checks.check_stages_run_in_order(plugin(name))
    assert 4 <= len(stages(name)) <= 12


def test_a_class_token_that_joins_late_lies_in_the_stage_where_it_joins() -> None:
    found = stages("cait_xxs24_224")
    assert "cls_token" in found[-1]
    checks.check_stages_run_in_order(plugin("cait_xxs24_224"), image_size=64)


def test_stages_do_not_depend_on_weights_or_on_having_any() -> None:
    from autoft.backbones import partition

    module = timm.create_model("test_resnet", num_classes=0)
    expected = partition.stages_of(module)
    partition._known.clear()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert partition.stages_of(module) == expected
    partition._known.clear()
    with torch.device("meta"):
        bare = timm.create_model("test_resnet", num_classes=0)
    assert partition.stages_of(bare) == expected


def test_measuring_leaves_the_network_as_it_was() -> None:
    from autoft.backbones import partition

    partition._known.clear()
    module = timm.create_model("test_resnet", num_classes=0)
    module.layer1.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    partition.stages_of(module)
    assert module.training
    assert not any(each.training for each in module.layer1.modules())
    assert all(torch.equal(tensor, before[n]) for n, tensor in module.state_dict().items())
    assert all(isinstance(each, nn.Parameter) for each in module.parameters())


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vgg11", "ghostnet_050"])
def test_num_features_is_what_comes_out_also_behind_a_wider_last_layer(name) -> None:
    checks.check_features_have_promised_shape(plugin(name))
