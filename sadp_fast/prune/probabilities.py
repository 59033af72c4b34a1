"""Scores to inclusion probabilities, and a prune ratio to one per epoch: pure functions of tensors and numbers."""

import math
from contextlib import nullcontext
from functools import lru_cache
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from ..native import library as _native
from .sampling import current_stream

POLICIES = ("mix", "floor", "infobatch", "epsilon_greedy")
SCHEDULES = ("constant", "linear", "cosine")
MAX_RATIO = 0.95  # the largest prune ratio of one epoch [ours]

_LARGEST = 2.0**32  # what the largest known score is scaled to
_SMALLEST = 2.0**-126  # the smallest normal float32: zeros, and scaled scores below it, count as this
_NEVER_SCORED = 2.0**120  # above every alpha tried, so p = 1
_FIRST_BITS = 0x00800000  # the float32 bit pattern of 2^-126, where the search for alpha starts
_LAST_BITS = 0x77000000  # that of 2^111, where it ends


@torch.no_grad()
def inclusion_probabilities(scores: Tensor, keep: float, *, smoothing: float = 0.3, policy: str = "mix") -> Tensor:
    """Probability of drawing each example, from its score, such that `keep` examples are drawn in expectation.

    The optimum is p_i = min(scores_i / alpha, 1) with sum p = keep: it minimises the variance of the Horvitz-Thompson
    estimator [paper, arXiv 2510.04098, Proposition 1]. "To avoid extremely small values" it is smoothed, with the
    constant 0.3 [paper]. With u = keep / N:

    - "mix": p = (1 - smoothing) * optimum + smoothing * u.
    - "floor": p = clip(scores / alpha, smoothing * u, 1), the optimum among all p nowhere below smoothing * u [ours].

    Two policies of other papers, for comparison:

    - "infobatch": p = 1 from the mean score on, and 1 - s for the examples below it [arXiv 2303.04947]. There s is
      given (0.5) and the number drawn follows; here it is what draws `keep` examples in expectation, the ratio being
      the same for all policies [ours]. Where that would put 1 - s below smoothing * u, the threshold is not the mean
      but the lowest quantile that does not [that higher ratios need a quantile is theirs, this quantile is ours].
    - "epsilon_greedy": p = 1 for the floor((1 - epsilon) * keep) highest scores, all others alike, epsilon * keep of
      them in expectation [arXiv 2111.12621]; epsilon is `smoothing`. Equal scores at the border have equal p [ours].

    With all of them smoothing * u <= p <= 1, so that no loss weight u / p exceeds 1 / smoothing, and
    |sum p / keep - 1| <= 1e-6. smoothing = 0 is each policy's plain form, which in effect never draws some examples
    again; 1 is uniform.

    Edge cases [ours]: an example never scored (NaN; infinite and negative scores are taken as such, since raising an
    error would wait for the device) gets p = 1 and leaves the rest of `keep` to the others; where that rest cannot
    give each of them a positive p of at least smoothing * u, knowledge is too thin and p = u for all. Zero scores
    share evenly what the positive ones, all at the optimum p = 1, leave over. keep = N gives exactly 1 for all.

    The solver of the optimum [ours] brackets alpha in as many passes for every distribution (Newton's method was seen
    to take 2 to 26), nothing waits for the device, and the same scores give the same p in every run. On CUDA it is one
    kernel, which bisects histograms of integers (float64 scores, builds without CUDA, and the other papers' policies:
    torch operations, as on the CPU).

    Args:
        scores: [N], any floating dtype; >= 0, in any unit (only ratios matter); NaN = never scored.
        keep: expected number drawn, 0 < keep <= N.
        smoothing: in [0, 1].
        policy: "mix", "floor", "infobatch" or "epsilon_greedy".

    Returns:
        float32 [N] on the device of `scores`.

    Raises:
        TypeError: scores that are no tensor or not floating point; a keep that is no number.
        ValueError: scores that are empty or not one-dimensional; keep, smoothing or policy outside the above.
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a torch.Tensor, got {type(scores).__name__}: pass torch.as_tensor(scores)")
    if not isinstance(keep, Real):
        raise TypeError(f"keep must be a number, got {keep!r}: pass (1 - prune ratio) * N")
    if not scores.is_floating_point():
        raise TypeError(f"scores must have a floating dtype, got {scores.dtype}: pass scores.float()")
    if scores.ndim != 1 or scores.numel() == 0:
        raise ValueError(f"scores must have shape [N], N >= 1, got {list(scores.shape)}: pass one score per example")
    count = scores.numel()
    if not 0 < keep <= count:
        raise ValueError(f"keep must be above 0 and at most N = {count}, got {keep}: pass (1 - prune ratio) * N")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], got {smoothing}: the paper's constant is 0.3")
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}: choose one of them")

    uniform = keep / count
    if keep == count or smoothing == 1:
        return torch.full_like(scores, uniform, dtype=torch.float32)
    least = smoothing * uniform
    too_many_unknown = (keep - least * count) / (1 - least)
    if policy in ("infobatch", "epsilon_greedy"):
        unknown = ~((scores >= 0) & (scores < math.inf))
        ranked = torch.where(unknown, math.inf, scores)
        if policy == "infobatch":
            p = _infobatch(ranked, unknown, keep, least)
        else:
            p = _epsilon_greedy(ranked, unknown, keep, smoothing)
        return p.masked_fill_(unknown.sum() >= too_many_unknown, uniform).float()
    mixed, floor = (smoothing, 0.0) if policy == "mix" else (0.0, least)
    problem = _Problem(
        keep=keep,
        # The never scored stay at 1 where mixing would lower them, so what is mixed for the others sums to less.
        unknown_cost=(mixed - mixed * uniform) / (1 - mixed),
        too_many_unknown=too_many_unknown,
        uniform=uniform,
        floor=floor,
        lowest=max(floor, _SMALLEST),
        optimum_share=1 - mixed,
        added=mixed * uniform,
    )
    if scores.is_cuda and scores.dtype != torch.float64 and _native.has_cuda:
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


def _infobatch(ranked: Tensor, unknown: Tensor, keep: float, least: float) -> Tensor:
    """p = 1 - s below a threshold and 1 from it on, float64, for scores whose unknown ones are infinite."""
    pruned = ranked.numel() - keep  # in expectation; s = pruned / (number below)
    mean = ranked.double().masked_fill(unknown, 0.0).sum() / (~unknown).sum()
    below = ranked < mean
    needed = pruned / (1 - least)  # so many, and s is not above 1 - least
    quantile = ranked.sort().values[min(math.ceil(needed), ranked.numel()) - 1]
    below = torch.where(below.sum() < needed, ranked <= quantile, below)
    return torch.where(below, (1 - pruned / below.sum(dtype=torch.float64)).clamp(min=least), 1.0)


def _epsilon_greedy(ranked: Tensor, unknown: Tensor, keep: float, epsilon: float) -> Tensor:
    """p = 1 for the highest scores and all others alike, float64, for scores whose unknown ones are infinite."""
    count = ranked.numel()
    first = unknown.sum().clamp(min=math.floor((1 - epsilon) * keep))  # how many are certain
    rest = (keep - first.double()) / (count - first)
    border = ranked.sort().values.take((count - first).clamp(max=count - 1))
    above, equal = ranked > border, ranked == border
    share = (first - above.sum()) / equal.sum(dtype=torch.float64)  # of those at the border, the certain ones
    return torch.where(above, 1.0, torch.where(equal, share + rest * (1 - share), rest))


@torch.no_grad()
def relative_variance(scores: Tensor, p: Tensor) -> Tensor:
    """Variance of the Horvitz-Thompson gradient estimate under p, relative to uniform sampling of as many examples.

    (sum g^2 (1/p - 1)) / (sum g^2 (1/u - 1)) with u = mean p [the variance is the paper's, Proposition 1]. The scores
    stand in for the gradient norms g, so this is an estimate, and as old as they are. Examples never scored (NaN,
    infinite or negative) are left out. 1 where uniform sampling has no variance: p all 1 or no score above 0.

    Args:
        scores: [N], any floating dtype, any unit.
        p: [N], inclusion probabilities in (0, 1], on the same device.

    Returns:
        float64 0-dim tensor on the device of `scores`; infinite where p = 0 meets a positive score.

    Raises:
        ValueError: shapes that differ.
    """
    if scores.shape != p.shape:
        raise ValueError(f"p must have shape {list(scores.shape)} as scores, got {list(p.shape)}: pass one p per score")
    g = scores.double()
    g = torch.where((g >= 0) & (g < math.inf), g, 0.0)
    square = g.div_(g.amax().clamp_(min=torch.finfo(g.dtype).tiny)).square_()
    p = p.double()
    variance = torch.where(square > 0, square * (1 / p - 1), 0.0).sum()
    uniform_variance = square.sum() * (1 / p.mean() - 1)
    return torch.where(uniform_variance > 0, variance / uniform_variance, 1.0)


def prune_ratios(
    ratio: float, epochs: int, *, schedule: str = "constant", warmup_epochs: int = 1, tail_epochs: int = 0
) -> list[float]:
    """Prune ratio of each epoch, with mean `ratio` over all of them.

    That a dynamic schedule stabilises training is [paper]; its shape is [ours]. The first `warmup_epochs` and the last
    `tail_epochs` train on all data (0.0). Between them "constant" is flat, and "linear" and "cosine" rise from near 0,
    symmetrically about the mean needed there; where an epoch would exceed MAX_RATIO = 0.95, the ramp is flatter.

    Args:
        ratio: mean share of the examples left out, in [0, 1).
        epochs: number of epochs, >= 1.
        schedule: "constant", "linear" or "cosine".
        warmup_epochs: full-data epochs at the start, >= 0.
        tail_epochs: full-data epochs at the end, >= 0.

    Returns:
        One ratio in [0, MAX_RATIO] per epoch.

    Raises:
        ValueError: an argument outside the above, or a mean that epochs of at most MAX_RATIO cannot reach.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}: 0 prunes nothing, 0.5 half of the examples")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}: pass the number of epochs to train")
    if warmup_epochs < 0 or tail_epochs < 0:
        raise ValueError(
            f"warmup_epochs and tail_epochs must not be negative, got {warmup_epochs} and {tail_epochs}: 0 means none"
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}: choose one of them")
    if ratio == 0:
        return [0.0] * epochs

    pruned = epochs - warmup_epochs - tail_epochs
    if pruned <= 0:
        raise ValueError(
            f"warmup_epochs = {warmup_epochs} and tail_epochs = {tail_epochs} leave none of {epochs} epochs to prune: "
            "lower them or train more epochs"
        )
    mean = ratio * epochs / pruned
    if mean > MAX_RATIO + 1e-12:
        raise ValueError(
            f"prune ratio {ratio} over {epochs} epochs needs {mean:.4g} in each of the {pruned} epochs that "
            f"warmup_epochs = {warmup_epochs} and tail_epochs = {tail_epochs} leave, above {MAX_RATIO}: "
            "lower one of the three or train more epochs"
        )
    mean = min(mean, MAX_RATIO)
    centre = [(epoch + 0.5) / pruned for epoch in range(pruned)]
    if schedule == "constant":
        shape = [0.0] * pruned
    elif schedule == "linear":
        shape = [2 * x - 1 for x in centre]
    else:
        shape = [-math.cos(math.pi * x) for x in centre]
    rise = min(mean, (MAX_RATIO - mean) / shape[-1]) if shape[-1] > 0 else 0.0
    return [0.0] * warmup_epochs + [mean + rise * s for s in shape] + [0.0] * tail_epochs
