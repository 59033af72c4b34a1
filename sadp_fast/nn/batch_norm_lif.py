"""Batch normalisation and a neuron behind it as one module, and one pass over memory where the kernels run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.common.spike_marks import mark, max_count
from ..ops.lif.reference import spike_count, squared_norm_per_example
from .lif import IFNode, LIFNode, ParametricLIFNode
from .node import BaseNode
from .recorder import Call, Energies


class BatchNormNode(BaseNode):
    """What the neurons behind a batch normalisation share; the constructor's first half is nn.BatchNorm2d's.

    Attributes:
        weight, bias, running_mean, running_var, num_batches_tracked: as those of nn.BatchNorm2d, with the same names
            in the state_dict.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def _init_batch_norm(
        self, num_features: int, eps: float, momentum: float | None, affine: bool, track_running_stats: bool
    ) -> None:
        if num_features < 1:
            raise ValueError(f"num_features must be the number of channels, at least 1, got {num_features}")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features) if track_running_stats else None)
        self.register_buffer("running_var", torch.ones(num_features) if track_running_stats else None)
        batches = torch.tensor(0, dtype=torch.int64) if track_running_stats else None
        self.register_buffer("num_batches_tracked", batches)

    @property
    def _uses_batch_statistics(self) -> bool:
        return self.training or self.running_mean is None

    @property
    def _updates_running_statistics(self) -> bool:
        return self.training and self.track_running_stats

    def _check(self, x: Tensor, residual: Tensor | None, repeat: int | None) -> None:
        channel = 1 if repeat is not None or self.step_mode == "s" else 2
        if x.ndim <= channel or x.shape[channel] != self.num_features:
            wanted = "[N, C, *]" if channel == 1 else "[T, N, C, *]"
            raise ValueError(f"x must be {wanted} with C = {self.num_features} channels, got shape {tuple(x.shape)}")
        if repeat is not None and (repeat < 1 or self.step_mode == "s"):
            raise ValueError(f"repeat must be at least 1 and needs step_mode='m', got {repeat} in '{self.step_mode}'")
        if residual is not None:
            shape = (*(() if repeat is None else (repeat,)), *x.shape)
            if residual.shape != shape:
                raise ValueError(f"residual must have the output's shape {shape}, got {tuple(residual.shape)}")
        own = next((p for p in self._parameters.values() if p is not None), self.running_mean)
        if own is not None and own.device != x.device:
            raise ValueError(f"x is on {x.device} and the layer on {own.device}; move one of them with .to()")
        per_channel = x.numel() // self.num_features
        if self._uses_batch_statistics and per_channel == 1:
            raise ValueError(
                f"statistics of the batch need more than one value per channel, got x of shape {tuple(x.shape)}"
            )

    def forward(self, x: Tensor, residual: Tensor | None = None, *, repeat: int | None = None) -> Tensor:
        """Current to spikes (+ residual), the normalisation in between.

        Args:
            x: current, [T, N, C, *] ([N, C, *] in step mode 's' or with ``repeat``).
            residual: added to the spikes; shape of the output.
            repeat: number of steps T, where x is the same at every step (direct coding): x is then read once, and its
                gradient summed over the steps as it is written.

        Returns:
            [T, N, C, *] ([N, C, *] in step mode 's'), dtype of x.

        Raises:
            ValueError: a shape is not of the kind above, x is on another device than the layer, or the batch's
                statistics are those of one value per channel.
        """
        self._check(x, residual, repeat)
        steps = (1,) if self.step_mode == "s" else () if repeat is None else (repeat,)
        call = self._begin((*steps, *x.shape), x.device)
        surrogate = self._fused(x, residual, repeat)
        by_step = call is not None and call.by_step
        if surrogate is not None and not by_step:
            return self._run_fused(x, residual, repeat, surrogate, call)
        out = self._unfused(x, residual, repeat, call)
        if surrogate is not None:
            self.detach()  # as after a fused call: what is measured changes nothing
        return out

    # ------------------------------------------------------------------------------------------------- fused path

    def _fused(self, x: Tensor, residual: Tensor | None, repeat: int | None) -> int | None:
        """The fused surrogate's index if one operator can do it all, None if not."""
        if self.step_mode != "m" or self.store_v_seq or torch.compiler.is_compiling() or x.numel() == 0:
            return None
        v = self.v
        if isinstance(v, Tensor) or v != self.dynamics.v_rest:  # goes on from an earlier call
            return None
        if residual is not None and (residual.dtype != x.dtype or residual.device != x.device):
            return None
        if not all(map(self._fits, (self.weight, self.bias, self.running_mean, self.running_var))):
            return None
        if (self.weight is None) != (self.bias is None):
            return None
        if math.prod(x.shape[2 if repeat is None else 1 :]) >= 2**31:  # the kernels count an example in 32 bits
            return None
        if self.running_mean is not None and (self.running_var is None or self.num_batches_tracked is None):
            return None
        surrogate = self._fused_surrogate(x)
        if surrogate is None:
            return None
        from ..ops.batch_norm_lif.launch import MAX_STEPS  # with Triton, which CPU users need not have

        return surrogate if (x.shape[0] if repeat is None else repeat) <= MAX_STEPS else None

    def _fits(self, t: Tensor | None) -> bool:
        """Whether this is one number a channel as the kernels read it, or nothing."""
        return t is None or (t.dtype == torch.float32 and t.shape == (self.num_features,) and t.is_contiguous())

    def _run_fused(
        self, x: Tensor, residual: Tensor | None, repeat: int | None, surrogate: int, call: Call | None
    ) -> Tensor:
        from ..ops.batch_norm_lif.launch import Neuron, Normalisation
        from ..ops.batch_norm_lif.op import batch_norm_lif

        state = self._state
        # In evaluation x would otherwise be kept alive for the sake of a potential that takes half its memory or less.
        want_v = state.keeps_v or not torch.is_grad_enabled()
        out, potential = batch_norm_lif(
            x,
            residual,
            self.weight,
            self.bias,
            Normalisation(
                self.eps,
                self.momentum,
                self.running_mean,
                self.running_var,
                self.num_batches_tracked,
                use_batch=self._uses_batch_statistics,
                update=self._updates_running_statistics,
            ),
            Neuron.of(self.dynamics, surrogate, self.surrogate_function.alpha),  # type: ignore[union-attr]
            reciprocal_tau=self._reciprocal_tau(x),
            repeat=repeat,
            want_v=want_v,
            energies=self._new_energies(call),
        )
        state.v = potential() if want_v else potential
        if call is not None and call.counts:
            fired = out if residual is None else out.detach() != residual
            call.spikes = spike_count(fired)
        return _mark_sum(out, 1, residual)

    def _new_energies(self, call: Call | None) -> Energies | None:
        """What the passes write their two energies into, where they are wanted."""
        if call is None or not call.awaits_norms or (call.by_step and not call.wants_energies):
            return None
        return call.energy_rows()

    # ----------------------------------------------------------------------------------------------- unfused path

    def _unfused(self, x: Tensor, residual: Tensor | None, repeat: int | None, call: Call | None) -> Tensor:
        """The same by torch's batch normalisation and this package's neuron: any device, dtype, state and length."""
        single = self.step_mode == "s"
        time_folded = x if single or repeat is not None else x.flatten(0, 1)
        y = self._normalise(time_folded)
        gain = None if call is None or not call.awaits_norms else self._gain(time_folded)
        energies = self._new_energies(call)
        if energies is not None:
            y = _DeltaTap.apply(y, energies.delta, gain, self._reciprocal_tau(y), self.v)
        if repeat is not None:
            y = y.expand(repeat, *y.shape)
        elif single:
            y = y.unsqueeze(0)
        else:
            y = y.unflatten(0, x.shape[:2])
        by_step = call if call is not None and call.by_step else None
        if by_step is not None:
            by_step.channel_scale = gain
        spikes = self._run(y, by_step)
        if call is not None and call.counts and by_step is None:
            call.spikes = spike_count(spikes)
        spikes = spikes.squeeze(0) if single else spikes
        out = spikes if residual is None else spikes + residual
        if energies is not None:
            energies.output.copy_(_energy(out.detach().unsqueeze(0) if single else out.detach()))
        return _mark_sum(out, max_count(spikes), residual)

    def _normalise(self, x: Tensor) -> Tensor:
        """Batch normalisation of x [M, C, *]."""
        momentum, updates = self.momentum, self._updates_running_statistics
        if updates and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        running = (self.running_mean, self.running_var) if updates or not self.training else (None, None)
        return nn.functional.batch_norm(
            x,
            *running,
            self.weight,
            self.bias,
            self._uses_batch_statistics,
            0.0 if momentum is None else momentum,
            self.eps,
        )

    def _gain(self, x: Tensor) -> Tensor:
        """gamma / sigma of each channel, as the normalisation of x [M, C, *] used it, float [C]."""
        with torch.no_grad():
            if self._uses_batch_statistics:
                variance = batch_variance(x)
            else:
                assert self.running_var is not None
                variance = self.running_var
            gain = torch.rsqrt(variance + self.eps)
            return gain if self.weight is None else gain * self.weight

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, {super().extra_repr()}"
        )


def batch_variance(x: Tensor) -> Tensor:
    """Variance of each channel of x [M, C, *], not corrected, as a normalisation takes it: float [C]."""
    values = x if x.dtype == torch.float64 else x.float()
    return values.transpose(0, 1).flatten(1).var(1, correction=0)


def _mark_sum(out: Tensor, count: int | None, residual: Tensor | None) -> Tensor:
    """Mark the largest value of spikes (at most ``count``) + residual, for ``packed_spikes``."""
    most = 0 if residual is None else max_count(residual)
    return out if count is None or most is None else mark(out, count + most)


def _energy(t: Tensor, gain: Tensor | None = None) -> Tensor:
    """Squared norm of each example of t [T, N, C, *], summed over time, float [N]."""
    return squared_norm_per_example(t, gain).sum(0)


class _DeltaTap(torch.autograd.Function):
    """Identity on y [T * N, C, *] that writes, in its backward pass, the energy of the gradient times ``gain``.

    ``others`` as in ``GradientNormTap``.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, buffer: Tensor, gain: Tensor, *others: Tensor | float | None) -> Tensor:
        ctx.buffer, ctx.gain, ctx.others = buffer, gain, len(others)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.buffer.copy_(_energy(grad.detach().unflatten(0, (-1, ctx.buffer.shape[0])), ctx.gain))
        return grad, *([None] * (2 + ctx.others))


class BatchNormLIF(BatchNormNode, LIFNode):
    """``nn.BatchNorm2d`` and a ``LIFNode`` behind it, ``out = LIF(norm(x)) (+ residual)``.

    On a GPU the forward pass reads x twice and writes the spikes, the backward pass reads x and the incoming gradient
    twice and writes the gradient of x; nothing but x is kept in between. Statistics are taken over all steps, examples
    and pixels, as SpikingJelly's ``layer.BatchNorm2d`` in step mode 'm' takes them. Under DistributedDataParallel each
    rank normalises by its own, as nn.BatchNorm2d does; a SyncBatchNorm has to stay a module of its own.

    After a fused call, ``v`` has no graph: gradients do not cross from one call to the next one.

    The fused kernels run in step mode 'm' from a state that was reset, for up to 16 steps; else, and on the CPU,
    torch's batch normalisation and the package's neuron run one after the other, with the same results.

    Args:
        num_features: channels C.
        eps, momentum, affine, track_running_stats: as of nn.BatchNorm2d.
        tau, ... backend: as of ``LIFNode``.

    Raises:
        TypeError, ValueError: an argument is not of the kind above.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "m",
        store_v_seq: bool = False,
        backend: str | None = None,
    ) -> None:
        LIFNode.__init__(
            self,
            tau,
            decay_input,
            v_threshold,
            v_reset,
            surrogate_function,
            detach_reset,
            step_mode,
            store_v_seq,
            backend,
        )
        self._init_batch_norm(num_features, eps, momentum, affine, track_running_stats)


class BatchNormIF(BatchNormNode, IFNode):
    """``BatchNormLIF`` with neurons that do not leak: ``nn.BatchNorm2d`` and an ``IFNode`` behind it."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "m",
        store_v_seq: bool = False,
        backend: str | None = None,
    ) -> None:
        IFNode.__init__(self, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq, backend)
        self._init_batch_norm(num_features, eps, momentum, affine, track_running_stats)


class BatchNormParametricLIF(BatchNormNode, ParametricLIFNode):
    """``BatchNormLIF`` whose time constant is learned: ``nn.BatchNorm2d`` and a ``ParametricLIFNode`` behind it."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "m",
        store_v_seq: bool = False,
        backend: str | None = None,
    ) -> None:
        ParametricLIFNode.__init__(
            self,
            init_tau,
            decay_input,
            v_threshold,
            v_reset,
            surrogate_function,
            detach_reset,
            step_mode,
            store_v_seq,
            backend,
        )
        self._init_batch_norm(num_features, eps, momentum, affine, track_running_stats)
