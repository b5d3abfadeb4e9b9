"""The weights of backbones from the controlling process: list, fetch, verify and pack them.

Everything that needs timm or torch happens in a worker.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoft import plugins
from autoft.data.cache.files import write_json_atomic
from autoft.errors import UsageError
from autoft.network.provide import Provided
from autoft.network.sources import (
    ANY_ARCHITECTURE,
    MANIFEST,
    WEIGHTS_FILE,
    Source,
    in_folder,
    read_manifest,
    resolve,
)
from autoft.search import prepare
from autoft.search.engines import weighing
from autoft.search.engines.weighing import Listed, Verified
from autoft.search.events import Listener
from autoft.search.folder import RunFolder
from autoft.search.session import Session, a_worker
from autoft.search.settings import Settings
from autoft.search.stop import listen_for_stop

FORMAT = 1  # of the manifest
Ask = Callable[..., Any]


@contextmanager
def _asking(settings: Settings, listen: Listener, *, fetches: bool) -> Iterator[Ask]:
    """Hold a worker, with network only if it `fetches`, and yield what asks it; keep nothing."""
    with listen_for_stop() as stop, tempfile.TemporaryDirectory() as folder:
        session = Session(settings, RunFolder(Path(folder)), listen, stop, time.monotonic())
        allowed = fetches and prepare.wants_network(settings, session.emit)
        with prepare.network(allowed=allowed), a_worker() as worker:
            yield lambda *asked: session.call(worker, *asked)


def listing(settings: Settings, names: Sequence[str], listen: Listener) -> list[Listed]:
    """Describe the weights of `names`; without any, of all that is known or kept here.

    Raises:
        UsageError: --weights holds none.
    """
    with _asking(settings, listen, fetches=False) as ask:
        rows: list[Listed] = ask(weighing.listing, _known(settings, names), not names)
    return rows


def pull(settings: Settings, names: Sequence[str], listen: Listener) -> Iterator[Provided]:
    """Fetch the weights of `names`, one after the other.

    Raises:
        UsageError: there is no such backbone, or its licence is not allowed.
        MachineError: they cannot be fetched.
    """
    with _asking(settings, listen, fetches=True) as ask:
        for source in _known(settings, names):
            yield ask(weighing.pull, source, settings.allow_license)


def verify(settings: Settings, names: Sequence[str], listen: Listener) -> Iterator[Verified]:
    """Hash and load the weights of `names`, which may be folders; without any, all that are here.

    Raises:
        UsageError: there is no such backbone, or the folder holds none.
        MachineError: weights that were named are not here.
    """
    with _asking(settings, listen, fetches=False) as ask:
        if not names:
            rows: list[Listed] = ask(weighing.listing, _known(settings, ()), True)
            local, _ = prepare.local_sources(settings)
            here = [resolve(row.name, local) for row in rows if row.state == "here"]
            yield from (ask(weighing.verify, source, "") for source in here)
        for name in names:
            if _holds_several(Path(name)):
                yield from _verify_folder(Path(name), ask)
            else:
                (source,) = _known(settings, [name])
                yield ask(weighing.verify, source, "")


def _verify_folder(folder: Path, ask: Ask) -> Iterator[Verified]:
    """Verify every sub-folder by the manifest, where there is one."""
    found, unfit = in_folder(folder)
    packed = read_manifest(folder)
    for label, source in found.items():
        if packed and label not in packed:
            path = str(folder / label)
            yield Verified(label, path, "", f"is not in {MANIFEST}: it was added later")
            continue
        yield ask(weighing.verify, source, str(packed.get(label, {}).get("sha256") or ""))
    yield from (
        Verified(note.partition(":")[0], str(folder), "", note.partition(": ")[2])
        for note in unfit
    )
    told = {note.partition(":")[0] for note in unfit}
    yield from (
        Verified(label, str(folder / label), "", f"is in {MANIFEST} and has no {WEIGHTS_FILE}")
        for label in packed
        if label not in found and label not in told
    )


def pack(settings: Settings, names: Sequence[str], out: Path, listen: Listener) -> list[str]:
    """Write a folder for --weights with the weights of `names`; return its sub-folders.

    What an earlier call packed there stays.

    Raises:
        UsageError: there is no such backbone, its licence is not allowed, or `out` is no folder.
        MachineError: the weights cannot be had.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file. Name a folder to pack into.")
    packed = read_manifest(out) if out.is_dir() else {}
    added: list[str] = []
    with _asking(settings, listen, fetches=True) as ask:
        for source in _known(settings, names):
            told = dict(ask(weighing.pack, source, str(out.resolve()), settings.allow_license))
            added.append(str(told.pop("folder")))
            packed[added[-1]] = told
            write_json_atomic(out / MANIFEST, {"format": FORMAT, "backbones": packed})
    return added


def _known(settings: Settings, names: Sequence[str]) -> list[Source]:
    """Return the backbones of these names; without any, those installed and those in --weights."""
    local, _ = prepare.local_sources(settings)
    if names:
        return [replace(_named(name, local), label=name) for name in names]
    found = plugins.installed("backbone")
    usable = [plugin.full_name if plugins.shadowed(plugin) else plugin.name for plugin in found]
    others = [resolve(name, {}) for name in usable if name not in {*local, ANY_ARCHITECTURE}]
    return [*local.values(), *others]


def _named(name: str, local: dict[str, Source]) -> Source:
    """Return the backbone of a name, or of a folder with weights alone."""
    path = Path(name)
    if (path / WEIGHTS_FILE).is_file() and not (path / "config.json").is_file():
        beside, _ = in_folder(path.resolve().parent)
        if path.resolve().name in beside:
            return beside[path.resolve().name]
    return resolve(name, local)


def _holds_several(folder: Path) -> bool:
    held = (WEIGHTS_FILE, "config.json")
    return folder.is_dir() and not any((folder / name).is_file() for name in held)
