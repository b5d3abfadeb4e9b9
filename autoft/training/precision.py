"""The number format and memory layout in which a backbone trains fastest on a device, by timing.

Candidates take turns, so that a busy moment is one for all of them, and another format than plain
fp32 is chosen only where it wins clearly, by the clock and by the processor time that it takes: a
close race is settled by chance, and so is one on a machine that does other work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from autoft.looking import evaluating
from autoft.training.job import Precision
from autoft.training.memory import is_out_of_memory

PLAIN: Final = Precision()
TIMED_BATCH: Final = {"cpu": 8, "cuda": 32}  # images
LEAST_ROUNDS: Final = 3
MOST_ROUNDS: Final = 7
LOOK: Final = 0.3  # seconds
SECONDS: Final = 3.0  # after which no further round begins
HOPELESS: Final = 1.5  # times the time of the fastest: not worth another round
MUST_WIN_BY: Final = 1.05  # in steps of training, against plain fp32
BF16_MUST_WIN_BY: Final = 1.1  # equal speed is not worth the lost digits
CLOSE: Final = 1.05  # so near to what it must win by, more rounds tell
FORWARD_MAY_LOSE: Final = 0.97  # a better step is not to be paid for in every evaluation
COMPILE_MUST_SAVE: Final = 2.0  # times what it costs: every trial compiles again
COMPILED_AFTER: Final = 300.0  # seconds of a trial below which compiling cannot pay


@dataclass(frozen=True)
class Timed:
    """The format chosen, and images per second: trained whole, and forward in eval mode.

    `timings` has the trained images per second of every format that was tried, by its name.
    """

    precision: Precision
    trained_per_second: float
    images_per_second: float
    timings: Mapping[str, float]


def memory_format(precision: Precision) -> torch.memory_format:
    """Return torch's name of the memory layout."""
    return torch.channels_last if precision.channels_last else torch.contiguous_format


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which forward passes run; parameters stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision.bf16)


def place(images: Tensor, precision: Precision, device: torch.device) -> Tensor:
    """Move images (N, 3, H, W) to the device in the layout of `precision`.

    What is kept in their place, (N, W), has no layout.
    """
    if images.ndim != 4:
        return images.to(device, non_blocking=True)
    return images.to(device, memory_format=memory_format(precision), non_blocking=True)


def name_of(precision: Precision) -> str:
    """Return a format in words, such as "bf16 channels_last"."""
    words = ["bf16" if precision.bf16 else "fp32"]
    words += ["channels_last"] if precision.channels_last else []
    words += ["compiled"] if precision.compiled else []
    return " ".join(words)


def fp32_per_second(module: nn.Module, image_size: int) -> float:
    """Return the images per second of the forward pass in fp32 on the CPU, where runs finish."""
    precision, cpu = Precision(channels_last=True), torch.device("cpu")
    with prepared(module.to(cpu)):
        lane = _Lane(module, precision, noise_batch(TIMED_BATCH["cpu"], image_size, cpu))
        for _ in range(LEAST_ROUNDS + 1):
            lane.forward()
    return lane.forward_per_second


def forward_per_second(
    module: nn.Module, image_size: int, device: torch.device, precision: Precision
) -> float:
    """Return the images per second of the forward pass as a short look now has them."""
    batch = TIMED_BATCH.get(device.type, 8)
    began = time.perf_counter()
    with prepared(module):
        lane = _Lane(module, precision, noise_batch(batch, image_size, device))
        while len(lane.forwards) < 2 or time.perf_counter() - began < LOOK:
            lane.forward()
    return lane.forward_per_second


def choose(
    module: nn.Module,
    image_size: int,
    device: torch.device,
    *,
    images_in_a_trial: int = 0,
) -> Timed:
    """Time steps of training in each format; return the fastest, and leave `module` in it.

    Everything else about `module`, which is on `device`, stays as it is: parameters, gradients,
    buffers, modes and what is frozen. A compiled network is tried on CUDA only, and chosen where
    what it saves in a trial of `images_in_a_trial` is worth what compiling costs.
    """
    with prepared(module):
        lanes = _race(module, image_size, device, _candidates(device))
        best = _fastest(lanes)
        lanes += _compiled(module, best, images_in_a_trial)
        best = lanes[-1] if lanes[-1].precision.compiled else best
    module.to(memory_format=memory_format(best.precision))
    timings = {name_of(each.precision): round(each.trained_per_second, 2) for each in lanes}
    return Timed(best.precision, best.trained_per_second, best.forward_per_second, timings)


def _candidates(device: torch.device) -> list[Precision]:
    plain = [PLAIN, Precision(channels_last=True)]
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return plain
    return [*plain, Precision(bf16=True, channels_last=True)]


@dataclass(frozen=True)
class _Span:
    """How long a run took, in seconds: by the clock, and of all processors on a CPU."""

    clock: float
    processors: float


@dataclass
class _Lane:
    """One format in the race, and how long its runs took; the first of each warms up."""

    module: nn.Module
    precision: Precision
    images: Tensor
    run: Callable[[Tensor], Any] | None = None
    steps: list[_Span] = field(default_factory=list)
    forwards: list[_Span] = field(default_factory=list)

    @property
    def trained_per_second(self) -> float:
        return len(self.images) / min(span.clock for span in self.steps[1:])

    @property
    def forward_per_second(self) -> float:
        return len(self.images) / min(span.clock for span in self.forwards[1:])

    def lap(self) -> None:
        self.step()
        self.forward()

    def step(self) -> None:
        images, parameters = self._ready(), list(self.module.parameters())
        with _stopwatch(self.steps, images.device):
            loss = self._output(images).float().square().mean()
            # Not `backward`: gradients that somebody else holds are not touched.
            torch.autograd.grad(loss, parameters, allow_unused=True)

    def forward(self) -> None:
        images = self._ready()
        # inference_mode would leave converted weights that cannot be trained.
        with torch.no_grad(), _stopwatch(self.forwards, images.device):
            self._output(images)

    def _ready(self) -> Tensor:
        self.module.to(memory_format=memory_format(self.precision))
        return place(self.images, self.precision, self.images.device)

    def _output(self, images: Tensor) -> Tensor:
        with autocast(self.precision, images.device):
            output: Tensor = (self.run or self.module)(images)
        return output


def _ahead(own: Sequence[_Span], others: Sequence[_Span]) -> float:
    """Return by how many times `own` are faster at the least, each by its best run."""
    return min(
        min(each.clock for each in others[1:]) / min(each.clock for each in own[1:]),
        min(each.processors for each in others[1:]) / min(each.processors for each in own[1:]),
    )


def _race(
    module: nn.Module, image_size: int, device: torch.device, candidates: Sequence[Precision]
) -> list[_Lane]:
    """Return the lanes after their last round; a batch that does not fit is halved."""
    batch = TIMED_BATCH.get(device.type, 8)
    while True:
        noise = noise_batch(batch, image_size, device)
        lanes = [_Lane(module, precision, noise) for precision in candidates]
        try:
            return _run_rounds(lanes)
        except Exception as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
        batch //= 2


def _run_rounds(lanes: list[_Lane]) -> list[_Lane]:
    began = time.perf_counter()
    plain, *others = lanes
    plain.lap()
    lanes = [plain, *(each for each in others if _works(each))]
    racing = list(lanes)
    for number in range(1, MOST_ROUNDS + 1):
        for each in racing:
            each.lap()
        fastest = min(each.steps[-1].processors for each in racing)
        hopeless = HOPELESS * fastest
        racing = [plain, *(e for e in racing[1:] if e.steps[-1].processors < hopeless)]
        decided = number >= LEAST_ROUNDS and not any(_is_close(e, plain) for e in racing[1:])
        if decided or time.perf_counter() - began > SECONDS:
            break
    return lanes


def _works(lane: _Lane) -> bool:
    """Warm a format up; tell whether the network runs in it at all."""
    try:
        lane.lap()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def _must_win_by(precision: Precision) -> float:
    return BF16_MUST_WIN_BY if precision.bf16 else MUST_WIN_BY


def _lead(lane: _Lane, plain: _Lane) -> float:
    """Return how far a format is ahead of plain fp32; below 1 it does not win."""
    return _ahead(lane.steps, plain.steps) / _must_win_by(lane.precision)


def _is_close(lane: _Lane, plain: _Lane) -> bool:
    return 1 / CLOSE < _lead(lane, plain) < CLOSE


def _fastest(lanes: Sequence[_Lane]) -> _Lane:
    """Return the lane that beats the first by most and clearly, or the first."""
    plain, *others = lanes
    fit = [e for e in others if _ahead(e.forwards, plain.forwards) >= FORWARD_MAY_LOSE]
    best = max(fit, key=lambda each: _lead(each, plain), default=plain)
    return best if best is not plain and _lead(best, plain) >= 1 else plain


def _compiled(module: nn.Module, best: _Lane, images_in_a_trial: int) -> list[_Lane]:
    """Return the lane of the compiled network where it pays, or nothing."""
    device, speed = best.images.device, best.trained_per_second
    if device.type != "cuda" or images_in_a_trial / speed < COMPILED_AFTER:
        return []
    choice = replace(best.precision, compiled=True)
    lane = _Lane(module, choice, best.images, run=torch.compile(module))
    began = time.perf_counter()
    if not _works(lane):
        return []
    cost = time.perf_counter() - began
    for _ in range(LEAST_ROUNDS):
        lane.lap()
    saved = images_in_a_trial * (1 / speed - 1 / lane.trained_per_second)
    return [lane] if saved > COMPILE_MUST_SAVE * cost else []


@contextmanager
def prepared(module: nn.Module) -> Iterator[None]:
    """Have all of `module` trainable and in eval mode: no statistics move, nothing is drawn."""
    live = [(each, each.requires_grad) for each in module.parameters()]
    module.requires_grad_(True)
    try:
        with evaluating(module):
            yield
    finally:
        for parameter, mode in live:
            parameter.requires_grad_(mode)


def noise_batch(batch: int, image_size: int, device: torch.device) -> Tensor:
    """Return noise (batch, 3, S, S) on the device, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, image_size, image_size, generator=generator).to(device)


@contextmanager
def _stopwatch(spans: list[_Span], device: torch.device) -> Iterator[None]:
    """Note how long the block takes, to the end of what it started on a GPU."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    clock, processors = time.perf_counter(), time.process_time()
    yield
    if on_gpu:
        torch.cuda.synchronize(device)
    clock = time.perf_counter() - clock
    spans.append(_Span(clock, clock if on_gpu else time.process_time() - processors))
