"""One suite, two devices: tests that take ``device`` run on the CPU and, where there is one, on the GPU.

Triton kernels run on the CPU in Triton's interpreter, which has to be chosen before triton is imported; on a machine
with a GPU they run for real, and the CPU cases of kernel tests are skipped.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


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
