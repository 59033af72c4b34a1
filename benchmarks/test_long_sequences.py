"""Many time steps at a constant number of element-steps: time, and what is kept for the backward pass.

Time is compared with that at the smallest T. Memory is measured, not computed: on a GPU by the allocator's counter
(everything that the forward pass leaves allocated, but its output and the state of the node), on the CPU, which has no
such counter, by the tensors that autograd packs.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from bench_report import set_value
from bench_timing import tensor_bytes
from lif_layers import Layer, from_rest, our_node, peers
from torch import Tensor

CUDA = torch.cuda.is_available()
STEPS = (16, 64, 256, 1024) if CUDA else (16, 64, 256)
ELEMENTS = 2**24 if CUDA else 2**17  # T * N * features: 32 MiB in bf16
EXAMPLES = 128 if CUDA else 8
DTYPES = (torch.float32, torch.bfloat16) if CUDA else (torch.float32,)
PEER_STEPS = STEPS[:2]  # peers unroll time when they compile
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
SUITE = "Long sequences"


def shape_of(steps: int) -> tuple[int, int, int]:
    """Of the input [T, N, features] at T steps."""
    return steps, EXAMPLES, ELEMENTS // steps // EXAMPLES


@lru_cache(maxsize=1)
def inputs(device, steps: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    shape = shape_of(steps)
    generator = device.generator(2)
    count = device.buffers(2 * ELEMENTS * dtype.itemsize)
    normal = [torch.randn(shape, device=device.type, dtype=dtype, generator=generator) for _ in range(2 * count)]
    return [x.add_(1.0).requires_grad_() for x in normal[:count]], normal[count:]


@pytest.fixture(scope="module", autouse=True)
def _free_inputs():
    yield
    inputs.cache_clear()


def kept_bytes(device, node, layer: Layer, x: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, other than its input."""
    if device.is_cuda:
        layer(x)  # compiles
        node.reset()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        spikes = layer(x)
        node.reset()  # the potential that the node carries to its next call is state, kept with or without a gradient
        return torch.cuda.memory_allocated() - before - spikes.untyped_storage().nbytes()
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        spikes = layer(x)
    storages.pop(x.untyped_storage().data_ptr(), None)
    assert spikes.requires_grad
    return sum(storages.values())


def measure(benchmark, bench, layer: Layer, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    current, gradient = inputs(bench.device, steps, dtype)
    return bench.device.measure(
        benchmark,
        lambda i: (current[i], gradient[i]),
        lambda state: torch.autograd.grad(layer(state[0]), *state),
        buffers=len(current),
    )


def finish(bench, row: dict[str, Any], dtype: torch.dtype) -> None:
    if "device_seconds" in row:
        set_value(row, row["device_seconds"], "s", "device")
        row["seconds_per_element_step"] = row["value"] / ELEMENTS
    bench.set_floor(row, 5 * ELEMENTS * dtype.itemsize)


def name_of(steps: int, dtype: torch.dtype) -> str:
    return f"T = {steps} {NAMES[dtype]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: f"T={steps}")
def test_long_sequence(benchmark, bench, steps: int, dtype: torch.dtype) -> None:
    measured = f"LIF forward + backward, {name_of(steps, dtype)}"
    with bench.row(SUITE, measured, "LIFNode", "ours") as row:
        node = our_node()
        layer = from_rest(node)
        x = inputs(bench.device, steps, dtype)[0][0]
        spikes = layer(x)
        assert 0.02 < spikes.float().mean() < 0.98
        del spikes
        row["kept_bytes"] = kept_bytes(bench.device, node, layer, x)
        row["kept_share"] = row["kept_bytes"] / tensor_bytes(x)
        row.update(measure(benchmark, bench, layer, steps, dtype))
        finish(bench, row, dtype)
        benchmark.extra_info.update(row)
    goals = ("long time", "long state") if CUDA else ("", "")
    bench.add(row, f"kept beyond the input, {name_of(steps, dtype)}", row["kept_share"], "ratio", "", goals[1])
    first = [r for r in bench.rows if r["measure"] == f"LIF forward + backward, {name_of(STEPS[0], dtype)}"]
    if steps != STEPS[0] and first and "value" in first[0] and "value" in row:
        relative = row["value"] / next(r for r in first if r["role"] == "ours")["value"]
        bench.add(row, f"time over that at T = {STEPS[0]}, {name_of(steps, dtype)}", relative, "ratio", "", goals[0])


@pytest.mark.skipif(find_spec("spikingjelly") is None, reason="SpikingJelly is not installed")
@pytest.mark.parametrize("steps", PEER_STEPS, ids=lambda steps: f"T={steps}")
def test_long_sequence_peer(benchmark, bench, steps: int) -> None:
    peer = next(peer for peer in peers(torch.float32) if peer.name.startswith("SpikingJelly"))
    with bench.row(SUITE, f"LIF forward + backward, {name_of(steps, torch.float32)}", peer.name, "peer") as row:
        row.update(measure(benchmark, bench, peer.build(torch.float32), steps, torch.float32))
        finish(bench, row, torch.float32)
        benchmark.extra_info.update(row)
