"""The energies that a batch's score is made of: what measures them in the forward and the backward pass.

Every neuron, layer input or gradient that is measured owns a row of one [R, B] tensor, whatever writes it: the kernels
of a ``BatchNormLIF``, a ``LIFNode``'s statistics, or a reduction over a tensor that no neuron knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.batch_norm_lif import BatchNormNode
from ..nn.node import BaseNode
from ..nn.recorder import Call, Recorder
from ..ops.lif.reference import squared_norm_per_example
from .attachment import Attachment
from .autograd_graph import Probe, WeightLayer, batch_norm_scale

_Row = tuple[str, str]  # ("output" or "delta", neuron), or ("input" or "gradient", layer)


class EnergyTaps:
    """Measures the given weight layers for batches of one size.

    Args:
        model: the network.
        layers: of it, as ``Probe.resolve`` has read them.
        steps: T, time steps that one call of the model's neurons covers.
        batch_size: B.

    Attributes:
        energies: float32 [R, B]: NaN where nothing was measured in this batch, 0 where no gradient came to a layer's
            output, since the loss does not depend on it.
        layer_rows: int64 [2, L], which rows hold the energy of each layer's input and of the gradient at its output.
        multiplicity: float32 [L], ``patch_multiplicity`` of each layer.
        is_open: whether calls with gradients are this batch's; others are not measured.
    """

    def __init__(self, model: nn.Module, layers: list[WeightLayer], *, steps: int, batch_size: int) -> None:
        self.layers, self.steps, self.batch_size = layers, steps, batch_size
        self._model = model
        device: Any = model.get_submodule(layers[0].name).weight.device
        names = {name for layer in layers for name in (layer.input_neuron, layer.output_neuron) if name is not None}
        self.neurons: dict[str, BaseNode] = {name: model.get_submodule(name) for name in sorted(names)}  # type: ignore[misc]
        own = [name for name, node in self.neurons.items() if isinstance(node, BatchNormNode)]
        rows = {*map(_input_row, layers), *map(_delta_row, layers)}
        rows |= {(kind, name) for kind in ("output", "delta") for name in own}
        # The statistics of one kind that `finish` sums are neighbours, and so are the rows of one other kind.
        ordered = sorted(rows, key=lambda row: (row[0] in ("output", "delta") and row[1] not in own, row))
        self._row = {row: i for i, row in enumerate(ordered)}
        # Rows begin at multiples of 16 bytes: kernels are compiled anew for addresses that are aligned in another way.
        stride = -(-batch_size // 4) * 4
        self.energies = torch.full((len(rows), stride), torch.nan, device=device)[:, :batch_size]
        self._views = dict(zip(ordered, self.energies.unbind(0), strict=True))
        gradients = [i for (kind, _), i in self._row.items() if kind == "gradient"]
        self._gradients = self.energies[gradients[0] : gradients[-1] + 1] if gradients else None
        self.layer_rows = torch.tensor(
            [[self._row[row_of(layer)] for layer in layers] for row_of in (_input_row, _delta_row)], device=device
        )
        self.multiplicity = torch.tensor([layer.multiplicity for layer in layers], device=device)
        self._taps = {name: _NeuronTap(self, name) for name in self.neurons}
        for name in own:
            self._taps[name].rows = (self._views["output", name], self._views["delta", name])
        self._reduced: set[_Row] = set()
        self.start()
        self.stop()

    @classmethod
    def of_first_batch(
        cls, model: nn.Module, layers: list[WeightLayer], probe: Probe, *, steps: int, batch_size: int
    ) -> EnergyTaps:
        """Measure the batch that ``probe`` has recorded, before its backward pass.

        The statistics of neurons that were off are replaced by reductions, equal to them up to rounding.
        """

        def known(name: str | None) -> str | None:
            return name if name in probe.recorders else None

        layers = [replace(x, input_neuron=known(x.input_neuron), output_neuron=known(x.output_neuron)) for x in layers]
        taps = cls(model, layers, steps=steps, batch_size=batch_size)
        for name, tap in taps._taps.items():
            tap.calls = list(probe.recorders[name].calls)
        for layer in taps.layers:
            for call in probe.layers:
                if call.name == layer.name and layer.input_neuron is None:
                    assert call.input_norms is not None
                    taps._add(("input", layer.name), _summed(_folded(call.input_norms, steps, batch_size)))
            for call in (*probe.layers, *probe.norms):
                if call.name == layer.gradient_site and layer.output_neuron is None:
                    node, number = call.output
                    node.register_prehook(taps._gradient_hook(layer, call.scale, number))
        return taps

    def attach(self) -> Attachment:
        """Put the recorders and hooks on the model that measure while this is open; the caller removes them."""
        attachment = Attachment()
        for name, node in self.neurons.items():
            attachment.record(node, self._taps[name])
        for layer in self.layers:
            if layer.input_neuron is None:
                attachment.hook(self._model.get_submodule(layer.name), partial(self._saw_input, layer))
            if layer.output_neuron is None or layer.norm is not None:
                attachment.hook(self._model.get_submodule(layer.gradient_site), partial(self._saw_site, layer))
        return attachment

    # --------------------------------------------------------------------------------------------------- one batch

    def start(self) -> None:
        """Begin a batch."""
        self._batch, self.is_open = object(), True
        self._reduced.clear()
        for tap in self._taps.values():
            tap.start()
        if self._gradients is not None:
            self._gradients.zero_()

    def stop(self) -> None:
        """The batch's forward pass is over."""
        self.is_open = False

    def _saw_input(self, layer: WeightLayer, _module: nn.Module, x: Tensor, _output: Tensor) -> None:
        if self.is_open:
            self._reduce(("input", layer.name), x)

    def _saw_site(self, layer: WeightLayer, module: Any, x: Tensor, output: Tensor) -> None:
        if not self.is_open:
            return
        scale = batch_norm_scale(module, x, output) if layer.norm is not None else None
        tap = None if layer.output_neuron is None else self._taps[layer.output_neuron]
        if tap is not None and self.neurons[tap.name].recorder is tap:
            tap.channel_scale = scale
        elif output.requires_grad:
            # Another recorder wants the norms of the gradient as it is: this one's are taken here.
            hook = self._gradient_hook(layer, scale, 0)
            output.register_hook(lambda grad: hook((grad,)))

    def _gradient_hook(
        self, layer: WeightLayer, scale: Tensor | None, number: int
    ) -> Callable[[tuple[Tensor, ...]], None]:
        batch, row = self._batch, _delta_row(layer)

        def hook(grads: tuple[Tensor, ...]) -> None:
            # A backward pass that comes after its batch is over would write into another batch's row.
            if grads[number] is not None and batch is self._batch:
                self._reduce(row, grads[number], scale)

        return hook

    @torch.no_grad()
    def _reduce(self, row: _Row, t: Tensor, scale: Tensor | None = None) -> None:
        """Add t's energy to its row."""
        folded = _folded(t.detach(), self.steps, self.batch_size)
        if scale is None and folded.is_cuda:
            from ..ops.score import op as ops  # Triton is imported where it is used, so that CPU users need no Triton

            if ops.write_energy(folded, self._views[row], row in self._reduced):
                self._reduced.add(row)
                return
        self._add(row, squared_norm_per_example(folded, scale).sum(0))

    def _add(self, row: _Row, energy: Tensor) -> None:
        """Write an energy [B] into its row, or add it where the row was written in this batch."""
        out = self._views[row]
        out.add_(energy) if row in self._reduced else out.copy_(energy)
        self._reduced.add(row)

    def finish(self) -> None:
        """Complete ``energies`` after the backward pass.

        Raises:
            RuntimeError: a layer or a neuron was not called.
        """
        missing = [name for name, tap in self._taps.items() if not tap.calls]
        missing += [name for kind, name in self._row if kind == "input" and (kind, name) not in self._reduced]
        if missing:
            raise RuntimeError(
                f"{', '.join(missing)} was called in the first batch but not in this one: scores need the same forward "
                "pass for every batch; use score='loss' or 'el2n' for this model"
            )
        for tap in self._taps.values():
            tap.sum_energies()
        self._sum_statistics()

    def _sum_statistics(self) -> None:
        """Sum the statistics of neurons that keep them by steps, neighbouring rows of equal T at once."""
        found = []
        for index, row in enumerate(self._row):
            kind, name = row
            if kind in ("output", "delta") and self._taps[name].rows is None and row not in self._reduced:
                values = self._taps[name].by_step(kind)
                if values:
                    found.append((index, values[0] if len(values) == 1 else torch.cat(values)))
        alike = groupby(enumerate(found), key=lambda x: (x[1][0] - x[0], x[1][1].shape[0], x[1][1].dtype))
        for _, group in alike:
            rows, tensors = zip(*(item for _, item in group), strict=True)
            torch.sum(torch.stack(tensors), 1, dtype=torch.float32, out=self.energies[rows[0] : rows[-1] + 1])

    def forget(self) -> None:
        """Set the energies back to NaN, once they are used."""
        self.energies.fill_(torch.nan)


def _input_row(layer: WeightLayer) -> _Row:
    return ("output", layer.input_neuron) if layer.input_neuron else ("input", layer.name)


def _delta_row(layer: WeightLayer) -> _Row:
    return ("delta", layer.output_neuron) if layer.output_neuron else ("gradient", layer.name)


class _NeuronTap(Recorder):
    """Measures one neuron for ``EnergyTaps``: its energies where it has a normalisation, else its statistics by step.

    Args:
        taps: whose neuron it is.
        name: of the neuron.

    Attributes:
        rows: of a neuron with a normalisation, where the energies of a batch's first call are written.
        calls: of the batch at hand.
        channel_scale: of the normalisation in front of the neuron, see ``Call``.
    """

    rows: tuple[Tensor, Tensor] | None = None

    def __init__(self, taps: EnergyTaps, name: str) -> None:
        self._taps, self.name = taps, name

    def start(self) -> None:
        """Begin a batch."""
        self.calls: list[Call] = []
        self.channel_scale: Tensor | None = None
        self._writes_rows = False  # whether the first call does

    def begin(self, call: Call) -> bool:
        if not (self._taps.is_open and call.awaits_norms):
            return False
        self._check(call)
        if self.rows is None:
            call.counts = True
            if not call.shared:
                call.channel_scale = self.channel_scale
        else:
            call.wants_energies = True
            if not call.shared and not self.calls:  # else others read them too, or a call would overwrite another
                call.write_energies_into(*self.rows)
                self._writes_rows = True
        self.calls.append(call)
        return True

    def _check(self, call: Call) -> None:
        if call.examples == self._taps.batch_size:
            return
        multi_step = call.step_mode == "m"
        shape, read_as = (call.shape, "[T, N, *]") if multi_step else (call.shape[1:], "[N, *]")
        remedy = "if that is [T, N, *], set step_mode='m'"
        if multi_step:
            remedy = "put time first, x.repeat(T, 1, ...) for T equal steps, or loop over the steps with step_mode='s'"
        raise ValueError(
            f"the neuron {self.name} (step_mode='{call.step_mode}') was called on {list(shape)}, which it reads as "
            f"{read_as} with N = {call.examples}, in a batch of {self._taps.batch_size}: {remedy}; a model that splits "
            "its batches can use score='loss' or 'el2n'"
        )

    def sum_energies(self) -> None:
        """Complete the rows, after the backward pass."""
        calls = self.calls[1:] if self._writes_rows else self.calls
        if self.rows is None or not calls:
            return
        for row, energies in zip(self.rows, zip(*(call.energies for call in calls), strict=True), strict=True):
            total = torch.stack([_none_as_zero(energy) for energy in energies]).sum(0)
            row.add_(total) if self._writes_rows else row.copy_(total)

    def by_step(self, kind: str) -> list[Tensor]:
        """Each call's statistics [T, N]: of kind "output" the spikes, of "delta" the gradient's squared norms."""
        if kind == "output":
            return [call.spike_count for call in self.calls if call.spike_count is not None]
        norms = [(call, call.grad_norm_sq) for call in self.calls]
        return [n if call.has_norms else _none_as_zero(n) for call, n in norms if n is not None]


def energy_per_example(t: Tensor, steps: int, batch_size: int, channel_scale: Tensor | None = None) -> Tensor:
    """Sum over time of the squared norm of each example's part of t, float [B].

    Args:
        t: [T, B, *], [T * B, *] or [B, *].
        channel_scale: [C], multiplies t along the first dimension behind the batch.

    Raises:
        ValueError: t's shape does not show its examples.
    """
    return squared_norm_per_example(_folded(t.detach(), steps, batch_size), channel_scale).sum(0)


def _none_as_zero(norms: Tensor) -> Tensor:
    """What a call has measured, or 0 where no gradient has come to any of its examples: the loss does not see it."""
    return torch.where(norms.isnan().all(), 0.0, norms)


def _summed(norms: Tensor) -> Tensor:
    """[T, B, *] -> [B]."""
    return norms.flatten(2).sum((0, 2)) if norms.ndim > 2 else norms.sum(0)


def _folded(t: Tensor, steps: int, batch_size: int) -> Tensor:
    """t as a view [T or 1, B, *]."""
    if steps > 1 and t.shape[0] == steps * batch_size:
        t = t.unflatten(0, (steps, batch_size))
    if t.ndim > 1 and t.shape[0] == steps and t.shape[1] == batch_size:
        return t
    if t.shape[0] == batch_size:
        return t.unsqueeze(0)
    raise ValueError(
        f"cannot tell the {batch_size} examples apart in a tensor of shape {tuple(t.shape)}: expected [T, B, *], "
        f"[T * B, *] or [B, *] with T = {steps}; use score='loss' or 'el2n' for this model"
    )
