"""How fast a backbone is here: measured once, remembered, and looked at before it is believed.

Speeds that were measured in a busy moment would plan every search of the day wrongly. So what is
recalled is compared with a short look at the forward pass, and measured anew where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from autoft.training.costs import crossing_bytes, measure_costs, view_seconds
from autoft.training.features import digest, parts_of, stages_of
from autoft.training.job import Costs, Precision, Setup
from autoft.training.precision import (
    Timed,
    choose,
    forward_per_second,
    fp32_per_second,
    memory_format,
)
from autoft.training.remember import place_of, recall, remember
from autoft.values import Backbone

LONG_TRIAL = 10  # epochs that a compiled network has to pay for itself
SPEED, CROSSING, VERSION = "speed", "crossing", 9
KNOWN_FOR = 24 * 3600.0  # seconds
LOOKS = 2
BELIEVED = 1.4  # times faster or slower than a look now: no longer believed


@dataclass(frozen=True)
class Speeds:
    """What was timed of a backbone: formats, fp32 on the CPU, where runs finish, and its stages.

    `uncut` says why it cannot be cut after every stage; "" if it can.
    """

    timed: Timed
    fp32_images_per_second: float
    costs: Costs
    uncut: str


def speeds_of(setup: Setup, backbone: Backbone) -> Speeds:
    """Return the speeds of `backbone`, as they were measured or as they are.

    It is on its device and in its best format afterwards. Other weights of the same network are
    as fast.
    """
    device, module = torch.device(setup.device), backbone.module
    trial = LONG_TRIAL * len(setup.train) if device.type == "cuda" else 0
    store = type(setup.store).__name__, setup.store.resize
    network = architecture(backbone)
    key = place_of(setup, VERSION, network, trial.bit_length(), store)
    if (known := recall(SPEED, key, KNOWN_FOR)) is not None:
        speeds = _rebuilt(known)
        module.to(device).to(memory_format=memory_format(speeds.timed.precision))
        if _holds(speeds.timed, setup, backbone):
            return speeds
    speeds = _measure(setup, backbone, network, trial)
    remember(SPEED, key, asdict(speeds))
    return speeds


def architecture(backbone: Backbone) -> str:
    """Return what tells networks that compute in another way from this one, whatever weights."""
    module = backbone.module
    shapes = [(name, tuple(each.shape)) for name, each in module.state_dict().items()]
    kinds = [type(each).__qualname__ for each in module.modules()]
    return digest(parts_of(module), kinds, shapes, stages_of(backbone))


def _rebuilt(known: Mapping[str, Any]) -> Speeds:
    timed, costs = known["timed"], known["costs"]
    columns = {name: tuple(costs[name]) for name in ("prefix", "tail", "score", "bytes")}
    return Speeds(
        Timed(**{**timed, "precision": Precision(**timed["precision"])}),
        known["fp32_images_per_second"],
        Costs(**{**costs, **columns}),
        known["uncut"],
    )


def _holds(timed: Timed, setup: Setup, backbone: Backbone) -> bool:
    """Tell whether the forward pass is about as fast now as it is said to be, in one of two looks.

    A busy moment of the second network of a kind is no reason to measure for many seconds.
    """
    device = torch.device(setup.device)
    for _ in range(LOOKS):
        now = forward_per_second(backbone.module, setup.image_size, device, timed.precision)
        if 1 / BELIEVED <= timed.images_per_second / now <= BELIEVED:
            return True
    return False


def _measure(setup: Setup, backbone: Backbone, network: str, trial: int) -> Speeds:
    device, module, size = torch.device(setup.device), backbone.module, setup.image_size
    crossing, uncut = _crossing(setup, backbone, network)
    cpu_per_second = fp32_per_second(module, size)
    timed = choose(module.to(device), size, device, images_in_a_trial=trial)
    costs = measure_costs(
        backbone,
        size,
        device,
        timed.precision,
        crossing=crossing,
        view=view_seconds(setup, backbone),
    )
    return Speeds(timed, cpu_per_second, costs, uncut)


def _crossing(setup: Setup, backbone: Backbone, network: str) -> tuple[tuple[int, ...], str]:
    """Return what crosses each cut, which stays as it is: found once for all data sets."""
    key = place_of(setup, VERSION, network)
    if (known := recall(CROSSING, key)) is not None:
        return tuple(known["bytes"]), known["uncut"]
    crossing, uncut = crossing_bytes(backbone, setup.image_size)
    remember(CROSSING, key, {"bytes": crossing, "uncut": uncut})
    return crossing, uncut
