"""What a worker can be asked to do. Nothing heavy is imported before it is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoft.errors import AutoftError, MachineError, PluginError
from autoft.network.sources import Source
from autoft.network.strategy import Treatment
from autoft.search.configs import Space, StrategyInfo
from autoft.search.jobs import Finished, FinishJob
from autoft.search.policy import KEPT
from autoft.training.job import MAX_IMAGES, Outcome, Ranked, Report, Setup, TrialJob
from autoft.training.measures import Measured, Sample
from autoft.training.plan import Room
from autoft.values import Part


@dataclass(frozen=True)
class Link:
    """How a task talks to the controlling process while it works."""

    progress: Callable[[str, int, int], None]
    report: Callable[[Report], bool]


@dataclass(frozen=True)
class Described:
    """What the installed plugins offer; `broken` says why some do not.

    `tiers` and `priors` have the size of backbones that state one, and their accuracy on
    ImageNet-1k.
    """

    space: Space
    tiers: Mapping[str, str]
    broken: tuple[str, ...]
    priors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Begun:
    """What a worker found first of all: devices to run on, and what is installed."""

    devices: tuple[str, ...]
    described: Described


@dataclass(frozen=True)
class Names:
    """Which plugins are asked for by name, and which are merely installed."""

    strategies: tuple[str, ...]
    heads: tuple[str, ...]
    asked_strategies: bool
    asked_heads: bool


def begin(
    link: Link, device: str, names: Names, asked: Sequence[Source], image_size: int
) -> Begun:
    """Find devices and plugins, and build what was asked for by name, before data is decoded.

    Raises:
        AutoftError: the first thing that was asked for and cannot be had.
    """
    found = Begun(devices(device), describe(names))
    check(asked, image_size)
    return found


def devices(device: str) -> tuple[str, ...]:
    """Return the torch devices that `--device` means, one worker each.

    Raises:
        MachineError: CUDA was asked for and is not to be had, or has fewer devices.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return tuple(f"cuda:{index}" for index in range(count)) or ("cpu",)
    if device == "cpu":
        return ("cpu",)
    wanted = [int(i) for i in device.removeprefix("cuda").removeprefix(":").split(",") if i]
    wanted = wanted or list(range(count))
    if count == 0 or max(wanted) >= count:
        raise MachineError(
            f"--device {device}: torch sees {count} CUDA devices here. Use --device cpu, or see "
            f"`autoft doctor`."
        )
    return tuple(f"cuda:{index}" for index in wanted)


def describe(names: Names) -> Described:
    """Read the signatures of strategies and heads; a broken one that nobody asked for is noted.

    Raises:
        PluginError: a plugin that was asked for is missing or broken.
    """
    from autoft.space import read_signature
    from autoft.training import recipe

    broken: list[str] = []
    strategies = _each(names.strategies, names.asked_strategies, broken, _strategy_info)
    heads = _each(names.heads, names.asked_heads, broken, _head_info)
    third_party = frozenset(name for name in heads if not _builtin("head", name))
    space = Space(
        (),
        strategies,
        heads,
        read_signature(recipe.tuning),
        read_signature(recipe.probing),
        third_party_heads=third_party,
    )
    stated = _stated()
    tiers = {name: str(each["tier"]) for name, each in stated.items() if "tier" in each}
    scores = {name: each.get("top1") for name, each in stated.items()}
    priors = {name: float(top) for name, top in scores.items() if isinstance(top, int | float)}
    return Described(space, tiers, tuple(broken), priors)


def _each(
    names: Sequence[str], asked: bool, broken: list[str], read: Callable[[str], Any]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = read(name)
        except AutoftError as error:
            if asked:
                raise
            broken.append(str(error))
        except Exception as error:
            text = f"The plugin '{name}' fails: {type(error).__name__}: {error}"
            if asked:
                raise PluginError(text) from error
            broken.append(text)
    return found


def _strategy_info(name: str) -> StrategyInfo:
    from autoft import plugins
    from autoft.network.strategy import bind
    from autoft.space import read_signature
    from autoft.values import Part

    bound = bind(Part(name), num_stages=4)
    parameters = read_signature(plugins.load("strategy", name))
    trains = bound.trains_backbone()
    return StrategyInfo(
        parameters,
        trains,
        bound.pretrained,
        _builtin("strategy", name),
        trains and bound.frozen_prefix() > 0,
    )


def treatment(link: Link, strategy: Part, num_stages: int) -> Treatment:
    """Say what a strategy leaves alone; nothing of one that is broken: its trial says so."""
    from autoft.network.strategy import bind

    try:
        return bind(strategy, num_stages).treatment()
    except Exception:  # noqa: BLE001 - plugins may raise anything at all
        return Treatment()


def _head_info(name: str) -> Any:
    from autoft import plugins
    from autoft.space import read_signature

    return read_signature(plugins.load("head", name))


def _builtin(kind: str, name: str) -> bool:
    from autoft import plugins

    return plugins.find(kind, name).builtin


def _stated() -> dict[str, dict[str, Any]]:
    """Return what every backbone states in its signature: defaults of its options, by name."""
    from autoft import plugins
    from autoft.space import read_signature

    found: dict[str, dict[str, Any]] = {}
    for plugin in plugins.installed("backbone"):
        try:
            parameters = read_signature(plugins.load("backbone", plugin.full_name))
        except AutoftError:
            continue  # it is listed with its reason by `autoft plugins list`
        found[plugin.name] = {parameter.name: parameter.default for parameter in parameters}
    return found


def check(sources: Sequence[Source], image_size: int) -> None:
    """Build every backbone that was asked for by name, without weights.

    Raises:
        AutoftError: the first that cannot be, with the reason.
    """
    from dataclasses import replace

    from autoft.network.build import build

    for source in sources:
        build(replace(source, weights=""), pretrained=False, image_size=image_size)


def rank(link: Link, setup: Setup, label: str, limit: int, timed: bool) -> Ranked:
    """Measure one backbone on at most `limit` images of each part (0: as many as count)."""
    from autoft.training.rank import rank_backbone

    _settle(setup)
    return rank_backbone(setup, label, link.progress, limit or MAX_IMAGES, timed=timed)


def measure_pixels(link: Link, setup: Setup, sample: Sample, repeats: int) -> Measured:
    """Measure what can be known of a sample without a backbone."""
    from autoft.training.profile import measure_pixels as measure

    _settle(setup)
    return measure(setup, sample, repeats)


def measure_backbone(
    link: Link, setup: Setup, label: str, sample: Sample, repeats: int
) -> Measured:
    """Measure what one backbone knows of a sample."""
    from autoft.training.profile import measure_backbone as measure

    _settle(setup)
    return measure(setup, label, sample, repeats, link.progress)


def mirroring_keeps_labels(link: Link, setup: Setup, ranked: Ranked) -> bool:
    """Measure whether mirrored images keep their labels."""
    from autoft.training.rank import mirroring_keeps_labels as measure

    _settle(setup)
    return measure(setup, ranked)


def train(link: Link, setup: Setup, jobs: Sequence[TrialJob]) -> list[Outcome]:
    """Train trials; whatever a plugin does wrong in one is that trial's failure."""
    from autoft.training.trial import train_trials

    _settle(setup)
    return train_trials(setup, jobs, link.report, keep=KEPT)


def finish(link: Link, setup: Setup, job: FinishJob) -> Finished:
    """Measure, export and prove the winner."""
    from autoft.search.finish import finish as work

    _settle(setup)
    return work(setup, job, link.progress)


def _settle(setup: Setup) -> None:
    """Have the process compute with the threads of `setup`, and keep what memory it frees."""
    import torch

    from autoft.training.heap import settle

    settle()
    if torch.get_num_threads() != setup.threads:
        torch.set_num_threads(setup.threads)


def room(link: Link, device: str) -> Room:
    """Measure how much a trial may keep of what its frozen stages give."""
    from autoft.training.plan import room_of

    return room_of(device)


def measure_speeds(link: Link, setup: Setup, label: str) -> Ranked:
    """Time a backbone; its weights are not looked for, and random ones are as fast."""
    from autoft.training.rank import speed_of

    _settle(setup)
    return speed_of(setup, label)
