"""What a model's neurons do, by layer and example: ``with sadp_fast.record(model) as statistics``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import name_of
from ..nn.node import neurons
from ..nn.recorder import CallRecorder
from .attachment import Attachment

_COMPILED = "_orig_mod."  # what torch.compile puts in front of a module's name


class Statistics(dict[str, CallRecorder]):
    """What ``record`` measures: a ``CallRecorder`` for each of a model's neurons, by the neuron's name.

    ``statistics["2"].spike_count`` and ``statistics["2"].grad_norm_sq`` are tensors [T, N] of T steps and N examples.
    ``print(statistics)`` is a table of the layers' firing rates.
    """

    def __init__(self, layers: dict[str, CallRecorder], kinds: dict[str, str]) -> None:
        super().__init__(layers)
        self._kinds = kinds

    def __str__(self) -> str:
        """Firing rates: the share of a layer's neurons and steps with a spike, and spikes of an example."""
        rows = [("layer", "kind", "steps", "neurons", "spikes an example", "firing rate")]
        called = [(name, layer) for name, layer in self.items() if layer.calls]
        for name, layer in called:
            steps, examples = sum(call.shape[0] for call in layer.calls), max(1, layer.calls[-1].examples)
            shares = f"{layer.spikes / examples:.1f}", f"{layer.spikes / max(1, layer.places):.2%}"
            size = math.prod(layer.calls[-1].shape[2:])
            rows.append((name, self._kinds[name], str(steps), str(size), *shares))
        spikes, places = (sum(getattr(layer, what) for _, layer in called) for what in ("spikes", "places"))
        rows.append(("total", "", "", "", "", f"{spikes / max(1, places):.2%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


@contextmanager
def record(model: nn.Module, *, by_step: bool = False) -> Iterator[Statistics]:
    """Measure spikes and gradients of a model's neurons while the ``with`` lasts::

        with sadp_fast.record(model) as statistics:
            criterion(model(x).mean(0), y).backward()
        print(statistics)                       # a table of firing rates
        statistics["2"].spike_count             # int32 [T, N], of the neuron model.get_submodule("2")
        statistics["2"].grad_norm_sq            # float32 [T, N]

    What is held is the last call of each neuron in step mode 'm', and all its calls since the last reset in 's'; the
    next call takes its place. So a loop over a data set reads it within the loop. It stays readable after the ``with``,
    and after a ``reset``, until it is dropped. What else measures the neurons (an outer ``record``, SADP) goes on.

    Gradients are those of the loss for the input current, NaN before the backward pass, None without one. Of a
    BatchNorm node they are in front of the normalisation, with its statistics held constant, and summed over the steps
    of a call, [1, N]: by the same kernels as without ``record``.

    Args:
        model: with neurons of this package; a model of torch.compile, or one that is compiled in parts, too.
        by_step: whether the gradients of BatchNorm nodes are by step as well, [T, N]. They then run as two operators
            (torch's normalisation and the neuron), slower and with more memory, and equal up to rounding.

    Raises:
        TypeError: model is no module.
        ValueError: it has no neuron of this package.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {name_of(model)}: pass the network itself")
    nodes = {name.replace(_COMPILED, ""): node for name, node in neurons(model).items()}
    if not nodes:
        raise ValueError(
            f"model has no neuron of sadp_fast to record, got {name_of(model)}: put sadp_fast.LIFNode in the place of "
            "other neurons"
        )
    own = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    layers = {name: CallRecorder(by_step, own) for name in nodes}
    with Attachment() as attachment:
        for name, node in nodes.items():
            attachment.record(node, layers[name])
        yield Statistics(layers, {name: type(node).__name__ for name, node in nodes.items()})
