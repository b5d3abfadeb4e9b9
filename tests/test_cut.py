"""Prefix and tail are the backbone: in eval, in training, and from stored activations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from autoft import plugins
from autoft.network.assemble import Network
from autoft.network.build import build
from autoft.network.cut import CannotCut, cut, prefix_of, why_uncut
from autoft.network.sources import in_folder
from autoft.values import Backbone

SIZE = 64
FAMILIES = [
    "test_resnet",
    "test_efficientnet",
    "test_byobnet",
    "test_convnext",
    "test_vit",
    "densenet121",
    "regnetx_002",
    "mobilenetv2_100",
]


def timm_backbone(name: str, seed: int = 0) -> Backbone:
    """Return a network with random weights, none of which are at a special value such as 0."""
    torch.manual_seed(seed)
    backbone = plugins.load("backbone", "timm")(model=name, image_size=SIZE, pretrained=False)
    shaken(backbone.module)
    return backbone


def shaken(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.unique().numel() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def images(count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def frozen_first(backbone: Backbone, k: int) -> Network:
    network = Network(backbone, nn.Linear(backbone.num_features, 3))
    stages = len(backbone.stages)
    network.set_rates([0.0] * k + [1.0] * (stages - k))
    return network


@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_then_tail_equal_the_whole_after_every_stage(name) -> None:
    backbone = timm_backbone(name)
    module = backbone.module.eval()
    assert why_uncut(backbone, SIZE) == ""
    with torch.no_grad():
        for k in range(1, len(backbone.stages) + 1):
            prefix, tail = cut(backbone, k, SIZE)
            for count in (1, 5):
                given, expected = prefix(images(count)), module(images(count))
                assert isinstance(given, tuple)
                assert all(len(each) == count for each in given)
                torch.testing.assert_close(tail(*given), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_gives_what_crosses_every_cut(name) -> None:
    backbone = timm_backbone(name)
    backbone.module.eval()
    cuts = range(1, len(backbone.stages) + 1)
    with torch.no_grad():
        given = prefix_of(backbone, cuts, SIZE)(images())
        for k, tensors in zip(cuts, given, strict=True):
            alone = cut(backbone, k, SIZE)[0](images())
            assert len(tensors) == len(alone)
            assert all(torch.equal(*pair) for pair in zip(tensors, alone, strict=True))


def test_what_crosses_an_earlier_cut_is_not_what_later_stages_make_of_it() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x)
            return self.two(x.detach().mul_(self.scale)).mean((2, 3))

    backbone = Backbone(InPlace(), [["one"], ["scale", "two"]], 4, SIZE)
    with torch.no_grad():
        (first, *_), _ = prefix_of(backbone, [1, 2], SIZE)(images())
    assert torch.equal(first, backbone.module.one(images()))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "densenet121"])
def test_the_tail_learns_with_the_gradients_of_the_whole(name) -> None:
    backbone = timm_backbone(name)
    k = len(backbone.stages) // 2
    network = frozen_first(backbone, k)
    prefix, tail = cut(backbone, k, SIZE)
    network.train()
    labels = torch.tensor([0, 1, 2])

    whole = functional.cross_entropy(network(images()), labels)
    whole.backward()
    expected = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    with torch.no_grad():
        stored = [each.clone() for each in prefix(images())]
    loss = functional.cross_entropy(network.head(tail(*stored)), labels)
    loss.backward()

    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    found = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert len(found) > 4
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-6)


def test_dropout_and_drop_path_act_in_the_tail_as_in_the_whole() -> None:
    import timm

    torch.manual_seed(0)
    module = timm.create_model(
        "test_vit", num_classes=0, img_size=SIZE, drop_path_rate=0.5, proj_drop_rate=0.3
    )
    stages = timm_backbone("test_vit").stages
    backbone = Backbone(module, stages, module.num_features)
    network = frozen_first(backbone, 3).train()
    prefix, tail = cut(backbone, 3, SIZE)
    with torch.no_grad():
        stored = prefix(images())
        torch.manual_seed(7)
        expected = network.features(images())
        torch.manual_seed(7)
        found = tail(*stored)
        assert torch.equal(found, expected)
        assert not torch.equal(tail(*stored), found)  # it draws anew
        network.eval()
        assert torch.equal(tail(*stored), network.features(images()))


def test_batch_norms_of_the_tail_learn_statistics_and_those_of_the_prefix_do_not() -> None:
    backbone = timm_backbone("test_resnet")
    network = frozen_first(backbone, 2).train()
    prefix, tail = cut(backbone, 2, SIZE)
    before = copy.deepcopy(backbone.module.state_dict())
    with torch.no_grad():
        tail(*prefix(images()))
    moved = {n for n, t in backbone.module.state_dict().items() if not torch.equal(t, before[n])}
    assert network.training
    assert moved
    assert all(name.startswith(("layer2", "layer3", "layer4")) for name in moved)


def test_cutting_leaves_modes_buffers_gradients_and_the_random_state() -> None:
    backbone = timm_backbone("test_resnet")
    backbone.module.train()
    backbone.module.layer1.eval()
    before = copy.deepcopy(backbone.module.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    prefix, tail = cut(backbone, 2, SIZE)
    assert torch.equal(torch.rand(1), expected)
    assert backbone.module.layer2.training
    assert not backbone.module.layer1.training
    assert all(torch.equal(t, before[n]) for n, t in backbone.module.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.module.parameters())
    own = {id(parameter) for parameter in backbone.module.parameters()}
    assert {id(each) for side in (prefix, tail) for each in side.parameters()} == own
    assert not backbone.module._forward_hooks


class Glue(nn.Module):
    """Its own code is what is cut: a token, branches, loops, sizes, modes, in-place operations."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.scale = nn.Parameter(torch.rand(8))
        self.register_buffer("shift", torch.randn(8))
        self.first = nn.Conv2d(3, 8, 8, 8)
        self.act = nn.ReLU(inplace=inplace)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.last = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        wide = x.reshape(n * h, w, c)
        x = torch.cat([self.token.expand(n, -1, -1), x.flatten(2).transpose(1, 2)], 1)
        if h * w > 4:
            x = x * torch.linspace(1, 2, h * w + 1, device=x.device)[:, None]
        for block in self.blocks:
            x = x + functional.dropout(block(x), 0.5, self.training)
        wide = self.last(wide).reshape(n, h * w, c)
        x[:, 1:] += wide
        x = self.act(x * self.scale + self.shift)
        x = x.transpose(0, 1)
        return self.other(x.mean(0))


STAGES = (("first", "token"), ("blocks",), ("last", "scale"), ("other",))


def glue(**options) -> Backbone:
    torch.manual_seed(0)
    return Backbone(Glue(**options), STAGES, 8, image_size=SIZE)


@pytest.mark.parametrize("inplace", [False, True])
def test_code_between_modules_is_followed(inplace) -> None:
    backbone = glue(inplace=inplace)
    assert why_uncut(backbone) == ""
    prefix, tail = cut(backbone, 2)
    with torch.no_grad():
        given = prefix(images(5))
        # The tokens, their part that is written to, and the pixels before tokens were made.
        assert {tuple(each.shape) for each in given} == {(5, 65, 8), (5, 64, 8), (5, 8, 8, 8)}
        kept = [each.clone() for each in given]
        backbone.module.eval()
        for count in (1, 5, 6):
            found = tail(*prefix(images(count)))
            torch.testing.assert_close(found, backbone.module(images(count)), rtol=0, atol=1e-6)
        backbone.module.eval()
        given = prefix(images(5))
        kept = [each.clone() for each in given]
        tail(*given)
    assert all(torch.equal(one, two) for one, two in zip(given, kept, strict=True))


def test_a_function_that_depends_on_the_mode_follows_the_mode() -> None:
    backbone = glue()
    prefix, tail = cut(backbone, 1)
    with torch.no_grad():
        backbone.module.train()
        given = prefix(images())
        torch.manual_seed(2)
        expected = backbone.module(images())
        torch.manual_seed(2)
        assert torch.equal(tail(*given), expected)
        assert not torch.equal(tail(*given), expected)
        backbone.module.eval()
        assert torch.equal(tail(*given), tail(*given))


def test_an_in_place_operation_spares_what_was_stored() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    backbone = Backbone(module, (("0",), ("1",)), 4, image_size=SIZE)
    prefix, tail = cut(backbone, 1)
    with torch.no_grad():
        (given,) = prefix(images())
        kept = given.clone()
        assert (kept < 0).any()
        expected = module(images())
        assert torch.equal(tail(given), expected)
        assert torch.equal(given, kept)
        assert torch.equal(tail(given), expected)


def test_a_module_that_two_stages_use_belongs_to_the_first() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Sequential(self.first, nn.Linear(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x.mean((2, 3))))

    backbone = Backbone(Twice(), (("first",), ("second.1",)), 4, image_size=SIZE)
    network = frozen_first(backbone, 1)
    assert [n for n, p in network.backbone.named_parameters() if p.requires_grad] == [
        "second.1.weight",
        "second.1.bias",
    ]
    assert why_uncut(backbone) == ""


class MixesRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.mean((2, 3)))
        return self.second(x + x.mean(0, keepdim=True))


class Hides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.mean((2, 3)))
        return self.second(torch.from_numpy(x.detach().numpy() * 2))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.mean((2, 3)))
        for _ in range(len(x)):
            x = x * 2
        return self.second(x)


class OtherInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.mean((2, 3)))
        return self.second(x + torch.randn_like(x) if self.training else x)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (MixesRows, "differ|rows for single images"),
        (Hides, "where it could not be seen"),
        (Counts, "batches of other sizes"),
        (OtherInTraining, "training mode"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_its_reason(kind, words) -> None:
    backbone = Backbone(kind(), (("first",), ("second",)), 4, image_size=SIZE)
    with pytest.raises(CannotCut, match=words):
        cut(backbone, 1)
    assert "cannot be cut" in why_uncut(backbone)
    assert not backbone.module._forward_hooks


def test_a_number_of_stages_that_cannot_be_is_refused() -> None:
    backbone = glue()
    for k in (0, len(STAGES) + 1):
        with pytest.raises(ValueError, match="no number of stages"):
            cut(backbone, k)


def test_other_weights_and_other_stages_are_cut_anew() -> None:
    backbone = glue()
    cut(backbone, 1)
    backbone.module.blocks[0] = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    with torch.no_grad():
        prefix, tail = cut(backbone, 1)
        backbone.module.eval()
        assert torch.allclose(tail(*prefix(images())), backbone.module(images()), atol=1e-6)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["mobilenetv2_100.in1k", "squeezenet1_0.in1k"])
def test_training_from_stored_activations_gives_the_same_losses(shared_root, name) -> None:
    sources, _ = in_folder(shared_root / "weights")
    data = [images(8, seed) for seed in range(4)]
    labels = torch.arange(8) % 3

    def losses(stored: bool) -> list[float]:
        backbone = build(sources[name], image_size=SIZE)
        k = len(backbone.stages) // 2
        torch.manual_seed(0)
        network = frozen_first(backbone, k).train()
        prefix, tail = cut(backbone, k, SIZE)
        with torch.no_grad():
            kept = [[each.clone() for each in prefix(batch)] for batch in data]
        live = [each for each in network.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(live, lr=1e-4)
        found = []
        for step in range(20):
            at = step % len(data)
            torch.manual_seed(step)
            features = tail(*kept[at]) if stored else network.features(data[at])
            loss = functional.cross_entropy(network.head(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    again, from_store = losses(stored=False), losses(stored=True)
    assert from_store == pytest.approx(again, rel=1e-5)
    assert again[-1] < again[0]
