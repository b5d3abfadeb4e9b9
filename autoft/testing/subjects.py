"""What the checks of a backbone work on: the backbone, images for it, and one training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoft.errors import PluginError
from autoft.network.assemble import Network
from autoft.network.stages import stage_of_modules, stage_of_parameters
from autoft.space import read_signature
from autoft.values import Backbone

SMALL = 64  # pixels
BATCH = 2
SEED = 0


def build(
    plugin: Callable[..., object], image_size: int, *, pretrained: bool = False, seed: int = SEED
) -> Backbone:
    """Build the backbone under `seed`; a plugin with a parameter `image_size` is asked for it."""
    names = {parameter.name for parameter in read_signature(plugin)}
    options = {"image_size": image_size} if "image_size" in names else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = plugin(pretrained=pretrained, **options)
    if not isinstance(backbone, Backbone):
        raise AssertionError(
            f"The backbone plugin returned a {type(backbone).__name__}; an autoft.Backbone was "
            f"expected."
        )
    return backbone


def subject(
    plugin: Callable[..., object], image_size: int, *, pretrained: bool
) -> tuple[Backbone, Tensor]:
    """Return the backbone and a batch (2, 3, S, S): S is `image_size` if it runs, else its own."""
    backbone = build(plugin, image_size, pretrained=pretrained)
    small = _images(min(backbone.image_size, image_size))
    try:
        with torch.no_grad():
            backbone.module.eval()(small.clone())
    except (AssertionError, IndexError, RuntimeError, ValueError):
        return backbone, _images(backbone.image_size)
    return backbone, small


def _images(image_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(BATCH, 3, image_size, image_size, generator=generator)


def stages_of(backbone: Backbone) -> dict[str, int]:
    """Return the stage of every parameter by name, or fail with what is wrong with the stages."""
    try:
        return stage_of_parameters(backbone)
    except PluginError as error:
        raise AssertionError(str(error)) from error


def network_of(backbone: Backbone) -> Network:
    """Put a linear head with two classes on the backbone."""
    return Network(backbone, nn.Linear(backbone.num_features, 2))


def loss_of(network: Network, images: Tensor) -> Tensor:
    """Return the loss of `images`, the labels of which are 0, 1, 0, ..."""
    return functional.cross_entropy(network(images), torch.arange(len(images)) % 2)


def step(network: Network, images: Tensor) -> None:
    """Take one training step with weight decay on everything that is not frozen."""
    live = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(live, lr=1e-3, weight_decay=0.1)
    torch.autograd.backward(loss_of(network.train(), images))
    optimizer.step()


def prefix_of(backbone: Backbone, depth: int) -> dict[str, Tensor]:
    """Return copies of the parameters and buffers of the first `depth` stages by name."""
    stages = stages_of(backbone)
    modules = stage_of_modules(backbone, stages)
    state: dict[str, Tensor] = {
        n: p for n, p in backbone.module.named_parameters() if stages[n] < depth
    }
    for name, buffer in backbone.module.named_buffers():
        owner = modules.get(name.rpartition(".")[0], len(backbone.stages) - 1)
        if owner < depth:
            state[name] = buffer
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def same(first: Tensor, second: Tensor | None) -> bool:
    """Tell whether two tensors are bit-equal, so that NaN equals itself."""
    if second is None or first.shape != second.shape or first.dtype != second.dtype:
        return False
    equal = (first == second) | (first.isnan() & second.isnan())
    return bool(equal.all())
