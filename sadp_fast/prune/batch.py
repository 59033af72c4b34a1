"""One batch of an epoch: its examples, its loss, and the scores that are taken from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import name_of
from ..statistics.energies import EnergyTaps
from .criterion import mean_factor, per_example, without_reduction
from .scores import Score
from .scoring import Scoring


@dataclass(eq=False)
class Batch:
    """A handle that carries all that is known of one batch, from its draw to its scores.

    Attributes:
        indices: int64 [B], its examples.
        weights: float32 [B] of their losses, 0 for padding; None where every weight is 1.
        scored: whether scores are taken from it.
        scoring: where they go.
        taps: what measures it; None where nothing does, or its dataflow is to be read first.
    """

    indices: Tensor
    weights: Tensor | None
    scored: bool
    scoring: Scoring
    taps: EnergyTaps | None = None
    # d(what backward() was called on) / d(loss): a GradScaler's factor, 1/accumulation
    _loss_gradient: Tensor | None = None
    _mean_factor: float | Tensor = 1.0  # what the criterion multiplies the sum of the examples' losses with: 1/B, ...
    _awaits_backward: bool = False  # whether scores will be those of a loss that has not been differentiated yet
    _direct_score: Tensor | None = None  # those that need no backward pass
    _closed: bool = False

    @property
    def size(self) -> int:
        """B."""
        return self.indices.shape[0]

    @property
    def kind(self) -> tuple[bool, bool, int] | None:
        """(weighted, scored, size): batches of one kind run the same operations. None while the dataflow is read."""
        if self.scoring.meter.reads_dataflow:
            return None
        return self.weights is not None, self.scored, self.size

    def own(self, indices: Tensor) -> None:
        """Take these indices, and copy them and the weights: a recorded step reads them where they then are."""
        self.indices = indices.clone()
        self.weights = None if self.weights is None else self.weights.clone()

    def check(self, output: Tensor) -> None:
        """Raise ValueError where an output has not one row for each example."""
        if isinstance(output, Tensor) and (output.ndim == 0 or len(output) != self.size):
            raise ValueError(
                f"output must have one row for each of the {self.size} examples, [B, *], got shape "
                f"{tuple(output.shape)}: take the mean over time before the loss, or move the batch to the front"
            )

    def loss(self, criterion: Callable[..., Tensor], output: Tensor, target: Tensor) -> Tensor:
        """The loss to call ``backward()`` on, see ``SADP.loss``."""
        if self._awaits_backward:
            raise RuntimeError(
                "sadp.loss() was called for a second time in a batch, before backward(), but scores are taken from one "
                "loss: put its parts into one criterion (soft targets for mixup; a module with `reduction` on outputs "
                "[B, T, C] for a loss at every step), or build SADP with score='given' or 'random'"
            )
        self.scoring.meter.end_forward()
        reduction, unreduced = without_reduction(criterion)

        def losses() -> Tensor:
            return per_example(unreduced(output, target), self.size, reduction)

        if self.weights is not None or self.scored:
            self._mean_factor = mean_factor(criterion, reduction, target, self.size)
        if self.weights is None:
            loss = criterion(output, target)
            loss = loss.mean() if reduction == "none" else loss
        else:
            each, factor = losses(), self._mean_factor
            loss = (each * self.weights.to(each)).sum()
            loss = loss * (factor.to(loss) if isinstance(factor, Tensor) else factor)
        if self.scored and self._loss_gradient is None and self._direct_score is None:  # not a second pass, as of SAM
            self._prepare_score(loss, output, target, losses)
        return loss

    def _prepare_score(self, loss: Tensor, output: Tensor, target: Tensor, losses: Callable[[], Tensor]) -> None:
        """Take what scores need of the forward pass, and be told of the backward pass."""
        score, meter = self.scoring.score, self.scoring.meter
        if score.source == "given":
            return
        if score.source == "batch":
            with torch.no_grad():
                self._direct_score = self._one_each(score.of_batch(output, target, losses))
        elif meter.reads_dataflow and loss.requires_grad:
            self.taps = meter.read(loss, self.size)
        if loss.requires_grad:
            self._awaits_backward = True
            loss.register_hook(self._differentiated)

    def _differentiated(self, gradient: Tensor) -> None:
        """Hook of the loss, in its backward pass."""
        self._loss_gradient, self._awaits_backward = gradient.detach(), False

    def give(self, scores: Tensor) -> None:
        """Hand in its scores, see ``SADP.give``."""
        self._direct_score = self._one_each(scores).detach()

    def _one_each(self, scores: Tensor) -> Tensor:
        if not isinstance(scores, Tensor):
            raise TypeError(f"scores must be a tensor, got {name_of(scores)}: pass torch.as_tensor(scores)")
        if scores.shape != (self.size,):
            raise ValueError(f"scores must have shape [{self.size}], one per example, got {list(scores.shape)}")
        return scores

    @torch.no_grad()
    def collect(self) -> None:
        """Take its scores, after its backward pass; once.

        The loop over the epoch does this by itself before the next batch; calling it is only needed where the scores
        should be part of something, as of a CUDA graph (``GraphedStep``).
        """
        if self._closed:
            return
        self.close()
        if not self.scored:
            return
        if self._direct_score is not None:
            self.scoring.keep(self.indices, self.weights, self._direct_score)
        elif self._loss_gradient is None or self.taps is None:
            # The batch was skipped: no loss, or no backward pass, which may come yet.
            self.scoring.meter.abandon()
        else:
            self._collect_measured(self.taps, self._loss_gradient, self._mean_factor)

    def _collect_measured(self, taps: EnergyTaps, gradient: Tensor, factor: float | Tensor) -> None:
        """Take the scores of what was measured, as those of the examples' unweighted losses."""
        scoring, weights = self.scoring, self.weights
        taps.finish()
        if isinstance(factor, Tensor):
            gradient, factor = gradient.float() * factor.float(), 1.0
        on_gpu = taps.energies.is_cuda and taps.energies.device == scoring.slots.device == gradient.device
        if on_gpu and type(scoring.score).of_energies is Score.of_energies:
            from ..ops.score.op import update_scores  # Triton is imported where it is used

            where = (weights, self.indices, scoring.slots, scoring.momentum)
            update_scores(taps.energies, taps.layer_rows, taps.multiplicity, gradient, factor, *where)
            return
        inputs, deltas = taps.energies[taps.layer_rows]
        scores = scoring.score.of_energies(inputs, deltas, taps.multiplicity)
        taps.forget()
        # Back to the unweighted loss: out go the scaler's factor, 1/B and the example's weight.
        whole = gradient.abs() * factor
        scoring.keep(self.indices, weights, scores / (whole if weights is None else whole * weights.to(scores)))

    def close(self) -> None:
        """Nothing more is to be measured in this batch."""
        self._closed = True
        self.scoring.meter.end_forward()
