"""Methods of other papers, which SADP is compared with: they are known by name as its own are."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .policies import POLICIES, Policy
from .scores import SCORES, Random, Score


def el2n_score(output: Tensor, target: Tensor) -> Tensor:
    """Norm of the prediction error, |softmax(z_i) - y_i|_2 (EL2N; Paul et al., arXiv 2107.07075).

    Args:
        output: logits z, [B, classes].
        target: class indices, int64 [B], or class probabilities, [B, classes].

    Returns:
        float32 [B].

    Raises:
        ValueError: the output is not [B, classes] with at least two of them, or the target not of the kind above.
    """
    if output.ndim != 2 or output.shape[1] < 2 or target.shape not in (output.shape, output.shape[:1]):
        raise ValueError(
            f"EL2N needs logits [B, classes] of two classes or more and targets [B] or [B, classes], got "
            f"{tuple(output.shape)} and {tuple(target.shape)}; use score='loss' or 'all' for other losses"
        )
    error = torch.softmax(output.detach().float(), dim=1)
    labels = nn.functional.one_hot(target.long(), output.shape[1]) if target.ndim == 1 else target
    norms: Tensor = torch.linalg.vector_norm(error - labels, dim=1)
    return norms


class El2n(Score):
    """The norm of the prediction error, see ``el2n_score``."""

    name = "el2n"

    def of_batch(self, output: Tensor, target: Tensor, losses: Callable[[], Tensor]) -> Tensor:
        return el2n_score(output, target)


class StaticRandom(Random):
    """Every example alike, one subset for all pruned epochs."""

    name = "static_random"
    draws_once = True


class _Ranking(Policy):
    """What the other papers' policies share: those never scored rank first."""

    def probabilities(self, scores: Tensor, keep: float, smoothing: float) -> Tensor:
        unknown = ~((scores >= 0) & (scores < math.inf))
        uniform = keep / scores.numel()
        least = smoothing * uniform
        p = self._of_ranked(torch.where(unknown, math.inf, scores), unknown, keep, smoothing)
        return p.masked_fill_(unknown.sum() >= (keep - least * scores.numel()) / (1 - least), uniform)

    def _of_ranked(self, ranked: Tensor, unknown: Tensor, keep: float, smoothing: float) -> Tensor:
        """p, float64 [N], for scores whose unknown ones are infinite."""
        raise NotImplementedError


class InfoBatch(_Ranking):
    """p = 1 from the mean score on, and 1 - s for the examples below it (Qin et al., arXiv 2303.04947).

    There s is given (0.5) and the number drawn follows; here it is what draws ``keep`` examples in expectation, the
    ratio being the same for all policies [ours]. Where that would put 1 - s below smoothing * keep / N, the threshold
    is not the mean but the lowest quantile that does not [that higher ratios need a quantile is theirs, this quantile
    is ours]. Losses are rescaled by 1 / p, and the last eighth of the epochs trains on everything [its paper].
    """

    name = "infobatch"
    weights = "sum"
    tail = 0.125

    def _of_ranked(self, ranked: Tensor, unknown: Tensor, keep: float, smoothing: float) -> Tensor:
        count = ranked.numel()
        pruned, least = count - keep, smoothing * (keep / count)  # in expectation; s = pruned / (number below)
        mean = ranked.double().masked_fill(unknown, 0.0).sum() / (~unknown).sum()
        below = ranked < mean
        needed = pruned / (1 - least)  # so many, and s is not above 1 - least
        quantile = ranked.sort().values[min(math.ceil(needed), count) - 1]
        below = torch.where(below.sum() < needed, ranked <= quantile, below)
        return torch.where(below, (1 - pruned / below.sum(dtype=torch.float64)).clamp(min=least), 1.0)


class EpsilonGreedy(_Ranking):
    """p = 1 for the floor((1 - epsilon) * keep) highest scores, all others alike (Raju et al., arXiv 2111.12621).

    Of the others epsilon * keep are drawn in expectation; epsilon is ``smoothing``. Equal scores at the border have
    equal p [ours].
    """

    name = "epsilon_greedy"

    def _of_ranked(self, ranked: Tensor, unknown: Tensor, keep: float, smoothing: float) -> Tensor:
        count = ranked.numel()
        first = unknown.sum().clamp(min=math.floor((1 - smoothing) * keep))  # how many are certain
        rest = (keep - first.double()) / (count - first)
        border = ranked.sort().values.take((count - first).clamp(max=count - 1))
        above, equal = ranked > border, ranked == border
        share = (first - above.sum()) / equal.sum(dtype=torch.float64)  # of those at the border, the certain ones
        return torch.where(above, 1.0, torch.where(equal, share + rest * (1 - share), rest))


SCORES.add(El2n(), StaticRandom())
POLICIES.add(InfoBatch(), EpsilonGreedy())
