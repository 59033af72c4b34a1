"""Multi-step integrate-and-fire as operators: forward and backward pass are one kernel each.

Reading order: registered operators, autograd functions, ``multi_step`` (what a neuron calls) and ``lif`` (the same as a
function of tensors). The kernels are in kernels.py, their launches in launch.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad

from ..common.dispatch import nothing, refuse_second_derivative, runs_directly
from ..common.dtypes import KERNEL_DTYPES
from ..common.dynamics import Dynamics
from ..common.layout import sequence_like, sequence_strides, v_like, with_dense_inner
from ..common.saved_tensors import hooks_of_saved_tensors
from .configuration import Stores, Wanted, chunk_steps, takes_several_chunks
from .launch import Constants, add_partials, constants_of, run_backward, run_forward

# ---------------------------------------------------------------------------------------------- registered operators

# For torch.compile and dispatch modes; eager calls go straight to ``run_forward`` and ``run_backward``.

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


def _launch_forward(
    x: Tensor, v_init: Tensor | None, reciprocal_tau: Tensor | None, *constants_and_flags: Any
) -> tuple[Tensor, ...]:
    *neuron, store_v_seq, store_checkpoints, count_spikes = constants_and_flags
    stores = Stores(True, True, store_v_seq, store_checkpoints, count_spikes)
    *outputs, count = run_forward(x, v_init, reciprocal_tau, Constants(*neuron), stores)
    count = nothing(x, torch.int32) if count is None else add_partials(count)
    return *[nothing(x) if t is None else t for t in outputs], count


def _launch_backward(x, v_init, reciprocal_tau, checkpoints, *grads_and_constants):
    grads, neuron = grads_and_constants[:4], Constants(*grads_and_constants[4:11])
    *options, want_grad_v_init, want_norms, want_grad_tau = grads_and_constants[11:]
    wanted = Wanted(want_grad_v_init, want_norms, want_grad_tau)
    saved = checkpoints if checkpoints.numel() > 0 else None
    given = (x, v_init, reciprocal_tau, saved, *grads, neuron, tuple(options), wanted)
    grad_x, grad_v_init, norms, grad_tau = run_backward(*given)
    norms = nothing(x) if norms is None else add_partials(norms)
    grad_tau = nothing(x) if grad_tau is None else grad_tau.sum()
    return grad_x, nothing(x) if grad_v_init is None else grad_v_init, norms, grad_tau


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
        sequence_like(x, torch.float32) if store_v_seq else nothing(x),
        x.new_empty_strided((chunks - 1, *x.shape[1:]), sequence_strides(x), dtype=torch.float32)
        if store_checkpoints
        else nothing(x),
        x.new_empty(x.shape[:2] if count_spikes else (0,), dtype=torch.int32),
    )


@torch.library.register_fake("sadp_fast::lif_backward")
def _(x, *rest):
    want_grad_v_init, want_grad_norm, want_grad_tau = rest[-3:]
    x = with_dense_inner(x)
    return (
        sequence_like(x, x.dtype),
        v_like(x) if want_grad_v_init else nothing(x),
        x.new_empty(x.shape[:2] if want_grad_norm else (0,), dtype=torch.float32),
        x.new_empty(() if want_grad_tau else (0,), dtype=torch.float32),
    )


# ------------------------------------------------------------------------------------------------ autograd functions


@dataclass(slots=True, eq=False)
class _Call:
    """What one eager call's forward pass leaves for its backward pass, beside the tensors that autograd saves."""

    neuron: Constants
    stores: Stores
    options: tuple[bool, int, float]
    record_norms: Callable[[Tensor], None] | None
    grad_v: Tensor | None = None  # from _FinalPotential's backward pass to that of _LIF


class _LIF(torch.autograd.Function):
    """The eager path. Without stores.v its second output has no element: _FinalPotential hangs on it."""

    @staticmethod
    def forward(ctx, x, v_init, reciprocal_tau, channel_scale, call: _Call):
        spikes, v, v_seq, checkpoints, count = run_forward(x, v_init, reciprocal_tau, call.neuron, call.stores)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, v_init, reciprocal_tau, checkpoints)
        # Not saved: where activation checkpoints run this anew, nothing is measured, and as much has to be saved.
        ctx.call, ctx.channel_scale = call, channel_scale
        if count is not None:
            ctx.mark_non_differentiable(count)
        return spikes, nothing(x) if v is None else v, v_seq, count

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None, grad_v_seq: Tensor | None, _: None):
        refuse_second_derivative()
        call, inputs, channel_scale = ctx.call, ctx.saved_tensors, ctx.channel_scale
        if grad_v is not None and not call.stores.v:
            grad_v, call.grad_v = call.grad_v, None
        wanted = Wanted(ctx.needs_input_grad[1], call.record_norms is not None, ctx.needs_input_grad[2])
        grads = (grad_spikes, grad_v, grad_v_seq)
        given = (*inputs, *grads, channel_scale, call.neuron, call.options, wanted)
        grad_x, grad_v_init, norms, grad_tau = run_backward(*given)
        if norms is not None:
            call.record_norms(norms)
        return grad_x, grad_v_init, None if grad_tau is None else grad_tau.sum(), None, None


class _FinalPotential(torch.autograd.Function):
    """The potential after the last step of a call, by a forward pass that writes nothing else.

    Its gradient goes through ``call`` and the handle's makes autograd wait for it, so that the call has one backward
    pass, whatever was read.
    """

    @staticmethod
    def forward(ctx, handle, x, v_init, reciprocal_tau, call: _Call):
        ctx.call = call
        return run_forward(x, v_init, reciprocal_tau, call.neuron, Stores(spikes=False))[1]

    @staticmethod
    def backward(ctx: Any, grad_v: Tensor):
        refuse_second_derivative()
        ctx.call.grad_v = grad_v
        return nothing(grad_v), None, None, None, None


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
        ctx, x, v_init, reciprocal_tau, neuron, options, store_v_seq, count_spikes, norms, channel_scale, will_backward
    ):
        stores = (store_v_seq, will_backward and takes_several_chunks(x), count_spikes)
        spikes, v, v_seq, checkpoints, spike_count = torch.ops.sadp_fast.lif_forward(
            x, v_init, reciprocal_tau, *neuron, *stores
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(spike_count)
        if will_backward:
            ctx.save_for_backward(x, v_init, reciprocal_tau, checkpoints, channel_scale)
            ctx.neuron, ctx.options, ctx.grad_norm_sq = neuron, options, norms
        return spikes, v, v_seq, spike_count

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None, grad_v_seq: Tensor | None, _: None):
        refuse_second_derivative()
        *inputs, channel_scale = ctx.saved_tensors
        if grad_v_seq is not None and grad_v_seq.numel() == 0:
            grad_v_seq = None
        _, wants_grad_v_init, wants_grad_tau, *_ = ctx.needs_input_grad
        grads = (grad_spikes, grad_v, grad_v_seq, channel_scale)
        wanted = (wants_grad_v_init, ctx.grad_norm_sq is not None, wants_grad_tau)
        grad_x, grad_v_init, grad_norm_sq, grad_tau = torch.ops.sadp_fast.lif_backward(
            *inputs, *grads, *ctx.neuron, *ctx.options, *wanted
        )
        if ctx.grad_norm_sq is not None:
            ctx.grad_norm_sq.copy_(grad_norm_sq)
        grad_v_init, grad_tau = grad_v_init if wants_grad_v_init else None, grad_tau if wants_grad_tau else None
        return grad_x, grad_v_init, grad_tau, *([None] * 7)


# ----------------------------------------------------------------------------------------------------- entry points


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
    neuron = constants_of(dynamics, v_init_value)
    inputs = (x, v_init, reciprocal_tau)
    # In forward-mode differentiation torch has to be asked, which refuses it.
    if not _will_backward(*inputs) and forward_ad._current_level < 0:
        stores = Stores(v_seq=store_v_seq, counts=count_spikes)
        spikes, v_final, v_seq, _, count = run_forward(*inputs, neuron, stores)
        return spikes, v_final, v_seq, count  # type: ignore[return-value]
    # Hooks (checkpointing, offloading) mean that the input shall not be kept.
    defer_v = defer_v and x.shape[0] > 1 and hooks_of_saved_tensors() is None
    stores = Stores(True, not defer_v, store_v_seq, takes_several_chunks(x), count_spikes)
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
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x.dtype}; cast it or use the reference")
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"x must be [T, N, *] with at least one step, got shape {tuple(x.shape)}")
    if isinstance(v, Tensor) and v.shape != x.shape[1:]:
        raise ValueError(f"v must have the shape of one step, {tuple(x.shape[1:])}, got {tuple(v.shape)}")
    if math.prod(x.shape[2:]) >= 2**31:
        raise ValueError(f"one example of x must have fewer than 2^31 elements, got {math.prod(x.shape[2:])}; split it")
    if channel_scale is not None and (
        x.ndim < 3 or channel_scale.shape != x.shape[2:3] or channel_scale.device != x.device
    ):
        raise ValueError(
            f"channel_scale must have shape {tuple(x.shape[2:3])} (dimension 2 of x [T, N, C, *]) on {x.device}, got "
            f"{tuple(channel_scale.shape)} on {channel_scale.device}; move it with the input, or set it to None"
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
        channel_scale: [x.shape[2]], used as float32.

    Returns:
        spikes (x's shape and dtype), final v (float32 [N, *]), v_seq (float32 [T, N, *]) or None, spike count
        (int32 [T, N]) or None.

    Raises:
        ValueError: x has another dtype, fewer than two dimensions or no steps, v does not have the shape of x[0],
            channel_scale does not fit x, or reciprocal_tau is not as above, missing, or given without
            ``dynamics.learned_tau``.
    """
    check(x, v, reciprocal_tau, dynamics, channel_scale)
    if runs_directly():
        record = None if grad_norm_sq is None else functools.partial(_write_norms, grad_norm_sq)
        wanted = (store_v_seq, count_spikes, record, channel_scale)
        outputs = multi_step(x, v, reciprocal_tau, dynamics, surrogate, alpha, *wanted, defer_v=False)
        spikes, v_final, v_seq, count = outputs
        return spikes, v_final, v_seq, None if count is None else add_partials(count)  # type: ignore[return-value]
    v_init, v_init_value = (v, 0.0) if isinstance(v, Tensor) else (None, float(v))
    inputs = (x, v_init, reciprocal_tau)
    neuron, options = Constants.of(dynamics, v_init_value), (dynamics.detach_reset, surrogate, alpha)
    stores, measured = (store_v_seq, count_spikes), (grad_norm_sq, channel_scale)
    outputs = _RegisteredLIF.apply(*inputs, neuron, options, *stores, *measured, _will_backward(*inputs))
    spikes, v_final, v_seq, spike_count = outputs
    return spikes, v_final, v_seq if store_v_seq else None, spike_count if count_spikes else None


def _write_norms(grad_norm_sq: Tensor, partials: Tensor) -> None:
    torch.sum(partials, 1, out=grad_norm_sq.t())
