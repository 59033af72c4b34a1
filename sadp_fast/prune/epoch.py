"""One epoch of a training: its draw, what is carried over, each rank's share, and its batches one after another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .batch import Batch
from .batching import Drawn, pack, rank_and_world, shuffled
from .probabilities import inclusion_probabilities
from .sampling import sample
from .scores import Score
from .scoring import Scoring
from .settings import Settings


def draw(scores: Tensor, ratio: float, number: int, settings: Settings, score: Score) -> tuple[Tensor, Drawn]:
    """Inclusion probabilities [N], and a draw by them, shuffled, with the weights of the losses.

    Args:
        scores: [N], NaN where an example was never scored.
        ratio: share of the examples that is left out.
        number: the epoch, counted from 0.
        settings: settled; policy, smoothing, weights and seed count.
        score: what scores are.
    """
    n, device = scores.numel(), scores.device
    keep = (1 - ratio) * n
    if ratio == 0 or score.source == "none":
        p = torch.full((n,), keep / n, device=device)
    else:
        p = inclusion_probabilities(scores, keep, smoothing=settings.smoothing, policy=settings.policy)
    if ratio == 0:
        indices, weights = torch.arange(n, device=device), p
    else:
        # The same number for every epoch draws the same subset.
        indices, weights, _ = sample(p, seed=settings.seed, epoch=0 if score.draws_once else number)
    if settings.weights == "sum":
        weights = weights * (n / keep)
    elif settings.weights == "none":
        weights = torch.ones_like(weights)
    return p, shuffled(Drawn(indices, weights), seed=settings.seed, epoch=number)


class Epoch:
    """How far an epoch has come.

    Attributes:
        trained: examples trained on in it (by all ranks together), padding not counted.
        share: of its batches, those that are done or at hand.
        batch: the one at hand; None between epochs, and where batches are not drawn.
    """

    def __init__(self) -> None:
        self.trained, self.share = 0, 0.0
        self.batch: Batch | None = None

    def leave(self) -> None:
        """No batch is at hand any more, and the model is left as it was."""


class DrawnEpoch(Epoch):
    """Drawn examples behind those carried over, cut into batches of one size: this rank's share of each.

    Args:
        drawn: this epoch's examples, shuffled.
        carried: what the last epoch left over; trained first.
        batch_size: B, of each rank.
        scoring: takes the scores.
        pad: fill the last batch up with examples of weight 0, instead of leaving the remainder over.
        scored: whether it does in this epoch.
        weighted: multiply losses by weights of 1 too.

    Attributes:
        indices: int64 [batches, B].
        weights: float32 [batches, B].
        padding: how many rows of the last batch (of all ranks together) have weight 0.
        left_over: what the next epoch carries over.
    """

    def __init__(
        self,
        drawn: Drawn,
        carried: Drawn,
        batch_size: int,
        scoring: Scoring,
        *,
        pad: bool,
        scored: bool,
        weighted: bool,
    ) -> None:
        super().__init__()
        rank, self._world = rank_and_world()
        everything, self.left_over = pack(drawn, carried, batch_size * self._world, pad=pad)
        # In one block each, since kernels read a row at every step.
        self.indices, self.weights = (t[:, rank :: self._world].contiguous() for t in everything[:2])
        self.padding = everything.padding
        self._weighted = weighted or carried.indices.shape[0] > 0
        self._scoring, self._scored = scoring, scored

    def __len__(self) -> int:
        return self.indices.shape[0]

    def begin(self) -> None:
        """Make ready what measures the batches."""
        if self._scored:
            self._scoring.meter.attach(self.indices.shape[1])
            self._scoring.begin_epoch()

    def __iter__(self) -> Iterator[Batch]:
        """The batches; asking for one takes the scores of the one before."""
        count, batch_size = self.indices.shape
        meter = self._scoring.meter
        for k in range(count):
            padding = self.padding if k == count - 1 else 0
            weights = self.weights[k] if self._weighted or padding else None
            taps = meter.begin() if self._scored else None
            self.batch = Batch(self.indices[k], weights, self._scored, self._scoring, taps)
            self.trained += batch_size * self._world - padding
            self.share = (k + 1) / count
            yield self.batch
            if self.batch is None:
                raise RuntimeError("a state was loaded within this epoch, which ended it: leave its loop first")
            self.batch.collect()
            if self._scored:
                meter.renew(batch_size)
        self._scoring.share()

    def leave(self) -> None:
        self.batch = None
        self._scoring.meter.detach()
