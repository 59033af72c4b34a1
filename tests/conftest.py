"""One suite, two devices: tests that take ``device`` run on the CPU and, where there is one, on the GPU.

Triton kernels run on the CPU in Triton's interpreter, which has to be chosen before triton is imported; on a machine
with a GPU they run for real, and the CPU cases of kernel tests are skipped.
"""

import fcntl
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from sadp_fast import native

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


# TensorFloat-32 convolutions keep ten bits: what is compared with another order of the same sums would differ by 1e-3,
# and spikes with it.
torch.backends.cudnn.allow_tf32 = False
# Some of cuDNN's gradients add up in an order of their own each time: two runs would not be equal to the last bit.
torch.backends.cudnn.deterministic = True


def patch_the_language_once_a_kernel():
    """Makes Triton's interpreter twice as fast.

    For a kernel, and again for every function that it calls, it replaces the language's functions by wrappers of what
    is there. Those of the kernel serve its functions as well.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, scope_of = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", None)
    if scope_of is None:  # another Triton
        return
    everything = SimpleNamespace(__globals__={"tl": language, "core": language.core})
    running = []

    def patch_once(function):
        if running:
            return scope_of()
        scope = patch(everything)
        restore = scope.restore

        def restore_and_end():
            restore()
            running.clear()

        scope.restore = restore_and_end
        running.append(scope)
        return scope

    interpreter._patch_lang = patch_once


if INTERPRETED:
    patch_the_language_once_a_kernel()


class Outcomes:
    """What ran and how it ended, in a file that is replaced every few seconds: a run that is killed leaves its part."""

    PAUSE = 5.0  # seconds between two writings, but for failures

    def __init__(self, path):
        self.path, self.written = Path(path), 0.0
        self.counts, self.failed = defaultdict(Counter), {}
        self.complete = False

    def pytest_runtest_logreport(self, report):
        failed = report.outcome == "failed"
        if report.when == "call" or report.outcome != "passed":
            outcome = "error" if failed and report.when != "call" else report.outcome
            self.counts[report.nodeid.split("::")[0]][outcome] += 1
        if failed:
            self.failed[report.nodeid] = report.longreprtext[-2000:]
        if failed or time.monotonic() > self.written + self.PAUSE:
            self.write()

    def pytest_sessionfinish(self, exitstatus):
        self.complete = exitstatus in (0, 1)
        self.write()

    def write(self):
        cuda = torch.cuda.is_available()
        result = {
            "environment": {
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "device": torch.cuda.get_device_name() if cuda else "CPU (Triton kernels in the interpreter)",
                "python": platform.python_version(),
                "torch": torch.__version__,
                "triton": version("triton") if find_spec("triton") else None,
            },
            "complete": self.complete,
            "total": dict(sum(self.counts.values(), Counter())),
            "outcomes": {file: dict(counts) for file, counts in sorted(self.counts.items())},
            "failed": dict(sorted(self.failed.items())),
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(self.path)
        self.written = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--outcomes", metavar="FILE.json", help="write what ran, where, and how it ended")


def pytest_report_header():
    """Which copy is tested: in a clone's folder, its modules with the installed package's library."""
    return native.description()


def pytest_configure(config):
    # Under pytest-xdist the workers report to one process, which has no worker's input.
    if config.getoption("--outcomes") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))


def pytest_collection_modifyitems(config, items):
    """Slow tests wait to be asked for, by ``-m slow`` or by name; those that need a GPU are slow without one alone."""
    asked = config.option.markexpr or any("::" in argument for argument in config.args)
    waiting = [item for item in items if item.get_closest_marker("slow") and not item.get_closest_marker("gpu")]
    if waiting and not asked:
        config.hook.pytest_deselected(items=waiting)
        items[:] = [item for item in items if item not in waiting]
    for item in items:
        if "compiled_report" in getattr(item, "fixturenames", ()):
            item.add_marker("compiled")
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def _devices():
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=_devices())
def device(request) -> str:
    """Every device of this machine."""
    return request.param


@pytest.fixture
def kernel_device() -> str:
    """Where Triton kernels run here: the GPU, or the CPU through the interpreter."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _no_search_for_convolutions():
    """Training turns cuDNN's search for the fastest algorithm on; the next test should not depend on it."""
    yield
    torch.backends.cudnn.benchmark = False


@pytest.fixture(scope="session")
def compiled_report(tmp_path_factory):
    """A function of a script among these tests and its arguments: what it prints, from JSON.

    The script runs in a process of its own, since Triton's interpreter, which the other tests use on a machine without
    a GPU, cannot be switched off once triton is imported. It runs once, whichever of xdist's workers asks first.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # which the workers share

    @functools.cache
    def printed(script: str, *arguments: str) -> tuple[int, str, str]:
        path = folder / ("-".join([Path(script).stem, *arguments]) + ".json")
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                path.write_text(json.dumps(_run(script, *arguments)))
        return tuple(json.loads(path.read_text()))

    def report(script: str, *arguments: object) -> dict:
        status, output, errors = printed(script, *map(str, arguments))
        assert status == 0, errors
        return json.loads(output)

    return report


def _run(script: str, *arguments: str) -> tuple[int, str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(native.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True, timeout=900
    )
    return done.returncode, done.stdout, done.stderr
