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
from typing import Any

os.environ.setdefault("KMP_BLOCKTIME", "0")  # idle threads leave the cores to others

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what all benchmarks share

import shapes
import textures
import timm
import torch
from drawing import Draw
from page import write_between
from pool import Pool
from questions import Pretrained, losses
from rendering import Families, render
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.utils import save_image

from autoft.backbones.mini import autoft_mini
from autoft.training.job import Precision
from autoft.training.precision import autocast, choose, memory_format, name_of, place

STATE, LOG, RUN, WEIGHTS = "state.pt", "log.jsonl", "run.json", "autoft_mini.safetensors"
WARM_UP = 0.03  # share of the time in which the learning rate rises
LAST_RATE = 0.01  # of the highest learning rate
CLIP = 1.0
EMA = 0.999
EVERY = 60.0  # seconds between checkpoints
ROWS = 10  # of the table, at most
SAME = ("seed", "sizes", "batch", "lr", "decay", "contrast", "distinct", "objects", "grounds")


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
        self.seen = dict(state["seen"])
        if (asked := self._asked()) != state["asked"]:
            changed = [name for name in asked if asked[name] != state["asked"].get(name)]
            raise SystemExit(
                f"{self.options.out} holds a training with other values of {', '.join(changed)}. "
                f"Give the same ones, or another --out."
            )
        self.seen["resumed"] += self.progress < 1

    def _asked(self) -> dict[str, str]:
        """Return the options that must stay the same when a training goes on."""
        given = vars(self.options)
        return {name: str(given[name]) for name in SAME if name in given}

    def save(self) -> None:
        """Write what is needed to go on."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "seen": self.seen,
            "asked": self._asked(),
        }
        part = self.options.out / f"{STATE}.part"
        torch.save(state, part)
        part.replace(self.options.out / STATE)

    def pool(self, size: int) -> Pool:
        """Return a pool of images for `size` pixels: other ones after an interruption."""
        again = 0 if self.options.distinct else int(self.seen["resumed"])
        seed = self.options.seed + 1000 * again + size
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
        self.model.to(memory_format=memory_format(how))
        _say(f"{size} px, {name_of(how)}, at {self.progress:.0%}")
        began = last = saved = time.perf_counter()
        pool = self.pool(size)
        self.seen["rendered"] += pool.rendered
        told: dict[str, list[float]] = {}
        pairs = 2 if self.options.contrast else 1
        self.model.train()
        mark = pool.rendered
        while self.progress < until:
            batch = pool.batch(count // pairs, pairs)
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
        if told:
            self._tell(size, told, pool.seconds / (last - began))

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
            "machine": f"{_processor()}, {torch.get_num_threads()} threads, {self.device}",
        }
        (self.options.out / RUN).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    """Return the name of the processor, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.machine()


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
    step = -(-len(lines) // ROWS)
    rows = [
        [
            f"{line['seconds'] / 60:.0f}",
            str(line["size"]),
            f"{line['views']:,}",
            f"{line['rendered']:,}",
            f"{line['rate']:.2f}",
            *(f"{line['losses'][name]:.2f}" for name in names),
        ]
        for line in lines[(len(lines) - 1) % step :: step]
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
    sizes = [(int(size), float(share)) for size, share in pairs]
    if abs(sum(share for _, share in sizes) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"the shares of {text} do not add up to 1")
    return sizes


def _objects(text: str) -> tuple[str, ...]:
    return _names(text, (*shapes.FAMILIES, shapes.NOTHING))


def _grounds(text: str) -> tuple[str, ...]:
    return _names(text, textures.FAMILIES)


def _names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"there is no {unknown[0]}; expected {', '.join(known)}")
    return names


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
    parser.add_argument("--objects", type=_objects, default="", help="families of objects; all")
    parser.add_argument("--grounds", type=_grounds, default="", help="families of grounds; all")
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
