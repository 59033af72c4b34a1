"""One suite, two devices: tests that take ``device`` run on the CPU and, where there is one, on the GPU.

Triton kernels run on the CPU in Triton's interpreter, which has to be chosen before triton is imported; on a machine
with a GPU they run for real, and the CPU cases of kernel tests are skipped.
"""

import json
import os
import platform
from collections import Counter, defaultdict
from datetime import datetime, timezone
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def pytest_addoption(parser):
    parser.addoption("--outcomes", metavar="FILE.json", help="write what ran, where, and how it ended")


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--outcomes"):
        return
    outcomes = defaultdict(Counter)
    failed = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            outcomes[report.nodeid.split("::")[0]][outcome] += 1
            if outcome in ("failed", "error"):
                failed.append(report.nodeid)
    cuda = torch.cuda.is_available()
    result = {
        "environment": {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name() if cuda else "CPU (Triton kernels in the interpreter)",
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "outcomes": {file: dict(counts) for file, counts in sorted(outcomes.items())},
        "total": dict(sum(outcomes.values(), Counter())),
        "failed": sorted(failed),
    }
    Path(config.getoption("--outcomes")).write_text(json.dumps(result, indent=1) + "\n")


def pytest_collection_modifyitems(items):
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
