"""Batch norms that are folded leave a network's numbers, parts and parameters as they are."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from autoft.network.build import build
from autoft.network.cut import cut
from autoft.network.folding import folded
from autoft.network.sources import Source

SMALL = ["test_resnet", "test_efficientnet", "test_byobnet", "mobilenetv3_small_050", "test_vit"]


def moved(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights that matter."""
    generator = torch.Generator().manual_seed(0)
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            for name, low in (("running_mean", -0.5), ("running_var", 0.5), ("weight", 0.5)):
                tensor = getattr(each, name).data
                tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("last", [False, True])
def test_what_is_computed_is_the_same_but_for_rounding(name, last) -> None:
    model = moved(timm.create_model(name, num_classes=0)).eval()
    images = torch.randn(
        3, 3, 96 if name != "test_vit" else 160, 96 if name != "test_vit" else 160
    )
    if last:
        model, images = (each.to(memory_format=torch.channels_last) for each in (model, images))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = {name: id(each) for name, each in model.named_parameters()}
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    with torch.no_grad():
        expected = model(images)
        with folded(model, images.shape[-1]):
            found = model(images)
            silent = [each for each in norms if "forward" in vars(each)]
        again = model(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bool(silent) == bool(norms)
    assert not any("forward" in vars(each) for each in norms)
    assert torch.equal(again, expected)
    assert {name: id(each) for name, each in model.named_parameters()} == identities
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_mode_of_every_part_stays_as_it_was() -> None:
    model = timm.create_model("test_resnet", num_classes=0).train()
    with folded(model, 64):
        assert model.training
    assert all(each.training for each in model.modules())


def test_what_crosses_a_cut_is_folded_too() -> None:
    backbone = build(Source("test_resnet", "timm", {"model": "test_resnet"}), pretrained=False)
    moved(backbone.module).eval()
    prefix, _ = cut(backbone, 2, 64)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = prefix(images)
        with folded(prefix, 64):
            found = prefix(images)
            assert any("forward" in vars(each) for each in prefix.modules())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """Uses what the convolution gives beside the norm: it must not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        given = self.conv(images)
        return (self.norm(given) + given).mean((2, 3))


class Shared(nn.Module):
    """Runs one convolution before two norms: it must not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(self.conv(self.first(self.conv(images)))).mean((2, 3))


@pytest.mark.parametrize("network", [Twice, Shared])
def test_where_it_would_change_the_numbers_nothing_is_folded(network) -> None:
    model = moved(network()).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
        with folded(model, 16):
            assert torch.equal(model(images), expected)
            assert not any("forward" in vars(each) for each in model.modules())


def test_what_fails_in_the_block_leaves_the_network_whole() -> None:
    model = moved(timm.create_model("test_resnet", num_classes=0)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        with pytest.raises(RuntimeError, match="of the block"), folded(model, 64):
            raise RuntimeError("of the block")
        assert torch.equal(model(images), expected)
