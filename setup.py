"""Builds the native library with CMake and Ninja; everything else about the package is in pyproject.toml.

Environment: SADP_CUDA = AUTO (default) | ON | OFF, SADP_CUDA_ARCHITECTURES (such as "90" or "80;90"; default: all).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


def find_tool(name: str) -> str:
    """Path of a build tool: beside this Python first (a virtual environment need not be activated), then on PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        sys.exit(f"Building sadp_fast needs {name}, which was not found; run `pip install {name}`.")
    return found


def find_nvcc() -> tuple[str, str] | None:
    """The CUDA compiler and where it was found. A variable that names none that exists is passed over, aloud."""
    candidates = [("CUDACXX", os.environ.get("CUDACXX"))]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append((variable, str(Path(os.environ[variable]) / "bin" / "nvcc")))
    candidates += [("/usr/local/cuda", "/usr/local/cuda/bin/nvcc"), ("PATH", "nvcc")]
    for source, candidate in candidates:
        found = shutil.which(candidate) if candidate else None
        if found:
            return found, source
        if candidate and source in os.environ:
            print(f"-- sadp_fast: {source} leads to {candidate}, which is no program; looking on", flush=True)
    return None


class CMakeBuild(build_ext):
    """Configures, builds and installs the one extension with CMake."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        environment = dict(os.environ)
        nvcc = find_nvcc()
        if nvcc is None:
            environment.pop("CUDACXX", None)
            print("-- sadp_fast: no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, /usr/local/cuda or PATH", flush=True)
        else:
            environment["CUDACXX"] = nvcc[0]
            print(f"-- sadp_fast: nvcc is {nvcc[0]} (from {nvcc[1]})", flush=True)

        cmake = find_tool("cmake")
        build = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # --fresh: the paths of the last build's isolated environment, cached there, are gone by now.
        configure = [
            cmake,
            "--fresh",
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSADP_CUDA={os.environ.get('SADP_CUDA', 'AUTO').upper()}",
            f"-DSADP_CUDA_ARCHITECTURES={os.environ.get('SADP_CUDA_ARCHITECTURES', '')}",
        ]
        for command in (configure, [cmake, "--build", str(build)], [cmake, "--install", str(build)]):
            status = subprocess.run(command, env=environment).returncode
            if status != 0:
                sys.exit(f"Building sadp_fast failed (exit status {status}); the lines above say why.")


class FreshModules(build_py):
    """Leaves nothing of an earlier build: a module that is gone since would be installed again."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension("sadp_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshModules},
)
