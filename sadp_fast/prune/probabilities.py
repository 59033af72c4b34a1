"""Scores to inclusion probabilities, and what they do to the estimator's variance: pure functions of tensors."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from ..errors import name_of
from . import baselines as _baselines  # noqa: F401  (adds its policies)
from .policies import POLICIES, Policy


@torch.no_grad()
def inclusion_probabilities(
    scores: Tensor, keep: float, *, smoothing: float = 0.3, policy: str | Policy = "mix"
) -> Tensor:
    """Probability of drawing each example, from its score, such that `keep` examples are drawn in expectation.

    The optimum is p_i = min(scores_i / alpha, 1) with sum p = keep: it minimises the variance of the Horvitz-Thompson
    estimator [paper, arXiv 2510.04098, Proposition 1]. "To avoid extremely small values" it is smoothed, with the
    constant 0.3 [paper]. With u = keep / N:

    - "mix": p = (1 - smoothing) * optimum + smoothing * u.
    - "floor": p = clip(scores / alpha, smoothing * u, 1), the optimum among all p nowhere below smoothing * u [ours].
    - "infobatch" and "epsilon_greedy" are other papers' and stand here for comparison, see ``baselines``.
    - An object of your own, see ``Policy``.

    With all the named ones smoothing * u <= p <= 1, so that no loss weight u / p exceeds 1 / smoothing, and
    |sum p / keep - 1| <= 1e-6. smoothing = 0 is each policy's plain form, which in effect never draws some examples
    again; 1 is uniform.

    Edge cases [ours]: an example never scored (NaN; infinite and negative scores are taken as such, since raising an
    error would wait for the device) gets p = 1 and leaves the rest of `keep` to the others; where that rest cannot
    give each of them a positive p of at least smoothing * u, knowledge is too thin and p = u for all. Zero scores
    share evenly what the positive ones, all at the optimum p = 1, leave over. keep = N gives exactly 1 for all.
    Nothing waits for the device, and the same scores give the same p in every run.

    Args:
        scores: [N], any floating dtype; >= 0, in any unit (only ratios matter); NaN = never scored.
        keep: expected number drawn, 0 < keep <= N.
        smoothing: in [0, 1].
        policy: the name of one of `POLICIES`, or an object of your own.

    Returns:
        float32 [N] on the device of `scores`.

    Raises:
        TypeError: scores that are no tensor or not floating point; a keep that is no number; a policy that is none.
        ValueError: scores that are empty or not one-dimensional; keep, smoothing or policy outside the above; an own
            policy's result that is not [N].
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
    asked = POLICIES.find(policy)
    if keep == count or smoothing == 1:
        return torch.full_like(scores, keep / count, dtype=torch.float32)
    if asked is not POLICIES.get(asked.name):
        scores = scores.clone()  # a user's own may change them
    p = asked.probabilities(scores, keep, smoothing)
    if not isinstance(p, Tensor):
        raise TypeError(
            f"the policy {asked.name!r} must give a tensor of probabilities, got {name_of(p)}: let its "
            "probabilities() return one like the scores"
        )
    if p.shape != scores.shape:
        raise ValueError(
            f"the policy {asked.name!r} must give {list(scores.shape)} probabilities, one per score, got "
            f"{list(p.shape)}: let its probabilities() return a tensor like the scores"
        )
    return p.float()


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
