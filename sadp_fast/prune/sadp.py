"""SADP: the one stateful object, from a training step's statistics to the next epoch's batches.

An epoch runs: probabilities from the scores so far -> one draw -> batches of one size; and for each batch: taps on the
model during the forward pass, the weighted loss, and, once the user's backward pass is over, new scores.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import name_of
from ..statistics.energies import EnergyTaps
from ..statistics.meter import ScoreMeter
from ..statistics.score import spike_aware_score
from .baselines import el2n_score
from .batching import Drawn, EpochBatches, pack, rank_and_world, shuffled
from .criterion import mean_factor, per_example, without_reduction
from .loader import PrunedLoader
from .probabilities import inclusion_probabilities
from .sampling import sample
from .schedule import prune_ratios

SCORES = ("all", "last", "loss", "el2n", "given", "random", "static_random")
_GRADIENT_SCORES = ("all", "last")
_UNIFORM_SCORES = ("random", "static_random")
WEIGHTS = ("unbiased", "sum", "none")
# What goes with a policy [both papers]: InfoBatch (arXiv 2303.04947) rescales by 1/p and trains its last eighth of the
# epochs on everything. With the others, losses without weights and no such tail gave the better networks, see
# docs/findings.md [ours]; the paper's estimator is unbiased (Proposition 1).
_POLICY_WEIGHTS = {"infobatch": "sum"}
_POLICY_TAIL = {"infobatch": 0.125}
_WARMUP_FRACTION = 0.05  # of the epochs, on full data [ours]: scores need a first pass over the data


def settle(
    policy: str, epochs: int, weights: str | None, warmup_epochs: int | None, tail_epochs: int | None
) -> tuple[str, int, int]:
    """Weights, warm-up and tail, with what SADP takes where they are None."""
    return (
        _POLICY_WEIGHTS.get(policy, "none") if weights is None else weights,
        max(1, round(_WARMUP_FRACTION * epochs)) if warmup_epochs is None else warmup_epochs,
        round(_POLICY_TAIL.get(policy, 0.0) * epochs) if tail_epochs is None else tail_epochs,
    )


@dataclass
class _Batch:
    """What is known of the batch that the user is training on."""

    indices: Tensor
    weights: Tensor | None  # None: every weight is 1
    scored: bool  # whether scores are taken from this batch
    taps: EnergyTaps | None = None  # what measures it
    loss_gradient: Tensor | None = (
        None  # d(what backward() was called on) / d(loss): a GradScaler's factor, 1/accumulation
    )
    mean_factor: float | Tensor = 1.0  # what the criterion multiplies the sum of the examples' losses with: 1/B, ...
    awaits_backward: bool = False  # whether scores will be those of a loss that has not been differentiated yet
    direct_score: Tensor | None = None  # "loss", "el2n" and "given" need no backward pass
    collected: bool = False

    @property
    def size(self) -> int:
        return self.indices.shape[0]

    def differentiated(self, gradient: Tensor) -> None:
        """Hook of the loss, in its backward pass."""
        self.loss_gradient, self.awaits_backward = gradient.detach(), False


class SADP:
    """Spike-aware data pruning around an existing training loop (arXiv 2510.04098).

    Each epoch trains on a Bernoulli-drawn subset; an example's keep probability p_i follows its score. The paper
    weights the loss by 1 / p_i, which keeps the gradient unbiased (Proposition 1): ``weights="unbiased"``. By default
    it is not weighted [ours], which trains more on examples of large gradients, to better networks in
    docs/findings.md. Four lines of a loop change::

        sadp = SADP(model, len(train_set), epochs=100, prune_ratio=0.5)                  # 1
        loader = sadp.loader(DataLoader(train_set, batch_size=128, num_workers=4))      # 2
        for epoch in range(100):
            for x, y in loader:
                loss = sadp.loss(criterion, model(x), y)                                # 3
                optimizer.zero_grad(); loss.backward(); optimizer.step()
                sadp_fast.reset(model)                                                  # 4, or SpikingJelly's reset_net

    Args:
        model: the network. For the scores "all" and "last", which read its autograd graph, neurons that take all time
            steps at once have to be this package's, at least one of them; any module for the others.
        num_examples: N, size of the training set; examples are known by their index in it.
        epochs: how many epochs will be trained: the schedule's length.
        prune_ratio: r in [0, 1), the mean share of examples left out per epoch, full-data epochs included. 0 is
            ordinary training: batches, losses and model are left exactly as they are.
        score: "all": the spike-aware bound over all weight layers [form ours]; "last": over the last weight layer
            alone; "loss"; "el2n"; "given": by the loop, see ``give``; "random": every example alike, another subset
            each epoch (dynamic random pruning); "static_random": one such subset for all pruned epochs, smaller ones
            being part of larger ones.
        policy, smoothing: see ``inclusion_probabilities``.
        weights: of the losses. "none": 1; "unbiased": m / (N p_i), mean 1 [mean: ours]; "sum": 1 / p_i, mean N / m, so
            that the gradients of an epoch sum up to those of the whole data set, as if the learning rate rose where an
            epoch is shorter. None is the policy's own: "sum" for "infobatch", else "none".
        score_momentum: in [0, 1). An example's score becomes score_momentum * old + (1 - score_momentum) * new where
            it was scored before.
        schedule, warmup_epochs, tail_epochs: see ``prune_ratios``; None means 5 % of the epochs, at least one, for the
            warm-up, and no tail [ours], but for "infobatch" 12.5 % [its paper].
        seed: of the draws and the order of the batches; the same on every device.
        device: where scores and draws live; None means the model's first parameter's device.

    Attributes:
        epoch: completed epochs.
        ratios: prune ratio of every epoch.
        scores: float32 [N]; NaN where an example was never scored.
        probabilities: float32 [N], inclusion probabilities of the running or last epoch.
        examples_trained: examples trained on so far (by all ranks together), padding not counted.
        progress: share of all training that is done, 0 to 1, which a learning rate should follow.

    Under torch.distributed every rank builds the same SADP around its own model (DistributedDataParallel or not) and
    loops alike: all draw the same subset, each trains its share of every batch, and scores are combined once an epoch.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        num_examples: int,
        *,
        epochs: int,
        prune_ratio: float = 0.5,
        score: str = "all",
        policy: str = "mix",
        smoothing: float = 0.3,
        weights: str | None = None,
        score_momentum: float = 0.0,
        schedule: str = "constant",
        warmup_epochs: int | None = None,
        tail_epochs: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {name_of(model)}: pass the network itself")
        for name, count in (("num_examples", num_examples), ("epochs", epochs)):
            if not isinstance(count, Integral):
                remedy = "len(train_set)" if name == "num_examples" else "the number of epochs you train"
                raise TypeError(f"{name} must be an integer, got {name_of(count)}: pass {remedy}")
        if not isinstance(prune_ratio, (float, Real)) or not 0 <= prune_ratio < 1:
            raise ValueError(f"prune_ratio must be a number in [0, 1), got {prune_ratio!r}: 0.5 leaves out half")
        for name, epochs_of in (("warmup_epochs", warmup_epochs), ("tail_epochs", tail_epochs)):
            if not isinstance(epochs_of, (int, Integral, type(None))):
                raise TypeError(f"{name} must be an integer or None, got {epochs_of!r}: pass a number of epochs")
        if not isinstance(seed, (int, Integral)) or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        if weights not in (None, *WEIGHTS):
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)} or None, got {weights!r}")
        if not 0 <= score_momentum < 1:
            raise ValueError(f"score_momentum must be in [0, 1), got {score_momentum}: 0 keeps the newest score alone")
        if num_examples < 1:
            raise ValueError(f"num_examples must be the size of the training set, at least 1, got {num_examples}")
        if score in _GRADIENT_SCORES and prune_ratio > 0 and hasattr(model, "_orig_mod"):  # torch.compile's wrapper
            raise ValueError(
                f"score={score!r} reads the model's autograd graph, which torch.compile hides: pass and train the "
                "uncompiled model (its neurons are fused all the same), or use score='loss'"
            )
        # NumPy's integers overflow where Python's do not, and cannot be loaded from a checkpoint.
        num_examples, epochs, seed = int(num_examples), int(epochs), int(seed)
        weights, warmup_epochs, tail_epochs = settle(policy, epochs, weights, warmup_epochs, tail_epochs)
        warmup_epochs, tail_epochs = int(warmup_epochs), int(tail_epochs)
        self.ratios = prune_ratios(
            prune_ratio, epochs, schedule=schedule, warmup_epochs=warmup_epochs, tail_epochs=tail_epochs
        )
        # Shares of the data that the epochs before each one keep, and all of them: `progress` is asked at every step.
        self._kept_before = list(accumulate((1 - ratio for ratio in self.ratios), initial=0.0))
        if device is None:
            parameter = next(model.parameters(), None)
            device = "cpu" if parameter is None else parameter.device
        self.device = torch.device(device)
        self.model = model
        self._config: dict[str, Any] = {
            "num_examples": num_examples,
            "epochs": epochs,
            "prune_ratio": float(prune_ratio),
            "score": score,
            "policy": policy,
            "smoothing": float(smoothing),
            "weights": weights,
            "score_momentum": float(score_momentum),
            "schedule": schedule,
            "warmup_epochs": warmup_epochs,
            "tail_epochs": tail_epochs,
            "seed": seed,
        }
        # A bad policy or smoothing should be found here, not an epoch later.
        inclusion_probabilities(torch.ones(2, device="cpu"), 1.0, smoothing=smoothing, policy=policy)
        self.epoch = 0
        self._trained, self._trained_now = 0, 0  # examples, in completed epochs and in the running one
        self._share_of_epoch = 0.0  # of the running one's batches, those that are done or at hand
        self._scores_looked_at = False
        # One slot more than examples: padding and unusable scores are written there, so that shapes stay constant.
        self._slots = torch.full((num_examples + 1,), torch.nan, device=self.device)
        self.probabilities = torch.ones(num_examples, device=self.device)
        self._carried = self._nothing_drawn()
        self._batch: _Batch | None = None
        self._scores_before: Tensor | None = None  # those before the running epoch, which all ranks know
        self._weigh_all = False  # multiply by weights of 1 too, so that all batches run the same operations
        self._meter = ScoreMeter(model, score) if score in _GRADIENT_SCORES else None
        self._loop: object = None  # the newest epoch's, while nothing has taken its place

    def __getattr__(self, name: str) -> Any:
        # The settings read as attributes: sadp.prune_ratio, sadp.seed, ...
        config = self.__dict__.get("_config", {})
        if name in config:
            return config[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def scores(self) -> Tensor:
        return self._slots[:-1]

    @property
    def examples_trained(self) -> int:
        return self._trained + self._trained_now

    @property
    def progress(self) -> float:
        """Share of all training that is done, the batch at hand included, 0 to 1; an epoch counts by what it keeps.

        What a learning rate should follow: counted in epochs, a pruned run would spend too few examples at high rates
        where a full-data tail comes at the end.
        """
        running = self._share_of_epoch * (1 - self.ratios[self.epoch]) if self.epoch < len(self.ratios) else 0.0
        return (self._kept_before[self.epoch] + running) / self._kept_before[-1]

    @property
    def running(self) -> bool:
        """Whether a batch of a pruned training is at hand."""
        return self._batch is not None

    @property
    def passive(self) -> bool:
        """Whether this is ordinary training (prune_ratio = 0)."""
        return not any(self.ratios)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self._config.items())
        return f"SADP({settings}, epoch={self.epoch})"

    def describe(self) -> str:
        """How each weight layer is measured, one line each; known after the first scored batch."""
        if self._meter is None or self.passive:
            return f"score={self.score!r} measures no layer" + (", since nothing is pruned" if self.passive else "")
        if self._meter.layers is None:
            return "the model's dataflow is read in the first scored batch"
        return "\n".join(layer.describe() for layer in self._meter.layers)

    # ----------------------------------------------------------------------------------------- batches of an epoch

    def _nothing_drawn(self) -> Drawn:
        return Drawn(
            torch.empty(0, dtype=torch.int64, device=self.device),
            torch.empty(0, dtype=torch.float32, device=self.device),
        )

    def _draw(self, batch_size: int, pad: bool) -> EpochBatches:
        """Draw the running epoch and cut it into batches; under torch.distributed, this rank's share of each."""
        self._share_scores()
        rank, world = rank_and_world()
        ratio, n = self.ratios[self.epoch], self.num_examples
        if ratio == 0:
            self.probabilities = torch.ones(n, device=self.device)
            drawn = Drawn(torch.arange(n, device=self.device), torch.ones(n, device=self.device))
        else:
            keep = (1 - ratio) * n
            if self.score in _UNIFORM_SCORES:
                self.probabilities = torch.full((n,), keep / n, device=self.device)
            else:
                self._look_at_scores()
                self.probabilities = inclusion_probabilities(
                    self.scores, keep, smoothing=self.smoothing, policy=self.policy
                )
            # The same number for every epoch draws the same subset.
            draw = 0 if self.score == "static_random" else self.epoch
            indices, weights, _ = sample(self.probabilities, seed=self.seed, epoch=draw)
            if self.weights == "sum":
                weights = weights * (n / keep)
            elif self.weights == "none":
                weights = torch.ones_like(weights)
            drawn = Drawn(indices, weights)
        last = self.epoch == len(self.ratios) - 1  # nothing is carried out of the last epoch
        everything, self._next_carried = pack(
            shuffled(drawn, seed=self.seed, epoch=self.epoch), self._carried, batch_size * world, pad=pad or last
        )
        # In one block each, since kernels read a row at every step.
        indices, weights = (t[:, rank::world].contiguous() for t in (everything.indices, everything.weights))
        return EpochBatches(indices, weights, everything.padding)

    def _look_at_scores(self) -> None:
        """Warn, once the data has been trained through, if there are hardly any scores to prune by."""
        if self._scores_looked_at or self._trained < self.num_examples:
            return
        self._scores_looked_at = True
        usable = self.scores.isfinite() & (self.scores >= 0)
        known, zero = (int(found.sum()) for found in (usable, self.scores == 0))
        if known < self.num_examples / 2:
            cause = "train on sadp.loss(criterion, output, target)"
            if self.score == "given":
                cause = "call sadp.give(scores), with scores >= 0 (negative ones count as none),"
            warnings.warn(
                f"{known} of {self.num_examples} examples have a finite score, too few to prune by, so that "
                f"examples are drawn nearly uniformly: {cause} in every batch, and look for NaN in the data",
                stacklevel=5,
            )
        elif zero > self.num_examples / 2 and self.score != "given":
            warnings.warn(
                f"{zero} of {self.num_examples} examples have a score of 0, so that examples are drawn nearly "
                "uniformly: neurons in front of a scored layer are silent; lower v_threshold, try decay_input=False, "
                "or score='all' in the place of 'last'",
                stacklevel=5,
            )

    def _share_scores(self) -> None:
        """Let every rank know the scores that the others took since the running epoch began; no-op on one rank."""
        before, self._scores_before = self._scores_before, None
        if before is None or rank_and_world()[1] == 1:
            return
        taken = (self.scores != before) & self.scores.isfinite()
        # Each rank trains on other examples, so a sum of what was taken is what was taken, to the bit, but for an
        # example drawn twice (carried over and anew): there, the mean.
        total = torch.stack((torch.where(taken, self.scores, 0.0), taken.float()))
        torch.distributed.all_reduce(total)
        self._slots[:-1] = torch.where(total[1] > 0, total[0] / total[1], before)

    def _check_epoch(self) -> None:
        if self._batch is not None:
            raise RuntimeError(
                "an epoch of this SADP is still running: finish its loop, or close its iterator (iterator.close()), or "
                "build SADP anew"
            )
        if self.epoch >= len(self.ratios):
            raise RuntimeError(
                f"all {len(self.ratios)} planned epochs are trained: build SADP with epochs= the number you train. "
                "Every loop over its loader counts as one, next(iter(loader)) too: evaluate with another DataLoader"
            )

    def _needs_scores(self, epoch: int) -> bool:
        """Whether a pruned epoch that draws by scores follows this one."""
        return self.score not in _UNIFORM_SCORES and any(self.ratios[epoch + 1 :])

    def _epoch(self, batches: EpochBatches) -> Iterator[Tensor]:
        """Yield the index rows of one epoch, taking scores in between."""
        scored = self._needs_scores(self.epoch) and self._has_layers_to_score()
        meter = self._meter if scored else None
        weighted = self._weigh_all or self.ratios[self.epoch] > 0 or self._carried.indices.shape[0] > 0
        count, batch_size = batches.indices.shape
        if meter is not None:
            meter.attach(batch_size)
        _, world = rank_and_world()
        self._scores_before = self.scores.clone() if scored else None
        this = self._loop = object()
        self._trained_now = 0
        try:
            for k in range(count):
                padding = batches.padding if k == count - 1 else 0
                weights = batches.weights[k] if weighted or padding else None
                taps = None if meter is None else meter.begin()
                self._batch = _Batch(batches.indices[k], weights, scored, taps)
                self._trained_now += batch_size * world - padding
                self._share_of_epoch = (k + 1) / count
                yield batches.indices[k]
                if self._loop is not this:
                    raise RuntimeError("a state was loaded within this epoch, which ended it: leave its loop first")
                self.collect()
                if meter is not None:
                    meter.renew(batch_size)
            self._share_scores()
        finally:
            if self._loop is this:
                if world == 1:  # else the ranks have to meet first, at the next draw
                    self._scores_before = None
                self._leave_batch()
                self._carried = self._next_carried
                self._complete_epoch()

    def _has_layers_to_score(self) -> bool:
        """False, with a warning, once no weight layer is trained any more: examples then keep their scores."""
        if self._meter is None or self._meter.has_layers():
            return True
        warnings.warn(
            f"no weight layer is trained any more, so score={self.score!r} takes no new scores: examples keep theirs",
            stacklevel=4,
        )
        return False

    def _unpruned_epoch(self, batches: Iterable[Any], batch_size: int, examples: int) -> Iterator[Any]:
        """Yield an epoch's batches as they are, of so many examples each and in all."""
        this = self._loop = object()
        self._trained_now = 0
        try:
            for batch in batches:
                self._trained_now = min(self._trained_now + batch_size, examples)
                self._share_of_epoch = self._trained_now / examples
                yield batch
        finally:
            if self._loop is this:  # an older loop that ends now has been overtaken
                self._complete_epoch()

    def _leave_batch(self) -> None:
        """No batch is at hand any more, and the model is left as it was."""
        self._batch = None
        if self._meter is not None:
            self._meter.detach()

    def _complete_epoch(self) -> None:
        self._trained, self._trained_now, self._share_of_epoch = self.examples_trained, 0, 0.0
        self.epoch += 1

    def batches(self, batch_size: int) -> Generator[Tensor, None, None]:
        """One epoch of index batches, for data that lies on the device.

        Yields:
            int64 [batch_size] on ``self.device``, every one of this size. The remainder of an epoch is carried over to
            the next one; the last epoch's is filled up with examples of weight 0.

        Raises:
            RuntimeError: all planned epochs are trained, or an epoch is still running.
        """
        self._check_epoch()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        yield from self._epoch(self._draw(batch_size, pad=False))

    def _expected_batches(self, batch_size: int, drop_last: bool) -> int:
        """How many batches the next epoch should have; how many it has varies with the draw."""
        last = self.epoch == len(self.ratios) - 1
        expected = (1 - self.ratios[self.epoch]) * self.num_examples + len(self._carried.indices)
        batches = expected / (batch_size * rank_and_world()[1])
        return max(1, math.ceil(batches) if last or not drop_last else math.floor(batches))

    def loader(self, loader: DataLoader) -> PrunedLoader:
        """The same DataLoader (data set, workers, collation, pinning), whose batches SADP draws.

        Every batch has the loader's batch size. With ``drop_last=True`` an epoch's remainder is carried over to the
        next epoch, with ``drop_last=False`` it is filled up with examples of weight 0. With prune_ratio = 0 the
        loader's own sampler is used, and its batches pass unchanged.

        Raises:
            TypeError: it is no DataLoader.
            ValueError: the loader has no batch size or no index, not ``num_examples`` examples, or a sampler that
                SADP's own draws would replace.
        """
        return PrunedLoader(self, loader)

    # ---------------------------------------------------------------------------------------------- loss and scores

    def loss(self, criterion: Callable[..., Tensor], output: Tensor, target: Tensor) -> Tensor:
        """The loss to call ``backward()`` on: the weighted mean of the examples' losses. Once a batch.

        Args:
            criterion: a loss module or function with PyTorch's ``reduction`` ("mean", "sum" or "none").
            output: the model's output for the batch at hand, [B, *].
            target: what the criterion compares it with.

        Returns:
            scalar: ``criterion(output, target)`` itself where every weight is 1, else ``sum_i w_i loss_i`` over what
            the criterion divides by: B for a mean, the sum of the class weights (where targets are not ignored) for
            cross entropy and nll_loss, 1 for reduction "sum".

        Raises:
            RuntimeError: no batch of this SADP is being trained on, or scores would be taken from two losses of it.
            TypeError: the criterion has no ``reduction``.
            ValueError: the output has not one row for each example.
        """
        batch = self._batch
        if batch is None:
            if self.passive:
                return criterion(output, target)
            raise RuntimeError("sadp.loss() belongs inside a loop over sadp.loader(...) or sadp.batches(...)")
        if batch.awaits_backward:
            raise RuntimeError(
                "sadp.loss() was called for a second time in a batch, before backward(), but scores are taken from one "
                "loss: put its parts into one criterion (soft targets for mixup; a module with `reduction` on outputs "
                "[B, T, C] for a loss at every step), or build SADP with score='given' or 'random'"
            )
        if self._meter is not None:
            self._meter.end_forward()
        if not self.passive and isinstance(output, Tensor) and (output.ndim == 0 or len(output) != batch.size):
            raise ValueError(
                f"output must have one row for each of the {batch.size} examples, [B, *], got shape "
                f"{tuple(output.shape)}: take the mean over time before the loss, or move the batch to the front"
            )
        if self.passive and batch.weights is None:
            return criterion(output, target)
        reduction, unreduced = without_reduction(criterion)
        if batch.weights is not None or batch.scored:
            batch.mean_factor = mean_factor(criterion, reduction, target, batch.size)
        if batch.weights is None:
            loss = criterion(output, target)
            loss = loss.mean() if reduction == "none" else loss
        else:
            losses = per_example(unreduced(output, target), batch.size, reduction)
            factor = batch.mean_factor
            loss = (losses * batch.weights.to(losses)).sum()
            loss = loss * (factor.to(loss) if isinstance(factor, Tensor) else factor)
        first = batch.loss_gradient is None and batch.direct_score is None
        if batch.scored and self.score != "given" and first:  # not from a second pass, as of SAM
            if self.score == "loss":
                with torch.no_grad():
                    batch.direct_score = per_example(unreduced(output, target), batch.size, reduction)
            elif self.score == "el2n":
                batch.direct_score = el2n_score(output, target)
            elif self._meter is not None and self._meter.layers is None and loss.requires_grad:
                batch.taps = self._meter.read(loss, batch.size)
            if loss.requires_grad:
                batch.awaits_backward = True
                loss.register_hook(batch.differentiated)
        return loss

    @property
    def wants_scores(self) -> bool:
        """Whether scores are taken from the batch at hand: not without one, nor in the last epochs on all data."""
        return self._batch is not None and self._batch.scored

    def give(self, scores: Tensor) -> None:
        """Hand in the scores of the batch at hand, for score="given", at any time before the next batch.

        Args:
            scores: float [B], >= 0, in the batch's order; what is NaN or infinite leaves the old score, and what is
                negative counts as none. Where ``wants_scores`` is false they are not needed, and not kept.

        Raises:
            TypeError: they are no tensor.
            RuntimeError: no batch of this SADP is being trained on.
            ValueError: another score than "given", or another shape than [B].
        """
        batch = self._batch
        if self.score != "given":
            raise ValueError(f"give() is for score='given', but this SADP was built with score={self.score!r}")
        if batch is None:
            raise RuntimeError("sadp.give() belongs inside a loop over sadp.loader(...) or sadp.batches(...)")
        if not isinstance(scores, Tensor):
            raise TypeError(f"scores must be a tensor, got {name_of(scores)}: pass torch.as_tensor(scores)")
        if scores.shape != (batch.size,):
            raise ValueError(f"scores must have shape [{batch.size}], one per example, got {list(scores.shape)}")
        batch.direct_score = scores.detach()

    @torch.no_grad()
    def collect(self) -> None:
        """Take the scores of the batch at hand, after its backward pass.

        The loop over ``batches()`` or ``loader()`` does this by itself before the next batch; calling it is only needed
        where the scores should be part of something, as of a CUDA graph (``GraphedStep``).
        """
        batch = self._batch
        if batch is None or batch.collected:
            return
        self._close(batch)
        if not batch.scored:
            return
        if self._meter is None:
            if batch.direct_score is not None:
                self._keep(batch, batch.direct_score)
            return
        gradient, taps = batch.loss_gradient, batch.taps
        if gradient is None or taps is None:  # the batch was skipped: no loss, or no backward pass, which may come yet
            self._meter.abandon()
            return
        taps.finish()
        mean_factor = batch.mean_factor
        if isinstance(mean_factor, Tensor):
            gradient, mean_factor = gradient.float() * mean_factor.float(), 1.0
        if taps.energies.is_cuda and taps.energies.device == self._slots.device == gradient.device:
            from ..ops.score.op import update_scores  # Triton is imported where it is used

            update_scores(
                taps.energies,
                taps.layer_rows,
                taps.multiplicity,
                gradient,
                mean_factor,
                batch.weights,
                batch.indices,
                self._slots,
                self.score_momentum,
            )
            return
        inputs, deltas = taps.energies[taps.layer_rows]
        value = spike_aware_score(inputs, deltas, taps.multiplicity)
        taps.forget()
        # Back to the unweighted loss: out go the scaler's factor, 1/B and the example's weight.
        factor = gradient.abs() * mean_factor
        self._keep(batch, value / (factor if batch.weights is None else factor * batch.weights.to(value)))

    def _keep(self, batch: _Batch, score: Tensor) -> None:
        """Write a batch's scores into its examples' slots, but for those that are not finite or of weight 0."""
        score = score.to(self.device, torch.float32)
        usable = torch.isfinite(score)
        if self.score_momentum > 0:
            old = self._slots[batch.indices]
            averaged = self.score_momentum * old + (1 - self.score_momentum) * score
            score = torch.where(old.isnan(), score, averaged)
        if batch.weights is not None:
            usable &= batch.weights > 0
        slot = torch.where(usable, batch.indices, self.num_examples)
        # amax: independent of the order in which an example that occurs twice is written.
        self._slots.scatter_reduce_(0, slot, score, "amax", include_self=False)
        self._slots[-1:].fill_(torch.nan)

    def _close(self, batch: _Batch) -> None:
        """Nothing more is to be measured in this batch."""
        batch.collected = True
        if self._meter is not None:
            self._meter.close()

    @property
    def batch_kind(self) -> tuple[bool, bool, int] | None:
        """(weighted, scored, size) of the batch at hand: batches of one kind run the same operations.

        None where there is no batch, or one that reads the model's dataflow.
        """
        batch = self._batch
        if batch is None or (self._meter is not None and self._meter.reads_dataflow):
            return None
        return batch.weights is not None, batch.scored, batch.size

    # -------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after the last completed epoch; tensors are copies.

        An epoch that is running is not part of it, nor are its scores: after loading, it starts anew. Under
        torch.distributed the same holds for an epoch that was left early, until the next one is drawn: the ranks have
        not met since.
        """
        return {
            "config": dict(self._config),
            "epoch": self.epoch,
            "scores": (self.scores if self._scores_before is None else self._scores_before).clone(),
            "carried_indices": self._carried.indices.clone(),
            "carried_weights": self._carried.weights.clone(),
            "examples_trained": self._trained,
            **({} if self._meter is None else self._meter.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``. An epoch that is running ends untrained: leave its loop.

        Raises:
            ValueError: it is no state of a SADP, or was saved with other settings; the message names the first that
                differs.
        """
        before_these = {"weights": "unbiased", "score_momentum": 0.0}  # what states older than these settings had
        if not isinstance(state, dict) or not {"config", "epoch", "scores"} <= set(state):
            found = f"a dict with {', '.join(map(str, state))}" if isinstance(state, dict) else name_of(state)
            raise ValueError(f"state must be what SADP.state_dict() returned, got {found}: pass SADP's part of it")
        for name, saved in {**before_these, **state["config"]}.items():
            if self._config[name] != saved:
                raise ValueError(
                    f"this state was saved with {name}={saved!r}, but SADP was built with {self._config[name]!r}"
                )
        self._loop = None
        self._leave_batch()
        self.epoch = int(state["epoch"])
        self._slots[:-1] = state["scores"].to(self.device)
        self._carried = Drawn(state["carried_indices"].to(self.device), state["carried_weights"].to(self.device))
        self._trained, self._trained_now, self._share_of_epoch = int(state["examples_trained"]), 0, 0.0
        self._scores_before = None
        if self._meter is not None:
            self._meter.load_state_dict(state)
