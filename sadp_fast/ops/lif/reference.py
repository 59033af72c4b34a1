"""Multi-step integrate-and-fire in plain torch, written to be read.

The equations are SpikingJelly's (charge, fire, reset), in the same order of operations, so that float32 results agree
with it bit for bit. Any device, any floating dtype: float16 and bfloat16 inputs are computed with a float32 membrane
potential (our choice: half-precision state flips spikes), float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.dynamics import Dynamics


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the membrane potential for an input of ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def charge(x: Tensor, v: Tensor, dynamics: Dynamics, reciprocal_tau: Tensor | None = None) -> Tensor:
    """Membrane potential before firing, h[t], from the input current x[t] and v[t-1]."""
    if dynamics.tau is None:
        return v + x
    leak = v if dynamics.v_rest == 0.0 else v - dynamics.v_rest
    decayed = x - leak if dynamics.decay_input else leak
    decayed = decayed / dynamics.tau if reciprocal_tau is None else decayed * reciprocal_tau
    return v + decayed if dynamics.decay_input else v - decayed + x


def reset(h: Tensor, spike: Tensor, dynamics: Dynamics) -> Tensor:
    """Membrane potential after firing, v[t]."""
    if dynamics.detach_reset:
        spike = spike.detach()
    if dynamics.v_reset is None:
        return h - spike * dynamics.v_threshold
    kept = (1.0 - spike) * h
    return kept if dynamics.v_reset == 0.0 else kept + spike * dynamics.v_reset


def multi_step(
    x_seq: Tensor,
    v: Tensor,
    dynamics: Dynamics,
    surrogate: Callable[[Tensor], Tensor],
    store_v_seq: bool = False,
    reciprocal_tau: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run T steps.

    Args:
        x_seq: input current, [T, N, *].
        v: initial membrane potential, [N, *], of ``state_dtype(x_seq.dtype)``.
        surrogate: maps h - v_threshold to spikes, differentiable.
        store_v_seq: whether to return the membrane potential of every step.
        reciprocal_tau: 1 / tau of ``dynamics.learned_tau``, 0-dim, differentiable.

    Returns:
        spikes [T, N, *] in x_seq's dtype (v's, where x_seq holds integers), final v [N, *], and v_seq [T, N, *] or
        None, both in v's dtype.

    Raises:
        ValueError: reciprocal_tau is missing, or given without ``dynamics.learned_tau``.
    """
    dynamics.check_reciprocal_tau(reciprocal_tau is not None)
    dtype = x_seq.dtype if x_seq.is_floating_point() else v.dtype
    spikes, potentials = [], []
    for x in x_seq.unbind(0):
        h = charge(x.to(v.dtype), v, dynamics, reciprocal_tau)
        spike = surrogate(h - dynamics.v_threshold)
        v = reset(h, spike, dynamics)
        spikes.append(spike.to(dtype))
        if store_v_seq:
            potentials.append(v)
    return torch.stack(spikes), v, torch.stack(potentials) if store_v_seq else None


def squared_norm_per_example(g: Tensor, channel_scale: Tensor | None = None) -> Tensor:
    """Squared L2 norm over all but the first two dimensions: [T, N, *] -> float [T, N].

    ``channel_scale`` [C] multiplies ``g`` [T, N, C, *] along dimension 2 first.
    """
    dtype = state_dtype(g.dtype)
    inner = 2 if channel_scale is None else 3
    norm = torch.linalg.vector_norm(g, dim=tuple(range(inner, g.ndim)), dtype=dtype) if g.ndim > inner else g.to(dtype)
    if channel_scale is None:
        return norm.square()
    return (norm * channel_scale).square().sum(-1)


def spike_count(spikes: Tensor) -> Tensor:
    """Spikes of each example at each step: [T, N, *] -> int32 [T, N]."""
    inner = tuple(range(2, spikes.ndim))
    return (spikes.detach() != 0).sum(dim=inner, dtype=torch.int32) if inner else (spikes.detach() != 0).int()


class GradientNormTap(torch.autograd.Function):
    """Identity whose backward writes ``squared_norm_per_example`` of the gradient into ``buffer`` [T, N].

    A ``buffer`` [N] gets their sums over time. ``others`` go into what comes behind it, beside x (parameters, initial
    states), or are no tensors: if one of them wants a gradient there is a backward pass, also where x wants none.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, buffer: Tensor, channel_scale: Tensor | None, *others: Tensor | float | None
    ) -> Tensor:
        ctx.buffer, ctx.channel_scale, ctx.others = buffer, channel_scale, len(others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        norms = squared_norm_per_example(grad.detach(), ctx.channel_scale)  # it may have a graph of its own
        ctx.buffer.copy_(norms if ctx.buffer.ndim == 2 else norms.sum(0))
        return grad, *([None] * (2 + ctx.others))
