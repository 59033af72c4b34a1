"""Integrate-and-fire neurons with SpikingJelly's constructor, state rules and step modes.

Thin modules: the state and the choice of path live here, the mathematics in ``ops/equations.py`` (fused, CUDA) and
``reference/lif.py`` (plain torch: the CPU, float64, and surrogates that are not fused).
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.common.dynamics import Dynamics
from ..ops.common.spike_marks import mark
from ..ops.lif import reference as reference
from . import surrogate as surrogates

BACKENDS = (None, "triton", "torch", "cupy")
STEP_MODES = ("s", "m")


def _check_tau(name: str, tau: float) -> None:
    if not isinstance(tau, float) or not tau > 1.0:
        remedy = "write it as a float" if isinstance(tau, int) and tau > 1 else "an IFNode has no leak"
        raise ValueError(f"{name} must be a float > 1.0, got {tau!r}; {remedy}")


def _check_constant(name: str, value: Any) -> None:
    """Raises TypeError or ValueError for what this constant of the dynamics cannot be."""
    if name == "tau":
        _check_tau(name, value)
    elif name == "v_threshold" and not isinstance(value, float):
        raise TypeError(f"v_threshold must be a float, got {value!r}; 1.0 is the default")
    elif name == "v_reset" and not (value is None or isinstance(value, float)):
        raise TypeError(f"v_reset must be a float or None (soft reset), got {value!r}")
    elif name in ("decay_input", "detach_reset") and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _constant(name: str) -> Any:
    """A constant of the dynamics as an attribute that reads and writes, as SpikingJelly's do."""

    def read(node: BaseNode) -> Any:
        return getattr(node.dynamics, name)

    def write(node: BaseNode, value: Any) -> None:
        _check_constant(name, value)
        node.dynamics = replace(node.dynamics, **{name: value})

    return property(read, write)


class CallStatistics:
    """Per-example statistics of one forward call and of its backward pass, both [T, N] (T = 1 for a single step).

    The fused kernels leave partial sums [N, programs, T], which are added (in a fixed order) at every read.

    Args:
        awaits_norms: whether there may be a backward pass.
        in_buffer: whether that writes into the node's buffer for compiled calls.
    """

    __slots__ = ("_awaits_norms", "_norms", "_spikes", "in_buffer")

    def __init__(self, awaits_norms: bool, in_buffer: bool = False) -> None:
        self._awaits_norms, self.in_buffer = awaits_norms, in_buffer
        self._norms: Tensor | None = None

    def record_spikes(self, sums: Tensor) -> None:
        """Take the forward pass's counts, int32 [T, N] or partial sums [N, programs, T]."""
        self._spikes = sums

    def record_norms(self, sums: Tensor) -> None:
        """Take the backward pass's sums of squares, float32 [T, N] or partial sums [N, programs, T]."""
        self._norms = sums

    @property
    def examples(self) -> int:
        """N."""
        return self._spikes.shape[1 if self._spikes.ndim == 2 else 0]

    @property
    def spike_count(self) -> Tensor:
        """int32, known after the forward pass."""
        return _added(self._spikes)

    @property
    def has_norms(self) -> bool:
        """Whether a backward pass is known to have been; one that writes into a buffer does not say so."""
        return self._norms is not None and not self.in_buffer

    @property
    def grad_norm_sq(self) -> Tensor | None:
        """float32, NaN until the backward pass has been, None for a forward pass without gradients."""
        if self._norms is not None:
            return _added(self._norms)
        if not self._awaits_norms:
            return None
        return torch.full_like(_added(self._spikes), torch.nan, dtype=torch.float32)


def _added(sums: Tensor) -> Tensor:
    """[T, N] from itself or from partial sums [N, programs, T]."""
    if sums.ndim == 2:
        return sums
    return (sums.squeeze(1) if sums.shape[1] == 1 else sums.sum(1, dtype=sums.dtype)).t()


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class _State:
    """What calls change: not attributes of the module, which are slow to set."""

    def __init__(self, v: float) -> None:
        self.v: Any = v  # a number, a tensor, or what computes the tensor
        self.v_seq: Tensor | None = None
        self.calls: list[CallStatistics] = []
        self.keeps_v = False  # whether v has been read where it was not written


class BaseNode(nn.Module):
    """State, step modes and statistics common to the neurons.

    Attributes:
        collect_statistics: whether the passes also emit per-example statistics; off, they cost nothing.
        channel_scale: None, or float32 [C]: ``grad_norm_sq`` is then that of the gradient times this scale along the
            channel dimension (dimension 1 of one step's input). With gamma/sigma of a normalisation in front of the
            neuron, it is the norm of the gradient before that normalisation.
    """

    v_threshold = _constant("v_threshold")
    v_reset = _constant("v_reset")
    detach_reset = _constant("detach_reset")

    def __init__(
        self,
        tau: float | None,
        decay_input: bool,
        v_threshold: float,
        v_reset: float | None,
        surrogate_function: Callable[[Tensor], Tensor] | None,
        detach_reset: bool,
        step_mode: str,
        store_v_seq: bool,
        backend: str | None,
        learned_tau: bool = False,
    ) -> None:
        super().__init__()
        given = dict(decay_input=decay_input, v_threshold=v_threshold, v_reset=v_reset, detach_reset=detach_reset)
        for name, value in given.items():
            _check_constant(name, value)
        # A class would be called in forward as if it were its instance.
        if surrogate_function is not None and (
            not callable(surrogate_function) or isinstance(surrogate_function, type)
        ):
            raise TypeError(
                f"surrogate_function must be a callable such as sadp_fast.surrogate.ATan(), got "
                f"{surrogate_function!r}: pass an instance, not a name or a class"
            )
        self.dynamics = Dynamics(tau, decay_input, v_threshold, v_reset, detach_reset, learned_tau)
        self.surrogate_function = surrogates.Sigmoid() if surrogate_function is None else surrogate_function
        self._state = _State(self.dynamics.v_rest)
        self.step_mode = step_mode
        self.backend = backend
        self.store_v_seq = store_v_seq
        self.collect_statistics = False
        self.channel_scale: Tensor | None = None
        self._said_not_fused = False
        self._last_gradient_buffer: Tensor | None = None
        self.reset()

    @property
    def step_mode(self) -> str:
        """'s': forward takes one step [N, *]; 'm': all steps [T, N, *]."""
        return self._step_mode

    @step_mode.setter
    def step_mode(self, value: str) -> None:
        if value not in STEP_MODES:
            raise ValueError(f"step_mode must be 's' or 'm', got {value!r}")
        self._step_mode = value

    @property
    def backend(self) -> str | None:
        """Which path runs. None (and 'cupy', so that SpikingJelly code runs unchanged): the fused kernels wherever they
        can; 'triton': the same, and an error without a GPU; 'torch': the reference. What the kernels do not take
        (float64, input without a batch dimension, surrogates that are not fused) runs by the reference."""
        return self._backend

    @backend.setter
    def backend(self, value: str | None) -> None:
        if value not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {value!r}; None takes the fastest")
        self._backend = value

    @property
    def supported_backends(self) -> tuple[str | None, ...]:
        """The values that ``backend`` takes."""
        return BACKENDS

    @property
    def store_v_seq(self) -> bool:
        """Whether ``v_seq`` is kept."""
        return self._store_v_seq

    @store_v_seq.setter
    def store_v_seq(self, value: bool) -> None:
        self._store_v_seq = value
        self._state.v_seq = None

    # ------------------------------------------------------------------------------------------------------ state

    @property
    def v(self) -> Tensor | float:
        """Membrane potential: a float until the first forward pass, then a tensor [N, *] (float32, or float64 for
        float64 input) that keeps its graph, so that gradients cross calls until ``reset()`` or ``detach()``.

        A fused multi-step call that records gradients does not write it: it is computed when it is first read. A node
        whose potential has been read that way once (by its next call too) writes it in every call from then on.
        """
        state = self._state
        if type(state.v) is not float and not isinstance(state.v, (Tensor, float, int)):
            state.v, state.keeps_v = state.v(), True
        return state.v

    @v.setter
    def v(self, value: Tensor | float) -> None:
        if not isinstance(value, (Tensor, Real)):
            raise TypeError(f"v must be a number or a tensor of the shape of one step, got {value!r}; or call reset()")
        self._state.v = value if isinstance(value, Tensor) else float(value)

    @property
    def v_seq(self) -> Tensor | None:
        """With ``store_v_seq``, the potential after every step since the last reset ('s') or of the last call ('m'):
        [T, N, *]. Otherwise None."""
        return self._state.v_seq

    @v_seq.setter
    def v_seq(self, value: Tensor | None) -> None:
        self._state.v_seq = value

    @property
    def calls(self) -> list[CallStatistics]:
        """Statistics of the last call ('m') or of every call since the last reset ('s')."""
        return self._state.calls

    def __getstate__(self) -> dict[str, Any]:
        self.v  # noqa: B018  computed now: what computes it cannot be copied
        return self.__dict__

    def reset(self) -> None:
        """Return ``v`` to its initial float and forget ``v_seq`` and the statistics."""
        state = self._state
        state.v, state.v_seq, state.calls = self.dynamics.v_rest, None, []

    def detach(self) -> None:
        """Cut the graph behind ``v`` and ``v_seq`` (truncated back-propagation through time)."""
        if isinstance(self.v, Tensor):
            self.v = self.v.detach()
        if self.v_seq is not None:
            self.v_seq = self.v_seq.detach()

    def _replicate_for_data_parallel(self) -> BaseNode:
        replica = super()._replicate_for_data_parallel()
        replica._state = copy.copy(self._state)  # each has its own part of the batch
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BaseNode:
        if isinstance(self.v, Tensor):
            self.v = fn(self.v)
        if self.v_seq is not None:
            self.v_seq = fn(self.v_seq)
        return super()._apply(fn, recurse)

    def _initial_v(self, x_seq: Tensor) -> Tensor | float:
        """``v`` fit for input x_seq [T, N, *]: a new shape starts from rest, dtype and device are cast."""
        v = self.v
        if type(v) is float:
            return v
        if not isinstance(v, Tensor):
            return float(v)
        if v.shape != x_seq.shape[1:]:
            return self.dynamics.v_rest
        if not torch.compiler.is_compiling() and v.is_inference() and not torch.is_inference_mode_enabled():
            v = v.clone()  # left by a call in inference mode: autograd cannot keep it
        return v.to(device=x_seq.device, dtype=reference.state_dtype(x_seq.dtype))

    # ------------------------------------------------------------------------------------------------- statistics

    def _joined(self, values: list[Tensor]) -> Tensor | None:
        if not values:
            return None
        return values[0] if len(values) == 1 else torch.cat(values)

    @property
    def spike_count(self) -> Tensor | None:
        """Spikes of each example at each step, int32 [T, N], of the last call ('m') or since the last reset ('s')."""
        return self._joined([call.spike_count for call in self.calls])

    @property
    def grad_norm_sq(self) -> Tensor | None:
        """Squared L2 norm of the loss gradient with respect to each example's input current, float32 [T, N].

        The same steps as ``spike_count``; NaN where the backward pass has not come by yet, None where there is none.
        """
        norms = [call.grad_norm_sq for call in self.calls]
        return None if any(n is None for n in norms) else self._joined([n for n in norms if n is not None])

    def _gradient_buffer(self, x_seq: Tensor) -> Tensor | None:
        """NaN [T, N] for the backward pass to write into."""
        if not (self.collect_statistics and torch.is_grad_enabled()):
            return None
        if not torch.compiler.is_compiling():
            self._last_gradient_buffer = torch.full(x_seq.shape[:2], torch.nan, device=x_seq.device)
        elif not self._has_buffer_for(x_seq):
            # A compiled graph can only write, in its backward, into a tensor that exists before it runs.
            raise RuntimeError(
                "collect_statistics under torch.compile writes into an existing buffer: run one forward pass with "
                f"this [T, N] = {tuple(x_seq.shape[:2])} uncompiled first"
            )
        elif self._step_mode == "s" and any(call.in_buffer for call in self._state.calls):
            raise RuntimeError(
                "collect_statistics under torch.compile has one buffer, which an earlier call since the last reset "
                "writes its gradient norms into: take all steps in one call (step_mode='m'), or run uncompiled"
            )
        return self._last_gradient_buffer

    def _has_buffer_for(self, x_seq: Tensor) -> bool:
        buffer = self._last_gradient_buffer
        return buffer is not None and buffer.shape == x_seq.shape[:2] and buffer.device == x_seq.device

    # ---------------------------------------------------------------------------------------------------- forward

    def _fused_surrogate(self, x: Tensor) -> int | None:
        """The fused surrogate's index if the kernels run for x, None if the reference does."""
        if self._backend == "torch":
            return None
        runs_kernels = x.is_cuda or (self._backend == "triton" and _interpreting())
        if self._backend == "triton" and not runs_kernels:
            raise RuntimeError(
                "backend='triton' needs a CUDA tensor, got one on the CPU; use backend=None for the plain torch path"
            )
        if not runs_kernels or x.ndim < 2 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return None
        if torch.jit.is_tracing():  # sizes are tensors then
            return None
        surrogate = self.surrogate_function
        index = surrogates.fused_index(surrogate)
        if index is None and not self._said_not_fused:
            self._said_not_fused = True
            warnings.warn(
                f"the surrogate {type(surrogate).__name__} is not fused: this neuron runs step by step "
                f"in plain torch; fused are {', '.join(c.__name__ for c in surrogates.FUSED)}",
                stacklevel=3,
            )
        return index

    def _run(self, x_seq: Tensor) -> Tensor:
        """All steps of x_seq [T, N, *]; updates the state and the statistics."""
        if self.collect_statistics and x_seq.ndim < 2:
            raise ValueError(f"collect_statistics needs a batch dimension, got input of shape {tuple(x_seq.shape)}")
        v = self._initial_v(x_seq)
        fused = self._fused_surrogate(x_seq)
        if fused is None:
            spikes, v_seq, statistics = self._run_reference(x_seq, v)
            binary = surrogates.fused_index(self.surrogate_function) is not None
        else:
            spikes, v_seq, statistics = self._run_kernels(x_seq, v, fused)
            binary = True
        state = self._state
        if statistics is not None:
            earlier_calls = state.calls if self._step_mode == "s" else []
            if earlier_calls and earlier_calls[-1].examples != statistics.examples:
                earlier_calls = []  # another batch: v and v_seq start anew, too
            state.calls = [*earlier_calls, statistics]
        if v_seq is not None:
            earlier = state.v_seq if self._step_mode == "s" else None
            grows = earlier is not None and (earlier.shape[1:], earlier.dtype, earlier.device) == (
                v_seq.shape[1:],
                v_seq.dtype,
                v_seq.device,
            )
            state.v_seq = torch.cat((earlier, v_seq)) if grows else v_seq  # type: ignore[arg-type]
        return mark(spikes, 1) if binary else spikes

    def _reciprocal_tau(self, x: Tensor) -> Tensor | None:
        """1 / tau for input x where it is learned: 0-dim, in the dtype of the state."""
        return None

    def _run_reference(self, x_seq: Tensor, v: Tensor | float) -> tuple[Tensor, Tensor | None, CallStatistics | None]:
        """Spikes, v_seq and statistics by plain torch; sets the potential."""
        if not isinstance(v, Tensor):
            v = torch.full_like(x_seq[0], v, dtype=reference.state_dtype(x_seq.dtype), requires_grad=False)
        norms, reciprocal_tau = self._gradient_buffer(x_seq), self._reciprocal_tau(x_seq)
        if norms is not None:
            x_seq = reference.GradientNormTap.apply(x_seq, norms, self.channel_scale, reciprocal_tau, v)
        spikes, self._state.v, v_seq = reference.multi_step(
            x_seq, v, self.dynamics, self.surrogate_function, self._store_v_seq, reciprocal_tau
        )
        if not self.collect_statistics:
            return spikes, v_seq, None
        return spikes, v_seq, self._statistics(reference.spike_count(spikes), norms)

    def _statistics(self, spike_count: Tensor, norms: Tensor | None) -> CallStatistics:
        statistics = CallStatistics(norms is not None, in_buffer=norms is not None)
        statistics.record_spikes(spike_count)
        if norms is not None:
            statistics.record_norms(norms)
        return statistics

    def _run_kernels(
        self, x_seq: Tensor, v: Tensor | float, surrogate: int
    ) -> tuple[Tensor, Tensor | None, CallStatistics | None]:
        """Spikes, v_seq and statistics by the fused kernels; sets the potential."""
        from ..ops.lif import op as ops  # Triton is imported where it is used, so that CPU users need no Triton

        alpha = self.surrogate_function.alpha  # type: ignore[union-attr]
        counts, reciprocal_tau = self.collect_statistics, self._reciprocal_tau(x_seq)
        if not ops.runs_directly():
            norms = self._gradient_buffer(x_seq)
            spikes, self._state.v, v_seq, count = ops.lif(
                x_seq,
                v,
                self.dynamics,
                surrogate,
                alpha,
                reciprocal_tau=reciprocal_tau,
                store_v_seq=self._store_v_seq,
                count_spikes=counts,
                grad_norm_sq=norms,
                channel_scale=self.channel_scale,
            )
            return spikes, v_seq, None if count is None else self._statistics(count, norms)
        ops.check(x_seq, v, reciprocal_tau, self.dynamics, self.channel_scale)
        statistics = record_norms = None
        if counts:
            statistics = CallStatistics(torch.is_grad_enabled())
            if torch.is_grad_enabled():
                record_norms = statistics.record_norms
                if not self._has_buffer_for(x_seq):  # for later calls under torch.compile
                    self._gradient_buffer(x_seq)
        spikes, self._state.v, v_seq, count = ops.multi_step(
            x_seq,
            v,
            reciprocal_tau,
            self.dynamics,
            surrogate,
            alpha,
            self._store_v_seq,
            counts,
            record_norms,
            self.channel_scale,
            defer_v=not self._state.keeps_v,
        )
        if statistics is not None and count is not None:
            statistics.record_spikes(count)
        return spikes, v_seq, statistics

    def forward(self, x: Tensor) -> Tensor:
        """Input current to spikes, same shape and dtype: [N, *] in step mode 's', [T, N, *] in 'm'.

        Raises:
            ValueError: the input has no step, or statistics are on and it has no batch dimension.
        """
        if self._step_mode == "s":
            return self._run(x.unsqueeze(0)).squeeze(0)
        if x.ndim == 0 or x.shape[0] == 0:
            raise ValueError(f"step_mode='m' needs input [T, N, *] with T >= 1, got shape {tuple(x.shape)}")
        return self._run(x)

    def extra_repr(self) -> str:
        d = self.dynamics
        return (
            f"v_threshold={d.v_threshold}, v_reset={d.v_reset}, detach_reset={d.detach_reset}, "
            f"step_mode={self.step_mode}, backend={self.backend}"
        )


class LIFNode(BaseNode):
    """Leaky integrate-and-fire neurons, a drop-in for SpikingJelly's ``LIFNode``.

    Charge, with r = v_reset (0 for None): ``h = v + (x - (v - r)) / tau`` if decay_input, else
    ``h = v - (v - r) / tau + x``. Fire: ``s = (h >= v_threshold)``. Reset: to r, or by subtraction for v_reset=None.

    Args:
        tau: membrane time constant in steps, a float > 1.
        decay_input: whether the input is divided by tau.
        v_threshold: threshold.
        v_reset: potential after a spike, or None for a soft reset.
        surrogate_function: maps h - v_threshold to spikes with a gradient; None means ``Sigmoid(alpha=4)``. Those of
            ``sadp_fast.surrogate`` and SpikingJelly's of the same names run fused, any other callable in plain torch.
        detach_reset: leave the reset out of the backward pass.
        step_mode: 's' (one step a call) or 'm' (all steps in one call).
        store_v_seq: keep the membrane potential of every step in ``v_seq``.
        backend: see ``BaseNode.backend``.

    Raises:
        TypeError, ValueError: an argument is not of the kind above.
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
        backend: str | None = None,
    ) -> None:
        _check_tau("tau", tau)
        super().__init__(
            tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq, backend
        )

    tau = _constant("tau")
    decay_input = _constant("decay_input")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tau={self.tau}, decay_input={self.decay_input}"


class IFNode(BaseNode):
    """Integrate-and-fire neurons without leak, a drop-in for SpikingJelly's ``IFNode``: ``h = v + x``.

    Arguments, state and errors are those of ``LIFNode``.
    """

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            None, False, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq, backend
        )


class ParametricLIFNode(BaseNode):
    """``LIFNode`` whose time constant is learned, a drop-in for SpikingJelly's ``ParametricLIFNode`` (PLIF).

    1 / tau = sigmoid(w), with one parameter w for the layer (Fang et al., arXiv 2007.05785); the equations are those of
    ``LIFNode`` with a product by 1 / tau in the place of the quotient.

    Args:
        init_tau: initial membrane time constant in steps, a finite float > 1; w = -log(init_tau - 1).
        decay_input, ... backend: as of ``LIFNode``.

    Attributes:
        w: parameter, 0-dim, of torch's default dtype when the neuron is made; the only entry of the state_dict.

    Raises:
        TypeError, ValueError: an argument is not of the kind above.
    """

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
        backend: str | None = None,
    ) -> None:
        _check_tau("init_tau", init_tau)
        if math.isinf(init_tau):
            raise ValueError("init_tau must be finite, got inf, from which w could never move; an IFNode has no leak")
        super().__init__(
            init_tau,
            decay_input,
            v_threshold,
            v_reset,
            surrogate_function,
            detach_reset,
            step_mode,
            store_v_seq,
            backend,
            learned_tau=True,
        )
        self.w = nn.Parameter(torch.tensor(-math.log(init_tau - 1.0)))

    decay_input = _constant("decay_input")

    def _reciprocal_tau(self, x: Tensor) -> Tensor:
        return self.w.to(reference.state_dtype(x.dtype)).sigmoid()

    def extra_repr(self) -> str:
        tau = "" if self.w.is_meta else f"{(1 + (-self.w.detach().double()).exp()).item():.4g} "
        return f"{super().extra_repr()}, tau={tau}(learned), decay_input={self.decay_input}"


def reset(module: nn.Module) -> None:
    """Call ``reset()`` of every neuron of this package in ``module``; what else keeps a state is left alone."""
    for child in module.modules():
        if isinstance(child, BaseNode):
            child.reset()


def neurons(module: nn.Module) -> dict[str, BaseNode]:
    """The neurons of this package in ``module``, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, BaseNode)}
