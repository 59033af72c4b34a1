"""Launching the BatchNorm + LIF kernels (batch_norm_lif_kernels.py), and the autograd function made of them.

Reading order: how a tensor is cut into programs, launch configurations, launches (kept for each shape), autograd
function, ``batch_norm_lif`` (what the rest of the package calls).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..dynamics import Dynamics
from .autotune import Choices
from .batch_norm_lif_kernels import (
    GROUP,
    SMALLEST_GAIN,
    _backward_kernel,
    _channel_statistics_kernel,
    _constants_kernel,
    _finish_backward_kernel,
    _forward_kernel,
)
from .launch import Launch, multiprocessors
from .layout import sequence_like, with_inner_order_of

# Steps of a tile are held in registers; longer sequences take the separate operators.
MAX_STEPS = 16


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
    """Launch configuration of a kernel of this file."""

    elements: int  # of a tile, per thread
    warps: int  # of a program
    programs: int  # at a time on one multiprocessor, each with its share of the registers

    def for_tiles_of(self, steps: int, itemsize: int) -> Configuration:
        """Longer sequences and wider values need more registers, so fewer programs fit."""
        elements = self.elements if steps <= 8 else self.elements // 2
        programs = self.programs // (1 if steps <= 4 else 2 if steps <= 8 else 4)
        return replace(self, elements=elements, programs=max(1, programs * 7 // 8 if itemsize == 4 else programs))

    @property
    def options(self) -> dict[str, int | bool]:
        """Of the compiler."""
        registers = _REGISTERS // (32 * self.warps * self.programs)
        return {"num_warps": self.warps, "maxnreg": min(255, registers // 8 * 8), "enable_fp_fusion": False}


_REGISTERS = 65536  # of one multiprocessor

# For tiles of up to 4 steps of half-precision values; chosen on an H100.
STATISTICS = Configuration(elements=8, warps=1, programs=16)
FORWARD = Configuration(elements=8, warps=4, programs=5)
SUMS = Configuration(elements=4, warps=1, programs=24)
GRADIENT = Configuration(elements=4, warps=1, programs=28)
# What an ``autotune`` measures beside the curated one: elements, warps and programs.
_OTHERS = {
    "statistics": ((4, 1, 24), (8, 1, 8), (8, 2, 8), (8, 4, 4), (16, 1, 8)),
    "forward": ((4, 1, 24), (4, 4, 8), (8, 1, 16), (8, 2, 10), (8, 4, 3)),
    "sums": ((2, 1, 32), (4, 1, 16), (4, 2, 12), (4, 4, 6), (8, 1, 12)),
    "gradient": ((2, 1, 32), (4, 1, 20), (4, 2, 14), (4, 4, 7), (8, 1, 14)),
}
# Of the kernels that add partial sums; more or all of them at once, or fewer, take as long.
_FINISH = {"SLOTS": 1024, "CHANNELS": GROUP.value, "num_warps": 8}
_FINISH_EXAMPLES = {"EXAMPLES": 32, "PARTS": 16}

_CHOICES: dict[str, Choices[Configuration]] = {name: Choices(f"BatchNorm + LIF {name}") for name in _OTHERS}


@lru_cache(maxsize=256)
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


@dataclass(frozen=True)
class Normalisation:
    """What a batch normalisation is made of, beside its weight and bias.

    Attributes:
        eps: added to the variance.
        momentum: weight of a batch in the running statistics, None for their plain mean.
        running_mean, running_var: float32 [C], updated in place by a training pass; None: not kept.
        batches: int64, 0-dim, counts the training passes.
        use_batch: whether x is normalised by its own statistics, else by the running ones.
        update: whether this pass updates the running statistics.
    """

    eps: float
    momentum: float | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None
    use_batch: bool
    update: bool


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
    def of(cls, d: Dynamics, surrogate: int, alpha: float) -> Neuron:
        """From the dynamics, and the surrogate's position in ``surrogate.FUSED`` with its steepness."""
        tau = d.constant_tau
        keep = 1.0 if tau is None else 1.0 - 1.0 / tau
        gain = 1.0 / tau if tau is not None and d.decay_input else 1.0
        learned = (d.learned_tau, d.learned_tau and d.decay_input)
        return cls(keep, gain, d.v_threshold, d.v_rest, d.v_reset is None, d.detach_reset, surrogate, alpha, *learned)

    @property
    def learned(self) -> dict[str, bool]:
        """Constants of the kernels that use keep and gain."""
        return {"LEARNED_TAU": self.learned_tau, "LEARNED_GAIN": self.learned_gain}


class _Shape(NamedTuple):
    """x [T, N, C, *] as the kernels see it, and all that their compilation and their grids depend on."""

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
    def of(cls, x: Tensor) -> _Shape:
        steps, examples, channels = x.shape[:3]
        pixels = math.prod(x.shape[3:])
        channels_last = pixels == 1 or x.stride(2) == 1
        return cls(steps, examples, channels, pixels, x.stride(0), x.stride(1), channels_last, x.dtype, x.device)

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


def _pairs(channels: int, slots: int) -> tuple[int, ...]:
    """Shape of the partial sums that _pair addresses."""
    return triton.cdiv(channels, GROUP.value), slots, 2, GROUP.value


def _known_layout(x: Tensor) -> Tensor:
    """x, or a copy of it, with its pixels in one block, channels first or last."""
    inner = x[0, 0]
    if inner.is_contiguous():
        return x
    if x.ndim > 3 and inner.movedim(0, -1).is_contiguous():
        return x
    return x.contiguous()


# A launch depends on all of its arguments here; what is kept is small, and a network has few shapes.


@lru_cache(maxsize=1024)
def _candidates(kernel: str, steps: int, itemsize: int) -> tuple[Configuration, ...]:
    """The curated configuration, and others that an ``autotune`` measures."""
    if kernel == "statistics":  # whose tiles are of one step at a time
        return STATISTICS, *(Configuration(*other) for other in _OTHERS[kernel])
    curated = {"forward": FORWARD, "sums": SUMS, "gradient": GRADIENT}[kernel]
    all_of_them = (curated, *(Configuration(*other) for other in _OTHERS[kernel]))
    return tuple(dict.fromkeys(config.for_tiles_of(steps, itemsize) for config in all_of_them))


def _run(kernel: str, x: Tensor, steps: int, key: tuple, run: Callable[[Configuration], Any]) -> Any:
    """What ``run`` returns in the configuration that is curated, or fastest with its tensors."""
    return run(_CHOICES[kernel](key, x, lambda: _candidates(kernel, steps, x.element_size()), run))


@lru_cache(maxsize=1024)
def _statistics_launch(shape: _Shape, config: Configuration) -> Launch:
    cut = shape.cut(config)
    numbers = shape.cut_numbers(cut)
    constants = {"T": shape.steps, **shape.cut_constants(cut, config)}
    return Launch(_channel_statistics_kernel, shape.device, cut.programs, numbers, constants)


@lru_cache(maxsize=1024)
def _constants_launch(
    shape: _Shape,
    slots: int,
    momentum: float,
    eps: float,
    neuron: Neuron,
    use_batch: bool,
    update: bool,
    cumulative: bool,
    affine: bool,
) -> Launch:
    numbers = (shape.channels, slots, momentum, eps, neuron.keep, neuron.gain, neuron.v_threshold, neuron.v_rest)
    constants = {
        **_FINISH,
        "USE_BATCH": use_batch,
        "UPDATE_RUNNING": update,
        "CUMULATIVE": cumulative,
        "AFFINE": affine,
        **neuron.learned,
        "enable_fp_fusion": False,
    }
    programs = triton.cdiv(shape.channels, _FINISH["CHANNELS"])
    return Launch(_constants_kernel, shape.device, programs, numbers, constants)


@lru_cache(maxsize=1024)
def _forward_launch(
    shape: _Shape,
    config: Configuration,
    steps: int,
    neuron: Neuron,
    repeated: bool,
    residual_strides: tuple[int, ...] | None,
    store_v: bool,
    energy: bool,
) -> Launch:
    cut = shape.cut(config)
    numbers = (
        *shape.cut_numbers(cut, (0, 0) if residual_strides is None else residual_strides[:2]),
        neuron.keep,
        neuron.v_threshold,
        neuron.v_rest,
    )
    constants = {
        "T": steps,
        "X_CONSTANT": repeated,
        "HAS_RESIDUAL": residual_strides is not None,
        "STORE_V": store_v,
        "ENERGY": energy,
        "SOFT_RESET": neuron.soft_reset,
        "LEARNED_TAU": neuron.learned_tau,
        **shape.cut_constants(cut, config),
    }
    return Launch(_forward_kernel, shape.device, cut.programs, numbers, constants)


@lru_cache(maxsize=1024)
def _backward_launch(
    shape: _Shape,
    config: Configuration,
    steps: int,
    neuron: Neuron,
    repeated: bool,
    grad_strides: tuple[int, ...],
    grad_dtype: torch.dtype,
    sums: bool,
    norm: bool,
    write: bool,
    grad_tau: bool,
    batch_statistics: bool,
) -> Launch:
    cut = shape.cut(config)
    numbers = (
        *shape.cut_numbers(cut, grad_strides[:2]),
        neuron.keep,
        neuron.gain,
        neuron.v_threshold,
        neuron.v_rest,
        neuron.alpha,
    )
    constants = {
        "T": steps,
        "X_CONSTANT": repeated,
        "REVERSED": sums,
        "SUM": sums,
        "NORM": norm,
        "WRITE": write,
        "BATCH_STATISTICS": batch_statistics,
        "SOFT_RESET": neuron.soft_reset,
        "DETACH_RESET": neuron.detach_reset,
        "SURROGATE": neuron.surrogate,
        "GRAD_TAU": grad_tau,
        **neuron.learned,
        **shape.cut_constants(cut, config),
    }
    return Launch(_backward_kernel, shape.device, cut.programs, numbers, constants)


@lru_cache(maxsize=1024)
def _finish_backward_launch(
    shape: _Shape, slots: int, energy_parts: int, norm_parts: int, neuron: Neuron, affine: bool, norm: bool
) -> Launch:
    elements = shape.steps * shape.examples * shape.pixels
    numbers = (shape.channels, slots, elements, shape.examples, energy_parts, norm_parts, neuron.gain)
    constants = {
        **_FINISH,
        **_FINISH_EXAMPLES,
        "AFFINE": affine,
        "NORM": norm,
        **neuron.learned,
        "enable_fp_fusion": False,
    }
    programs = triton.cdiv(shape.channels, _FINISH["CHANNELS"])
    if norm:
        programs += triton.cdiv(shape.examples, _FINISH_EXAMPLES["EXAMPLES"])
    return Launch(_finish_backward_kernel, shape.device, programs, numbers, constants)


def _constants(
    x: Tensor,
    shape: _Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    reciprocal_tau: Tensor | None,
    norm: Normalisation,
    neuron: Neuron,
) -> Tensor:
    """float32 [4, C] for the other kernels; updates the running statistics."""
    constants = x.new_empty((4, shape.channels), dtype=torch.float32)
    count = partial = constants
    slots = 0
    if norm.use_batch:

        def run(config: Configuration) -> tuple[Tensor, Tensor]:
            """Of each program: how many values of a channel it saw, [slots], and their statistics."""
            slots = shape.cut(config).slots
            count = x.new_empty(slots, dtype=torch.float32)
            partial = x.new_empty(_pairs(shape.channels, slots), dtype=torch.float32)
            _statistics_launch(shape, config)(x, count, partial)
            return count, partial

        count, partial = _run("statistics", x, shape.steps, shape, run)
        slots = len(count)
    update = norm.use_batch and norm.update and norm.running_mean is not None
    cumulative = update and norm.momentum is None
    if cumulative and norm.batches is not None:
        norm.batches.add_(1)
    absent = constants
    _constants_launch(
        shape,
        slots,
        0.0 if norm.momentum is None else norm.momentum,
        norm.eps,
        neuron,
        norm.use_batch,
        update,
        cumulative,
        weight is not None,
    )(
        count,
        partial,
        absent if norm.running_mean is None else norm.running_mean,
        absent if norm.running_var is None else norm.running_var,
        norm.batches if update and norm.batches is not None else absent,
        absent if weight is None else weight,
        absent if bias is None else bias,
        absent if reciprocal_tau is None else reciprocal_tau,
        constants,
    )
    return constants


def _normalise_and_fire(
    x: Tensor,
    shape: _Shape,
    constants: Tensor,
    reciprocal_tau: Tensor | None,
    residual: Tensor | None,
    neuron: Neuron,
    repeat: int | None,
    want_v: bool,
    want_energy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, N, C, *], final potential [N, C, *] and partial energies [N, parts] (both empty if not wanted)."""
    steps = shape.steps if repeat is None else repeat
    whole = x.expand(steps, *x.shape[1:])
    strides = None
    if residual is not None:
        residual = with_inner_order_of(whole, residual)
        strides = residual.stride()[:2]
    wanted = (steps, neuron, repeat is not None, strides, want_v, want_energy)

    def run(config: Configuration) -> tuple[Tensor, Tensor, Tensor]:
        out = sequence_like(whole, x.dtype)
        v = x.new_empty_strided(x.shape[1:], out.stride()[1:], dtype=torch.float32) if want_v else x.new_empty(0)
        parts = shape.cut(config).parts
        energy = x.new_empty((shape.examples, parts) if want_energy else (0, 0), dtype=torch.float32)
        launch = _forward_launch(shape, config, *wanted)
        absent = constants
        launch(
            x,
            out if residual is None else residual,
            out,
            v if want_v else absent,
            constants,
            absent if reciprocal_tau is None else reciprocal_tau,
            energy,
        )
        return out, v, energy

    return _run("forward", x, steps, (shape, *wanted), run)


class _BatchNormLIF(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        reciprocal_tau: Tensor | None,
        norm: Normalisation,
        neuron: Neuron,
        repeat: int | None,
        want_v: bool,
        energies: tuple[Tensor, Tensor] | None,
    ):
        x = _known_layout(x if repeat is None else x.unsqueeze(0))
        shape = _Shape.of(x)
        constants = _constants(x, shape, weight, bias, reciprocal_tau, norm, neuron)
        out, v, energy = _normalise_and_fire(
            x, shape, constants, reciprocal_tau, residual, neuron, repeat, want_v, energies is not None
        )
        driven = neuron.learned_gain and ctx.needs_input_grad[4]  # else the constants have all that is needed
        affine = (weight, bias) if driven else (None, None)
        ctx.save_for_backward(x, constants, energy, reciprocal_tau, *affine)
        ctx.shape, ctx.neuron, ctx.repeat, ctx.energies = shape, neuron, repeat, energies
        ctx.use_batch, ctx.affine = norm.use_batch, weight is not None
        ctx.mark_non_differentiable(v, constants)
        ctx.set_materialize_grads(False)
        return out, v, constants

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused neuron has no second derivative: call backward() without create_graph=True, or set the "
                "node's backend='torch'"
            )
        if grad_out is None:
            return (None,) * 10
        x, constants, energy, reciprocal_tau, weight, bias = ctx.saved_tensors
        shape, neuron, energies, repeated = ctx.shape, ctx.neuron, ctx.energies, ctx.repeat is not None
        wants_grad_tau = ctx.needs_input_grad[4]
        steps = grad_out.shape[0]
        grad = with_inner_order_of(x.expand(steps, *x.shape[1:]), grad_out)
        finished = x.new_empty((4, shape.channels), dtype=torch.float32)
        grad_weight, grad_bias, coefficients = finished[0], finished[1], finished[2:]
        grad_x = sequence_like(x, x.dtype)
        scored = energies is not None
        flow = (steps, neuron, repeated, grad.stride()[:2], grad.dtype)
        absent = finished
        tau = absent if reciprocal_tau is None else reciprocal_tau

        # Statistics that are constants need no sums before the gradient can be written.
        first = (*flow, True, scored, not ctx.use_batch, wants_grad_tau, ctx.use_batch)
        second = (*flow, False, False, True, False, ctx.use_batch)

        def run_first(config: Configuration) -> tuple[Tensor, Tensor, Tensor]:
            """The programs' sums of each channel, squared norms of each example [N, parts] and leaks [programs]."""
            cut = shape.cut(config)
            sums = x.new_empty(_pairs(shape.channels, cut.slots), dtype=torch.float32)
            norm = x.new_empty((shape.examples, cut.parts) if scored else (0, 0), dtype=torch.float32)
            leak = x.new_empty(cut.programs, dtype=torch.float32) if wants_grad_tau else absent
            launch = _backward_launch(shape, config, *first)
            launch(x, grad, grad_x, constants, tau, coefficients, sums, norm, leak)
            return sums, norm, leak

        def run_second(config: Configuration) -> None:
            launch = _backward_launch(shape, config, *second)
            launch(x, grad, grad_x, constants, tau, coefficients, absent, absent, absent)

        sums, norm, leak = _run("sums", x, steps, (shape, *first), run_first)
        energy_out, norm_out = energies if energies is not None else (absent, absent)
        slots, parts = sums.shape[1], norm.shape[1]
        stored = ctx.affine or wants_grad_tau
        _finish_backward_launch(shape, slots, energy.shape[1], parts, neuron, stored, scored)(
            sums, constants, tau, grad_weight, grad_bias, coefficients, energy, norm, energy_out, norm_out
        )
        if ctx.use_batch:
            _run("gradient", x, steps, (shape, *second), run_second)
        grad_tau = None
        if wants_grad_tau:
            grad_tau = leak.sum()
            if neuron.learned_gain:  # the normalised input's part; its gradients have the factor 1 / tau already
                driven = grad_weight if weight is None else grad_weight * weight + grad_bias * bias
                grad_tau += driven.sum() / reciprocal_tau.clamp(min=SMALLEST_GAIN.value)
        return (
            grad_x[0] if repeated else grad_x,
            grad if ctx.needs_input_grad[1] else None,
            grad_weight if ctx.affine else None,
            grad_bias if ctx.affine else None,
            grad_tau,
            *([None] * 5),
        )


def batch_norm_lif(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Normalisation,
    neuron: Neuron,
    *,
    reciprocal_tau: Tensor | None = None,
    repeat: int | None = None,
    want_v: bool = False,
    energies: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Batch normalisation, T steps of integrate-and-fire from rest, and a residual sum, differentiably.

    Args:
        x: [T, N, C, *], or [N, C, *] with ``repeat``; float32, float16 or bfloat16; at least one element.
        residual: added to the spikes, shape and dtype of the output, or None.
        weight, bias: float32 [C], both or neither.
        reciprocal_tau: 1 / tau of a neuron with ``learned_tau``, float32, 0-dim.
        repeat: T, where every step has the same x (direct coding).
        want_v: whether to write the final membrane potential in the same pass.
        energies: two float32 [N], both written in the backward pass: the squared norm of each example's output, and
            that of its gradient with respect to x with the normalisation's statistics held constant, each summed over
            time.

    Returns:
        spikes (+ residual) [T, N, C, *] in x's dtype, and what gives the final potential, float32 [N, C, *], without a
        graph; where it was not wanted, it is computed when asked for, from x.
    """
    tensors = (x, residual, weight, bias, reciprocal_tau)
    out, v, constants = _BatchNormLIF.apply(*tensors, norm, neuron, repeat, want_v, energies)
    if want_v:
        return out, lambda: v
    x = x.detach()
    tau = None if reciprocal_tau is None else reciprocal_tau.detach()
    version = None if x.is_inference() else x._version  # a tensor of inference mode counts no changes

    def potential() -> Tensor:
        if version is not None and x._version != version:
            raise RuntimeError(
                "the input of a BatchNorm + LIF layer was changed in place before its potential v was read; read v "
                "first, or do not change the input in place"
            )
        dense = _known_layout(x if repeat is None else x.unsqueeze(0))
        return _normalise_and_fire(dense, _Shape.of(dense), constants, tau, None, neuron, repeat, True, False)[1]

    return out, potential
