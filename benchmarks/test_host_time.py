"""What one eager forward and backward pass of a layer of LIF neurons costs the host: a small tensor, an idle device.

Its floor is the same of x + 1: no operator that PyTorch differentiates costs less. One that is written in Python, as
ours is, costs at least as much as an autograd.Function that computes nothing.
"""

from __future__ import annotations

import gc
import statistics
import time

import pytest
import torch
from bench_report import set_value, shown
from lif_layers import Peer, from_rest, our_node, peers

MEASURE = "host time of LIF forward + backward"
SHAPE, DTYPE = (4, 8, 64), torch.float32  # [T, N, *]: so small that the device is done before the host is
REPETITIONS = 300
OURS = (("LIFNode", False), ("LIFNode with statistics", True))
GOAL = "host" if torch.cuda.is_available() else ""


def run(benchmark, bench, name: str, role: str, layer, goal: str = "") -> None:
    with bench.row("Host time", MEASURE, name, role) as row:
        device = bench.device
        x = torch.randn(SHAPE, device=device.type, dtype=DTYPE, generator=device.generator(0)).requires_grad_()
        gradient = torch.ones_like(x)

        def call():
            return torch.autograd.grad(layer(x), x, gradient)

        for _ in range(1 if benchmark.disabled else 20):
            call()
        if not benchmark.disabled:
            set_value(row, host_seconds(device, call), "s", "host", goal)
        benchmark.pedantic(call, rounds=5)
        device.synchronize()
        benchmark.extra_info.update(row)


def host_seconds(device, call) -> float:
    """Median until the call returns, the device being idle at its start, without garbage collection."""
    times = []
    gc.disable()
    try:
        for _ in range(REPETITIONS if device.is_cuda else REPETITIONS // 6):
            device.synchronize()
            start = time.perf_counter()
            result = call()
            times.append(time.perf_counter() - start)
            del result
    finally:
        gc.enable()
    return statistics.median(times)


@pytest.mark.parametrize("name, with_statistics", OURS, ids=lambda value: str(value).replace(" ", "-"))
def test_host_time(benchmark, bench, name: str, with_statistics: bool) -> None:
    run(benchmark, bench, name, "ours", from_rest(our_node(with_statistics)), "" if with_statistics else GOAL)


@pytest.mark.parametrize("peer", peers(DTYPE), ids=lambda peer: peer.name.replace(" ", "-"))
def test_host_time_peer(benchmark, bench, peer: Peer) -> None:
    run(benchmark, bench, peer.name, "peer", peer.build(DTYPE))


# ------------------------------------------------------------------------------------------------------------ floor


class _Nothing(torch.autograd.Function):
    """A tensor saved, one made in either pass, and no kernel."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


FLOOR = "x + 1"
YARDSTICKS = {FLOOR: lambda x: x + 1, "an autograd.Function that computes nothing": _Nothing.apply}


@pytest.mark.parametrize("name", YARDSTICKS, ids=lambda name: name.replace(" ", "-"))
def test_host_time_floor(benchmark, bench, name: str) -> None:
    run(benchmark, bench, name, "yardstick", YARDSTICKS[name])
    set_floors(bench)


def set_floors(bench) -> None:
    """The floor of every host time measured so far, once that is known."""
    rows = [row for row in bench.rows if row["measure"] == MEASURE and row["role"] == "yardstick" and "value" in row]
    yardsticks = {row["implementation"]: row["value"] for row in rows}
    if FLOOR in yardsticks:
        others = [f"{name} {shown(value, 's')}" for name, value in yardsticks.items() if name != FLOOR]
        bench.set_measured_floor(MEASURE, yardsticks[FLOOR], ", ".join(others) or "-")
