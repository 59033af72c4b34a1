"""The kernels of multi-step integrate-and-fire, forward and backward, each one pass over memory.

A program owns one example and ``block`` of its elements and walks the T steps with the membrane potential in registers;
the time axis is never split over programs, so nothing is synchronised. Both kernels walk a chunk of steps by a
compile-time recursion over time that loads on the way in and stores on the way out: all loads of a chunk are in flight
before its first store. The backward kernel needs nothing but the input: the way in walks the potential forward again,
the way out walks the gradient back. For T beyond one chunk the forward pass also writes the potential between chunks,
and the backward pass starts each chunk from there. There, and where the launch says so (``tile``), a chunk is loaded as
one tile before it is walked: one chunk's loads are in flight while another is worked on.

State and arithmetic are float32 whatever the tensors' dtype. Floating-point contraction is off and divisions are
exact, so that a spike is the same, bit for bit, as in the plain torch reference.

Per-example statistics: each program reduces its block for each step, or for all steps of a chunk at once, gathers a
chunk's sums in the lanes of a vector and writes them with one store; what reads the partial sums [N, programs, T] adds
them in a fixed order, so the results are deterministic.

Names in capitals are compile-time constants. configuration.py says what HOW bundles.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..common.equations import (
    LEARNED_RECIPROCAL,
    Membrane,
    charge,
    charge_slope,
    fire,
    grad_charge,
    grad_input,
    grad_potential,
    reset,
    step_derivatives,
)
from ..common.lane_sums import Sums, add_step
from ..common.launch import await_previous_kernel
from ..common.rows import Rows
from ..common.surrogate import INTERPRETED

# ------------------------------------------------------------------------------------------------ parts of both kernels


class Chunk(NamedTuple):
    """The chunk that a program works on."""

    first: tl.tensor  # its first step
    offsets: tl.tensor  # [block], the program's elements of a step,
    mask: tl.tensor  # and which of them exist
    steps: tl.tensor  # [lanes], the chunk's steps,
    inside: tl.tensor  # and which of them exist


@triton.jit
def _program_elements(blocks, size, HOW: tl.constexpr):
    """The program's example and elements, and which of them exist."""
    program = tl.program_id(0)
    n = tl.full((), 1, tl.int64) * (program // blocks)  # offsets between examples can pass 2^31 elements
    offsets = (program % blocks) * HOW.cut.block + tl.arange(0, HOW.cut.block)
    if HOW.cut.tile:  # and of no more: wider accesses would take other threads' elements
        offsets = tl.multiple_of(offsets, HOW.cut.elements)
    mask = tl.full(offsets.shape, True, tl.int1) if HOW.cut.even else offsets < size
    return n, offsets, mask


@triton.jit
def _lane_steps(HOW: tl.constexpr):
    """[lanes]: a chunk's steps; as tiles and ``add_step`` order them, numbers with their bits the other way round."""
    steps = tl.arange(0, HOW.cut.lanes)
    if not HOW.cut.reversed_lanes:
        return steps
    else:
        reversed_steps = tl.zeros_like(steps)
        for BIT in tl.static_range(16):
            if (1 << BIT) < HOW.cut.lanes:
                reversed_steps = reversed_steps * 2 + (steps >> BIT) % 2
        return reversed_steps


@triton.jit
def _inside(steps, first, HOW: tl.constexpr):
    """Which steps of the chunk exist that starts at step ``first``."""
    return (steps < HOW.cut.chunk) & (first + steps < HOW.cut.steps)


@triton.jit
def _without_the_end(chunk, STEP: tl.constexpr, HOW: tl.constexpr):
    """The chunk, without elements if its step STEP is beyond T."""
    mask = tl.where(chunk.first + STEP < HOW.cut.steps, chunk.mask, False)
    return Chunk(chunk.first, chunk.offsets, mask, chunk.steps, chunk.inside)


@triton.jit
def _load(rows, chunk, STEP: tl.constexpr):
    """Step STEP of a chunk, at whose first step the rows start."""
    return tl.load(rows.ptr + STEP * rows.stride + chunk.offsets, mask=chunk.mask, other=0.0)


@triton.jit
def _store(rows, value, chunk, STEP: tl.constexpr):
    address = rows.ptr + STEP * rows.stride + chunk.offsets
    tl.store(address, value.to(rows.ptr.dtype.element_ty), mask=chunk.mask)


# Tiles. With few neurons and many steps a multiprocessor has no other warp to turn to while one waits, so that the next
# chunk is loaded while this one is worked on, nothing but the recurrences themselves waits for the step before, and all
# steps are summed together. A tile [block, lanes] has a step in each column and an element's row in one thread, so that
# halving and joining tiles moves nothing: tl.split divides by the lowest bit of a column's number, hence the order of
# ``_lane_steps``. A tile is loaded or stored by one operation, not by one a step: for each of these Triton's coalescing
# pass looks at all that hangs together with it, in a time that grows with the square of that.


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
def _load_tile(rows, chunk, HOW: tl.constexpr):
    """All steps of a chunk, at whose first step the rows start; zeros where an element or a step does not exist."""
    address = (rows.ptr + chunk.steps * rows.stride)[None, :] + chunk.offsets[:, None]
    mask = chunk.mask[:, None] & chunk.inside[None, :] if HOW.cut.masked else None
    return tl.load(address, mask=mask, other=0.0 if HOW.cut.masked else None)


@triton.jit
def _store_tile(rows, tile, chunk, HOW: tl.constexpr):
    """The reverse of ``_load_tile``."""
    address = (rows.ptr + chunk.steps * rows.stride)[None, :] + chunk.offsets[:, None]
    mask = chunk.mask[:, None] & chunk.inside[None, :] if HOW.cut.masked else None
    tl.store(address, tile.to(rows.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _call_into_cache(rows, first, start, size, HOW: tl.constexpr):
    """Asks for the program's elements, from ``start`` on, of the steps from ``first`` on to be brought into the L2
    cache: a chunk."""
    if not INTERPRETED:
        SECTOR: tl.constexpr = 32 * 8 // rows.ptr.dtype.element_ty.primitive_bitwidth  # elements in 32 bytes
        SECTORS: tl.constexpr = HOW.cut.block // SECTOR
        lanes = tl.arange(0, HOW.cut.lanes * SECTORS)
        step, element = first + lanes // SECTORS, start + lanes % SECTORS * SECTOR
        inside = (step >= 0) & (step < HOW.cut.steps) & (element < size)
        address = rows.ptr + tl.where(inside, step * rows.stride + element, 0)
        ASM: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(ASM, "=r,l", [address.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


# --------------------------------------------------------------------------------------------------------- forward pass


@triton.jit
def _forward_steps(x, spikes, v_seq, chunk, v, counts, membrane, STEP: tl.constexpr, HOW: tl.constexpr):
    """From step STEP of a chunk, at whose first step the rows x, spikes and v_seq start, to its end.

    v is the potential before; returns that after the last step, and the spikes of step STEP + i in lane STEP + i.
    """
    if HOW.cut.ragged:
        chunk = _without_the_end(chunk, STEP, HOW)
    h = charge(_load(x, chunk, STEP).to(tl.float32), v, membrane, HOW)
    fired = fire(h, membrane)
    spike = tl.where(fired & chunk.mask if HOW.stores.counts else fired, 1.0, 0.0)
    v_after = reset(h, h - membrane.v_threshold, fired, membrane, HOW)
    if HOW.cut.ragged:
        v_after = tl.where(chunk.mask, v_after, v)
    v_end = v_after
    if STEP + 1 < HOW.cut.chunk:
        v_end, counts = _forward_steps(x, spikes, v_seq, chunk, v_after, counts, membrane, STEP + 1, HOW)
    if HOW.stores.spikes:
        _store(spikes, spike, chunk, STEP)
    if HOW.stores.v_seq:
        _store(v_seq, v_after, chunk, STEP)
    if HOW.stores.counts:  # at most 2^24 spikes a program: exact in float32, and cheaper to add than integers
        counts = tl.where(chunk.steps == STEP, tl.sum(spike, axis=0), counts)
    return v_end, counts


@triton.jit
def _forward_tile(x, first, v, membrane, STEP: tl.constexpr, HOW: tl.constexpr):
    """The steps whose inputs are the tile x, the first of them step STEP of a chunk; else as ``_forward_steps``.

    Returns the last potential, and the tiles of which neurons fired and of the potentials.
    """
    if len(x.shape) > 1:
        HALF: tl.constexpr = x.shape[1] // 2
        lower, upper = _halves(x)
        v, lower_fired, lower_v = _forward_tile(lower, first, v, membrane, STEP, HOW)
        v, upper_fired, upper_v = _forward_tile(upper, first, v, membrane, STEP + HALF, HOW)
        return v, _whole(lower_fired, upper_fired), _whole(lower_v, upper_v)
    elif STEP >= HOW.cut.chunk:
        return v, tl.zeros(x.shape, tl.int1), tl.zeros(x.shape, tl.float32)
    else:
        h = charge(x.to(tl.float32), v, membrane, HOW)
        fired = fire(h, membrane)
        v_after = reset(h, h - membrane.v_threshold, fired, membrane, HOW)
        if HOW.cut.ragged:
            v_after = tl.where(first + STEP < HOW.cut.steps, v_after, v)
        return v_after, fired, v_after


@triton.jit
def lif_forward_kernel(
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
    HOW: tl.constexpr,
):
    if HOW.kind.rest_at_zero:
        v_rest = 0.0  # known to the compiler, which then leaves out what it is subtracted from
    program = tl.program_id(0)
    one = tl.full((), 1, tl.int64)
    n, offsets, mask = _program_elements(blocks, size, HOW)
    state_size = one * examples * size  # every tensor but x is dense, [T,] N, *
    state_offset = n * size
    steps = _lane_steps(HOW)
    if HOW.cut.early:
        await_previous_kernel()
    if HOW.kind.tau == LEARNED_RECIPROCAL:
        tau = tl.load(reciprocal_tau_ptr)
    membrane = Membrane(tau, v_threshold, v_rest, None)
    if HOW.has.v_init:
        v = tl.load(v_init_ptr + state_offset + offsets, mask=mask, other=0.0)
    else:
        v = tl.full(offsets.shape, v_init, tl.float32)
    x_ptr += n * x_stride_n
    x_stride_t = one * x_stride_t
    if HOW.cut.tile:
        start = Chunk(0, offsets, mask, steps, _inside(steps, 0, HOW))
        x = _load_tile(Rows(x_ptr, x_stride_t), start, HOW)
    for first in range(0, HOW.cut.steps, HOW.cut.chunk):
        t = one * first
        chunk = Chunk(first, offsets, mask, steps, _inside(steps, first, HOW))
        if HOW.cut.call_ahead > 0:
            called = first + HOW.cut.call_ahead * HOW.cut.chunk
            _call_into_cache(Rows(x_ptr, x_stride_t), called, program % blocks * HOW.cut.block, size, HOW)
        if HOW.cut.tile:
            if HOW.cut.several:  # past the last, that again: no predicate
                ahead = tl.minimum(first + HOW.cut.chunk, (HOW.cut.steps - 1) // HOW.cut.chunk * HOW.cut.chunk)
                next_chunk = Chunk(ahead, offsets, mask, steps, _inside(steps, ahead, HOW))
                next_x = _load_tile(Rows(x_ptr + ahead * x_stride_t, x_stride_t), next_chunk, HOW)
            v, fired, v_seq = _forward_tile(x, first, v, membrane, 0, HOW)
            chunk_offset = state_offset + t * state_size
            if HOW.stores.spikes:
                spikes = tl.where(fired, 1.0, 0.0)
                _store_tile(Rows(spikes_ptr + chunk_offset, state_size), spikes, chunk, HOW)
            if HOW.stores.v_seq:
                _store_tile(Rows(v_seq_ptr + chunk_offset, state_size), v_seq, chunk, HOW)
            counts = tl.sum((fired & mask[:, None]).to(tl.int32), axis=0)
            if HOW.cut.several:
                x = next_x
        else:
            x = Rows(x_ptr + t * x_stride_t, x_stride_t)
            spikes = Rows(spikes_ptr + state_offset + t * state_size, state_size)
            v_seq = Rows(v_seq_ptr + state_offset + t * state_size, state_size)
            counts = tl.zeros(steps.shape, tl.float32)
            v, counts = _forward_steps(x, spikes, v_seq, chunk, v, counts, membrane, 0, HOW)
        if HOW.stores.counts:
            tl.store(count_ptr + one * program * HOW.cut.steps + first + steps, counts.to(tl.int32), mask=chunk.inside)
        if HOW.stores.checkpoints:
            if first + HOW.cut.chunk < HOW.cut.steps:
                tl.store(checkpoint_ptr + state_offset + (t // HOW.cut.chunk) * state_size + offsets, v, mask=mask)
    if HOW.stores.v:
        tl.store(v_final_ptr + state_offset + offsets, v, mask=mask)


# -------------------------------------------------------------------------------------------------------- backward pass


class GradientRows(NamedTuple):
    x: Rows
    grad_spikes: Rows
    grad_v_seq: Rows
    grad_x: Rows


@triton.jit
def _backward_steps(rows, chunk, scale, v, carry, sums, grad_tau, membrane, STEP: tl.constexpr, HOW: tl.constexpr):
    """From step STEP of a chunk, at whose first step the rows start, to its end and back.

    v is the potential before, carry dL/dv after the chunk's last step; returns dL/dv before step STEP, the squared
    norms of the steps' gradients among ``sums``, and grad_tau with each element's part of dL/d(1/tau) added to it.
    """
    if HOW.cut.ragged:
        chunk = _without_the_end(chunk, STEP, HOW)
    x = _load(rows.x, chunk, STEP).to(tl.float32)
    grad_spike = _load(rows.grad_spikes, chunk, STEP)  # converted on the way out, to save registers
    h = charge(x, v, membrane, HOW)
    if STEP + 1 < HOW.cut.chunk:
        fired = fire(h, membrane)
        v_after = reset(h, h - membrane.v_threshold, fired, membrane, HOW)
        carry, sums, grad_tau = _backward_steps(
            rows, chunk, scale, v_after, carry, sums, grad_tau, membrane, STEP + 1, HOW
        )
    grad_v = carry
    if HOW.has.grad_v_seq:
        grad_v += _load(rows.grad_v_seq, chunk, STEP)
    grad_h = grad_charge(grad_v, grad_spike.to(tl.float32), h, membrane, HOW)
    grad_x = grad_input(grad_h, membrane, HOW)
    _store(rows.grad_x, grad_x, chunk, STEP)
    if HOW.wanted.norms:  # no mask: beyond the end every gradient is zero
        scaled = grad_x * scale if HOW.has.channel_scale else grad_x
        squares = scaled * scaled
        if HOW.cut.neighbours > 0:
            sums = add_step(squares, sums, STEP, HOW.cut.neighbours)
        else:
            norms = tl.where(chunk.steps == STEP, tl.sum(squares, axis=0), sums.steps)
            sums = Sums(sums.one, sums.two, sums.four, sums.eight, norms)
    if HOW.wanted.grad_tau:
        added = tl.fma(grad_h, charge_slope(x, v, membrane, HOW), grad_tau)
        grad_tau = tl.where(chunk.mask, added, grad_tau) if HOW.cut.ragged else added
    grad_v_before = grad_potential(grad_h, membrane, HOW)
    carry = tl.where(chunk.mask, grad_v_before, carry) if HOW.cut.ragged else grad_v_before
    return carry, sums, grad_tau


@triton.jit
def _derivatives(x, v, membrane, HOW: tl.constexpr):
    """The way in of a chunk: for the tile x of inputs those of dv/dh, ds/dh and dh/d(1/tau), and the last potential."""
    if len(x.shape) > 1:
        lower, upper = _halves(x)
        lower_dv, lower_ds, lower_slope, v = _derivatives(lower, v, membrane, HOW)
        upper_dv, upper_ds, upper_slope, v = _derivatives(upper, v, membrane, HOW)
        return _whole(lower_dv, upper_dv), _whole(lower_ds, upper_ds), _whole(lower_slope, upper_slope), v
    else:
        x = x.to(tl.float32)
        h = charge(x, v, membrane, HOW)
        fired = fire(h, membrane)
        dv_dh, ds_dh = step_derivatives(h, fired, membrane, HOW)
        slope = charge_slope(x, v, membrane, HOW)
        return dv_dh, ds_dh, slope, reset(h, h - membrane.v_threshold, fired, membrane, HOW)


@triton.jit
def _backward_tile(dv_dh, grad_fired, grad_v_seq, first, carry, membrane, STEP: tl.constexpr, HOW: tl.constexpr):
    """The way out of a chunk, last step first, from the tiles' last step to STEP; else as ``_backward_steps``.

    grad_fired is dL/ds * ds/dh; returns dL/dv before step STEP and the tile of dL/dh.
    """
    if len(dv_dh.shape) > 1:
        HALF: tl.constexpr = dv_dh.shape[1] // 2
        lower_dv, upper_dv = _halves(dv_dh)
        lower_fired, upper_fired = _halves(grad_fired)
        lower_grad_v, upper_grad_v = _halves(grad_v_seq)
        carry, upper_grad_h = _backward_tile(
            upper_dv, upper_fired, upper_grad_v, first, carry, membrane, STEP + HALF, HOW
        )
        carry, lower_grad_h = _backward_tile(lower_dv, lower_fired, lower_grad_v, first, carry, membrane, STEP, HOW)
        return carry, _whole(lower_grad_h, upper_grad_h)
    elif STEP >= HOW.cut.chunk:
        return carry, tl.zeros_like(carry)
    else:
        grad_v = carry + grad_v_seq if HOW.has.grad_v_seq else carry
        grad_h = tl.fma(dv_dh, grad_v, grad_fired)
        grad_v_before = grad_potential(grad_h, membrane, HOW)
        return tl.where(first + STEP < HOW.cut.steps, grad_v_before, carry) if HOW.cut.ragged else grad_v_before, grad_h


@triton.jit
def _potential_before(checkpoints, v_init_ptr, v_init, chunk, HOW: tl.constexpr):
    """The potential before the chunk's first step; pointers to the program's example."""
    v = tl.full(chunk.offsets.shape, v_init, tl.float32)
    if HOW.cut.several:
        # Two masks rather than a branch: loads of one chunk move past those of another only without one.
        before = (chunk.first // HOW.cut.chunk - 1) * checkpoints.stride
        inside = tl.where(chunk.first > 0, chunk.mask, False)
        v = tl.load(checkpoints.ptr + before + chunk.offsets, mask=inside, other=v_init)
    if HOW.has.v_init:
        v = tl.load(v_init_ptr + chunk.offsets, mask=tl.where(chunk.first == 0, chunk.mask, False), other=v)
    return v


@triton.jit
def lif_backward_kernel(
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
    HOW: tl.constexpr,
):
    if HOW.kind.rest_at_zero:
        v_rest = 0.0
    program = tl.program_id(0)
    one = tl.full((), 1, tl.int64)
    n, offsets, mask = _program_elements(blocks, size, HOW)
    state_size = one * examples * size
    state_offset = n * size
    steps = _lane_steps(HOW)
    waiting = tl.zeros((32,), tl.float32)
    if HOW.cut.early:
        await_previous_kernel()
    if HOW.kind.tau == LEARNED_RECIPROCAL:
        tau = tl.load(reciprocal_tau_ptr)
    membrane = Membrane(tau, v_threshold, v_rest, alpha)
    scale = 1.0
    if HOW.has.channel_scale:
        scale = tl.load(channel_scale_ptr + (offsets // channel_stride) % channels, mask=mask, other=0.0)
    if HOW.has.grad_v:
        carry = tl.load(grad_v_final_ptr + state_offset + offsets, mask=mask, other=0.0)
    else:
        carry = tl.zeros(offsets.shape, tl.float32)
    x_ptr += n * x_stride_n
    grad_spikes_ptr += n * gs_stride_n
    v_init_ptr += state_offset
    checkpoints = Rows(checkpoint_ptr + state_offset, state_size)
    x_stride_t, gs_stride_t = one * x_stride_t, one * gs_stride_t
    grad_tau = tl.zeros(offsets.shape, tl.float32)
    last = (HOW.cut.steps - 1) // HOW.cut.chunk * HOW.cut.chunk
    if HOW.cut.tile:
        start = Chunk(last, offsets, mask, steps, _inside(steps, last, HOW))
        x = _load_tile(Rows(x_ptr + last * x_stride_t, x_stride_t), start, HOW)
        v = _potential_before(checkpoints, v_init_ptr, v_init, start, HOW)
    for i in range(0, HOW.cut.steps, HOW.cut.chunk):  # from the last chunk to the first
        first = last - i
        t = one * first
        chunk = Chunk(first, offsets, mask, steps, _inside(steps, first, HOW))
        if HOW.cut.call_ahead > 0:
            called = first - HOW.cut.call_ahead * HOW.cut.chunk
            start_element = program % blocks * HOW.cut.block
            _call_into_cache(Rows(x_ptr, x_stride_t), called, start_element, size, HOW)
            _call_into_cache(Rows(grad_spikes_ptr, gs_stride_t), called, start_element, size, HOW)
        if HOW.cut.tile:
            # Under way while the potential is walked forward are this chunk's gradients, and then the next chunk's x.
            grad_spikes = _load_tile(Rows(grad_spikes_ptr + t * gs_stride_t, gs_stride_t), chunk, HOW)
            dv_dh, ds_dh, slope, v = _derivatives(x, v, membrane, HOW)
            if HOW.cut.several:
                ahead = tl.maximum(first - HOW.cut.chunk, 0)  # before the first, that again: no predicate
                next_chunk = Chunk(ahead, offsets, mask, steps, _inside(steps, ahead, HOW))
                x = _load_tile(Rows(x_ptr + ahead * x_stride_t, x_stride_t), next_chunk, HOW)
                v = _potential_before(checkpoints, v_init_ptr, v_init, next_chunk, HOW)
            chunk_offset = state_offset + t * state_size
            grad_v_seq = grad_spikes
            if HOW.has.grad_v_seq:
                grad_v_seq = _load_tile(Rows(grad_v_seq_ptr + chunk_offset, state_size), chunk, HOW)
            grad_fired = ds_dh * grad_spikes.to(tl.float32)
            carry, grad_h = _backward_tile(dv_dh, grad_fired, grad_v_seq, first, carry, membrane, 0, HOW)
            if HOW.wanted.grad_tau:
                added = grad_h * slope
                grad_tau += tl.sum(tl.where(chunk.inside[None, :], added, 0.0) if HOW.cut.masked else added, axis=1)
            grad_x = grad_input(grad_h, membrane, HOW)
            _store_tile(Rows(grad_x_ptr + chunk_offset, state_size), grad_x, chunk, HOW)
            if HOW.has.channel_scale:
                grad_x *= tl.expand_dims(scale, 1)
            norms = tl.sum(grad_x * grad_x, axis=0)
        else:
            v = _potential_before(checkpoints, v_init_ptr, v_init, chunk, HOW)
            rows = GradientRows(
                Rows(x_ptr + t * x_stride_t, x_stride_t),
                Rows(grad_spikes_ptr + t * gs_stride_t, gs_stride_t),
                Rows(grad_v_seq_ptr + state_offset + t * state_size, state_size),
                Rows(grad_x_ptr + state_offset + t * state_size, state_size),
            )
            sums = Sums(waiting, waiting, waiting, waiting, tl.zeros(steps.shape, tl.float32))
            carry, sums, grad_tau = _backward_steps(rows, chunk, scale, v, carry, sums, grad_tau, membrane, 0, HOW)
            norms = sums.steps
        if HOW.wanted.norms:
            tl.store(norm_ptr + one * program * HOW.cut.steps + first + steps, norms, mask=chunk.inside)
    if HOW.wanted.grad_v_init:
        tl.store(grad_v_init_ptr + state_offset + offsets, carry, mask=mask)
    if HOW.wanted.grad_tau:
        tl.store(grad_tau_ptr + program, tl.sum(grad_tau, axis=0))
