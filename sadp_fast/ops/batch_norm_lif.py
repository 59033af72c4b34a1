"""Batch normalisation and multi-step integrate-and-fire as one operator: y = norm(x), spikes = LIF(y) (+ residual).

Bytes moved, in elements of x: forward 3 (x for the channel statistics; x again, spikes out), backward 5 (x and the
gradient of the spikes, twice; gradient of x out). Nothing is saved but x and two numbers a channel: each backward pass
normalises and fires again in registers, the first one for the sums that the gradient of a normalisation needs, the
second one for the gradient itself. A residual is read once and added to the spikes as they are written.

How the work is cut. x [T, N, C, *] is a matrix of channels and pixels for each step and example. A program owns a block
of channels, a run of pixels and a few examples; it walks over them tile by tile, all T steps of a tile in registers.
Sums over pixels stay in registers until the program ends, and leave as one partial sum per channel and program; a small
kernel adds these in a fixed order. Sums per example (spikes, squared gradient norms) leave likewise. So nothing is
atomic, and every result is the same in every run. Consecutive kernels walk in opposite directions: what the one has
touched last, the next finds in the cache.

Loops over run-time bounds are `while` loops: Triton's interpreter cannot take a tensor as the bound of a range().

The membrane is float32. All kernels compute it by the same operations without contraction, so the backward passes see
exactly the spikes that the forward pass wrote.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dynamics import Dynamics
from .equations import surrogate_gradient
from .launch import Launch, await_previous_kernel, early_launch
from .layout import sequence_like, with_inner_order_of

# Steps of a tile are held in registers; longer sequences take the separate operators.
MAX_STEPS = 16


# ----------------------------------------------------------------------------------------------- parts of the kernels


@triton.jit
def _load(pointer, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(pointer).to(tl.float32)


@triton.jit
def _store(pointer, value, mask, MASKED: tl.constexpr):
    value = value.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer, value, mask=mask)
    else:
        tl.store(pointer, value)


@triton.jit
def _per_channel(pointer, channel, channels, MASKED: tl.constexpr):
    """One number a channel, laid along the tile."""
    if MASKED:
        return tl.load(pointer + channel, mask=channel < channels, other=0.0)
    else:
        return tl.load(pointer + channel)


@triton.jit
def _add_pairs(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit
def _sums_over_pixels(a, b, CHANNELS_LAST: tl.constexpr):
    """Sums of two tiles for each channel, by one exchange between the threads."""
    return tl.reduce((a, b), 0 if CHANNELS_LAST else 1, _add_pairs)


@triton.jit
def _block_channels(block, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Channel numbers of a block."""
    if CHANNELS_LAST:
        return block * COLUMNS + tl.arange(0, COLUMNS)
    else:
        return block * ROWS + tl.arange(0, ROWS)


@triton.jit
def _along_tile(channels, CHANNELS_LAST: tl.constexpr):
    """One value a channel, shaped to broadcast over a tile."""
    if CHANNELS_LAST:
        return channels[None, :]
    else:
        return channels[:, None]


@triton.jit
def _tile_pixels(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return (tile * ROWS + tl.arange(0, ROWS))[:, None]
    else:
        return (tile * COLUMNS + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def _tile_offsets(channel, pixel, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Offsets of a tile within one example of one step, and which of them exist."""
    inside = (channel < channels) & (pixel < pixels)
    if CHANNELS_LAST:
        return pixel * channels + channel, inside
    else:
        return channel * pixels + pixel, inside


# The neuron, in the form that takes the fewest instructions. Every charge is linear,
#     h = keep v + gain y + (1 - keep) v_rest,
# and so is the normalisation, so the distance of the potential from the threshold is u = h - v_threshold
#     = keep v + drive,    drive = (x - mean) drive_scale + drive_shift
# with two numbers a channel. Every kernel computes it by these functions.


@triton.jit
def _drive(deviation, scale, shift):
    return tl.fma(deviation, tl.broadcast_to(scale, deviation.shape), tl.broadcast_to(shift, deviation.shape))


@triton.jit
def _charge(v, drive, keep):
    """u, the potential's distance from the threshold."""
    return tl.fma(v, tl.zeros_like(v) + keep, drive)


@triton.jit
def _reset(u, fired, v_threshold, v_rest, SOFT_RESET: tl.constexpr):
    """The potential after the step."""
    if SOFT_RESET:
        return tl.where(fired, u, u + v_threshold)
    else:
        return tl.where(fired, v_rest, u + v_threshold)


@triton.jit
def _gradient(grad_h, deviation, scale, slope, offset):
    """Gradient of x: the direct part, and those by way of the variance and of the mean."""
    indirect = tl.fma(deviation, tl.broadcast_to(slope, deviation.shape), tl.broadcast_to(offset, deviation.shape))
    return tl.fma(grad_h, tl.broadcast_to(scale, grad_h.shape), indirect)


# ------------------------------------------------------------------------------------------- statistics of the channels


# Channels of which a program that adds partial sums takes care: those of one slot fill a sector of memory.
GROUP = tl.constexpr(4)


@triton.jit
def _pair(channel, slot, slots):
    """Where slot's two partial results for a channel are, in [C / GROUP, slots, 2, GROUP]: here, and GROUP behind."""
    return (channel // GROUP * slots + slot) * (2 * GROUP) + channel % GROUP


@triton.jit
def _last_of(first, end, step):
    """The last of first, first + step, ... below end."""
    return first + (end - 1 - first) // step * step


# Numbers on which no kernel is specialised: other shapes of a batch find it compiled.
_UNSPECIALISED = ("examples", "channel_blocks", "tiles", "team", "teams")


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _channel_statistics_kernel(
    x_ptr,
    count_ptr,  # how many values a program has seen of each of its channels, [slots]
    partial_ptr,  # their mean and their sum of squared deviations from it, see _pair
    examples,
    channels,
    pixels,
    x_stride_t,
    x_stride_n,
    channel_blocks,
    tiles,  # of one example and block of channels
    team,  # programs that share an example
    teams,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    MASKED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Mean and sum of squared deviations of each channel in the part of x that a program owns."""
    if EARLY:
        await_previous_kernel()
    program = tl.program_id(0)
    block = program % channel_blocks
    slot = program // channel_blocks
    first_n = slot // team
    first_tile = slot % team
    channel_out = _block_channels(block, ROWS, COLUMNS, CHANNELS_LAST)
    channel = _along_tile(channel_out, CHANNELS_LAST)
    one = tl.full((), 1, tl.int64)
    tile_pixels: tl.constexpr = ROWS if CHANNELS_LAST else COLUMNS

    # Deviations are taken from the first value of the channel here, so that a mean far from zero costs no digits.
    pivot_ptr = x_ptr + one * first_n * x_stride_n
    pivot_pixel = first_tile * tile_pixels
    pivot_offsets, exists = _tile_offsets(channel, pivot_pixel, channels, pixels, CHANNELS_LAST)
    pivot_offsets = tl.broadcast_to(pivot_offsets, (ROWS, COLUMNS))
    pivot = _load(pivot_ptr + pivot_offsets, tl.broadcast_to(exists, (ROWS, COLUMNS)), MASKED)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    values = 0
    n = _last_of(first_n, examples, teams)
    while n >= 0:
        tile = _last_of(first_tile, tiles, team)
        while tile >= 0:
            offsets, inside = _tile_offsets(
                channel, _tile_pixels(tile, ROWS, COLUMNS, CHANNELS_LAST), channels, pixels, CHANNELS_LAST
            )
            step_ptr = x_ptr + one * n * x_stride_n
            for _step in tl.static_range(T):
                deviation = _load(step_ptr + offsets, inside, MASKED) - pivot
                if MASKED:
                    deviation = tl.where(inside, deviation, 0.0)
                total += deviation
                squares = tl.fma(deviation, deviation, squares)
                step_ptr += x_stride_t
            values += tl.minimum(tile_pixels, pixels - tile * tile_pixels)
            tile -= team
        n -= teams
    count = (T * values).to(tl.float32)
    totals, all_squares = _sums_over_pixels(total, squares, CHANNELS_LAST)
    shift = totals / count
    where = _pair(channel_out, slot, team * teams)
    out_offsets, out_exists = _tile_offsets(channel_out, pivot_pixel, channels, pixels, CHANNELS_LAST)
    pivots = _load(pivot_ptr + out_offsets, out_exists, MASKED)
    tl.store(partial_ptr + where, pivots + shift, mask=channel_out < channels)
    tl.store(partial_ptr + GROUP + where, all_squares - totals * shift, mask=channel_out < channels)
    if block == 0:
        tl.store(count_ptr + slot, count)


# Rows of the constants [4, C] that one call computes for all its kernels.
MEAN = tl.constexpr(0)
RSTD = tl.constexpr(1)  # 1 / sqrt(variance + eps)
DRIVE_SCALE = tl.constexpr(2)
DRIVE_SHIFT = tl.constexpr(3)


@triton.jit(do_not_specialize=("slots",))
def _constants_kernel(
    count_ptr,
    partial_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    weight_ptr,
    bias_ptr,
    constants_ptr,
    channels,
    slots,
    momentum,
    eps,
    keep,
    gain,
    v_threshold,
    v_rest,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    USE_BATCH: tl.constexpr,
    UPDATE_RUNNING: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    AFFINE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The constants of CHANNELS channels, from the batch's partial statistics (Chan et al.) or the running ones."""
    if EARLY:
        await_previous_kernel()
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    if USE_BATCH:
        pivot = tl.load(partial_ptr + _pair(channel, 0, slots), mask=known, other=0.0)
        counts = tl.zeros((SLOTS,), tl.float32)
        total = tl.zeros((SLOTS, CHANNELS), tl.float32)
        squares = tl.zeros((SLOTS, CHANNELS), tl.float32)
        start = 0
        while start < slots:
            slot = start + tl.arange(0, SLOTS)
            inside = (slot < slots)[:, None] & known[None, :]
            where = _pair(channel[None, :], slot[:, None], slots)
            part = tl.load(count_ptr + slot, mask=slot < slots, other=0.0)
            part_mean = tl.load(partial_ptr + where, mask=inside, other=0.0)
            m2 = tl.load(partial_ptr + GROUP + where, mask=inside, other=0.0)
            apart = tl.where(inside, part_mean - pivot[None, :], 0.0)
            counts += part
            total += part[:, None] * apart
            squares += m2 + part[:, None] * apart * apart
            start += SLOTS
        count = tl.sum(counts, axis=0)
        shift = tl.sum(total, axis=0) / count
        mean = pivot + shift
        variance = tl.maximum(tl.sum(squares, axis=0) / count - shift * shift, 0.0)
        if UPDATE_RUNNING:
            if CUMULATIVE:
                momentum = 1.0 / tl.load(batches_ptr).to(tl.float32)
            unbiased = variance * (count / tl.maximum(count - 1.0, 1.0))
            old_mean = tl.load(running_mean_ptr + channel, mask=known, other=0.0)
            old_var = tl.load(running_var_ptr + channel, mask=known, other=0.0)
            tl.store(running_mean_ptr + channel, old_mean + momentum * (mean - old_mean), mask=known)
            tl.store(running_var_ptr + channel, old_var + momentum * (unbiased - old_var), mask=known)
            if not CUMULATIVE:
                if tl.program_id(0) == 0:
                    tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    else:
        mean = tl.load(running_mean_ptr + channel, mask=known, other=0.0)
        variance = tl.load(running_var_ptr + channel, mask=known, other=1.0)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    scale = rstd
    bias = tl.zeros_like(rstd)
    if AFFINE:
        scale = scale * tl.load(weight_ptr + channel, mask=known, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=known, other=0.0)
    tl.store(constants_ptr + MEAN * channels + channel, mean, mask=known)
    tl.store(constants_ptr + RSTD * channels + channel, rstd, mask=known)
    tl.store(constants_ptr + DRIVE_SCALE * channels + channel, gain * scale, mask=known)
    drive_shift = gain * bias + ((1.0 - keep) * v_rest - v_threshold)
    tl.store(constants_ptr + DRIVE_SHIFT * channels + channel, drive_shift, mask=known)


# ------------------------------------------------------------------------------------------------ normalise and fire


@triton.jit
def _forward_steps(
    x_ptr,
    residual_ptr,
    out_ptr,
    offsets,
    inside,
    x_stride_t,
    residual_stride_t,
    out_stride_t,
    drive_constant,
    mean,
    scale,
    shift,
    keep,
    v_threshold,
    v_rest,
    STEPS: tl.constexpr,
    MASKED: tl.constexpr,
    X_CONSTANT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ENERGY: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    RECURSE: tl.constexpr,
):
    """The first STEPS steps, the pointers at the last of them: returns the potential behind it, and the energy so far.

    The recursion is over time and unrolled by the compiler: it loads on the way down, and fires on the way up, so that
    the loads of all steps are under way before the first store. RECURSE is this function.
    """
    if X_CONSTANT:
        drive = drive_constant
    else:
        drive = _drive(_load(x_ptr + offsets, inside, MASKED) - mean, scale, shift)
    if HAS_RESIDUAL:
        residual = _load(residual_ptr + offsets, inside, MASKED)
    if STEPS > 1:
        v, energy = RECURSE(
            x_ptr - x_stride_t,
            residual_ptr - residual_stride_t,
            out_ptr - out_stride_t,
            offsets,
            inside,
            x_stride_t,
            residual_stride_t,
            out_stride_t,
            drive_constant,
            mean,
            scale,
            shift,
            keep,
            v_threshold,
            v_rest,
            STEPS - 1,
            MASKED,
            X_CONSTANT,
            HAS_RESIDUAL,
            ENERGY,
            SOFT_RESET,
            RECURSE,
        )
    else:
        v = tl.zeros_like(drive) + v_rest
        energy = tl.zeros_like(drive)
    u = _charge(v, drive, keep)
    fired = u >= 0
    out = tl.where(fired, 1.0, 0.0)
    if HAS_RESIDUAL:
        out += residual
    _store(out_ptr + offsets, out, inside, MASKED)
    if ENERGY:
        if MASKED:
            out = tl.where(inside, out, 0.0)
        energy = tl.fma(out, out, energy)
    return _reset(u, fired, v_threshold, v_rest, SOFT_RESET), energy


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _forward_kernel(
    x_ptr,
    residual_ptr,
    out_ptr,
    v_ptr,
    constants_ptr,
    energy_ptr,  # partial sums of the squares of the output, [N, channel_blocks, team]
    examples,
    channels,
    pixels,
    x_stride_t,
    x_stride_n,
    residual_stride_t,
    residual_stride_n,
    channel_blocks,
    tiles,  # of one example and block of channels
    team,  # programs that share an example
    teams,
    keep,
    v_threshold,
    v_rest,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    MASKED: tl.constexpr,
    X_CONSTANT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STORE_V: tl.constexpr,
    ENERGY: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        await_previous_kernel()
    program = tl.program_id(0)
    block = program % channel_blocks
    slot = program // channel_blocks
    channel = _along_tile(_block_channels(block, ROWS, COLUMNS, CHANNELS_LAST), CHANNELS_LAST)
    mean = _per_channel(constants_ptr + MEAN * channels, channel, channels, MASKED)
    scale = _per_channel(constants_ptr + DRIVE_SCALE * channels, channel, channels, MASKED)
    shift = _per_channel(constants_ptr + DRIVE_SHIFT * channels, channel, channels, MASKED)
    one = tl.full((), 1, tl.int64)
    size = channels * pixels
    out_stride_t = one * examples * size

    n = slot // team
    while n < examples:
        energy = tl.zeros((ROWS, COLUMNS), tl.float32)
        tile = slot % team
        while tile < tiles:
            offsets, inside = _tile_offsets(
                channel, _tile_pixels(tile, ROWS, COLUMNS, CHANNELS_LAST), channels, pixels, CHANNELS_LAST
            )
            x_step = x_ptr + one * n * x_stride_n
            residual_step = residual_ptr + one * n * residual_stride_n
            out_step = out_ptr + one * n * size
            drive = tl.zeros((ROWS, COLUMNS), tl.float32)
            if X_CONSTANT:
                drive = _drive(_load(x_step + offsets, inside, MASKED) - mean, scale, shift)
            v, tile_energy = _forward_steps(
                x_step + (T - 1) * x_stride_t,
                residual_step + (T - 1) * residual_stride_t,
                out_step + (T - 1) * out_stride_t,
                offsets,
                inside,
                x_stride_t,
                residual_stride_t,
                out_stride_t,
                drive,
                mean,
                scale,
                shift,
                keep,
                v_threshold,
                v_rest,
                T,
                MASKED,
                X_CONSTANT,
                HAS_RESIDUAL,
                ENERGY,
                SOFT_RESET,
                _forward_steps,
            )
            energy += tile_energy
            if STORE_V:
                _store(v_ptr + one * n * size + offsets, v, inside, MASKED)
            tile += team
        if ENERGY:
            total = tl.sum(tl.sum(energy, axis=1), axis=0)
            tl.store(energy_ptr + (one * n * channel_blocks + block) * team + slot % team, total)
        n += teams


# --------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _backward_steps(
    x_ptr,
    grad_ptr,
    grad_x_ptr,
    offsets,
    inside,
    x_stride_t,
    grad_stride_t,
    grad_x_stride_t,
    x_constant,
    v,
    mean,
    scale,
    shift,
    slope,
    offset,
    keep,
    v_threshold,
    v_rest,
    alpha,
    STEPS: tl.constexpr,
    MASKED: tl.constexpr,
    X_CONSTANT: tl.constexpr,
    SUM: tl.constexpr,
    NORM: tl.constexpr,
    WRITE: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    SURROGATE: tl.constexpr,
    RECURSE: tl.constexpr,
):
    """Backward through the STEPS last steps, which start from potential v.

    Returns dL/dv before the first of them, and three sums over these steps: of the gradient with respect to h, of that
    times the deviation of x from the mean, and of its square. The recursion is over time and unrolled by the
    compiler; RECURSE is this function (Triton before 3.5 cannot hash one that names itself).
    """
    if X_CONSTANT:
        deviation = x_constant
    else:
        deviation = _load(x_ptr + offsets, inside, MASKED) - mean
    grad_spike = _load(grad_ptr + offsets, inside, MASKED)
    u = _charge(v, _drive(deviation, scale, shift), keep)
    fired = u >= 0
    if STEPS > 1:
        carry, grad_sum, product_sum, norm = RECURSE(
            x_ptr + x_stride_t,
            grad_ptr + grad_stride_t,
            grad_x_ptr + grad_x_stride_t,
            offsets,
            inside,
            x_stride_t,
            grad_stride_t,
            grad_x_stride_t,
            x_constant,
            _reset(u, fired, v_threshold, v_rest, SOFT_RESET),
            mean,
            scale,
            shift,
            slope,
            offset,
            keep,
            v_threshold,
            v_rest,
            alpha,
            STEPS - 1,
            MASKED,
            X_CONSTANT,
            SUM,
            NORM,
            WRITE,
            SOFT_RESET,
            DETACH_RESET,
            SURROGATE,
            RECURSE,
        )
    else:
        carry = tl.zeros_like(u)
        grad_sum = tl.zeros_like(u)
        product_sum = tl.zeros_like(u)
        norm = tl.zeros_like(u)
    surrogate = surrogate_gradient(u, alpha, SURROGATE)
    if SOFT_RESET:
        grad_h = carry
        if not DETACH_RESET:
            grad_h -= carry * v_threshold * surrogate
    else:
        grad_h = tl.where(fired, 0.0, carry)
        if not DETACH_RESET:
            grad_h += carry * (v_rest - v_threshold - u) * surrogate
    grad_h = tl.fma(grad_spike, surrogate, grad_h)
    if X_CONSTANT:
        grad_sum += grad_h
    else:
        if SUM:
            grad_sum += grad_h
            product_sum = tl.fma(grad_h, deviation, product_sum)
        if NORM:
            norm = tl.fma(grad_h, grad_h, norm)
        if WRITE:
            _store(grad_x_ptr + offsets, _gradient(grad_h, deviation, scale, slope, offset), inside, MASKED)
    return grad_h * keep, grad_sum, product_sum, norm


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _backward_kernel(
    x_ptr,
    grad_ptr,
    grad_x_ptr,
    constants_ptr,
    coefficients_ptr,  # [2, C]: what multiplies the deviation of x, and what is added, in the gradient of x
    sums_ptr,  # partial sums of the gradient and of its product with the deviation, see _pair
    norm_ptr,  # partial squared norms, [N, channel_blocks, team]
    examples,
    channels,
    pixels,
    x_stride_t,
    x_stride_n,
    grad_stride_t,
    grad_stride_n,
    channel_blocks,
    tiles,  # of one example and block of channels
    team,  # programs that share an example
    teams,
    keep,
    gain,
    v_threshold,
    v_rest,
    alpha,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    MASKED: tl.constexpr,
    X_CONSTANT: tl.constexpr,
    REVERSED: tl.constexpr,
    SUM: tl.constexpr,
    NORM: tl.constexpr,
    WRITE: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    SURROGATE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """SUM: the first pass of training. WRITE: the second. Both in one pass where the statistics are constants."""
    if EARLY:
        await_previous_kernel()
    program = tl.program_id(0)
    block = program % channel_blocks
    slot = program // channel_blocks
    channel_out = _block_channels(block, ROWS, COLUMNS, CHANNELS_LAST)
    channel = _along_tile(channel_out, CHANNELS_LAST)
    mean = _per_channel(constants_ptr + MEAN * channels, channel, channels, MASKED)
    scale = _per_channel(constants_ptr + DRIVE_SCALE * channels, channel, channels, MASKED)
    shift = _per_channel(constants_ptr + DRIVE_SHIFT * channels, channel, channels, MASKED)
    slope = tl.zeros_like(mean)
    offset = tl.zeros_like(mean)
    if WRITE:
        if BATCH_STATISTICS:
            slope = _per_channel(coefficients_ptr, channel, channels, MASKED)
            offset = _per_channel(coefficients_ptr + channels, channel, channels, MASKED)
    one = tl.full((), 1, tl.int64)
    size = channels * pixels
    grad_x_stride_t = one * examples * size

    grad_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    product_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    step_n = teams
    step_tile = team
    first_n = slot // team
    if REVERSED:
        step_n = -teams
        step_tile = -team
        first_n = _last_of(slot // team, examples, teams)
    n = first_n
    while (n >= 0) & (n < examples):
        norm = tl.zeros((ROWS, COLUMNS), tl.float32)
        tile = slot % team
        if REVERSED:
            tile = _last_of(slot % team, tiles, team)
        while (tile >= 0) & (tile < tiles):
            offsets, inside = _tile_offsets(
                channel, _tile_pixels(tile, ROWS, COLUMNS, CHANNELS_LAST), channels, pixels, CHANNELS_LAST
            )
            deviation = tl.zeros((ROWS, COLUMNS), tl.float32)
            if X_CONSTANT:
                deviation = _load(x_ptr + one * n * x_stride_n + offsets, inside, MASKED) - mean
            _grad_v, tile_grad, tile_product, tile_norm = _backward_steps(
                x_ptr + one * n * x_stride_n,
                grad_ptr + one * n * grad_stride_n,
                grad_x_ptr + one * n * size,
                offsets,
                inside,
                x_stride_t,
                grad_stride_t,
                grad_x_stride_t,
                deviation,
                tl.zeros((ROWS, COLUMNS), tl.float32) + v_rest,
                mean,
                scale,
                shift,
                slope,
                offset,
                keep,
                v_threshold,
                v_rest,
                alpha,
                T,
                MASKED,
                X_CONSTANT,
                SUM,
                NORM,
                WRITE,
                SOFT_RESET,
                DETACH_RESET,
                SURROGATE,
                _backward_steps,
            )
            if X_CONSTANT:
                tile_product = tile_grad * deviation
                tile_norm = tile_grad * tile_grad
                if WRITE:
                    grad_x = _gradient(tile_grad, deviation, scale, slope, offset)
                    _store(grad_x_ptr + one * n * size + offsets, grad_x, inside, MASKED)
            if SUM:
                grad_sum += tile_grad
                product_sum += tile_product
            if NORM:
                norm += tile_norm
            tile += step_tile
        if NORM:
            total = tl.sum(tl.sum(norm * (scale * scale), axis=1), axis=0)
            tl.store(norm_ptr + (one * n * channel_blocks + block) * team + slot % team, total)
        n += step_n
    if SUM:
        grads, products = _sums_over_pixels(gain * grad_sum, gain * product_sum, CHANNELS_LAST)
        where = _pair(channel_out, slot, team * teams)
        tl.store(sums_ptr + where, grads, mask=channel_out < channels)
        tl.store(sums_ptr + GROUP + where, products, mask=channel_out < channels)


@triton.jit(do_not_specialize=("slots", "elements", "examples", "energy_parts", "norm_parts"))
def _finish_backward_kernel(
    sums_ptr,
    constants_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    coefficients_ptr,
    energy_part_ptr,
    norm_part_ptr,
    energy_ptr,
    norm_ptr,
    channels,
    slots,
    elements,  # of one channel
    examples,
    energy_parts,  # partial sums of one example
    norm_parts,
    gain,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXAMPLES: tl.constexpr,
    PARTS: tl.constexpr,
    AFFINE: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The first programs finish CHANNELS channels each: gradients of weight and bias, coefficients of that of x.

    The others add the partial sums of EXAMPLES examples each.
    """
    if EARLY:
        await_previous_kernel()
    program = tl.program_id(0)
    channel_programs = tl.cdiv(channels, CHANNELS)
    if program < channel_programs:
        channel = program * CHANNELS + tl.arange(0, CHANNELS)
        known = channel < channels
        grads = tl.zeros((SLOTS, CHANNELS), tl.float32)
        products = tl.zeros((SLOTS, CHANNELS), tl.float32)
        start = 0
        while start < slots:
            slot = start + tl.arange(0, SLOTS)
            inside = (slot < slots)[:, None] & known[None, :]
            where = _pair(channel[None, :], slot[:, None], slots)
            grads += tl.load(sums_ptr + where, mask=inside, other=0.0)
            products += tl.load(sums_ptr + GROUP + where, mask=inside, other=0.0)
            start += SLOTS
        grad_sum = tl.sum(grads, axis=0)
        product_sum = tl.sum(products, axis=0)
        rstd = tl.load(constants_ptr + RSTD * channels + channel, mask=known, other=0.0)
        scale = tl.load(constants_ptr + DRIVE_SCALE * channels + channel, mask=known, other=0.0) / gain
        if AFFINE:
            tl.store(grad_weight_ptr + channel, product_sum * rstd, mask=known)
            tl.store(grad_bias_ptr + channel, grad_sum, mask=known)
        tl.store(coefficients_ptr + channel, -scale * rstd * rstd * (product_sum / elements), mask=known)
        tl.store(coefficients_ptr + channels + channel, -scale * (grad_sum / elements), mask=known)
    else:
        if NORM:
            n = (program - channel_programs) * EXAMPLES + tl.arange(0, EXAMPLES)
            energy = _add_parts(energy_part_ptr, n, examples, energy_parts, EXAMPLES, PARTS)
            tl.store(energy_ptr + n, energy, mask=n < examples)
            norm = _add_parts(norm_part_ptr, n, examples, norm_parts, EXAMPLES, PARTS)
            tl.store(norm_ptr + n, norm, mask=n < examples)


@triton.jit
def _add_parts(part_ptr, n, examples, parts, EXAMPLES: tl.constexpr, PARTS: tl.constexpr):
    """Rows n of [N, parts], summed."""
    total = tl.zeros((EXAMPLES, PARTS), tl.float32)
    start = 0
    while start < parts:
        part = start + tl.arange(0, PARTS)
        inside = (n < examples)[:, None] & (part < parts)[None, :]
        total += tl.load(part_ptr + n[:, None] * parts + part[None, :], mask=inside, other=0.0)
        start += PARTS
    return tl.sum(total, axis=1)


# ------------------------------------------------------------------------------------------------------- launchers


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
        elements = self.elements if steps <= 8 else min(self.elements, 4)
        programs = self.programs // (1 if steps <= 4 else 2 if steps <= 8 else 4)
        return replace(self, elements=elements, programs=max(1, programs * 7 // 8 if itemsize == 4 else programs))

    @property
    def options(self) -> dict[str, int | bool]:
        """Of the compiler."""
        registers = _REGISTERS // (32 * self.warps * self.programs)
        return {"num_warps": self.warps, "maxnreg": min(255, registers // 8 * 8), "enable_fp_fusion": False}


_REGISTERS = 65536  # of one multiprocessor

# For up to 4 steps; chosen on an H100 and checked on an H200 (benchmarks/README.md).
STATISTICS = Configuration(elements=8, warps=1, programs=16)
FORWARD = Configuration(elements=8, warps=4, programs=5)
SUMS = Configuration(elements=4, warps=1, programs=24)
GRADIENT = Configuration(elements=4, warps=1, programs=32)
EARLY_LAUNCH = True  # see launch.early_launch
# Of the kernels that add partial sums.
_FINISH = {"SLOTS": 1024, "CHANNELS": GROUP.value, "num_warps": 8}
_FINISH_EXAMPLES = {"EXAMPLES": 32, "PARTS": 16}


@lru_cache(maxsize=256)
def _cut(
    examples: int, channels: int, pixels: int, channels_last: bool, config: Configuration, processors: int
) -> _Cut:
    tile = 32 * config.warps * config.elements
    inner, outer = (channels, pixels) if channels_last else (pixels, channels)
    columns = min(triton.next_power_of_2(inner), 128 if channels_last else 256)
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
    """Size and number of teams of at most ``programs`` in all, such that the slowest program has the least to do.

    Among equals, the largest teams: programs that run at the same time then read neighbouring memory. And no more
    programs than that takes.
    """
    sizes = range(min(tiles, programs), 0, -1)
    most = {size: (triton.cdiv(tiles, size), triton.cdiv(examples, min(examples, programs // size))) for size in sizes}
    tiles_each, examples_each = min(most.values(), key=lambda each: each[0] * each[1])
    return triton.cdiv(tiles, tiles_each), triton.cdiv(examples, examples_each)


def _early(device: torch.device) -> dict[str, bool]:
    return early_launch(device) if EARLY_LAUNCH else {"EARLY": False}


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


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

    keep: float  # share of v that a step keeps
    gain: float  # what multiplies the input
    v_threshold: float
    v_rest: float
    soft_reset: bool
    detach_reset: bool
    surrogate: int
    alpha: float

    @classmethod
    def of(cls, d: Dynamics, surrogate: int, alpha: float) -> Neuron:
        """From the dynamics, and the surrogate's position in ``surrogate.FUSED`` with its steepness."""
        keep = 1.0 if d.tau is None else 1.0 - 1.0 / d.tau
        gain = 1.0 / d.tau if d.tau is not None and d.decay_input else 1.0
        return cls(keep, gain, d.v_threshold, d.v_rest, d.v_reset is None, d.detach_reset, surrogate, alpha)


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
        return _cut(self.examples, self.channels, self.pixels, self.channels_last, config, _processors(self.device))

    def cut_constants(self, cut: _Cut, config: Configuration) -> dict[str, Any]:
        return {
            "ROWS": cut.rows,
            "COLUMNS": cut.columns,
            "CHANNELS_LAST": self.channels_last,
            "MASKED": cut.masked,
            **config.options,
            **_early(self.device),
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
def _statistics_launch(shape: _Shape) -> Launch:
    config = STATISTICS
    cut = shape.cut(config)
    numbers = (
        shape.examples,
        shape.channels,
        shape.pixels,
        shape.stride_t,
        shape.stride_n,
        cut.channel_blocks,
        cut.tiles,
        cut.team,
        cut.teams,
    )
    constants = {"T": shape.steps, **shape.cut_constants(cut, config)}
    return Launch(_channel_statistics_kernel, shape.device, cut.programs, numbers, constants)


@lru_cache(maxsize=1024)
def _constants_launch(
    shape: _Shape,
    momentum: float,
    eps: float,
    neuron: Neuron,
    use_batch: bool,
    update: bool,
    cumulative: bool,
    affine: bool,
) -> Launch:
    slots = shape.cut(STATISTICS).slots
    numbers = (shape.channels, slots, momentum, eps, neuron.keep, neuron.gain, neuron.v_threshold, neuron.v_rest)
    constants = {
        **_FINISH,
        "USE_BATCH": use_batch,
        "UPDATE_RUNNING": update,
        "CUMULATIVE": cumulative,
        "AFFINE": affine,
        "enable_fp_fusion": False,
        **_early(shape.device),
    }
    programs = triton.cdiv(shape.channels, _FINISH["CHANNELS"])
    return Launch(_constants_kernel, shape.device, programs, numbers, constants)


@lru_cache(maxsize=1024)
def _forward_launch(
    shape: _Shape,
    steps: int,
    neuron: Neuron,
    repeated: bool,
    residual_strides: tuple[int, ...] | None,
    store_v: bool,
    energy: bool,
) -> Launch:
    config = FORWARD.for_tiles_of(steps, shape.dtype.itemsize)
    cut = shape.cut(config)
    numbers = (
        shape.examples,
        shape.channels,
        shape.pixels,
        shape.stride_t,
        shape.stride_n,
        *((0, 0) if residual_strides is None else residual_strides[:2]),
        cut.channel_blocks,
        cut.tiles,
        cut.team,
        cut.teams,
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
        **shape.cut_constants(cut, config),
    }
    return Launch(_forward_kernel, shape.device, cut.programs, numbers, constants)


@lru_cache(maxsize=1024)
def _backward_launch(
    shape: _Shape,
    steps: int,
    neuron: Neuron,
    repeated: bool,
    grad_strides: tuple[int, ...],
    grad_dtype: torch.dtype,
    sums: bool,
    norm: bool,
    write: bool,
    batch_statistics: bool,
) -> Launch:
    config = (SUMS if sums else GRADIENT).for_tiles_of(steps, shape.dtype.itemsize)
    cut = shape.cut(config)
    numbers = (
        shape.examples,
        shape.channels,
        shape.pixels,
        shape.stride_t,
        shape.stride_n,
        *grad_strides[:2],
        cut.channel_blocks,
        cut.tiles,
        cut.team,
        cut.teams,
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
        **shape.cut_constants(cut, config),
    }
    return Launch(_backward_kernel, shape.device, cut.programs, numbers, constants)


@lru_cache(maxsize=1024)
def _finish_backward_launch(
    shape: _Shape, slots: int, energy_parts: int, norm_parts: int, gain: float, affine: bool, norm: bool
) -> Launch:
    elements = shape.steps * shape.examples * shape.pixels
    numbers = (shape.channels, slots, elements, shape.examples, energy_parts, norm_parts, gain)
    constants = {
        **_FINISH,
        **_FINISH_EXAMPLES,
        "AFFINE": affine,
        "NORM": norm,
        "enable_fp_fusion": False,
        **_early(shape.device),
    }
    programs = triton.cdiv(shape.channels, _FINISH["CHANNELS"])
    if norm:
        programs += triton.cdiv(shape.examples, _FINISH_EXAMPLES["EXAMPLES"])
    return Launch(_finish_backward_kernel, shape.device, programs, numbers, constants)


def _constants(
    x: Tensor, shape: _Shape, weight: Tensor | None, bias: Tensor | None, norm: Normalisation, neuron: Neuron
) -> Tensor:
    """float32 [4, C] for the other kernels; updates the running statistics."""
    constants = x.new_empty((4, shape.channels), dtype=torch.float32)
    count = partial = constants
    if norm.use_batch:
        slots = shape.cut(STATISTICS).slots
        count = x.new_empty(slots, dtype=torch.float32)
        partial = x.new_empty(_pairs(shape.channels, slots), dtype=torch.float32)
        _statistics_launch(shape)(x, count, partial)
    update = norm.use_batch and norm.update and norm.running_mean is not None
    cumulative = update and norm.momentum is None
    if cumulative and norm.batches is not None:
        norm.batches.add_(1)
    absent = constants
    _constants_launch(
        shape,
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
        constants,
    )
    return constants


def _normalise_and_fire(
    x: Tensor,
    shape: _Shape,
    constants: Tensor,
    residual: Tensor | None,
    neuron: Neuron,
    repeat: int | None,
    want_v: bool,
    want_energy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, N, C, *], final potential [N, C, *] and partial energies [N, parts] (both empty if not wanted)."""
    steps = shape.steps if repeat is None else repeat
    whole = x.expand(steps, *x.shape[1:])
    out = sequence_like(whole, x.dtype)
    strides = None
    if residual is not None:
        residual = with_inner_order_of(whole, residual)
        strides = residual.stride()[:2]
    v = x.new_empty_strided(x.shape[1:], out.stride()[1:], dtype=torch.float32) if want_v else x.new_empty(0)
    parts = shape.cut(FORWARD.for_tiles_of(steps, shape.dtype.itemsize)).parts
    energy = x.new_empty((shape.examples, parts) if want_energy else (0, 0), dtype=torch.float32)
    launch = _forward_launch(shape, steps, neuron, repeat is not None, strides, want_v, want_energy)
    launch(x, out if residual is None else residual, out, constants if not want_v else v, constants, energy)
    return out, v, energy


class _BatchNormLIF(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: Normalisation,
        neuron: Neuron,
        repeat: int | None,
        want_v: bool,
        energies: tuple[Tensor, Tensor] | None,
    ):
        x = _known_layout(x if repeat is None else x.unsqueeze(0))
        shape = _Shape.of(x)
        constants = _constants(x, shape, weight, bias, norm, neuron)
        out, v, energy = _normalise_and_fire(
            x, shape, constants, residual, neuron, repeat, want_v, energies is not None
        )
        ctx.save_for_backward(x, constants, energy)
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
            return (None,) * 9
        x, constants, energy = ctx.saved_tensors
        shape, neuron, energies, repeated = ctx.shape, ctx.neuron, ctx.energies, ctx.repeat is not None
        steps = grad_out.shape[0]
        grad = with_inner_order_of(x.expand(steps, *x.shape[1:]), grad_out)
        cut = shape.cut(SUMS.for_tiles_of(steps, shape.dtype.itemsize))
        sums = x.new_empty(_pairs(shape.channels, cut.slots), dtype=torch.float32)
        norm = x.new_empty((shape.examples, cut.parts) if energies is not None else (0, 0), dtype=torch.float32)
        finished = x.new_empty((4, shape.channels), dtype=torch.float32)
        grad_weight, grad_bias, coefficients = finished[0], finished[1], finished[2:]
        grad_x = sequence_like(x, x.dtype)
        scored = energies is not None

        def launch(*passes: bool) -> None:
            _backward_launch(shape, steps, neuron, repeated, grad.stride()[:2], grad.dtype, *passes, ctx.use_batch)(
                x, grad, grad_x, constants, coefficients, sums, norm
            )

        # Statistics that are constants need no sums before the gradient can be written.
        launch(True, scored, not ctx.use_batch)
        energy_out, norm_out = energies if energies is not None else (finished, finished)
        _finish_backward_launch(shape, cut.slots, energy.shape[1], cut.parts, neuron.gain, ctx.affine, scored)(
            sums, constants, grad_weight, grad_bias, coefficients, energy, norm, energy_out, norm_out
        )
        if ctx.use_batch:
            launch(False, False, True)
        return (
            grad_x[0] if repeated else grad_x,
            grad_out if ctx.needs_input_grad[1] else None,
            grad_weight if ctx.affine else None,
            grad_bias if ctx.affine else None,
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
    repeat: int | None = None,
    want_v: bool = False,
    energies: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Batch normalisation, T steps of integrate-and-fire from rest, and a residual sum, differentiably.

    Args:
        x: [T, N, C, *], or [N, C, *] with ``repeat``; float32, float16 or bfloat16; at least one element.
        residual: added to the spikes, shape and dtype of the output, or None.
        weight, bias: float32 [C], both or neither.
        repeat: T, where every step has the same x (direct coding).
        want_v: whether to write the final membrane potential in the same pass.
        energies: two float32 [N], both written in the backward pass: the squared norm of each example's output, and
            that of its gradient with respect to x with the normalisation's statistics held constant, each summed over
            time.

    Returns:
        spikes (+ residual) [T, N, C, *] in x's dtype, and what gives the final potential, float32 [N, C, *], without a
        graph; where it was not wanted, it is computed when asked for, from x.
    """
    out, v, constants = _BatchNormLIF.apply(x, residual, weight, bias, norm, neuron, repeat, want_v, energies)
    if want_v:
        return out, lambda: v
    x, version = x.detach(), x._version

    def potential() -> Tensor:
        if x._version != version:
            raise RuntimeError(
                "the input of a BatchNorm + LIF layer was changed in place before its potential v was read; read v "
                "first, or do not change the input in place"
            )
        dense = _known_layout(x if repeat is None else x.unsqueeze(0))
        return _normalise_and_fire(dense, _Shape.of(dense), constants, None, neuron, repeat, True, False)[1]

    return out, potential
