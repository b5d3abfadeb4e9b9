"""`autoft doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import typer

from autoft.cli.text import clean
from autoft.errors import MachineError

EPILOG = """\
Example:

  autoft doctor

The exit code is 4 if something is missing that autoft needs."""

NEEDED = ("torch", "torchvision", "timm", "optuna", "onnx", "onnxruntime", "onnxscript")
GIB = 2**30
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, how it stands, what was found and what to do."""

    what: str
    state: Literal["ok", "warn", "fail"]
    found: str
    todo: str = ""


def doctor() -> int:
    """Check versions, devices, memory, disk, cache and plugins; say what to do."""
    failed = False
    for finding in examine():
        failed |= finding.state == "fail"
        todo = f". {finding.todo}" if finding.todo else ""
        state = typer.style(f"{finding.state:4}", fg=COLOURS[finding.state])
        typer.echo(f"{state}  {finding.what:12}  {clean(finding.found + todo)}")
    return MachineError.exit_code if failed else 0


def examine() -> Iterator[Finding]:
    """Yield the findings, the slow ones (torch) late."""
    yield Finding("python", "ok", f"{platform.python_version()} in {sys.prefix}")
    yield from map(_package, NEEDED)
    yield _ray()
    for look in (_processors, _memory, _disk, _cache, _plugins, _devices):
        yield look()


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "fail", "not installed", f"Run `pip install {name}`.")


def _ray() -> Finding:
    try:
        return Finding("ray", "ok", metadata.version("ray"))
    except metadata.PackageNotFoundError:
        todo = "Only --engine ray needs it: `pip install 'autoft[ray]'`."
        return Finding("ray", "ok", "not installed", todo)


def _processors() -> Finding:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count() or 1
    return Finding("processors", "ok", f"{usable} usable of {os.cpu_count()}")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f} GiB"
    if memory.available < 2 * GIB:
        return Finding(
            "memory", "warn", found, "Below 2 GiB trials may be killed; close programs."
        )
    return Finding("memory", "ok", found)


def _disk() -> Finding:
    from autoft.data.cache.files import cache_root

    places = {"here": Path.cwd(), "cache": cache_root()}
    free = {name: shutil.disk_usage(_existing(place)).free for name, place in places.items()}
    found = ", ".join(f"{size / GIB:.1f} GiB free ({name})" for name, size in free.items())
    if min(free.values()) < GIB:
        todo = "Free some space, or point --out or AUTOFT_CACHE to another disk."
        return Finding("disk", "warn", found, todo)
    return Finding("disk", "ok", found)


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def _cache() -> Finding:
    from autoft.data.cache.files import cache_root

    root = cache_root()
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    found = f"{root}, {size / GIB:.2f} GiB"
    if not os.access(_existing(root), os.W_OK):
        return Finding("cache", "fail", f"{root} cannot be written", "Set AUTOFT_CACHE.")
    return Finding("cache", "ok", found, "It may be deleted at any time." if size else "")


def _plugins() -> Finding:
    from autoft.cli.plugins import survey
    from autoft.plugins import GROUPS

    listed = survey(list(GROUPS))
    broken = [item.plugin.full_name for item in listed if item.state.startswith("broken")]
    if broken:
        found = f"{len(listed)}, of which broken: {', '.join(broken)}"
        return Finding("plugins", "warn", found, "See `autoft plugins list`.")
    return Finding("plugins", "ok", f"{len(listed)}, none broken")


def _devices() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("devices", "fail", f"torch cannot be imported: {error}", "Install it anew.")
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found = (f"cuda:{i} {c.name}, {c.total_memory / GIB:.0f} GiB" for i, c in enumerate(cards))
        return Finding("devices", "ok", "; ".join(found))
    return Finding("devices", "warn", f"cpu only: {_why_no_cuda()}", "Searches are slower on it.")


def _why_no_cuda() -> str:
    """Say why torch sees no GPU, in its own words where it has some."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.empty(0, device="cuda")
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].rstrip(".")
    return "torch finds no GPU"
