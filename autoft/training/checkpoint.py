"""What a trial writes: the weights that were scored, its latest state, and its curve.

Files are whole or absent (temp, sync, rename); after a crash of the machine `done.json`, and
`config.json` of a trial without weights, may also be empty. `last.safetensors` holds network and
optimiser, so that a trial cut off goes on at the epoch it had reached and ends with the same
numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from autoft.data.cache.files import (
    machine_errors,
    sync_to_disk,
    write_bytes_atomic,
    write_json_atomic,
)
from autoft.network.adapters import merged_state
from autoft.training.job import Outcome, Report, TrialJob
from autoft.training.noted import LAST, SCORED, drop_state
from autoft.training.optim import restore

CONFIG = "config.json"


@dataclass(frozen=True)
class State:
    """How far a trial had come: the next epoch and the curve up to it.

    `epochs` are those that it is going to have, so as to end in time (0: all that were planned).
    """

    epoch: int = 0
    scores: tuple[float, ...] = ()
    loss: float | None = None
    seconds: float = 0.0
    epochs: int = 0


def start(folder: Path, job: TrialJob, *, pretrained: bool) -> None:
    """Write `config.json`, before the trial begins: what it is, and from which kind of weights.

    The state that another trial has left here is dropped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "number": job.number,
        "epochs": job.epochs,
        "precision": asdict(job.precision),
        "pretrained": pretrained,
        "config": job.config.to_json(),
        "head_start": dict(job.head_start),
        "fold": job.fold,
        "of": job.of,
    }
    if _begun(folder) != json.loads(json.dumps(config)):
        drop_state(folder)
    # Without weights, a trial whose configuration a crash of the machine takes just begins anew.
    write_json_atomic(folder / CONFIG, config, synced=_has_weights(folder))
    if not (folder / LAST).exists():  # it begins anew: so does its curve
        (folder / "metrics.jsonl").unlink(missing_ok=True)


def _begun(folder: Path) -> object:
    """Return what `start` wrote of the trial that was here; None if there was none."""
    try:
        return json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return None


def append_curve(folder: Path, report: Report) -> None:
    """Add one epoch to `metrics.jsonl`."""
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(report)) + "\n")


def _has_weights(folder: Path) -> bool:
    return (folder / LAST).exists() or (folder / SCORED).exists()


def _keep_config(folder: Path) -> None:
    """Have `config.json` outlive a crash of the machine, before the first weights are written.

    Without it they are of no use.
    """
    if not _has_weights(folder):
        with machine_errors(folder / CONFIG), suppress(FileNotFoundError):
            sync_to_disk(folder / CONFIG)


def save_scored(folder: Path, network: nn.Module) -> None:
    """Write the network's weights as those that the latest score belongs to.

    What adapters add is merged into the weights: a plain build of the network takes them.
    """
    _keep_config(folder)
    write_bytes_atomic(folder / SCORED, save(_detached(merged_state(network))))


def save_last(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    average: Mapping[str, Tensor],
) -> None:
    """Write all that is needed to go on with the next epoch; `average` may be empty."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if value is not None:  # SGD keeps None for a parameter that never moved
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    metadata = {"state": json.dumps(asdict(state))}
    _keep_config(folder)
    write_bytes_atomic(folder / LAST, save(_detached(tensors), metadata=metadata))


def load_last(
    folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[State, dict[str, Tensor]]:
    """Restore the latest state into `network` and `optimizer`; a fresh one if there is none.

    Returned are how far it had come and the state of the average, if there was one.
    """
    try:
        with safe_open(folder / LAST, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, OSError):
        return State(), {}
    network.load_state_dict(_below("network.", tensors))
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below("optimizer.", tensors).items():
        index, slot = name.split(".", 1)
        slots.setdefault(int(index), {})[slot] = tensor
    restore(optimizer, slots)
    state = json.loads(metadata["state"])
    return State(**{**state, "scores": tuple(state["scores"])}), _below("average.", tensors)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def finish(folder: Path, outcome: Outcome) -> None:
    """Write `done.json`, last of all.

    It need not outlive a crash of the machine: the controlling process writes how trials end, and
    that is what is read. The latest state stays until then, see `noted.drop_state`.
    """
    write_json_atomic(folder / "done.json", asdict(outcome), synced=False)


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return plain tensors in main memory, none of which shares memory with another."""
    plain, taken = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != own.nbytes:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        plain[name] = own
    return plain
