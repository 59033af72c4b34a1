"""Which native library a copy of the package loads, and which ones it refuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sadp_fast import native

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(native.library.__file__)


@pytest.fixture
def clone(tmp_path):
    """A clone that is not built: the package's modules, and what the library is built from."""
    package = Path(native.__file__).parent
    shutil.copytree(package, tmp_path / "clone/sadp_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return with_sources(tmp_path / "clone")


@pytest.fixture
def small_clone(tmp_path):
    """As ``clone``, with nothing in the package but what loads the library: torch takes seconds."""
    (tmp_path / "clone/sadp_fast").mkdir(parents=True)
    shutil.copy(native.__file__, tmp_path / "clone/sadp_fast")
    (tmp_path / "clone/sadp_fast/__init__.py").write_text("from . import native\n")
    return with_sources(tmp_path / "clone")


def with_sources(clone: Path) -> Path:
    shutil.copytree(ROOT / "csrc", clone / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", clone)
    return clone


@pytest.fixture
def installed(tmp_path):
    """A folder of installed packages, with all of ours that a clone needs."""
    return put_library(tmp_path / "site" / "sadp_fast").parents[1]


def put_library(package: Path) -> Path:
    package.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(LIBRARY, package))


def run(clone: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """Python in the clone, with packages installed in ``path`` alone (and those that this Python has, but ours)."""
    hidden = clone.parent / "empty"
    environment = {**os.environ, "PYTHONPATH": str(path or hidden)}
    return subprocess.run([sys.executable, *arguments], cwd=clone, env=environment, capture_output=True, text=True)


def import_error(clone: Path, path: Path | None = None) -> str:
    # Without the folders of installed packages, where ours may be.
    done = run(clone, "-S", "-c", "import sadp_fast", path=path)
    assert done.returncode == 1, done.stdout
    return done.stderr.splitlines()[-1]


def test_a_clone_runs_with_the_installed_library_and_says_so(clone, installed):
    code = "import sadp_fast; print(sadp_fast.native.description()); print(sadp_fast.sample.__module__)"
    done = run(clone, "-c", code, path=installed)
    assert done.returncode == 0 and not done.stderr, done.stderr
    cuda = "yes" if native.library.has_cuda else "no"
    library = installed / "sadp_fast" / LIBRARY.name
    assert done.stdout.splitlines() == [
        f"sadp_fast in {clone / 'sadp_fast'}, native library {library} (CUDA: {cuda})",
        "sadp_fast.prune.sampling",
    ]


def test_pytest_runs_in_a_clone_and_says_what_it_tests(clone, installed):
    (clone / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", clone / "tests")
    shutil.copy(ROOT / "pyproject.toml", clone)
    (clone / "tests/test_one.py").write_text("from sadp_fast import LIFNode\ndef test_one(): LIFNode()\n")
    done = run(clone, "-m", "pytest", "-p", "no:cacheprovider", path=installed)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    library = installed / "sadp_fast" / LIBRARY.name
    assert f"sadp_fast in {clone / 'sadp_fast'}, native library {library} (CUDA: " in done.stdout


def test_the_library_beside_the_modules_comes_first(small_clone, installed):
    beside = put_library(small_clone / "sadp_fast")
    done = run(small_clone, "-c", "import sadp_fast; print(sadp_fast.native.library.__file__)", path=installed)
    assert done.stdout.strip() == str(beside), done.stderr


def test_an_installed_package_has_no_sources_to_be_compared_with(small_clone):
    put_library(small_clone / "sadp_fast")
    shutil.rmtree(small_clone / "csrc")
    done = run(small_clone, "-c", "from sadp_fast import native; print(native.sources_digest(native.PACKAGE.parent))")
    assert done.stdout.strip() == "None", done.stderr


@pytest.mark.parametrize("changed", ["CMakeLists.txt", "csrc/include/sadp/philox.h", "csrc/cuda/new.cu"])
def test_a_library_of_other_sources_is_refused(changed, small_clone, installed):
    (small_clone / changed).open("a").write("\n")
    library = installed / "sadp_fast" / LIBRARY.name
    assert import_error(small_clone, installed) == (
        f"ImportError: {library} was built from other sources than {small_clone / 'csrc'}; "
        f"run `pip install .` in {small_clone}."
    )
    beside = put_library(small_clone / "sadp_fast")
    assert import_error(small_clone, installed) == (
        f"ImportError: {beside} was built from other sources than {small_clone / 'csrc'}; "
        f"run `pip install -e .` in {small_clone}."
    )


def test_what_is_not_compiled_does_not_count(small_clone, installed):
    (small_clone / "csrc/cpu/sample.cpp.orig").write_text("what an editor leaves")
    done = run(small_clone, "-c", "import sadp_fast", path=installed)
    assert done.returncode == 0, done.stderr


def test_without_a_library_the_error_says_what_to_run(small_clone):
    version = ".".join(map(str, sys.version_info[:2]))
    assert import_error(small_clone) == (
        f"ImportError: No native library of sadp_fast for Python {version} was found; "
        f"run `pip install .` in {small_clone}."
    )


def test_no_other_module_loads_the_library():
    for path in Path(native.__file__).parent.rglob("*.py"):
        if path.name != "native.py":
            assert "import _native" not in path.read_text(), path
