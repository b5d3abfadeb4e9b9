"""Say what is wrong with a plugin by reading its source, without running a line of it.

Listing plugins must neither import them nor torch, and yet name the broken ones. What only running
can show (an exception inside a call, a library that fails to load) is left to `plugins list
--check`; where the source does not tell, the plugin is taken to be sound.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint
from pathlib import Path

from autoft.errors import did_you_mean
from autoft.plugins import GROUPS, OURS, Plugin

_EXITS = {"exit", "quit", "sys.exit", "os._exit", "os.abort"}
_DYNAMIC = {"globals", "vars", "exec", "eval", "setattr"}
"""A module that uses one of these may define names that its source does not show."""


def why_broken(plugin: Plugin) -> str:
    """Say why `plugin` cannot be imported, or return an empty string."""
    try:
        entry = EntryPoint(plugin.name, plugin.target, GROUPS[plugin.kind])
        module, attribute = entry.module, entry.attr
    except AttributeError:
        return f"'{plugin.target}' is no 'module:function'"
    if not attribute:
        return f"'{plugin.target}' names a module; expected 'module:function'"
    return _module_problem(module) or _name_problem(module, attribute.split(".")[0])


@cache
def _module_problem(name: str) -> str:
    """Say why importing `name` fails: by itself, its parents, or modules of its own package."""
    waiting, seen, needed = [name], set[str](), list[tuple[str, str]]()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        problem = _own_problem(module)
        if problem:
            return problem
        waiting += _own_modules(module)
        needed += _own_names(module)
    return next((why for pair in needed if (why := _name_problem(*pair))), "")


def _own_problem(module: str) -> str:
    """Say why a module fails, leaving aside what it imports from its own package."""
    if _locate(module) is None:
        return f"there is no module '{module}'"
    try:
        tree = _tree(module)
    except (SyntaxError, ValueError, OSError) as error:
        return f"{module} cannot be read as Python: {error}"
    return _ending(tree, module) or _missing_package(tree, module)


@cache
def _locate(name: str) -> ModuleSpec | None:
    """Find a module as the import system would, but import no parent package."""
    parent, _, _ = name.rpartition(".")
    try:
        if not parent:
            return importlib.util.find_spec(name)
        above = _locate(parent)
        if above is None or above.submodule_search_locations is None:
            return None
        return PathFinder.find_spec(name, above.submodule_search_locations)
    except (ImportError, ValueError):
        return None


@cache
def _tree(module: str) -> ast.Module:
    """Return the syntax tree of a module; an empty one where there is no source to read."""
    source = _source(module)
    return ast.parse(source.read_bytes(), source.name) if source else ast.Module([], [])


def _source(module: str) -> Path | None:
    spec = _locate(module)
    if spec is None or not spec.has_location or not spec.origin:
        return None
    return Path(spec.origin) if spec.origin.endswith(".py") else None


def _ending(tree: ast.Module, module: str) -> str:
    """Say which top-level statement ends the import, whatever happens."""
    for statement in tree.body:
        ends = isinstance(statement, ast.Raise) or (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Call)
            and ast.unparse(statement.value.func) in _EXITS
        )
        if ends:
            return f"{module}, line {statement.lineno}: `{ast.unparse(statement)}` ends its import"
    return ""


def _missing_package(tree: ast.Module, module: str) -> str:
    """Say which package that is imported unconditionally is not installed."""
    for statement in tree.body:
        for name in _absolute_imports(statement):
            package = name.split(".")[0]
            if _locate(package) is None:
                return f"{module}, line {statement.lineno}: '{package}' is not installed"
    return ""


def _absolute_imports(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if isinstance(statement, ast.ImportFrom) and not statement.level and statement.module:
        return [statement.module]
    return []


def _own_modules(module: str) -> Iterator[str]:
    """Yield the modules of the same package, or of autoft, that importing `module` runs."""
    if "." in module:
        yield module.rpartition(".")[0]
    for statement in _tree(module).body:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names if _own(alias.name, module))
        elif isinstance(statement, ast.ImportFrom):
            base = _from_module(statement, module)
            names = (f"{base}.{alias.name}" for alias in statement.names)
            if _own(base, module):
                yield from (base, *filter(_locate, names))


def _own_names(module: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of what `from module import name` needs from the same packages."""
    for statement in _tree(module).body:
        if isinstance(statement, ast.ImportFrom):
            base = _from_module(statement, module)
            if _own(base, module):
                yield from ((base, alias.name) for alias in statement.names if alias.name != "*")


def _own(name: str, module: str) -> bool:
    return name.split(".")[0] in (module.split(".")[0], OURS)


def _from_module(statement: ast.ImportFrom, module: str) -> str:
    """Return the absolute name of the module in `from <name> import ...`."""
    if not statement.level:
        return statement.module or ""
    spec = _locate(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    parts = module.split(".") if is_package else module.split(".")[:-1]
    parts = parts[: len(parts) - (statement.level - 1)]
    return ".".join([*parts, statement.module] if statement.module else parts)


def _name_problem(module: str, name: str) -> str:
    """Say that a readable module does not define `name`."""
    if _source(module) is None or _locate(f"{module}.{name}"):
        return ""
    tree = _tree(module)
    names = set(_bound(tree.body))
    if names & {name, "*", "__getattr__"}:
        return ""
    if any(isinstance(node, ast.Name) and node.id in _DYNAMIC for node in ast.walk(tree)):
        return ""
    return f"{module} defines no '{name}'.{did_you_mean(name, names)}"


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that top-level code may bind, conditional or not."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                yield alias.asname or alias.name.split(".")[0]
        else:
            yield from _stored(statement)


def _stored(statement: ast.stmt) -> Iterator[str]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif node is not statement and isinstance(node, ast.stmt):
            yield from _bound([node])
