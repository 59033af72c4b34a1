"""The native library: which file it is, that it fits the sources beside this package, and what it was built with.

It lies beside this file after ``pip install .`` elsewhere or ``pip install -e .`` here. In a clone's folder, where the
package's sources hide the installed package, it is the installed one's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
_SOURCES = {".h", ".cpp", ".cu", ".cuh"}


def sources_digest(root: Path) -> str | None:
    """SHA-256 of what the library is built from in a clone, by CMakeLists.txt's rule; None where there is no clone."""
    build, folder = root / "CMakeLists.txt", root / "csrc"
    if not (build.is_file() and folder.is_dir()):
        return None
    files = [build, *(path for path in folder.rglob("*") if path.suffix in _SOURCES)]
    by_name = sorted((path.relative_to(root).as_posix(), path) for path in files)
    listing = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n" for name, path in by_name)
    return hashlib.sha256(listing.encode()).hexdigest()


def find(package: Path, search: list[str]) -> Path | None:
    """The library's file: beside the package's modules, or else in the first installed package of this name."""
    folders = [package, *(Path(entry).resolve() / package.name for entry in search)]
    candidates = (folder / f"_native{suffix}" for folder in folders for suffix in EXTENSION_SUFFIXES)
    return next((file for file in candidates if file.is_file()), None)


def load(package: Path, search: list[str]) -> ModuleType:
    """The library as a module.

    Raises:
        ImportError: there is none for this Python, or it was built from other sources than the clone's.
    """
    root, file = package.parent, find(package, search)
    if file is None:
        version = ".".join(map(str, sys.version_info[:2]))
        raise ImportError(
            f"No native library of sadp_fast for Python {version} was found; run `pip install .` in {root}."
        )
    name = f"{package.name}._native"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    digest = sources_digest(root)
    if digest not in (None, getattr(module, "SOURCES_DIGEST", "")):
        remedy = "pip install -e ." if file.parent == package else "pip install ."
        raise ImportError(f"{file} was built from other sources than {root / 'csrc'}; run `{remedy}` in {root}.")
    sys.modules[name] = module
    return module


def description() -> str:
    """Which copy of the package runs, and on which library: for reports."""
    return f"sadp_fast in {PACKAGE}, native library {library.__file__} (CUDA: {'yes' if library.has_cuda else 'no'})"


library = load(PACKAGE, sys.path)
