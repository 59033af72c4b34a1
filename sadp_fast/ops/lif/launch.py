"""Launching the LIF kernels.

Reading order: a neuron's numbers, plans (a pass in one configuration, for one shape, layout and neuron),
``run_forward`` and ``run_backward`` (a pass by the plan that is kept for it).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common.autotune import Choices
from ..common.dynamics import Dynamics
from ..common.equations import (
    LEAK,
    LEAK_WITH_INPUT_DECAY,
    LEARNED_RECIPROCAL,
    NO_LEAK,
    POWER_OF_TWO,
    TIME_CONSTANT,
    Kind,
)
from ..common.launch import Launch
from ..common.layout import (
    Sequence,
    has_strides,
    inner_is_dense,
    laid_out,
    v_like,
    v_strides,
    with_dense_inner,
    with_inner_order_of,
)
from ..common.prepared import Prepared, keep, kept
from .configuration import BackwardHow, Configuration, ForwardHow, Grid, Has, Stores, Wanted, candidates
from .kernels import lif_backward_kernel, lif_forward_kernel


class Constants(NamedTuple):
    """A neuron's numbers in the order of the operators' schema; tau is 1 where it is learned."""

    v_init: float
    tau: float
    leak: bool
    decay_input: bool
    v_threshold: float
    v_rest: float
    soft_reset: bool

    def kind(self, learned_tau: bool) -> Kind:
        """What kernels are compiled for; a backward pass adds its own."""
        if learned_tau:
            tau = LEARNED_RECIPROCAL
        else:
            tau = POWER_OF_TWO if math.frexp(self.tau)[0] == 0.5 else TIME_CONSTANT
        dynamics = NO_LEAK if not self.leak else LEAK_WITH_INPUT_DECAY if self.decay_input else LEAK
        return Kind(dynamics.value, tau.value, self.soft_reset, rest_at_zero=self.v_rest == 0.0)

    @classmethod
    def of(cls, dynamics: Dynamics, v_init: float) -> Constants:
        d = dynamics
        tau = 1.0 if d.constant_tau is None else d.constant_tau
        return cls(v_init, tau, d.tau is not None, d.decay_input, d.v_threshold, d.v_rest, d.v_reset is None)


constants_of = functools.lru_cache(Constants.of)

# ------------------------------------------------------------------------------------------------------------- plans


class _ForwardPlan:
    """A forward pass prepared for one shape, layout, dtype and neuron."""

    def __init__(
        self, configuration: Configuration, x: Tensor, neuron: Constants, has: tuple[bool, bool], stores: Stores
    ) -> None:
        grid = Grid.of(x, configuration)
        cut, self.stores, self.sequence, self.v_strides = grid.cut, stores, Sequence(x), v_strides(x)
        self.checkpoints = (triton.cdiv(cut.steps, cut.chunk) - 1, *x.shape[1:]) if stores.checkpoints else None
        self.partials = grid.partials
        self.launch = None
        if x.numel() > 0:
            how = ForwardHow(cut, neuron.kind(has[1]), Has(*has), stores)
            sizes = (grid.size, grid.blocks, grid.examples, *x.stride()[:2])
            numbers = (*sizes, neuron.v_init, neuron.tau, neuron.v_threshold, neuron.v_rest)
            constants = {"HOW": how, **grid.options}
            self.launch = Launch(lif_forward_kernel, x.device, grid.programs, numbers, constants)

    def run(self, x: Tensor, v_init: Tensor | None, reciprocal_tau: Tensor | None) -> tuple[Tensor | None, ...]:
        stores, sequence = self.stores, self.sequence
        if v_init is not None:
            v_init = laid_out(v_init, self.v_strides)
        spikes = sequence.empty(x, x.dtype) if stores.spikes else None
        v = v_like(x) if stores.v else None
        v_seq = sequence.empty(x, torch.float32) if stores.v_seq else None
        checkpoints = None
        if self.checkpoints is not None:
            checkpoints = x.new_empty_strided(self.checkpoints, sequence.strides, dtype=torch.float32)
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
        grid = Grid.of(x, configuration, sums=wanted.norms)
        self.sequence, self.v_strides = Sequence(x), v_strides(x)
        self.wants_grad_v_init = wanted.grad_v_init
        self.partials = grid.partials if wanted.norms else None
        self.programs = grid.programs if wanted.grad_tau else None
        self.launch = None
        if x.numel() > 0:
            given, (detach_reset, surrogate, alpha) = Has(*has), options
            kind = neuron.kind(given.reciprocal_tau)._replace(detach_reset=detach_reset, surrogate=surrogate)
            channels = (x.shape[2], x.stride(2)) if given.channel_scale else (1, 1)
            sizes = (grid.size, grid.blocks, grid.examples, *channels, *x.stride()[:2], *grad_spikes.stride()[:2])
            numbers = (*sizes, neuron.v_init, neuron.tau, neuron.v_threshold, neuron.v_rest, alpha)
            constants = {"HOW": BackwardHow(grid.cut, kind, given, wanted), **grid.options}
            self.launch = Launch(lif_backward_kernel, x.device, grid.programs, numbers, constants)

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
        channel_scale = laid_out(channel_scale, (1,))
        # What was saved with x fits its layout, unless a hook gave x back in another one.
        checkpoints, grad_v_seq = (laid_out(t, self.sequence.strides) for t in (checkpoints, grad_v_seq))
        grad_x = self.sequence.empty(x, x.dtype)
        grad_v_init = v_like(x) if self.wants_grad_v_init else None
        norms = None if self.partials is None else x.new_empty(self.partials, dtype=torch.float32)
        grad_tau = None if self.programs is None else x.new_empty(self.programs, dtype=torch.float32)
        if self.launch is not None:
            given = (v_init, reciprocal_tau, checkpoints, grad_spikes, grad_v, grad_v_seq, channel_scale)
            tensors = (*given, grad_x, grad_v_init, norms, grad_tau)
            self.launch(x, *[x if t is None else t for t in tensors])
        return grad_x, grad_v_init, norms, grad_tau


# ------------------------------------------------------------------------------------------------------------- passes

_forward_plans: dict[tuple, Prepared[Configuration] | None] = kept()
_backward_plans: dict[tuple, Prepared[Configuration] | None] = kept()

_CHOICES: dict[str, Choices[Configuration]] = {name: Choices(f"LIF {name}") for name in ("forward", "backward")}


def run_forward(
    x: Tensor, v_init: Tensor | None, reciprocal_tau: Tensor | None, neuron: Constants, stores: Stores
) -> tuple[Tensor | None, ...]:
    """spikes, final v, v_seq, checkpoints and partial spike counts [N, blocks, T]; None for what is not stored."""
    has = (v_init is not None, reciprocal_tau is not None)
    key = (x.shape, x.stride(), x.dtype, x.device, neuron, has, stores)
    try:
        plan = _forward_plans[key]
    except KeyError:
        plan = None
        if inner_is_dense(x):
            plan = Prepared(
                _CHOICES["forward"],
                key,
                lambda x: candidates(x, "forward"),
                lambda config, x, *_: _ForwardPlan(config, x, neuron, has, stores),
            )
        keep(_forward_plans, key, plan)
    if plan is None:
        return run_forward(x.contiguous(), v_init, reciprocal_tau, neuron, stores)
    return plan.run(x, v_init, reciprocal_tau)


def run_backward(
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
    layouts = (x.shape, x.stride(), x.dtype, gs.stride(), gs.dtype, x.device)
    key = (layouts, neuron, options, has, wanted)
    others = (grad_v, grad_v_seq, channel_scale)
    try:
        plan = _backward_plans[key]
    except KeyError:
        plan = None
        if inner_is_dense(x) and has_strides(gs, x.stride(), 2):
            plan = Prepared(
                _CHOICES["backward"],
                key,
                lambda x: candidates(x, "backward"),
                lambda configuration, x, *given: _BackwardPlan(
                    configuration, x, given[3], neuron, options, has, wanted
                ),
            )
        keep(_backward_plans, key, plan)
    if plan is None:
        x = with_dense_inner(x)
        gs = with_inner_order_of(x, gs)
        return run_backward(x, v_init, reciprocal_tau, checkpoints, gs, *others, neuron, options, wanted)
    return plan.run(x, v_init, reciprocal_tau, checkpoints, gs, *others)


def add_partials(partials: Tensor) -> Tensor:
    """[N, blocks, T] -> [T, N], contiguous, in a fixed order."""
    sums = partials.squeeze(1) if partials.shape[1] == 1 else partials.sum(1, dtype=partials.dtype)
    return sums.t().contiguous()
