"""What an example's importance is taken from: the scores that SADP knows by name, and the base of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import Tensor

from ..errors import check_choice
from ..statistics.score import spike_aware_score
from .registry import Registry


class Score:
    """An importance of examples. A user's own is a subclass with a name; SADP takes its instances for ``score=``::

        class Doubt(Score):
            name = "doubt"

            def of_batch(self, output, target, losses):
                return 1 - output.softmax(1).amax(1)

    Attributes:
        name: what messages call it, and what a saved state is known by.
        source: what scores are taken from. "batch": ``of_batch``. "gradients": ``of_energies``, of a model whose
            neurons are this package's. "given": the loop hands them to ``SADP.give``. "none": there are no scores,
            every example is drawn alike.
        draws_once: whether all pruned epochs have the same random numbers, so that smaller subsets are part of larger
            ones.
        layers: where the source is "gradients": "all" weight layers, or the "last" one alone.
    """

    name: str
    source: Literal["batch", "gradients", "given", "none"] = "batch"
    draws_once: bool = False
    layers: ClassVar[Literal["all", "last"]] = "all"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_choice("source", cls.source, ("batch", "gradients", "given", "none"))
        check_choice("layers", cls.layers, ("all", "last"))

    def of_batch(self, output: Tensor, target: Tensor, losses: Callable[[], Tensor]) -> Tensor:
        """Scores of a batch after its forward pass, called without gradients.

        Args:
            output: the model's output, [B, *].
            target: what the criterion compares it with.
            losses: gives the examples' losses, [B], neither weighted nor reduced, when it is called.

        Returns:
            float [B], >= 0, in any unit: only ratios matter. What is not finite leaves the old score.
        """
        raise NotImplementedError(f"the score {self.name!r} has no of_batch, which source='batch' calls")

    def of_energies(self, inputs: Tensor, deltas: Tensor, multiplicity: Tensor) -> Tensor:
        """Scores of a batch after its backward pass; a subclass may combine the layers in another way.

        Args:
            inputs: sum over time of the squared norm of a layer's input (for spikes: their number), [L, B].
            deltas: sum over time of the squared norm of the loss's gradient at its output, [L, B].
            multiplicity: in how many patches an input element appears, [L].

        Returns:
            float [B], proportional to the loss's scale: ``spike_aware_score``.
        """
        return spike_aware_score(inputs, deltas, multiplicity)


class AllLayers(Score):
    """The spike-aware bound of the gradient's norm over all weight layers [form ours]."""

    name = "all"
    source = "gradients"


class LastLayer(AllLayers):
    """The same bound over the last weight layer alone."""

    name = "last"
    layers = "last"


class Loss(Score):
    """The example's loss."""

    name = "loss"

    def of_batch(self, output: Tensor, target: Tensor, losses: Callable[[], Tensor]) -> Tensor:
        return losses()


class Given(Score):
    """Scores that the training loop computes and hands in, see ``SADP.give``."""

    name = "given"
    source = "given"


class Random(Score):
    """Every example alike, another subset each epoch: dynamic random pruning."""

    name = "random"
    source = "none"


SCORES: Registry[Score] = Registry("score", Score, (AllLayers(), LastLayer(), Loss(), Given(), Random()))
