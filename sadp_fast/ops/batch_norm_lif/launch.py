"""Launching the BatchNorm + LIF kernels (batch_norm_lif_kernels.py).

Reading order: how a tensor is cut into programs, launch configurations, what a layer is made of, one kernel of one
shape (``_Stage`` and what it prepares), ``Layer`` and ``Backward`` (a layer's passes for one shape, layout and neuron),
and ``layer_for``, which keeps them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor

from ..common.autotune import Choices, at_the_start
from ..common.dynamics import Dynamics
from ..common.launch import Launch, keep, multiprocessors
from ..common.layout import Sequence, has_strides
from .kernels import (
    GROUP,
    SMALLEST_GAIN,
    _backward_kernel,
    _channel_statistics_kernel,
    _constants_kernel,
    _finish_backward_kernel,
    _forward_kernel,
)
from .reference import Normalisation

# Steps of a tile are held in registers; longer sequences take the separate operators.
MAX_STEPS = 16
# Launches of one kind that a layer keeps: by its gradient's layout, its momentum, ...
MOST_OF_A_LAYER = 64

# --------------------------------------------------------------------------------------------- cuts, configurations


@dataclass(frozen=True)
class _Cut:
    """How a tensor [T, N, C, pixels] is cut into tiles and programs."""

    rows: int
    columns: int
    tiles: int  # of one example and block of channels
    channel_blocks: int
    team: int  # programs that share an example, each with every team-th tile of it
    teams: int  # the t-th of them has the examples t, t + teams, ...
    masked: bool  # whether some tile lies partly outside

    @property
    def slots(self) -> int:
        """Programs that share a channel: as many partial sums."""
        return self.team * self.teams

    @property
    def parts(self) -> int:
        """Partial sums of one example."""
        return self.channel_blocks * self.team

    @property
    def programs(self) -> int:
        return self.slots * self.channel_blocks


@dataclass(frozen=True)
class Configuration:
    """Launch configuration of a kernel."""

    elements: int  # of a tile, per thread
    warps: int  # of a program
    programs: int  # at a time on one multiprocessor, each with its share of the registers

    def for_tiles_of(self, steps: int, itemsize: int) -> Configuration:
        """Longer sequences and wider values need more registers, so fewer programs fit."""
        elements = self.elements if steps <= 8 else self.elements // 2
        programs = self.programs // (1 if steps <= 4 else 2 if steps <= 8 else 4)
        if steps > 4:
            programs = min(programs, _REGISTERS // (32 * self.warps * 144))  # with fewer registers eight steps spill
        return replace(self, elements=elements, programs=max(1, programs * 7 // 8 if itemsize == 4 else programs))

    @property
    def options(self) -> dict[str, int | bool]:
        """Of the compiler."""
        registers = _REGISTERS // (32 * self.warps * self.programs)
        return {"num_warps": self.warps, "maxnreg": min(255, registers // 8 * 8), "enable_fp_fusion": False}


_REGISTERS = 65536  # of one multiprocessor

# For tiles of up to 4 steps of half-precision values; chosen on an H100.
STATISTICS = Configuration(elements=16, warps=1, programs=16)
FORWARD = Configuration(elements=8, warps=4, programs=5)
SUMS = Configuration(elements=4, warps=1, programs=24)
GRADIENT = Configuration(elements=4, warps=1, programs=32)
# What an ``autotune`` measures beside the curated one: elements, warps and programs.
_OTHERS = {
    "statistics": ((8, 1, 16), (8, 1, 24), (8, 4, 4), (16, 1, 12), (32, 1, 12)),
    "forward": ((4, 1, 24), (8, 1, 16), (8, 2, 10), (8, 4, 6), (8, 8, 3)),
    "sums": ((2, 1, 32), (4, 1, 28), (4, 2, 12), (4, 4, 6), (8, 1, 12)),
    "gradient": ((2, 1, 32), (4, 1, 28), (4, 2, 16), (4, 8, 4), (8, 1, 14)),
}
# Of the kernels that add partial sums; more or all of them at once, or fewer, take as long.
_FINISH = {"SLOTS": 1024, "CHANNELS": GROUP.value, "num_warps": 8}
_FINISH_EXAMPLES = {"EXAMPLES": 32, "PARTS": 16}

_CHOICES: dict[str, Choices[Configuration]] = {name: Choices(f"BatchNorm + LIF {name}") for name in _OTHERS}


@functools.lru_cache(maxsize=256)
def _cut(
    examples: int, channels: int, pixels: int, channels_last: bool, config: Configuration, processors: int
) -> _Cut:
    tile = 32 * config.warps * config.elements
    inner, outer = (channels, pixels) if channels_last else (pixels, channels)
    columns = min(triton.next_power_of_2(inner), 128 if channels_last else 256, tile)
    rows = min(triton.next_power_of_2(outer), max(1, tile // columns))
    tile_pixels, tile_channels = (rows, columns) if channels_last else (columns, rows)
    tiles = triton.cdiv(pixels, tile_pixels)
    channel_blocks = triton.cdiv(channels, tile_channels)
    team, teams = _teams(examples, tiles, max(1, config.programs * processors // channel_blocks))
    return _Cut(
        rows,
        columns,
        tiles,
        channel_blocks,
        team,
        teams,
        masked=pixels % tile_pixels != 0 or channels % tile_channels != 0,
    )


def _teams(examples: int, tiles: int, programs: int) -> tuple[int, int]:
    """Size and number of teams of at most ``programs`` in all: the slowest program should not have much to do.

    Of those with the least, the smallest: a sum per example then takes few partial sums.
    """
    each = {}  # tiles of an example and examples that a program of a team of this size has at most
    for size in range(1, min(tiles, programs) + 1):
        each[size] = triton.cdiv(tiles, size), triton.cdiv(examples, min(examples, programs // size))
    least = min(math.prod(pair) for pair in each.values())
    tiles_each, examples_each = next(pair for pair in each.values() if math.prod(pair) == least)
    return triton.cdiv(tiles, tiles_each), triton.cdiv(examples, examples_each)


def _candidates(kernel: str, steps: int, itemsize: int) -> tuple[Configuration, ...]:
    """The curated configuration, and others that an ``autotune`` measures."""
    if kernel == "statistics":  # whose tiles are of one step at a time
        return STATISTICS, *(Configuration(*other) for other in _OTHERS[kernel])
    curated = {"forward": FORWARD, "sums": SUMS, "gradient": GRADIENT}[kernel]
    all_of_them = (curated, *(Configuration(*other) for other in _OTHERS[kernel]))
    return tuple(dict.fromkeys(config.for_tiles_of(steps, itemsize) for config in all_of_them))


# ------------------------------------------------------------------------------------------ what a layer is made of


class NormalisationKind(NamedTuple):
    """What a normalisation's kernels are compiled for."""

    use_batch: bool
    update: bool
    cumulative: bool
    affine: bool

    @classmethod
    def of(cls, norm: Normalisation, affine: bool) -> NormalisationKind:
        update = norm.use_batch and norm.update and norm.running_mean is not None
        return cls(norm.use_batch, update, update and norm.momentum is None, affine)


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
    def learned(self) -> dict[str, bool]:
        """Constants of the kernels that use keep and gain."""
        return {"LEARNED_TAU": self.learned_tau, "LEARNED_GAIN": self.learned_gain}


class Shape(NamedTuple):
    """x [T, N, C, *] as the kernels see it (T = 1 where all steps have one input), and all that their compilation and
    their grids depend on."""

    steps: int
    examples: int
    channels: int
    pixels: int
    stride_t: int
    stride_n: int
    channels_last: bool
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor, repeated: bool) -> Shape:
        """Of an x [T, N, C, *], or [N, C, *] if it is repeated."""
        x = x.unsqueeze(0) if repeated else x
        steps, examples, channels, *rest = x.shape
        pixels = math.prod(rest)
        channels_last = pixels == 1 or x.stride(2) == 1
        return cls(steps, examples, channels, pixels, x.stride(0), x.stride(1), channels_last, x.dtype, x.device)

    @property
    def elements(self) -> int:
        """Of one channel."""
        return self.steps * self.examples * self.pixels

    def cut(self, config: Configuration) -> _Cut:
        processors = max(1, multiprocessors(self.device))
        return _cut(self.examples, self.channels, self.pixels, self.channels_last, config, processors)

    def cut_numbers(self, cut: _Cut, other_strides: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The numbers that every kernel over tiles begins with; the strides are those of its second tensor."""
        sizes = (self.examples, self.channels, self.pixels, self.stride_t, self.stride_n)
        return (*sizes, *other_strides, cut.channel_blocks, cut.tiles, cut.team, cut.teams)

    def cut_constants(self, cut: _Cut, config: Configuration) -> dict[str, Any]:
        return {
            "ROWS": cut.rows,
            "COLUMNS": cut.columns,
            "CHANNELS_LAST": self.channels_last,
            "MASKED": cut.masked,
            **config.options,
        }

    def pairs(self, slots: int) -> tuple[int, ...]:
        """Shape of the partial sums that _pair addresses."""
        return triton.cdiv(self.channels, GROUP.value), slots, 2, GROUP.value


# ----------------------------------------------------------------------------------------- one kernel of one shape


class _Prepared(Protocol):
    def __call__(self, x: Tensor, *tensors: Any) -> Any: ...


class _Stage:
    """A kernel of one shape, in the configuration that its first run chooses: the curated one or ``autotune``'s."""

    __slots__ = ("_kernel", "_key", "_prepare", "_prepared", "_steps")

    def __init__(self, kernel: str, steps: int, key: Hashable, prepare: Callable[[Configuration], _Prepared]) -> None:
        self._kernel, self._steps, self._key, self._prepare = kernel, steps, key, prepare
        self._prepared: Any = None

    def __call__(self, x: Tensor, *tensors: Any) -> Any:
        if self._prepared is None:
            prepare = functools.cache(self._prepare)
            config = _CHOICES[self._kernel](
                self._key,
                x,
                lambda: _candidates(self._kernel, self._steps, x.element_size()),
                lambda config: prepare(config)(x, *tensors),
            )
            self._prepared = prepare(config)
        return self._prepared(x, *tensors)


class _Statistics:
    """Of each program: how many values of a channel it saw, [slots], and their statistics, as ``Shape.pairs``."""

    def __init__(self, shape: Shape, config: Configuration) -> None:
        cut = shape.cut(config)
        self.slots, self.pairs = cut.slots, shape.pairs(cut.slots)
        constants = {"T": shape.steps, **shape.cut_constants(cut, config)}
        numbers = shape.cut_numbers(cut)
        self.launch = Launch(_channel_statistics_kernel, shape.device, cut.programs, numbers, constants)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count = x.new_empty(self.slots, dtype=torch.float32)
        partial = x.new_empty(self.pairs, dtype=torch.float32)
        self.launch(x, count, partial)
        return count, partial


class _Fire:
    """Output, final potential and partial energies [N, parts], the last two where they are wanted."""

    def __init__(
        self,
        layer: Layer,
        residual_strides: tuple[int, ...] | None,
        want_v: bool,
        want_energy: bool,
        config: Configuration,
    ) -> None:
        shape, neuron = layer.shape, layer.neuron
        cut = shape.cut(config)
        self.out, self.repeated, self.want_v = layer.out, layer.repeated, want_v
        self.energies = (shape.examples, cut.parts) if want_energy else None
        numbers = (
            *shape.cut_numbers(cut, (0, 0) if residual_strides is None else residual_strides),
            neuron.keep,
            neuron.v_threshold,
            neuron.v_rest,
        )
        constants = {
            "T": layer.steps,
            "X_CONSTANT": layer.repeated,
            "HAS_RESIDUAL": residual_strides is not None,
            "STORE_V": want_v,
            "ENERGY": want_energy,
            "SOFT_RESET": neuron.soft_reset,
            "LEARNED_TAU": neuron.learned_tau,
            **shape.cut_constants(cut, config),
        }
        self.launch = Launch(_forward_kernel, shape.device, cut.programs, numbers, constants)

    def __call__(
        self, x: Tensor, constants: Tensor, reciprocal_tau: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        like = self.out
        out = x.new_empty_strided(like.shape, like.strides) if self.repeated else like.empty(x, x.dtype)
        v = energy = None
        if self.want_v:
            v = x.new_empty_strided(like.shape[1:], like.strides[1:], dtype=torch.float32)
        if self.energies is not None:
            energy = x.new_empty(self.energies, dtype=torch.float32)
        self.launch(
            x,
            out if residual is None else residual,
            out,
            constants if v is None else v,
            constants,
            constants if reciprocal_tau is None else reciprocal_tau,
            constants if energy is None else energy,
        )
        return out, v, energy


class Does(NamedTuple):
    """What a pass of the backward kernel does."""

    sums: bool  # of each channel, for the gradients of weight and bias and for the second pass
    norm: bool  # of each example's gradient, squared
    write: bool  # the gradient of x
    grad_tau: bool


class _Gradients:
    """The backward kernel, as its first pass, its second, or both in one where the statistics are constants.

    Returns the programs' sums of each channel as ``Shape.pairs``, squared norms of each example [N, parts] and leaks
    [programs], as far as this pass takes them.
    """

    def __init__(
        self,
        layer: Layer,
        grad_strides: tuple[int, ...],
        does: Does,
        config: Configuration,
    ) -> None:
        shape, neuron = layer.shape, layer.neuron
        cut = shape.cut(config)
        self.pairs = shape.pairs(cut.slots) if does.sums else None
        self.norms = (shape.examples, cut.parts) if does.norm else None
        self.leaks = cut.programs if does.grad_tau else None
        numbers = (
            *shape.cut_numbers(cut, grad_strides),
            neuron.keep,
            neuron.gain,
            neuron.v_threshold,
            neuron.v_rest,
            neuron.alpha,
        )
        constants = {
            "T": layer.steps,
            "X_CONSTANT": layer.repeated,
            "REVERSED": does.sums,
            "SUM": does.sums,
            "NORM": does.norm,
            "WRITE": does.write,
            "BATCH_STATISTICS": layer.kind.use_batch,
            "SOFT_RESET": neuron.soft_reset,
            "DETACH_RESET": neuron.detach_reset,
            "SURROGATE": neuron.surrogate,
            "GRAD_TAU": does.grad_tau,
            **neuron.learned,
            **shape.cut_constants(cut, config),
        }
        self.launch = Launch(_backward_kernel, shape.device, cut.programs, numbers, constants)

    def __call__(
        self,
        x: Tensor,
        grad: Tensor,
        grad_x: Tensor,
        constants: Tensor,
        reciprocal_tau: Tensor | None,
        coefficients: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        sums = None if self.pairs is None else x.new_empty(self.pairs, dtype=torch.float32)
        norm = None if self.norms is None else x.new_empty(self.norms, dtype=torch.float32)
        leak = None if self.leaks is None else x.new_empty(self.leaks, dtype=torch.float32)
        self.launch(
            x,
            grad,
            grad_x,
            constants,
            constants if reciprocal_tau is None else reciprocal_tau,
            coefficients,
            constants if sums is None else sums,
            constants if norm is None else norm,
            constants if leak is None else leak,
        )
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
        self._statistics = _Stage(
            "statistics", self.shape.steps, self.shape, lambda config: _Statistics(self.shape, config)
        )
        self._constants: dict[tuple[int, float, float], Launch] = {}  # by slots, eps and momentum
        self._fire: dict[tuple, _Stage | None] = {}
        self._backward: dict[tuple, Backward | None] = {}

    def constants(
        self,
        x: Tensor,
        norm: Normalisation,
        weight: Tensor | None,
        bias: Tensor | None,
        reciprocal_tau: Tensor | None,
    ) -> Tensor:
        """float32 [4, C] for the other kernels; updates the running statistics."""
        constants = x.new_empty((4, self.shape.channels), dtype=torch.float32)
        count = partial = constants
        slots, kind = 0, self.kind
        if kind.use_batch:
            count, partial = self._statistics(x)
            slots = count.shape[0]
        key = (slots, norm.eps, 0.0 if norm.momentum is None else norm.momentum)
        launch = self._constants.get(key)
        if launch is None:
            launch = keep(self._constants, key, self._constants_launch(*key), MOST_OF_A_LAYER)
        if kind.cumulative and norm.batches is not None:
            norm.batches.add_(1)
        launch(
            count,
            partial,
            constants if norm.running_mean is None else norm.running_mean,
            constants if norm.running_var is None else norm.running_var,
            norm.batches if kind.update and norm.batches is not None else constants,
            constants if weight is None else weight,
            constants if bias is None else bias,
            constants if reciprocal_tau is None else reciprocal_tau,
            constants,
        )
        return constants

    def _constants_launch(self, slots: int, eps: float, momentum: float) -> Launch:
        neuron, kind = self.neuron, self.kind
        numbers = (
            *(self.shape.channels, slots, self.shape.elements, momentum, eps),
            *(neuron.keep, neuron.gain, neuron.v_threshold, neuron.v_rest),
        )
        constants = {
            **_FINISH,
            "USE_BATCH": kind.use_batch,
            "UPDATE_RUNNING": kind.update,
            "CUMULATIVE": kind.cumulative,
            "AFFINE": kind.affine,
            **neuron.learned,
            "enable_fp_fusion": False,
        }
        programs = triton.cdiv(self.shape.channels, _FINISH["CHANNELS"])
        return Launch(_constants_kernel, self.shape.device, programs, numbers, constants)

    def fire(
        self,
        x: Tensor,
        constants: Tensor,
        reciprocal_tau: Tensor | None,
        residual: Tensor | None,
        want_v: bool,
        want_energy: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Output [T, N, C, *], and where wanted the final potential [N, C, *] and partial energies [N, parts]."""
        key = (None if residual is None else residual.stride(), want_v, want_energy)
        try:
            stage = self._fire[key]
        except KeyError:
            stage = None
            if residual is None or self._has_inner_order(residual):
                strides = None if residual is None else residual.stride()[:2]
                wanted = (strides, want_v, want_energy)
                stage = _Stage(
                    "forward",
                    self.steps,
                    (self.shape, self.steps, self.neuron, self.repeated, *wanted),
                    lambda config: _Fire(self, *wanted, config),
                )
            keep(self._fire, key, stage, MOST_OF_A_LAYER)
        if stage is None:
            assert residual is not None
            return self.fire(x, constants, reciprocal_tau, self._in_order(residual), want_v, want_energy)
        return stage(x, constants, reciprocal_tau, residual)

    def backward(self, grad: Tensor, scored: bool, wants_grad_tau: bool) -> tuple[Backward, Tensor]:
        """The backward pass for a gradient [T, N, C, *] of the output, and that gradient as the pass reads it."""
        key = (grad.stride(), grad.dtype, scored, wants_grad_tau)
        try:
            backward = self._backward[key]
        except KeyError:
            backward = None
            if self._has_inner_order(grad):
                backward = Backward(self, grad, scored, wants_grad_tau)
            keep(self._backward, key, backward, MOST_OF_A_LAYER)
        if backward is None:
            return self.backward(self._in_order(grad), scored, wants_grad_tau)
        return backward, grad

    def _has_inner_order(self, t: Tensor) -> bool:
        return has_strides(t, self.out.strides, 2)

    def _in_order(self, t: Tensor) -> Tensor:
        """A copy of t with the output's layout."""
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

        def stage(kernel: str, does: Does) -> _Stage:
            key = (layer.shape, *flow, *does, layer.kind.use_batch)
            return _Stage(kernel, layer.steps, key, lambda config: _Gradients(layer, strides, does, config))

        self._first = stage("sums", Does(sums=True, norm=scored, write=self.both, grad_tau=wants_grad_tau))
        self._second = stage("gradient", Does(sums=False, norm=False, write=True, grad_tau=False))
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
        given = (grad, grad_x, constants, reciprocal_tau, coefficients)
        sums, norm, leak = self._first(x, *given)
        key = (sums.shape[1], 0 if energy is None else energy.shape[1], 0 if norm is None else norm.shape[1])
        finish = self._finish.get(key)
        if finish is None:
            finish = keep(self._finish, key, self._finish_launch(*key), MOST_OF_A_LAYER)
        energy_out, norm_out = (constants, constants) if energies is None else energies
        finish(
            sums,
            constants,
            constants if reciprocal_tau is None else reciprocal_tau,
            constants if grad_weight is None else grad_weight,
            constants if grad_bias is None else grad_bias,
            coefficients,
            constants if energy is None else energy,
            constants if norm is None else norm,
            energy_out,
            norm_out,
        )
        if not self.both:
            self._second(x, *given)
        return grad_x, grad_weight, grad_bias, leak

    def _finish_launch(self, slots: int, energy_parts: int, norm_parts: int) -> Launch:
        shape, neuron = self._layer.shape, self._layer.neuron
        numbers = (shape.channels, slots, shape.elements, shape.examples, energy_parts, norm_parts, neuron.gain)
        constants = {
            **_FINISH,
            **_FINISH_EXAMPLES,
            "AFFINE": self.keeps_sums,
            "NORM": self._scored,
            **neuron.learned,
            "enable_fp_fusion": False,
        }
        programs = triton.cdiv(shape.channels, _FINISH["CHANNELS"])
        if self._scored:
            programs += triton.cdiv(shape.examples, _FINISH_EXAMPLES["EXAMPLES"])
        return Launch(_finish_backward_kernel, shape.device, programs, numbers, constants)


# By what they are prepared for; None where x has to be rearranged first. Emptied when there are very many, and when an
# ``autotune`` begins.
_layers: dict[tuple, Layer | None] = {}


@at_the_start
def _forget_layers() -> None:
    _layers.clear()


def layer_for(x: Tensor, repeat: int | None, neuron: Neuron, kind: NormalisationKind) -> tuple[Layer, Tensor]:
    """The layer's passes for x [T, N, C, *] ([N, C, *] if repeated), and x, or a copy of it, as they read it."""
    key = (x.shape, x.stride(), x.dtype, x.device, repeat, neuron, kind)
    try:
        layer = _layers[key]
    except KeyError:
        layer = Layer(x, repeat, neuron, kind) if _has_known_layout(x, repeat is not None) else None
        keep(_layers, key, layer, 1024)
    if layer is None:
        return layer_for(x.contiguous(), repeat, neuron, kind)
    return layer, x


def as_read(x: Tensor, repeated: bool) -> Tensor:
    """x, or the copy of it that ``layer_for`` gives."""
    return x if _has_known_layout(x, repeated) else x.contiguous()


def _has_known_layout(x: Tensor, repeated: bool) -> bool:
    """Whether the pixels of each example are in one block, channels first or last."""
    inner = x[0] if repeated else x[0, 0]
    return inner.is_contiguous() or (inner.ndim > 1 and inner.movedim(0, -1).is_contiguous())
