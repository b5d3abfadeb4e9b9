"""The end of a run, inside a worker: measure the winner, export it, prove it, read the test part.

The weights are the very ones that were scored: nothing is trained again. All numbers are measured
with the exported function's twin, the eager network in fp32 on the CPU.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoft.data.views import evaluation_batches
from autoft.errors import DataError, MachineError
from autoft.export.artifact import FORMATS, load_weights, write_card, write_weights
from autoft.export.onnx import metadata_of
from autoft.export.parity import check_parity, write_parity
from autoft.network.assemble import Network, assemble
from autoft.network.build import build
from autoft.search.folder import RunFolder
from autoft.search.jobs import Finished, FinishJob
from autoft.selection.intervals import estimate
from autoft.training import metrics
from autoft.training.evaluate import EVALUATION_BATCH, logits_of
from autoft.training.job import Images, Precision, Setup
from autoft.training.noted import SCORED
from autoft.values import Backbone, Estimate, Preprocess, TrialResult

Progress = Callable[[str, int, int], None]
PACKAGES = ("autoft", "torch", "torchvision", "timm", "optuna", "onnx", "onnxruntime", "numpy")
CPU = torch.device("cpu")
NO_WEIGHTS = "none"  # what the card says of weights where a trial began without


def finish(setup: Setup, job: FinishJob, progress: Progress) -> Finished:
    """Write the artifact of `job.winner` and measure it.

    Raises:
        DataError: the kept weights are missing or damaged.
        MachineError: no format could be exported.
    """
    setup = replace(setup, device="cpu")
    network, backbone = load_trial(setup, job.winner)
    pre = setup.preprocess(backbone)
    job.out.mkdir(parents=True, exist_ok=True)
    write_weights(network, job.out / "model.safetensors")
    files, notes = _export(network, setup, pre, job, backbone, progress)
    if job.formats and not files:
        raise MachineError(f"No format could be exported. {' '.join(notes)}")
    progress("proving the exported files on the validation images", 0, 1)
    batches = partial(_batches, setup, setup.validation, pre, "comparing", progress)
    parities = tuple(check_parity(network, files, batches)) if files else ()
    write_parity(job.out / "parity.json", parities)
    notes += [
        f"The {p.format} file does NOT give the same answers." for p in parities if not p.passed
    ]
    held_out = _logits(network, setup, setup.validation, pre, "validation", progress)
    validation = _estimate(setup, setup.validation, held_out)
    tested, test, baseline = None, job.known_test, None
    if len(job.test):
        tested = _logits(network, setup, job.test, pre, "test", progress)
        test = _estimate(setup, job.test, tested)
        baseline = _baseline_test(setup, job, test, progress)
    proofs = tuple(asdict(each) for each in parities)
    finished = Finished(validation, test, baseline, proofs, tuple(notes), held_out, tested)
    write_card(job.out, _card(setup, job, backbone, pre, finished))
    return finished


def load_trial(setup: Setup, result: TrialResult) -> tuple[Network, Backbone]:
    """Rebuild the network of a trial on the CPU with the weights that were scored.

    Where it began with random weights, those that were published for its backbone have no part in
    it, and neither has their licence.
    """
    config = result.config
    source = setup.sources[config.backbone.name]
    backbone = build(source, pretrained=False, image_size=setup.image_size)
    pool = str(config.train.get("pool", "native"))
    network = assemble(backbone, config.head, len(setup.classes), pool, setup.image_size)
    path = setup.folder / "trials" / f"{result.number:04d}" / SCORED
    if not path.is_file():
        raise DataError(
            f"The weights of trial {result.number} are not kept at {path}. Only those of the best "
            f"trials are; choose one that `autoft leaderboard` lists with weights."
        )
    load_weights(network, path)
    began = RunFolder(setup.folder).read_json(f"trials/{result.number:04d}/config.json")
    if began and not began["pretrained"]:
        backbone = replace(backbone, source=NO_WEIGHTS, license=NO_WEIGHTS)
    return network.eval(), backbone


def _export(
    network: Network,
    setup: Setup,
    pre: Preprocess,
    job: FinishJob,
    backbone: Backbone,
    progress: Progress,
) -> tuple[dict[str, Path], list[str]]:
    """Write every asked-for format; one that fails is a note, not the end."""
    files: dict[str, Path] = {}
    notes: list[str] = []
    extra = {
        "autoft.metric": setup.metric,
        "autoft.split": job.split_hash,
        "autoft.backbone": job.winner.config.backbone.name,
        "autoft.license": backbone.license,
    }
    told = metadata_of(setup.classes, pre, extra)
    for name in job.formats:
        file_name, export = FORMATS[name]
        progress(f"exporting {name}", len(files), len(job.formats))
        try:
            export(network, job.out / file_name, pre, told)
        except Exception as error:  # noqa: BLE001 - exporters raise anything; the others go on
            first = (str(error).strip() or repr(error)).splitlines()[0]
            notes.append(f"The model could not be exported as {name}: {first[:300]}")
            (job.out / file_name).unlink(missing_ok=True)
        else:
            files[name] = job.out / file_name
    return files, notes


def _batches(
    setup: Setup, part: Images, pre: Preprocess, what: str, progress: Progress
) -> Iterator[Tensor]:
    done = 0
    for images in evaluation_batches(setup.store, part.rows, pre, EVALUATION_BATCH):
        yield images
        done += len(images)
        progress(what, done, len(part))


def _logits(
    network: Network, setup: Setup, part: Images, pre: Preprocess, what: str, progress: Progress
) -> NDArray[np.float32]:
    batches = _batches(setup, part, pre, f"scoring the {what} part", progress)
    return logits_of(network, batches, CPU, Precision(channels_last=True))


def _estimate(setup: Setup, part: Images, logits: NDArray[np.float32]) -> Estimate:
    return estimate(setup.metric, part.labels, metrics.predict(logits))


def _baseline_test(
    setup: Setup, job: FinishJob, test: Estimate, progress: Progress
) -> Estimate | None:
    """Read the test part with the linear probe as well, which says what the search was worth."""
    if job.baseline is None:
        return None
    if job.baseline.number == job.winner.number:
        return test
    network, backbone = load_trial(setup, job.baseline)
    pre = setup.preprocess(backbone)
    logits = _logits(network, setup, job.test, pre, "test (baseline)", progress)
    return _estimate(setup, job.test, logits)


def versions() -> dict[str, str]:
    """Return the versions that a number depends on."""
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in PACKAGES
    }


def _card(
    setup: Setup, job: FinishJob, backbone: Backbone, pre: Preprocess, finished: Finished
) -> Mapping[str, Any]:
    config = job.winner.config
    weights = (job.out / "model.safetensors").read_bytes()
    return {
        "backbone": config.backbone.name,
        "strategy": config.strategy.name,
        "head": config.head.name,
        "params": config.answers(),
        "trial": job.winner.number,
        "plugin": setup.sources[config.backbone.name].to_json(),
        "classes": list(setup.classes),
        "preprocess": asdict(pre),
        "metric": setup.metric,
        "score": finished.validation.value,
        "test": asdict(finished.test) if finished.test else None,
        "source": backbone.source,
        "license": backbone.license,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "split": job.split_hash,
        "versions": versions(),
        "parity": list(finished.parity),
    }
