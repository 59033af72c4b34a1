"""Multi-step integrate-and-fire, forward and backward, each one pass over memory.

Reading order: kernels, launch plans, registered operators, autograd functions, ``multi_step`` (what a neuron calls) and
``lif`` (the same as a function of tensors).

How the kernels work. A program owns one example and BLOCK of its elements and walks the T steps with the membrane
potential in registers; the time axis is never split over programs, so nothing is synchronised. Both kernels walk a
chunk of steps by a compile-time recursion over time that loads on the way in and stores on the way out: all loads of a
chunk are in flight before its first store. The backward kernel needs nothing but the input: the way in walks the
potential forward again, the way out walks the gradient back. For T beyond one chunk the forward pass also writes the
potential between chunks, and the backward pass starts each chunk from there. There, and where TUNING says so, a chunk
is loaded as one tile before it is walked: one chunk's loads are in flight while another is worked on.

State and arithmetic are float32 whatever the tensors' dtype. Floating-point contraction is off and divisions are
exact, so that a spike is the same, bit for bit, as in the plain torch reference.

Per-example statistics: each program reduces its block for each step, gathers a chunk's sums in the lanes of a vector
and writes them with one store; what reads the partial sums [N, programs, T] adds them in a fixed order, so the results
are deterministic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dynamics import Dynamics
from .autotune import Choices, at_the_start
from .equations import (
    INTERPRETED,
    LEAK,
    LEAK_WITH_INPUT_DECAY,
    LEARNED_RECIPROCAL,
    NO_LEAK,
    POWER_OF_TWO,
    TIME_CONSTANT,
    charge,
    charge_slope,
    reciprocal_tau,
    reset,
    surrogate_gradient,
)
from .launch import Launch, await_previous_kernel, early_launch, multiprocessors
from .layout import (
    has_strides,
    inner_is_dense,
    laid_out,
    sequence_like,
    sequence_strides,
    v_like,
    v_strides,
    with_dense_inner,
    with_inner_order_of,
)

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# ------------------------------------------------------------------------------------------------------- the tuning

# By bytes of an element of x: the most steps of a chunk. One float32 potential a chunk is 1/16 of the input's bytes.
LONGEST_CHUNK = {4: 16, 2: 32}


class Tuning(NamedTuple):
    """How a kernel is launched, as a rule for grids of any size.

    elements: of a step that a thread holds; fewer where there would be less than ``warps_per_multiprocessor``, the
    warps of the whole grid for each of the GPU's multiprocessors. warps: of a program; with one, its reductions are
    shuffles, without barriers. tile: whether a chunk is walked over a tile of its steps' values, loaded before the walk
    (of several chunks, while the one in front is worked on), or by a recursion that loads on its way in. call_ahead: of
    several chunks, where the warps are fewer than that, how many chunks before its time a program's input is called
    into the L2 cache (0: never); with enough warps it only costs instructions.
    """

    elements: int
    warps: int = 1
    warps_per_multiprocessor: int = 8
    tile: bool = False
    call_ahead: int = 0


# Several chunks: two elements share a step's instructions (at T = 64 8 % less time in float32, 22 % in bfloat16), which
# is worth more than warps until there are only four a multiprocessor (at T = 256 8 and 10 % less).
_SEVERAL = Tuning(2, warps_per_multiprocessor=4, tile=True)

# By direction and bytes of an element: (T up to, launch), ... of one chunk; the last is for more. Chosen on an H100.
# One chunk: the forward kernel wants wide accesses and few reductions; the backward kernel, which holds a float32 for
# each element and step, wants registers for many warps before 16-byte accesses.
TUNING: dict[tuple[str, int], tuple[tuple[float, Tuning], ...]] = {
    ("forward", 4): ((8, Tuning(8)), (16, Tuning(4)), (math.inf, _SEVERAL._replace(call_ahead=3))),
    ("forward", 2): ((8, Tuning(8)), (32, Tuning(4)), (math.inf, _SEVERAL._replace(call_ahead=3))),
    ("backward", 4): ((4, Tuning(4)), (16, Tuning(2)), (math.inf, _SEVERAL._replace(call_ahead=2))),
    ("backward", 2): (
        (4, Tuning(8)),
        (8, Tuning(4)),
        (32, Tuning(2)),
        (math.inf, _SEVERAL._replace(call_ahead=2)),
    ),
}


class Configuration(NamedTuple):
    """How a kernel is launched for one shape: a ``Tuning`` applied to it, or another."""

    elements: int
    warps: int
    tile: bool
    call_ahead: int


def chunk_steps(steps: int, element_size: int) -> int:
    """Steps of a chunk: as few chunks as LONGEST_CHUNK allows, of one length."""
    return triton.cdiv(steps, triton.cdiv(steps, LONGEST_CHUNK[element_size]))


# ---------------------------------------------------------------------------------------------------- the kernels

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
def _step_of_column(LANES: tl.constexpr):
    """[LANES]: a tile's steps, the column's bits the other way round, since tl.split divides by the lowest bit."""
    columns = tl.arange(0, LANES)
    steps = tl.zeros_like(columns)
    for BIT in tl.static_range(16):
        if (1 << BIT) < LANES:
            steps = steps * 2 + (columns >> BIT) % 2
    return steps


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
    steps = _step_of_column(LANES) if TILE else tl.arange(0, LANES)
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
        carry, norms, grad_tau = RECURSE(
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
        norms = tl.where(lanes == STEP, tl.sum(scaled * scaled, axis=0), norms)
    if GRAD_TAU:
        added = tl.fma(grad_h, charge_slope(x, v, v_rest, DYNAMICS), grad_tau)
        grad_tau = tl.where(mask, added, grad_tau) if RAGGED else added
    grad_v_before = grad_h if DYNAMICS == NO_LEAK else grad_h * (1.0 - reciprocal_tau(tau, TAU))
    return tl.where(mask, grad_v_before, carry) if RAGGED else grad_v_before, norms, grad_tau


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
    steps = _step_of_column(LANES) if TILE else tl.arange(0, LANES)
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
            carry, norms, grad_tau = _backward_steps(
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
                tl.zeros((LANES,), tl.float32),
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


# -------------------------------------------------------------------------------------------------- launch plans


class Constants(NamedTuple):
    """A neuron's numbers in the order of the operators' schema; tau is 1 where it is learned."""

    v_init: float
    tau: float
    leak: bool
    decay_input: bool
    v_threshold: float
    v_rest: float
    soft_reset: bool


@functools.lru_cache
def constants_of(dynamics: Dynamics, v_init: float) -> Constants:
    d = dynamics
    tau = 1.0 if d.constant_tau is None else d.constant_tau
    return Constants(v_init, tau, d.tau is not None, d.decay_input, d.v_threshold, d.v_rest, d.v_reset is None)


class Stores(NamedTuple):
    """What a forward pass writes."""

    spikes: bool = True
    v: bool = True
    v_seq: bool = False
    checkpoints: bool = False
    counts: bool = False


class Wanted(NamedTuple):
    """What a backward pass writes beside the gradient of x."""

    grad_v_init: bool
    norms: bool
    grad_tau: bool


def _candidates(x: Tensor, direction: str) -> list[Configuration]:
    """What TUNING says of x [T, N, *], and other configurations that an ``autotune`` measures."""
    steps, neurons = x.shape[0], math.prod(x.shape[1:])
    several = steps > chunk_steps(steps, x.element_size())
    launches = TUNING[direction, x.element_size()]
    tuning = launches[-1][1] if several else next(how for most, how in launches if steps <= most)
    elements, needed = tuning.elements, 32 * tuning.warps_per_multiprocessor * multiprocessors(x.device)
    few = neurons < elements * needed
    while elements > 1 and neurons < elements * needed:
        elements //= 2
    curated = Configuration(elements, tuning.warps, tuning.tile, tuning.call_ahead if several and few else 0)
    if several:
        others = [curated._replace(elements=e, call_ahead=a) for e in (1, 2, 4) for a in (0, tuning.call_ahead)]
    else:
        others = [curated._replace(elements=e, warps=w) for e in (2, 4, 8) for w in (1, 4)]
    return list(dict.fromkeys([curated, *others]))


class _Grid:
    """How one tensor [T, N, *] with dense inner dimensions is cut into programs."""

    def __init__(self, x: Tensor, configuration: Configuration) -> None:
        self.configuration = configuration
        self.steps, self.examples = x.shape[:2]
        self.size = math.prod(x.shape[2:])
        self.chunk = chunk_steps(self.steps, x.element_size())
        lanes = 32 * configuration.warps
        self.block = max(lanes, min(lanes * configuration.elements, triton.next_power_of_2(self.size)))
        self.blocks = triton.cdiv(self.size, self.block)
        self.programs = self.examples * self.blocks
        self.partials = (self.examples, self.blocks, self.steps)
        self.early = early_launch(x.device)

    def constants(self, neuron: Constants, learned_tau: bool) -> dict[str, Any]:
        if not neuron.leak:
            dynamics = NO_LEAK
        else:
            dynamics = LEAK_WITH_INPUT_DECAY if neuron.decay_input else LEAK
        power_of_two = math.frexp(neuron.tau)[0] == 0.5
        return {
            "T": self.steps,
            "CHUNK": self.chunk,
            "LANES": triton.next_power_of_2(max(self.chunk, 2 if self.configuration.tile else 1)),
            "BLOCK": self.block,
            "ELEMENTS": self.block // (32 * self.configuration.warps),
            "DYNAMICS": dynamics,
            "TAU": LEARNED_RECIPROCAL if learned_tau else POWER_OF_TWO if power_of_two else TIME_CONSTANT,
            "SOFT_RESET": neuron.soft_reset,
            "REST_AT_ZERO": neuron.v_rest == 0.0,
            "EVEN": self.size % self.block == 0,  # no thread is beyond an example's end
            "TILE": self.configuration.tile,
            "CALL_AHEAD": self.configuration.call_ahead,
            "num_warps": self.configuration.warps,
            "enable_fp_fusion": False,
            **self.early,
        }


class _Sequence:
    """Makes tensors of x's shape [T, N, *], dense, in x's inner order."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.strides = x.shape, sequence_strides(x)
        self.alike = x.stride() == self.strides

    def empty(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.alike:
            return torch.empty_like(x, dtype=dtype)
        return torch.empty_strided(self.shape, self.strides, dtype=dtype, device=x.device)


class _ForwardPlan:
    """A forward pass prepared for one shape, layout, dtype and neuron."""

    def __init__(
        self,
        configuration: Configuration,
        x: Tensor,
        neuron: Constants,
        has_v_init: bool,
        learned_tau: bool,
        stores: Stores,
    ) -> None:
        grid = _Grid(x, configuration)
        self.stores, self.sequence, self.v_strides = stores, _Sequence(x), v_strides(x)
        self.checkpoints = (triton.cdiv(grid.steps, grid.chunk) - 1, *x.shape[1:]) if stores.checkpoints else None
        self.partials = grid.partials
        self.launch = None
        if x.numel() > 0:
            constants = grid.constants(neuron, learned_tau) | {
                "HAS_V_INIT": has_v_init,
                "STORE_SPIKES": stores.spikes,
                "STORE_V": stores.v,
                "STORE_V_SEQ": stores.v_seq,
                "STORE_CHECKPOINTS": stores.checkpoints,
                "COUNT_SPIKES": stores.counts,
            }
            numbers = (grid.size, grid.blocks, grid.examples, *x.stride()[:2])
            numbers += (neuron.v_init, neuron.tau, neuron.v_threshold, neuron.v_rest)
            self.launch = Launch(_lif_forward_kernel, x.device, grid.programs, numbers, constants)

    def run(self, x: Tensor, v_init: Tensor | None, reciprocal_tau: Tensor | None) -> tuple[Tensor | None, ...]:
        stores, sequence = self.stores, self.sequence
        if v_init is not None:
            v_init = laid_out(v_init, self.v_strides)
        spikes = sequence.empty(x, x.dtype) if stores.spikes else None
        v = v_like(x) if stores.v else None
        v_seq = sequence.empty(x, torch.float32) if stores.v_seq else None
        checkpoints = None if self.checkpoints is None else x.new_empty(self.checkpoints, dtype=torch.float32)
        count = x.new_empty(self.partials, dtype=torch.int32) if stores.counts else None
        if self.launch is not None:
            tensors = (v_init, reciprocal_tau, spikes, v, v_seq, checkpoints, count)
            self.launch(x, *[x if t is None else t for t in tensors])
        return spikes, v, v_seq, checkpoints, count


class _BackwardPlan:
    """A backward pass prepared for one shape, layout, dtype, neuron and flow of gradients."""

    def __init__(
        self,
        configuration: Configuration,
        x: Tensor,
        grad_spikes: Tensor,
        neuron: Constants,
        options: tuple[bool, int, float],
        has: tuple[bool, bool, bool, bool, bool],
        wanted: Wanted,
    ) -> None:
        grid = _Grid(x, configuration)
        detach_reset, surrogate, alpha = options
        has_v_init, learned_tau, has_grad_v, has_grad_v_seq, has_channel_scale = has
        self.sequence, self.v_strides = _Sequence(x), v_strides(x)
        self.wants_grad_v_init = wanted.grad_v_init
        self.partials = grid.partials if wanted.norms else None
        self.programs = grid.programs if wanted.grad_tau else None
        self.launch = None
        if x.numel() > 0:
            constants = grid.constants(neuron, learned_tau) | {
                "DETACH_RESET": detach_reset,
                "HAS_V_INIT": has_v_init,
                "HAS_GRAD_V_FINAL": has_grad_v,
                "HAS_GRAD_V_SEQ": has_grad_v_seq,
                "STORE_GRAD_V_INIT": wanted.grad_v_init,
                "HAS_CHANNEL_SCALE": has_channel_scale,
                "GRAD_NORM": wanted.norms,
                "GRAD_TAU": wanted.grad_tau,
                "SURROGATE": surrogate,
            }
            channels = (x.shape[2], x.stride(2)) if has_channel_scale else (1, 1)
            numbers = (grid.size, grid.blocks, grid.examples, *channels, *x.stride()[:2], *grad_spikes.stride()[:2])
            numbers += (neuron.v_init, neuron.tau, neuron.v_threshold, neuron.v_rest, alpha)
            self.launch = Launch(_lif_backward_kernel, x.device, grid.programs, numbers, constants)

    def run(
        self,
        x: Tensor,
        v_init: Tensor | None,
        reciprocal_tau: Tensor | None,
        checkpoints: Tensor | None,
        grad_spikes: Tensor,
        grad_v: Tensor | None,
        grad_v_seq: Tensor | None,
        channel_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        v_init, grad_v = laid_out(v_init, self.v_strides), laid_out(grad_v, self.v_strides)
        grad_v_seq = laid_out(grad_v_seq, self.sequence.strides)
        grad_x = self.sequence.empty(x, x.dtype)
        grad_v_init = v_like(x) if self.wants_grad_v_init else None
        norms = None if self.partials is None else x.new_empty(self.partials, dtype=torch.float32)
        grad_tau = None if self.programs is None else x.new_empty(self.programs, dtype=torch.float32)
        if self.launch is not None:
            given = (v_init, reciprocal_tau, checkpoints, grad_spikes, grad_v, grad_v_seq, channel_scale)
            tensors = (*given, grad_x, grad_v_init, norms, grad_tau)
            self.launch(x, *[x if t is None else t for t in tensors])
        return grad_x, grad_v_init, norms, grad_tau


# By what they are prepared for; None where the input has to be rearranged first. Emptied when there are very many, and
# when an ``autotune`` begins.
_forward_plans: dict[tuple, _ForwardPlan | None] = {}
_backward_plans: dict[tuple, _BackwardPlan | None] = {}
_MOST_PLANS = 4096

_CHOICES: dict[str, Choices[Configuration]] = {name: Choices(f"LIF {name}") for name in ("forward", "backward")}


@at_the_start
def _forget_plans() -> None:
    _forward_plans.clear()
    _backward_plans.clear()


def _keep(plans: dict, key: tuple, plan: Any) -> Any:
    if len(plans) >= _MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def _planned(
    direction: str,
    key: tuple,
    x: Tensor,
    make: Callable[[Configuration], Any],
    tensors: tuple[Tensor | None, ...],
) -> Any:
    """The plan of the configuration that is curated, or fastest with these tensors."""
    plan = functools.cache(make)
    return plan(_CHOICES[direction](key, x, lambda: _candidates(x, direction), lambda c: plan(c).run(*tensors)))


def _forward(
    x: Tensor, v_init: Tensor | None, reciprocal_tau: Tensor | None, neuron: Constants, stores: Stores
) -> tuple[Tensor | None, ...]:
    """spikes, final v, v_seq, checkpoints and partial spike counts [N, blocks, T]; None for what is not stored."""
    has = (v_init is not None, reciprocal_tau is not None)
    key = (x.shape, x.stride(), x.dtype, x.get_device(), neuron, has, stores)
    try:
        plan = _forward_plans[key]
    except KeyError:
        plan = None
        if inner_is_dense(x):
            plan = _planned(
                "forward",
                key,
                x,
                lambda configuration: _ForwardPlan(configuration, x, neuron, *has, stores),
                (x, v_init, reciprocal_tau),
            )
        _keep(_forward_plans, key, plan)
    if plan is None:
        return _forward(x.contiguous(), v_init, reciprocal_tau, neuron, stores)
    return plan.run(x, v_init, reciprocal_tau)


def _backward(
    x: Tensor,
    v_init: Tensor | None,
    reciprocal_tau: Tensor | None,
    checkpoints: Tensor | None,
    grad_spikes: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    channel_scale: Tensor | None,
    neuron: Constants,
    options: tuple[bool, int, float],
    wanted: Wanted,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """grad_x, and what is wanted: grad_v_init, partial sums of grad_x's squares [N, blocks, T], and those of the
    gradient with respect to 1 / tau, [programs]."""
    gs = x.new_zeros((1,) * x.ndim).expand(x.shape) if grad_spikes is None else grad_spikes
    has = (
        v_init is not None,
        reciprocal_tau is not None,
        grad_v is not None,
        grad_v_seq is not None,
        channel_scale is not None,
    )
    layouts = (x.shape, x.stride(), x.dtype, gs.stride(), gs.dtype, x.get_device())
    key = (layouts, neuron, options, has, wanted)
    others = (grad_v, grad_v_seq, channel_scale)
    try:
        plan = _backward_plans[key]
    except KeyError:
        plan = None
        if inner_is_dense(x) and has_strides(gs, x.stride(), 2):
            plan = _planned(
                "backward",
                key,
                x,
                lambda configuration: _BackwardPlan(configuration, x, gs, neuron, options, has, wanted),
                (x, v_init, reciprocal_tau, checkpoints, gs, *others),
            )
        _keep(_backward_plans, key, plan)
    if plan is None:
        x = with_dense_inner(x)
        gs = with_inner_order_of(x, gs)
        return _backward(x, v_init, reciprocal_tau, checkpoints, gs, *others, neuron, options, wanted)
    return plan.run(x, v_init, reciprocal_tau, checkpoints, gs, *others)


def add_partials(partials: Tensor) -> Tensor:
    """[N, blocks, T] -> [T, N], contiguous, in a fixed order."""
    sums = partials.squeeze(1) if partials.shape[1] == 1 else partials.sum(1, dtype=partials.dtype)
    return sums.t().contiguous()


# ---------------------------------------------------------------------------------------------- registered operators

# For torch.compile and dispatch modes; eager calls go straight to the functions above.

_NEURON_SCHEMA = (
    "float v_init_value, float tau, bool leak, bool decay_input, float v_threshold, float v_rest, bool soft_reset"
)

torch.library.define(
    "sadp_fast::lif_forward",
    f"(Tensor x, Tensor? v_init, Tensor? reciprocal_tau, {_NEURON_SCHEMA},"
    " bool store_v_seq, bool store_checkpoints, bool count_spikes)"
    " -> (Tensor spikes, Tensor v, Tensor v_seq, Tensor checkpoints, Tensor spike_count)",
)
torch.library.define(
    "sadp_fast::lif_backward",
    "(Tensor x, Tensor? v_init, Tensor? reciprocal_tau, Tensor checkpoints, Tensor? grad_spikes, Tensor? grad_v,"
    f" Tensor? grad_v_seq, Tensor? channel_scale, {_NEURON_SCHEMA}, bool detach_reset, int surrogate, float alpha,"
    " bool want_grad_v_init, bool want_grad_norm, bool want_grad_tau)"
    " -> (Tensor grad_x, Tensor grad_v_init, Tensor grad_norm_sq, Tensor grad_reciprocal_tau)",
)


def _nothing(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return x.new_empty(0, dtype=dtype)


def _launch_forward(
    x: Tensor, v_init: Tensor | None, reciprocal_tau: Tensor | None, *constants_and_flags: Any
) -> tuple[Tensor, ...]:
    *neuron, store_v_seq, store_checkpoints, count_spikes = constants_and_flags
    stores = Stores(True, True, store_v_seq, store_checkpoints, count_spikes)
    *outputs, count = _forward(x, v_init, reciprocal_tau, Constants(*neuron), stores)
    count = _nothing(x, torch.int32) if count is None else add_partials(count)
    return *[_nothing(x) if t is None else t for t in outputs], count


def _launch_backward(
    x: Tensor,
    v_init: Tensor | None,
    reciprocal_tau: Tensor | None,
    checkpoints: Tensor,
    *grads_and_constants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads, neuron = grads_and_constants[:4], Constants(*grads_and_constants[4:11])
    *options, want_grad_v_init, want_norms, want_grad_tau = grads_and_constants[11:]
    wanted = Wanted(want_grad_v_init, want_norms, want_grad_tau)
    given = (x, v_init, reciprocal_tau, checkpoints, *grads, neuron, tuple(options), wanted)
    grad_x, grad_v_init, norms, grad_tau = _backward(*given)
    norms = _nothing(x) if norms is None else add_partials(norms)
    grad_tau = _nothing(x) if grad_tau is None else grad_tau.sum()
    return grad_x, _nothing(x) if grad_v_init is None else grad_v_init, norms, grad_tau


# The CPU implementation is the same kernel in Triton's interpreter.
for _device in ("cuda", "cpu"):
    torch.library.impl("sadp_fast::lif_forward", _device, _launch_forward)
    torch.library.impl("sadp_fast::lif_backward", _device, _launch_backward)


@torch.library.register_fake("sadp_fast::lif_forward")
def _(x, v_init, reciprocal_tau, *constants_and_flags):
    store_v_seq, store_checkpoints, count_spikes = constants_and_flags[-3:]
    x = with_dense_inner(x)
    chunks = triton.cdiv(x.shape[0], chunk_steps(x.shape[0], x.element_size()))
    return (
        sequence_like(x, x.dtype),
        v_like(x),
        sequence_like(x, torch.float32) if store_v_seq else _nothing(x),
        x.new_empty((chunks - 1, *x.shape[1:]), dtype=torch.float32) if store_checkpoints else _nothing(x),
        x.new_empty(x.shape[:2] if count_spikes else (0,), dtype=torch.int32),
    )


@torch.library.register_fake("sadp_fast::lif_backward")
def _(x, *rest):
    want_grad_v_init, want_grad_norm, want_grad_tau = rest[-3:]
    x = with_dense_inner(x)
    return (
        sequence_like(x, x.dtype),
        v_like(x) if want_grad_v_init else _nothing(x),
        x.new_empty(x.shape[:2] if want_grad_norm else (0,), dtype=torch.float32),
        x.new_empty(() if want_grad_tau else (0,), dtype=torch.float32),
    )


# ------------------------------------------------------------------------------------------------ autograd functions


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused neuron has no second derivative: call backward() without create_graph=True, or set the "
            "node's backend='torch'"
        )


class _Call:
    """What one eager call's forward pass leaves for its backward pass, beside the tensors that autograd saves."""

    __slots__ = ("grad_v", "neuron", "options", "record_norms", "stores")

    def __init__(
        self,
        neuron: Constants,
        stores: Stores,
        options: tuple[bool, int, float],
        record_norms: Callable[[Tensor], None] | None,
    ) -> None:
        self.neuron, self.stores, self.options, self.record_norms = neuron, stores, options, record_norms
        self.grad_v: Tensor | None = None  # from _FinalPotential's backward pass to that of _LIF


class _LIF(torch.autograd.Function):
    """The eager path. Without stores.v its second output has no element: _FinalPotential hangs on it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v_init: Tensor | None,
        reciprocal_tau: Tensor | None,
        channel_scale: Tensor | None,
        call: _Call,
    ):
        spikes, v, v_seq, checkpoints, count = _forward(x, v_init, reciprocal_tau, call.neuron, call.stores)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, v_init, reciprocal_tau, checkpoints, channel_scale)
        ctx.call = call
        if count is not None:
            ctx.mark_non_differentiable(count)
        return spikes, _nothing(x) if v is None else v, v_seq, count

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None, grad_v_seq: Tensor | None, _: None):
        _refuse_second_derivative()
        *inputs, channel_scale = ctx.saved_tensors
        call = ctx.call
        if grad_v is not None and not call.stores.v:
            grad_v, call.grad_v = call.grad_v, None
        wanted = Wanted(ctx.needs_input_grad[1], call.record_norms is not None, ctx.needs_input_grad[2])
        grads = (grad_spikes, grad_v, grad_v_seq)
        given = (*inputs, *grads, channel_scale, call.neuron, call.options, wanted)
        grad_x, grad_v_init, norms, grad_tau = _backward(*given)
        if norms is not None:
            call.record_norms(norms)
        return grad_x, grad_v_init, None if grad_tau is None else grad_tau.sum(), None, None


class _FinalPotential(torch.autograd.Function):
    """The potential after the last step of a call, by a forward pass that writes nothing else.

    Its gradient goes through ``call`` and the handle's makes autograd wait for it, so that the call has one backward
    pass, whatever was read.
    """

    @staticmethod
    def forward(
        ctx: Any, handle: Tensor, x: Tensor, v_init: Tensor | None, reciprocal_tau: Tensor | None, call: _Call
    ) -> Tensor:
        ctx.call = call
        v = _forward(x, v_init, reciprocal_tau, call.neuron, Stores(spikes=False))[1]
        assert v is not None
        return v

    @staticmethod
    def backward(ctx: Any, grad_v: Tensor):
        _refuse_second_derivative()
        ctx.call.grad_v = grad_v
        return _nothing(grad_v), None, None, None, None


class PendingPotential:
    """The potential after a call's last step; a call computes it, with its graph."""

    __slots__ = ("_call", "_handle", "_inputs", "_versions")

    def __init__(self, inputs: tuple[Tensor | None, ...], handle: Tensor, call: _Call) -> None:
        self._inputs, self._handle, self._call = inputs, handle, call
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        return [0 if t is None else t._version for t in self._inputs]

    def __call__(self) -> Tensor:
        if self._current_versions() != self._versions:
            raise RuntimeError(
                "the neuron's potential v is computed when it is first read, and the input of its last call has been "
                "changed in place since; read v before that, or change a clone"
            )
        inputs = [None if t is None else t.detach() for t in self._inputs]
        with torch.inference_mode(False), torch.enable_grad():
            return _FinalPotential.apply(self._handle, *inputs, self._call)


class _RegisteredLIF(torch.autograd.Function):
    """The path of torch.compile and dispatch modes, through the registered operators."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v_init: Tensor | None,
        reciprocal_tau: Tensor | None,
        v_init_value: float,
        dynamics: Dynamics,
        surrogate: int,
        alpha: float,
        store_v_seq: bool,
        count_spikes: bool,
        grad_norm_sq: Tensor | None,
        channel_scale: Tensor | None,
        will_backward: bool,
    ):
        constants = (
            v_init_value,
            1.0 if dynamics.constant_tau is None else dynamics.constant_tau,
            dynamics.tau is not None,
            dynamics.decay_input,
            dynamics.v_threshold,
            dynamics.v_rest,
            dynamics.v_reset is None,
        )
        several_chunks = x.shape[0] > LONGEST_CHUNK[x.element_size()]
        spikes, v, v_seq, checkpoints, spike_count = torch.ops.sadp_fast.lif_forward(
            x, v_init, reciprocal_tau, *constants, store_v_seq, will_backward and several_chunks, count_spikes
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(spike_count)
        if will_backward:
            ctx.save_for_backward(x, v_init, reciprocal_tau, checkpoints, channel_scale)
            ctx.constants = constants
            ctx.options = (dynamics.detach_reset, surrogate, alpha)
            ctx.grad_norm_sq = grad_norm_sq
        return spikes, v, v_seq, spike_count

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None, grad_v_seq: Tensor | None, _: None):
        _refuse_second_derivative()
        *inputs, channel_scale = ctx.saved_tensors
        if grad_v_seq is not None and grad_v_seq.numel() == 0:
            grad_v_seq = None
        _, wants_grad_v_init, wants_grad_tau, *_ = ctx.needs_input_grad
        grad_x, grad_v_init, grad_norm_sq, grad_tau = torch.ops.sadp_fast.lif_backward(
            *inputs,
            grad_spikes,
            grad_v,
            grad_v_seq,
            channel_scale,
            *ctx.constants,
            *ctx.options,
            wants_grad_v_init,
            ctx.grad_norm_sq is not None,
            wants_grad_tau,
        )
        if ctx.grad_norm_sq is not None:
            ctx.grad_norm_sq.copy_(grad_norm_sq)
        return (
            grad_x,
            grad_v_init if wants_grad_v_init else None,
            grad_tau if wants_grad_tau else None,
            *([None] * 9),
        )


# ----------------------------------------------------------------------------------------------------- entry points


def runs_directly() -> bool:
    """Whether calls may bypass the registered operators: not under torch.compile or a dispatch mode."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


# Saved-tensor hooks (checkpointing, offloading) mean that the input shall not be kept; torch before 2.7 cannot tell.
_saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore: None)


def multi_step(
    x: Tensor,
    v: Tensor | float,
    reciprocal_tau: Tensor | None,
    dynamics: Dynamics,
    surrogate: int,
    alpha: float,
    store_v_seq: bool,
    count_spikes: bool,
    record_norms: Callable[[Tensor], None] | None,
    channel_scale: Tensor | None,
    defer_v: bool,
) -> tuple[Tensor, Tensor | PendingPotential, Tensor | None, Tensor | None]:
    """Run a layer eagerly; ``lif`` says what the arguments are and what is refused.

    Args:
        record_norms: called by the backward pass with partial sums of squares, float32 [N, blocks, T].
        defer_v: whether the final v may come as a ``PendingPotential``, which saves writing it.

    Returns:
        spikes, final v, v_seq or None, partial spike counts (int32 [N, blocks, T]) or None.
    """
    v_init, v_init_value = (v, 0.0) if isinstance(v, Tensor) else (None, float(v))
    steps = x.shape[0]
    neuron = constants_of(dynamics, v_init_value)
    inputs = (x, v_init, reciprocal_tau)
    if not _will_backward(*inputs):
        stores = Stores(v_seq=store_v_seq, counts=count_spikes)
        spikes, v_final, v_seq, _, count = _forward(*inputs, neuron, stores)
        return spikes, v_final, v_seq, count  # type: ignore[return-value]
    defer_v = defer_v and steps > 1 and _saved_tensor_hooks(True) is None
    stores = Stores(True, not defer_v, store_v_seq, steps > LONGEST_CHUNK[x.element_size()], count_spikes)
    call = _Call(neuron, stores, (dynamics.detach_reset, surrogate, alpha), record_norms)
    spikes, v_final, v_seq, count = _LIF.apply(*inputs, channel_scale, call)
    return spikes, PendingPotential(inputs, v_final, call) if defer_v else v_final, v_seq, count


def _will_backward(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def check(
    x: Tensor,
    v: Tensor | float,
    reciprocal_tau: Tensor | None,
    dynamics: Dynamics,
    channel_scale: Tensor | None,
) -> None:
    """Raises ValueError for what the kernels cannot take; ``lif`` lists it."""
    if x.dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x.dtype}; cast it or use the reference")
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"x must be [T, N, *] with at least one step, got shape {tuple(x.shape)}")
    if isinstance(v, Tensor) and v.shape != x.shape[1:]:
        raise ValueError(f"v must have the shape of one step, {tuple(x.shape[1:])}, got {tuple(v.shape)}")
    if math.prod(x.shape[2:]) >= 2**31:
        raise ValueError(f"one example of x must have fewer than 2^31 elements, got {math.prod(x.shape[2:])}; split it")
    if channel_scale is not None and channel_scale.shape != x.shape[2:3]:
        raise ValueError(
            f"channel_scale must have shape {tuple(x.shape[2:3])} (dimension 2 of x), got {tuple(channel_scale.shape)}"
        )
    dynamics.check_reciprocal_tau(reciprocal_tau is not None)
    if reciprocal_tau is not None and (
        reciprocal_tau.ndim != 0 or reciprocal_tau.dtype != torch.float32 or reciprocal_tau.device != x.device
    ):
        raise ValueError(
            f"reciprocal_tau, which w gives, must be one float32 number on {x.device}, got {reciprocal_tau.dtype} of "
            f"shape {tuple(reciprocal_tau.shape)} on {reciprocal_tau.device}; move or cast it, or the neuron"
        )


def lif(
    x: Tensor,
    v: Tensor | float,
    dynamics: Dynamics,
    surrogate: int,
    alpha: float,
    *,
    reciprocal_tau: Tensor | None = None,
    store_v_seq: bool = False,
    count_spikes: bool = False,
    grad_norm_sq: Tensor | None = None,
    channel_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run T steps of a layer of integrate-and-fire neurons in one kernel, differentiably.

    Args:
        x: input current [T, N, *], float32, float16 or bfloat16, any strides (a copy is made only where the elements
            of one example do not fill a block of memory). CUDA, or the CPU under TRITON_INTERPRET=1.
        v: initial membrane potential, [N, *] or one number for all.
        surrogate, alpha: position in ``surrogate.FUSED`` and steepness.
        reciprocal_tau: 1 / tau of ``dynamics.learned_tau``, float32, 0-dim, differentiable.
        store_v_seq: whether to return the membrane potential after every step.
        count_spikes: whether to return the number of spikes of each example and step.
        grad_norm_sq: float32 [T, N], contiguous; the backward pass writes into it the squared L2 norm of the gradient
            with respect to x[t, n] (times ``channel_scale`` along x's dimension 2, where given).
        channel_scale: float32 [x.shape[2]].

    Returns:
        spikes (x's shape and dtype), final v (float32 [N, *]), v_seq (float32 [T, N, *]) or None, spike count
        (int32 [T, N]) or None.

    Raises:
        ValueError: x has another dtype, fewer than two dimensions or no steps, v does not have the shape of x[0], or
            reciprocal_tau is not as above, missing, or given without ``dynamics.learned_tau``.
    """
    check(x, v, reciprocal_tau, dynamics, channel_scale)
    if runs_directly():
        record = None if grad_norm_sq is None else functools.partial(_write_norms, grad_norm_sq)
        spikes, v_final, v_seq, count = multi_step(
            x,
            v,
            reciprocal_tau,
            dynamics,
            surrogate,
            alpha,
            store_v_seq,
            count_spikes,
            record,
            channel_scale,
            defer_v=False,
        )
        return spikes, v_final, v_seq, None if count is None else add_partials(count)  # type: ignore[return-value]
    v_init, v_init_value = (v, 0.0) if isinstance(v, Tensor) else (None, float(v))
    spikes, v_final, v_seq, spike_count = _RegisteredLIF.apply(
        x,
        v_init,
        reciprocal_tau,
        v_init_value,
        dynamics,
        surrogate,
        alpha,
        store_v_seq,
        count_spikes,
        grad_norm_sq,
        channel_scale,
        _will_backward(x, v_init, reciprocal_tau),
    )
    return spikes, v_final, v_seq if store_v_seq else None, spike_count if count_spikes else None


def _write_norms(grad_norm_sq: Tensor, partials: Tensor) -> None:
    torch.sum(partials, 1, out=grad_norm_sq.t())
