"""Pre-train the embedded backbone on generated images, from nothing, in a given time.

    python benchmarks/pretrain/train.py --out DIR --minutes 150
    python benchmarks/pretrain/train.py --out DIR --minutes 20 --device cuda --batch 1024
    python benchmarks/pretrain/train.py --picture samples.jpg
    python benchmarks/pretrain/train.py --out DIR --page docs/results/embedded.md

The same command goes on where it was stopped, by Ctrl-C or otherwise. DIR gets `log.jsonl`, a line
each minute, `state.pt` to go on from, and at the end `autoft_mini.safetensors` in half precision
with `run.json`, which says how it was made. Copied to autoft/backbones/ the file is the embedded
backbone. The learning rate follows the share of the time that has passed. The last command writes
what DIR says of the training into a page.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("KMP_BLOCKTIME", "0")  # idle threads leave the cores to others

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what all benchmarks share

import timm
import torch
from drawing import Draw
from page import write_between
from pool import Pool
from rendering import TASKS, UNKNOWN, Families, Rendered, render
from safetensors.torch import save_file
from shapes import NUM_CLASSES
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torchvision.utils import save_image

from autoft.backbones.mini import STAGES, autoft_mini
from autoft.training.job import Precision
from autoft.training.precision import autocast, choose, name_of, place

STATE, LOG, RUN, WEIGHTS = "state.pt", "log.jsonl", "run.json", "autoft_mini.safetensors"
WARM_UP = 0.03  # share of the time in which the learning rate rises
LAST_RATE = 0.01  # of the highest learning rate
CLIP = 1.0
EMA = 0.999
PROJECTED = 128
TEMPERATURE = 0.15
EVERY = 60.0  # seconds between checkpoints
OBJECTS_WEIGHT = 2.0  # which objects are seen counts as two questions
ROWS = 10  # of the table
WIDTH: Final = STAGES[-1][0]


class Pretrained(nn.Module):
    """The backbone, a linear answer to each question, and a projection for contrast."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = autoft_mini(pretrained=False).module
        self.answers = nn.Linear(WIDTH, sum(TASKS.values()))
        self.objects = nn.Linear(WIDTH, NUM_CLASSES)
        self.projection = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, PROJECTED)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return answers (N, sum of tasks), objects (N, classes), projections (N, PROJECTED)."""
        features = self.backbone(images).float()
        return self.answers(features), self.objects(features), self.projection(features)


def losses(
    model: nn.Module, batch: Rendered, images: Tensor, contrast: float
) -> dict[str, Tensor]:
    """Return the loss of each question, and with `contrast` that of pairs of views."""
    answers, objects, projected = model(images)
    found: dict[str, Tensor] = {}
    for index, (name, logits) in enumerate(
        zip(TASKS, answers.split(list(TASKS.values()), dim=1), strict=True)
    ):
        total = F.cross_entropy(
            logits, batch.answers[:, index], ignore_index=UNKNOWN, reduction="sum"
        )
        found[name] = total / (batch.answers[:, index] != UNKNOWN).sum().clamp(min=1)
    number = batch.present.sum(1, keepdim=True)
    target = batch.present / number.clamp(min=1)  # each object that is seen, alike
    total = -(target * objects.log_softmax(dim=1)).sum()
    found["objects"] = OBJECTS_WEIGHT * total / (number > 0).sum().clamp(min=1)
    if contrast:
        found["contrast"] = contrast * info_nce(projected)
    return found


def info_nce(projected: Tensor) -> Tensor:
    """Return how badly the two views of an image, half a batch apart, find each other."""
    unit = F.normalize(projected, dim=1)
    alike = unit @ unit.T / TEMPERATURE
    alike.fill_diagonal_(-1e4)
    count = len(unit)
    other = torch.arange(count, device=unit.device).roll(count // 2)
    return F.cross_entropy(alike, other)


def rate_at(progress: float) -> float:
    """Return the share of the learning rate at a share of the time: warm-up, then a cosine."""
    if progress < WARM_UP:
        return max(progress, 1e-4) / WARM_UP
    rest = (progress - WARM_UP) / (1 - WARM_UP)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))


class Run:
    """A pre-training: the model and its average, the optimiser, and what was seen so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        self.model = Pretrained().to(self.device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": options.decay}, {"params": others}]
        self.optimiser = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.0)
        self.seen = {"seconds": 0.0, "views": 0, "rendered": 0, "steps": 0, "resumed": 0}
        self.render_seconds = 0.0
        backbone = autoft_mini(pretrained=False)
        self.mean, self.std = (
            torch.tensor(each, device=self.device).view(1, 3, 1, 1)
            for each in (backbone.mean, backbone.std)
        )

    @property
    def progress(self) -> float:
        """Return the share of the time that has passed, or of the views that were seen."""
        if self.options.views:
            return float(self.seen["views"]) / self.options.views
        return float(self.seen["seconds"]) / (60 * self.options.minutes)

    def load(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        path = self.options.out / STATE
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.seen = {**state["seen"], "resumed": state["seen"]["resumed"] + 1}

    def save(self) -> None:
        """Write what is needed to go on."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "seen": self.seen,
        }
        part = self.options.out / f"{STATE}.part"
        torch.save(state, part)
        part.replace(self.options.out / STATE)

    def pool(self, size: int) -> Pool:
        """Return a pool of images for `size` pixels; another one after every interruption."""
        seed = self.options.seed + 1000 * int(self.seen["resumed"]) + size
        families = Families(self.options.objects, self.options.grounds)
        capacity = self.options.distinct or self.options.pool
        uses = 0.0 if self.options.distinct else self.options.uses
        return Pool(Draw.seeded(seed, self.device), capacity, size, uses, families)

    def train(self) -> None:
        """Train until the time is over, size after size."""
        self.load()
        until = 0.0
        for size, share in self.options.sizes:
            until += share
            if self.progress < until - 1e-6:
                self._train_at(size, min(until, 1.0))
        self.save()
        self.finish()

    def _train_at(self, size: int, until: float) -> None:
        count = self.options.batch
        how = self._format(size)
        self.model.to(memory_format=torch.channels_last if how.channels_last else None)
        _say(f"{size} px, {name_of(how)}, at {self.progress:.0%}")
        began = last = saved = time.perf_counter()
        pool = self.pool(size)
        self.seen["rendered"] += pool.rendered
        told: dict[str, list[float]] = {}
        views = 2 if self.options.contrast else 1
        self.model.train()
        mark = pool.rendered
        while self.progress < until:
            batch = pool.batch(count // views, views)
            images = place((batch.images - self.mean) / self.std, how, self.device)
            with autocast(how, self.device):
                parts = losses(self.model, batch, images, self.options.contrast)
            self._step(sum(parts.values(), torch.zeros((), device=self.device)))
            now = time.perf_counter()
            self.seen["seconds"] += now - last
            self.seen["views"] += len(images)
            self.seen["rendered"] += pool.rendered - mark
            last, mark = now, pool.rendered
            for name, part in parts.items():
                told.setdefault(name, []).append(float(part.detach()))
            if now - saved > EVERY:
                self._tell(size, told, pool.seconds / (now - began))
                self.save()
                told, saved = {}, now

    def _format(self, size: int) -> Precision:
        """Return the number format and layout: as told, or the fastest by timing."""
        if self.options.bf16:
            return Precision(bf16=True, channels_last=True)
        return choose(self.model.backbone, size, self.device).precision

    def _step(self, loss: Tensor) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.options.lr * rate_at(self.progress)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimiser.step()
        self.seen["steps"] += 1
        keep = min(EMA, self.seen["steps"] / (self.seen["steps"] + 10))
        with torch.no_grad():
            mine, own = self.average.state_dict(), self.model.state_dict()
            for name, value in own.items():
                if value.is_floating_point():
                    mine[name].lerp_(value, 1 - keep)

    def _tell(self, size: int, told: dict[str, list[float]], rendering: float) -> None:
        line = {
            **self.seen,
            "seconds": round(self.seen["seconds"], 1),
            "size": size,
            "rate": round(rate_at(self.progress), 4),
            "rendering": round(rendering, 3),
            "losses": {name: round(sum(each) / len(each), 4) for name, each in told.items()},
        }
        _say(f"{self.progress:5.1%} {json.dumps(line)}")
        with (self.options.out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self) -> None:
        """Write the averaged weights in half precision, and how they were made."""
        state = self.average.backbone.state_dict()
        half = {
            name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
            for name, value in state.items()
        }
        if not all(value.isfinite().all() for value in half.values()):
            raise SystemExit("The weights do not fit half precision: training diverged.")
        save_file(half, self.options.out / WEIGHTS, metadata={"source": "procedural"})
        told: dict[str, Any] = {
            "seen": self.seen,
            "options": {k: str(v) for k, v in vars(self.options).items() if k != "out"},
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {self.device}",
        }
        (self.options.out / RUN).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def picture(path: Path, seed: int) -> None:
    """Write a picture of sample images."""
    save_image(render(Draw.seeded(seed), 60, 96).images, path, nrow=12, padding=2)


def report(out: Path) -> str:
    """Return what a folder says of its training: how it was made, and the losses on the way."""
    told: dict[str, Any] = json.loads((out / RUN).read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (out / LOG).read_text(encoding="utf-8").splitlines()]
    names = list(lines[0]["losses"])
    heads = ["minutes", "pixels", "views", "images", "rate", *names]
    step = max(1, len(lines) // ROWS)
    rows = [
        [
            f"{line['seconds'] / 60:.0f}",
            str(line["size"]),
            f"{line['views']:,}",
            f"{line['rendered']:,}",
            f"{line['rate']:.2f}",
            *(f"{line['losses'][name]:.2f}" for name in names),
        ]
        for line in lines[step - 1 :: step]
    ]
    seen, options = told["seen"], told["options"]
    words = ", ".join(f"{name} {value}" for name, value in told["versions"].items())
    asked = ", ".join(f"{name} {options[name]}" for name in ("seed", "batch", "lr", "decay"))
    return "\n".join(
        [
            f"{seen['views']:,} views of {seen['rendered']:,} images in "
            f"{seen['seconds'] / 60:.0f} minutes ({told['machine']}; {words}); {asked}; "
            f"interrupted {seen['resumed']} times. Mean losses of the minute before:",
            "",
            f"| {' | '.join(heads)} |",
            f"|{'---|' * len(heads)}",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )


def _sizes(text: str) -> list[tuple[int, float]]:
    """Read "64:0.7,96:0.3": pixels, and the share of the time."""
    pairs = [part.split(":") for part in text.split(",")]
    return [(int(size), float(share)) for size, share in pairs]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def main() -> None:
    """Train, or draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of checkpoints, log and weights")
    parser.add_argument("--minutes", type=float, default=150.0)
    parser.add_argument("--views", type=int, default=0, help="to be seen, instead of a time")
    parser.add_argument("--sizes", type=_sizes, default="48:0.35,64:0.4,96:0.25")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.03)
    parser.add_argument("--contrast", type=float, default=0.0, help="weight of the contrast")
    parser.add_argument("--pool", type=int, default=8192, help="images kept")
    parser.add_argument("--uses", type=float, default=6.0, help="of an image, on average")
    parser.add_argument("--distinct", type=int, default=0, help="only so many images, for good")
    parser.add_argument("--objects", type=_names, default="", help="families of objects; all")
    parser.add_argument("--grounds", type=_names, default="", help="families of grounds; all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="without timing what is fastest")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="only write a picture of samples here")
    parser.add_argument("--page", type=Path, help="only write what --out holds into this page")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.picture:
        picture(options.picture, options.seed)
        return
    if not options.out:
        parser.error("--out DIR is needed: checkpoints, log and weights are written there")
    if options.page:
        write_between(options.page, "run", report(options.out))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    Run(options).train()


if __name__ == "__main__":
    main()
