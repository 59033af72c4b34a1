"""The probabilities that minimise the estimator's variance under a budget (Proposition 1), smoothed."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..native import library as _native
from .sampling import current_stream, has_memory

_LARGEST = 2.0**32  # what the largest known score is scaled to
_SMALLEST = 2.0**-126  # the smallest normal float32: zeros, and scaled scores below it, count as this
_NEVER_SCORED = 2.0**120  # above every alpha tried, so p = 1
_FIRST_BITS = 0x00800000  # the float32 bit pattern of 2^-126, where the search for alpha starts
_LAST_BITS = 0x77000000  # that of 2^111, where it ends


def optimum(scores: Tensor, keep: float, *, mixed: float = 0.0, floor: float = 0.0) -> Tensor:
    """p = (1 - mixed) * clip(scores / alpha, floor, 1) + mixed * keep / N, with sum p = keep.

    The solver [ours] brackets alpha in as many passes for every distribution (Newton's method was seen to take 2 to
    26), nothing waits for the device, and the same scores give the same p in every run. On CUDA it is one kernel, which
    bisects histograms of integers (float64 scores and builds without CUDA: torch operations, as on the CPU). What
    becomes of scores that are zero or unknown: see ``inclusion_probabilities``.

    Args:
        scores: floating point [N].
        keep: expected number drawn, 0 < keep < N.
        mixed: in [0, 1), the share of uniform sampling; 0 if there is a floor.
        floor: in [0, keep / N), the least p; 0 if anything is mixed.

    Returns:
        float32 [N] on the device of the scores.
    """
    count = scores.numel()
    uniform = keep / count
    least = max(floor, mixed * uniform)
    problem = _Problem(
        keep=keep,
        # The never scored stay at 1 where mixing would lower them, so what is mixed for the others sums to less.
        unknown_cost=(mixed - mixed * uniform) / (1 - mixed),
        too_many_unknown=(keep - least * count) / (1 - least),
        uniform=uniform,
        floor=floor,
        lowest=max(floor, _SMALLEST),
        optimum_share=1 - mixed,
        added=mixed * uniform,
    )
    if scores.is_cuda and scores.dtype != torch.float64 and _native.has_cuda and has_memory(scores):
        index = scores.device.index
        blocks, words = _launch_shape(count, index)
        if blocks > 0:
            with nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index):
                return _solve_native(scores.float().contiguous(), problem, blocks, words)
    return _solve_in_torch(scores, problem)


class _Problem(NamedTuple):
    """p = clip(s / alpha, lowest, 1) for scaled scores s, with sum clip(s / alpha, floor, 1) the target; then mixed."""

    keep: float
    unknown_cost: float  # target = keep - unknown_cost * (number never scored)
    too_many_unknown: float  # from so many on, p = uniform
    uniform: float
    floor: float
    lowest: float
    optimum_share: float  # p = optimum_share * optimum + added
    added: float


@lru_cache(maxsize=256)
def _launch_shape(count: int, device: int) -> tuple[int, int]:
    """Blocks of the native solver (0: the device cannot run it) and 8-byte words of its workspace."""
    blocks = _native.cuda_inclusion_blocks(count, device)
    return blocks, _native.cuda_inclusion_workspace(blocks)


def _solve_native(scores: Tensor, problem: _Problem, blocks: int, words: int) -> Tensor:
    """The same p as `_solve_in_torch`, from one kernel launch, for contiguous float32 scores on the current device."""
    device = scores.device
    p = torch.empty_like(scores)
    workspace = torch.empty(words, dtype=torch.int64, device=device)
    _native.cuda_inclusion(
        *(scores.data_ptr(), scores.numel(), *problem),
        *(p.data_ptr(), device.index, blocks, workspace.data_ptr(), current_stream(device.index)),
    )
    return p


def _solve_in_torch(scores: Tensor, problem: _Problem) -> Tensor:
    scaled = (scores if scores.dtype == torch.float64 else scores.float()).nan_to_num(-1.0, -1.0, -1.0)
    unknown = scaled < 0
    unknown_count = unknown.sum(dtype=torch.float64)
    unit = scaled.amax().div_(_LARGEST).clamp_(min=torch.finfo(scaled.dtype).tiny)
    scaled = scaled.div_(unit).float().clamp_(min=_SMALLEST).masked_fill_(unknown, _NEVER_SCORED)

    target = problem.keep - unknown_count * problem.unknown_cost
    p = scaled.div_(_alpha(scaled, target, problem.floor)).clamp_(problem.lowest, 1.0)
    if problem.added > 0:
        p.mul_(problem.optimum_share).add_(problem.added).masked_fill_(unknown, 1.0)
    return p.masked_fill_(unknown_count >= problem.too_many_unknown, problem.uniform)


def _alpha(scores: Tensor, target: Tensor, floor: float) -> Tensor:
    """Largest float32 alpha (0-dim) with sum clip(scores / alpha, floor, 1) >= target, for float32 scores >= 2^-126.

    clip(x, floor, 1) = 1 - max(1 - x, 0) + max(floor - x, 0), and the sum of max(level - scores / alpha, 0) follows
    from the number and the sum of the scores below level * alpha, a prefix sum of the sorted scores. A CUDA scan of
    floats differs from run to run, so the mantissas are summed as integers, in units of their octave (power of two).
    """
    device, count = scores.device, scores.numel()
    # Positive floats are ordered as their bit patterns, and integers sort faster on the CPU.
    ascending = scores.view(torch.int32).sort().values.view(torch.float32)
    mantissa, exponent = torch.frexp(ascending)
    prefix = torch.zeros(count + 1, dtype=torch.int64, device=device)
    torch.cumsum(mantissa.mul_(2.0**24), 0, dtype=torch.int64, out=prefix[1:])

    # before[o] + prefix[rank] is the sum of the lowest `rank` scores, in units of o, the octave of the threshold above.
    octave = torch.arange(-125, 114, dtype=torch.int32, device=device)
    start = prefix.take(torch.searchsorted(exponent, octave))
    ratio = torch.exp2((octave[:-1] - octave[:-1, None]).double()).tril_(-1)
    before = (ratio * start.diff()).sum(1).sub_(start[:-1])

    spare = count - target
    level = torch.linspace(1.0, floor, 2, dtype=torch.float32, device=device)[:, None]
    bits = torch.full((), _FIRST_BITS, dtype=torch.int32, device=device)
    # First every 2^16th float from 2^-126 to 2^111, then all those from the last one that is not too large.
    for step, end in ((1 << 16, _LAST_BITS - _FIRST_BITS), (1, 1 << 16)):
        alpha = (bits + torch.arange(step, end, step, dtype=torch.int32, device=device)).view(torch.float32)
        threshold = (level * alpha).clamp_(min=_SMALLEST)
        rank = torch.searchsorted(ascending, threshold)
        mantissa, exponent = torch.frexp(threshold)
        below = before.take(exponent.long().add_(125)).add_(prefix.take(rank))
        lacking = torch.addcdiv(rank, below, mantissa, value=-(2.0**-24)).mul_(level)
        bits.add_((lacking[0] - lacking[1] <= spare).sum(), alpha=step)
    return bits.view(torch.float32)
