"""What is known of every example's score, and how a batch's scores come to be known."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..statistics.meter import ScoreMeter
from .batching import rank_and_world
from .scores import Score


class NoMeter:
    """In a ScoreMeter's place for scores that need no measuring."""

    layers = None
    reads_dataflow = False

    def has_layers(self) -> bool:
        return True

    def begin(self) -> None: ...
    def end_forward(self) -> None: ...
    def abandon(self) -> None: ...
    def detach(self) -> None: ...
    def attach(self, batch_size: int) -> None: ...
    def renew(self, batch_size: int) -> None: ...
    def read(self, loss: Tensor, batch_size: int) -> None: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}


class Scoring:
    """The newest score of every example, and what measures the next ones.

    Args:
        score: what scores are.
        model: whose batches are scored.
        num_examples: N.
        momentum: in [0, 1), the share of an old score in what takes its place.
        device: where scores live.

    Attributes:
        meter: what measures a batch of the model.
        slots: float32 [N + 1], the scores. One more than examples: padding and unusable scores are written there, so
            that shapes stay constant.
    """

    def __init__(
        self, score: Score, model: nn.Module, num_examples: int, momentum: float, device: torch.device
    ) -> None:
        self.score, self.momentum = score, momentum
        self.meter = ScoreMeter(model, score.layers) if score.source == "gradients" else NoMeter()
        self.slots = torch.full((num_examples + 1,), torch.nan, device=device)
        self._before: Tensor | None = None  # those before the running epoch, which all ranks know
        self._looked_at = False

    @property
    def values(self) -> Tensor:
        """float32 [N]; NaN where an example was never scored."""
        return self.slots[:-1]

    # --------------------------------------------------------------------------------------------- scores of a batch

    def keep(self, indices: Tensor, weights: Tensor | None, scores: Tensor) -> None:
        """Write a batch's scores [B] into its examples' slots, but for those that are not finite or of weight 0."""
        scores = scores.to(self.slots.device, torch.float32)
        usable = torch.isfinite(scores)
        if self.momentum > 0:
            old = self.slots[indices]
            scores = torch.where(old.isnan(), scores, self.momentum * old + (1 - self.momentum) * scores)
        if weights is not None:
            usable &= weights > 0
        slot = torch.where(usable, indices, self.values.numel())
        # amax: independent of the order in which an example that occurs twice is written.
        self.slots.scatter_reduce_(0, slot, scores, "amax", include_self=False)
        self.slots[-1:].fill_(torch.nan)

    # ---------------------------------------------------------------------------------------------- scores of an epoch

    def begin_epoch(self) -> None:
        """Remember the scores that all ranks know."""
        self._before = self.values.clone()

    def share(self) -> None:
        """Let every rank know the scores that the others took since the epoch began; no-op on one rank."""
        before, self._before = self._before, None
        if before is None or rank_and_world()[1] == 1:
            return
        taken = (self.values != before) & self.values.isfinite()
        # Each rank trains on other examples, so a sum of what was taken is what was taken, to the bit, but for an
        # example drawn twice (carried over and anew): there, the mean.
        total = torch.stack((torch.where(taken, self.values, 0.0), taken.float()))
        torch.distributed.all_reduce(total)
        self.values.copy_(torch.where(total[1] > 0, total[0] / total[1], before))

    def end_epoch(self) -> None:
        """The epoch is over, however it ended; with several ranks, these have to meet first (``share``)."""
        if rank_and_world()[1] == 1:
            self._before = None

    def settled(self) -> Tensor:
        """A copy of the scores that all ranks know: without those of an epoch that is running."""
        return (self.values if self._before is None else self._before).clone()

    def load(self, scores: Tensor) -> None:
        """Go on with these scores [N]."""
        self.values.copy_(scores)
        self._before = None

    def has_layers(self) -> bool:
        """False, with a warning, once no weight layer is trained any more: examples then keep their scores."""
        if self.meter.has_layers():
            return True
        warnings.warn(
            f"no weight layer is trained any more, so score={self.score.name!r} takes no new scores: examples keep "
            "theirs",
            stacklevel=4,
        )
        return False

    def look(self) -> None:
        """Warn, the first time that it is called, if there are hardly any scores to prune by."""
        if self._looked_at:
            return
        self._looked_at = True
        count, given = self.values.numel(), self.score.source == "given"
        usable = self.values.isfinite() & (self.values >= 0)
        known, zero = (int(found.sum()) for found in (usable, self.values == 0))
        if known < count / 2:
            cause = "train on sadp.loss(criterion, output, target)"
            if given:
                cause = "call sadp.give(scores), with scores >= 0 (negative ones count as none),"
            problem = f"{known} of {count} examples have a finite score, too few to prune by"
            remedy = f"{cause} in every batch, and look for NaN in the data"
        elif zero > count / 2 and not given:
            problem = f"{zero} of {count} examples have a score of 0"
            remedy = (
                "neurons in front of a scored layer are silent; lower v_threshold, try decay_input=False, or "
                "score='all' in the place of 'last'"
            )
        else:
            return
        warnings.warn(f"{problem}, so that examples are drawn nearly uniformly: {remedy}", stacklevel=4)
