"""Launches from packed parameters: the bytes that reach the driver, and on a GPU the results."""

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import triton
import triton.language as tl

from sadp_fast import LIFNode, native, reset
from sadp_fast.ops.common.launch import Launch

# Stands in for libcuda.so.1. A function is {number of parameters, their sizes}; a launch keeps what it was given.
DRIVER = """
#include <stddef.h>
#include <string.h>
typedef struct { size_t count, sizes[64]; } Function;
void* context = (void*)1;
int pushed, popped;
unsigned char bytes[4096];
unsigned grid[7];
int attribute[3];
void* stream;
static size_t place(const Function* f, size_t i) {
    size_t at = 0;
    for (size_t k = 0; k <= i; ++k) {
        at = (at + f->sizes[k] - 1) / f->sizes[k] * f->sizes[k];
        if (k < i) at += f->sizes[k];
    }
    return at;
}
int cuCtxGetCurrent(void** c) { *c = context; return 0; }
int cuCtxPushCurrent_v2(void* c) { ++pushed; return 0; }
int cuCtxPopCurrent_v2(void** c) { ++popped; return 0; }
int cuGetErrorName(int result, const char** name) { *name = "BROKEN"; return 0; }
int cuFuncGetParamInfo(void* function, size_t i, size_t* at, size_t* size) {
    const Function* f = function;
    if (i >= f->count) return 1;
    *at = place(f, i);
    *size = f->sizes[i];
    return 0;
}
typedef struct { int id; char pad[4]; int value[16]; } Attribute;
typedef struct {
    unsigned grid[3], block[3], shared;
    void* stream;
    Attribute* attributes;
    unsigned count;
} Config;
int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void** extra) {
    const Function* f = function;
    for (size_t i = 0; i < f->count; ++i) memcpy(bytes + place(f, i), parameters[i], f->sizes[i]);
    memcpy(grid, config->grid, sizeof grid);
    stream = config->stream;
    attribute[0] = config->count;
    attribute[1] = config->count ? config->attributes[0].id : 0;
    attribute[2] = config->count ? config->attributes[0].value[0] : 0;
    return config->grid[0] == 13 ? 1 : 0;
}
"""

SCRIPT = """
import ctypes, importlib.util, json, struct, sys

spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
driver = ctypes.CDLL("libcuda.so.1")


class Function(ctypes.Structure):
    _fields_ = [("count", ctypes.c_size_t), ("sizes", ctypes.c_size_t * 64)]


class Tensor:
    def __init__(self, address):
        self.address = address

    def data_ptr(self):
        return self.address


functions = []


def prepare(sizes, parameters, aligned=0b11, programs=42, early=False):
    functions.append(Function(len(sizes), (ctypes.c_size_t * 64)(*sizes)))
    return native.prepare_launch(ctypes.addressof(functions[-1]), programs, 64, 128, early, aligned, 2, parameters)


def error(call):
    try:
        return repr(call())
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"


ours = [bytes(8), bytes(8), struct.pack("i", -7), struct.pack("f", 1.5), struct.pack("q", 2**40)]
sizes = [8, 8, 4, 4, 8]
launch = prepare([*sizes, 8, 8], ours)
found = {"launched": launch(99, Tensor(1 << 45), Tensor(4096))}
content = bytes((ctypes.c_ubyte * 48).in_dll(driver, "bytes"))
found["parameters"] = struct.unpack("QQifqQQ", content)
found["grid"] = list((ctypes.c_uint * 7).in_dll(driver, "grid"))
found["stream"] = ctypes.c_void_p.in_dll(driver, "stream").value
found["attributes"] = [list((ctypes.c_int * 3).in_dll(driver, "attribute"))]
prepare(sizes, ours, early=True)(99, Tensor(0), Tensor(0))
found["attributes"].append(list((ctypes.c_int * 3).in_dll(driver, "attribute")))
found["unaligned"] = launch(99, Tensor(4096), Tensor(4100)), prepare(sizes, ours, 0b01)(99, Tensor(4096), Tensor(4100))
found["pushed before"] = ctypes.c_int.in_dll(driver, "pushed").value
ctypes.c_void_p.in_dll(driver, "context").value = 2
launch(99, Tensor(0), Tensor(0))
found["pushed"] = [ctypes.c_int.in_dll(driver, name).value for name in ("pushed", "popped")]
found["refused"] = [prepare(other, ours) is None for other in (sizes[:-1], [*sizes, 4], [*sizes, 8, 8, 8], [4, *sizes])]
found["errors"] = [
    error(lambda: launch(99, Tensor(0))),
    error(lambda: launch(99, Tensor(0), 3)),
    error(lambda: prepare(sizes, ours, programs=13)(99, Tensor(0), Tensor(0))),
]
print(json.dumps(found))
"""


def test_what_reaches_the_driver(tmp_path):
    """Addresses, numbers and scratch pointers at the driver's offsets; refusals where the parameters are others."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, native.library.__file__],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["launched"] is True
    assert found["parameters"] == [1 << 45, 4096, -7, 1.5, 2**40, 0, 0]
    assert found["grid"] == [42, 1, 1, 64, 1, 1, 128] and found["stream"] == 99
    assert found["attributes"] == [[0, 0, 0], [1, 6, 1]]  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert found["unaligned"] == [False, True]
    assert found["pushed before"] == 0 and found["pushed"] == [1, 1]
    assert found["refused"] == [True] * 4
    assert found["errors"][0] == "TypeError: this kernel takes a stream and 2 tensors, got 2 arguments"
    assert found["errors"][1].startswith("AttributeError")
    assert found["errors"][2] == "RuntimeError: the kernel launch failed: BROKEN (1)"


@triton.jit
def _scale_kernel(x_ptr, y_ptr, size, offset, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < size) * factor + offset, mask=i < size)


def scale(device, size=1000, offset=1) -> Launch:
    programs = triton.cdiv(size, 256)
    return Launch(_scale_kernel, torch.device(device), programs, (size, offset, 0.5), {"BLOCK": 256, "num_warps": 1})


def test_interpreted_or_native(kernel_device):
    run = scale(kernel_device if kernel_device == "cpu" else "cuda:0")
    for _ in range(3):
        x = torch.randn(1000, device=kernel_device)
        y = torch.empty_like(x)
        run(x, y)
        assert torch.equal(y, x * 0.5 + 1)


@pytest.mark.gpu
def test_native_launches_are_used():
    """A fallback would give the same results, slowly."""
    run = scale("cuda:0")
    x, y = torch.randn(2, 1000, device="cuda").unbind()
    run(x, y)
    assert run._native is not None


@pytest.mark.gpu
@pytest.mark.parametrize("size, offset", [(1000, 1), (1024, 16), (1, 0), (1, 1), (2000, 2**33)])
def test_numbers_that_triton_specialises(size, offset):
    run = scale("cuda:0", size, offset)
    for _ in range(2):
        x = torch.randn(size, device="cuda")
        y = torch.empty_like(x)
        run(x, y)
        assert torch.equal(y, x * 0.5 + offset)


@pytest.mark.gpu
def test_alignment_streams_threads_and_graphs():
    run = scale("cuda:0")
    base, out = torch.randn(1016, device="cuda"), torch.zeros(1016, device="cuda")
    for a, b in ((0, 0), (1, 0), (0, 1), (4, 8), (1, 0), (0, 0)):
        x, y = base[a : a + 1000], out[b : b + 1000]
        run(x, y)
        assert torch.equal(y, x * 0.5 + 1)
    x, y = base[:1000], out[:1000]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        x.mul_(2)
        run(x, y)  # on another stream it would read x before it is doubled
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, x * 0.5 + 1)
    y.zero_()
    thread = threading.Thread(target=run, args=(x, y))  # one in which CUDA has not been used
    thread.start()
    thread.join()
    assert torch.equal(y, x * 0.5 + 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(x, y)
    x.fill_(3)
    y.zero_()
    graph.replay()
    assert torch.equal(y, x * 0.5 + 1)


@pytest.mark.gpu
def test_kernels_run_where_their_tensors_are():
    """A neuron on another GPU than the current one, several times: through Triton first, then by native launches."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    input = torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0)) + 0.5
    results = []
    for index in (0, 1, 0, 1):
        x = input.to(f"cuda:{index}").requires_grad_()
        node = LIFNode(step_mode="m")
        node.collect_statistics = True
        for _ in range(2):
            reset(node)
            spikes = node(x)
            (gradient,) = torch.autograd.grad(spikes, x, spikes.detach() + 1)
        assert torch.cuda.current_device() == 0 and gradient.device.index == index
        results.append([t.cpu() for t in (spikes.detach(), gradient, node.spike_count, node.grad_norm_sq)])
    assert results[0][0].any()
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
