"""Which neuron feeds which weight layer: read from the autograd graph of one training step.

The score of a weight layer needs the energy (squared norm) of its input and of the gradient at its output. Where the
input is a neuron's output as it is, the neuron knows the one; where the output goes to one neuron alone, directly or
through a batch normalisation, the neuron knows the other. The graph that autograd records anyway says where this holds,
for any model code: views and casts change neither, a pooling, a dropout or a sum outside of the neuron does. What no
neuron knows is measured by a reduction over the tensor itself (``energies``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..memory.packed_spikes import unpack
from ..nn import surrogate
from ..nn.batch_norm_lif import BatchNormNode
from ..nn.node import BaseNode
from ..nn.recorder import Call, Recorder
from ..nn.weight_layers import WEIGHT_LAYERS, is_trained
from ..ops.batch_norm_lif.reference import batch_variance
from ..ops.common.saved_tensors import hooks_of_saved_tensors
from ..ops.lif.reference import squared_norm_per_example
from .attachment import Attachment, Hook
from .score import patch_multiplicity

# Autograd nodes that leave every element as it is; the second group also moves dimensions.
_VIEWS = {"View", "UnsafeView", "ReshapeAlias", "Alias", "Squeeze", "Unsqueeze", "Clone", "ToCopy"}
_MOVES = {"Transpose", "Permute"}

Edge = tuple[Any, int]  # (autograd node, number of its output)


def knows_output_energy(node: BaseNode) -> bool:
    """Whether a neuron's statistics hold its output's squared norm, and not only how much of it is not 0."""
    return isinstance(node, BatchNormNode) or surrogate.fused_index(node.surrogate_function) is not None


@dataclass(frozen=True)
class WeightLayer:
    """How one weight layer's two energies are measured.

    Attributes:
        name: of the layer's module.
        multiplicity: ``patch_multiplicity``.
        input_neuron: the neuron whose output is the layer's input, or None: reduce the input tensor.
        norm: the batch normalisation module that alone consumes the layer's output, or None. The gradient is then taken
            behind it and scaled by gamma/sigma: exactly the gradient in front of it for frozen statistics. (A
            ``BatchNormLIF`` is a neuron here, which does this by itself.)
        output_neuron: the neuron that alone consumes that output, or None: reduce the gradient tensor.
    """

    name: str
    multiplicity: float
    input_neuron: str | None
    norm: str | None
    output_neuron: str | None

    @property
    def gradient_site(self) -> str:
        """Name of the module at whose output the gradient is taken."""
        return self.norm or self.name

    def describe(self) -> str:
        """One line for people."""
        spikes = f"output of {self.input_neuron}" if self.input_neuron else "reduction of its input"
        norm = f", scaled through {self.norm}" if self.norm else ""
        delta = f"gradient at {self.output_neuron}" if self.output_neuron else "reduction of its output's gradient"
        return f"{self.name}: {spikes} x {delta}{norm}"


@dataclass(frozen=True)
class Seen:
    """What is known of one module's call; not its tensors, which would outlive their use and fill the memory.

    Attributes:
        name: of the module.
        input, output: edges of the autograd graph.
        input_shape, output_shape: of the tensors.
        input_norms: of a weight layer, ``squared_norm_per_example`` of its input: one for each index of the first two
            dimensions.
        scale: of a normalisation, ``batch_norm_scale``.
    """

    name: str
    input: Edge
    output: Edge
    input_shape: torch.Size
    output_shape: torch.Size
    input_norms: Tensor | None = None
    scale: Tensor | None = None


class EnergyRecorder(Recorder):
    """The energies of a BatchNorm node in its calls with gradients."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def begin(self, call: Call) -> bool:
        if not call.awaits_norms:
            return False
        call.wants_energies = True
        self.calls.append(call)
        return True


@dataclass
class Probe:
    """Records the calls of one forward pass, whose graph is then read by ``resolve``."""

    model: nn.Module
    layers: list[Seen] = field(default_factory=list)
    norms: list[Seen] = field(default_factory=list)
    neurons: list[Seen] = field(default_factory=list)
    # Of the neurons with a normalisation, by name.
    recorders: dict[str, EnergyRecorder] = field(default_factory=dict)
    # Layers that ``resolve`` found on the other side of a transposition of time and batch than the neuron beside them.
    batch_first: set[str] = field(default_factory=set)

    def attach(self) -> Attachment:
        """Put the hooks and recorders on the model; the caller removes them."""
        attachment = Attachment()
        for name, module in self.model.named_modules():
            seen = self._seen(module)
            if seen is not None:
                attachment.hook(module, self._hook(name, seen))
            if isinstance(module, BatchNormNode):
                self.recorders[name] = EnergyRecorder()
                attachment.record(module, self.recorders[name])
        return attachment

    def start(self) -> None:
        """Begin a batch: drop what was recorded."""
        for seen in (self.layers, self.norms, self.neurons):
            seen.clear()
        for recorder in self.recorders.values():
            recorder.calls.clear()

    def _seen(self, module: nn.Module) -> list[Seen] | None:
        if isinstance(module, BaseNode):
            return self.neurons
        if isinstance(module, WEIGHT_LAYERS):
            return self.layers if is_trained(module) else None
        return self.norms if isinstance(module, _BatchNorm) else None

    def _hook(self, name: str, seen: list[Seen]) -> Hook:
        @torch.no_grad()
        def record(module: Any, x: Tensor, output: Tensor) -> None:
            norms = squared_norm_per_example(x) if seen is self.layers else None
            scalable = seen is self.norms and _scalable(module, x, output)
            scale = batch_norm_scale(module, x, output) if scalable else None
            seen.append(Seen(name, _edge(x), _edge(output), x.shape, output.shape, norms, scale))

        return record

    def resolve(self, output: Tensor) -> list[WeightLayer]:
        """Read the graph behind ``output`` (the model's output or the loss); layers in the order of their calls.

        A layer that ``output`` does not depend on is none: its weight has no gradient.
        """
        graph = _Graph(output)
        layer_at, norm_at, neuron_at = (
            {call.output: call for call in calls} for calls in (self.layers, self.norms, self.neurons)
        )
        modules = dict(self.model.named_modules())

        norm_behind: dict[Edge, Seen] = {}  # layer output -> the normalisation that alone consumes it
        for call in self.norms:
            source = graph.walk_back(call.input, layer_at, alone=True)
            if source is not None and call.scale is not None:
                norm_behind[source.output] = call
        neuron_behind: dict[Edge, str] = {}  # layer or norm output -> the neuron that alone consumes it
        for call in self.neurons:
            source = graph.walk_back(call.input, layer_at | norm_at, alone=True, moves=False)
            # A neuron with a normalisation of its own knows the gradient in front of that one alone.
            if source is not None and (
                source.output not in norm_at
                or (
                    _channels_line_up(source.output_shape, call.input_shape)
                    and not isinstance(modules[call.name], BatchNormNode)
                )
            ):
                neuron_behind[source.output] = call.name
            source = graph.walk_back(call.input, layer_at | norm_at)
            if source is not None and graph.moves_time(call.input, source.output):
                feeding = graph.walk_back(source.input, layer_at) if source.output in norm_at else source
                if feeding is not None:
                    self.batch_first.add(feeding.name)

        found: dict[str, WeightLayer] = {}
        for call in self.layers:
            if call.output[0] not in graph.nodes:
                continue
            source = graph.walk_back(call.input, neuron_at)
            if source is not None and graph.moves_time(call.input, source.output):
                self.batch_first.add(call.name)
            norm = norm_behind.get(call.output)
            site = call.output if norm is None else norm.output
            neuron = None if source is None else source.name
            layer = WeightLayer(
                call.name,
                patch_multiplicity(modules[call.name]),
                neuron if neuron is not None and knows_output_energy(modules[neuron]) else None,
                None if norm is None else norm.name,
                neuron_behind.get(site),
            )
            earlier = found.get(call.name)
            found[call.name] = layer if earlier is None else _common(earlier, layer)
        return _with_unique_sites(list(found.values()))


def _edge(t: Tensor) -> Edge:
    return (t.grad_fn, t.output_nr)


def _back(edge: Edge, passable: set[str] = _VIEWS) -> Iterator[Edge]:
    """An edge, and those that it comes from through nodes of these kinds."""
    yield edge
    while edge[0] is not None and _kind(edge[0]) in passable:
        edge = edge[0].next_functions[0]
        yield edge


def _behind_views(t: Tensor) -> Any:
    """The node that has made what t shows, itself or through views; None where there is none."""
    *_, (node, _) = _back(_edge(t))
    return node


def _kind(node: Any) -> str:
    return re.sub(r"Backward\d*$", "", node.name().rsplit("::", 1)[-1])


class _Graph:
    """The autograd graph behind a tensor: its nodes, and the number of consumers of each edge."""

    def __init__(self, output: Tensor) -> None:
        self.consumers: Counter[Edge] = Counter()
        stack: list[Any] = [output.grad_fn]
        self.nodes = set(stack)
        while stack:
            node = stack.pop()
            for edge in node.next_functions:
                if edge[0] is not None:
                    self.consumers[edge] += 1
                    if edge[0] not in self.nodes:
                        self.nodes.add(edge[0])
                        stack.append(edge[0])

    def walk_back(
        self, edge: Edge, sources: dict[Edge, Seen], *, alone: bool = False, moves: bool = True
    ) -> Seen | None:
        """From an edge back through nodes that change no element to the first of ``sources``, calls by their output.

        ``alone``: only if every tensor on the way has no other consumer. ``moves``: whether transpositions may be
        passed.
        """
        for behind in _back(edge, _VIEWS | _MOVES if moves else _VIEWS):
            if behind[0] is None or (alone and self.consumers[behind] != 1):
                return None
            if behind in sources:
                return sources[behind]
        return None

    def moves_time(self, edge: Edge, source: Edge) -> bool:
        """Whether the first two dimensions change places between an edge and the one that ``walk_back`` found."""
        while edge != source:
            if _moves_time(edge[0]):
                return True
            edge = edge[0].next_functions[0]
        return False


def _moves_time(node: Any) -> bool:
    if _kind(node) == "Transpose":
        return {node._saved_dim0, node._saved_dim1} == {0, 1}
    return _kind(node) == "Permute" and node._saved_dims[0] != 0


def _channels_line_up(norm_output: torch.Size, x: torch.Size) -> bool:
    """Whether the normalisation's channel dimension is the neuron's: same shape, or time folded into the batch."""
    return norm_output == x or norm_output == (x[0] * x[1], *x[2:])


def _common(a: WeightLayer, b: WeightLayer) -> WeightLayer:
    """What holds for two calls of one layer."""
    same_norm = a.norm == b.norm
    same_output = same_norm and a.output_neuron == b.output_neuron
    return replace(
        a,
        input_neuron=a.input_neuron if a.input_neuron == b.input_neuron else None,
        norm=a.norm if same_norm else None,
        output_neuron=a.output_neuron if same_output else None,
    )


def _with_unique_sites(layers: list[WeightLayer]) -> list[WeightLayer]:
    """A neuron or normalisation shared by two layers mixes their gradients: such layers are measured by themselves."""
    uses: Counter[str | None] = Counter(site for layer in layers for site in (layer.norm, layer.output_neuron) if site)
    return [
        replace(layer, norm=None, output_neuron=None) if max(uses[layer.norm], uses[layer.output_neuron]) > 1 else layer
        for layer in layers
    ]


def _scalable(norm: _BatchNorm, x: Tensor, output: Tensor) -> bool:
    """Whether ``batch_norm_scale`` is all that the module multiplies x by: a subclass may do more than normalise."""
    node = _behind_views(output)
    if node is None or "BatchNorm" not in _kind(node) or _edge(x) not in _back(node.next_functions[0]):
        return False
    return norm.training or norm.running_var is not None


def batch_norm_scale(norm: _BatchNorm, x: Tensor, output: Tensor) -> Tensor:
    """gamma/sigma of a batch normalisation's last forward pass on x, float32 [C], from the statistics that it used.

    In training these are the batch's, which autograd has saved with the pass; where they cannot be had (SyncBatchNorm),
    and in evaluation, the running ones. Under activation checkpointing autograd would run the pass again to tell them:
    they are taken from x once more instead.
    """
    inverse_sigma = None
    if norm.training and _recomputes():
        folded = x.flatten(0, 1) if getattr(norm, "step_mode", "s") == "m" else x
        inverse_sigma = torch.rsqrt(batch_variance(folded.detach()) + norm.eps)
    elif norm.training:
        inverse_sigma = getattr(_behind_views(output), "_saved_result2", None)
    if inverse_sigma is None or inverse_sigma.numel() != norm.num_features:
        if norm.running_var is None:
            raise RuntimeError(
                "a batch normalisation without running statistics does not show its batch statistics here; "
                "use track_running_stats=True"
            )
        inverse_sigma = torch.rsqrt(norm.running_var + norm.eps)
    scale = inverse_sigma.detach().float()
    return scale if norm.weight is None else scale * norm.weight.detach().float()


def _recomputes() -> bool:
    """Whether reading what autograd saves now may run code of others: that of ``torch.utils.checkpoint``."""
    hooks = hooks_of_saved_tensors()
    return hooks is not None and hooks[1] is not unpack
