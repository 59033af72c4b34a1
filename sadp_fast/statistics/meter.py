"""What measures the spike-aware score: which weight layers are scored, and the hooks that act on the running batch.

The model's dataflow is read once, in the first batch that is scored (``autograd_graph``), and that batch is measured by
reductions over the tensors seen in it; from the next one on, what the neurons' kernels know is taken from them
(``energies``).
"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.weight_layers import trainable_layers, weight_parameters
from .attachment import Attachment
from .autograd_graph import Probe, WeightLayer
from .energies import EnergyTaps


class ScoreMeter:
    """Measures a model's batches for the scores "all" and "last".

    An epoch runs ``attach``, then for each batch ``begin`` and, in the place of the first batch's taps, ``read``, then
    ``detach``. Hooks exist only between ``attach`` and ``detach``, and act only in a batch's forward pass.

    Args:
        model: the network.
        score: "all" weight layers or the "last" one alone.

    Attributes:
        layers: the weight layers that are scored; None until the dataflow is read.
        steps: T, time steps that one call of the model's neurons covers.
    """

    def __init__(self, model: nn.Module, score: str) -> None:
        self.model, self.score = model, score
        self.layers: list[WeightLayer] | None = None
        self.steps = 1
        self._trainable: list[str] = []  # the weight layers that could be scored, when the dataflow was read
        self._probe: Probe | None = None  # reads the dataflow in the running epoch
        self._taps: EnergyTaps | None = None
        self._attachment = Attachment()

    @property
    def reads_dataflow(self) -> bool:
        """Whether the batch at hand is one whose graph is to be read."""
        return self._probe is not None

    def has_layers(self) -> bool:
        """Whether a weight layer is trained, as far as is known."""
        return self.layers is None or bool(trainable_layers(self.model))

    def attach(self, batch_size: int) -> None:
        """Begin an epoch of batches of this size."""
        if self.layers is not None and self._trainable != trainable_layers(self.model):
            self.layers = self._taps = None  # layers were frozen or unfrozen: the dataflow is read anew
        if self.layers is None:
            self._probe = Probe(self.model)
            self._attachment = self._probe.attach()
            return
        if self._taps is None or self._taps.batch_size != batch_size:
            self._taps = EnergyTaps(self.model, self.layers, steps=self.steps, batch_size=batch_size)
        self._attachment = self._taps.attach()

    def detach(self) -> None:
        """End the epoch: leave the model as it was."""
        self.end_forward()
        self._attachment.close()
        self._probe = None

    def begin(self) -> EnergyTaps | None:
        """Begin a batch; what measures it, or None where its dataflow is to be read first."""
        if self._probe is not None:
            self._probe.start()
        if self._taps is not None:
            self._taps.start()
        return self._taps

    def end_forward(self) -> None:
        """The batch's forward pass is over, whether it ran or was replayed: neurons measure no other."""
        if self._taps is not None:
            self._taps.stop()

    def abandon(self) -> None:
        """The batch's taps are half written, and a backward pass may write into them yet: no other batch uses them."""
        self._taps = None

    def renew(self, batch_size: int) -> None:
        """Put other taps in the place of abandoned ones, between two batches."""
        if self.layers is not None and self._taps is None:
            self.detach()
            self.attach(batch_size)

    def read(self, loss: Tensor, batch_size: int) -> EnergyTaps:
        """Read the dataflow from the loss of the first scored batch, before its backward pass; what measures it.

        Raises:
            ValueError: the forward pass called no weight layer, examples cannot be told apart in its tensors, or it
                does not show how many time steps there are.
        """
        probe = self._probe
        assert probe is not None
        layers = probe.resolve(loss)
        if not layers:
            raise ValueError(
                f"score={self.score!r} found no weight layer (Linear or Conv with a trainable weight) in the model's "
                "forward pass and its loss: run the model that SADP was given, or use score='loss' or 'el2n'"
            )
        if self.score == "last":
            layers = layers[-1:]
        else:
            self._warn_of_uncovered(layers)
        multi_step = [call for call in probe.neurons if self.model.get_submodule(call.name).step_mode == "m"]
        self.steps = max((call.output_shape[0] for call in multi_step), default=1)
        for call in probe.layers:
            folded = call.output_shape[0] == self.steps * batch_size or self.steps == batch_size
            if call.name in probe.batch_first and self.steps > 1 and folded:
                raise ValueError(
                    f"{call.name} takes [N, T, *] (or [N * T, *]) and a neuron [T, N, *], in whose order scores tell "
                    "examples apart: put time first in the whole model, or use score='loss' or 'el2n'"
                )
        try:
            with torch.no_grad():
                taps = EnergyTaps.of_first_batch(self.model, layers, probe, steps=self.steps, batch_size=batch_size)
        except ValueError as error:
            if multi_step:
                raise
            if probe.neurons:
                raise ValueError(
                    f"{error}; if the model takes all time steps at once, as through a MultiStepContainer, make its "
                    "neurons take them too: LIFNode(step_mode='m')"
                ) from error
            raise ValueError(
                f"score={self.score!r} found no neuron of sadp_fast in the forward pass, so that the number of time "
                "steps is not known: put sadp_fast.LIFNode in the place of other neurons, or use score='loss' or 'el2n'"
            ) from error
        self.detach()
        self.layers, self._trainable = layers, trainable_layers(self.model)
        self.attach(batch_size)
        return taps

    def _warn_of_uncovered(self, layers: list[WeightLayer]) -> None:
        covered = {id(p) for layer in layers for p in weight_parameters(self.model.get_submodule(layer.name))}
        weights = ((n, p) for n, p in self.model.named_parameters() if p.requires_grad and p.ndim > 1)
        missed = [name for name, parameter in weights if id(parameter) not in covered]
        if missed:
            warnings.warn(
                f"score='all' leaves out {', '.join(missed)}: only weights of Linear and Conv modules that are called "
                "as modules, and that the loss depends on, are measured",
                stacklevel=6,
            )

    def state_dict(self) -> dict[str, Any]:
        """What was read: a first batch is measured in another way, equal up to rounding. Resumed, there is none."""
        return {
            "layers": None if self.layers is None else [asdict(layer) for layer in self.layers],
            "trainable": list(self._trainable),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``, between epochs."""
        self.steps, self._taps = state["steps"], None
        if state["layers"] is not None:
            self.layers = [WeightLayer(**layer) for layer in state["layers"]]
            self._trainable = list(state["trainable"])
