"""Checks of a backbone: a network without its classifier, and its ordered stages.

Each check builds the backbone itself. It takes the `image_size` (pixels) to use where the backbone
can, and whether to build it `pretrained`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import safetensors.torch
import torch
from torch import Tensor, nn

from autoft.data.pixels.decode import INTERPOLATIONS
from autoft.testing.probes import blocked_network, first_uses
from autoft.testing.subjects import (
    BATCH,
    SEED,
    SMALL,
    build,
    loss_of,
    network_of,
    prefix_of,
    same,
    stages_of,
    step,
    subject,
)

TOLERANCE = 1e-4  # of the largest feature: convolutions round differently for other batches

Plugin = Callable[..., object]


def check_returns_backbone(
    plugin: Plugin, *, image_size: int = SMALL, pretrained: bool = False
) -> None:
    """A backbone plugin called with `pretrained` returns an autoft.Backbone with an nn.Module."""
    module = build(plugin, image_size, pretrained=pretrained).module
    if not isinstance(module, nn.Module):
        raise AssertionError(
            f"Backbone.module is a {type(module).__name__}; a torch.nn.Module was expected."
        )


def check_preprocessing_is_possible(
    plugin: Plugin, *, image_size: int = SMALL, pretrained: bool = False
) -> None:
    """Backbone says what its weights were trained with: size, mean, std, crop, interpolation."""
    backbone = build(plugin, image_size, pretrained=pretrained)
    wrong = []
    if backbone.image_size < 1:
        wrong.append(f"image_size={backbone.image_size} is no number of pixels")
    if not _three_within(backbone.mean, -math.inf):
        wrong.append(f"mean={backbone.mean} is not three finite numbers")
    if not _three_within(backbone.std, 0):
        wrong.append(f"std={backbone.std} is not three numbers above 0")
    if not 0 < backbone.crop <= 1:
        wrong.append(f"crop={backbone.crop} is no share between 0 and 1")
    if backbone.interpolation not in INTERPOLATIONS:
        known = ", ".join(INTERPOLATIONS)
        wrong.append(f"interpolation='{backbone.interpolation}' is none of {known}")
    if wrong:
        raise AssertionError(f"The images cannot be prepared: {'; '.join(wrong)}.")


def _three_within(values: Sequence[float], low: float) -> bool:
    return len(values) == 3 and all(low < value < math.inf for value in values)


def check_stages_partition_parameters(
    plugin: Plugin, *, image_size: int = SMALL, pretrained: bool = False
) -> None:
    """Every parameter of a backbone lies in exactly one stage, and every stage holds one."""
    stages_of(build(plugin, image_size, pretrained=pretrained))


def check_stages_run_in_order(
    plugin: Plugin, *, image_size: int = SMALL, pretrained: bool = False
) -> None:
    """Stages run in the order in which they are listed, input first."""
    backbone, images = subject(plugin, image_size, pretrained=pretrained)
    stages = stages_of(backbone)
    reached, by = 0, ""
    for used in first_uses(backbone.module.eval(), images):
        for name in sorted(used, key=stages.__getitem__):
            if stages[name] < reached:
                raise AssertionError(
                    f"'{name}' of stage {stages[name]} runs after '{by}' of stage {reached}. List "
                    f"the stages input first, and put '{name}' into the stage where it runs."
                )
            if stages[name] > reached:
                reached, by = stages[name], name


def check_features_have_promised_shape(
    plugin: Plugin, *, image_size: int = SMALL, pretrained: bool = False
) -> None:
    """A backbone maps images (N, 3, H, W) to features (N, num_features)."""
    backbone, images = subject(plugin, image_size, pretrained=pretrained)
    with torch.no_grad():
        features = backbone.module.eval()(images)
    if not isinstance(features, Tensor):
        raise AssertionError(
            f"The module returned a {type(features).__name__}; a tensor of features was expected."
        )
    promised = (BATCH, backbone.num_features)
    if tuple(features.shape) != promised:
        raise AssertionError(
            f"Features have shape {tuple(features.shape)}; num_features={backbone.num_features} "
            f"promises {promised}. Is the classifier still attached, or the pooling missing?"
        )


def check_features_are_finite(
    plugin: Plugin, *, image_size: int = SMALL, pretrained: bool = False
) -> None:
    """Features are finite, in training and in eval mode."""
    for training in (False, True):
        backbone, images = subject(plugin, image_size, pretrained=pretrained)
        with torch.no_grad():
            features = backbone.module.train(training)(images)
        if not features.isfinite().all():
            mode = "training" if training else "eval"
            raise AssertionError(
                f"In {mode} mode {int((~features.isfinite()).sum())} of {features.numel()} "
                f"features are not finite, for images of standard normal noise."
            )


def check_rows_do_not_depend_on_the_batch(
    plugin: Plugin, *, image_size: int = SMALL, pretrained: bool = False
) -> None:
    """In eval mode the features of an image do not depend on the other images of its batch."""
    backbone, images = subject(plugin, image_size, pretrained=pretrained)
    module = backbone.module.eval()
    with torch.no_grad():
        together, alone = module(images), module(images[:1])
    difference = float((together[:1] - alone).abs().max())
    if not difference <= TOLERANCE * float(together.abs().max()):
        raise AssertionError(
            f"In eval mode the features of an image differ by {difference:.3g} between a batch of "
            f"1 and of {BATCH}. Normalise over the image, not over the batch."
        )


def check_input_is_not_modified(
    plugin: Plugin, *, image_size: int = SMALL, pretrained: bool = False
) -> None:
    """A backbone leaves its input as it is, since the images of a batch are shared by trials."""
    for training in (False, True):
        backbone, images = subject(plugin, image_size, pretrained=pretrained)
        before = images.clone()
        with torch.no_grad():
            backbone.module.train(training)(images)
        if not torch.equal(images, before):
            raise AssertionError(
                "The backbone changed the images that it was given. Remove `inplace=True` from "
                "its first layer, and operations that end in `_`."
            )


def check_same_seed_builds_the_same(
    plugin: Plugin, *, image_size: int = SMALL, pretrained: bool = False
) -> None:
    """Two builds under one seed of torch have equal parameters and buffers."""
    first, second = (
        build(plugin, image_size, pretrained=pretrained).module.state_dict() for _ in range(2)
    )
    differing = [name for name in first if not same(first[name], second.get(name))]
    if differing or set(second) - set(first):
        raise AssertionError(
            f"Two builds under torch.manual_seed({SEED}) differ in {differing[:3]} "
            f"({len(differing)} of {len(first)} tensors). Draw start values with torch's own "
            f"generator, or a search cannot be repeated."
        )


def check_gradients_reach_every_stage(
    plugin: Plugin, *, image_size: int = SMALL, pretrained: bool = False
) -> None:
    """With nothing frozen, a gradient reaches every stage."""
    backbone, images = subject(plugin, image_size, pretrained=pretrained)
    stages = stages_of(backbone)
    network = network_of(backbone)
    torch.autograd.backward(loss_of(network.train(), images))
    reached = {stages[n] for n, p in backbone.module.named_parameters() if p.grad is not None}
    dead = sorted(set(stages.values()) - reached)
    if dead:
        raise AssertionError(
            f"No gradient reaches the stages {dead}. Remove `no_grad`, `detach` and "
            f"`requires_grad_(False)` from the backbone: what is frozen is the strategy's choice."
        )


def check_frozen_prefix_stays_equal(
    plugin: Plugin, *, image_size: int = SMALL, pretrained: bool = False
) -> None:
    """Freezing any first stages leaves their parameters and buffers bit-equal after a step."""
    backbone, images = subject(plugin, image_size, pretrained=pretrained)
    num_stages = len(set(stages_of(backbone).values()))
    network = network_of(backbone)
    # The deepest cut first: a stage is then only trained after every prefix with it was checked.
    for depth in range(num_stages, 0, -1):
        network.set_rates([0.0] * depth + [1.0] * (num_stages - depth))
        before = prefix_of(backbone, depth)
        step(network, images)
        after = prefix_of(backbone, depth)
        changed = [name for name in before if not same(before[name], after[name])]
        if changed:
            raise AssertionError(
                f"With the first {depth} of {num_stages} stages frozen, a training step changed "
                f"{changed[:3]}. Let the buffers of a module change in training mode only, and "
                f"leave `train()` and `eval()` to the caller."
            )


def check_state_dict_round_trip(
    plugin: Plugin, *, image_size: int = SMALL, pretrained: bool = False
) -> None:
    """Saved as safetensors and loaded into another build, a backbone gives the same features."""
    backbone, images = subject(plugin, image_size, pretrained=pretrained)
    other = build(plugin, image_size, seed=SEED + 1).module
    try:
        state = {name: value.contiguous() for name, value in backbone.module.state_dict().items()}
        other.load_state_dict(safetensors.torch.load(safetensors.torch.save(state)))
    except (RuntimeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise AssertionError(
            f"The state dict cannot be saved as safetensors and loaded again: {reason} It must "
            f"hold tensors only, none of which shares its memory with another."
        ) from error
    with torch.no_grad():
        expected, loaded = backbone.module.eval()(images), other.eval()(images)
    difference = float((expected - loaded).abs().max())
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise AssertionError(
            f"After saving and loading, features differ by {difference:.3g}. Register what "
            f"forward uses as a parameter or a buffer, so that the state dict holds it."
        )


def check_random_weights_need_no_network(
    plugin: Plugin, *, image_size: int = SMALL, pretrained: bool = False
) -> None:
    """With pretrained=False a backbone is built without the network, whatever else is asked."""
    with blocked_network() as attempts:
        build(plugin, image_size)
    if attempts:
        raise AssertionError(
            f"With pretrained=False the plugin tried to reach {attempts[0]}. Fetch weights only "
            f"when `pretrained` is true."
        )


BACKBONE_CHECKS = (
    check_returns_backbone,
    check_preprocessing_is_possible,
    check_stages_partition_parameters,
    check_stages_run_in_order,
    check_features_have_promised_shape,
    check_features_are_finite,
    check_rows_do_not_depend_on_the_batch,
    check_input_is_not_modified,
    check_same_seed_builds_the_same,
    check_gradients_reach_every_stage,
    check_frozen_prefix_stays_equal,
    check_state_dict_round_trip,
    check_random_weights_need_no_network,
)
