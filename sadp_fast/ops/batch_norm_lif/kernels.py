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

The membrane is float32. All kernels compute it by the same operations without contraction, so the backward passes see
exactly the spikes that the forward pass wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.equations import INTERPRETED, surrogate_gradient

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
def _two_sums(a, b, AXIS: tl.constexpr):
    """Sums of two tiles, by one exchange between the threads."""
    if INTERPRETED:  # where such a reduction is a loop in Python over all elements
        return tl.sum(a, axis=AXIS), tl.sum(b, axis=AXIS)
    else:
        return tl.reduce((a, b), AXIS, _add_pairs)


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


# Of a gain, by which sums are divided again: 1 / tau becomes 0 where tau is infinite, or learned to be nearly so.
SMALLEST_GAIN = tl.constexpr(1e-30)


@triton.jit
def _keep_and_gain(reciprocal_tau_ptr, keep, gain, LEARNED_TAU: tl.constexpr, LEARNED_GAIN: tl.constexpr):
    """keep and gain; of a learned time constant keep, and where the input is divided by it gain, as they are now."""
    if LEARNED_TAU:
        reciprocal_tau = tl.load(reciprocal_tau_ptr)
        if LEARNED_GAIN:
            gain = tl.maximum(reciprocal_tau, SMALLEST_GAIN, propagate_nan=tl.PropagateNan.ALL)
        return 1.0 - reciprocal_tau, gain
    else:
        return keep, gain


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
    # A pixel for each channel: Triton 3.9's interpreter takes no mask made of a tensor and a number.
    pivot_pixel = first_tile * tile_pixels + tl.zeros_like(channel_out)
    pivot_offsets, exists = _tile_offsets(
        channel, _along_tile(pivot_pixel, CHANNELS_LAST), channels, pixels, CHANNELS_LAST
    )
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
    totals, all_squares = _two_sums(total, squares, 0 if CHANNELS_LAST else 1)
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


# Both kernels that add partial sums are as long as their latencies: what they read is asked for before any of it is
# used, and the sums are as two exchanges between the threads leave them, one value a thread, which is how they are
# stored. For that the partial sums are loaded one by one, as what may be unaligned is; with four at a time each result
# would go through shared memory once more (on an H100 0.4 and 0.6 us of 4).
@triton.jit(do_not_specialize=("slots", "elements"), do_not_specialize_on_alignment=("count_ptr", "partial_ptr"))
def _constants_kernel(
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
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    USE_BATCH: tl.constexpr,
    UPDATE_RUNNING: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    AFFINE: tl.constexpr,
    LEARNED_TAU: tl.constexpr,
    LEARNED_GAIN: tl.constexpr,
):
    """The constants of CHANNELS channels, from the batch's partial statistics (Chan et al.) or the running ones."""
    keep, gain = _keep_and_gain(reciprocal_tau_ptr, keep, gain, LEARNED_TAU, LEARNED_GAIN)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    bias = tl.zeros((CHANNELS,), tl.float32)
    if AFFINE:
        weight = tl.load(weight_ptr + channel, mask=known, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=known, other=0.0)
    if UPDATE_RUNNING or not USE_BATCH:
        running_mean = tl.load(running_mean_ptr + channel, mask=known, other=0.0)
        running_var = tl.load(running_var_ptr + channel, mask=known, other=1.0)
    if UPDATE_RUNNING:
        batches = tl.full((), 0, tl.int64)
        if CUMULATIVE:
            batches = tl.load(batches_ptr)
        elif tl.program_id(0) == 0:
            batches = tl.load(batches_ptr)
    if USE_BATCH:
        pivot = tl.load(partial_ptr + _pair(channel, 0, slots), mask=known, other=0.0)
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
            total += part[:, None] * apart
            squares += m2 + part[:, None] * apart * apart
            start += SLOTS
        totals, all_squares = _two_sums(total, squares, 0)
        count = elements.to(tl.float32)
        shift = totals / count
        mean = pivot + shift
        variance = all_squares / count - shift * shift
        variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a NaN in x has to be seen
        if UPDATE_RUNNING:
            if CUMULATIVE:
                momentum = 1.0 / batches.to(tl.float32)
            unbiased = variance * (count / tl.maximum(count - 1.0, 1.0))
            tl.store(running_mean_ptr + channel, running_mean + momentum * (mean - running_mean), mask=known)
            tl.store(running_var_ptr + channel, running_var + momentum * (unbiased - running_var), mask=known)
            if not CUMULATIVE:
                if tl.program_id(0) == 0:
                    tl.store(batches_ptr, batches + 1)
    else:
        mean = running_mean
        variance = running_var
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    scale = rstd
    if AFFINE:
        scale = scale * weight
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
    LEARNED_TAU: tl.constexpr,
):
    keep, _gain = _keep_and_gain(reciprocal_tau_ptr, keep, 1.0, LEARNED_TAU, False)
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
                x_step + one * (T - 1) * x_stride_t,
                residual_step + one * (T - 1) * residual_stride_t,
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
    GRAD_TAU: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    SURROGATE: tl.constexpr,
    RECURSE: tl.constexpr,
):
    """Backward through the STEPS last steps, which start from potential v.

    Returns the gradient with respect to the first of their h, and sums over these steps: of that gradient, of its
    product with the deviation of x from the mean, of its square, and, over all but the first step, of its product with
    v_rest less the potential before, which is the leak's part of dL/d(1/tau). The recursion is over time and unrolled
    by the compiler; RECURSE is this function (Triton before 3.5 cannot hash one that names itself).
    """
    if X_CONSTANT:
        deviation = x_constant
    else:
        deviation = _load(x_ptr + offsets, inside, MASKED) - mean
    grad_spike = _load(grad_ptr + offsets, inside, MASKED)
    u = _charge(v, _drive(deviation, scale, shift), keep)
    fired = u >= 0
    if STEPS > 1:
        v_after = _reset(u, fired, v_threshold, v_rest, SOFT_RESET)
        grad_h, grad_sum, product_sum, norm, leak_sum = RECURSE(
            x_ptr + x_stride_t,
            grad_ptr + grad_stride_t,
            grad_x_ptr + grad_x_stride_t,
            offsets,
            inside,
            x_stride_t,
            grad_stride_t,
            grad_x_stride_t,
            x_constant,
            v_after,
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
            GRAD_TAU,
            SOFT_RESET,
            DETACH_RESET,
            SURROGATE,
            RECURSE,
        )
        if GRAD_TAU:
            leak_sum = tl.fma(grad_h, v_rest - v_after, leak_sum)
        carry = grad_h * keep
    else:
        carry = tl.zeros_like(u)
        grad_sum = tl.zeros_like(u)
        product_sum = tl.zeros_like(u)
        norm = tl.zeros_like(u)
        leak_sum = tl.zeros_like(u)
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
    return grad_h, grad_sum, product_sum, norm, leak_sum


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _backward_kernel(
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
    LEARNED_TAU: tl.constexpr,
    LEARNED_GAIN: tl.constexpr,
    GRAD_TAU: tl.constexpr,
):
    """SUM: the first pass of training. WRITE: the second. Both in one pass where the statistics are constants."""
    keep, gain = _keep_and_gain(reciprocal_tau_ptr, keep, gain, LEARNED_TAU, LEARNED_GAIN)
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
    leak_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
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
            _grad_h, tile_grad, tile_product, tile_norm, tile_leak = _backward_steps(
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
                GRAD_TAU,
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
            if GRAD_TAU:  # no mask: beyond the end every gradient is zero
                leak_sum += tile_leak
            tile += step_tile
        if NORM:
            total = tl.sum(tl.sum(norm * (scale * scale), axis=1), axis=0)
            tl.store(norm_ptr + (one * n * channel_blocks + block) * team + slot % team, total)
        n += step_n
    if SUM:
        grads, products = _two_sums(gain * grad_sum, gain * product_sum, 0 if CHANNELS_LAST else 1)
        where = _pair(channel_out, slot, team * teams)
        tl.store(sums_ptr + where, grads, mask=channel_out < channels)
        tl.store(sums_ptr + GROUP + where, products, mask=channel_out < channels)
    if GRAD_TAU:
        tl.store(leak_ptr + program, tl.sum(tl.sum(leak_sum, axis=1), axis=0))


@triton.jit(
    do_not_specialize=("slots", "elements", "examples", "energy_parts", "norm_parts"),
    do_not_specialize_on_alignment=("sums_ptr",),
)
def _finish_backward_kernel(
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
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXAMPLES: tl.constexpr,
    PARTS: tl.constexpr,
    AFFINE: tl.constexpr,
    NORM: tl.constexpr,
    LEARNED_TAU: tl.constexpr,
    LEARNED_GAIN: tl.constexpr,
):
    """The first programs finish CHANNELS channels each: gradients of weight and bias, coefficients of that of x.

    The others add the partial sums of EXAMPLES examples each.
    """
    _keep, gain = _keep_and_gain(reciprocal_tau_ptr, 1.0, gain, LEARNED_TAU, LEARNED_GAIN)
    program = tl.program_id(0)
    channel_programs = tl.cdiv(channels, CHANNELS)
    if program < channel_programs:
        channel = program * CHANNELS + tl.arange(0, CHANNELS)
        known = channel < channels
        rstd = tl.load(constants_ptr + RSTD * channels + channel, mask=known, other=0.0)
        drive_scale = tl.load(constants_ptr + DRIVE_SCALE * channels + channel, mask=known, other=0.0)
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
        grad_sum, product_sum = _two_sums(grads, products, 0)
        scale = drive_scale / gain
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
