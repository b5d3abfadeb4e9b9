"""Checks of a strategy: pure arithmetic from a number of stages and a progress to rates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autoft.errors import AutoftError, PluginError
from autoft.network.adapters import adapt, merged_state
from autoft.network.parametrized import is_adapter
from autoft.network.rates import check_rates
from autoft.network.strategy import BoundStrategy, bind_function
from autoft.space import Choice, Range, defaults, read_signature, searched
from autoft.testing.samples import IMAGE_SIZE, samples
from autoft.values import Backbone, Part, Rates, Value

MAX_STAGES = 24
PROGRESS = (0.0, 0.25, 0.5, 0.75, 0.99)
TOLERANCE = 1e-5  # of the largest feature

Strategy = Callable[..., Any]  # what it returns is what is checked


def check_returns_one_rate_per_stage(plugin: Strategy) -> None:
    """A strategy returns one rate for each stage: a float, or Rates for weights, norms, biases."""
    for num_stages, progress, choices in _situations(plugin):
        rates = plugin(num_stages, progress, **choices)
        where = _where(num_stages, progress, choices)
        if not isinstance(rates, Sequence):
            raise AssertionError(
                f"The strategy returned a {type(rates).__name__} {where}. Return a list of rates."
            )
        if len(rates) != num_stages:
            raise AssertionError(
                f"The strategy returned {len(rates)} rates {where}. Return one per stage."
            )
        for index, rate in enumerate(rates):
            if not isinstance(rate, int | float | Rates):
                raise AssertionError(
                    f"The strategy returned {rate!r}, a {type(rate).__name__}, for stage {index} "
                    f"{where}. A rate is a float or autoft.Rates."
                )


def check_rates_are_finite_and_not_negative(plugin: Strategy) -> None:
    """Every rate is finite and not below 0, whatever the choices within their ranges."""
    for num_stages, progress, choices in _situations(plugin):
        rates = plugin(num_stages, progress, **choices)
        try:
            check_rates(rates, num_stages)
        except (PluginError, TypeError) as error:
            raise AssertionError(f"{error} ({_where(num_stages, progress, choices)})") from error


def check_strategy_is_pure(plugin: Strategy) -> None:
    """The same arguments always give the same rates: nothing is remembered, nothing is drawn."""
    situations = list(_situations(plugin))
    first = [list(plugin(stages, progress, **choices)) for stages, progress, choices in situations]
    # Backwards, so that what an earlier call left behind shows.
    for expected, (num_stages, progress, choices) in zip(
        reversed(first), reversed(situations), strict=True
    ):
        again = list(plugin(num_stages, progress, **choices))
        if again != expected:
            raise AssertionError(
                f"The strategy returned {expected} and later {again} "
                f"{_where(num_stages, progress, choices)}. It must depend on its arguments alone."
            )


def check_gradient_norms_may_be_anything(plugin: Strategy) -> None:
    """A strategy that takes gradient_norms gives valid rates without any, and for odd ones, too.

    Norms are 0 where nothing flows, infinite where all parameters are 0, and NaN where training
    has failed.
    """
    parameters = {parameter.name: parameter for parameter in read_signature(plugin)}
    if "gradient_norms" not in parameters:
        return
    default = parameters["gradient_norms"].default
    if default is None or len(default) != 0:
        raise AssertionError(
            f"The default of gradient_norms is {default!r}. Let it be (), for nothing measured."
        )
    for num_stages, progress, choices in _situations(plugin):
        for norms in _odd_norms(num_stages):
            given = {**choices, "gradient_norms": norms}
            _check_same_twice(plugin, num_stages, progress, given)


def _odd_norms(num_stages: int) -> Iterator[tuple[float, ...]]:
    usual = tuple(0.1 * (1 + i) for i in range(num_stages))
    yield ()
    yield usual
    for odd in (0.0, float("nan"), float("inf")):
        yield (odd, *usual[1:])
        yield (odd,) * num_stages


def _check_same_twice(
    plugin: Strategy, num_stages: int, progress: float, given: Mapping[str, Any]
) -> None:
    where = _where(num_stages, progress, given)
    try:
        first = check_rates(plugin(num_stages, progress, **given), num_stages)
        again = check_rates(plugin(num_stages, progress, **given), num_stages)
    except (PluginError, TypeError, ArithmeticError) as error:
        raise AssertionError(f"{type(error).__name__}: {error} ({where})") from error
    if first != again:
        raise AssertionError(f"The strategy returned {first} and then {again} {where}.")


def check_adapter_keeps_features_and_merges(plugin: Strategy) -> None:
    """An adapter leaves features as they are at the start, and merges into a plain network.

    It is tried on a small convolution network and a small transformer, at every end of every
    range; one that has nothing to adapt in the one must find something in the other.
    """
    if not bind_function(plugin, Part("checked"), 1).adapter:
        return
    for choices in choices_at_the_ends(plugin):
        refusals = [_adapter_fails(plugin, choices, backbone) for backbone in samples()]
        if all(refusals):
            raise AssertionError(f"{refusals[0]} (with {dict(choices)!r})")


def _adapter_fails(plugin: Strategy, choices: Mapping[str, Value], plain: Backbone) -> str:
    """Check the adapter on one backbone; return why it does not suit it, or nothing."""
    strategy = bind_function(plugin, Part("checked", choices), len(plain.stages))
    try:
        with torch.random.fork_rng(devices=[]):
            adapted = adapt(copy.deepcopy(plain), strategy, image_size=IMAGE_SIZE)
    except PluginError as error:
        raise AssertionError(str(error)) from error
    except AutoftError as error:
        return str(error)
    _check_trained(strategy)
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=_generator())
    before = _features(adapted, images)
    _perturb(adapted)
    moved = _features(adapted, images)
    if torch.equal(before, moved):
        raise AssertionError(
            f"The features do not depend on what the adapter '{strategy.adapter}' added. Let the "
            f"parametrizations use their parameters."
        )
    plain.module.load_state_dict(merged_state(adapted.module))
    difference = float((_features(plain, images) - moved).abs().max())
    if not difference <= TOLERANCE * float(moved.abs().max()):
        raise AssertionError(
            f"Merged into a plain network, what the adapter '{strategy.adapter}' learnt gives "
            f"other features (largest difference {difference:.3g}). All that it does must lie in "
            f"the values of parametrized tensors."
        )
    return ""


def _check_trained(strategy: BoundStrategy) -> None:
    if not any(rate.adapters for at in PROGRESS for rate in strategy.rates(at)):
        raise AssertionError(
            f"The strategy adds the adapter '{strategy.adapter}' and never trains it. Return "
            f"Rates(adapters=...) above 0 for some stage."
        )


def _perturb(backbone: Backbone) -> None:
    generator = _generator()
    with torch.no_grad():
        for name, parameter in backbone.module.named_parameters():
            if is_adapter(name):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _features(backbone: Backbone, images: Tensor) -> Tensor:
    with torch.no_grad():
        features: Tensor = backbone.module.eval()(images)
    return features


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _situations(plugin: Strategy) -> Iterator[tuple[int, float, dict[str, Value]]]:
    """Yield numbers of stages, progress and choices: the defaults, and the ends of every range."""
    for choices in choices_at_the_ends(plugin):
        for num_stages in range(1, MAX_STAGES + 1):
            for progress in PROGRESS:
                yield num_stages, progress, choices


def choices_at_the_ends(plugin: Callable[..., object]) -> list[dict[str, Value]]:
    """Return the defaults, and each of them with one parameter moved to an end of its range."""
    parameters = read_signature(plugin)
    usual = defaults(parameters)
    moved = [
        usual | {name: end}
        for name, range_ in searched(parameters).items()
        for end in _ends(range_)
    ]
    return [usual, *moved]


def _ends(range_: Range) -> tuple[Value, ...]:
    return range_.options if isinstance(range_, Choice) else (range_.low, range_.high)


def _where(num_stages: int, progress: float, choices: Mapping[str, Value]) -> str:
    chosen = "".join(f", {name}={value!r}" for name, value in choices.items())
    return f"for {num_stages} stages at progress {progress}{chosen}"


STRATEGY_CHECKS = (
    check_returns_one_rate_per_stage,
    check_rates_are_finite_and_not_negative,
    check_strategy_is_pure,
    check_gradient_norms_may_be_anything,
    check_adapter_keeps_features_and_merges,
)
