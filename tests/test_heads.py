"""Heads: what they are told to take, what they learn from it, and where they start."""

from __future__ import annotations

from typing import Annotated

import pytest
import torch
from torch import Tensor, nn

from autoft import plugins
from autoft.errors import PluginError, UsageError
from autoft.heads.classifiers import cosine, linear, mlp, multilayer, norm_linear
from autoft.network.heads import build_head, features_of, prior_bias
from autoft.network.pooling import Pooling
from autoft.space import Choice
from autoft.testing.heads import HEAD_CHECKS, check_features_are_known
from autoft.training.losses import log_prior, make_loss
from autoft.training.probe import fit_head
from autoft.training.recipe import probing
from autoft.values import Backbone, Part

COUNTS = torch.tensor([700, 200, 100])


class Forgetful(nn.Module):
    """Two stages: colours, each in a channel of its own and scale, and then brightness alone."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 3, 1, bias=False)
        self.grey = nn.Conv2d(3, 2, 1, bias=False)
        with torch.no_grad():
            self.colours.weight.copy_(0.01 * torch.eye(3)[..., None, None])
            self.grey.weight.fill_(100.0)

    def forward(self, images: Tensor) -> Tensor:
        grey: Tensor = self.grey(self.colours(images)).mean(dim=(2, 3))
        return grey


def colours() -> tuple[Tensor, Tensor]:
    """Return noise images (90, 3, 8, 8) of equal brightness, and which colour is the strongest."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    images = 0.5 * torch.randn(90, 3, 8, 8, generator=generator)
    images = images - images.mean(dim=(1, 2, 3), keepdim=True)
    return images + (3 * torch.eye(3) - 1)[labels][..., None, None], labels


def accuracy(head: nn.Module, features: Tensor, labels: Tensor) -> float:
    loss = make_loss("none", 0.0, torch.bincount(labels))
    fit_head(head, features, labels, probing(), loss=loss, seed=0)
    return float((head.eval()(features).argmax(1) == labels).float().mean())


def test_multilayer_knows_what_the_last_stage_forgot() -> None:
    backbone = Backbone(Forgetful(), (("colours",), ("grey",)), 2)
    images, labels = colours()
    stages = Pooling(backbone, "stages", 8)
    with torch.no_grad():
        all_of_them, final = stages(images), backbone.module(images)
    assert accuracy(multilayer(stages.num_features, 3), all_of_them, labels) == 1.0
    assert accuracy(norm_linear(2, 3), final, labels) < 0.6


@pytest.mark.parametrize("name", ["linear", "norm_linear", "cosine", "mlp"])
def test_heads_of_final_features_say_so(name) -> None:
    assert features_of(Part(name)) == "final"


def test_multilayer_asks_for_all_stages_whatever_its_dropout() -> None:
    assert features_of(Part("multilayer")) == "stages"
    assert features_of(Part("multilayer", {"dropout": 0.5})) == "stages"
    head = build_head(Part("multilayer", {"dropout": 0.5}), 40, 3)
    assert head(torch.randn(4, 40)).shape == (4, 3)


def either(
    num_features: int, num_classes: int, *, features: Annotated[str, Choice("final", "stages")]
) -> nn.Module:
    """Let the search choose what is taken."""
    return nn.Linear(num_features, num_classes)


either.__kwdefaults__ = {"features": "final"}


def neither(num_features: int, num_classes: int, *, features: str = "middle") -> nn.Module:
    """Ask for what there is not."""
    return nn.Linear(num_features, num_classes)


def test_choice_of_features_may_be_searched_and_must_be_known(monkeypatch) -> None:
    monkeypatch.setattr(plugins, "load", lambda kind, name: {"a": either, "b": neither}[name])
    assert features_of(Part("a")) == "final"
    assert features_of(Part("a", {"features": "stages"})) == "stages"
    with pytest.raises(PluginError, match=r"features='middle'; expected 'final' or 'stages'"):
        features_of(Part("b"))
    with pytest.raises(UsageError, match="lies outside"):
        build_head(Part("a", {"features": "middle"}), 4, 2)


def test_conformance_refuses_unknown_features_and_passes_known_ones() -> None:
    for check in HEAD_CHECKS:
        check(either)
        check(multilayer)
    with pytest.raises(AssertionError, match=r"`features` may be 'middle'"):
        check_features_are_known(neither)


def test_heads_start_where_every_class_is_equally_likely() -> None:
    features = torch.randn(5, 12)
    for head in (linear(12, 3), norm_linear(12, 3), mlp(12, 3), multilayer(12, 3)):
        assert not head.eval()(features).any()


@pytest.mark.parametrize("head", [linear, norm_linear, mlp, multilayer])
def test_prior_bias_makes_the_first_prediction_the_prior(head) -> None:
    made = head(12, 3)
    assert prior_bias(made, log_prior(COUNTS))
    logits = made.eval()(torch.randn(5, 12))
    torch.testing.assert_close(logits.softmax(dim=1), (COUNTS / 1000).expand(5, 3))
    torch.testing.assert_close(logits.mean(dim=1), torch.zeros(5), atol=1e-6, rtol=0)
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_prior_bias_leaves_heads_alone_that_have_no_place_for_it() -> None:
    for made in (cosine(12, 3), nn.Linear(12, 3, bias=False), nn.Linear(12, 4), nn.Identity()):
        before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
        assert not prior_bias(made, log_prior(COUNTS))
        assert all(torch.equal(before[k], v) for k, v in made.state_dict().items())


def test_prior_goes_to_the_last_layer_of_that_width() -> None:
    made = nn.Sequential(nn.Linear(12, 3), nn.ReLU(), nn.Linear(3, 3))
    first = made[0].bias.clone()
    assert prior_bias(made, log_prior(COUNTS))
    assert torch.equal(made[0].bias, first)
    torch.testing.assert_close(made[2].bias.softmax(0), COUNTS / 1000)
