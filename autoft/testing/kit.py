"""Run the checks over what a package declares: as pytest cases, or as a list of results.

The package's entry points are read, so that the declaration is tested as well. Built-in plugins
pass the same checks; nobody is excused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoft import plugins
from autoft.errors import MachineError, PluginError, did_you_mean
from autoft.plugins import Plugin
from autoft.testing.backbones import BACKBONE_CHECKS
from autoft.testing.heads import HEAD_CHECKS
from autoft.testing.probes import one_thread
from autoft.testing.signatures import SIGNATURE_CHECKS
from autoft.testing.strategies import STRATEGY_CHECKS

Check = Callable[..., None]

CHECKS: Mapping[str, tuple[Check, ...]] = {
    "backbone": (*SIGNATURE_CHECKS, *BACKBONE_CHECKS),
    "strategy": (*SIGNATURE_CHECKS, *STRATEGY_CHECKS),
    "head": (*SIGNATURE_CHECKS, *HEAD_CHECKS),
}
"""What a plugin of each kind promises, in the order in which the promises build on each other."""


@dataclass(frozen=True)
class CheckResult:
    """What became of one check; `contract` is its sentence, `message` says how it was broken."""

    check: str
    contract: str
    passed: bool
    message: str = ""


@dataclass(frozen=True)
class _Case:
    """One plugin and one check."""

    plugin: Plugin
    check: Check
    pretrained: bool

    def __str__(self) -> str:
        return f"{self.plugin.name}-{_short(self.check)}"

    def run(self) -> None:
        """Import the plugin and check it."""
        function = plugins.load(self.plugin.kind, self.plugin.full_name)
        options: dict[str, Any] = {}
        if self.check in BACKBONE_CHECKS:
            options["pretrained"] = self.pretrained
        with one_thread():
            self.check(function, **options)


def conformance(
    package: str, *, pretrained: bool = False, names: Sequence[str] | None = None
) -> Callable[[Any], None]:
    """Return a pytest test function with one case for every plugin of `package` and every check.

    `pretrained` builds backbones with their weights, which may need the network. `names` limits
    the plugins; without it, all that the package's entry points declare are checked.

    Raises:
        PluginError: the package is not installed or declares no plugin, or not one of `names`.
        MachineError: pytest is not installed.
    """
    try:
        import pytest
    except ImportError as error:
        raise MachineError(
            "conformance() makes pytest cases, and pytest is not installed. Run `pip install "
            "pytest`, or use autoft.testing.run_checks, which needs no pytest."
        ) from error
    cases = [
        _Case(plugin, check, pretrained)
        for plugin in _declared(package, names)
        for check in CHECKS[plugin.kind]
    ]

    @pytest.mark.parametrize("case", cases, ids=str)
    def test_conformance(case: _Case) -> None:
        """Check one promise of one plugin."""
        case.run()

    return test_conformance


def run_checks(kind: str, name: str, *, pretrained: bool = False) -> list[CheckResult]:
    """Return the result of every check on the plugin `name` ("backbone", "strategy", "head").

    Whatever the plugin raises, at import or later, becomes the message of the check it broke.

    Raises:
        PluginError: there is no such plugin, or two packages declare the name.
    """
    plugin = plugins.find(kind, name)
    return [_result(_Case(plugin, check, pretrained)) for check in CHECKS[kind]]


def _result(case: _Case) -> CheckResult:
    contract = (case.check.__doc__ or "").partition("\n")[0]
    try:
        case.run()
    except (AssertionError, PluginError) as error:
        return CheckResult(_short(case.check), contract, False, str(error))
    except Exception as error:  # noqa: BLE001  # a plugin may raise anything: that is the result
        return CheckResult(_short(case.check), contract, False, f"It raised {error!r}.")
    return CheckResult(_short(case.check), contract, True)


def _short(check: Check) -> str:
    return check.__name__.removeprefix("check_")


def _declared(package: str, names: Sequence[str] | None) -> list[Plugin]:
    everything = [plugin for kind in plugins.GROUPS for plugin in plugins.installed(kind)]
    found = [p for p in everything if _normal(p.package) == _normal(package)]
    if not found:
        packages = sorted({plugin.package for plugin in everything})
        raise PluginError(
            f"No installed package '{package}' declares a plugin."
            f"{did_you_mean(package, packages)} Packages with plugins: {', '.join(packages)}. "
            f"Install it with `pip install -e .`, and anew when its entry points change."
        )
    if names is None:
        return found
    known = {plugin.name for plugin in found}
    for name in names:
        if name not in known:
            raise PluginError(
                f"The package '{package}' declares no plugin '{name}'."
                f"{did_you_mean(name, known)} It declares: {', '.join(sorted(known))}."
            )
    return [plugin for plugin in found if plugin.name in names]


def _normal(package: str) -> str:
    """Return the name by which indexes compare packages (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()
