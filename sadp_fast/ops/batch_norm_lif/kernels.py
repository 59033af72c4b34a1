"""Batch normalisation and multi-step integrate-and-fire as one operator: y = norm(x), spikes = LIF(y) (+ residual).

Bytes moved, in elements of x: forward 3 (x for the channel statistics; x again, spikes out), backward 5 (x and the
gradient of the spikes, twice; gradient of x out). Nothing is saved but x and two numbers a channel: each backward pass
normalises and fires again in registers, the first one for the sums that the gradient of a normalisation needs, the
second one for the gradient itself. A residual is read once and added to the spikes as they are written.

How the work is cut. x [T, N, C, *] is a matrix of channels and pixels for each step and example, and cut into tiles of
some channels and pixels; all T steps of a tile are in registers at once. A team of programs shares an example, each of
them with every team-th tile of some channels, and goes on to further examples. Sums over pixels stay in registers until
the program ends, and leave as a pair of partial sums per channel and program; a small kernel adds these in fixed order.
Sums per example (energy of the output, squared gradient norm) leave likewise. So nothing is atomic, and every result is
the same in every run. Consecutive kernels walk in opposite directions: what the one has touched last, the next finds in
the cache.

Loops over run-time bounds are `while` loops: Triton's interpreter cannot take a tensor as the bound of a range().

Names in capitals are compile-time constants; configuration.py says what HOW bundles.

The membrane is float32. All kernels compute it by the same operations without contraction, so the backward passes see
exactly the spikes that the forward pass wrote.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..common.equations import (
    RelativeMembrane,
    drive_shift,
    grad_charge_relative,
    keep_and_gain,
    relative_charge,
    reset,
)
from ..common.rows import Rows, step_before, step_behind
from ..common.surrogate import INTERPRETED

# ----------------------------------------------------------------------------------------------- parts of the kernels


class Tile(NamedTuple):
    offsets: tl.tensor  # within one example of one step
    inside: tl.tensor  # which of them exist


class Norm(NamedTuple):
    """What turns a tile of x into the drive of the neurons, and their gradients into that of x."""

    mean: tl.tensor
    scale: tl.tensor
    shift: tl.tensor
    slope: tl.tensor | None
    offset: tl.tensor | None


@triton.jit
def _load(address, tile, HOW: tl.constexpr):
    mask, other = tile.inside if HOW.cut.masked else None, 0.0 if HOW.cut.masked else None
    return tl.load(address, mask=mask, other=other).to(tl.float32)


@triton.jit
def _store(address, value, tile, HOW: tl.constexpr):
    tl.store(address, value.to(address.dtype.element_ty), mask=tile.inside if HOW.cut.masked else None)


@triton.jit
def _per_channel(ptr, channel, channels, HOW: tl.constexpr):
    """One number a channel, laid along the tile."""
    if HOW.cut.masked:
        return tl.load(ptr + channel, mask=channel < channels, other=0.0)
    else:
        return tl.load(ptr + channel)


@triton.jit
def _add_pairs(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit
def _two_sums(a, b, AXIS: tl.constexpr):
    """Sums of two tiles, by one exchange between the threads."""
    if INTERPRETED:  # where such a reduction is a loop in Python over all elements
        return tl.sum(a, axis=AXIS), tl.sum(b, axis=AXIS)
    else:
        return tl.reduce((a, b), AXIS, _add_pairs)


@triton.jit
def _place(channel_blocks):
    """The program's block of channels, and its slot among the programs that share them."""
    program = tl.program_id(0)
    return program % channel_blocks, program // channel_blocks


@triton.jit
def _block_channels(block, HOW: tl.constexpr):
    WIDTH: tl.constexpr = HOW.cut.columns if HOW.cut.channels_last else HOW.cut.rows
    return block * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def _along_tile(channels, HOW: tl.constexpr):
    """One value a channel, shaped to broadcast over a tile."""
    return channels[None, :] if HOW.cut.channels_last else channels[:, None]


@triton.jit
def _offsets(channel, pixel, channels, pixels, HOW: tl.constexpr):
    """Of these channels and pixels, within one example of one step."""
    inside = (channel < channels) & (pixel < pixels)
    if HOW.cut.channels_last:
        return Tile(pixel * channels + channel, inside)
    else:
        return Tile(channel * pixels + pixel, inside)


@triton.jit
def _tile(number, channel, channels, pixels, HOW: tl.constexpr):
    if HOW.cut.channels_last:
        pixel = (number * HOW.cut.rows + tl.arange(0, HOW.cut.rows))[:, None]
    else:
        pixel = (number * HOW.cut.columns + tl.arange(0, HOW.cut.columns))[None, :]
    return _offsets(channel, pixel, channels, pixels, HOW)


# ------------------------------------------------------------------------------------------- statistics of the channels


# Channels of which a program that adds partial sums takes care: those of one slot fill a sector of memory.
GROUP = tl.constexpr(4)
# Partial sums that it adds at a time; more or all of them at once, or fewer, take as long.
SLOTS = tl.constexpr(1024)


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
def channel_statistics_kernel(
    x_ptr,
    count_ptr,  # how many values a program has seen of each of its channels, [slots]
    partial_ptr,  # their mean and their sum of squared deviations from it, see _pair
    examples,
    channels,
    pixels,
    x_stride_t,
    x_stride_n,
    channel_blocks,
    tiles,
    team,
    teams,
    HOW: tl.constexpr,
):
    """Mean and sum of squared deviations of each channel in the part of x that a program owns."""
    ROWS: tl.constexpr = HOW.cut.rows
    COLUMNS: tl.constexpr = HOW.cut.columns
    block, slot = _place(channel_blocks)
    first_n = slot // team
    first_tile = slot % team
    channel_out = _block_channels(block, HOW)
    channel = _along_tile(channel_out, HOW)
    one = tl.full((), 1, tl.int64)
    tile_pixels: tl.constexpr = HOW.cut.rows if HOW.cut.channels_last else HOW.cut.columns

    # Deviations are taken from the first value of the channel here, so that a mean far from zero costs no digits.
    pivot_ptr = x_ptr + one * first_n * x_stride_n
    # A pixel for each channel: Triton 3.9's interpreter takes no mask made of a tensor and a number.
    pivot_pixel = first_tile * tile_pixels + tl.zeros_like(channel_out)
    pivots = _offsets(channel, _along_tile(pivot_pixel, HOW), channels, pixels, HOW)
    address = pivot_ptr + tl.broadcast_to(pivots.offsets, (ROWS, COLUMNS))
    pivot = _load(address, Tile(pivots.offsets, tl.broadcast_to(pivots.inside, (ROWS, COLUMNS))), HOW)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    values = 0
    n = _last_of(first_n, examples, teams)
    while n >= 0:
        number = _last_of(first_tile, tiles, team)
        while number >= 0:
            tile = _tile(number, channel, channels, pixels, HOW)
            step_ptr = x_ptr + one * n * x_stride_n
            for _step in tl.static_range(HOW.cut.steps):
                deviation = _load(step_ptr + tile.offsets, tile, HOW) - pivot
                if HOW.cut.masked:
                    deviation = tl.where(tile.inside, deviation, 0.0)
                total += deviation
                squares = tl.fma(deviation, deviation, squares)
                step_ptr += x_stride_t
            values += tl.minimum(tile_pixels, pixels - number * tile_pixels)
            number -= team
        n -= teams
    count = (HOW.cut.steps * values).to(tl.float32)
    totals, all_squares = _two_sums(total, squares, 0 if HOW.cut.channels_last else 1)
    shift = totals / count
    where = _pair(channel_out, slot, team * teams)
    pivots = _offsets(channel_out, pivot_pixel, channels, pixels, HOW)
    pivots = _load(pivot_ptr + pivots.offsets, pivots, HOW)
    tl.store(partial_ptr + where, pivots + shift, mask=channel_out < channels)
    tl.store(partial_ptr + GROUP + where, all_squares - totals * shift, mask=channel_out < channels)
    if block == 0:
        tl.store(count_ptr + slot, count)


# Rows of the constants [4, C] that one call computes for all its kernels.
MEAN = tl.constexpr(0)
RSTD = tl.constexpr(1)  # 1 / sqrt(variance + eps)
DRIVE_SCALE = tl.constexpr(2)
DRIVE_SHIFT = tl.constexpr(3)


# Both kernels that add partial sums are as long as their latencies: what they read is asked for before any of it is
# used, and the sums are as two exchanges between the threads leave them, one value a thread, which is how they are
# stored. For that the partial sums are loaded one by one, as what may be unaligned is; with four at a time each result
# would go through shared memory once more (on an H100 0.4 and 0.6 us of 4).
@triton.jit(do_not_specialize=("slots", "elements"), do_not_specialize_on_alignment=("count_ptr", "partial_ptr"))
def constants_kernel(
    count_ptr,
    partial_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    weight_ptr,
    bias_ptr,
    reciprocal_tau_ptr,
    constants_ptr,
    channels,
    slots,
    elements,  # of one channel
    momentum,
    eps,
    keep,
    gain,
    v_threshold,
    v_rest,
    HOW: tl.constexpr,
):
    """The constants of GROUP channels, from the batch's partial statistics (Chan et al.) or the running ones."""
    keep, gain = keep_and_gain(reciprocal_tau_ptr, keep, gain, HOW)
    membrane = RelativeMembrane(keep, v_threshold, v_rest, None)
    channel = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    known = channel < channels
    bias = tl.zeros((GROUP,), tl.float32)
    if HOW.norm.affine:
        weight = tl.load(weight_ptr + channel, mask=known, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=known, other=0.0)
    if HOW.norm.update or not HOW.norm.use_batch:
        running_mean = tl.load(running_mean_ptr + channel, mask=known, other=0.0)
        running_var = tl.load(running_var_ptr + channel, mask=known, other=1.0)
    if HOW.norm.update:
        batches = tl.full((), 0, tl.int64)
        if HOW.norm.cumulative:
            batches = tl.load(batches_ptr)
        elif tl.program_id(0) == 0:
            batches = tl.load(batches_ptr)
    if HOW.norm.use_batch:
        pivot = tl.load(partial_ptr + _pair(channel, 0, slots), mask=known, other=0.0)
        total = tl.zeros((SLOTS, GROUP), tl.float32)
        squares = tl.zeros((SLOTS, GROUP), tl.float32)
        start = 0
        while start < slots:
            slot = start + tl.arange(0, SLOTS)
            inside = (slot < slots)[:, None] & known[None, :]
            where = _pair(channel[None, :], slot[:, None], slots)
            part = tl.load(count_ptr + slot, mask=slot < slots, other=0.0)
            part_mean = tl.load(partial_ptr + where, mask=inside, other=0.0)
            m2 = tl.load(partial_ptr + GROUP + where, mask=inside, other=0.0)
            apart = tl.where(inside, part_mean - pivot[None, :], 0.0)
            total += part[:, None] * apart
            squares += m2 + part[:, None] * apart * apart
            start += SLOTS
        totals, all_squares = _two_sums(total, squares, 0)
        count = elements.to(tl.float32)
        shift = totals / count
        mean = pivot + shift
        variance = all_squares / count - shift * shift
        variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a NaN in x has to be seen
        if HOW.norm.update:
            if HOW.norm.cumulative:
                momentum = 1.0 / batches.to(tl.float32)
            unbiased = variance * (count / tl.maximum(count - 1.0, 1.0))
            tl.store(running_mean_ptr + channel, running_mean + momentum * (mean - running_mean), mask=known)
            tl.store(running_var_ptr + channel, running_var + momentum * (unbiased - running_var), mask=known)
            if not HOW.norm.cumulative:
                if tl.program_id(0) == 0:
                    tl.store(batches_ptr, batches + 1)
    else:
        mean = running_mean
        variance = running_var
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    scale = rstd
    if HOW.norm.affine:
        scale = scale * weight
    tl.store(constants_ptr + MEAN * channels + channel, mean, mask=known)
    tl.store(constants_ptr + RSTD * channels + channel, rstd, mask=known)
    tl.store(constants_ptr + DRIVE_SCALE * channels + channel, gain * scale, mask=known)
    shift = drive_shift(bias, gain, membrane)
    tl.store(constants_ptr + DRIVE_SHIFT * channels + channel, shift, mask=known)


# ------------------------------------------------------------------------------------------------ normalise and fire


@triton.jit
def _load_norm(constants_ptr, channel, channels, HOW: tl.constexpr):
    """Without slope and offset, which only the gradient of x needs."""
    mean = _per_channel(constants_ptr + MEAN * channels, channel, channels, HOW)
    scale = _per_channel(constants_ptr + DRIVE_SCALE * channels, channel, channels, HOW)
    shift = _per_channel(constants_ptr + DRIVE_SHIFT * channels, channel, channels, HOW)
    return mean, scale, shift


@triton.jit
def _drive(deviation, norm):
    scale, shift = tl.broadcast_to(norm.scale, deviation.shape), tl.broadcast_to(norm.shift, deviation.shape)
    return tl.fma(deviation, scale, shift)


@triton.jit
def _forward_steps(x, residual, out, tile, drive, norm, membrane, STEPS: tl.constexpr, HOW: tl.constexpr):
    """The first STEPS steps, x to out at the last of them: returns the potential behind it, and the energy so far.

    The recursion is over time and unrolled by the compiler: it loads on the way down, and fires on the way up, so that
    the loads of all steps are under way before the first store. ``drive`` is that of a repeated x.
    """
    drive_step = drive if HOW.cut.repeated else _drive(_load(x.ptr + tile.offsets, tile, HOW) - norm.mean, norm)
    if HOW.does.residual:
        added = _load(residual.ptr + tile.offsets, tile, HOW)
    if STEPS > 1:
        v, energy = _forward_steps(
            step_before(x), step_before(residual), step_before(out), tile, drive, norm, membrane, STEPS - 1, HOW
        )
    else:
        v = tl.zeros_like(drive_step) + membrane.v_rest
        energy = tl.zeros_like(drive_step)
    u = relative_charge(v, drive_step, membrane)
    fired = u >= 0
    spikes = tl.where(fired, 1.0, 0.0)
    if HOW.does.residual:
        spikes += added
    _store(out.ptr + tile.offsets, spikes, tile, HOW)
    if HOW.does.energy:
        if HOW.cut.masked:
            spikes = tl.where(tile.inside, spikes, 0.0)
        energy = tl.fma(spikes, spikes, energy)
    return reset(u + membrane.v_threshold, u, fired, membrane, HOW), energy


@triton.jit(do_not_specialize=_UNSPECIALISED)
def norm_forward_kernel(
    x_ptr,
    residual_ptr,
    out_ptr,
    v_ptr,
    constants_ptr,
    reciprocal_tau_ptr,
    energy_ptr,  # partial sums of the squares of the output, [N, channel_blocks, team]
    examples,
    channels,
    pixels,
    x_stride_t,
    x_stride_n,
    residual_stride_t,
    residual_stride_n,
    channel_blocks,
    tiles,
    team,
    teams,
    keep,
    v_threshold,
    v_rest,
    HOW: tl.constexpr,
):
    ROWS: tl.constexpr = HOW.cut.rows
    COLUMNS: tl.constexpr = HOW.cut.columns
    keep, _gain = keep_and_gain(reciprocal_tau_ptr, keep, 1.0, HOW)
    block, slot = _place(channel_blocks)
    channel_out = _block_channels(block, HOW)
    channel = _along_tile(channel_out, HOW)
    mean, scale, shift = _load_norm(constants_ptr, channel, channels, HOW)
    norm = Norm(mean, scale, shift, None, None)
    membrane = RelativeMembrane(keep, v_threshold, v_rest, None)
    one = tl.full((), 1, tl.int64)
    size = channels * pixels
    out_stride_t = one * examples * size
    last: tl.constexpr = HOW.cut.steps - 1

    n = slot // team
    while n < examples:
        energy = tl.zeros((ROWS, COLUMNS), tl.float32)
        number = slot % team
        while number < tiles:
            tile = _tile(number, channel, channels, pixels, HOW)
            x_step = x_ptr + one * n * x_stride_n
            residual_step = residual_ptr + one * n * residual_stride_n
            out_step = out_ptr + one * n * size
            drive = tl.zeros((ROWS, COLUMNS), tl.float32)
            if HOW.cut.repeated:
                drive = _drive(_load(x_step + tile.offsets, tile, HOW) - mean, norm)
            x = Rows(x_step + one * last * x_stride_t, x_stride_t)
            residual = Rows(residual_step + one * last * residual_stride_t, residual_stride_t)
            out = Rows(out_step + last * out_stride_t, out_stride_t)
            v, tile_energy = _forward_steps(x, residual, out, tile, drive, norm, membrane, HOW.cut.steps, HOW)
            energy += tile_energy
            if HOW.does.v:
                _store(v_ptr + one * n * size + tile.offsets, v, tile, HOW)
            number += team
        if HOW.does.energy:
            total = tl.sum(tl.sum(energy, axis=1), axis=0)
            tl.store(energy_ptr + (one * n * channel_blocks + block) * team + slot % team, total)
        n += teams


# --------------------------------------------------------------------------------------------------------- backward


class Sums(NamedTuple):
    """Sums over steps, for each element of a tile."""

    grad: tl.tensor  # of dL/dh
    product: tl.tensor  # of its product with the deviation of x from the mean
    norm: tl.tensor  # of its square
    leak: tl.tensor  # over all but the first step, of its product with v_rest less the potential before: the leak's
    # part of dL/d(1/tau)


@triton.jit
def _gradient(grad_h, deviation, norm):
    """Gradient of x: the direct part, and those by way of the variance and of the mean."""
    slope, offset = tl.broadcast_to(norm.slope, deviation.shape), tl.broadcast_to(norm.offset, deviation.shape)
    indirect = tl.fma(deviation, slope, offset)
    return tl.fma(grad_h, tl.broadcast_to(norm.scale, grad_h.shape), indirect)


@triton.jit
def _backward_steps(x, grad, grad_x, tile, deviation, v, norm, membrane, STEPS: tl.constexpr, HOW: tl.constexpr):
    """Backward through the STEPS last steps, which start from potential v, with x to grad_x at the first of them.

    Returns the gradient with respect to the first of their h, and their sums. ``deviation`` is that of a repeated x.
    The recursion is over time and unrolled by the compiler.
    """
    deviation_step = deviation if HOW.cut.repeated else _load(x.ptr + tile.offsets, tile, HOW) - norm.mean
    grad_spike = _load(grad.ptr + tile.offsets, tile, HOW)
    u = relative_charge(v, _drive(deviation_step, norm), membrane)
    fired = u >= 0
    if STEPS > 1:
        v_after = reset(u + membrane.v_threshold, u, fired, membrane, HOW)
        grad_h, sums = _backward_steps(
            step_behind(x),
            step_behind(grad),
            step_behind(grad_x),
            tile,
            deviation,
            v_after,
            norm,
            membrane,
            STEPS - 1,
            HOW,
        )
        leak = tl.fma(grad_h, membrane.v_rest - v_after, sums.leak) if HOW.does.grad_tau else sums.leak
        grad_v = grad_h * membrane.keep
    else:
        grad_v = tl.zeros_like(u)
        leak = tl.zeros_like(u)
        sums = Sums(tl.zeros_like(u), tl.zeros_like(u), tl.zeros_like(u), leak)
    grad_h = grad_charge_relative(grad_v, grad_spike, u, fired, membrane, HOW)
    grad_sum, product, square = sums.grad, sums.product, sums.norm
    if HOW.cut.repeated:
        grad_sum += grad_h
    else:
        if HOW.does.sums:
            grad_sum += grad_h
            product = tl.fma(grad_h, deviation_step, product)
        if HOW.does.norm:
            square = tl.fma(grad_h, grad_h, square)
        if HOW.does.write:
            _store(grad_x.ptr + tile.offsets, _gradient(grad_h, deviation_step, norm), tile, HOW)
    return grad_h, Sums(grad_sum, product, square, leak)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def norm_backward_kernel(
    x_ptr,
    grad_ptr,
    grad_x_ptr,
    constants_ptr,
    reciprocal_tau_ptr,
    coefficients_ptr,  # [2, C]: what multiplies the deviation of x, and what is added, in the gradient of x
    sums_ptr,  # partial sums of the gradient and of its product with the deviation, see _pair
    norm_ptr,  # partial squared norms, [N, channel_blocks, team]
    leak_ptr,  # partial sums of the leak's part of the gradient of 1 / tau, [programs]
    examples,
    channels,
    pixels,
    x_stride_t,
    x_stride_n,
    grad_stride_t,
    grad_stride_n,
    channel_blocks,
    tiles,
    team,
    teams,
    keep,
    gain,
    v_threshold,
    v_rest,
    alpha,
    HOW: tl.constexpr,
):
    ROWS: tl.constexpr = HOW.cut.rows
    COLUMNS: tl.constexpr = HOW.cut.columns
    keep, gain = keep_and_gain(reciprocal_tau_ptr, keep, gain, HOW)
    block, slot = _place(channel_blocks)
    channel_out = _block_channels(block, HOW)
    channel = _along_tile(channel_out, HOW)
    mean, scale, shift = _load_norm(constants_ptr, channel, channels, HOW)
    slope = tl.zeros_like(mean)
    offset = tl.zeros_like(mean)
    if HOW.does.indirect:
        slope = _per_channel(coefficients_ptr, channel, channels, HOW)
        offset = _per_channel(coefficients_ptr + channels, channel, channels, HOW)
    norm = Norm(mean, scale, shift, slope, offset)
    membrane = RelativeMembrane(keep, v_threshold, v_rest, alpha)
    one = tl.full((), 1, tl.int64)
    size = channels * pixels
    grad_x_stride_t = one * examples * size

    grad_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    product_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    leak_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    step_n = teams
    step_tile = team
    first_n = slot // team
    if HOW.does.sums:  # the other way round than the kernels before and behind
        step_n = -teams
        step_tile = -team
        first_n = _last_of(slot // team, examples, teams)
    n = first_n
    while (n >= 0) & (n < examples):
        squares = tl.zeros((ROWS, COLUMNS), tl.float32)
        number = slot % team
        if HOW.does.sums:
            number = _last_of(slot % team, tiles, team)
        while (number >= 0) & (number < tiles):
            tile = _tile(number, channel, channels, pixels, HOW)
            deviation = tl.zeros((ROWS, COLUMNS), tl.float32)
            if HOW.cut.repeated:
                deviation = _load(x_ptr + one * n * x_stride_n + tile.offsets, tile, HOW) - mean
            x = Rows(x_ptr + one * n * x_stride_n, x_stride_t)
            grad = Rows(grad_ptr + one * n * grad_stride_n, grad_stride_t)
            grad_x = Rows(grad_x_ptr + one * n * size, grad_x_stride_t)
            v = tl.zeros((ROWS, COLUMNS), tl.float32) + v_rest
            _grad_h, sums = _backward_steps(x, grad, grad_x, tile, deviation, v, norm, membrane, HOW.cut.steps, HOW)
            if HOW.cut.repeated:
                sums = Sums(sums.grad, sums.grad * deviation, sums.grad * sums.grad, sums.leak)
                if HOW.does.write:
                    gradient = _gradient(sums.grad, deviation, norm)
                    _store(grad_x_ptr + one * n * size + tile.offsets, gradient, tile, HOW)
            if HOW.does.sums:
                grad_sum += sums.grad
                product_sum += sums.product
            if HOW.does.norm:
                squares += sums.norm
            if HOW.does.grad_tau:  # no mask: beyond the end every gradient is zero
                leak_sum += sums.leak
            number += step_tile
        if HOW.does.norm:
            total = tl.sum(tl.sum(squares * (scale * scale), axis=1), axis=0)
            tl.store(norm_ptr + (one * n * channel_blocks + block) * team + slot % team, total)
        n += step_n
    if HOW.does.sums:
        grads, products = _two_sums(gain * grad_sum, gain * product_sum, 0 if HOW.cut.channels_last else 1)
        where = _pair(channel_out, slot, team * teams)
        tl.store(sums_ptr + where, grads, mask=channel_out < channels)
        tl.store(sums_ptr + GROUP + where, products, mask=channel_out < channels)
    if HOW.does.grad_tau:
        tl.store(leak_ptr + tl.program_id(0), tl.sum(tl.sum(leak_sum, axis=1), axis=0))


# Examples of which a program adds partial sums, and so many of them at a time.
EXAMPLES = tl.constexpr(32)
PARTS = tl.constexpr(16)


@triton.jit(
    do_not_specialize=("slots", "elements", "examples", "energy_parts", "norm_parts"),
    do_not_specialize_on_alignment=("sums_ptr",),
)
def finish_backward_kernel(
    sums_ptr,
    constants_ptr,
    reciprocal_tau_ptr,
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
    HOW: tl.constexpr,
):
    """The first programs finish GROUP channels each: gradients of weight and bias, coefficients of that of x.

    The others add the partial sums of EXAMPLES examples each.
    """
    _keep, gain = keep_and_gain(reciprocal_tau_ptr, 1.0, gain, HOW)
    program = tl.program_id(0)
    channel_programs = tl.cdiv(channels, GROUP)
    if program < channel_programs:
        channel = program * GROUP + tl.arange(0, GROUP)
        known = channel < channels
        rstd = tl.load(constants_ptr + RSTD * channels + channel, mask=known, other=0.0)
        drive_scale = tl.load(constants_ptr + DRIVE_SCALE * channels + channel, mask=known, other=0.0)
        grads = tl.zeros((SLOTS, GROUP), tl.float32)
        products = tl.zeros((SLOTS, GROUP), tl.float32)
        start = 0
        while start < slots:
            slot = start + tl.arange(0, SLOTS)
            inside = (slot < slots)[:, None] & known[None, :]
            where = _pair(channel[None, :], slot[:, None], slots)
            grads += tl.load(sums_ptr + where, mask=inside, other=0.0)
            products += tl.load(sums_ptr + GROUP + where, mask=inside, other=0.0)
            start += SLOTS
        grad_sum, product_sum = _two_sums(grads, products, 0)
        scale = drive_scale / gain
        if HOW.affine:
            tl.store(grad_weight_ptr + channel, product_sum * rstd, mask=known)
            tl.store(grad_bias_ptr + channel, grad_sum, mask=known)
        tl.store(coefficients_ptr + channel, -scale * rstd * rstd * (product_sum / elements), mask=known)
        tl.store(coefficients_ptr + channels + channel, -scale * (grad_sum / elements), mask=known)
    else:
        if HOW.scored:
            n = (program - channel_programs) * EXAMPLES + tl.arange(0, EXAMPLES)
            energy = _add_parts(energy_part_ptr, n, examples, energy_parts)
            tl.store(energy_ptr + n, energy, mask=n < examples)
            norm = _add_parts(norm_part_ptr, n, examples, norm_parts)
            tl.store(norm_ptr + n, norm, mask=n < examples)


@triton.jit
def _add_parts(part_ptr, n, examples, parts):
    """Rows n of [N, parts], summed."""
    total = tl.zeros((EXAMPLES, PARTS), tl.float32)
    start = 0
    while start < parts:
        part = start + tl.arange(0, PARTS)
        inside = (n < examples)[:, None] & (part < parts)[None, :]
        total += tl.load(part_ptr + n[:, None] * parts + part[None, :], mask=inside, other=0.0)
        start += PARTS
    return tl.sum(total, axis=1)
