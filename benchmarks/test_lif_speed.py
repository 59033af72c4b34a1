"""One layer of LIF neurons: forward, backward and both, against the bytes that any implementation must move."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from bench_timing import tensor_bytes
from lif_implementations import ALPHA, LEAKY, TAU, Implementation, Layer, implementations
from torch import Tensor

from sadp_fast.dynamics import Dynamics
from sadp_fast.reference.lif import multi_step
from sadp_fast.surrogate import Sigmoid

CUDA = torch.cuda.is_available()
ALL = (torch.float32, torch.float16, torch.bfloat16)
CONFIGS = (  # [T, N, *], and the dtypes to measure it in
    (
        ((8, 32, 128, 28, 28), ALL),
        ((4, 256, 64, 56, 56), (torch.bfloat16,)),
        ((16, 128, 512), ALL),
    )
    if CUDA
    else (
        ((8, 4, 16, 28, 28), ALL),
        ((4, 4, 16, 56, 56), (torch.bfloat16,)),
        ((16, 32, 128), ALL),
    )
)
# Elements per element of the input that must be read or written: forward x, s; backward x, dL/ds, dL/dx.
ELEMENTS = {"forward": 2, "backward": 3, "forward+backward": 5}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
NEAR = 1e-4  # a potential this close to the threshold may fall to either side by rounding
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # ||error|| / ||reference||


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    direction: str
    implementation: Implementation

    @property
    def measure(self) -> str:
        return f"LIF {self.direction} {'x'.join(map(str, self.shape))} {NAMES[self.dtype]}"


def cases() -> Iterator:
    for shape, dtypes in CONFIGS:
        for dtype in dtypes:
            for implementation in implementations(CUDA, dtype):
                for direction in implementation.directions:
                    case = Case(shape, dtype, direction, implementation)
                    yield pytest.param(case, id=f"{case.measure[4:]} {implementation.name}".replace(" ", "-"))


class Inputs(NamedTuple):
    """Rotated input currents and output gradients, and what the float64 reference makes of the first example."""

    current: list[Tensor]
    gradient: list[Tensor]
    spikes: Tensor
    current_gradient: Tensor
    settled: Tensor  # whether a neuron stays away from the threshold at every step


@lru_cache(maxsize=1)
def inputs(device, shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    generator = device.generator(0)

    def normal(mean: float) -> Tensor:
        return torch.randn(shape, device=device.type, dtype=dtype, generator=generator).add_(mean)

    first = normal(1.0)
    count = device.buffers(2 * tensor_bytes(first))
    current = [first, *(normal(1.0) for _ in range(count - 1))]
    gradient = [normal(0.0) for _ in range(count)]
    return Inputs([x.requires_grad_() for x in current], gradient, *_reference(first, gradient[0]))


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


@lru_cache(maxsize=1)
def built(implementation: Implementation, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Layer:
    return implementation.build(torch.empty(shape, dtype=dtype, device=device))


def check(case: Case, layer: Layer, data: Inputs) -> float:
    """Compare with the reference where a spike is not a matter of rounding; returns the share of spikes that differ."""
    spikes = layer(data.current[0])
    (gradient,) = torch.autograd.grad(spikes, data.current[0], data.gradient[0])
    assert spikes.shape == gradient.shape == torch.Size(case.shape)
    assert spikes.dtype == gradient.dtype == case.dtype
    assert torch.isfinite(gradient).all(), "the gradient is not finite"
    assert data.settled.float().mean() > 0.9
    assert 0.02 < data.spikes.mean() < 0.98
    different = spikes.detach()[:, :1].double() != data.spikes
    if case.implementation.exact_spikes:
        assert not (different & data.settled).any(), "spikes differ from the float64 reference"
    if case.implementation.exact_gradient:
        error = (gradient[:, :1].double() - data.current_gradient)[:, data.settled].norm()
        relative = (error / data.current_gradient[:, data.settled].norm()).item()
        assert relative < GRADIENT_TOLERANCE[case.dtype], f"gradient differs from the reference by {relative:.1e}"
    return different.double().mean().item()


def time_it(benchmark, device, case: Case, layer: Layer, data: Inputs) -> dict[str, float]:
    count = len(data.current)
    if case.direction == "forward":
        return device.measure(benchmark, lambda i: data.current[i], layer, buffers=count)
    if case.direction == "backward":
        return device.measure(
            benchmark,
            lambda i: (layer(data.current[i]), data.current[i], data.gradient[i]),
            lambda state: torch.autograd.grad(*state),
            buffers=count,
        )
    return device.measure(
        benchmark,
        lambda i: (data.current[i], data.gradient[i]),
        lambda state: torch.autograd.grad(layer(state[0]), *state),
        buffers=count,
    )


@pytest.mark.parametrize("case", list(cases()))
def test_lif(benchmark, bench, case: Case) -> None:
    benchmark.group = case.measure
    with bench.row("lif", case.measure, case.implementation.name, case.implementation.role) as row:
        data = inputs(bench.device, case.shape, case.dtype)
        layer = built(case.implementation, case.shape, case.dtype, bench.device.type)
        row["spikes_that_differ"] = check(case, layer, data)
        row.update(time_it(benchmark, bench.device, case, layer, data))
        elements = data.current[0].numel()
        moved = ELEMENTS[case.direction] * elements * data.current[0].element_size()
        # The op also returns the last membrane potential, float32 [N, *]: 4/T bytes per element and step.
        final_v = 0 if case.direction == "backward" else 4 * elements // case.shape[0]
        bench.add_floor(row, moved)
        bench.add_floor(row, moved + final_v, "floor_with_v")
        if case.implementation.role == "ours with statistics":
            bench.add_statistics_cost(row)
        benchmark.extra_info.update(row)
