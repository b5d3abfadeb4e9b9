"""Checks of a head: features (N, num_features) to logits (N, num_classes)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoft.network.heads import OPTION, Wanted
from autoft.space import Choice, read_signature
from autoft.testing.strategies import choices_at_the_ends

BATCH = 4
NUM_FEATURES = 32
NUM_CLASSES = (2, 1000)
SEED = 0
TOLERANCE = 1e-4  # of the largest logit: a matrix product rounds differently for other batches

Head = Callable[..., object]


def check_head_returns_module(plugin: Head) -> None:
    """A head plugin called with `num_features` and `num_classes` returns an nn.Module."""
    for num_classes in NUM_CLASSES:
        _build(plugin, num_classes)


def check_logits_have_promised_shape(plugin: Head) -> None:
    """A head maps features (N, F) to logits (N, C), for 2 and for 1000 classes."""
    for head, num_classes, chosen in _heads(plugin):
        logits = head(_features())
        expected = (BATCH, num_classes)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            raise AssertionError(
                f"The head returned {_describe(logits)} for {BATCH} rows, {num_classes} classes"
                f"{chosen}; logits of shape {expected} were expected."
            )


def check_logits_are_finite(plugin: Head) -> None:
    """Logits are finite at every end of every range, also for features that are all zero."""
    for head, num_classes, chosen in _heads(plugin):
        for features in (_features(), torch.zeros(BATCH, NUM_FEATURES)):
            if not head(features).isfinite().all():
                raise AssertionError(
                    f"The head returned logits that are not finite for {num_classes} classes"
                    f"{chosen}. Guard divisions and logarithms against 0."
                )


def check_every_parameter_gets_a_gradient(plugin: Head) -> None:
    """Every parameter of a head takes part in its logits and gets a gradient."""
    head = _build(plugin, NUM_CLASSES[0]).train()
    labels = torch.arange(BATCH) % NUM_CLASSES[0]
    logits = head(_features())
    if logits.requires_grad:
        torch.autograd.backward(functional.cross_entropy(logits, labels))
    without = [name for name, parameter in head.named_parameters() if parameter.grad is None]
    if without:
        raise AssertionError(
            f"No gradient reaches {without}. A parameter that cannot be trained is a buffer "
            f"(register_buffer), and one that forward does not use should not be there."
        )


def check_rows_are_scored_alone(plugin: Head) -> None:
    """In eval mode a batch of 1 works and gives the logits that the row gets in a larger batch."""
    head = _build(plugin, NUM_CLASSES[0]).eval()
    features = _features()
    with torch.no_grad():
        together = head(features)
        try:
            alone = head(features[:1])
        except (RuntimeError, ValueError) as error:
            raise AssertionError(
                f"In eval mode the head cannot score a batch of 1: {error} Make it depend on each "
                f"row alone."
            ) from error
    difference = float((together[:1] - alone).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(together.abs().max())):
        raise AssertionError(
            f"In eval mode the logits of a row differ by {difference:.3g} between a batch of 1 "
            f"and of {BATCH}. A prediction must not depend on its neighbours."
        )


def check_features_are_not_modified(plugin: Head) -> None:
    """A head leaves its input as it is, since the features of a batch are shared by many heads."""
    for head in (_build(plugin, NUM_CLASSES[0]).train(), _build(plugin, NUM_CLASSES[0]).eval()):
        features = _features()
        before = features.clone()
        with torch.no_grad():
            head(features)
        if not torch.equal(features, before):
            raise AssertionError(
                "The head changed the features that it was given. Remove `inplace=True` from its "
                "first layer, and operations that end in `_`."
            )


def check_features_are_known(plugin: Head) -> None:
    """A head that has an option `features` takes "final" or "stages", whatever is chosen."""
    for parameter in read_signature(plugin):
        if parameter.name != OPTION:
            continue
        chosen = parameter.range
        options = chosen.options if isinstance(chosen, Choice) else (parameter.default,)
        unknown = [option for option in options if option not in get_args(Wanted)]
        if unknown:
            raise AssertionError(
                f"The head's `{OPTION}` may be {unknown[0]!r}; 'final' or 'stages' was expected: "
                f"what the backbone returns, or the pooled features of all its stages."
            )


def _heads(plugin: Head) -> Iterator[tuple[nn.Module, int, str]]:
    """Yield the head in training mode, its number of classes, and its choices in words."""
    for choices in choices_at_the_ends(plugin):
        chosen = "".join(f", {name}={value!r}" for name, value in choices.items())
        for num_classes in NUM_CLASSES:
            yield _build(plugin, num_classes, **choices).train(), num_classes, chosen


def _build(plugin: Head, num_classes: int, **choices: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        head = plugin(NUM_FEATURES, num_classes, **choices)
    if not isinstance(head, nn.Module):
        raise AssertionError(
            f"The head plugin returned a {type(head).__name__}; a torch.nn.Module was expected."
        )
    return head


def _features() -> Tensor:
    return torch.randn(BATCH, NUM_FEATURES, generator=torch.Generator().manual_seed(SEED))


def _describe(logits: object) -> str:
    if isinstance(logits, Tensor):
        return f"logits of shape {tuple(logits.shape)}"
    return f"a {type(logits).__name__}"


HEAD_CHECKS = (
    check_head_returns_module,
    check_logits_have_promised_shape,
    check_logits_are_finite,
    check_every_parameter_gets_a_gradient,
    check_rows_are_scored_alone,
    check_features_are_not_modified,
    check_features_are_known,
)
