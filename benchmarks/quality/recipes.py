"""The two recipes that people fine-tune by: fastai's `fine_tune`, and timm's with layer decay.

Both are written after the published code of their authors, with the parts that matter taken from
timm itself where it has them. The number of epochs is what the time affords at the measured speed,
so that each schedule comes to its end. The epoch that was best by validation accuracy is scored on
the test part, as fastai's SaveModelCallback and timm's `model_best` do.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import timm
import torch
from given import CPU, Given, Moments, Task, judged, logits_of, scored
from lines import Row
from recipe_views import Draw, fastai_views, timm_views
from torch import Tensor, nn
from torch.nn import functional

from autoft.training.job import Precision
from autoft.training.metrics import predict
from autoft.training.precision import autocast, choose, memory_format, place

BATCH = 64
TIMED = 3  # steps from which the time of an epoch is expected, after one that warms up
SPARE = 0.03  # of the time is kept for what varies

Rates = Callable[[float], None]
"""Writes learning rates for `progress` in [0, 1] of a phase."""


@dataclass
class Training:
    """A network that is trained, by which views and loss, and what was best so far."""

    task: Task
    network: nn.Module
    moments: Moments
    precision: Precision
    draw: Draw
    smoothing: float
    seed: int
    began: float = field(default_factory=time.monotonic)
    best: tuple[float, float] = (-1.0, 0.0)
    weights: dict[str, Tensor] = field(default_factory=dict)
    curve: list[list[float]] = field(default_factory=list)
    scoring: float = 0.0
    epochs: int = 0

    def clock(self) -> float:
        """Return the seconds that it has had; those of timing steps are not counted."""
        return time.monotonic() - self.began

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch of normalised images (B, 3, S, S) and labels, one batch ahead."""
        setup = self.task.setup
        generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        order = torch.randperm(len(setup.train), generator=generator).numpy()
        size = min(BATCH, len(order))
        parts = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]  # drop last
        pre = self.moments.preprocess(setup)

        def make(chosen: object) -> tuple[Tensor, Tensor]:
            pixels = torch.from_numpy(setup.store.read(setup.train.rows[chosen]))
            images = self.draw(pixels, pre.image_size, generator)
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (pre.mean, pre.std))
            images = images.sub_(mean).div_(std)
            return images, torch.from_numpy(setup.train.labels[chosen])

        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(make, parts[0])
            for chosen in [*parts[1:], None]:
                ready = waiting.result()
                if chosen is not None:
                    waiting = pool.submit(make, chosen)
                yield ready

    @property
    def steps(self) -> int:
        """Return the number of steps of an epoch; a last batch that is not full is dropped."""
        return max(1, len(self.task.setup.train) // BATCH)

    def step(self, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
        """Take one optimiser step."""
        with autocast(self.precision, CPU):
            logits = self.network(place(images, self.precision, CPU))
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def run(self, optimizer: torch.optim.Optimizer, rates: Rates, epochs: int) -> None:
        """Train `epochs` epochs at `rates`, scoring each on the validation part."""
        for epoch in range(epochs):
            self.network.train()
            for step, (images, labels) in enumerate(self.batches(self.epochs)):
                rates((epoch + step / self.steps) / epochs)
                self.step(optimizer, images, labels)
            self.epochs += 1
            self.score()

    def score(self) -> None:
        """Score the network on the validation part; keep the weights of the best epoch."""
        began = time.monotonic()
        setup = self.task.setup
        logits = logits_of(self.network, setup, setup.validation, self.moments, self.precision)
        found = judged(setup.validation.labels, logits)
        if found > self.best or not self.weights:
            self.best = found
            self.weights = copy.deepcopy(self.network.state_dict())
        self.curve.append([round(self.clock(), 1), self.best[0]])
        self.scoring = time.monotonic() - began

    def epoch_seconds(self, optimizer: torch.optim.Optimizer) -> float:
        """Return what an epoch with its scoring takes; the network is as before afterwards.

        The clock stands still meanwhile.
        """
        started = time.monotonic()
        kept = copy.deepcopy(self.network.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self.network.train()
        spans: list[float] = []
        began = time.monotonic()
        batches = self.batches(10**6)
        for images, labels in batches:
            self.step(optimizer, images, labels)
            now = time.monotonic()
            spans.append(now - began)
            began = now
            if len(spans) > TIMED:
                break
        batches.close()
        self.network.load_state_dict(kept)
        optimizer.state.clear()
        timed = spans[1:] or spans
        self.began += time.monotonic() - started
        return sum(timed) / len(timed) * self.steps + self.scoring


def planned_epochs(seconds: float, epoch_seconds: float) -> int:
    """Return how many epochs fit into `seconds`, at least one, with a little to spare."""
    return max(1, int(seconds * (1 - SPARE) / epoch_seconds))


def _ready(
    given: Given, task: Task, network: nn.Module, draw: Draw, smoothing: float, seed: int
) -> Training:
    """Choose the number format, as a search does; then the clock starts."""
    config = (
        network[0].pretrained_cfg
        if isinstance(network, nn.Sequential)
        else (network.pretrained_cfg)
    )
    moments = Moments(tuple(config["mean"]), tuple(config["std"]))
    precision = choose(network, task.setup.image_size, CPU).precision
    network.to(memory_format=memory_format(precision))
    return Training(task, network, moments, precision, draw, smoothing, seed)


def _told(training: Training, chosen: str) -> Row:
    """Score the best epoch on the test part, the only time."""
    seconds = training.clock()
    training.network.load_state_dict(training.weights)
    logits = logits_of(
        training.network, training.task.setup, training.task.test, training.moments, Precision()
    )
    return scored(training.task, predict(logits)) | {
        "validation": training.best[0],
        "seconds": round(seconds, 1),
        "epochs": training.epochs,
        "chosen": chosen,
        "curve": training.curve,
        "image_size": training.task.setup.image_size,
        "precision": "bf16" if training.precision.bf16 else "fp32",
    }


def _model(given: Given, **how: object) -> nn.Module:
    folder = given.weights / given.backbone
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **how)
    return model


# --- fastai --------------------------------------------------------------------------------------

FASTAI_RATE, LR_MULT, FASTAI_DECAY = 2e-3, 100.0, 0.01
DIV_FINAL = 1e5
MOMENTUMS = (0.95, 0.85)  # at the ends and at the top of the cycle


class ConcatPool(nn.Module):
    """Average and maximum of a map (N, F, H, W), side by side: (N, 2 F)."""

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, F, H, W) to (N, 2 F)."""
        return torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], dim=1)


def fine_tune(given: Given, task: Task, seed: int, *, flips: bool) -> Row:
    """Return what `vision_learner(...).fine_tune(epochs)` of fastai 2.7 reaches in the time.

    One epoch of the head (and of all batch norms, as there) at 2e-3; then all stages at half of
    it with rates from a hundredth at the bottom, one cycle up and down. Three groups of layers,
    as fastai has for the networks that it knows: for others it has two, whose whole body would
    learn at the lowest rate.
    """
    torch.manual_seed(seed)
    body = _model(given, num_classes=0, global_pool="")
    network = nn.Sequential(body, _fastai_head(body, len(task.setup.classes)))
    training = _ready(given, task, network, fastai_views(flips=flips), 0.0, seed)
    groups = _layer_groups(network)
    for parameter, frozen in _body_parameters(network):
        parameter.requires_grad_(not frozen)
    optimizer = _fastai_adam(groups)
    training.run(optimizer, _one_cycle(optimizer, _slice(FASTAI_RATE, frozen=True), 0.99, 25), 1)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    optimizer = _fastai_adam(groups)
    epoch_seconds = training.epoch_seconds(optimizer)
    epochs = planned_epochs(given.seconds - training.clock(), epoch_seconds)
    rates = _slice(FASTAI_RATE / 2, frozen=False)
    training.run(optimizer, _one_cycle(optimizer, rates, 0.3, 5), epochs)
    told = _told(training, f"{given.backbone}, 1 + {epochs} epochs")
    return told | {"expected_epoch_seconds": round(epoch_seconds, 2)}


def _fastai_head(body: nn.Module, classes: int) -> nn.Sequential:
    wide = 2 * int(body.num_features)
    with torch.inference_mode():  # where the map has more channels than timm calls features
        wide = 2 * body.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
    head = nn.Sequential(
        ConcatPool(),
        nn.BatchNorm1d(wide),
        nn.Dropout(0.25),
        nn.Linear(wide, 512, bias=False),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(512),
        nn.Dropout(0.5),
        nn.Linear(512, classes, bias=False),
    )
    for module in head:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return head


def _body_parameters(network: nn.Sequential) -> Iterator[tuple[nn.Parameter, bool]]:
    """Yield the parameters of the body and whether freezing stops them: batch norms go on."""
    for module in network[0].modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in module.parameters(recurse=False):
            yield parameter, not norm


def _layer_groups(network: nn.Sequential) -> list[list[nn.Parameter]]:
    """Return the two halves of the body by depth, and the head."""
    body = list(network[0].parameters())
    half, seen, total = 0, 0, sum(1 for p in body if p.ndim > 1)
    while seen < total / 2:
        seen += body[half].ndim > 1
        half += 1
    return [body[:half], body[half:], list(network[1].parameters())]


def _fastai_adam(groups: list[list[nn.Parameter]]) -> torch.optim.AdamW:
    """Return fastai's Adam: decoupled decay, none of it for biases and norms."""
    kinds = [
        {"params": part, "weight_decay": decay, "layer": layer}
        for layer, group in enumerate(groups)
        for decay, part in (
            (FASTAI_DECAY, [p for p in group if p.ndim > 1]),
            (0.0, [p for p in group if p.ndim <= 1]),
        )
        if part
    ]
    return torch.optim.AdamW(kinds, lr=FASTAI_RATE, betas=(MOMENTUMS[0], 0.99), eps=1e-5)


def _slice(rate: float, *, frozen: bool) -> list[float]:
    """Return the highest rate of each group, as fastai's `slice(rate)` or `slice(low, rate)`."""
    if frozen:
        return [rate / 10, rate / 10, rate]
    return [rate / LR_MULT, rate / math.sqrt(LR_MULT), rate]


def _one_cycle(
    optimizer: torch.optim.Optimizer, highest: list[float], rise: float, div: float
) -> Rates:
    """Return fastai's one cycle: cosine from highest / div up in `rise` of it, then down to 0."""

    def between(start: float, end: float, share: float) -> float:
        return start + (end - start) * (1 - math.cos(math.pi * share)) / 2

    def write(progress: float) -> None:
        up = progress < rise
        share = progress / rise if up else (progress - rise) / (1 - rise)
        low, top = MOMENTUMS
        momentum = between(low, top, share) if up else between(top, low, share)
        for group in optimizer.param_groups:
            most = highest[group["layer"]]
            ends = (most / div, most) if up else (most, most / DIV_FINAL)
            group["lr"] = between(*ends, share)
            group["betas"] = (momentum, group["betas"][1])

    return write


# --- timm ----------------------------------------------------------------------------------------

TIMM_RATE, NOMINAL_BATCH = 5e-4, 512
LAYER_DECAY, TIMM_DECAY, SMOOTHING = 0.75, 0.05, 0.1
WARMUP_EPOCHS, WARMUP_RATE = 5, 1e-5  # defaults of timm's train.py


def layer_decay(given: Given, task: Task, seed: int, *, flips: bool) -> Row:
    """Return what full fine-tuning with timm reaches in the time.

    AdamW, 5e-4 for a batch of 512, scaled by the square root as timm's train.py does for it, so
    1.8e-4 for 64; layer decay 0.75, decay 0.05, smoothing 0.1, cosine to 0 after a warm-up of five
    epochs (a fifth of them where there are fewer than 25); and the augmentation of train.py's
    defaults: crops of 0.08 to 1 of the area, mirroring, colour jitter 0.4. RandAugment and mixup
    are of its long recipes for ImageNet. Optimiser groups are timm's own.
    """
    torch.manual_seed(seed)
    network = _model(given, num_classes=len(task.setup.classes))
    training = _ready(given, task, network, timm_views(flips=flips), SMOOTHING, seed)
    optimizer = _timm_adamw(network)
    training.score()  # warms up, and says what scoring takes
    training.weights, training.curve, training.best = {}, [], (-1.0, 0.0)
    epoch_seconds = training.epoch_seconds(optimizer)
    epochs = planned_epochs(given.seconds - training.clock(), epoch_seconds)
    training.run(optimizer, _warm_cosine(optimizer, epochs), epochs)
    told = _told(training, f"{given.backbone}, {epochs} epochs")
    return told | {"expected_epoch_seconds": round(epoch_seconds, 2)}


def _timm_adamw(network: nn.Module) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        network,
        opt="adamw",
        lr=TIMM_RATE * math.sqrt(BATCH / NOMINAL_BATCH),
        weight_decay=TIMM_DECAY,
        layer_decay=LAYER_DECAY,
    )
    return optimizer


def _warm_cosine(optimizer: torch.optim.Optimizer, epochs: int) -> Rates:
    """Return a line from 1e-5 up to the rate, then half a cosine down to 0; by layer's scale."""
    highest = TIMM_RATE * math.sqrt(BATCH / NOMINAL_BATCH)
    warm = min(WARMUP_EPOCHS, epochs / 5) / epochs

    def write(progress: float) -> None:
        if progress < warm:
            rate = WARMUP_RATE + (highest - WARMUP_RATE) * progress / warm
        else:  # over the whole run, as timm's scheduler without warmup_prefix
            rate = highest * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    return write
