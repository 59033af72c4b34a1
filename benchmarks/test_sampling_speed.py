"""Drawing an epoch's subset: sample(), and the way from scores to the drawn indices.

Wall time: the call and a synchronisation. Device time: from the first kernel's start to the last one's end. Replay: the
same calls recorded once in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from bench_report import set_value
from torch import Tensor

from sadp_fast import inclusion_probabilities, sample

CUDA = torch.cuda.is_available()
IMAGENET, LARGE = 1_281_167, 20_000_000
SIZES = (50_000, IMAGENET, LARGE) if CUDA else (50_000, IMAGENET)
KEEP = 0.5  # share of the examples drawn
MOST_BUFFERS = 64
GRAPHS = 8  # recorded, each for other probabilities
GOALS = {IMAGENET: "sample 1.3M", LARGE: "sample 20M"} if CUDA else {}
SUITE = "Sampling"


class Inputs(NamedTuple):
    """Rotated probabilities with mean KEEP, and as many scores."""

    p: list[Tensor]
    scores: list[Tensor]
    capacity: int  # six standard deviations above the expected number drawn

    def draws(self) -> tuple[float, float]:
        """Mean and standard deviation of the number drawn from the first p."""
        p = self.p[0].double()
        return p.sum().item(), (p * (1 - p)).sum().sqrt().item()


@lru_cache(maxsize=1)
def inputs(device, n: int, where: str) -> Inputs:
    generator = torch.Generator(where).manual_seed(1)
    count = min(MOST_BUFFERS, device.buffers(4 * n)) if where == device.type else 4
    p = [torch.rand(n, device=where, generator=generator).mul_(2 * KEEP) for _ in range(count)]
    scores = [torch.rand(n, device=where, generator=generator).square_() for _ in range(count)]
    return Inputs(p, scores, math.ceil(KEEP * n + 6 * math.sqrt(n / 4)))


@pytest.fixture(scope="module", autouse=True)
def _free_inputs():
    yield
    inputs.cache_clear()


class Subject(NamedTuple):
    """Something to time on p (or on scores); `waits`: it returns a size that only the device knows."""

    name: str
    role: str
    call: Callable[[Tensor, Inputs], Tensor | tuple[Tensor, ...]]
    waits: bool


def _with_weights(p: Tensor, _: Inputs) -> tuple[Tensor, Tensor]:
    index = torch.bernoulli(p).nonzero().squeeze(1)
    return index, (p.sum() / p.numel()) / p[index]


def _from_scores(scores: Tensor, data: Inputs) -> tuple[Tensor, ...]:
    p = inclusion_probabilities(scores, KEEP * scores.numel())
    return sample(p, seed=0, capacity=data.capacity)


OURS = Subject("sample, with capacity", "ours", lambda p, data: sample(p, seed=0, capacity=data.capacity), False)
FROM_PROBABILITIES = (
    OURS,
    Subject("sample, waits for the size", "ours", lambda p, _: sample(p, seed=0), True),
    Subject("bernoulli + nonzero", "peer", lambda p, _: torch.bernoulli(p).nonzero().squeeze(1), True),
    Subject("bernoulli + nonzero + weights", "peer", _with_weights, True),
    Subject("copy of 4N bytes", "yardstick", lambda p, _: p.clone(), False),
)
FROM_SCORES = (
    Subject("inclusion_probabilities + sample", "ours", _from_scores, False),
    Subject(
        "torch.multinomial without replacement",
        "peer",
        lambda scores, _: torch.multinomial(scores, int(KEEP * scores.numel())),
        True,
    ),
)


def check(subject: Subject, result, data: Inputs) -> None:
    n, (mean, deviation) = data.p[0].numel(), data.draws()
    if subject.name.startswith("sample"):
        count = int(result.count)
        # Six standard deviations: a right sampler fails once in 5e8 draws.
        assert abs(count - mean) < 6 * deviation
        indices, weights = result.indices[:count], result.weights[:count]
        assert (indices.diff() > 0).all() and indices[0] >= 0 and indices[-1] < n
        assert torch.isfinite(weights).all() and (weights > 0).all()
    elif "bernoulli" in subject.name:
        index = result[0] if isinstance(result, tuple) else result
        assert abs(index.numel() - mean) < 6 * deviation
    elif subject.role == "ours":
        count = int(result.count)
        assert 0 < count <= data.capacity and torch.isfinite(result.weights).all()


def ids(subject: Subject) -> str:
    return subject.name.replace(" ", "-")


@pytest.mark.parametrize("subject", FROM_PROBABILITIES, ids=ids)
@pytest.mark.parametrize("n", SIZES)
def test_sample(benchmark, bench, n: int, subject: Subject) -> None:
    # p read once; int64 index and float32 weight written for each example drawn.
    moved = 8 * n if subject.role == "yardstick" else 4 * n + 12 * KEEP * n
    goal = GOALS.get(n, "") if subject is OURS else ""
    run(benchmark, bench, f"sample N = {n:,}", subject, inputs(bench.device, n, bench.device.type), "p", moved, goal)


@pytest.mark.parametrize("subject", FROM_SCORES, ids=ids)
@pytest.mark.parametrize("n", SIZES[:2])
def test_scores_to_subset(benchmark, bench, n: int, subject: Subject) -> None:
    # Scores read twice (their scale must be known before the first draw), p kept for the weights and the next epoch.
    moved = 12 * n + 12 * KEEP * n
    data = inputs(bench.device, n, bench.device.type)
    run(benchmark, bench, f"scores to subset N = {n:,}", subject, data, "scores", moved)


def run(benchmark, bench, what: str, subject: Subject, data: Inputs, source: str, moved: float, goal: str = "") -> None:
    device = bench.device
    tensors = getattr(data, source)
    with bench.row(SUITE, f"{what}, wall time", subject.name, subject.role) as row:
        check(subject, subject.call(tensors[0], data), data)
        row.update(
            device.measure(
                benchmark,
                lambda i: tensors[i],
                lambda tensor: subject.call(tensor, data),
                buffers=len(tensors),
                waits=subject.waits,
            )
        )
        from_scores = source == "scores" and subject.role == "ours" and len(tensors[0]) == IMAGENET
        set_value(row, row.get("wall_seconds"), "s", "wall", "scores" if CUDA and from_scores else "")
        bench.set_floor(row, moved)
        benchmark.extra_info.update(row)
    if not device.is_cuda or subject.waits or benchmark.disabled:
        return
    of_device = bench.add(row, f"{what}, device time", row["device_seconds"], "s", "device", goal)
    bench.set_floor(of_device, moved)
    if subject.role == "ours":
        replays = replayed(device, subject, tensors, data)
        for clock, seconds in replays.items():
            bench.set_floor(bench.add(row, f"{what}, graph replay, {clock} time", seconds, "s", clock), moved)


def replayed(device, subject: Subject, tensors: list[Tensor], data: Inputs) -> dict[str, float]:
    """Medians for one replay of a CUDA graph that holds one call: wall time and device time."""
    graphs, outputs = [], []
    for tensor in tensors[:GRAPHS]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(subject.call(tensor, data))
        graphs.append(graph)

    def replay_and_wait(graph: torch.cuda.CUDAGraph) -> None:
        graph.replay()
        torch.cuda.synchronize()

    for graph in graphs:
        graph.replay()
    figures: dict[str, Any] = device.device_seconds(lambda i: graphs[i], torch.cuda.CUDAGraph.replay, len(graphs))
    wall = device.host_seconds(lambda i: graphs[i % len(graphs)], replay_and_wait, len(graphs), 50, 200)
    check(subject, outputs[0], data)
    return {"wall": wall, "device": figures["device_seconds"]}


CPU_SUBJECTS = (FROM_PROBABILITIES[1], FROM_PROBABILITIES[2])


@pytest.mark.parametrize("subject", CPU_SUBJECTS, ids=ids)
def test_sample_on_the_cpu(benchmark, bench, subject: Subject) -> None:
    n = IMAGENET
    with bench.row(SUITE, f"sample on the CPU N = {n:,}, wall time", subject.name, subject.role) as row:
        data = inputs(bench.device, n, "cpu")
        check(subject, subject.call(data.p[0], data), data)
        turn = iter(range(10**9))

        def setup():
            return (data.p[next(turn) % len(data.p)],), {}

        benchmark.pedantic(lambda p: subject.call(p, data), setup=setup, rounds=11, warmup_rounds=2)
        if not benchmark.disabled:
            set_value(row, benchmark.stats.stats.median, "s", "wall", "sample CPU" if subject.role == "ours" else "")
        benchmark.extra_info.update(row)
