"""SADP: the one stateful object, from a training step's statistics to the next epoch's batches.

An epoch runs: probabilities from the scores so far -> one draw -> batches of one size; and for each batch: taps on the
model during the forward pass, the weighted loss, and, once the user's backward pass is over, new scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import accumulate
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import name_of
from .batch import Batch
from .batching import Drawn, rank_and_world
from .epoch import DrawnEpoch, Epoch, draw
from .loader import PrunedLoader
from .scores import SCORES
from .scoring import Scoring
from .settings import Settings


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
        settings: how to prune; None means all defaults.
        device: where scores and draws live; None means the model's first parameter's device.
        options: single settings by name in the place of those above, such as ``prune_ratio`` and ``score``: all
            fields of ``Settings``.

    Attributes:
        settings: how it prunes; nothing in them is None. What the next draw is made by.
        scoring: what is known of the examples' scores, and what measures them.
        ratios: prune ratio of every epoch.
        probabilities: float32 [N], inclusion probabilities of the running or last epoch.

    Under torch.distributed every rank builds the same SADP around its own model (DistributedDataParallel or not) and
    loops alike: all draw the same subset, each trains its share of every batch, and scores are combined once an epoch.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        num_examples: int,
        *,
        epochs: int,
        settings: Settings | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {name_of(model)}: pass the network itself")
        for name, count in (("num_examples", num_examples), ("epochs", epochs)):
            if not isinstance(count, Integral):
                remedy = "len(train_set)" if name == "num_examples" else "the number of epochs you train"
                raise TypeError(f"{name} must be an integer, got {name_of(count)}: pass {remedy}")
        if num_examples < 1:
            raise ValueError(f"num_examples must be the size of the training set, at least 1, got {num_examples}")
        # NumPy's integers overflow where Python's do not, and cannot be loaded from a checkpoint.
        self.num_examples, self.epochs = int(num_examples), int(epochs)
        asked = Settings(**options) if settings is None else replace(settings, **options)
        self.ratios = asked.ratios(self.epochs)
        self.settings = asked.settled(self.epochs)
        score = SCORES.find(asked.score)
        if score.source == "gradients" and not self.passive and hasattr(model, "_orig_mod"):  # torch.compile's
            raise ValueError(
                f"score={score.name!r} reads the model's autograd graph, which torch.compile hides: pass and "
                "train the uncompiled model (its neurons are fused all the same), or use score='loss'"
            )
        if device is None:
            device = next((parameter.device for parameter in model.parameters()), "cpu")
        self.model, self.device = model, torch.device(device)
        self.scoring = Scoring(score, model, self.num_examples, self.settings.score_momentum, self.device)
        self.probabilities = torch.ones(self.num_examples, device=self.device)
        # Shares of the data that the epochs before each one keep, and all of them: `progress` is asked at every step.
        self._kept_before = list(accumulate((1 - ratio for ratio in self.ratios), initial=0.0))
        self._epoch, self._trained = 0, 0  # completed epochs, and the examples in them
        self._carried = Drawn.nothing(self.device)
        self._weighs_all = False
        self._running: Epoch | None = None  # the newest epoch that has begun and is not over

    # ------------------------------------------------------------------------------------------------- where it stands

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self._epoch

    @property
    def batch(self) -> Batch | None:
        """The drawn batch that is being trained on; None outside of a loop, and where the loader draws its own."""
        return None if self._running is None else self._running.batch

    @property
    def score(self) -> str:
        """The name of the score."""
        return self.scoring.score.name

    @property
    def scores(self) -> Tensor:
        """float32 [N]; NaN where an example was never scored."""
        return self.scoring.values

    @property
    def examples_trained(self) -> int:
        """Examples trained on so far (by all ranks together), padding not counted."""
        return self._trained + (0 if self._running is None else self._running.trained)

    @property
    def progress(self) -> float:
        """Share of all training that is done, the batch at hand included, 0 to 1; an epoch counts by what it keeps.

        What a learning rate should follow: counted in epochs, a pruned run would spend too few examples at high rates
        where a full-data tail comes at the end.
        """
        done = self._kept_before[self._epoch]
        if self._running is not None:
            done += self._running.share * (1 - self.ratios[self._epoch])
        return done / self._kept_before[-1]

    @property
    def passive(self) -> bool:
        """Whether this is ordinary training (prune_ratio = 0)."""
        return not any(self.ratios)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._config().items())
        return f"SADP({settings}, epoch={self.epoch})"

    def describe(self) -> str:
        """How each weight layer is measured, one line each; known after the first scored batch."""
        if self.scoring.score.source != "gradients" or self.passive:
            return f"score={self.score!r} measures no layer" + (", since nothing is pruned" if self.passive else "")
        layers = self.scoring.meter.layers
        if layers is None:
            return "the model's dataflow is read in the first scored batch"
        return "\n".join(layer.describe() for layer in layers)

    # ------------------------------------------------------------------------------------------------------ its epochs

    def open_epoch(self, batch_size: int, *, pad: bool = False) -> DrawnEpoch:
        """Draw the coming epoch and cut it into batches; under torch.distributed, this rank's share of each.

        Args:
            batch_size: of every batch of this rank.
            pad: fill the last batch up with examples of weight 0, instead of carrying the remainder over to the next
                epoch. The last epoch's is filled up in any case.

        Raises:
            RuntimeError: all planned epochs are trained, or an epoch is still running.
            ValueError: a batch size below 1.
        """
        self._check_epoch()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.scoring.share()
        number, ratio = self._epoch, self.ratios[self._epoch]
        if ratio > 0 and self.scoring.score.source != "none" and self._trained >= self.num_examples:
            self.scoring.look()
        self.probabilities, drawn = draw(self.scores, ratio, number, self.settings, self.scoring.score)
        scored = self.takes_scores(number) and self.scoring.has_layers()
        weighted = self._weighs_all or ratio > 0
        pad = pad or number == len(self.ratios) - 1  # nothing is carried out of the last epoch
        return DrawnEpoch(drawn, self._carried, batch_size, self.scoring, pad=pad, scored=scored, weighted=weighted)

    def train(self, epoch: DrawnEpoch) -> Generator[Batch, None, None]:
        """Yield the batches of an epoch that was just opened; it is over when the loop ends, in whatever way."""
        epoch.begin()
        self._running = epoch
        try:
            yield from epoch
        finally:
            if self._running is epoch:
                self._carried = epoch.left_over
                self.scoring.end_epoch()
                self._complete(epoch)

    def follow(self, batches: Iterable[Any], batch_size: int, examples: int) -> Iterator[Any]:
        """Yield an ordinary epoch's batches as they are, of so many examples each and in all."""
        self._check_epoch()
        epoch = self._running = Epoch()
        try:
            for batch in batches:
                epoch.trained = min(epoch.trained + batch_size, examples)
                epoch.share = epoch.trained / examples
                yield batch
        finally:
            if self._running is epoch:  # an older loop that ends now has been overtaken
                self._complete(epoch)

    def batches(self, batch_size: int) -> Generator[Tensor, None, None]:
        """One epoch of index batches, for data that lies on the device.

        Yields:
            int64 [batch_size] on ``self.device``, every one of this size. The remainder of an epoch is carried over to
            the next one; the last epoch's is filled up with examples of weight 0.

        Raises:
            RuntimeError: all planned epochs are trained, or an epoch is still running.
        """
        with closing(self.train(self.open_epoch(batch_size))) as batches:
            for batch in batches:
                yield batch.indices

    def loader(self, loader: DataLoader[Any]) -> PrunedLoader:
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

    def takes_scores(self, epoch: int) -> bool:
        """Whether scores are taken in this epoch: whether a pruned one that draws by scores follows it."""
        return self.scoring.score.source != "none" and any(self.ratios[epoch + 1 :])

    def expected_batches(self, batch_size: int, *, pad: bool) -> int | None:
        """How many batches the coming epoch should have; how many it has varies with the draw. None if one runs."""
        if self.batch is not None or self._epoch >= len(self.ratios):
            return None
        pad = pad or self._epoch == len(self.ratios) - 1
        expected = (1 - self.ratios[self._epoch]) * self.num_examples + len(self._carried.indices)
        batches = expected / (batch_size * rank_and_world()[1])
        return max(1, math.ceil(batches) if pad else math.floor(batches))

    def skip_to(self, epoch: int) -> None:
        """Let this epoch, counted from 0, be the coming one, as if those before it had been trained.

        For timings of single epochs: scores and the count of trained examples stay. Raises ValueError where there is no
        such epoch, RuntimeError while another one is running.
        """
        if not 0 <= epoch < len(self.ratios):
            raise ValueError(f"epoch must be from 0 to {len(self.ratios) - 1}, got {epoch}: they are counted from 0")
        self._check_idle()
        self._epoch = epoch

    def weigh_all(self) -> None:
        """From the next epoch on, multiply a pruned training's losses by weights of 1 too: batches then run alike."""
        self._weighs_all = not self.passive

    def _check_idle(self) -> None:
        if self.batch is not None:
            raise RuntimeError(
                "an epoch of this SADP is still running: finish its loop, or close its iterator (iterator.close()), or "
                "build SADP anew"
            )

    def _check_epoch(self) -> None:
        self._check_idle()
        if self._epoch >= len(self.ratios):
            raise RuntimeError(
                f"all {len(self.ratios)} planned epochs are trained: build SADP with epochs= the number you train. "
                "Every loop over its loader counts as one, next(iter(loader)) too: evaluate with another DataLoader"
            )

    def _complete(self, epoch: Epoch) -> None:
        epoch.leave()
        self._trained += epoch.trained
        self._epoch += 1
        self._running = None

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
        if self.passive and (self.batch is None or self.batch.weights is None):
            return criterion(output, target)
        batch = self._at_hand("loss")
        if not self.passive:
            batch.check(output)
        return batch.loss(criterion, output, target)

    @property
    def wants_scores(self) -> bool:
        """Whether scores are taken from the batch at hand: not without one, nor in the last epochs on all data."""
        return self.batch is not None and self.batch.scored

    def give(self, scores: Tensor) -> None:
        """Hand in the scores of the batch at hand, for score="given", at any time before the next batch.

        Args:
            scores: float [B], >= 0, in the batch's order; what is NaN or infinite leaves the old score, and what is
                negative counts as none. Where ``wants_scores`` is false they are not needed, and not kept.

        Raises:
            TypeError: they are no tensor.
            RuntimeError: no batch of this SADP is being trained on.
            ValueError: a score that is not given, or another shape than [B].
        """
        if self.scoring.score.source != "given":
            raise ValueError(f"give() is for score='given', but this SADP was built with score={self.score!r}")
        self._at_hand("give").give(scores)

    def _at_hand(self, method: str) -> Batch:
        if self.batch is None:
            raise RuntimeError(f"sadp.{method}() belongs inside a loop over sadp.loader(...) or sadp.batches(...)")
        return self.batch

    # -------------------------------------------------------------------------------------------------------- state

    def _config(self) -> dict[str, Any]:
        return {"num_examples": self.num_examples, "epochs": self.epochs, **self.settings.plain()}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after the last completed epoch; tensors are copies.

        An epoch that is running is not part of it, nor are its scores: after loading, it starts anew. Under
        torch.distributed the same holds for an epoch that was left early, until the next one is drawn: the ranks have
        not met since.
        """
        return {
            "config": self._config(),
            "epoch": self._epoch,
            "scores": self.scoring.settled(),
            "carried_indices": self._carried.indices.clone(),
            "carried_weights": self._carried.weights.clone(),
            "examples_trained": self._trained,
            **self.scoring.meter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``. An epoch that is running ends untrained: leave its loop.

        Raises:
            ValueError: it is no state of a SADP, or was saved with other settings; the message names the first that
                differs.
        """
        if not isinstance(state, dict) or not set(self.state_dict()) <= set(state):
            found = f"a dict with {', '.join(map(str, state))}" if isinstance(state, dict) else name_of(state)
            raise ValueError(f"state must be what SADP.state_dict() returned, got {found}: pass SADP's part of it")
        own = self._config()
        for name, saved in state["config"].items():
            built = own.get(name)
            if built != saved:
                raise ValueError(f"this state was saved with {name}={saved!r}, but SADP was built with {built!r}")
        if not 0 <= state["epoch"] <= len(self.ratios) or state["scores"].shape != self.scores.shape:
            raise ValueError(
                f"this state has {len(state['scores'])} scores and {state['epoch']} epochs, but SADP was built for "
                f"{self.num_examples} examples and {len(self.ratios)} epochs: load a state of this training"
            )
        if self._running is not None:
            self._running.leave()
        self._running = None
        self._epoch, self._trained = int(state["epoch"]), int(state["examples_trained"])
        self._carried = Drawn(state["carried_indices"].to(self.device), state["carried_weights"].to(self.device))
        self.scoring.load(state["scores"])
        self.scoring.meter.load_state_dict(state)
