"""Launching the BatchNorm + LIF kernels.

Reading order: what a layer is made of, one kernel in one configuration, ``Layer`` and ``Backward`` (a layer's passes
for one shape, layout and neuron), and ``layer_for``, which keeps them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common.autotune import Choices
from ..common.dynamics import Dynamics
from ..common.equations import SMALLEST_GAIN, RelativeKind
from ..common.launch import Launch
from ..common.layout import Sequence, has_strides
from ..common.prepared import Plan, Prepared, keep, kept
from . import configuration, kernels
from .configuration import TUNING, Configuration, Does, Fires, NormalisationKind, Shape
from .kernels import EXAMPLES, GROUP
from .reference import Normalisation

# Steps of a tile are held in registers; longer sequences take the separate operators.
MAX_STEPS = 16
# Launches of one kind that a layer keeps: by its gradient's layout, its momentum, ...
MOST_OF_A_LAYER = 64

# Of the kernels that add partial sums.
_FINISH = {"num_warps": 8, "enable_fp_fusion": False}

_CHOICES: dict[str, Choices[Configuration]] = {name: Choices(f"BatchNorm + LIF {name}") for name in TUNING}


# ------------------------------------------------------------------------------------------ what a layer is made of


class Neuron(NamedTuple):
    """The neuron behind the normalisation, as the kernels see it."""

    keep: float  # share of v that a step keeps, if tau is not learned
    gain: float  # what multiplies the input, if that is not 1 / tau, learned
    v_threshold: float
    v_rest: float
    soft_reset: bool
    detach_reset: bool
    surrogate: int
    alpha: float
    learned_tau: bool
    learned_gain: bool

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def of(cls, d: Dynamics, surrogate: int, alpha: float) -> Neuron:
        """From the dynamics, and the surrogate's position in ``surrogate.FUSED`` with its steepness."""
        tau = d.constant_tau
        keep = 1.0 if tau is None else 1.0 - 1.0 / tau
        gain = max(1.0 / tau, SMALLEST_GAIN.value) if tau is not None and d.decay_input else 1.0
        learned = (d.learned_tau, d.learned_tau and d.decay_input)
        return cls(keep, gain, d.v_threshold, d.v_rest, d.v_reset is None, d.detach_reset, surrogate, alpha, *learned)

    @property
    def learned(self) -> RelativeKind:
        """What kernels that use but keep and gain are compiled for."""
        return RelativeKind(False, self.learned_tau, self.learned_gain)

    @property
    def forward(self) -> RelativeKind:
        """What the forward kernel is compiled for."""
        return RelativeKind(self.soft_reset, self.learned_tau)

    @property
    def backward(self) -> RelativeKind:
        """What the backward kernel is compiled for."""
        learned = (self.learned_tau, self.learned_gain)
        return RelativeKind(self.soft_reset, *learned, self.detach_reset, self.surrogate)


def _pairs(shape: Shape, slots: int) -> tuple[int, ...]:
    """Shape of the partial sums that ``kernels._pair`` addresses."""
    return triton.cdiv(shape.channels, GROUP.value), slots, 2, GROUP.value


# ------------------------------------------------------------------------------------ one kernel in one configuration


def _prepared(kernel: str, steps: int, key: Hashable, plan: Callable[[Configuration], Plan]) -> Prepared[Configuration]:
    """One of the kernels that TUNING lists."""
    return Prepared(
        _CHOICES[kernel],
        key,
        lambda x: configuration.candidates(kernel, steps, x.element_size()),
        lambda config, *_: plan(config),
    )


class _Statistics:
    """Of each program: how many values of a channel it saw, [slots], and their statistics, as ``_pairs``."""

    def __init__(self, shape: Shape, config: Configuration) -> None:
        grid = shape.grid(config)
        self.slots, self.pairs = grid.slots, _pairs(shape, grid.slots)
        how = {"HOW": configuration.StatisticsHow(shape.cut(grid, shape.steps)), **config.options}
        kernel = kernels.channel_statistics_kernel
        self.launch = Launch(kernel, shape.device, grid.programs, shape.numbers(grid), how)

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count = x.new_empty(self.slots, dtype=torch.float32)
        partial = x.new_empty(self.pairs, dtype=torch.float32)
        self.launch(x, count, partial)
        return count, partial


class _Fire:
    """Output, final potential and partial energies [N, parts], the last two where they are wanted."""

    def __init__(self, layer: Layer, residual_strides: tuple[int, ...], does: Fires, config: Configuration) -> None:
        shape, neuron = layer.shape, layer.neuron
        grid = shape.grid(config)
        self.out, self.repeated, self.want_v = layer.out, layer.repeated, does.v
        self.energies = (shape.examples, grid.parts) if does.energy else None
        numbers = (*shape.numbers(grid, residual_strides), neuron.keep, neuron.v_threshold, neuron.v_rest)
        how = configuration.ForwardHow(shape.cut(grid, layer.steps, layer.repeated), neuron.forward, does)
        constants = {"HOW": how, **config.options}
        self.launch = Launch(kernels.norm_forward_kernel, shape.device, grid.programs, numbers, constants)

    def run(
        self, x: Tensor, constants: Tensor, reciprocal_tau: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        like = self.out
        out = x.new_empty_strided(like.shape, like.strides) if self.repeated else like.empty(x, x.dtype)
        v = energy = None
        if self.want_v:
            v = x.new_empty_strided(like.shape[1:], like.strides[1:], dtype=torch.float32)
        if self.energies is not None:
            energy = x.new_empty(self.energies, dtype=torch.float32)
        given = (x, out if residual is None else residual, out, constants if v is None else v, constants)
        self.launch(*given, reciprocal_tau, constants if energy is None else energy)
        return out, v, energy


class _Gradients:
    """The backward kernel, as its first pass, its second, or both in one where the statistics are constants.

    Returns the programs' sums of each channel as ``_pairs``, squared norms of each example [N, parts] and leaks
    [programs], as far as this pass takes them.
    """

    def __init__(self, layer: Layer, grad_strides: tuple[int, ...], does: Does, config: Configuration) -> None:
        shape, neuron = layer.shape, layer.neuron
        grid = shape.grid(config)
        self.pairs = _pairs(shape, grid.slots) if does.sums else None
        self.norms = (shape.examples, grid.parts) if does.norm else None
        self.leaks = grid.programs if does.grad_tau else None
        numbers = (*shape.numbers(grid, grad_strides), neuron.keep, neuron.gain, neuron.v_threshold)
        numbers = (*numbers, neuron.v_rest, neuron.alpha)
        how = configuration.BackwardHow(shape.cut(grid, layer.steps, layer.repeated), neuron.backward, does)
        constants = {"HOW": how, **config.options}
        self.launch = Launch(kernels.norm_backward_kernel, shape.device, grid.programs, numbers, constants)

    def run(self, x: Tensor, *given: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``given``: gradient of the output, that of x to be written, constants, 1 / tau and coefficients."""
        unused = given[-1]
        sums = None if self.pairs is None else x.new_empty(self.pairs, dtype=torch.float32)
        norm = None if self.norms is None else x.new_empty(self.norms, dtype=torch.float32)
        leak = None if self.leaks is None else x.new_empty(self.leaks, dtype=torch.float32)
        totals = (unused if sums is None else sums, unused if norm is None else norm)
        self.launch(x, *given, *totals, unused if leak is None else leak)
        return sums, norm, leak


# ------------------------------------------------------------------------------------------------- a layer's passes


class Layer:
    """A layer's passes for one shape and layout of x, one neuron and one kind of normalisation.

    Attributes:
        shape: of x.
        steps: T of the output.
        repeated: whether every step has the same x.
        out: makes tensors of the output's shape and layout.
    """

    def __init__(self, x: Tensor, repeat: int | None, neuron: Neuron, kind: NormalisationKind) -> None:
        self.repeated = repeat is not None
        self.shape = Shape.of(x, self.repeated)
        self.steps = self.shape.steps if repeat is None else repeat
        self.neuron, self.kind = neuron, kind
        self.out = Sequence(x.expand(self.steps, *x.shape) if self.repeated else x)
        shape = self.shape
        self._statistics = _prepared("statistics", shape.steps, shape, lambda config: _Statistics(shape, config))
        self._constants: dict[tuple[int, float, float], Launch] = {}  # by slots, eps and momentum
        self._fire: dict[tuple, Prepared[Configuration]] = {}
        self._backward: dict[tuple, Backward] = {}

    def constants(
        self, x: Tensor, norm: Normalisation, weight: Tensor | None, bias: Tensor | None, reciprocal_tau: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """float32 [4, C] for the other kernels, and 1 / tau or its stand-in; updates the running statistics."""
        constants = x.new_empty((4, self.shape.channels), dtype=torch.float32)
        count = partial = constants
        tau = constants if reciprocal_tau is None else reciprocal_tau
        slots, kind = 0, self.kind
        if kind.use_batch:
            count, partial = self._statistics.run(x)
            slots = count.shape[0]
        key = (slots, norm.eps, 0.0 if norm.momentum is None else norm.momentum)
        launch = self._constants.get(key)
        if launch is None:
            launch = keep(self._constants, key, self._constants_launch(*key), MOST_OF_A_LAYER)
        if kind.cumulative and norm.batches is not None:
            norm.batches.add_(1)
        means = constants if norm.running_mean is None else norm.running_mean
        variances = constants if norm.running_var is None else norm.running_var
        batches = norm.batches if kind.update and norm.batches is not None else constants
        affine = (constants if weight is None else weight, constants if bias is None else bias)
        launch(count, partial, means, variances, batches, *affine, tau, constants)
        return constants, tau

    def _constants_launch(self, slots: int, eps: float, momentum: float) -> Launch:
        neuron, kind = self.neuron, self.kind
        numbers = (
            *(self.shape.channels, slots, self.shape.elements, momentum, eps),
            *(neuron.keep, neuron.gain, neuron.v_threshold, neuron.v_rest),
        )
        constants = {"HOW": configuration.ConstantsHow(kind, neuron.learned), **_FINISH}
        programs = triton.cdiv(self.shape.channels, GROUP.value)
        return Launch(kernels.constants_kernel, self.shape.device, programs, numbers, constants)

    def fire(
        self, x: Tensor, constants: Tensor, tau: Tensor, residual: Tensor | None, want_v: bool, want_energy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Output [T, N, C, *], and where wanted the final potential [N, C, *] and partial energies [N, parts].

        ``constants`` and ``tau`` are those that ``constants()`` gave.
        """
        key = (None if residual is None else residual.stride(), want_v, want_energy)
        fire = self._fire.get(key)
        if fire is None:
            ordered = residual if residual is None else self._in_order(residual)
            if ordered is not residual:
                return self.fire(x, constants, tau, ordered, want_v, want_energy)
            wanted = (
                (0, 0) if residual is None else residual.stride()[:2],
                Fires(residual is not None, want_v, want_energy),
            )
            what = (self.shape, self.steps, self.neuron, self.repeated, *wanted)
            fire = _prepared("forward", self.steps, what, lambda config: _Fire(self, *wanted, config))
            keep(self._fire, key, fire, MOST_OF_A_LAYER)
        return fire.run(x, constants, tau, residual)

    def backward(self, grad: Tensor, scored: bool, wants_grad_tau: bool) -> tuple[Backward, Tensor]:
        """The backward pass for a gradient [T, N, C, *] of the output, and that gradient as the pass reads it."""
        key = (grad.stride(), grad.dtype, scored, wants_grad_tau)
        backward = self._backward.get(key)
        if backward is None:
            ordered = self._in_order(grad)
            if ordered is not grad:
                return self.backward(ordered, scored, wants_grad_tau)
            backward = keep(self._backward, key, Backward(self, grad, scored, wants_grad_tau), MOST_OF_A_LAYER)
        return backward, grad

    def _in_order(self, t: Tensor) -> Tensor:
        """t, or a copy of it with the output's layout where its inner strides are others."""
        if has_strides(t, self.out.strides, 2):
            return t
        return t.new_empty_strided(self.out.shape, self.out.strides).copy_(t)


class Backward:
    """The backward pass of a layer for one layout of the incoming gradient.

    Attributes:
        keeps_sums: whether the sums over pixels that weight and bias, or the gradient of tau, need are kept.
        both: whether one kernel does both passes: statistics that are constants need no sums before the gradient.
    """

    def __init__(self, layer: Layer, grad: Tensor, scored: bool, wants_grad_tau: bool) -> None:
        self._layer, self._scored = layer, scored
        self.keeps_sums, self.both = layer.kind.affine or wants_grad_tau, not layer.kind.use_batch
        strides = grad.stride()[:2]
        flow = (layer.steps, layer.neuron, layer.repeated, strides, grad.dtype)

        def prepared(kernel: str, does: Does) -> Prepared[Configuration]:
            key = (layer.shape, *flow, *does)
            return _prepared(kernel, layer.steps, key, lambda config: _Gradients(layer, strides, does, config))

        indirect = layer.kind.use_batch
        first = Does(sums=True, norm=scored, write=self.both, indirect=False, grad_tau=wants_grad_tau)
        second = Does(sums=False, norm=False, write=True, indirect=indirect, grad_tau=False)
        self._first, self._second = prepared("sums", first), prepared("gradient", second)
        self._finish: dict[tuple[int, int, int], Launch] = {}  # by the numbers of partial sums

    def run(
        self,
        x: Tensor,
        grad: Tensor,
        constants: Tensor,
        reciprocal_tau: Tensor | None,
        energy: Tensor | None,
        energies: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gradient of x, those of weight and bias [C] if it ``keeps_sums``, and leaks [programs] where tau wants one.

        Writes ``energies``, from the forward pass's partial ones and its own, where the pass is scored.
        """
        layer = self._layer
        channels = layer.shape.channels
        coefficients = x.new_empty((2, channels), dtype=torch.float32)
        grad_weight = grad_bias = None
        if self.keeps_sums:
            grad_weight = x.new_empty(channels, dtype=torch.float32)
            grad_bias = x.new_empty(channels, dtype=torch.float32)
        out = layer.out
        grad_x = x.new_empty_strided(x.shape, out.strides[1:]) if layer.repeated else out.empty(x, x.dtype)
        tau = constants if reciprocal_tau is None else reciprocal_tau
        given = (grad, grad_x, constants, tau, coefficients)
        sums, norm, leak = self._first.run(x, *given)
        key = (sums.shape[1], 0 if energy is None else energy.shape[1], 0 if norm is None else norm.shape[1])
        finish = self._finish.get(key)
        if finish is None:
            finish = keep(self._finish, key, self._finish_launch(*key), MOST_OF_A_LAYER)
        affine = (constants if grad_weight is None else grad_weight, constants if grad_bias is None else grad_bias)
        parts = (constants if energy is None else energy, constants if norm is None else norm)
        finish(sums, constants, tau, *affine, coefficients, *parts, *(energies or parts))
        if not self.both:
            self._second.run(x, *given)
        return grad_x, grad_weight, grad_bias, leak

    def _finish_launch(self, slots: int, energy_parts: int, norm_parts: int) -> Launch:
        shape, neuron = self._layer.shape, self._layer.neuron
        numbers = (shape.channels, slots, shape.elements, shape.examples, energy_parts, norm_parts, neuron.gain)
        constants = {"HOW": configuration.FinishHow(neuron.learned, self.keeps_sums, self._scored), **_FINISH}
        programs = triton.cdiv(shape.channels, GROUP.value)
        if self._scored:
            programs += triton.cdiv(shape.examples, EXAMPLES.value)
        return Launch(kernels.finish_backward_kernel, shape.device, programs, numbers, constants)


_layers: dict[tuple, Layer] = kept()


def layer_for(x: Tensor, repeat: int | None, neuron: Neuron, kind: NormalisationKind) -> tuple[Layer, Tensor]:
    """The layer's passes for x [T, N, C, *] ([N, C, *] if repeated), and x, or a copy of it, as they read it."""
    key = (x.shape, x.stride(), x.dtype, x.device, repeat, neuron, kind)
    layer = _layers.get(key)
    if layer is None:
        read = as_read(x, repeat is not None)
        if read is not x:
            return layer_for(read, repeat, neuron, kind)
        layer = keep(_layers, key, Layer(x, repeat, neuron, kind), 1024)
    return layer, x


def as_read(x: Tensor, repeated: bool) -> Tensor:
    """x, or a contiguous copy of it where an example's pixels are not in one block, channels first or last."""
    inner = x[0] if repeated else x[0, 0]
    known = inner.is_contiguous() or (inner.ndim > 1 and inner.movedim(0, -1).is_contiguous())
    return x if known else x.contiguous()
