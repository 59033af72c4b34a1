"""How scores become inclusion probabilities: the policies known by name, and the base of a user's own."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .optimum import optimum
from .registry import Registry


class Policy:
    """A way from scores to inclusion probabilities. A user's own is a subclass with a name::

        class Cubed(Policy):
            name = "cubed"

            def probabilities(self, scores, keep, smoothing):
                scores = scores.nan_to_num(scores.nan_to_num(0).amax()) ** 3
                return (scores / scores.sum() * keep).clamp(0.1, 1)

    Attributes:
        name: what messages call it, and what a saved state is known by.
        weights: of the losses, where SADP is not told otherwise. Losses without weights gave the better networks, see
            docs/findings.md [ours]; the paper's estimator is unbiased (Proposition 1).
        tail: share of the epochs, at their end, that train on all data where SADP is not told otherwise.
    """

    name: str
    weights: Literal["unbiased", "sum", "none"] = "none"
    tail: float = 0.0

    def probabilities(self, scores: Tensor, keep: float, smoothing: float) -> Tensor:
        """The probability of drawing each example.

        Args:
            scores: floating point [N], in any unit; an example whose score is NaN, infinite or negative was never
                scored.
            keep: how many examples are to be drawn in expectation, 0 < keep < N.
            smoothing: how far small probabilities are raised, 0 <= smoothing < 1.

        Returns:
            floating point [N] in [0, 1] on the device of the scores, with a sum of ``keep``.
        """
        raise NotImplementedError(f"the policy {self.name!r} has no probabilities(scores, keep, smoothing)")


class Mix(Policy):
    """p = (1 - smoothing) * optimum + smoothing * keep / N [paper]."""

    name = "mix"

    def probabilities(self, scores: Tensor, keep: float, smoothing: float) -> Tensor:
        return optimum(scores, keep, mixed=smoothing)


class Floor(Policy):
    """The optimum among all p nowhere below smoothing * keep / N [ours]."""

    name = "floor"

    def probabilities(self, scores: Tensor, keep: float, smoothing: float) -> Tensor:
        return optimum(scores, keep, floor=smoothing * (keep / scores.numel()))


POLICIES: Registry[Policy] = Registry("policy", Policy, (Mix(), Floor()))
