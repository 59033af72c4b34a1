"""Batch normalisation and a neuron behind it as one module, and one pass over memory where the kernels run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.batch_norm_lif.reference import Normalisation, gain, normalise
from ..ops.common.spike_marks import mark, max_count
from ..ops.lif.reference import GradientNormTap, squared_norm_per_example
from .neuron import BaseNode, IFNode, LIFNode, ParametricLIFNode


class CallEnergies(NamedTuple):
    """Squared norms of one call, per example and summed over its steps, float32 [N].

    ``output`` is that of the output (the number of spikes, where no residual was added), ``delta`` that of the loss
    gradient in front of the normalisation, the normalisation's statistics held constant. Both are there after the
    backward pass, and ``delta`` is NaN before.
    """

    output: Tensor
    delta: Tensor


class _BatchNormNode(BaseNode):
    """What the neurons behind a batch normalisation share; the constructor's first half is nn.BatchNorm2d's.

    Attributes:
        weight, bias, running_mean, running_var, num_batches_tracked: as those of nn.BatchNorm2d, with the same names
            in the state_dict.
        energies: with ``collect_statistics``, the ``CallEnergies`` of the last call ('m') or of each since the last
            reset ('s').
        energy_buffers: None, or two float32 [N] that the next calls' ``CallEnergies`` are written into, instead of new
            tensors.
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
        self.energies: list[CallEnergies] = []
        self.energy_buffers: tuple[Tensor, Tensor] | None = None

    def reset(self) -> None:
        """Return ``v`` to its initial float and forget ``v_seq`` and the statistics."""
        super().reset()
        self.energies = []

    def __getstate__(self) -> dict[str, Any]:
        # The buffers are their owner's, for its batches of this module: a copy sees others.
        return {**super().__getstate__(), "energy_buffers": None}

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
        surrogate = self._fused(x, residual, repeat)
        if surrogate is None:
            return self._unfused(x, residual, repeat)
        return self._run_fused(x, residual, repeat, surrogate)

    # ------------------------------------------------------------------------------------------------- fused path

    def _fused(self, x: Tensor, residual: Tensor | None, repeat: int | None) -> int | None:
        """The fused surrogate's index if one operator can do it all, None if not."""
        if self.step_mode != "m" or self.store_v_seq or x.numel() == 0:
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

    def _normalisation(self) -> Normalisation:
        return Normalisation(
            self.eps,
            self.momentum,
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            use_batch=self._uses_batch_statistics,
            update=self._updates_running_statistics,
        )

    def _run_fused(self, x: Tensor, residual: Tensor | None, repeat: int | None, surrogate: int) -> Tensor:
        from ..ops.batch_norm_lif.op import batch_norm_lif

        energies = self._new_energies(x.shape[0 if repeat is not None else 1], x.device)
        state = self._state
        # In evaluation x would otherwise be kept alive for the sake of a potential that takes half its memory or less.
        want_v = state.keeps_v or not torch.is_grad_enabled()
        out, potential = batch_norm_lif(
            x,
            residual,
            self.weight,
            self.bias,
            self._normalisation(),
            self.dynamics,
            surrogate,
            self.surrogate_function.alpha,  # type: ignore[union-attr]
            reciprocal_tau=self._reciprocal_tau(x),
            repeat=repeat,
            want_v=want_v,
            energies=energies,
        )
        state.v = potential() if want_v else potential
        return _mark_sum(out, 1, residual)

    def _new_energies(self, examples: int, device: torch.device) -> CallEnergies | None:
        if not (self.collect_statistics and torch.is_grad_enabled()):
            return None
        if self.energy_buffers is not None:
            energies = CallEnergies(*self.energy_buffers)
            if any(
                t.shape != (examples,) or t.dtype != torch.float32 or t.device != device or not t.is_contiguous()
                for t in energies
            ):
                raise ValueError(
                    f"energy_buffers must be two contiguous float32 tensors [N] on {device} with N = {examples} "
                    f"examples, got {[(t.dtype, tuple(t.shape), t.stride(), str(t.device)) for t in energies]}; set "
                    "them for this batch, or to None"
                )
        elif torch.compiler.is_compiling():
            raise RuntimeError(
                "collect_statistics under torch.compile writes into existing tensors: set energy_buffers to two "
                f"float32 tensors [N] with N = {examples} examples before"
            )
        else:
            energies = CallEnergies(*torch.full((2, examples), torch.nan, device=device))
        self.energies = [energies] if self.step_mode == "m" else [*self.energies, energies]
        return energies

    # ----------------------------------------------------------------------------------------------- unfused path

    def _unfused(self, x: Tensor, residual: Tensor | None, repeat: int | None) -> Tensor:
        """The same by torch's batch normalisation and this package's neuron: any device, dtype, state and length."""
        single = self.step_mode == "s"
        folds = not single and repeat is None
        folded, norm = x.flatten(0, 1) if folds else x, self._normalisation()
        y = normalise(folded, self.weight, self.bias, norm)
        y = y.unflatten(0, x.shape[:2]) if folds else y.unsqueeze(0)
        energies = self._new_energies(y.shape[1], x.device)
        if energies is not None:
            channel_scale = gain(folded, self.weight, norm)
            y = GradientNormTap.apply(y, energies.delta, channel_scale, self._reciprocal_tau(y), self.v)
        if single:
            y = y.squeeze(0)
        elif repeat is not None:
            y = y.expand(repeat, *x.shape)
        collect, self.collect_statistics = self.collect_statistics, False
        try:
            spikes = super().forward(y)
        finally:
            self.collect_statistics = collect
        out = spikes if residual is None else spikes + residual
        if energies is not None:
            energies.output.copy_(
                squared_norm_per_example(out.detach().unsqueeze(0) if single else out.detach()).sum(0)
            )
        return _mark_sum(out, max_count(spikes), residual)

    # ------------------------------------------------------------------------------------------------- statistics

    @property
    def spike_count(self) -> Tensor | None:
        """Not kept: see ``energies``."""
        return None

    @property
    def grad_norm_sq(self) -> Tensor | None:
        """Not kept: see ``energies``."""
        return None

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, {super().extra_repr()}"
        )


def _mark_sum(out: Tensor, count: int | None, residual: Tensor | None) -> Tensor:
    """Mark the largest value of spikes (at most ``count``) + residual, for ``packed_spikes``."""
    most = 0 if residual is None else max_count(residual)
    return out if count is None or most is None else mark(out, count + most)


class BatchNormLIF(_BatchNormNode, LIFNode):
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


class BatchNormIF(_BatchNormNode, IFNode):
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


class BatchNormParametricLIF(_BatchNormNode, ParametricLIFNode):
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
