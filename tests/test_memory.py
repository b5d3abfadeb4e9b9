"""Memory that runs out: batches in parts with the same effect, and workers that are killed."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoft.data.views import Batch
from autoft.errors import MachineError
from autoft.search.budget import Budget
from autoft.search.director import Director
from autoft.search.engines import local, tasks
from autoft.search.engines.local import Seat
from autoft.search.engines.worker import Worker
from autoft.search.folder import RunFolder
from autoft.search.study import Study
from autoft.training.evaluate import logits_of
from autoft.training.job import Precision, Ranked, Setup
from autoft.training.memory import MicroBatches, is_out_of_memory, split_of

FULL = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
BACKBONE = "test_resnet.fixed"


@pytest.mark.parametrize(
    ("rows", "size", "least", "wanted"),
    [
        (32, 0, 2, (32,)),
        (32, 16, 2, (16, 16)),
        (32, 12, 2, (11, 11, 10)),
        (17, 16, 2, (9, 8)),
        (5, 2, 2, (3, 2)),
        (5, 2, 1, (2, 2, 1)),
        (3, 2, 2, (3,)),
        (1, 1, 2, (1,)),
        (4, 1, 1, (1, 1, 1, 1)),
        (6, 100, 2, (6,)),
    ],
)
def test_parts_are_even_and_none_is_too_small(rows, size, least, wanted) -> None:
    assert split_of(rows, size, least) == wanted


class Network(nn.Module):
    """A network with dropout and statistics that holds `room` images at once, fewer with time."""

    def __init__(self, room: int, *, norm: bool = False, where: str = "forward") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.Dropout(0.0), nn.Tanh())
        self.norm = nn.BatchNorm1d(9) if norm else nn.Identity()
        self.last = nn.Linear(9, 3)
        self.room, self.where, self.sizes = room, where, list[int]()

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        features = self.norm(self.inner(images))
        if len(images) > self.room:
            if self.where == "forward":
                raise FULL
            features.register_hook(self.refuse)
        return self.last(features)

    def refuse(self, _: Tensor) -> None:
        raise FULL


def batch_of(rows: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(rows, 3, 4, 4, generator=generator)
    targets = functional.one_hot(torch.arange(rows) % 3, 3).float()
    return Batch(images, targets, torch.rand(rows, generator=generator) + 0.5)


def loss_of(network: nn.Module):
    def loss(batch: Batch) -> Tensor:
        losses = functional.cross_entropy(
            network(batch.images.contiguous()), batch.targets, reduction="none"
        )
        return (losses * batch.weights).mean()

    return loss


def gradients(network: nn.Module, batch: Batch, micro: MicroBatches) -> tuple[Tensor, Tensor]:
    loss = micro.gradients(network, batch, loss_of(network))
    return loss, torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("rows", [16, 13])
def test_t06_the_gradient_in_parts_is_that_of_the_whole_batch(rows, where) -> None:
    network, micro = Network(5, where=where), MicroBatches()
    loss, found = gradients(network, batch_of(rows), micro)
    whole_loss, whole = gradients(Network(99), batch_of(rows), MicroBatches())
    assert micro.size in (4, 6)
    assert max(network.sizes[-3:]) <= 5
    assert torch.allclose(loss, whole_loss, atol=1e-6)
    assert torch.allclose(found, whole, atol=1e-6)
    assert not loss.requires_grad


def test_t06_what_fitted_is_kept_and_never_tried_larger() -> None:
    network, micro = Network(99), MicroBatches()
    gradients(network, batch_of(16), micro)
    assert micro.size == 0
    network.room = 4  # memory runs short in the middle of a trial
    gradients(network, batch_of(16), micro)
    network.room, network.sizes = 99, []
    gradients(network, batch_of(16), micro)
    gradients(network, batch_of(3), micro)
    assert network.sizes == [4, 4, 4, 4, 3]


def test_without_want_the_step_is_the_plain_one_bit_by_bit() -> None:
    network = Network(99, norm=True)
    _, found = gradients(network, batch_of(16), MicroBatches())
    plain = Network(99, norm=True)
    loss_of(plain)(batch_of(16)).backward()
    assert torch.equal(found, torch.cat([p.grad.flatten() for p in plain.parameters()]))
    assert torch.equal(network.norm.running_mean, plain.norm.running_mean)


def test_a_repeated_batch_starts_from_the_same_numbers_and_statistics() -> None:
    network, seen = Network(8, norm=True), []
    network.inner[2].p = 0.5
    network.inner[2].register_forward_hook(
        lambda *_: seen.append((torch.get_rng_state(), network.norm.num_batches_tracked.item()))
    )
    torch.manual_seed(3)
    gradients(network, batch_of(16), MicroBatches())
    assert [count for _, count in seen] == [0, 0, 1]  # the failed attempt left no trace
    torch.manual_seed(3)
    torch.nn.functional.dropout(torch.ones(8, 9), 0.5)
    assert torch.equal(seen[1][0], torch.get_rng_state())


def test_batch_norms_never_get_one_image() -> None:
    network, micro = Network(3, norm=True), MicroBatches()
    gradients(network, batch_of(13), micro)
    assert all(1 < size <= 3 for size in network.sizes[-4:])
    network.eval()
    network.room = 1
    gradients(network, batch_of(13), micro)
    assert network.sizes[-13:] == [1] * 13


@pytest.mark.parametrize(("norm", "rows"), [(False, 8), (True, 8), (True, 3)])
def test_t06_memory_for_nothing_is_one_sentence_with_what_to_do(norm, rows) -> None:
    network, micro = Network(0, norm=norm), MicroBatches()
    with pytest.raises(MachineError, match="smaller --image-size"):
        gradients(network, batch_of(rows), micro)
    assert all(p.grad is None for p in network.parameters())


def test_another_error_is_not_taken_for_want_of_memory() -> None:
    network = Network(99)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradients(network, replace(batch_of(4), images=torch.zeros(4, 3, 5, 5)), MicroBatches())
    assert network.sizes == [4]
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory"))


def test_t06_an_evaluation_is_halved_as_well() -> None:
    network, batches = Network(3), [batch_of(16).images, batch_of(7).images]
    found = logits_of(network, batches, torch.device("cpu"), Precision())
    whole = logits_of(Network(99), batches, torch.device("cpu"), Precision())
    assert found == pytest.approx(whole, abs=1e-6)
    assert found.shape == (23, 3)
    assert network.sizes == [16, 8, 4, *[2] * 8, *[2, 2, 2, 1]]


REAL = """
    import resource, sys
    import torch
    from torch import nn
    from torch.nn import functional
    from autoft.data.views import Batch
    from autoft.training.memory import MicroBatches

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Tanh(), nn.Conv2d(64, 8, 3), nn.ReLU(),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    images = torch.randn(64, 3, 64, 64)
    batch = Batch(images, torch.eye(3)[torch.arange(64) % 3], torch.ones(64))
    micro = MicroBatches()

    def loss(part):
        logits = network(part.images)
        return functional.cross_entropy(logits, part.targets)

    def step(part):
        value = micro.gradients(network, part, loss)
        optimizer.step()
        return float(value)

    small = Batch(images[:2], batch.targets[:2], batch.weights[:2])
    micro.gradients(network, small, loss)  # the libraries have all that they want for themselves
    if sys.argv[1] == "limited":
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limit = used + 90 * 2**20  # one layer of the whole batch takes 60 MiB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    losses = [step(batch) for _ in range(3)]
    print(micro.size, *losses)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS limits memory on Linux")
def test_t06_a_real_want_of_memory_gives_the_same_training() -> None:
    def train(how: str) -> list[float]:
        command = [sys.executable, "-c", textwrap.dedent(REAL), how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        return [float(word) for word in done.stdout.split()]

    whole, *losses = train("free")
    size, *limited = train("limited")
    assert whole == 0
    assert 0 < size <= 32
    assert limited == pytest.approx(losses, rel=1e-4)
    assert losses[2] < losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_t06_a_real_want_of_memory_on_cuda() -> None:
    device = torch.device("cuda:0")
    whole = wide(device)
    expected = gradients(whole, images_on(device), MicroBatches())[1]
    needed, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    limited, micro = wide(device), MicroBatches()
    del whole
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5 * needed / total)
    try:
        found = gradients(limited, images_on(device), micro)[1]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 0 < micro.size <= 32
    assert torch.allclose(found, expected, atol=1e-4)


def wide(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.Tanh(), nn.Conv2d(64, 64, 3), nn.Tanh()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3)).to(
        device
    )


def images_on(device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(64, 3, 224, 224, generator=generator)
    targets = torch.eye(3)[torch.arange(64) % 3]
    return Batch(images.to(device), targets.to(device), torch.ones(64, device=device))


# --- a worker that the operating system kills ----------------------------------------------------


@pytest.fixture
def setup(photos, tiny_sources, setup_in, tmp_path) -> Setup:
    (tmp_path / "trials").mkdir(exist_ok=True)
    return setup_in(photos, tiny_sources, tmp_path)


def director_of(setup: Setup, watch, trials: int) -> Director:
    names = tasks.Names(("full",), ("linear",), True, True)
    space = replace(tasks.describe(names).space, backbones=(BACKBONE,))
    ranked = {BACKBONE: Ranked(BACKBONE, images_per_second=500.0, trained_per_second=200.0)}
    budget = Budget(time.time() + 200, trials, ranked, 72, 24)
    budget.epochs = lambda *_: 3
    study = Study(space, 0)
    director = Director(
        RunFolder(setup.folder),
        space,
        study,
        budget,
        0,
        (),
        lambda kind, **told: watch(kind, told),
    )
    director.resume()
    return director


def search(setup: Setup, kill: set[tuple[int, int]], trials: int = 2) -> tuple[Director, list]:
    """Run trials; the worker gets a SIGKILL whenever one of (trial, epoch) has been told."""
    worker, told = Worker(), []

    def watch(kind: str, data: dict) -> None:
        told.append((kind, data))
        at = (data.get("number"), data.get("epoch"))
        if kind == "epoch" and at in kill:
            kill.remove(at)
            worker._process.kill()

    director = director_of(setup, watch, trials)
    try:
        local.run_trials(director, setup, [Seat(worker, "cpu", 1)])
    finally:
        worker.kill()
    return director, told


@pytest.mark.slow
def test_t07_a_killed_worker_costs_its_trial_one_epoch_at_most(setup) -> None:
    director, told = search(setup, {(0, 2)})
    assert [(r.status, len(r.scores)) for r in director.results] == [("done", 3), ("done", 3)]
    epochs = [data["epoch"] for kind, data in told if kind == "epoch" and data["number"] == 0]
    assert epochs == [1, 2, 3]  # none is told twice
    (note,) = [data["text"] for kind, data in told if kind == "note"]
    assert "Trial 0: the worker process was killed by SIGKILL" in note
    assert "when memory runs out" in note
    assert "once more" in note


@pytest.mark.slow
def test_t07_a_trial_whose_worker_is_killed_twice_fails_and_the_search_goes_on(setup) -> None:
    director, _ = search(setup, {(0, 1), (0, 2)})
    first, second = director.results
    assert (first.status, first.score) == ("failed", None)
    assert "tried 2 times" in first.error
    assert "SIGKILL, which is what the operating system does when memory runs out" in first.error
    assert "--image-size" in first.error
    assert (second.status, len(second.scores)) == ("done", 3)
    lines = (setup.folder / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["failed", "done"]
    assert not list(Path(setup.folder).glob("trials/0000/done.json"))
