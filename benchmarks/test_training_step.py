"""A whole training step: forward, loss, backward, optimizer, reset; SEW-ResNet18 (width 64, ADD), T = 4.

On a GPU: batch 128, 3x32x32, bf16 autocast, channels_last, fused SGD with momentum, one fixed batch on the device.
Time: wall time of several steps and one synchronisation, over their number, once everything is warm. Memory: the peak
of what torch allocates during such steps (weights, gradients and optimizer included), after the caches were emptied;
a step that is a CUDA graph is captured within that window.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from bench_report import set_value, shown
from networks import channels_last, convolutions, spikingjelly_sew_resnet18
from test_batch_norm_lif_speed import floor_bytes, layers_of_network
from torch import Tensor, nn

import sadp_fast
from sadp_fast import models

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
T, BATCH, SIZE, CLASSES = 4, 128 if CUDA else 2, 32 if CUDA else 16, 10
DTYPE = torch.bfloat16 if CUDA else torch.float32
WARMUP, ROUNDS = 4, 7
SUITE, TIME, MEMORY = "Training step", "SEW-ResNet18 training step", "its peak memory"
NORM = "its BatchNorm + LIF work"
NORM_KERNELS = (
    "channel_statistics_kernel",
    "constants_kernel",
    "norm_forward_kernel",
    "norm_backward_kernel",
    "finish_backward_kernel",
)
NORM_LAUNCHES = 20 * (len(NORM_KERNELS) + 1)  # in 20 layers; the backward kernel runs twice

Step = Callable[[], Tensor]  # one step; the loss, detached


class Subject(NamedTuple):
    """A way to train.

    build: returns the step. goals: of its time and its memory. eager_steps: before recording. gpu: it needs one.
    compiles: for long, so that it is measured last, and once more as a CUDA graph.
    """

    name: str
    role: str
    build: Callable[[], Step]
    goals: tuple[str, str] = ("", "")
    eager_steps: int = WARMUP
    gpu: bool = False
    compiles: bool = False


@pytest.fixture(scope="module", autouse=True)
def _choose_convolutions():
    """As sadp_fast.lab.train does: cuDNN tries its algorithms once for each shape."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    yield
    torch.backends.cudnn.benchmark = before


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).to(DEVICE)
    return channels_last(images), torch.randint(0, CLASSES, (BATCH,), generator=generator).to(DEVICE)


def trained(network: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    network = network.to(device=DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network, torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, fused=CUDA)


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA)


# ------------------------------------------------------------------------------------------------------------ ours


def low_memory(packed: bool):
    return sadp_fast.packed_spikes() if packed else contextlib.nullcontext()


def plain(packed: bool = False, graphed: bool = False) -> Step:
    """Ordinary training: no scores."""
    torch.manual_seed(0)
    network, optimizer = trained(models.build("sew_resnet18", (3, SIZE, SIZE), CLASSES, T))
    sadp_fast.cast_weights_at_once(network)
    images, labels = batch()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)  # first, so that no gradient lies beside the activations
        with low_memory(packed):
            with autocast():
                output = network(images)
            loss = nn.functional.cross_entropy(output, labels)
        sadp_fast.reset(network)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return recorded(step) if graphed else step


def scored(packed: bool = False, graphed: bool = False) -> Step:
    """A full-data epoch of SADP, whose every step scores its batch."""
    torch.manual_seed(0)
    network, optimizer = trained(models.build("sew_resnet18", (3, SIZE, SIZE), CLASSES, T))
    sadp_fast.cast_weights_at_once(network)
    images, labels = batch()
    sadp = sadp_fast.SADP(network, 2000 * BATCH, epochs=2, prune_ratio=0.25, warmup_epochs=1, tail_epochs=0)
    criterion = nn.CrossEntropyLoss()

    def step(index: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with low_memory(packed):
            with autocast():
                output = network(images)
            loss = sadp.loss(criterion, output, labels)
        sadp_fast.reset(network)
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = sadp_fast.GraphedStep(step, sadp) if graphed else step
    batches = sadp.batches(BATCH)
    return lambda: run(next(batches))


class recorded:
    """A step that runs eagerly while it warms up, is then captured as a CUDA graph, and replayed."""

    def __init__(self, step: Step) -> None:
        self.step, self.eager_steps, self.stream = step, 0, torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Tensor:
        if self.eager_steps < WARMUP:
            self.eager_steps += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step()
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.loss = self.step()
        self.graph.replay()
        return self.loss


# ----------------------------------------------------------------------------------------------------------- peers


def spikingjelly(prepared: bool = False, compiled: bool = False, graphed: bool = False) -> Step:
    """As its tutorials train: autocast around its modules; or with its bf16 storage, compiled, as a graph."""
    from spikingjelly.activation_based import functional

    torch.manual_seed(0)
    network = spikingjelly_sew_resnet18(CLASSES, T).to(DEVICE)
    if prepared:
        from spikingjelly.activation_based.precision import prepare_model_for_precision

        artifacts = prepare_model_for_precision(network, DEVICE, {"mode": "bf16", "neuron_storage": "bf16"})
        network = artifacts.model
    network, optimizer = trained(network)
    run = network
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(network)
    images, labels = batch()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)  # first, so that no gradient lies beside the activations
        with artifacts.autocast_context() if prepared else autocast():
            output = run(images)
        loss = nn.functional.cross_entropy(output, labels)
        loss.backward()
        optimizer.step()
        functional.reset_net(network)
        return loss.detach()

    return recorded(step) if graphed else step


def subjects() -> list[Subject]:
    """What the goals are about first."""
    both = "CUDA graph, packed spikes, with scores"
    low = ("low-memory step", "low-memory memory")
    found = [
        Subject("CUDA graph", "ours", lambda: plain(graphed=True), ("step", "step memory"), gpu=True),
        Subject("CUDA graph, packed spikes", "ours", lambda: plain(packed=True, graphed=True), low, gpu=True),
        Subject("CUDA graph, with scores", "ours", lambda: scored(graphed=True), eager_steps=2, gpu=True),
        Subject(both, "ours", lambda: scored(packed=True, graphed=True), eager_steps=2, gpu=True),
        Subject("eager", "ours", plain),
        Subject("eager, with scores", "ours", scored),
        Subject("eager, packed spikes", "ours", lambda: plain(packed=True)),
    ]
    if not find_spec("spikingjelly"):
        return found
    name = f"SpikingJelly {version('spikingjelly')}"
    best = partial(spikingjelly, prepared=True)
    return [
        *found,
        Subject(f"{name}, bf16 storage, CUDA graph", "peer", partial(best, graphed=True), gpu=True),
        Subject(f"{name}, bf16 storage", "peer", best, gpu=True),
        Subject(f"{name}, bf16 storage, compiled", "peer", partial(best, compiled=True), gpu=True, compiles=True),
        Subject(name, "peer", spikingjelly),
    ]


# ---------------------------------------------------------------------------------------------------------- timing


def seconds_per_step(benchmark, device, step: Step) -> dict[str, Any]:
    """Median over rounds of several steps each."""
    device.synchronize()
    start = time.perf_counter()
    step()
    device.synchronize()
    steps = max(1, min(20, int(0.1 / (time.perf_counter() - start))))

    def call() -> None:
        for _ in range(steps):
            step()
        device.synchronize()

    call()
    rounds = ROUNDS if device.is_cuda else 3
    if benchmark is not None:
        benchmark.pedantic(call, rounds=rounds)
        times = benchmark.stats.stats.data
    else:  # pytest-benchmark times one function a test
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(times) / steps,
        "seconds_smallest": min(times) / steps,
        "seconds_largest": max(times) / steps,
        "steps_per_round": steps,
    }


def seconds_within(step: Step, kernels: tuple[str, ...], steps: int = 5) -> float:
    """Device time of these kernels in one step, by the profiler: the mean of a few steps."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    times = [event.device_time for event in profile.events() if event.name in kernels]
    assert len(times) == steps * NORM_LAUNCHES, f"the profiler saw {len(times)} of {steps} x {NORM_LAUNCHES} launches"
    return sum(times) * 1e-6 / steps


@pytest.mark.parametrize("subject", subjects(), ids=lambda subject: subject.name.replace(" ", "-"))
def test_training_step(benchmark, bench, subject: Subject) -> None:
    if subject.gpu and not CUDA:
        pytest.skip("needs a CUDA GPU")
    device = bench.device
    device.release()
    before = torch.cuda.memory_allocated() if CUDA else 0
    with bench.row(SUITE, TIME, subject.name, subject.role) as row:
        step = subject.build()
        if benchmark.disabled:
            first = last = benchmark.pedantic(step)
        else:
            first = step().clone()
            for _ in range(subject.eager_steps - 1):
                step()
            time_and_memory(benchmark, device, step, before, row)
            last = step()
            set_value(row, row["seconds"], "s", "wall", subject.goals[0])
            assert last < first, "training on one batch must lower its loss"
        assert torch.isfinite(last), "the loss is not finite"
        benchmark.extra_info.update(row)
    set_floors(bench)
    if "peak_bytes" in row:
        bench.add(row, MEMORY, row["peak_bytes"], "B", "", subject.goals[1])
    if subject.compiles and "value" in row:  # its best: without the host's time too
        with bench.row(SUITE, TIME, f"{subject.name}, CUDA graph", subject.role) as graphed:
            step = recorded(step)
            for _ in range(WARMUP):
                step()
            time_and_memory(None, device, step, before, graphed)
            set_value(graphed, graphed["seconds"], "s", "wall")
        set_floors(bench)
        bench.add(graphed, MEMORY, graphed["peak_bytes"], "B")
    del step
    device.release()


@pytest.mark.skipif(not CUDA, reason="needs a GPU, whose profiler tells its kernels apart")
def test_norm_work_within_the_step(benchmark, bench) -> None:
    """Device time of all BatchNorm + LIF kernels of a recorded step, where the L2 is as the step leaves it."""
    bench.device.release()
    for name, build, goal in (
        ("CUDA graph", plain, "norm in step"),
        ("CUDA graph, packed spikes", partial(plain, packed=True), ""),
        ("CUDA graph, with scores", scored, ""),
    ):
        with bench.row(SUITE, NORM, name, "ours") as row:
            step = build(graphed=True)
            for _ in range(WARMUP + 2):
                step()
            if benchmark.disabled:
                continue
            set_value(row, seconds_within(step, NORM_KERNELS), "s", "device", goal)
            bench.set_floor(row, floor_bytes(BATCH, layers_of_network()))
    benchmark.pedantic(step)
    del step
    bench.device.release()


def time_and_memory(benchmark, device, step: Step, before: int, row: dict[str, Any]) -> None:
    """Into the row: the peak of memory of warm steps above `before`, recording included, and the time of a step."""
    if CUDA:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARMUP if CUDA else 1):
        step()
    if CUDA:
        torch.cuda.synchronize()
        row["allocated_before_bytes"] = before
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        row["reserved_bytes"] = torch.cuda.memory_reserved()
    row.update(seconds_per_step(benchmark, device, step))


# ----------------------------------------------------------------------------------------------------------- floor


def test_training_step_floor(benchmark, bench) -> None:
    """What is left of a step when everything but its convolutions runs at copy speed.

    The convolutions as cuDNN does them, each measured alone, forward and backward; every BatchNorm + LIF layer's bytes;
    and the optimizer's: weight, gradient and momentum read, weight and momentum written, in float32.
    """
    name = "convolutions as measured, the rest at copy speed"
    with bench.row(SUITE, TIME, name, "yardstick") as row:
        device, generator = bench.device, bench.device.generator(5)
        total, weights = 0.0, 64 * 8 * CLASSES
        for number, (channels_in, channels, kernel, stride, size, count) in enumerate(convolutions(SIZE)):
            first = channels_in == 3
            weights += count * channels_in * channels * kernel**2
            convolution = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)
            convolution.to(DEVICE, DTYPE, memory_format=torch.channels_last)  # type: ignore[call-overload]
            images = torch.randn(
                (1 if first else T) * BATCH, channels_in, size, size, device=DEVICE, dtype=DTYPE, generator=generator
            )
            images = channels_last(images.gt(0).to(DTYPE)).requires_grad_(not first)
            gradient = torch.randn_like(convolution(images), memory_format=torch.channels_last)
            wanted = [convolution.weight] if first else [images, convolution.weight]

            def call(state):
                convolution, images, wanted, gradient = state
                return torch.autograd.grad(convolution(images), wanted, gradient)

            state = (convolution, images, wanted, gradient)
            if number == 0:  # pytest-benchmark times one function a test
                figures = device.measure(benchmark, lambda _, state=state: state, call, buffers=1, warmup=3)
            elif not benchmark.disabled:
                for _ in range(3):
                    call(state)
                if device.is_cuda:
                    figures = device.device_seconds(lambda _, state=state: state, call, 1)
                else:
                    figures = {"device_seconds": device.host_seconds(lambda _, state=state: state, call, 1)}
            if not benchmark.disabled:
                total += count * figures["device_seconds"]
        if benchmark.disabled:
            return
        row["convolution_seconds"] = total
        row["moved_bytes"] = floor_bytes(BATCH, layers_of_network()) + 20 * weights
        set_value(row, total + device.floor_seconds(row["moved_bytes"]), "s", "device")
        benchmark.extra_info.update(row)
    set_floors(bench)


def set_floors(bench) -> None:
    """The floor of every step measured so far, once that is known."""
    for row in bench.rows:
        if row["measure"] == TIME and row["role"] == "yardstick" and "value" in row:
            convolutions = f"convolutions alone {shown(row['convolution_seconds'], 's')}"
            bench.set_measured_floor(TIME, row["value"], convolutions)
