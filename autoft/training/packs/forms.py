"""Which heads can be stacked: those whose layers are known and do what they are known for.

A head is looked at for its layers and then asked: what is read off it has to give what it gives.
So a head of somebody else is stacked too if it is made of the same layers, and is trained by
itself if it does anything besides.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

ELEMENTWISE = (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.Hardswish)
KNOWN = (nn.Linear, nn.BatchNorm1d, nn.Dropout, *ELEMENTWISE)
PROBES = 8  # rows of noise that a head is asked about
TOLERANCE = 1e-4  # of the largest logit


@dataclass(frozen=True)
class Form:
    """The layers of a head, in order; the tensors are those of the head itself.

    [standardise] -> [dropout] -> [hidden layer -> activation -> dropout] -> last layer. With a
    `scale` the last layer compares directions: scale x cosine.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    hidden_weight: Tensor | None = None
    hidden_bias: Tensor | None = None
    activation: nn.Module | None = None
    hidden_dropout: float = 0.0
    norm: nn.BatchNorm1d | None = None
    dropout: float = 0.0

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters that there are, by name."""
        names = ("weight", "bias", "scale", "hidden_weight", "hidden_bias")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def layers(self) -> tuple[object, ...]:
        """Return what tells forms of other layers from this one."""
        shapes = tuple((name, tuple(value.shape)) for name, value in self.parameters.items())
        return (shapes, repr(self.activation), self.hidden_dropout, self.dropout, repr(self.norm))


def form_of(head: nn.Module, num_features: int) -> Form | None:
    """Return the layers of `head`; None if they are not known, or if it does more than they do."""
    form = _read(head, num_features)
    if form is None:
        return None
    return form if _is_plain(head) or _agrees(head, num_features) else None


def logits_of(form: Form, features: Tensor) -> Tensor:
    """Return the logits (N, C) of features (N, F) by the layers of `form`, in eval mode."""
    norm = form.norm
    if norm is not None:
        features = functional.batch_norm(
            features, norm.running_mean, norm.running_var, eps=norm.eps
        )
    if form.hidden_weight is not None and form.activation is not None:
        features = functional.linear(features, form.hidden_weight, form.hidden_bias)
        features = form.activation(features)
    if form.scale is None:
        return functional.linear(features, form.weight, form.bias)
    directions = functional.normalize(form.weight, dim=1)
    return form.scale * functional.linear(functional.normalize(features, dim=1), directions)


def _read(head: nn.Module, num_features: int) -> Form | None:
    form = _of_layers(head) or _of_cosine(head, num_features)
    if form is None or not _is_all(head, form):
        return None
    fits = form.weight if form.hidden_weight is None else form.hidden_weight
    # Of two dropouts in one head, the draws of one depend on those of the other.
    twice = form.dropout > 0 and form.hidden_dropout > 0
    all_of_it = max(form.dropout, form.hidden_dropout) >= 1
    return form if fits.shape[1] == num_features and not twice and not all_of_it else None


def _of_layers(head: nn.Module) -> Form | None:
    layers = [each for each in _flat(head) if type(each) is not nn.Identity]
    if not layers or any(type(each) not in KNOWN for each in layers):
        return None
    norm = layers[0] if isinstance(layers[0], nn.BatchNorm1d) else None
    if norm is not None:
        layers = layers[1:]
        # Only one that has nothing to learn does the same for every head.
        if norm.affine or norm.running_mean is None:
            return None
    dropout, layers = _dropout_first(layers)
    match layers:
        case [nn.Linear() as last]:
            return Form(last.weight, last.bias, norm=norm, dropout=dropout)
        case [nn.Linear() as first, activation, *rest] if type(activation) in ELEMENTWISE:
            hidden_dropout, rest = _dropout_first(rest)
            match rest:
                case [nn.Linear() as last]:
                    return Form(
                        last.weight,
                        last.bias,
                        hidden_weight=first.weight,
                        hidden_bias=first.bias,
                        activation=_apart(activation),
                        hidden_dropout=hidden_dropout,
                        norm=norm,
                        dropout=dropout,
                    )
    return None


def _flat(module: nn.Module) -> list[nn.Module]:
    if type(module) is not nn.Sequential:
        return [module]
    return [leaf for child in module for leaf in _flat(child)]


def _apart(activation: nn.Module) -> nn.Module:
    """Return the like of `activation` that leaves what it is given as it is."""
    apart = copy.deepcopy(activation)
    if hasattr(apart, "inplace"):
        apart.inplace = False  # type: ignore[assignment]  # a plain setting, which torch types so
    return apart


def _dropout_first(layers: list[nn.Module]) -> tuple[float, list[nn.Module]]:
    """Return the rate of the dropout that stands first (0: none does), and the layers after."""
    match layers:
        case [nn.Dropout() as first, *rest]:
            return first.p, rest
    return 0.0, layers


def _of_cosine(head: nn.Module, num_features: int) -> Form | None:
    """Return the form of a head that may be scale x cosine; what it gives will tell."""
    found = dict(head.named_parameters())
    if set(found) != {"weight", "scale"} or list(head.children()):
        return None
    weight, scale = found["weight"], found["scale"]
    if weight.ndim != 2 or weight.shape[1] != num_features or scale.ndim:
        return None
    return Form(weight, scale=scale)


def _is_all(head: nn.Module, form: Form) -> bool:
    """Tell whether all tensors of `head` are in `form`, none twice, all fp32 and trained."""
    own, named = list(head.parameters()), list(form.parameters.values())
    buffers = len(list(head.buffers())) - (len(list(form.norm.buffers())) if form.norm else 0)
    return (
        {id(each) for each in own} == {id(each) for each in named}
        and len(own) == len(named)
        and buffers == 0
        and all(each.requires_grad and each.dtype == torch.float32 for each in own)
    )


def _is_plain(head: nn.Module) -> bool:
    """Tell whether `head` is torch's own linear layer and nothing else: it need not be asked."""
    hooks = len(head._forward_hooks) + len(head._forward_pre_hooks)
    return type(head) is nn.Linear and not hooks and "forward" not in vars(head)


@torch.no_grad()
def _agrees(head: nn.Module, num_features: int) -> bool:
    """Ask a copy of `head`, of random weights, about noise and compare with what its layers say.

    As it is, a head may give zeros whatever it is asked.
    """
    twin = copy.deepcopy(head)
    generator = torch.Generator().manual_seed(0)
    for tensor in twin.parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    form = _read(twin, num_features)
    if form is None:
        return False
    noise = torch.randn(PROBES, num_features, generator=generator).to(form.weight.device)
    known = logits_of(form, noise)
    # Without a norm and dropout a head gives the same in training.
    alike = form.norm is None and not form.dropout and not form.hidden_dropout
    return all(
        _gives(twin.train(mode), noise, known) for mode in ((False, True) if alike else (False,))
    )


def _gives(head: nn.Module, noise: Tensor, known: Tensor) -> bool:
    given = head(noise)
    if not isinstance(given, Tensor) or given.shape != known.shape:
        return False
    return bool((given - known).abs().max() <= TOLERANCE * known.abs().max().clamp(min=1e-3))
