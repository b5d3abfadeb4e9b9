"""Names to callables: backbones, strategies and heads, found by entry point.

Names are read from package metadata, so listing them imports neither torch nor a plugin. A plugin
is imported when its name is used, and whatever goes wrong then concerns that name alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from autoft.errors import PluginError, did_you_mean

GROUPS = {
    "backbone": "autoft.backbones",
    "strategy": "autoft.strategies",
    "head": "autoft.heads",
}
OURS = "autoft"


@dataclass(frozen=True)
class Plugin:
    """A declared name: what kind it is, which package declares it and where it points."""

    kind: str
    name: str
    package: str
    version: str
    target: str

    @property
    def builtin(self) -> bool:
        """Tell whether autoft itself declares it."""
        return self.package == OURS

    @property
    def full_name(self) -> str:
        """Return `package:name`, which is never ambiguous."""
        return f"{self.package}:{self.name}"


@cache
def installed(kind: str) -> tuple[Plugin, ...]:
    """Return every plugin of `kind`, built-ins first, then by package and name.

    `AUTOFT_DISABLE_PLUGINS=1` in the environment leaves the built-ins alone.
    """
    found = {_describe(kind, entry) for entry in metadata.entry_points(group=GROUPS[kind])}
    if os.environ.get("AUTOFT_DISABLE_PLUGINS") == "1":
        found = {plugin for plugin in found if plugin.builtin}
    return tuple(sorted(found, key=lambda p: (not p.builtin, p.package, p.name)))


def _describe(kind: str, entry: metadata.EntryPoint) -> Plugin:
    package, version = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "?")
    return Plugin(kind, entry.name, package, version, entry.value)


def shadowed(plugin: Plugin) -> str:
    """Say why `plugin` cannot be reached by its plain name, or return an empty string."""
    if plugin.builtin:
        return ""
    others = [p for p in installed(plugin.kind) if p.name == plugin.name and p != plugin]
    if any(other.builtin for other in others):
        return f"the name is reserved by autoft; use '{plugin.full_name}'"
    if others:
        names = ", ".join(other.package for other in others)
        return f"also declared by {names}; use '{plugin.full_name}'"
    return ""


def find(kind: str, name: str) -> Plugin:
    """Return the plugin called `name` or `package:name`.

    Raises:
        PluginError: no such plugin (with the closest name), or two packages declare it.
    """
    plugins = installed(kind)
    if ":" in name:
        matches = [plugin for plugin in plugins if plugin.full_name == name]
    else:
        matches = [plugin for plugin in plugins if plugin.name == name]
        matches = [plugin for plugin in matches if plugin.builtin] or matches
    if len(matches) == 1:
        return matches[0]
    if not matches:
        names = [plugin.name for plugin in plugins]
        raise PluginError(
            f"No {kind} named '{name}'.{did_you_mean(name, names)} Installed: {', '.join(names)}."
        )
    raise _clash(kind, name, matches)


def _clash(kind: str, name: str, matches: Sequence[Plugin]) -> PluginError:
    packages = " and ".join(f"{p.package} {p.version}" for p in matches)
    return PluginError(
        f"Two packages provide a {kind} named '{name}': {packages}. Uninstall one, or write "
        f"'{matches[0].full_name}'."
    )


def load(kind: str, name: str) -> Callable[..., Any]:
    """Import the plugin called `name` and return what its entry point names.

    Raises:
        PluginError: it is unknown, ambiguous, or its import fails in whatever way.
    """
    plugin = find(kind, name)
    entry = metadata.EntryPoint(plugin.name, plugin.target, GROUPS[kind])
    try:
        loaded = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may raise SystemExit at import: it must not end us
        raise PluginError(
            f"The {kind} '{plugin.name}' from {plugin.package} {plugin.version} cannot be "
            f"imported: {error!r}. It is declared as '{plugin.target}'."
        ) from error
    if not callable(loaded):
        raise PluginError(
            f"The {kind} '{plugin.name}' from {plugin.package} is declared as '{plugin.target}', "
            f"which is a {type(loaded).__name__} and not a function."
        )
    function: Callable[..., Any] = loaded
    return function
