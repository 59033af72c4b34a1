"""Batch normalisation and a neuron behind it as one module, and one pass over memory where the kernels run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.batch_norm_lif.reference import Normalisation, gain, normalise
from ..ops.common.dispatch import runs_directly
from ..ops.common.spike_marks import mark, max_count
from ..ops.lif.reference import GradientNormTap, spike_count, squared_norm_per_example
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

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        step_mode: str = "m",
        **neuron: Any,
    ) -> None:
        super().__init__(step_mode=step_mode, **neuron)
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
        call = None
        if self.recorder is not None:
            steps = (1,) if self.step_mode == "s" else () if repeat is None else (repeat,)
            call = self._begin((*steps, *x.shape), x.device)
        surrogate = self._fused(x, residual, repeat)
        by_step = call is not None and call.by_step
        if surrogate is not None and not by_step:
            return self._run_fused(x, residual, repeat, surrogate, call)
        out = self._unfused(x, residual, repeat, call, wide=surrogate is not None)
        if surrogate is not None:
            self.detach()  # as after a fused call: what is measured changes nothing
        return out

    @property
    def energies(self) -> list[Energies]:
        """With ``collect_statistics``, those of each of ``calls`` that was with gradients."""
        return [call.energies for call in self.calls if call.awaits_norms]

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
        running = (self.running_mean, self.running_var, self.num_batches_tracked)
        uses = (self._uses_batch_statistics, self.training and self.track_running_stats)
        return Normalisation(self.eps, self.momentum, *running, *uses)

    def _run_fused(
        self, x: Tensor, residual: Tensor | None, repeat: int | None, surrogate: int, call: Call | None
    ) -> Tensor:
        from ..ops.batch_norm_lif.op import batch_norm_lif

        state = self._state
        # In evaluation x would otherwise be kept alive for the sake of a potential that takes half its memory or less.
        want_v = not runs_directly() or state.keeps_v or not torch.is_grad_enabled()
        neuron = (self.dynamics, surrogate, self.surrogate_function.alpha)  # type: ignore[union-attr]
        options: dict[str, Any] = {"repeat": repeat, "want_v": want_v, "energies": self._new_energies(call)}
        tensors, tau = (x, residual, self.weight, self.bias), self._reciprocal_tau(x)
        out, potential = batch_norm_lif(*tensors, self._normalisation(), *neuron, reciprocal_tau=tau, **options)
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

    def _unfused(self, x: Tensor, residual: Tensor | None, repeat: int | None, call: Call | None, wide: bool) -> Tensor:
        """The same by torch's batch normalisation and this package's neuron: any device, dtype, state and length.

        ``wide``: whether half-precision input is normalised in float32, as the fused kernels do.
        """
        single = self.step_mode == "s"
        x_seq = x.unsqueeze(0) if single else x
        folded, norm = x_seq.flatten(0, 1) if repeat is None else x, self._normalisation()
        y = normalise(folded.float() if wide else folded, self.weight, self.bias, norm)
        y = y.unflatten(0, x_seq.shape[:2]) if repeat is None else y.unsqueeze(0)
        scale = None if call is None or not call.awaits_norms else gain(folded, self.weight, norm)
        energies = self._new_energies(call)
        if energies is not None:
            y = GradientNormTap.apply(y, energies.delta, scale, self._reciprocal_tau(y), self.v)
        if repeat is not None:
            y = y.expand(repeat, *x.shape)
        by_step = call if call is not None and call.by_step else None
        if by_step is not None:
            by_step.channel_scale = scale
        spikes = self._run(y, by_step)
        if call is not None and call.counts and by_step is None:
            call.spikes = spike_count(spikes)
        count = max_count(spikes)
        spikes = spikes.to(x.dtype) if wide else spikes
        out = spikes if residual is None else spikes + residual
        if energies is not None:
            energies.output.copy_(squared_norm_per_example(out.detach()).sum(0))
        return _mark_sum(out.squeeze(0) if single else out, count, residual)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, {super().extra_repr()}"
        )


def _mark_sum(out: Tensor, count: int | None, residual: Tensor | None) -> Tensor:
    """Mark the largest value of spikes (at most ``count``) + residual, for ``packed_spikes``."""
    most = 0 if residual is None else max_count(residual)
    return out if count is None or most is None else mark(out, count + most)


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
        step_mode: as of ``LIFNode``, but 'm' if left out.
        neuron: the other arguments of ``LIFNode``, by name.

    Raises:
        TypeError, ValueError: an argument is not of the kind above.
    """


class BatchNormIF(BatchNormNode, IFNode):
    """``BatchNormLIF`` with neurons that do not leak: ``nn.BatchNorm2d`` and an ``IFNode`` behind it."""


class BatchNormParametricLIF(BatchNormNode, ParametricLIFNode):
    """``BatchNormLIF`` whose time constant is learned: ``nn.BatchNorm2d`` and a ``ParametricLIFNode`` behind it."""
