"""The kernels of multi-step integrate-and-fire, forward and backward, each one pass over memory.

A program owns one example and BLOCK of its elements and walks the T steps with the membrane potential in registers; the
time axis is never split over programs, so nothing is synchronised. Both kernels walk a chunk of steps by a compile-time
recursion over time that loads on the way in and stores on the way out: all loads of a chunk are in flight before its
first store. The backward kernel needs nothing but the input: the way in walks the potential forward again, the way out
walks the gradient back. For T beyond one chunk the forward pass also writes the potential between chunks, and the
backward pass starts each chunk from there. There, and where the launch says so (TILE), a chunk is loaded as one tile
before it is walked: one chunk's loads are in flight while another is worked on.

State and arithmetic are float32 whatever the tensors' dtype. Floating-point contraction is off and divisions are
exact, so that a spike is the same, bit for bit, as in the plain torch reference.

Per-example statistics: each program reduces its block for each step, or for all steps of a chunk at once, gathers a
chunk's sums in the lanes of a vector and writes them with one store; what reads the partial sums [N, programs, T] adds
them in a fixed order, so the results are deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.equations import (
    INTERPRETED,
    LEAK_WITH_INPUT_DECAY,
    LEARNED_RECIPROCAL,
    NO_LEAK,
    charge,
    charge_slope,
    reciprocal_tau,
    reset,
    surrogate_gradient,
)
from ..common.launch import await_previous_kernel

# A function that recurses over time gets itself as RECURSE: Triton before 3.5 hashes a function with all that it
# names, without end for one that names itself. RAGGED: the last chunk has steps beyond T, in which nothing happens.


@triton.jit
def _forward_steps(
    x_ptr,
    spikes_ptr,
    v_seq_ptr,
    offsets,
    mask,
    lanes,
    first,
    T,
    x_stride_t,
    dense_stride_t,
    v,
    counts,
    tau,
    v_threshold,
    v_rest,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    RAGGED: tl.constexpr,
    DYNAMICS: tl.constexpr,
    TAU: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    STORE_SPIKES: tl.constexpr,
    STORE_V_SEQ: tl.constexpr,
    COUNT_SPIKES: tl.constexpr,
    RECURSE: tl.constexpr,
):
    """From step STEP of a chunk of STEPS, that starts at step ``first`` of T and at the pointers, to its end.

    v is the potential before; returns that after the last step, and the spikes of step STEP + i in lane STEP + i.
    """
    if RAGGED:
        mask = tl.where(first + STEP < T, mask, False)
    x = tl.load(x_ptr + STEP * x_stride_t + offsets, mask=mask, other=0.0).to(tl.float32)
    h = charge(x, v, tau, v_rest, DYNAMICS, TAU)
    fired = h >= v_threshold
    spikes = tl.where(fired & mask if COUNT_SPIKES else fired, 1.0, 0.0)
    v_after = reset(h, fired, v_threshold, v_rest, SOFT_RESET)
    if RAGGED:
        v_after = tl.where(mask, v_after, v)
    v_end = v_after
    if STEP + 1 < STEPS:
        v_end, counts = RECURSE(
            x_ptr,
            spikes_ptr,
            v_seq_ptr,
            offsets,
            mask,
            lanes,
            first,
            T,
            x_stride_t,
            dense_stride_t,
            v_after,
            counts,
            tau,
            v_threshold,
            v_rest,
            STEP + 1,
            STEPS,
            RAGGED,
            DYNAMICS,
            TAU,
            SOFT_RESET,
            STORE_SPIKES,
            STORE_V_SEQ,
            COUNT_SPIKES,
            RECURSE,
        )
    if STORE_SPIKES:
        tl.store(spikes_ptr + STEP * dense_stride_t + offsets, spikes.to(spikes_ptr.dtype.element_ty), mask=mask)
    if STORE_V_SEQ:
        tl.store(v_seq_ptr + STEP * dense_stride_t + offsets, v_after, mask=mask)
    if COUNT_SPIKES:  # at most 2^24 spikes a program: exact in float32, and cheaper to add than integers
        counts = tl.where(lanes == STEP, tl.sum(spikes, axis=0), counts)
    return v_end, counts


# Tiles. With few neurons and many steps a multiprocessor has no other warp to turn to while one waits, so that the next
# chunk is loaded while this one is worked on, nothing but the recurrences themselves waits for the step before, and all
# steps are summed together. A tile [BLOCK, LANES] has a step in each column and an element's row in one thread, so that
# halving and joining tiles moves nothing. It is loaded or stored by one operation, not by one a step: for each of these
# Triton's coalescing pass looks at all that hangs together with it, in a time that grows with the square of that.


@triton.jit
def _reversed_bits(LANES: tl.constexpr):
    """[LANES]: numbers with their bits the other way round: of a tile's columns, since tl.split divides by the lowest
    bit, and of lanes, as ``_add_step`` leaves them, the steps."""
    numbers = tl.arange(0, LANES)
    reversed_numbers = tl.zeros_like(numbers)
    for BIT in tl.static_range(16):
        if (1 << BIT) < LANES:
            reversed_numbers = reversed_numbers * 2 + (numbers >> BIT) % 2
    return reversed_numbers


@triton.jit
def _inside(steps, first, T, STEPS: tl.constexpr):
    """Which steps of a chunk of STEPS exist: the chunk starts at step ``first`` of T."""
    return (steps < STEPS) & (first + steps < T)


@triton.jit
def _halves(tile):
    """The tiles of the first and of the second half of a tile's steps; one step's is a vector."""
    if tile.shape[1] == 2:
        return tl.split(tile)
    else:
        return tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))


@triton.jit
def _whole(first, second):
    """The tile of which these are the halves."""
    tile = tl.join(first, second)
    if len(tile.shape) == 2:
        return tile
    else:
        return tl.reshape(tile, (tile.shape[0], 2 * tile.shape[1]))


@triton.jit
def _load_tile(ptr, offsets, mask, steps, inside, stride_t, MASKED: tl.constexpr):
    """A chunk, which starts at ptr; MASKED: zeros where an element (mask) or a step (inside) does not exist."""
    address = (ptr + steps * stride_t)[None, :] + offsets[:, None]
    if MASKED:
        return tl.load(address, mask=mask[:, None] & inside[None, :], other=0.0)
    else:
        return tl.load(address)


@triton.jit
def _store_tile(ptr, tile, offsets, mask, steps, inside, stride_t, MASKED: tl.constexpr):
    """The reverse of ``_load_tile``."""
    address = (ptr + steps * stride_t)[None, :] + offsets[:, None]
    if MASKED:
        tl.store(address, tile.to(ptr.dtype.element_ty), mask=mask[:, None] & inside[None, :])
    else:
        tl.store(address, tile.to(ptr.dtype.element_ty))


@triton.jit
def _call_into_cache(ptr, first, T, stride_t, start, size, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Asks for BLOCK elements, from ``start`` on, of each of STEPS steps to be brought into the L2 cache."""
    if not INTERPRETED:
        SECTOR: tl.constexpr = 32 * 8 // ptr.dtype.element_ty.primitive_bitwidth  # elements in 32 bytes
        SECTORS: tl.constexpr = BLOCK // SECTOR
        lanes = tl.arange(0, STEPS * SECTORS)
        step, element = first + lanes // SECTORS, start + lanes % SECTORS * SECTOR
        inside = (step >= 0) & (step < T) & (element < size)
        address = ptr + tl.where(inside, step * stride_t + element, 0)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [address.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _forward_tile(
    x,
    first,
    T,
    v,
    tau,
    v_threshold,
    v_rest,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    RAGGED: tl.constexpr,
    DYNAMICS: tl.constexpr,
    TAU: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    RECURSE: tl.constexpr,
):
    """The steps whose inputs are the tile x, the first of them step STEP of a chunk; else as ``_forward_steps``.

    Returns the last potential, and the tiles of which neurons fired and of the potentials.
    """
    if len(x.shape) > 1:
        HALF: tl.constexpr = x.shape[1] // 2
        lower, upper = _halves(x)
        v, lower_fired, lower_v = RECURSE(
            lower,
            first,
            T,
            v,
            tau,
            v_threshold,
            v_rest,
            STEP,
            STEPS,
            RAGGED,
            DYNAMICS,
            TAU,
            SOFT_RESET,
            RECURSE,
        )
        v, upper_fired, upper_v = RECURSE(
            upper,
            first,
            T,
            v,
            tau,
            v_threshold,
            v_rest,
            STEP + HALF,
            STEPS,
            RAGGED,
            DYNAMICS,
            TAU,
            SOFT_RESET,
            RECURSE,
        )
        return v, _whole(lower_fired, upper_fired), _whole(lower_v, upper_v)
    elif STEP >= STEPS:
        return v, tl.zeros(x.shape, tl.int1), tl.zeros(x.shape, tl.float32)
    else:
        h = charge(x.to(tl.float32), v, tau, v_rest, DYNAMICS, TAU)
        fired = h >= v_threshold
        v_after = reset(h, fired, v_threshold, v_rest, SOFT_RESET)
        if RAGGED:
            v_after = tl.where(first + STEP < T, v_after, v)
        return v_after, fired, v_after


@triton.jit
def _derivatives(
    x,
    v,
    tau,
    v_threshold,
    v_rest,
    alpha,
    DYNAMICS: tl.constexpr,
    TAU: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    SURROGATE: tl.constexpr,
    RECURSE: tl.constexpr,
):
    """The way in of a chunk: for the tile x of inputs those of dv/dh, ds/dh and dh/d(1/tau), and the last potential."""
    if len(x.shape) > 1:
        lower, upper = _halves(x)
        lower_dv, lower_ds, lower_slope, v = RECURSE(
            lower,
            v,
            tau,
            v_threshold,
            v_rest,
            alpha,
            DYNAMICS,
            TAU,
            SOFT_RESET,
            DETACH_RESET,
            SURROGATE,
            RECURSE,
        )
        upper_dv, upper_ds, upper_slope, v = RECURSE(
            upper,
            v,
            tau,
            v_threshold,
            v_rest,
            alpha,
            DYNAMICS,
            TAU,
            SOFT_RESET,
            DETACH_RESET,
            SURROGATE,
            RECURSE,
        )
        return _whole(lower_dv, upper_dv), _whole(lower_ds, upper_ds), _whole(lower_slope, upper_slope), v
    else:
        x = x.to(tl.float32)
        h = charge(x, v, tau, v_rest, DYNAMICS, TAU)
        fired = h >= v_threshold
        ds_dh = surrogate_gradient(h - v_threshold, alpha, SURROGATE)
        dv_dh = tl.full(h.shape, 1.0, tl.float32) if SOFT_RESET else tl.where(fired, 0.0, 1.0)
        if not DETACH_RESET:
            dv_dh = tl.fma(ds_dh, tl.zeros_like(h) - v_threshold if SOFT_RESET else v_rest - h, dv_dh)
        return dv_dh, ds_dh, charge_slope(x, v, v_rest, DYNAMICS), reset(h, fired, v_threshold, v_rest, SOFT_RESET)


@triton.jit
def _backward_tile(
    dv_dh,
    grad_fired,
    grad_v_seq,
    first,
    T,
    carry,
    tau,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    RAGGED: tl.constexpr,
    DYNAMICS: tl.constexpr,
    TAU: tl.constexpr,
    HAS_GRAD_V_SEQ: tl.constexpr,
    RECURSE: tl.constexpr,
):
    """The way out of a chunk, last step first, from the tiles' last step to STEP; else as ``_backward_steps``.

    grad_fired is dL/ds * ds/dh; returns dL/dv before step STEP and the tile of dL/dh.
    """
    if len(dv_dh.shape) > 1:
        HALF: tl.constexpr = dv_dh.shape[1] // 2
        lower_dv, upper_dv = _halves(dv_dh)
        lower_fired, upper_fired = _halves(grad_fired)
        lower_grad_v, upper_grad_v = _halves(grad_v_seq)
        carry, upper_grad_h = RECURSE(
            upper_dv,
            upper_fired,
            upper_grad_v,
            first,
            T,
            carry,
            tau,
            STEP + HALF,
            STEPS,
            RAGGED,
            DYNAMICS,
            TAU,
            HAS_GRAD_V_SEQ,
            RECURSE,
        )
        carry, lower_grad_h = RECURSE(
            lower_dv,
            lower_fired,
            lower_grad_v,
            first,
            T,
            carry,
            tau,
            STEP,
            STEPS,
            RAGGED,
            DYNAMICS,
            TAU,
            HAS_GRAD_V_SEQ,
            RECURSE,
        )
        return carry, _whole(lower_grad_h, upper_grad_h)
    elif STEP >= STEPS:
        return carry, tl.zeros_like(carry)
    else:
        grad_v = carry + grad_v_seq if HAS_GRAD_V_SEQ else carry
        grad_h = tl.fma(dv_dh, grad_v, grad_fired)
        grad_v_before = grad_h if DYNAMICS == NO_LEAK else grad_h * (1.0 - reciprocal_tau(tau, TAU))
        return tl.where(first + STEP < T, grad_v_before, carry) if RAGGED else grad_v_before, grad_h


@triton.jit
def _lif_forward_kernel(
    x_ptr,
    v_init_ptr,
    reciprocal_tau_ptr,
    spikes_ptr,
    v_final_ptr,
    v_seq_ptr,
    checkpoint_ptr,
    count_ptr,
    size,  # elements of one example
    blocks,  # programs of one example
    examples,
    x_stride_t,
    x_stride_n,
    v_init,
    tau,
    v_threshold,
    v_rest,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENTS: tl.constexpr,
    DYNAMICS: tl.constexpr,
    TAU: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    REST_AT_ZERO: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
    HAS_V_INIT: tl.constexpr,
    STORE_SPIKES: tl.constexpr,
    STORE_V: tl.constexpr,
    STORE_V_SEQ: tl.constexpr,
    STORE_CHECKPOINTS: tl.constexpr,
    COUNT_SPIKES: tl.constexpr,
    TILE: tl.constexpr,
    CALL_AHEAD: tl.constexpr,
):
    if REST_AT_ZERO:
        v_rest = 0.0  # known to the compiler, which then leaves out what it is subtracted from
    program = tl.program_id(0)
    one = tl.full((), 1, tl.int64)  # offsets between examples and steps can pass 2^31 elements
    n = one * (program // blocks)
    offsets = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    if TILE:
        offsets = tl.multiple_of(offsets, ELEMENTS)  # and of no more: wider accesses would take other threads' elements
    mask = tl.full((BLOCK,), True, tl.int1) if EVEN else offsets < size
    state_size = one * examples * size  # every tensor but x is dense, [T,] N, *
    state_offset = n * size
    steps = _reversed_bits(LANES) if TILE else tl.arange(0, LANES)
    MASKED: tl.constexpr = not EVEN or (T % CHUNK != 0 or LANES != CHUNK)
    if EARLY:
        await_previous_kernel()
    if TAU == LEARNED_RECIPROCAL:
        tau = tl.load(reciprocal_tau_ptr)
    if HAS_V_INIT:
        v = tl.load(v_init_ptr + state_offset + offsets, mask=mask, other=0.0)
    else:
        v = tl.full((BLOCK,), v_init, tl.float32)
    x_ptr += n * x_stride_n
    x_stride_t = one * x_stride_t
    if TILE:
        x = _load_tile(x_ptr, offsets, mask, steps, _inside(steps, 0, T, CHUNK), x_stride_t, MASKED)
    for first in range(0, T, CHUNK):
        t = one * first
        inside = _inside(steps, first, T, CHUNK)
        if CALL_AHEAD > 0:
            called = first + CALL_AHEAD * CHUNK
            _call_into_cache(x_ptr, called, T, x_stride_t, program % blocks * BLOCK, size, LANES, BLOCK)
        if TILE:
            if T > CHUNK:
                ahead = tl.minimum(first + CHUNK, (T - 1) // CHUNK * CHUNK)  # past the last, that again: no predicate
                next_inside = _inside(steps, ahead, T, CHUNK)
                next_x = _load_tile(x_ptr + ahead * x_stride_t, offsets, mask, steps, next_inside, x_stride_t, MASKED)
            v, fired, v_seq = _forward_tile(
                x,
                first,
                T,
                v,
                tau,
                v_threshold,
                v_rest,
                0,
                CHUNK,
                T % CHUNK != 0,
                DYNAMICS,
                TAU,
                SOFT_RESET,
                _forward_tile,
            )
            chunk_offset = state_offset + t * state_size
            if STORE_SPIKES:
                spikes = tl.where(fired, 1.0, 0.0)
                _store_tile(spikes_ptr + chunk_offset, spikes, offsets, mask, steps, inside, state_size, MASKED)
            if STORE_V_SEQ:
                _store_tile(v_seq_ptr + chunk_offset, v_seq, offsets, mask, steps, inside, state_size, MASKED)
            counts = tl.sum((fired & mask[:, None]).to(tl.int32), axis=0)
            if T > CHUNK:
                x = next_x
        else:
            v, counts = _forward_steps(
                x_ptr + t * x_stride_t,
                spikes_ptr + state_offset + t * state_size,
                v_seq_ptr + state_offset + t * state_size,
                offsets,
                mask,
                steps,
                first,
                T,
                x_stride_t,
                state_size,
                v,
                tl.zeros((LANES,), tl.float32),
                tau,
                v_threshold,
                v_rest,
                0,
                CHUNK,
                T % CHUNK != 0,
                DYNAMICS,
                TAU,
                SOFT_RESET,
                STORE_SPIKES,
                STORE_V_SEQ,
                COUNT_SPIKES,
                _forward_steps,
            )
        if COUNT_SPIKES:
            tl.store(count_ptr + one * program * T + first + steps, counts.to(tl.int32), mask=inside)
        if STORE_CHECKPOINTS:
            if first + CHUNK < T:
                tl.store(checkpoint_ptr + state_offset + (t // CHUNK) * state_size + offsets, v, mask=mask)
    if STORE_V:
        tl.store(v_final_ptr + state_offset + offsets, v, mask=mask)


# Sums of all steps at once. To add one value over the 32 lanes of a warp takes five exchanges between them; to add two
# takes six, if the first exchange leaves the sum of the one in half of the lanes and that of the other in the rest. So
# 16 steps take 16 exchanges instead of 80, of which a multiprocessor does one a cycle: a step's value waits for that of
# the step in front of it, the pair's for that of the pair in front, ... The number in ``waiting1`` to ``waiting8`` is
# how many steps these are apart. In the end a step's sum is in the lane whose bits, the other way round, are the step.


if hasattr(tl, "gather"):

    @triton.jit
    def _from_lanes(value, lanes):
        """Each lane's value of another lane."""
        return tl.gather(value, lanes, 0)

else:  # Triton 3.2, which looks up all that a kernel names; no launch calls it there

    @triton.jit
    def _from_lanes(value, lanes):
        tl.static_assert(False, "Triton before 3.3 has no tl.gather")


@triton.jit
def _over_lanes(value, partner, DISTANCE: tl.constexpr):
    """Of pairs of lanes DISTANCE apart the sums: in the one lane of value, in the other of partner."""
    lane = tl.arange(0, 32)
    upper = lane & DISTANCE != 0
    kept = tl.where(upper, partner, value)
    given = tl.where(upper, value, partner)
    return kept + _from_lanes(given, lane ^ DISTANCE)


@triton.jit
def _add_step(value, waiting1, waiting2, waiting4, waiting8, sums, STEP: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """What waits when step STEP of 16 has come, as the steps behind it have; with step 0 the sums are complete.

    value is [BLOCK], of which a lane holds groups of NEIGHBOURS; all else is [32].
    """
    GROUPS: tl.constexpr = value.shape[0] // 32 // NEIGHBOURS
    if value.shape[0] > 32:
        value = tl.sum(tl.sum(tl.reshape(value, (GROUPS, 32, NEIGHBOURS)), axis=2), axis=0)
    if STEP % 2 == 1:
        waiting1 = value
    else:
        value = _over_lanes(value, waiting1, 16)
        if STEP // 2 % 2 == 1:
            waiting2 = value
        else:
            value = _over_lanes(value, waiting2, 8)
            if STEP // 4 % 2 == 1:
                waiting4 = value
            else:
                value = _over_lanes(value, waiting4, 4)
                if STEP == 8:
                    waiting8 = value
                else:
                    value = _over_lanes(value, waiting8, 2)
                    sums = _over_lanes(value, value, 1)
    return waiting1, waiting2, waiting4, waiting8, sums


@triton.jit
def _backward_steps(
    x_ptr,
    grad_spikes_ptr,
    grad_v_seq_ptr,
    grad_x_ptr,
    offsets,
    mask,
    lanes,
    first,
    T,
    scale,
    x_stride_t,
    gs_stride_t,
    dense_stride_t,
    v,
    carry,
    waiting1,
    waiting2,
    waiting4,
    waiting8,
    norms,
    grad_tau,
    tau,
    v_threshold,
    v_rest,
    alpha,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    RAGGED: tl.constexpr,
    DYNAMICS: tl.constexpr,
    TAU: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    HAS_GRAD_V_SEQ: tl.constexpr,
    HAS_CHANNEL_SCALE: tl.constexpr,
    GRAD_NORM: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    GRAD_TAU: tl.constexpr,
    SURROGATE: tl.constexpr,
    RECURSE: tl.constexpr,
):
    """From step STEP of a chunk of STEPS to its end and back; ``first``, T and the pointers as in ``_forward_steps``.

    v is the potential before, carry dL/dv after the chunk's last step; returns dL/dv before step STEP, the squared
    norms of the steps' gradients in their lanes, and grad_tau with each element's part of dL/d(1/tau) added to it.
    """
    if RAGGED:
        mask = tl.where(first + STEP < T, mask, False)
    x = tl.load(x_ptr + STEP * x_stride_t + offsets, mask=mask, other=0.0).to(tl.float32)
    # Converted on the way out, to save registers.
    grad_spike = tl.load(grad_spikes_ptr + STEP * gs_stride_t + offsets, mask=mask, other=0.0)
    h = charge(x, v, tau, v_rest, DYNAMICS, TAU)
    if STEP + 1 < STEPS:
        carry, waiting1, waiting2, waiting4, waiting8, norms, grad_tau = RECURSE(
            x_ptr,
            grad_spikes_ptr,
            grad_v_seq_ptr,
            grad_x_ptr,
            offsets,
            mask,
            lanes,
            first,
            T,
            scale,
            x_stride_t,
            gs_stride_t,
            dense_stride_t,
            reset(h, h >= v_threshold, v_threshold, v_rest, SOFT_RESET),
            carry,
            waiting1,
            waiting2,
            waiting4,
            waiting8,
            norms,
            grad_tau,
            tau,
            v_threshold,
            v_rest,
            alpha,
            STEP + 1,
            STEPS,
            RAGGED,
            DYNAMICS,
            TAU,
            SOFT_RESET,
            DETACH_RESET,
            HAS_GRAD_V_SEQ,
            HAS_CHANNEL_SCALE,
            GRAD_NORM,
            NEIGHBOURS,
            GRAD_TAU,
            SURROGATE,
            RECURSE,
        )
    grad_v = carry
    if HAS_GRAD_V_SEQ:
        grad_v += tl.load(grad_v_seq_ptr + STEP * dense_stride_t + offsets, mask=mask, other=0.0)
    # grad_h = grad_v * dv/dh + grad_spike * surrogate; dv/dh has a surrogate term of its own unless it is detached.
    times_surrogate = grad_spike.to(tl.float32)
    if SOFT_RESET:
        kept = grad_v
        if not DETACH_RESET:
            times_surrogate -= grad_v * v_threshold
    else:
        kept = tl.where(h >= v_threshold, 0.0, grad_v)
        if not DETACH_RESET:
            times_surrogate = tl.fma(grad_v, v_rest - h, times_surrogate)
    grad_h = tl.fma(surrogate_gradient(h - v_threshold, alpha, SURROGATE), times_surrogate, kept)
    if DYNAMICS == LEAK_WITH_INPUT_DECAY:
        grad_x = grad_h * reciprocal_tau(tau, TAU)
    else:
        grad_x = grad_h
    tl.store(grad_x_ptr + STEP * dense_stride_t + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if GRAD_NORM:  # no mask: beyond the end every gradient is zero
        scaled = grad_x * scale if HAS_CHANNEL_SCALE else grad_x
        squares = scaled * scaled
        if NEIGHBOURS > 0:
            waiting1, waiting2, waiting4, waiting8, norms = _add_step(
                squares, waiting1, waiting2, waiting4, waiting8, norms, STEP, NEIGHBOURS
            )
        else:
            norms = tl.where(lanes == STEP, tl.sum(squares, axis=0), norms)
    if GRAD_TAU:
        added = tl.fma(grad_h, charge_slope(x, v, v_rest, DYNAMICS), grad_tau)
        grad_tau = tl.where(mask, added, grad_tau) if RAGGED else added
    grad_v_before = grad_h if DYNAMICS == NO_LEAK else grad_h * (1.0 - reciprocal_tau(tau, TAU))
    carry = tl.where(mask, grad_v_before, carry) if RAGGED else grad_v_before
    return carry, waiting1, waiting2, waiting4, waiting8, norms, grad_tau


@triton.jit
def _potential_before(
    checkpoint_ptr,
    v_init_ptr,
    offsets,
    mask,
    first,
    T: tl.constexpr,
    state_size,
    v_init,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_V_INIT: tl.constexpr,
):
    """The potential before step ``first``, at which a chunk starts; pointers to the program's example."""
    v = tl.full((BLOCK,), v_init, tl.float32)
    if T > CHUNK:
        # Two masks rather than a branch: loads of one chunk move past those of another only without one.
        before = (first // CHUNK - 1) * state_size
        v = tl.load(checkpoint_ptr + before + offsets, mask=tl.where(first > 0, mask, False), other=v_init)
    if HAS_V_INIT:
        v = tl.load(v_init_ptr + offsets, mask=tl.where(first == 0, mask, False), other=v)
    return v


@triton.jit
def _lif_backward_kernel(
    x_ptr,
    v_init_ptr,
    reciprocal_tau_ptr,
    checkpoint_ptr,
    grad_spikes_ptr,
    grad_v_final_ptr,
    grad_v_seq_ptr,
    channel_scale_ptr,
    grad_x_ptr,
    grad_v_init_ptr,
    norm_ptr,
    grad_tau_ptr,
    size,
    blocks,
    examples,
    channels,
    channel_stride,
    x_stride_t,
    x_stride_n,
    gs_stride_t,
    gs_stride_n,
    v_init,
    tau,
    v_threshold,
    v_rest,
    alpha,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENTS: tl.constexpr,
    DYNAMICS: tl.constexpr,
    TAU: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    REST_AT_ZERO: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    HAS_V_INIT: tl.constexpr,
    HAS_GRAD_V_FINAL: tl.constexpr,
    HAS_GRAD_V_SEQ: tl.constexpr,
    STORE_GRAD_V_INIT: tl.constexpr,
    HAS_CHANNEL_SCALE: tl.constexpr,
    GRAD_NORM: tl.constexpr,
    NEIGHBOURS: tl.constexpr,  # of a thread's elements, to sum up all steps at once; 0: one by one
    GRAD_TAU: tl.constexpr,
    SURROGATE: tl.constexpr,
    TILE: tl.constexpr,
    CALL_AHEAD: tl.constexpr,
):
    if REST_AT_ZERO:
        v_rest = 0.0
    program = tl.program_id(0)
    one = tl.full((), 1, tl.int64)
    n = one * (program // blocks)
    offsets = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    if TILE:
        offsets = tl.multiple_of(offsets, ELEMENTS)  # and of no more: wider accesses would take other threads' elements
    mask = tl.full((BLOCK,), True, tl.int1) if EVEN else offsets < size
    state_size = one * examples * size
    state_offset = n * size
    SUMS: tl.constexpr = 32 if NEIGHBOURS > 0 else LANES
    steps = _reversed_bits(SUMS) if TILE or NEIGHBOURS > 0 else tl.arange(0, LANES)
    waiting = tl.zeros((32,), tl.float32)
    MASKED: tl.constexpr = not EVEN or (T % CHUNK != 0 or LANES != CHUNK)
    if EARLY:
        await_previous_kernel()
    if TAU == LEARNED_RECIPROCAL:
        tau = tl.load(reciprocal_tau_ptr)
    scale = 1.0
    if HAS_CHANNEL_SCALE:
        scale = tl.load(channel_scale_ptr + (offsets // channel_stride) % channels, mask=mask, other=0.0)
    if HAS_GRAD_V_FINAL:
        carry = tl.load(grad_v_final_ptr + state_offset + offsets, mask=mask, other=0.0)
    else:
        carry = tl.zeros((BLOCK,), tl.float32)
    x_ptr += n * x_stride_n
    grad_spikes_ptr += n * gs_stride_n
    v_init_ptr += state_offset
    checkpoint_ptr += state_offset
    x_stride_t, gs_stride_t = one * x_stride_t, one * gs_stride_t
    grad_tau = tl.zeros((BLOCK,), tl.float32)
    last = (T - 1) // CHUNK * CHUNK
    if TILE:
        inside = _inside(steps, last, T, CHUNK)
        x = _load_tile(x_ptr + last * x_stride_t, offsets, mask, steps, inside, x_stride_t, MASKED)
        v = _potential_before(
            checkpoint_ptr, v_init_ptr, offsets, mask, last, T, state_size, v_init, CHUNK, BLOCK, HAS_V_INIT
        )
    for i in range(0, T, CHUNK):  # from the last chunk to the first
        first = last - i
        t = one * first
        inside = _inside(steps, first, T, CHUNK)
        if CALL_AHEAD > 0:
            called = first - CALL_AHEAD * CHUNK
            start = program % blocks * BLOCK
            _call_into_cache(x_ptr, called, T, x_stride_t, start, size, LANES, BLOCK)
            _call_into_cache(grad_spikes_ptr, called, T, gs_stride_t, start, size, LANES, BLOCK)
        if TILE:
            # Under way while the potential is walked forward are this chunk's gradients, and then the next chunk's x.
            gs_ptr = grad_spikes_ptr + t * gs_stride_t
            grad_spikes = _load_tile(gs_ptr, offsets, mask, steps, inside, gs_stride_t, MASKED)
            dv_dh, ds_dh, slope, v = _derivatives(
                x,
                v,
                tau,
                v_threshold,
                v_rest,
                alpha,
                DYNAMICS,
                TAU,
                SOFT_RESET,
                DETACH_RESET,
                SURROGATE,
                _derivatives,
            )
            if T > CHUNK:
                ahead = tl.maximum(first - CHUNK, 0)  # before the first, that again: no predicate
                next_inside = _inside(steps, ahead, T, CHUNK)
                x = _load_tile(x_ptr + ahead * x_stride_t, offsets, mask, steps, next_inside, x_stride_t, MASKED)
                v = _potential_before(
                    checkpoint_ptr, v_init_ptr, offsets, mask, ahead, T, state_size, v_init, CHUNK, BLOCK, HAS_V_INIT
                )
            chunk_offset = state_offset + t * state_size
            grad_v_seq = grad_spikes
            if HAS_GRAD_V_SEQ:
                gv_ptr = grad_v_seq_ptr + chunk_offset
                grad_v_seq = _load_tile(gv_ptr, offsets, mask, steps, inside, state_size, MASKED)
            carry, grad_x = _backward_tile(
                dv_dh,
                ds_dh * grad_spikes.to(tl.float32),
                grad_v_seq,
                first,
                T,
                carry,
                tau,
                0,
                CHUNK,
                T % CHUNK != 0,
                DYNAMICS,
                TAU,
                HAS_GRAD_V_SEQ,
                _backward_tile,
            )
            if GRAD_TAU:
                added = grad_x * slope
                grad_tau += tl.sum(tl.where(inside[None, :], added, 0.0) if MASKED else added, axis=1)
            if DYNAMICS == LEAK_WITH_INPUT_DECAY:
                grad_x *= reciprocal_tau(tau, TAU)
            _store_tile(grad_x_ptr + chunk_offset, grad_x, offsets, mask, steps, inside, state_size, MASKED)
            if HAS_CHANNEL_SCALE:
                grad_x *= tl.expand_dims(scale, 1)
            norms = tl.sum(grad_x * grad_x, axis=0)
        else:
            v = _potential_before(
                checkpoint_ptr, v_init_ptr, offsets, mask, first, T, state_size, v_init, CHUNK, BLOCK, HAS_V_INIT
            )
            carry, _1, _2, _4, _8, norms, grad_tau = _backward_steps(
                x_ptr + t * x_stride_t,
                grad_spikes_ptr + t * gs_stride_t,
                grad_v_seq_ptr + state_offset + t * state_size,
                grad_x_ptr + state_offset + t * state_size,
                offsets,
                mask,
                steps,
                first,
                T,
                scale,
                x_stride_t,
                gs_stride_t,
                state_size,
                v,
                carry,
                waiting,
                waiting,
                waiting,
                waiting,
                tl.zeros((SUMS,), tl.float32),
                grad_tau,
                tau,
                v_threshold,
                v_rest,
                alpha,
                0,
                CHUNK,
                T % CHUNK != 0,
                DYNAMICS,
                TAU,
                SOFT_RESET,
                DETACH_RESET,
                HAS_GRAD_V_SEQ,
                HAS_CHANNEL_SCALE,
                GRAD_NORM,
                NEIGHBOURS,
                GRAD_TAU,
                SURROGATE,
                _backward_steps,
            )
        if GRAD_NORM:
            tl.store(norm_ptr + one * program * T + first + steps, norms, mask=inside)
    if STORE_GRAD_V_INIT:
        tl.store(grad_v_init_ptr + state_offset + offsets, carry, mask=mask)
    if GRAD_TAU:
        tl.store(grad_tau_ptr + program, tl.sum(grad_tau, axis=0))
