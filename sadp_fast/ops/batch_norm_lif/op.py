"""BatchNorm + LIF as one differentiable operator, whose kernels batch_norm_lif_launch.py launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.equations import SMALLEST_GAIN
from .launch import Neuron, Normalisation, NormalisationKind, layer_for


class _BatchNormLIF(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        reciprocal_tau: Tensor | None,
        repeat: int | None,
        neuron: Neuron,
        kind: NormalisationKind,
        norm: Normalisation,
        want_v: bool,
        energies: tuple[Tensor, Tensor] | None,
    ):
        layer, x = layer_for(x, repeat, neuron, kind)
        constants = layer.constants(x, norm, weight, bias, reciprocal_tau)
        out, v, energy = layer.fire(x, constants, reciprocal_tau, residual, want_v, energies is not None)
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
    def backward(ctx, grad_out: Tensor | None, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused neuron has no second derivative: call backward() without create_graph=True, or set the "
                "node's backend='torch'"
            )
        if grad_out is None:
            return (None,) * 11
        x, constants, reciprocal_tau, weight, bias = ctx.saved_tensors
        energy, energies = ctx.energy, ctx.energies
        layer, wants_grad_tau = ctx.layer, ctx.needs_input_grad[4]
        if x.stride() != ctx.strides:  # a hook for saved tensors gave it back in another layout
            layer, x = layer_for(x, ctx.repeat, layer.neuron, layer.kind)
        backward, grad = layer.backward(grad_out, energies is not None, wants_grad_tau)
        grad_x, grad_weight, grad_bias, leak = backward.run(x, grad, constants, reciprocal_tau, energy, energies)
        grad_tau = None
        if wants_grad_tau:
            grad_tau = leak.sum()
            if layer.neuron.learned_gain:  # the normalised input's part; its gradients have the factor 1 / tau already
                driven = grad_weight if weight is None else grad_weight * weight + grad_bias * bias
                grad_tau += driven.sum() / reciprocal_tau.clamp(min=SMALLEST_GAIN.value)
        affine = layer.kind.affine
        return (
            grad_x,
            grad if ctx.needs_input_grad[1] else None,
            grad_weight if affine else None,
            grad_bias if affine else None,
            grad_tau,
            *([None] * 6),
        )


def batch_norm_lif(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Normalisation,
    neuron: Neuron,
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
        reciprocal_tau: 1 / tau of a neuron with ``learned_tau``, float32, 0-dim.
        repeat: T, where every step has the same x (direct coding).
        want_v: whether to write the final membrane potential in the same pass.
        energies: two float32 [N], both written in the backward pass: the squared norm of each example's output, and
            that of its gradient with respect to x with the normalisation's statistics held constant, each summed over
            time.

    Returns:
        spikes (+ residual) [T, N, C, *] in x's dtype, and what gives the final potential, float32 [N, C, *], without a
        graph; where it was not wanted, it is computed when asked for, from x.
    """
    kind = NormalisationKind.of(norm, weight is not None)
    tensors = (x, residual, weight, bias, reciprocal_tau)
    out, v, constants = _BatchNormLIF.apply(*tensors, repeat, neuron, kind, norm, want_v, energies)
    if want_v:
        return out, lambda: v
    x = x.detach()
    tau = None if reciprocal_tau is None else reciprocal_tau.detach()
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
