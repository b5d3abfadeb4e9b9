"""Heads: built from a configuration, told what features they take, started at the prior."""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor, nn

from autoft import plugins
from autoft.errors import PluginError
from autoft.space import check_choices, read_signature
from autoft.values import Part

Wanted = Literal["final", "stages"]
OPTION: Final = "features"


def build_head(part: Part, num_features: int, num_classes: int) -> nn.Module:
    """Build the head of `part`.

    Raises:
        PluginError: it is missing, broken, or returns no module.
        UsageError: a choice is unknown or out of range.
    """
    function = plugins.load("head", part.name)
    check_choices(f"The head '{part.name}'", read_signature(function), part.params)
    head = function(num_features, num_classes, **part.params)
    if not isinstance(head, nn.Module):
        raise PluginError(
            f"The head '{part.name}' returned a {type(head).__name__}; a torch.nn.Module was "
            f"expected."
        )
    return head


def features_of(part: Part) -> Wanted:
    """Return which features the head of `part` takes: the final ones, or those of all stages.

    A head says so by its option `features`; one without it takes the final ones.

    Raises:
        PluginError: it is missing or broken, or asks for features that there are not.
    """
    options = {p.name: p.default for p in read_signature(plugins.load("head", part.name))}
    wanted = {**options, **part.params}.get(OPTION, "final")
    if wanted == "final":
        return "final"
    if wanted == "stages":
        return "stages"
    raise PluginError(
        f"The head '{part.name}' asks for features={wanted!r}; expected 'final' or 'stages'. "
        f"Correct the option in its signature."
    )


@torch.no_grad()
def prior_bias(head: nn.Module, log_prior: Tensor) -> bool:
    """Start the head at the class prior: the bias of its last linear layer is `log_prior` (C,).

    The bias is centred, which changes no probability. With a layer whose weights are 0 the first
    predictions are the prior, so that the first steps do not go into learning it. Return False
    where there is no linear layer with C outputs and a bias; the head stays as it is.

    It does not belong to training with adjusted logits, where the prior is added by the loss.
    """
    for layer in reversed([each for each in head.modules() if isinstance(each, nn.Linear)]):
        # A linear layer without a bias has None there, which its type does not say.
        bias: Tensor | None = layer.bias
        if layer.out_features == len(log_prior) and bias is not None:
            bias.copy_(log_prior - log_prior.mean())
            return True
    return False
