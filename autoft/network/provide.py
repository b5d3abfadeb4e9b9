"""Have a backbone's weights here: where they are, under which licence, and whether they fit.

The controlling process knows the values of this module, so torch is imported where it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autoft import plugins
from autoft.errors import MachineError, UsageError
from autoft.network import licenses
from autoft.network.sources import ANY_ARCHITECTURE, Source
from autoft.weights import Weights, find_weights

Progress = Callable[[str, int, int], None]
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Provided:
    """A backbone whose weights are here, and what the user should know of them."""

    source: Source
    notes: tuple[str, ...] = ()


def locate(source: Source) -> Weights | None:
    """Return the file that `source` is built from; None if its plugin fetches without telling.

    Raises:
        AutoftError: there is no such plugin, or nothing was published for what it is asked for.
    """
    if source.weights:
        file = Path(source.weights)
        return Weights(
            origin=str(file),
            place=str(file.parent),
            path=str(file) if file.is_file() else "",
            source=source.trained_on,
            license=source.license,
        )
    return find_weights(plugins.load("backbone", source.plugin), source.options)


def license_of(source: Source, weights: Weights | None) -> str:
    """Return the licence of the weights of `source`; empty where it is not known."""
    if weights:
        return weights.license
    from autoft.network.build import build

    return build(source, pretrained=False).license


def provide(source: Source, allowed: Collection[str], progress: Progress) -> Provided:
    """Fetch the weights of `source` if they are not here, and say what they are.

    Raises:
        UsageError: their licence is not among those `allowed` (empty: any).
        MachineError: they are not here and cannot be fetched.
    """
    weights = locate(source)
    license = license_of(source, weights)
    if not licenses.allows(allowed, license):
        raise UsageError(licenses.refusal(source.label, allowed, license))
    note = licenses.warning(source.label, license)
    notes = (note,) if note else ()
    if weights is None:
        return Provided(replace(source, license=license), notes)
    path = fetch(source, weights, progress)
    known = replace(source, license=license, trained_on=weights.source, origin=weights.origin)
    return Provided(replace(known, file=str(path), sha256=sha256_of(path)), notes)


def fetch(source: Source, weights: Weights, progress: Progress, *, again: bool = False) -> Path:
    """Return the file of `weights`, those of `source`, fetched if not here; `again` also if so.

    Raises:
        UsageError: the user's path holds no file.
        MachineError: it cannot be fetched.
    """
    if weights.path and not again:
        return Path(weights.path)
    label = source.label
    if weights.get is None and source.plugin != ANY_ARCHITECTURE and not source.weights:
        raise MachineError(  # its plugin told where they are, not the user
            f"The weights of '{label}' are not in {weights.place}, where {weights.origin} has "
            f"them, and cannot be fetched. Install its package again."
        )
    if weights.get is None:
        raise UsageError(
            f"'{label}' names {weights.origin}, which holds no file of weights. Check the path."
        )

    def told(done: int, total: int) -> None:
        progress(f"fetching {label}: MB", done // MEGABYTE, -(-total // MEGABYTE))

    return weights.get(told, again)


def check(source: Source, image_size: int = 0) -> tuple[str, ...]:
    """Build `source` with its weights, and return what was left out of them, in words.

    Raises:
        DataError: they are damaged, or of another architecture (names the tensors).
        MachineError: they are not here and cannot be fetched.
    """
    from autoft.network.build import build
    from autoft.network.weights import load_weights

    if not source.weights:
        build(source, image_size=image_size)
        return ()
    module = build(source, pretrained=False, image_size=image_size).module
    left_out = load_weights(module, Path(source.weights))
    return (_head_note(source, left_out),) if left_out else ()


def _head_note(source: Source, left_out: Sequence[str]) -> str:
    named = ", ".join(f"'{name}'" for name in left_out[:3])
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return (
        f"Of the weights of '{source.label}' {named}{more} belong to a classifier of other "
        f"classes and are left out; a new head is trained."
    )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
