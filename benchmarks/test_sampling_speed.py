"""Drawing an epoch's subset: sample(), and the way from scores to the drawn indices."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sadp_fast import inclusion_probabilities, sample

SIZES = (50_000, 1_281_167, 20_000_000) if torch.cuda.is_available() else (50_000, 1_281_167)
KEEP = 0.5  # share of the examples drawn


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
def inputs(device, n: int) -> Inputs:
    generator = device.generator(1)
    count = device.buffers(4 * n)
    p = [torch.rand(n, device=device.type, generator=generator).mul_(2 * KEEP) for _ in range(count)]
    scores = [torch.rand(n, device=device.type, generator=generator).square_() for _ in range(count)]
    return Inputs(p, scores, math.ceil(KEEP * n + 6 * math.sqrt(n / 4)))


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


FROM_PROBABILITIES = (
    Subject("sadp_fast sample", "ours", lambda p, _: sample(p, seed=0), True),
    Subject(
        "sadp_fast sample with capacity",
        "ours with capacity",
        lambda p, data: sample(p, seed=0, capacity=data.capacity),
        False,
    ),
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
    if subject.name.startswith("sadp_fast sample"):
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


@pytest.mark.parametrize("subject", FROM_PROBABILITIES, ids=lambda subject: subject.name.replace(" ", "-"))
@pytest.mark.parametrize("n", SIZES)
def test_sample(benchmark, bench, n: int, subject: Subject) -> None:
    # p read once; int64 index and float32 weight written for each example drawn.
    _run(benchmark, bench, f"sample N = {n:,}", n, subject, lambda data: data.p, 4 * n + 12 * KEEP * n)


@pytest.mark.parametrize("subject", FROM_SCORES, ids=lambda subject: subject.name.replace(" ", "-"))
@pytest.mark.parametrize("n", SIZES)
def test_scores_to_subset(benchmark, bench, n: int, subject: Subject) -> None:
    # Scores read twice (their scale must be known before the first draw), p kept for the weights and the next epoch.
    _run(benchmark, bench, f"scores to subset N = {n:,}", n, subject, lambda data: data.scores, 12 * n + 12 * KEEP * n)


def _run(benchmark, bench, measure: str, n: int, subject: Subject, source, moved: float) -> None:
    benchmark.group = measure
    with bench.row("sampling", measure, subject.name, subject.role) as row:
        data = inputs(bench.device, n)
        tensors = source(data)
        check(subject, subject.call(tensors[0], data), data)
        figures = bench.device.measure(
            benchmark,
            lambda i: tensors[i],
            lambda tensor: subject.call(tensor, data),
            buffers=len(tensors),
            waits=subject.waits,
        )
        row.update(figures)
        bench.add_floor(row, moved if subject.role != "yardstick" else 8 * n, of="wall_seconds")
        benchmark.extra_info.update(row)
