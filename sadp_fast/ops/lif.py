"""Multi-step integrate-and-fire, forward and backward, each one pass over memory.

Reading order: forward kernel, backward kernel, launchers, registered operators,
autograd function, ``lif`` (what the rest of the package calls).

How the kernels work. A program owns one example and BLOCK of its elements and walks the T steps with the membrane
potential in registers; the time axis is never split over programs, so nothing is synchronised. The backward kernel
saves nothing but the input: it walks forward again, and because that walk is a compile-time recursion over time, the
potentials of all its steps are live in registers when it turns round. For T > CHUNK the forward pass also writes the
potential at every CHUNK-th step, and the backward pass recomputes one chunk at a time.

State and arithmetic are float32 whatever the tensors' dtype. Floating-point contraction is off and divisions are
exact, so that a spike is the same, bit for bit, as in the plain torch reference.

Per-example statistics: each program reduces its block for each step and writes one partial sum; partial sums are
added by one torch reduction in a fixed order, so the results are deterministic.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dynamics import Dynamics
from .equations import LEAK, LEAK_WITH_INPUT_DECAY, NO_LEAK, charge, reset, surrogate_gradient
from .layout import laid_out, sequence_like, sequence_strides, v_like, v_strides, with_dense_inner, with_inner_order_of

# Steps held in registers by the backward kernel; the spacing of saved potentials for longer sequences.
CHUNK = 8

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# ---------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _forward_chunk(
    x_ptr,
    spikes_ptr,
    v_seq_ptr,
    count_ptr,
    offsets,
    mask,
    x_stride_t,
    dense_stride_t,
    count_stride_t,
    v,
    tau,
    v_threshold,
    v_rest,
    STEPS: tl.constexpr,
    DYNAMICS: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    STORE_V_SEQ: tl.constexpr,
    COUNT_SPIKES: tl.constexpr,
):
    """Forward through STEPS steps from potential v; returns the potential after the last."""
    for _ in tl.static_range(STEPS):
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h = charge(x, v, tau, v_rest, DYNAMICS, EXACT_RECIPROCAL)
        fired = h - v_threshold >= 0
        v = reset(h, fired, v_threshold, v_rest, SOFT_RESET)
        tl.store(spikes_ptr + offsets, tl.where(fired, 1.0, 0.0).to(spikes_ptr.dtype.element_ty), mask=mask)
        if STORE_V_SEQ:
            tl.store(v_seq_ptr + offsets, v, mask=mask)
        if COUNT_SPIKES:
            tl.store(count_ptr, tl.sum((fired & mask).to(tl.int32), axis=0))
        x_ptr += x_stride_t
        spikes_ptr += dense_stride_t
        v_seq_ptr += dense_stride_t
        count_ptr += count_stride_t
    return v


@triton.jit
def _lif_forward_kernel(
    x_ptr,
    v_init_ptr,
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
    BLOCK: tl.constexpr,
    DYNAMICS: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    HAS_V_INIT: tl.constexpr,
    STORE_V: tl.constexpr,
    STORE_V_SEQ: tl.constexpr,
    STORE_CHECKPOINTS: tl.constexpr,
    COUNT_SPIKES: tl.constexpr,
):
    program = tl.program_id(0)
    one = tl.full((), 1, tl.int64)  # offsets between examples and steps can pass 2^31 elements
    n = one * (program // blocks)
    offsets = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    state_size = one * examples * size  # every tensor but x is dense, [T,] N, *
    state_offset = n * size
    count_stride_t = examples * blocks
    x_ptr += n * x_stride_n
    spikes_ptr += state_offset
    v_seq_ptr += state_offset
    checkpoint_ptr += state_offset
    count_ptr += program
    if HAS_V_INIT:
        v = tl.load(v_init_ptr + state_offset + offsets, mask=mask, other=0.0)
    else:
        v = tl.full((BLOCK,), v_init, tl.float32)

    FULL: tl.constexpr = T // CHUNK
    REST: tl.constexpr = T % CHUNK
    for chunk in range(FULL):
        first = one * chunk * CHUNK
        v = _forward_chunk(
            x_ptr + first * x_stride_t,
            spikes_ptr + first * state_size,
            v_seq_ptr + first * state_size,
            count_ptr + first * count_stride_t,
            offsets,
            mask,
            x_stride_t,
            state_size,
            count_stride_t,
            v,
            tau,
            v_threshold,
            v_rest,
            CHUNK,
            DYNAMICS,
            EXACT_RECIPROCAL,
            SOFT_RESET,
            STORE_V_SEQ,
            COUNT_SPIKES,
        )
        if STORE_CHECKPOINTS:
            if chunk * CHUNK + CHUNK < T:
                tl.store(checkpoint_ptr + chunk * state_size + offsets, v, mask=mask)
    if REST > 0:
        first = one * FULL * CHUNK
        v = _forward_chunk(
            x_ptr + first * x_stride_t,
            spikes_ptr + first * state_size,
            v_seq_ptr + first * state_size,
            count_ptr + first * count_stride_t,
            offsets,
            mask,
            x_stride_t,
            state_size,
            count_stride_t,
            v,
            tau,
            v_threshold,
            v_rest,
            REST,
            DYNAMICS,
            EXACT_RECIPROCAL,
            SOFT_RESET,
            STORE_V_SEQ,
            COUNT_SPIKES,
        )
    if STORE_V:
        tl.store(v_final_ptr + state_offset + offsets, v, mask=mask)


@triton.jit
def _backward_from(
    x_ptr,
    grad_spikes_ptr,
    grad_v_seq_ptr,
    grad_x_ptr,
    norm_ptr,
    offsets,
    mask,
    scale,
    x_stride_t,
    gs_stride_t,
    dense_stride_t,
    norm_stride_t,
    v,
    carry,
    tau,
    v_threshold,
    v_rest,
    alpha,
    STEPS: tl.constexpr,
    DYNAMICS: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    HAS_GRAD_V_SEQ: tl.constexpr,
    GRAD_NORM: tl.constexpr,
    SURROGATE: tl.constexpr,
    RECURSE: tl.constexpr,
):
    """Backward through STEPS steps whose first starts from potential v; carry is dL/dv after the last.

    Returns dL/dv before the first. The recursion is over time and unrolled by the compiler. RECURSE is this function:
    Triton before 3.5 hashes a function with all that it names, without end for one that names itself.
    """
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # Loaded before the recursion, so that every load of the chunk is in flight before its first store.
    grad_spike = tl.load(grad_spikes_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    h = charge(x, v, tau, v_rest, DYNAMICS, EXACT_RECIPROCAL)
    fired = h - v_threshold >= 0
    if STEPS > 1:
        carry = RECURSE(
            x_ptr + x_stride_t,
            grad_spikes_ptr + gs_stride_t,
            grad_v_seq_ptr + dense_stride_t,
            grad_x_ptr + dense_stride_t,
            norm_ptr + norm_stride_t,
            offsets,
            mask,
            scale,
            x_stride_t,
            gs_stride_t,
            dense_stride_t,
            norm_stride_t,
            reset(h, fired, v_threshold, v_rest, SOFT_RESET),
            carry,
            tau,
            v_threshold,
            v_rest,
            alpha,
            STEPS - 1,
            DYNAMICS,
            EXACT_RECIPROCAL,
            SOFT_RESET,
            DETACH_RESET,
            HAS_GRAD_V_SEQ,
            GRAD_NORM,
            SURROGATE,
            RECURSE,
        )
    if HAS_GRAD_V_SEQ:
        carry += tl.load(grad_v_seq_ptr + offsets, mask=mask, other=0.0)
    surrogate = surrogate_gradient(h - v_threshold, alpha, SURROGATE)
    if SOFT_RESET:
        grad_h = carry
        if not DETACH_RESET:
            grad_h -= carry * v_threshold * surrogate
    else:
        grad_h = tl.where(fired, 0.0, carry)
        if not DETACH_RESET:
            grad_h += carry * (v_rest - h) * surrogate
    grad_h += grad_spike * surrogate
    if DYNAMICS == LEAK_WITH_INPUT_DECAY:
        grad_x = grad_h * (1.0 / tau)
    else:
        grad_x = grad_h
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if GRAD_NORM:
        scaled = tl.where(mask, grad_x * scale, 0.0)
        tl.store(norm_ptr, tl.sum(scaled * scaled, axis=0))
    if DYNAMICS == NO_LEAK:
        return grad_h
    else:
        return grad_h * (1.0 - 1.0 / tau)


@triton.jit
def _lif_backward_kernel(
    x_ptr,
    v_init_ptr,
    checkpoint_ptr,
    grad_spikes_ptr,
    grad_v_final_ptr,
    grad_v_seq_ptr,
    channel_scale_ptr,
    grad_x_ptr,
    grad_v_init_ptr,
    norm_ptr,
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
    BLOCK: tl.constexpr,
    DYNAMICS: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    HAS_V_INIT: tl.constexpr,
    HAS_GRAD_V_FINAL: tl.constexpr,
    HAS_GRAD_V_SEQ: tl.constexpr,
    STORE_GRAD_V_INIT: tl.constexpr,
    HAS_CHANNEL_SCALE: tl.constexpr,
    GRAD_NORM: tl.constexpr,
    SURROGATE: tl.constexpr,
):
    program = tl.program_id(0)
    one = tl.full((), 1, tl.int64)
    n = one * (program // blocks)
    offsets = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    state_size = one * examples * size
    state_offset = n * size
    norm_stride_t = examples * blocks
    x_ptr += n * x_stride_n
    grad_spikes_ptr += n * gs_stride_n
    grad_x_ptr += state_offset
    grad_v_seq_ptr += state_offset
    norm_ptr += program
    scale = 1.0
    if HAS_CHANNEL_SCALE:
        scale = tl.load(channel_scale_ptr + (offsets // channel_stride) % channels, mask=mask, other=0.0)
    if HAS_GRAD_V_FINAL:
        carry = tl.load(grad_v_final_ptr + state_offset + offsets, mask=mask, other=0.0)
    else:
        carry = tl.zeros((BLOCK,), tl.float32)

    FULL: tl.constexpr = T // CHUNK
    REST: tl.constexpr = T % CHUNK
    # The last, shorter chunk first; then the full ones, from the last to the first.
    if REST > 0:
        if FULL > 0:
            v = tl.load(checkpoint_ptr + (FULL - 1) * state_size + state_offset + offsets, mask=mask, other=0.0)
        elif HAS_V_INIT:
            v = tl.load(v_init_ptr + state_offset + offsets, mask=mask, other=0.0)
        else:
            v = tl.full((BLOCK,), v_init, tl.float32)
        first = one * FULL * CHUNK
        carry = _backward_from(
            x_ptr + first * x_stride_t,
            grad_spikes_ptr + first * gs_stride_t,
            grad_v_seq_ptr + first * state_size,
            grad_x_ptr + first * state_size,
            norm_ptr + first * norm_stride_t,
            offsets,
            mask,
            scale,
            x_stride_t,
            gs_stride_t,
            state_size,
            norm_stride_t,
            v,
            carry,
            tau,
            v_threshold,
            v_rest,
            alpha,
            REST,
            DYNAMICS,
            EXACT_RECIPROCAL,
            SOFT_RESET,
            DETACH_RESET,
            HAS_GRAD_V_SEQ,
            GRAD_NORM,
            SURROGATE,
            _backward_from,
        )
    for i in range(FULL):
        chunk = one * (FULL - 1 - i)
        if chunk > 0:
            v = tl.load(checkpoint_ptr + (chunk - 1) * state_size + state_offset + offsets, mask=mask, other=0.0)
        elif HAS_V_INIT:
            v = tl.load(v_init_ptr + state_offset + offsets, mask=mask, other=0.0)
        else:
            v = tl.full((BLOCK,), v_init, tl.float32)
        first = chunk * CHUNK
        carry = _backward_from(
            x_ptr + first * x_stride_t,
            grad_spikes_ptr + first * gs_stride_t,
            grad_v_seq_ptr + first * state_size,
            grad_x_ptr + first * state_size,
            norm_ptr + first * norm_stride_t,
            offsets,
            mask,
            scale,
            x_stride_t,
            gs_stride_t,
            state_size,
            norm_stride_t,
            v,
            carry,
            tau,
            v_threshold,
            v_rest,
            alpha,
            CHUNK,
            DYNAMICS,
            EXACT_RECIPROCAL,
            SOFT_RESET,
            DETACH_RESET,
            HAS_GRAD_V_SEQ,
            GRAD_NORM,
            SURROGATE,
            _backward_from,
        )
    if STORE_GRAD_V_INIT:
        tl.store(grad_v_init_ptr + state_offset + offsets, carry, mask=mask)


# ------------------------------------------------------------------------------------------------------ launchers


class _Grid(NamedTuple):
    """How one tensor [T, N, *] is cut into programs."""

    steps: int
    examples: int
    size: int
    block: int
    blocks: int

    @classmethod
    def of(cls, x: Tensor, values_per_element: int) -> _Grid:
        """``values_per_element``: how many of a chunk's values the kernel holds for each element of a step."""
        steps, examples = x.shape[0], x.shape[1]
        size = math.prod(x.shape[2:])
        # One warp a program: its reductions are shuffles, without barriers. Eight elements a thread (two 16-byte
        # accesses for float32, one for half types) where they fit in the registers, else four.
        widest = 32 * (8 if values_per_element <= 4 else 4)
        block = max(32, min(widest, triton.next_power_of_2(size)))
        return cls(steps, examples, size, block, triton.cdiv(size, block))

    @property
    def programs(self) -> tuple[int]:
        return (self.examples * self.blocks,)

    def constants(self, tau: float, decay_input: bool, leak: bool, soft_reset: bool) -> dict:
        if not leak:
            dynamics = NO_LEAK
        else:
            dynamics = LEAK_WITH_INPUT_DECAY if decay_input else LEAK
        return {
            "T": self.steps,
            "CHUNK": CHUNK,
            "BLOCK": self.block,
            "DYNAMICS": dynamics,
            "EXACT_RECIPROCAL": math.frexp(tau)[0] == 0.5,
            "SOFT_RESET": soft_reset,
            "num_warps": 1,
            "enable_fp_fusion": False,
        }


def _checkpoints_like(x: Tensor) -> Tensor:
    return x.new_empty((max(0, triton.cdiv(x.shape[0], CHUNK) - 1), *x.shape[1:]), dtype=torch.float32)


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32)


def _launch_forward(
    x: Tensor,
    v_init: Tensor | None,
    v_init_value: float,
    tau: float,
    leak: bool,
    decay_input: bool,
    v_threshold: float,
    v_rest: float,
    soft_reset: bool,
    store_v_seq: bool,
    store_checkpoints: bool,
    count_spikes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = with_dense_inner(x)
    v_init = laid_out(v_init, v_strides(x))
    grid = _Grid.of(x, values_per_element=1)
    spikes = sequence_like(x, x.dtype)
    v = v_like(x)
    v_seq = sequence_like(x, torch.float32) if store_v_seq else _nothing(x)
    checkpoints = _checkpoints_like(x) if store_checkpoints else _nothing(x)
    count_shape = (grid.steps, grid.examples, grid.blocks) if count_spikes else (0,)
    count = x.new_empty(count_shape, dtype=torch.int32)
    if x.numel() == 0:
        return spikes, v, v_seq, checkpoints, _add_partials(count)
    with torch.cuda.device_of(x):
        _lif_forward_kernel[grid.programs](
            x,
            x if v_init is None else v_init,
            spikes,
            v,
            v_seq,
            checkpoints,
            count,
            grid.size,
            grid.blocks,
            grid.examples,
            x.stride(0),
            x.stride(1),
            v_init_value,
            tau,
            v_threshold,
            v_rest,
            **grid.constants(tau, decay_input, leak, soft_reset),
            HAS_V_INIT=v_init is not None,
            STORE_V=True,
            STORE_V_SEQ=store_v_seq,
            STORE_CHECKPOINTS=checkpoints.numel() > 0,
            COUNT_SPIKES=count_spikes,
        )
    return spikes, v, v_seq, checkpoints, _add_partials(count)


def _add_partials(partials: Tensor) -> Tensor:
    """[T, N, blocks] -> [T, N], in a fixed order."""
    if partials.ndim == 1:
        return partials
    return partials.squeeze(-1) if partials.shape[-1] == 1 else partials.sum(-1, dtype=partials.dtype)


def _launch_backward(
    x: Tensor,
    v_init: Tensor | None,
    checkpoints: Tensor,
    grad_spikes: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    channel_scale: Tensor | None,
    v_init_value: float,
    tau: float,
    leak: bool,
    decay_input: bool,
    v_threshold: float,
    v_rest: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate: int,
    alpha: float,
    want_grad_v_init: bool,
    want_grad_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = with_dense_inner(x)
    v_init = laid_out(v_init, v_strides(x))
    grad_v = laid_out(grad_v, v_strides(x))
    grad_v_seq = laid_out(grad_v_seq, sequence_strides(x))
    if grad_spikes is None:
        grad_spikes = x.new_zeros((1,) * x.ndim).expand(x.shape)
    grad_spikes = with_inner_order_of(x, grad_spikes)
    grid = _Grid.of(x, values_per_element=min(x.shape[0], CHUNK))
    grad_x = sequence_like(x, x.dtype)
    grad_v_init = v_like(x) if want_grad_v_init else _nothing(x)
    norm_shape = (grid.steps, grid.examples, grid.blocks) if want_grad_norm else (0,)
    grad_norm_sq = x.new_empty(norm_shape, dtype=torch.float32)
    if x.numel() == 0:
        return grad_x, grad_v_init, _add_partials(grad_norm_sq)
    with torch.cuda.device_of(x):
        _lif_backward_kernel[grid.programs](
            x,
            x if v_init is None else v_init,
            checkpoints,
            grad_spikes,
            x if grad_v is None else grad_v,
            x if grad_v_seq is None else grad_v_seq,
            x if channel_scale is None else channel_scale,
            grad_x,
            grad_v_init,
            grad_norm_sq,
            grid.size,
            grid.blocks,
            grid.examples,
            1 if channel_scale is None else x.shape[2],
            1 if channel_scale is None else x.stride(2),
            x.stride(0),
            x.stride(1),
            grad_spikes.stride(0),
            grad_spikes.stride(1),
            v_init_value,
            tau,
            v_threshold,
            v_rest,
            alpha,
            **grid.constants(tau, decay_input, leak, soft_reset),
            DETACH_RESET=detach_reset,
            HAS_V_INIT=v_init is not None,
            HAS_GRAD_V_FINAL=grad_v is not None,
            HAS_GRAD_V_SEQ=grad_v_seq is not None,
            STORE_GRAD_V_INIT=want_grad_v_init,
            HAS_CHANNEL_SCALE=channel_scale is not None,
            GRAD_NORM=want_grad_norm,
            SURROGATE=surrogate,
        )
    return grad_x, grad_v_init, _add_partials(grad_norm_sq)


# ---------------------------------------------------------------------------------------------- registered operators

_DYNAMICS_SCHEMA = (
    "float v_init_value, float tau, bool leak, bool decay_input, float v_threshold, float v_rest, bool soft_reset"
)

torch.library.define(
    "sadp_fast::lif_forward",
    f"(Tensor x, Tensor? v_init, {_DYNAMICS_SCHEMA}, bool store_v_seq, bool store_checkpoints, bool count_spikes)"
    " -> (Tensor spikes, Tensor v, Tensor v_seq, Tensor checkpoints, Tensor spike_count)",
)
torch.library.define(
    "sadp_fast::lif_backward",
    "(Tensor x, Tensor? v_init, Tensor checkpoints, Tensor? grad_spikes, Tensor? grad_v, Tensor? grad_v_seq,"
    f" Tensor? channel_scale, {_DYNAMICS_SCHEMA}, bool detach_reset, int surrogate, float alpha,"
    " bool want_grad_v_init, bool want_grad_norm) -> (Tensor grad_x, Tensor grad_v_init, Tensor grad_norm_sq)",
)
# The CPU implementation is the same kernel in Triton's interpreter.
for _device in ("cuda", "cpu"):
    torch.library.impl("sadp_fast::lif_forward", _device, _launch_forward)
    torch.library.impl("sadp_fast::lif_backward", _device, _launch_backward)


@torch.library.register_fake("sadp_fast::lif_forward")
def _(x, v_init, *constants_and_flags):
    store_v_seq, store_checkpoints, count_spikes = constants_and_flags[-3:]
    x = with_dense_inner(x)
    return (
        sequence_like(x, x.dtype),
        v_like(x),
        sequence_like(x, torch.float32) if store_v_seq else _nothing(x),
        _checkpoints_like(x) if store_checkpoints else _nothing(x),
        x.new_empty(x.shape[:2] if count_spikes else (0,), dtype=torch.int32),
    )


@torch.library.register_fake("sadp_fast::lif_backward")
def _(x, *rest):
    want_grad_v_init, want_grad_norm = rest[-2:]
    x = with_dense_inner(x)
    return (
        sequence_like(x, x.dtype),
        v_like(x) if want_grad_v_init else _nothing(x),
        x.new_empty(x.shape[:2] if want_grad_norm else (0,), dtype=torch.float32),
    )


# ------------------------------------------------------------------------------------------------- autograd function


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        v_init: Tensor | None,
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
            1.0 if dynamics.tau is None else dynamics.tau,
            dynamics.tau is not None,
            dynamics.decay_input,
            dynamics.v_threshold,
            dynamics.v_rest,
            dynamics.v_reset is None,
        )
        spikes, v, v_seq, checkpoints, spike_count = torch.ops.sadp_fast.lif_forward(
            x, v_init, *constants, store_v_seq, will_backward and x.shape[0] > CHUNK, count_spikes
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(spike_count)
        if will_backward:
            ctx.save_for_backward(x, v_init, checkpoints, channel_scale)
            ctx.constants = constants
            ctx.options = (dynamics.detach_reset, surrogate, alpha)
            ctx.grad_norm_sq = grad_norm_sq
        return spikes, v, v_seq, spike_count

    @staticmethod
    def backward(ctx, grad_spikes: Tensor | None, grad_v: Tensor | None, grad_v_seq: Tensor | None, _):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the fused neuron has no second derivative: call backward() without create_graph=True, or set the "
                "node's backend='torch'"
            )
        x, v_init, checkpoints, channel_scale = ctx.saved_tensors
        if grad_v_seq is not None and grad_v_seq.numel() == 0:
            grad_v_seq = None
        grad_x, grad_v_init, grad_norm_sq = torch.ops.sadp_fast.lif_backward(
            x,
            v_init,
            checkpoints,
            grad_spikes,
            grad_v,
            grad_v_seq,
            channel_scale,
            *ctx.constants,
            *ctx.options,
            ctx.needs_input_grad[1],
            ctx.grad_norm_sq is not None,
        )
        if ctx.grad_norm_sq is not None:
            ctx.grad_norm_sq.copy_(grad_norm_sq)
        return grad_x, grad_v_init if ctx.needs_input_grad[1] else None, *([None] * 9)


# ------------------------------------------------------------------------------------------------------ entry point


def lif(
    x: Tensor,
    v: Tensor | float,
    dynamics: Dynamics,
    surrogate: int,
    alpha: float,
    *,
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
        store_v_seq: whether to return the membrane potential after every step.
        count_spikes: whether to return the number of spikes of each example and step.
        grad_norm_sq: float32 [T, N], contiguous; the backward pass writes into it the squared L2 norm of the gradient
            with respect to x[t, n] (times ``channel_scale`` along x's dimension 2, where given).
        channel_scale: float32 [x.shape[2]].

    Returns:
        spikes (x's shape and dtype), final v (float32 [N, *]), v_seq (float32 [T, N, *]) or None, spike count
        (int32 [T, N]) or None.

    Raises:
        ValueError: x has another dtype, fewer than two dimensions or no steps, or v does not have the shape of x[0].
    """
    if x.dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x.dtype}; cast it or use the reference")
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"x must be [T, N, *] with at least one step, got shape {tuple(x.shape)}")
    v_init, v_init_value = (v, 0.0) if isinstance(v, Tensor) else (None, float(v))
    if v_init is not None and v_init.shape != x.shape[1:]:
        raise ValueError(f"v must have the shape of one step, {tuple(x.shape[1:])}, got {tuple(v_init.shape)}")
    if math.prod(x.shape[2:]) >= 2**31:
        raise ValueError(f"one example of x must have fewer than 2^31 elements, got {math.prod(x.shape[2:])}; split it")
    if channel_scale is not None and channel_scale.shape != x.shape[2:3]:
        raise ValueError(
            f"channel_scale must have shape {tuple(x.shape[2:3])} (dimension 2 of x), got {tuple(channel_scale.shape)}"
        )
    will_backward = torch.is_grad_enabled() and (x.requires_grad or (v_init is not None and v_init.requires_grad))
    spikes, v_final, v_seq, spike_count = _LIF.apply(
        x,
        v_init,
        v_init_value,
        dynamics,
        surrogate,
        alpha,
        store_v_seq,
        count_spikes,
        grad_norm_sq,
        channel_scale,
        will_backward,
    )
    return spikes, v_final, v_seq if store_v_seq else None, spike_count if count_spikes else None
