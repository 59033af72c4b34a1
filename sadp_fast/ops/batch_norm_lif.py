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

The membrane is float32. All kernels compute y and the membrane by the same operations without contraction, so the
backward passes see exactly the spikes that the forward pass wrote.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dynamics import Dynamics
from .equations import LEAK_WITH_INPUT_DECAY, NO_LEAK, charge, reset, step_constants, surrogate_gradient
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


@triton.jit
def _normalise(deviation, scale, shift):
    """y from x - mean; every kernel computes it by these operations."""
    return tl.fma(deviation, tl.broadcast_to(scale, deviation.shape), tl.broadcast_to(shift, deviation.shape))


@triton.jit
def _gradient(grad_y, deviation, scale, slope, offset):
    """Gradient of x: the direct part, and those by way of the variance and of the mean."""
    indirect = tl.fma(deviation, tl.broadcast_to(slope, deviation.shape), tl.broadcast_to(offset, deviation.shape))
    return tl.fma(grad_y, tl.broadcast_to(scale, grad_y.shape), indirect)


# ------------------------------------------------------------------------------------------- statistics of the channels


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
    partial_ptr,  # their mean and their sum of squared deviations from it, [slots, 2, C]
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
):
    """Mean and sum of squared deviations of each channel in the part of x that a program owns."""
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
    where = slot * 2 * channels + channel_out
    out_offsets, out_exists = _tile_offsets(channel_out, pivot_pixel, channels, pixels, CHANNELS_LAST)
    pivots = _load(pivot_ptr + out_offsets, out_exists, MASKED)
    tl.store(partial_ptr + where, pivots + shift, mask=channel_out < channels)
    tl.store(partial_ptr + channels + where, all_squares - totals * shift, mask=channel_out < channels)
    if block == 0:
        tl.store(count_ptr + slot, count)


@triton.jit(do_not_specialize=("slots",))
def _finish_statistics_kernel(
    count_ptr,
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    channels,
    slots,
    momentum,
    eps,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UPDATE_RUNNING: tl.constexpr,
    CUMULATIVE: tl.constexpr,
):
    """Combine the partial statistics of CHANNELS channels (Chan et al.) and update the running ones."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    pivot = tl.load(partial_ptr + channel, mask=known, other=0.0)
    counts = tl.zeros((SLOTS,), tl.float32)
    total = tl.zeros((SLOTS, CHANNELS), tl.float32)
    squares = tl.zeros((SLOTS, CHANNELS), tl.float32)
    start = 0
    while start < slots:
        slot = start + tl.arange(0, SLOTS)
        inside = (slot < slots)[:, None] & known[None, :]
        where = slot[:, None] * 2 * channels + channel[None, :]
        count = tl.load(count_ptr + slot, mask=slot < slots, other=0.0)
        mean = tl.load(partial_ptr + where, mask=inside, other=0.0)
        m2 = tl.load(partial_ptr + channels + where, mask=inside, other=0.0)
        apart = tl.where(inside, mean - pivot[None, :], 0.0)
        counts += count
        total += count[:, None] * apart
        squares += m2 + count[:, None] * apart * apart
        start += SLOTS
    count = tl.sum(counts, axis=0)
    shift = tl.sum(total, axis=0) / count
    mean = pivot + shift
    variance = tl.maximum(tl.sum(squares, axis=0) / count - shift * shift, 0.0)
    tl.store(mean_ptr + channel, mean, mask=known)
    tl.store(rstd_ptr + channel, 1.0 / tl.sqrt_rn(variance + eps), mask=known)
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
    y_constant,
    mean,
    scale,
    shift,
    tau,
    v_threshold,
    v_rest,
    STEPS: tl.constexpr,
    MASKED: tl.constexpr,
    X_CONSTANT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ENERGY: tl.constexpr,
    DYNAMICS: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    RECURSE: tl.constexpr,
):
    """The first STEPS steps, the pointers at the last of them: returns the potential behind it, and the energy so far.

    The recursion is over time and unrolled by the compiler: it loads on the way down, and fires on the way up, so that
    the loads of all steps are under way before the first store. RECURSE is this function.
    """
    if X_CONSTANT:
        y = y_constant
    else:
        y = _normalise(_load(x_ptr + offsets, inside, MASKED) - mean, scale, shift)
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
            y_constant,
            mean,
            scale,
            shift,
            tau,
            v_threshold,
            v_rest,
            STEPS - 1,
            MASKED,
            X_CONSTANT,
            HAS_RESIDUAL,
            ENERGY,
            DYNAMICS,
            EXACT_RECIPROCAL,
            SOFT_RESET,
            RECURSE,
        )
    else:
        v = tl.zeros_like(y) + v_rest
        energy = tl.zeros_like(y)
    h = charge(y, v, tau, v_rest, DYNAMICS, EXACT_RECIPROCAL)
    fired = h >= v_threshold
    out = tl.where(fired, 1.0, 0.0)
    if HAS_RESIDUAL:
        out += residual
    _store(out_ptr + offsets, out, inside, MASKED)
    if ENERGY:
        if MASKED:
            out = tl.where(inside, out, 0.0)
        energy = tl.fma(out, out, energy)
    return reset(h, fired, v_threshold, v_rest, SOFT_RESET), energy


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _forward_kernel(
    x_ptr,
    residual_ptr,
    out_ptr,
    v_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
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
    tau,
    v_threshold,
    v_rest,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    MASKED: tl.constexpr,
    X_CONSTANT: tl.constexpr,
    AFFINE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STORE_V: tl.constexpr,
    ENERGY: tl.constexpr,
    DYNAMICS: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
    SOFT_RESET: tl.constexpr,
):
    program = tl.program_id(0)
    block = program % channel_blocks
    slot = program // channel_blocks
    channel = _along_tile(_block_channels(block, ROWS, COLUMNS, CHANNELS_LAST), CHANNELS_LAST)
    mean = _per_channel(mean_ptr, channel, channels, MASKED)
    scale = _per_channel(rstd_ptr, channel, channels, MASKED)
    shift = tl.zeros_like(mean)
    if AFFINE:
        scale = scale * _per_channel(weight_ptr, channel, channels, MASKED)
        shift = _per_channel(bias_ptr, channel, channels, MASKED)
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
            y = tl.zeros((ROWS, COLUMNS), tl.float32)
            if X_CONSTANT:
                y = _normalise(_load(x_step + offsets, inside, MASKED) - mean, scale, shift)
            v, tile_energy = _forward_steps(
                x_step + (T - 1) * x_stride_t,
                residual_step + (T - 1) * residual_stride_t,
                out_step + (T - 1) * out_stride_t,
                offsets,
                inside,
                x_stride_t,
                residual_stride_t,
                out_stride_t,
                y,
                mean,
                scale,
                shift,
                tau,
                v_threshold,
                v_rest,
                T,
                MASKED,
                X_CONSTANT,
                HAS_RESIDUAL,
                ENERGY,
                DYNAMICS,
                EXACT_RECIPROCAL,
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
    tau,
    v_threshold,
    v_rest,
    alpha,
    STEPS: tl.constexpr,
    MASKED: tl.constexpr,
    X_CONSTANT: tl.constexpr,
    SUM: tl.constexpr,
    NORM: tl.constexpr,
    WRITE: tl.constexpr,
    DYNAMICS: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    SURROGATE: tl.constexpr,
    RECURSE: tl.constexpr,
):
    """Backward through the STEPS last steps, which start from potential v.

    Returns dL/dv before the first of them, and three sums over these steps: of the gradient g with respect to y, of
    g times the deviation of x from the mean, and of g^2. The recursion is over time and unrolled by the
    compiler; RECURSE is this function (Triton before 3.5 cannot hash one that names itself).
    """
    if X_CONSTANT:
        deviation = x_constant
    else:
        deviation = _load(x_ptr + offsets, inside, MASKED) - mean
    grad_spike = _load(grad_ptr + offsets, inside, MASKED)
    h = charge(_normalise(deviation, scale, shift), v, tau, v_rest, DYNAMICS, EXACT_RECIPROCAL)
    fired = h - v_threshold >= 0
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
            reset(h, fired, v_threshold, v_rest, SOFT_RESET),
            mean,
            scale,
            shift,
            slope,
            offset,
            tau,
            v_threshold,
            v_rest,
            alpha,
            STEPS - 1,
            MASKED,
            X_CONSTANT,
            SUM,
            NORM,
            WRITE,
            DYNAMICS,
            EXACT_RECIPROCAL,
            SOFT_RESET,
            DETACH_RESET,
            SURROGATE,
            RECURSE,
        )
    else:
        carry = tl.zeros_like(h)
        grad_sum = tl.zeros_like(h)
        product_sum = tl.zeros_like(h)
        norm = tl.zeros_like(h)
    surrogate = surrogate_gradient(h - v_threshold, alpha, SURROGATE)
    if SOFT_RESET:
        grad_h = carry
        if not DETACH_RESET:
            grad_h -= carry * v_threshold * surrogate
    else:
        grad_h = tl.where(fired, 0.0, carry)
        if not DETACH_RESET:
            grad_h += carry * (v_rest - h) * surrogate
    grad_h = tl.fma(grad_spike, surrogate, grad_h)
    if DYNAMICS == LEAK_WITH_INPUT_DECAY:
        grad_y = grad_h * (1.0 / tau)
    else:
        grad_y = grad_h
    if X_CONSTANT:
        grad_sum += grad_y
    else:
        if SUM:
            grad_sum += grad_y
            product_sum = tl.fma(grad_y, deviation, product_sum)
        if NORM:
            norm = tl.fma(grad_y, grad_y, norm)
        if WRITE:
            _store(grad_x_ptr + offsets, _gradient(grad_y, deviation, scale, slope, offset), inside, MASKED)
    if DYNAMICS == NO_LEAK:
        return grad_h, grad_sum, product_sum, norm
    else:
        return grad_h * (1.0 - 1.0 / tau), grad_sum, product_sum, norm


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _backward_kernel(
    x_ptr,
    grad_ptr,
    grad_x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    coefficients_ptr,  # [2, C]: what multiplies the deviation of x, and what is added, in the gradient of x
    sums_ptr,  # partial sums of the gradient and of its product with the deviation, [slots, 2, C]
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
    tau,
    v_threshold,
    v_rest,
    alpha,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    MASKED: tl.constexpr,
    X_CONSTANT: tl.constexpr,
    AFFINE: tl.constexpr,
    REVERSED: tl.constexpr,
    SUM: tl.constexpr,
    NORM: tl.constexpr,
    WRITE: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr,
    DYNAMICS: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    SURROGATE: tl.constexpr,
):
    """SUM: the first pass of training. WRITE: the second. Both in one pass where the statistics are constants."""
    program = tl.program_id(0)
    block = program % channel_blocks
    slot = program // channel_blocks
    channel_out = _block_channels(block, ROWS, COLUMNS, CHANNELS_LAST)
    channel = _along_tile(channel_out, CHANNELS_LAST)
    mean = _per_channel(mean_ptr, channel, channels, MASKED)
    scale = _per_channel(rstd_ptr, channel, channels, MASKED)
    shift = tl.zeros_like(mean)
    if AFFINE:
        scale = scale * _per_channel(weight_ptr, channel, channels, MASKED)
        shift = _per_channel(bias_ptr, channel, channels, MASKED)
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
                tau,
                v_threshold,
                v_rest,
                alpha,
                T,
                MASKED,
                X_CONSTANT,
                SUM,
                NORM,
                WRITE,
                DYNAMICS,
                EXACT_RECIPROCAL,
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
        grads, products = _sums_over_pixels(grad_sum, product_sum, CHANNELS_LAST)
        where = slot * 2 * channels + channel_out
        tl.store(sums_ptr + where, grads, mask=channel_out < channels)
        tl.store(sums_ptr + channels + where, products, mask=channel_out < channels)


@triton.jit(do_not_specialize=("slots", "elements", "examples", "energy_parts", "norm_parts"))
def _finish_backward_kernel(
    sums_ptr,
    rstd_ptr,
    weight_ptr,
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
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXAMPLES: tl.constexpr,
    PARTS: tl.constexpr,
    AFFINE: tl.constexpr,
    NORM: tl.constexpr,
):
    """The first programs finish CHANNELS channels each: gradients of weight and bias, coefficients of that of x.

    The others add the partial sums of EXAMPLES examples each.
    """
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
            where = slot[:, None] * 2 * channels + channel[None, :]
            grads += tl.load(sums_ptr + where, mask=inside, other=0.0)
            products += tl.load(sums_ptr + channels + where, mask=inside, other=0.0)
            start += SLOTS
        grad_sum = tl.sum(grads, axis=0)
        product_sum = tl.sum(products, axis=0)
        rstd = tl.load(rstd_ptr + channel, mask=known, other=0.0)
        scale = rstd
        if AFFINE:
            scale = scale * tl.load(weight_ptr + channel, mask=known, other=0.0)
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

    def for_steps(self, steps: int) -> Configuration:
        """Longer sequences need more registers, so fewer programs fit."""
        return self if steps <= 4 else replace(self, programs=max(1, self.programs * 2 // 3 if steps <= 8 else 2))

    @property
    def options(self) -> dict[str, int | bool]:
        """Of the compiler."""
        registers = _REGISTERS // (32 * self.warps * self.programs)
        return {"num_warps": self.warps, "maxnreg": min(255, registers // 8 * 8), "enable_fp_fusion": False}


_REGISTERS = 65536  # of one multiprocessor

# For up to 4 steps; chosen on an H100 and checked on an H200 (benchmarks/README.md).
STATISTICS = Configuration(elements=8, warps=4, programs=4)
FORWARD = Configuration(elements=4, warps=4, programs=8)
SUMS = Configuration(elements=4, warps=4, programs=6)
GRADIENT = Configuration(elements=4, warps=4, programs=8)
# Of the kernels that add partial sums.
_FINISH = {"SLOTS": 512, "CHANNELS": 8, "num_warps": 8}
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


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@dataclass(frozen=True)
class _Layout:
    """x [T, N, C, *] as the kernels see it."""

    steps: int
    examples: int
    channels: int
    pixels: int
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> _Layout:
        steps, examples, channels = x.shape[:3]
        pixels = math.prod(x.shape[3:])
        return cls(steps, examples, channels, pixels, pixels == 1 or x.stride(2) == 1)

    def cut(self, config: Configuration, device: torch.device) -> _Cut:
        return _cut(self.examples, self.channels, self.pixels, self.channels_last, config, _processors(device))


def _known_layout(x: Tensor) -> Tensor:
    """x, or a copy of it, with its pixels in one block, channels first or last."""
    inner = x[0, 0]
    if inner.is_contiguous():
        return x
    if x.ndim > 3 and inner.movedim(0, -1).is_contiguous():
        return x
    return x.contiguous()


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


@dataclass(frozen=True)
class Neuron:
    """The neuron behind the normalisation: its constants and its surrogate."""

    dynamics: Dynamics
    surrogate: int
    alpha: float

    @property
    def scalars(self) -> tuple[float, float, float]:
        tau = 1.0 if self.dynamics.tau is None else self.dynamics.tau
        return tau, self.dynamics.v_threshold, self.dynamics.v_rest


def _statistics(x: Tensor, layout: _Layout, norm: Normalisation) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each channel, float32 [C]."""
    if not norm.use_batch:
        assert norm.running_mean is not None and norm.running_var is not None
        return norm.running_mean, torch.rsqrt(norm.running_var + norm.eps)
    config = STATISTICS
    cut = layout.cut(config, x.device)
    count = x.new_empty(cut.slots, dtype=torch.float32)
    partial = x.new_empty((cut.slots, 2, layout.channels), dtype=torch.float32)
    mean, rstd = x.new_empty((2, layout.channels), dtype=torch.float32)
    _channel_statistics_kernel[(cut.programs,)](
        x,
        count,
        partial,
        layout.examples,
        layout.channels,
        layout.pixels,
        x.stride(0),
        x.stride(1),
        cut.channel_blocks,
        cut.tiles,
        cut.team,
        cut.teams,
        T=layout.steps,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        CHANNELS_LAST=layout.channels_last,
        MASKED=cut.masked,
        **config.options,
    )
    update = norm.update and norm.running_mean is not None
    cumulative = update and norm.momentum is None
    if cumulative and norm.batches is not None:
        norm.batches.add_(1)
    _finish_statistics_kernel[(triton.cdiv(layout.channels, _FINISH["CHANNELS"]),)](
        count,
        partial,
        mean,
        rstd,
        norm.running_mean if update else mean,
        norm.running_var if update else rstd,
        norm.batches if update else mean,
        layout.channels,
        cut.slots,
        0.0 if norm.momentum is None else norm.momentum,
        norm.eps,
        **_FINISH,
        UPDATE_RUNNING=update,
        CUMULATIVE=cumulative,
        enable_fp_fusion=False,
    )
    return mean, rstd


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
        if repeat is not None:
            x = x.unsqueeze(0)
        x = _known_layout(x)
        layout = _Layout.of(x)
        steps = layout.steps if repeat is None else repeat
        mean, rstd = _statistics(x, layout, norm)
        whole = x.expand(steps, *x.shape[1:])
        out = sequence_like(whole, x.dtype)
        if residual is not None:
            residual = with_inner_order_of(whole, residual)
        config = FORWARD.for_steps(steps)
        cut = layout.cut(config, x.device)
        v = x.new_empty_strided(x.shape[1:], out.stride()[1:], dtype=torch.float32) if want_v else x.new_empty(0)
        parts = x.new_empty((layout.examples, cut.parts) if energies is not None else (0,), dtype=torch.float32)
        _forward_kernel[(cut.programs,)](
            x,
            x if residual is None else residual,
            out,
            v,
            mean,
            rstd,
            mean if weight is None else weight,
            mean if bias is None else bias,
            parts,
            layout.examples,
            layout.channels,
            layout.pixels,
            x.stride(0),
            x.stride(1),
            0 if residual is None else residual.stride(0),
            0 if residual is None else residual.stride(1),
            cut.channel_blocks,
            cut.tiles,
            cut.team,
            cut.teams,
            *neuron.scalars,
            T=steps,
            ROWS=cut.rows,
            COLUMNS=cut.columns,
            CHANNELS_LAST=layout.channels_last,
            MASKED=cut.masked,
            X_CONSTANT=repeat is not None,
            AFFINE=weight is not None,
            HAS_RESIDUAL=residual is not None,
            STORE_V=want_v,
            ENERGY=energies is not None,
            **step_constants(neuron.dynamics),
            **config.options,
        )
        ctx.save_for_backward(x, mean, rstd, weight, bias, parts)
        ctx.norm, ctx.neuron, ctx.repeat, ctx.layout, ctx.energies = norm, neuron, repeat, layout, energies
        ctx.mark_non_differentiable(v)
        ctx.set_materialize_grads(False)
        return out, v

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, _):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused neuron has no second derivative: call backward() without create_graph=True, or set the "
                "node's backend='torch'"
            )
        if grad_out is None:
            return (None,) * 9
        x, mean, rstd, weight, bias, energy_parts = ctx.saved_tensors
        layout, neuron, energies = ctx.layout, ctx.neuron, ctx.energies
        grad = with_inner_order_of(x.expand(grad_out.shape[0], *x.shape[1:]), grad_out)
        steps = grad.shape[0]
        sums_config = SUMS.for_steps(steps)
        cut = layout.cut(sums_config, x.device)
        sums = x.new_empty((cut.slots, 2, layout.channels), dtype=torch.float32)
        coefficients = x.new_empty((2, layout.channels), dtype=torch.float32)
        norm_parts = x.new_empty((layout.examples, cut.parts) if energies is not None else (0,), dtype=torch.float32)
        grad_weight = None if weight is None else torch.empty_like(mean)
        grad_bias = None if bias is None else torch.empty_like(mean)
        grad_x = sequence_like(x, x.dtype)

        def launch(config: Configuration, reversed_: bool, sum_: bool, write: bool) -> None:
            cut = layout.cut(config, x.device)
            _backward_kernel[(cut.programs,)](
                x,
                grad,
                grad_x,
                mean,
                rstd,
                mean if weight is None else weight,
                mean if bias is None else bias,
                coefficients,
                sums,
                norm_parts,
                layout.examples,
                layout.channels,
                layout.pixels,
                x.stride(0),
                x.stride(1),
                grad.stride(0),
                grad.stride(1),
                cut.channel_blocks,
                cut.tiles,
                cut.team,
                cut.teams,
                *neuron.scalars,
                neuron.alpha,
                T=steps,
                ROWS=cut.rows,
                COLUMNS=cut.columns,
                CHANNELS_LAST=layout.channels_last,
                MASKED=cut.masked,
                X_CONSTANT=ctx.repeat is not None,
                AFFINE=weight is not None,
                REVERSED=reversed_,
                SUM=sum_,
                NORM=energies is not None and sum_,
                WRITE=write,
                BATCH_STATISTICS=ctx.norm.use_batch,
                **step_constants(neuron.dynamics),
                DETACH_RESET=neuron.dynamics.detach_reset,
                SURROGATE=neuron.surrogate,
                **config.options,
            )

        # Statistics that are constants need no sums before the gradient can be written.
        launch(sums_config, True, True, not ctx.norm.use_batch)
        channel_programs = triton.cdiv(layout.channels, _FINISH["CHANNELS"])
        example_programs = 0 if energies is None else triton.cdiv(layout.examples, _FINISH_EXAMPLES["EXAMPLES"])
        _finish_backward_kernel[(channel_programs + example_programs,)](
            sums,
            rstd,
            mean if weight is None else weight,
            mean if grad_weight is None else grad_weight,
            mean if grad_bias is None else grad_bias,
            coefficients,
            energy_parts,
            norm_parts,
            mean if energies is None else energies[0],
            mean if energies is None else energies[1],
            layout.channels,
            cut.slots,
            layout.steps * layout.examples * layout.pixels,
            layout.examples,
            energy_parts.shape[-1],
            cut.parts,
            **_FINISH,
            **_FINISH_EXAMPLES,
            AFFINE=weight is not None,
            NORM=energies is not None,
            enable_fp_fusion=False,
        )
        if ctx.norm.use_batch:
            launch(GRADIENT.for_steps(steps), False, False, True)
        if ctx.repeat is not None:
            grad_x = grad_x[0]
        return (
            grad_x,
            grad_out if ctx.needs_input_grad[1] else None,
            grad_weight,
            grad_bias,
            None,
            None,
            None,
            None,
            None,
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
) -> tuple[Tensor, Tensor]:
    """Batch normalisation, T steps of integrate-and-fire from rest, and a residual sum, differentiably.

    Args:
        x: [T, N, C, *], or [N, C, *] with ``repeat``; float32, float16 or bfloat16; at least one element.
        residual: added to the spikes, shape and dtype of the output, or None.
        weight, bias: float32 [C], both or neither.
        repeat: T, where every step has the same x (direct coding).
        want_v: whether to compute the final membrane potential (without a gradient).
        energies: two float32 [N], both written in the backward pass: the squared norm of each example's output, and
            that of its gradient with respect to x with the normalisation's statistics held constant, each summed over
            time.

    Returns:
        spikes (+ residual) [T, N, C, *] in x's dtype, and the final potential, float32 [N, C, *] (empty if not wanted).
    """
    return _BatchNormLIF.apply(x, residual, weight, bias, norm, neuron, repeat, want_v, energies)
