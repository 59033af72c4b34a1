"""BatchNorm + LIF as operators: a forward pass, a backward pass, and what autograd needs around them.

Reading order: passes, registered operators, autograd functions, ``batch_norm_lif`` (what a neuron calls). The kernels
are in kernels.py, their launches in launch.py, the same in plain torch in reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import layout
from ..common.dispatch import nothing, refuse_second_derivative, runs_directly
from ..common.dynamics import Dynamics
from ..common.equations import SMALLEST_GAIN
from .configuration import NormalisationKind
from .launch import Neuron, as_read, layer_for
from .reference import Normalisation


def _grad_tau(
    neuron: Neuron,
    sums: Sequence[Tensor | None],
    reciprocal_tau: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Gradient of 1 / tau; ``sums``: what the backward pass gives for weight, bias and leak."""
    grad_weight, grad_bias, leak = sums
    assert leak is not None
    grad_tau = leak.sum()
    if neuron.learned_gain:  # the normalised input's part; its gradients have the factor 1 / tau already
        assert grad_weight is not None and grad_bias is not None and reciprocal_tau is not None
        driven = grad_weight if weight is None or bias is None else grad_weight * weight + grad_bias * bias
        grad_tau += driven.sum() / reciprocal_tau.clamp(min=SMALLEST_GAIN.value)
    return grad_tau


# ---------------------------------------------------------------------------------------------- registered operators

# For torch.compile and dispatch modes; eager calls go straight to the launches. They change none of their arguments:
# ``running`` are the new running statistics.

_NEURON_SCHEMA = (  # of a Dynamics, and the surrogate
    "float? tau, bool decay_input, float v_threshold, float? v_reset, bool detach_reset, bool learned_tau,"
    " int surrogate, float alpha"
)

torch.library.define(
    "sadp_fast::batch_norm_lif_forward",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? reciprocal_tau, Tensor? running_mean,"
    " Tensor? running_var, Tensor? batches, SymInt? repeat, float eps, float? momentum, bool use_batch, bool update,"
    f" {_NEURON_SCHEMA}, bool want_energy)"
    " -> (Tensor out, Tensor v, Tensor constants, Tensor energy, Tensor running)",
)
torch.library.define(
    "sadp_fast::batch_norm_lif_backward",
    "(Tensor grad_out, Tensor x, Tensor constants, Tensor? reciprocal_tau, Tensor? weight, Tensor? bias,"
    f" SymInt? repeat, bool use_batch, {_NEURON_SCHEMA}, bool want_norm, bool want_grad_tau)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_reciprocal_tau, Tensor grad_norm_sq)",
)


def _neuron(*numbers: Any) -> Neuron:
    *dynamics, surrogate, alpha = numbers
    return Neuron.of(Dynamics(*dynamics), surrogate, alpha)


def _launch_forward(
    x, residual, weight, bias, reciprocal_tau, running_mean, running_var, batches, repeat, *constants_and_flags
):
    eps, momentum, use_batch, update, *numbers, want_energy = constants_and_flags
    running = nothing(x)
    if update:
        running = torch.stack((running_mean, running_var))
        running_mean, running_var = running
        batches = x.new_zeros((), dtype=torch.int64) if batches is None else batches.clone()
    norm = Normalisation(eps, momentum, running_mean, running_var, batches, use_batch, update)
    layer, x = layer_for(x, repeat, _neuron(*numbers), NormalisationKind.of(norm, weight is not None))
    constants, tau = layer.constants(x, norm, weight, bias, reciprocal_tau)
    out, v, energy = layer.fire(x, constants, tau, residual, True, want_energy)
    return out, v, constants, nothing(x) if energy is None else energy.sum(1), running


def _launch_backward(grad_out, x, constants, reciprocal_tau, weight, bias, repeat, use_batch, *constants_and_flags):
    *numbers, want_norm, want_grad_tau = constants_and_flags
    neuron, affine = _neuron(*numbers), weight is not None
    layer, x = layer_for(x, repeat, neuron, NormalisationKind(use_batch, False, False, affine))
    # The output's energy is the forward pass's: what this pass adds of it, from nothing, is not looked at.
    unused, norms = (x.new_empty(layer.shape.examples if want_norm else 0, dtype=torch.float32) for _ in range(2))
    backward, grad = layer.backward(grad_out, want_norm, want_grad_tau)
    energies = (unused, norms) if want_norm else None
    grad_x, *sums = backward.run(x, grad, constants, reciprocal_tau, None, energies)
    grad_tau = _grad_tau(neuron, sums, reciprocal_tau, weight, bias) if want_grad_tau else nothing(x)
    grad_weight, grad_bias = (nothing(x) if t is None or not affine else t for t in sums[:2])
    return grad_x, grad_weight, grad_bias, grad_tau, norms


# The CPU implementation is the same kernels in Triton's interpreter.
for _device in ("cuda", "cpu"):
    torch.library.impl("sadp_fast::batch_norm_lif_forward", _device, _launch_forward)
    torch.library.impl("sadp_fast::batch_norm_lif_backward", _device, _launch_backward)


def _out_of(x: Tensor, repeat: int | None) -> layout.Sequence:
    """What the output is like; x as the kernels read it."""
    return layout.Sequence(x if repeat is None else x.expand(repeat, *x.shape))


@torch.library.register_fake("sadp_fast::batch_norm_lif_forward")
def _(x, residual, weight, bias, reciprocal_tau, running_mean, running_var, batches, repeat, *constants_and_flags):
    _, _, _, update, *_, want_energy = constants_and_flags
    out = _out_of(as_read(x, repeat is not None), repeat)
    _, examples, channels = out.shape[:3]
    return (
        x.new_empty_strided(out.shape, out.strides),
        x.new_empty_strided(out.shape[1:], out.strides[1:], dtype=torch.float32),
        x.new_empty((4, channels), dtype=torch.float32),
        x.new_empty(examples if want_energy else 0, dtype=torch.float32),
        x.new_empty((2, channels), dtype=torch.float32) if update else nothing(x),
    )


@torch.library.register_fake("sadp_fast::batch_norm_lif_backward")
def _(grad_out, x, constants, reciprocal_tau, weight, bias, repeat, use_batch, *constants_and_flags):
    *_, want_norm, want_grad_tau = constants_and_flags
    out = _out_of(as_read(x, repeat is not None), repeat)
    _, examples, channels = out.shape[:3]
    return (
        x.new_empty_strided(x.shape, out.strides if repeat is None else out.strides[1:]),
        x.new_empty(0 if weight is None else channels, dtype=torch.float32),
        x.new_empty(0 if weight is None else channels, dtype=torch.float32),
        x.new_empty(() if want_grad_tau else 0, dtype=torch.float32),
        x.new_empty(examples if want_norm else 0, dtype=torch.float32),
    )


# ------------------------------------------------------------------------------------------------ autograd functions


class _BatchNormLIF(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, reciprocal_tau, repeat, neuron, kind, norm, want_v, energies):
        layer, x = layer_for(x, repeat, neuron, kind)
        constants, tau = layer.constants(x, norm, weight, bias, reciprocal_tau)
        out, v, energy = layer.fire(x, constants, tau, residual, want_v, energies is not None)
        driven = neuron.learned_gain and ctx.needs_input_grad[4]  # else the constants have all that is needed
        affine = (weight, bias) if driven else (None, None)
        ctx.save_for_backward(x, constants, reciprocal_tau, *affine)
        # Not saved: where activation checkpoints run this anew, nothing is measured, and as much has to be saved.
        ctx.energy, ctx.energies = energy, energies
        ctx.layer, ctx.repeat, ctx.strides = layer, repeat, x.stride()
        ctx.mark_non_differentiable(*(t for t in (v, constants) if t is not None))
        ctx.set_materialize_grads(False)
        return out, v, constants

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_):
        refuse_second_derivative()
        if grad_out is None:
            return (None,) * 11
        x, constants, reciprocal_tau, weight, bias = ctx.saved_tensors
        energy, energies = ctx.energy, ctx.energies
        layer, wants_grad_tau = ctx.layer, ctx.needs_input_grad[4]
        if x.stride() != ctx.strides:  # a hook for saved tensors gave it back in another layout
            layer, x = layer_for(x, ctx.repeat, layer.neuron, layer.kind)
        backward, grad = layer.backward(grad_out, energies is not None, wants_grad_tau)
        grad_x, *sums = backward.run(x, grad, constants, reciprocal_tau, energy, energies)
        grad_tau = _grad_tau(layer.neuron, sums, reciprocal_tau, weight, bias) if wants_grad_tau else None
        affine = sums[:2] if layer.kind.affine else (None, None)
        return grad_x, grad if ctx.needs_input_grad[1] else None, *affine, grad_tau, *([None] * 6)


class _RegisteredBatchNormLIF(torch.autograd.Function):
    """The path of torch.compile and dispatch modes, through the registered operators.

    ``rule``: eps, momentum, use_batch and update.
    """

    @staticmethod
    def forward(ctx, x, residual, weight, bias, reciprocal_tau, mean, var, batches, repeat, rule, neuron, delta):
        tensors = (x, residual, weight, bias, reciprocal_tau, mean, var, batches)
        out, v, constants, energy, running = torch.ops.sadp_fast.batch_norm_lif_forward(
            *tensors, repeat, *rule, *neuron, delta is not None
        )
        ctx.save_for_backward(x, constants, reciprocal_tau, weight, bias)
        ctx.delta, ctx.constants = delta, (repeat, rule[2], *neuron)
        ctx.mark_non_differentiable(v, energy, running)
        ctx.set_materialize_grads(False)
        return out, v, energy, running

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_):
        refuse_second_derivative()
        if grad_out is None:
            return (None,) * 12
        flags = (ctx.delta is not None, ctx.needs_input_grad[4])
        grad_x, *grads, norms = torch.ops.sadp_fast.batch_norm_lif_backward(
            grad_out, *ctx.saved_tensors, *ctx.constants, *flags
        )
        if ctx.delta is not None:
            ctx.delta.copy_(norms)
        wanted = ctx.needs_input_grad[2:5]
        grads = [grad if wants else None for grad, wants in zip(grads, wanted, strict=True)]
        return grad_x, grad_out if ctx.needs_input_grad[1] else None, *grads, *([None] * 7)


# ------------------------------------------------------------------------------------------------------ entry points


def batch_norm_lif(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Normalisation,
    dynamics: Dynamics,
    surrogate: int,
    alpha: float,
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
        norm: the rest of the normalisation; a training pass updates its running statistics.
        surrogate, alpha: position in ``surrogate.FUSED`` and steepness.
        reciprocal_tau: 1 / tau of ``dynamics.learned_tau``, float32, 0-dim, differentiable.
        repeat: T, where every step has the same x (direct coding).
        want_v: whether to write the final membrane potential in the same pass; the registered operators always do.
        energies: two float32 [N], both written until the backward pass is over: the squared norm of each example's
            output, and that of its gradient with respect to x with the normalisation's statistics held constant, each
            summed over time (the gradient of a repeated x is that of all steps).

    Returns:
        spikes (+ residual) [T, N, C, *] in x's dtype, and what gives the final potential, float32 [N, C, *], without a
        graph; where it was not wanted, it is computed when asked for, from x.
    """
    tensors = (x, residual, weight, bias, reciprocal_tau)
    kind = NormalisationKind.of(norm, weight is not None)
    if not runs_directly():
        d = dynamics
        numbers = (d.tau, d.decay_input, d.v_threshold, d.v_reset, d.detach_reset, d.learned_tau, surrogate, alpha)
        return _registered(tensors, norm, kind, numbers, repeat, energies)
    neuron = Neuron.of(dynamics, surrogate, alpha)
    out, v, constants = _BatchNormLIF.apply(*tensors, repeat, neuron, kind, norm, want_v, energies)
    if want_v:
        return out, lambda: v
    x = x.detach()
    tau = constants if reciprocal_tau is None else reciprocal_tau.detach()
    version = None if x.is_inference() else x._version  # a tensor of inference mode counts no changes

    def potential() -> Tensor:
        if version is not None and x._version != version:
            raise RuntimeError(
                "the input of a BatchNorm + LIF layer was changed in place before its potential v was read; read v "
                "first, or do not change the input in place"
            )
        layer, dense = layer_for(x, repeat, neuron, kind)
        return layer.fire(dense, constants, tau, None, True, False)[1]  # type: ignore[return-value]

    return out, potential


def _registered(
    tensors: tuple[Tensor | None, ...],
    norm: Normalisation,
    kind: NormalisationKind,
    neuron: tuple[Any, ...],
    repeat: int | None,
    energies: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """``batch_norm_lif`` by the registered operators."""
    running_statistics = (norm.running_mean, norm.running_var, norm.batches if kind.cumulative else None)
    rule, delta = (norm.eps, norm.momentum, norm.use_batch, kind.update), None if energies is None else energies[1]
    out, v, energy, running = _RegisteredBatchNormLIF.apply(*tensors, *running_statistics, repeat, rule, neuron, delta)
    if energies is not None:
        energies[0].copy_(energy)
    if kind.update:
        assert norm.running_mean is not None and norm.running_var is not None and norm.batches is not None
        norm.running_mean.copy_(running[0])
        norm.running_var.copy_(running[1])
        norm.batches.add_(1)
    return out, lambda: v
