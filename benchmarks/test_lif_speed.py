"""One layer of LIF neurons, with and without statistics, against the bytes that any implementation must move."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from bench_report import percent, set_value, shown
from bench_timing import tensor_bytes
from lif_layers import ALPHA, LEAKY, TAU, Layer, Peer, from_rest, learners, our_node, peers
from torch import Tensor

import sadp_fast
from sadp_fast.ops.common.dynamics import Dynamics
from sadp_fast.ops.lif.reference import multi_step
from sadp_fast.surrogate import Sigmoid

CUDA = torch.cuda.is_available()
SMALL = (16, 128, 512) if CUDA else (16, 32, 128)
SHAPES = ((8, 32, 128, 28, 28), (4, 256, 64, 56, 56), SMALL) if CUDA else ((8, 4, 16, 28, 28), SMALL)  # [T, N, *]
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if CUDA else (torch.float32, torch.bfloat16)
# Elements per element of the input that must be read or written: forward x, s; backward x, dL/ds, dL/dx.
ELEMENTS = {"forward": 2, "backward": 3, "forward + backward": 5}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
NEAR = 1e-4  # a potential this close to the threshold may fall to either side by rounding
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # ||error|| / ||reference||


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {NAMES[self.dtype]}"

    def measure(self, direction: str) -> str:
        return f"LIF {direction} {self}"


CASES = [Case(shape, dtype) for shape in SHAPES for dtype in DTYPES]


class Inputs(NamedTuple):
    """Rotated input currents and output gradients, and what the float64 reference makes of the first example."""

    current: list[Tensor]
    gradient: list[Tensor]
    spikes: Tensor
    current_gradient: Tensor
    settled: Tensor  # whether a neuron stays away from the threshold at every step


@lru_cache(maxsize=1)
def inputs(device, case: Case) -> Inputs:
    generator = device.generator(0)

    def normal(mean: float) -> Tensor:
        return torch.randn(case.shape, device=device.type, dtype=case.dtype, generator=generator).add_(mean)

    first = normal(1.0)
    count = device.buffers(2 * tensor_bytes(first))
    current = [first, *(normal(1.0) for _ in range(count - 1))]
    gradient = [normal(0.0) for _ in range(count)]
    return Inputs([x.requires_grad_() for x in current], gradient, *_reference(first, gradient[0]))


@pytest.fixture(scope="module", autouse=True)
def _free_inputs():
    yield
    inputs.cache_clear()


def _reference(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x[:, :1].detach().double().requires_grad_()
    v = torch.zeros_like(x[0])
    spikes = multi_step(x, v, Dynamics(**LEAKY), Sigmoid(ALPHA))[0]
    (current_gradient,) = torch.autograd.grad(spikes, x, gradient[:, :1].double())
    settled = torch.ones_like(v, dtype=torch.bool)
    for current, spike in zip(x.detach(), spikes):
        h = v + (current - v) / TAU
        settled &= (h - 1).abs() > NEAR
        v = (1 - spike.detach()) * h
    return spikes.detach(), current_gradient, settled


def check(case: Case, layer: Layer, data: Inputs, exact_spikes: bool = True, exact_gradient: bool = True) -> float:
    """Compare with the reference where a spike is not a matter of rounding; returns the share of spikes that differ."""
    spikes = layer(data.current[0])
    (gradient,) = torch.autograd.grad(spikes, data.current[0], data.gradient[0])
    assert spikes.shape == gradient.shape == torch.Size(case.shape)
    assert spikes.dtype == gradient.dtype == case.dtype
    assert torch.isfinite(gradient).all(), "the gradient is not finite"
    assert data.settled.float().mean() > 0.9
    assert 0.02 < data.spikes.mean() < 0.98
    different = spikes.detach()[:, :1].double() != data.spikes
    if exact_spikes:
        assert not (different & data.settled).any(), "spikes differ from the float64 reference"
    if exact_gradient:
        error = (gradient[:, :1].double() - data.current_gradient)[:, data.settled].norm()
        relative = (error / data.current_gradient[:, data.settled].norm()).item()
        assert relative < GRADIENT_TOLERANCE[case.dtype], f"gradient differs from the reference by {relative:.1e}"
    return different.double().mean().item()


def check_statistics(node, data: Inputs) -> None:
    node.reset()
    spikes = node(data.current[0])
    (gradient,) = torch.autograd.grad(spikes, data.current[0], data.gradient[0])
    count = spikes.detach().flatten(2).sum(2, dtype=torch.float32)
    torch.testing.assert_close(node.spike_count.float(), count)
    torch.testing.assert_close(node.grad_norm_sq, gradient.flatten(2).float().square().sum(2), rtol=2e-2, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- timing

Prepare, Call = Callable[[int], Any], Callable[[Any], Any]


def timed(layer: Layer, data: Inputs, direction: str) -> tuple[Prepare, Call]:
    """What comes before the clock starts, and what is timed."""
    if direction == "forward":
        return lambda i: data.current[i], layer
    if direction == "backward":
        return (
            lambda i: (layer(data.current[i]), data.current[i], data.gradient[i]),
            lambda state: torch.autograd.grad(*state),
        )
    return (
        lambda i: (data.current[i], data.gradient[i]),
        lambda state: torch.autograd.grad(layer(state[0]), *state),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case).replace(" ", "-"))
def test_lif(benchmark, bench, case: Case) -> None:
    device = bench.device
    plain, counting = our_node(), our_node(statistics=True)
    layers = {"LIFNode": from_rest(plain), "LIFNode with statistics": from_rest(counting)}
    data = inputs(device, case)
    for direction, elements in ELEMENTS.items():
        times: dict[str, float] = {}
        for name, layer in layers.items():
            with bench.row("LIF neurons", case.measure(direction), name, "ours") as row:
                if direction == "forward":
                    row["spikes_that_differ"] = check(case, layer, data)
                    check_statistics(counting, data)
                if direction != "forward + backward":
                    if device.is_cuda and not benchmark.disabled:
                        row.update(device_figures(device, layer, data, direction))
                elif name == "LIFNode":  # pytest-benchmark times one function a test
                    row.update(device.measure(benchmark, *timed(layer, data, direction), buffers=len(data.current)))
                elif not benchmark.disabled:
                    row.update(alternating(device, layers, data, direction, times))
                figures_of(bench, row, case, elements, data, direction)
        if times:
            added = times["LIFNode with statistics"] / times["LIFNode"] - 1
            bench.add(row, f"statistics, {case}", added, "ratio", "device", goal="statistics" if CUDA else "")
    benchmark.extra_info.update(row)


def device_figures(device, layer: Layer, data: Inputs, direction: str) -> dict[str, Any]:
    prepare, call = timed(layer, data, direction)
    call(prepare(0))  # compiles
    return device.device_seconds(prepare, call, len(data.current))


def alternating(device, layers: dict[str, Layer], data: Inputs, direction: str, times: dict[str, float]) -> dict:
    """Figures of the last of the layers, and into `times` the time of each, measured in turns."""
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in layers}
    for _ in range(3):
        for name, layer in layers.items():
            if device.is_cuda:
                figures[name].append(device_figures(device, layer, data, direction))
            else:
                prepare, call = timed(layer, data, direction)
                figures[name].append({"device_seconds": device.host_seconds(prepare, call, len(data.current))})
    times.update({name: statistics.median(f["device_seconds"] for f in several) for name, several in figures.items()})
    return {**figures[name][-1], "device_seconds": times[name]}


def figures_of(bench, row: dict, case: Case, elements: int, data: Inputs, direction: str) -> None:
    """Value, floors and goal of a row from its figures."""
    statistics_on = row["implementation"].endswith("with statistics")
    goal = ""
    if CUDA and direction == "forward + backward" and statistics_on:
        goal = "lif small" if case.shape == SMALL else "lif"
    row["detail"] = direction != "forward + backward"
    if "device_seconds" in row:
        set_value(row, row["device_seconds"], "s", "device", goal)
    count, size = data.current[0].numel(), data.current[0].element_size()
    bench.set_floor(row, elements * count * size)
    if "share" not in row:
        return
    further = []
    if direction == "forward + backward":
        row["equal_copies_seconds"] = equal_copies(bench.device, count * size)
        row["share_of_equal_copies"] = row["equal_copies_seconds"] / row["value"]
        equal = f"{percent(row['share_of_equal_copies'])} of two copies of as many bytes"
        further.append(f"{equal} ({shown(row['equal_copies_seconds'], 's')})")
    row["further"] = ", ".join(further) or "-"


@cache
def equal_copies(device, tensor_size: int) -> float:
    """Seconds of a copy that moves the forward pass's bytes and one that moves the backward pass's."""
    return device.copy_seconds((2 * tensor_size, 3 * tensor_size))


# ------------------------------------------------------------------------------------------- a learned time constant


def check_tau(node: torch.nn.Module, data: Inputs) -> None:
    """The gradient of w = -log(tau - 1) from the first example, against float64."""
    x, gradient = data.current[0][:, :1].detach(), data.gradient[0][:, :1] * data.settled
    exact = torch.tensor(1 / TAU, dtype=torch.float64, device=x.device, requires_grad=True)
    dynamics = replace(Dynamics(**LEAKY), learned_tau=True)
    v = torch.zeros_like(x[0], dtype=torch.float64)
    spikes = multi_step(x.double(), v, dynamics, Sigmoid(ALPHA), reciprocal_tau=exact)[0]
    (expected,) = torch.autograd.grad(spikes, exact, gradient.double())
    expected *= (1 - 1 / TAU) / TAU  # of 1 / tau = sigmoid(w)
    (found,) = torch.autograd.grad(from_rest(node)(x), node.w, gradient)
    error = (found.double() - expected).abs() / expected.abs()
    assert error < 1e-3, f"the gradient of tau differs from the reference by {error:.1e}"


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[-1]], ids=NAMES.get)
@pytest.mark.parametrize("name", learners())
def test_learned_tau(benchmark, bench, name: str, dtype: torch.dtype) -> None:
    """As many bytes as with a constant time constant, whose gradient is one more number."""
    case, node = Case(SHAPES[0], dtype), learners()[name]().to(bench.device.type)
    role = "ours" if isinstance(node, sadp_fast.ParametricLIFNode) else "peer"
    with bench.row("LIF neurons", f"LIF forward + backward, tau learned, {case}", name, role) as row:
        data, layer = inputs(bench.device, case), from_rest(node)
        if role == "ours" or dtype == torch.float32:  # in half types SpikingJelly's state is a half, too
            check(case, layer, data)
            check_tau(node, data)
        call = lambda state: torch.autograd.grad(layer(state[0]), (state[0], node.w), state[1])  # noqa: E731
        prepare = lambda i: (data.current[i], data.gradient[i])  # noqa: E731
        row.update(bench.device.measure(benchmark, prepare, call, buffers=len(data.current)))
        set_value(row, row.get("device_seconds"), "s", "device")
        bench.set_floor(row, ELEMENTS["forward + backward"] * tensor_bytes(data.current[0]))
        benchmark.extra_info.update(row)


# ----------------------------------------------------------------------------------------------------------- peers


def peer_cases() -> Iterator:
    for case in CASES:
        for peer in peers(case.dtype):
            # Slow ones and those that compile for long are measured where they can be told apart from the others.
            large, half = case.shape == SHAPES[0], case.dtype == torch.float16
            if peer.slow and (half or not large):
                continue
            if peer.compiles and (half or not (case.shape == SMALL or (large and case.dtype == torch.bfloat16))):
                continue
            yield pytest.param(case, peer, id=f"{case} {peer.name}".replace(" ", "-"))


@pytest.mark.parametrize("case, peer", list(peer_cases()))
def test_lif_peer(benchmark, bench, case: Case, peer: Peer) -> None:
    direction = "forward + backward"
    with bench.row("LIF neurons", case.measure(direction), peer.name, "peer") as row:
        data = inputs(bench.device, case)
        layer = peer.build(case.dtype)
        row["spikes_that_differ"] = check(case, layer, data, peer.exact_spikes, peer.exact_gradient)
        row.update(bench.device.measure(benchmark, *timed(layer, data, direction), buffers=len(data.current)))
        set_value(row, row.get("device_seconds"), "s", "device")
        bench.set_floor(row, ELEMENTS[direction] * tensor_bytes(data.current[0]))
        benchmark.extra_info.update(row)
