"""Who imports whom, and who touches what is another's own: read from the source, so that lazy imports count too."""

from __future__ import annotations

import ast
from pathlib import Path

# From the top down. Every room may import those below it; a file at the package's top level is a room of its own.
ROOMS = (
    "models.py",  # keeps the name sadp_fast.models for what is in the laboratory
    "lab",
    "__init__.py",
    "surrogate.py",  # keeps the name sadp_fast.surrogate
    "prune",
    "statistics",
    "memory",
    "nn",
    "ops",
    "ops/common",
    "native.py",
    "errors.py",
)


def room_of(file: str) -> str:
    """The room of a file, by its path in the package; that of an operator's folder is "ops"."""
    parts = file.split("/")
    return "ops/common" if parts[:2] == ["ops", "common"] else parts[0]


def sources(package: Path) -> dict[str, ast.Module]:
    """The syntax tree of each file, by its path in the package."""
    return {
        path.relative_to(package).as_posix(): ast.parse(path.read_text(), str(path))
        for path in sorted(package.rglob("*.py"))
    }


def imports(package: str, trees: dict[str, ast.Module]) -> dict[str, dict[str, int]]:
    """By file: the files of the package that it imports anywhere, with the line; under TYPE_CHECKING and lazily too."""
    return {file: dict(_imported(package, file, tree, trees)) for file, tree in trees.items()}


def _imported(package: str, file: str, tree: ast.Module, trees: dict[str, ast.Module]):
    folder = [package, *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            # A name is a module of its own where there is such a file, and else one of the module that it comes from.
            modules = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for module in modules:
            if module[0] == package and (found := _file(module[1:], trees)) and found != file:
                yield found, node.lineno


def _file(module: list[str], trees: dict[str, ast.Module]) -> str:
    """Of a module, or of what a name belongs to."""
    for parts in (module, module[:-1]):
        for candidate in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"])):
            if candidate in trees:
                return candidate
    raise LookupError(f"no file is the module {'.'.join(module)}")


def circles(graph: dict[str, dict[str, int]]) -> list[list[str]]:
    """Groups of files that import each other, by Tarjan's strongly connected components."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(file: str) -> None:
        number[file] = low[file] = len(number)
        path.append(file)
        for other in graph[file]:
            if other not in number:
                visit(other)
                low[file] = min(low[file], low[other])
            elif other in path:
                low[file] = min(low[file], number[other])
        if low[file] == number[file]:
            group = path[path.index(file) :]
            del path[path.index(file) :]
            if len(group) > 1:
                found.append(group)

    for file in graph:
        if file not in number:
            visit(file)
    return found


def foreign_names(tree: ast.Module) -> list[tuple[int, str]]:
    """Underscore names of others that a file touches: (line, what).

    Its own are those of ``self`` and ``cls``, and names that the file itself defines: functions, classes, variables,
    attributes that it sets on ``self``, fields and slots.
    """
    own = _defined(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own and not _is_own(node):
            found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"import {alias.name}") for alias in node.names if _is_private(alias.name)]
    return found


def _is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node):
            names.add(node.attr)
    return names
