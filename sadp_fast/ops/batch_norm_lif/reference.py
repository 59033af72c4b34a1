"""Batch normalisation, multi-step integrate-and-fire and a residual sum in plain torch, written to be read.

Any device, any floating dtype. The normalisation is torch's, the neuron that of ``ops/lif/reference.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.dynamics import Dynamics
from ..lif.reference import GradientNormTap, multi_step, squared_norm_per_example, state_dtype


class Normalisation(NamedTuple):
    """What a batch normalisation is made of, beside its weight and bias.

    Attributes:
        eps: added to the variance.
        momentum: weight of a batch in the running statistics, None for their plain mean.
        running_mean, running_var: float32 [C], updated in place by a training pass; both None: not kept.
        batches: int64, 0-dim, counts the training passes; there if the running statistics are.
        use_batch: whether x is normalised by its own statistics, else by the running ones.
        update: whether this pass updates the running statistics.
    """

    eps: float
    momentum: float | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None
    use_batch: bool
    update: bool


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Normalisation) -> Tensor:
    """Batch normalisation of x [M, C, *]; updates the running statistics as nn.BatchNorm2d does."""
    momentum = norm.momentum
    if norm.update and norm.batches is not None:
        norm.batches.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.batches)
    running = (norm.running_mean, norm.running_var) if norm.update or not norm.use_batch else (None, None)
    momentum = 0.0 if momentum is None else momentum
    if x.shape[0] == 1 and x.device.type == "cpu":
        # torch 2.13's gradients are wrong for the strides that unsqueeze(0) gives one channels-last image (findings/).
        x = x.as_strided(x.shape, (x.numel(), *x.stride()[1:]))
    return torch.nn.functional.batch_norm(x, *running, weight, bias, norm.use_batch, momentum, norm.eps)


def batch_variance(x: Tensor) -> Tensor:
    """Variance of each channel of x [M, C, *], not corrected, as a normalisation takes it: float [C]."""
    values = x if x.dtype == torch.float64 else x.float()
    return values.transpose(0, 1).flatten(1).var(1, correction=0)


@torch.no_grad()
def gain(x: Tensor, weight: Tensor | None, norm: Normalisation) -> Tensor:
    """gamma / sigma of each channel, as the normalisation of x [M, C, *] uses it: float [C]."""
    variance = batch_variance(x) if norm.use_batch else norm.running_var
    assert variance is not None
    inverse_sigma = torch.rsqrt(variance + norm.eps)
    return inverse_sigma if weight is None else inverse_sigma * weight


def batch_norm_lif(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Normalisation,
    dynamics: Dynamics,
    surrogate: Callable[[Tensor], Tensor],
    *,
    reciprocal_tau: Tensor | None = None,
    repeat: int | None = None,
    energies: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``ops/batch_norm_lif/op.py``'s operator, which says what the arguments are.

    Args:
        surrogate: maps h - v_threshold to spikes, differentiable.

    Returns:
        spikes (+ residual) [T, N, C, *] in x's dtype, and the final potential [N, C, *] with its graph.
    """
    folded = x.flatten(0, 1) if repeat is None else x
    channel_scale = None if energies is None else gain(folded, weight, norm)
    y = normalise(folded, weight, bias, norm)
    y = y.unflatten(0, x.shape[:2]) if repeat is None else y.unsqueeze(0)
    if energies is not None:  # of what is summed over repeated steps
        y = GradientNormTap.apply(y, energies[1], channel_scale, reciprocal_tau)
    if repeat is not None:
        y = y.expand(repeat, *x.shape)
    v = torch.full_like(y[0], dynamics.v_rest, dtype=state_dtype(y.dtype), requires_grad=False)
    spikes, v, _ = multi_step(y, v, dynamics, surrogate, reciprocal_tau=reciprocal_tau)
    out = spikes if residual is None else spikes + residual
    if energies is not None:
        energies[0].copy_(squared_norm_per_example(out.detach()).sum(0))
    return out, v
