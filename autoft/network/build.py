"""Build the backbone that a source describes, with its weights, and check its contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from autoft import plugins
from autoft.errors import AutoftError, PluginError, UsageError
from autoft.network.sources import Source
from autoft.network.stages import stage_of_parameters
from autoft.network.weights import load_weights
from autoft.space import read_signature
from autoft.values import Backbone, Value


def build(source: Source, *, pretrained: bool = True, image_size: int = 0) -> Backbone:
    """Build the backbone of `source` with its weights, or with random ones.

    Raises:
        PluginError: the plugin is missing or fails, or what it returned keeps no contract.
        DataError: its file of weights does not fit.
    """
    pretrained = pretrained and source.pretrained
    function = plugins.load("backbone", source.plugin)
    options = _options(source, function, image_size)
    try:
        backbone = function(pretrained=pretrained and not source.weights, **options)
    except AutoftError:
        raise
    except Exception as error:  # a plugin, or the files it reads, may fail in any way
        raise PluginError(
            f"The backbone '{source.label}' cannot be built: {type(error).__name__}: {error}. "
            f"Choose another, or tell the author of the plugin '{source.plugin}'."
        ) from error
    if not isinstance(backbone, Backbone):
        raise PluginError(
            f"The backbone '{source.label}' returned a {type(backbone).__name__}; an "
            f"autoft.Backbone was expected."
        )
    try:
        stage_of_parameters(backbone)
    except PluginError as error:
        raise PluginError(f"The backbone '{source.label}' cannot be used. {error}") from error
    if not source.weights:
        return backbone
    if pretrained:
        load_weights(backbone.module, Path(source.weights))
    # What the plugin says of the weights that it would have fetched does not hold for this file.
    return replace(backbone, source=source.trained_on, license=source.license)


def _options(source: Source, function: Callable[..., object], image_size: int) -> dict[str, Value]:
    names = {parameter.name for parameter in read_signature(function)}
    unknown = set(source.options) - names
    if unknown:
        raise UsageError(f"The backbone '{source.plugin}' takes no {sorted(unknown)}.")
    extra: dict[str, Value] = {"image_size": image_size} if image_size else {}
    return {**source.options, **{k: v for k, v in extra.items() if k in names}}
