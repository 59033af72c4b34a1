"""The package build: what the native library depends on, and what a build without a working nvcc says."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import sadp_fast
from sadp_fast import native

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_native_library_loads_no_cuda_library():
    code = (
        "import importlib.util as u, pathlib, sys\n"
        "spec = u.spec_from_file_location('_native', sys.argv[1])\n"
        "module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "maps = pathlib.Path('/proc/self/maps').read_text()\n"
        "assert sys.argv[1] in maps\n"
        "assert 'libcuda' not in maps and 'libtorch' not in maps, maps\n"
    )
    result = subprocess.run([sys.executable, "-c", code, native.library.__file__], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_versions_agree():
    assert sadp_fast.__version__ == metadata.version("sadp-fast")


def test_a_module_of_an_earlier_build_is_not_installed_again(tmp_path):
    """pip builds in the clone's own build folder and leaves it there."""
    pytest.importorskip("setuptools")
    shutil.copytree(ROOT / "sadp_fast", tmp_path / "sadp_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    gone = tmp_path / "build/lib/sadp_fast/gone.py"
    gone.parent.mkdir(parents=True)
    gone.touch()
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "build/lib"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(gone.parent) for path in gone.parent.rglob("*.py")}
    assert built == {path.relative_to(ROOT / "sadp_fast") for path in (ROOT / "sadp_fast").rglob("*.py")}
    assert (gone.parent / "py.typed").exists()


@pytest.fixture
def configure(tmp_path):
    """Runs CMake's configure step with SADP_CUDA set and an nvcc that does not work; returns its status and output."""
    pybind11 = pytest.importorskip("pybind11")
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja = shutil.which("cmake", path=search), shutil.which("ninja", path=search)
    if cmake is None or ninja is None:
        pytest.skip("needs cmake and ninja")

    def run(sadp_cuda):
        command = [
            cmake,
            *("-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSADP_CUDA={sadp_cuda}",
        ]
        environment = {**os.environ, "CUDACXX": shutil.which("false") or "false"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        return result.returncode, " ".join((result.stdout + result.stderr).split())

    return run


@pytest.mark.slow
def test_auto_without_a_working_nvcc_builds_for_the_cpu_and_says_so(configure):
    status, output = configure("AUTO")
    assert status == 0, output
    assert "sadp_fast: CPU only (SADP_CUDA=AUTO, no working nvcc was found" in output


@pytest.mark.slow
def test_on_without_a_working_nvcc_is_an_error_with_the_remedy(configure):
    status, output = configure("ON")
    assert status != 0
    assert "SADP_CUDA=ON, but no working nvcc was found" in output
    assert "point CUDACXX at nvcc or CUDA_HOME at the toolkit, or build with SADP_CUDA=OFF" in output


@pytest.mark.slow
def test_another_value_is_an_error(configure):
    status, output = configure("MAYBE")
    assert status != 0
    assert 'SADP_CUDA is "MAYBE"; set it to AUTO, ON or OFF.' in output
