"""What SpikingJelly's neurons have in common: state, step modes, and which path a call takes.

The mathematics is in ``ops/common/equations.py`` (fused, CUDA) and ``ops/lif/reference.py`` (plain torch: the CPU,
float64, and surrogates that are not fused); what is measured, in ``recorder.py``.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.common.dispatch import runs_directly
from ..ops.common.dtypes import KERNEL_DTYPES
from ..ops.common.dynamics import Dynamics
from ..ops.common.spike_marks import mark
from ..ops.lif import reference as reference
from . import surrogate as surrogates
from .recorder import Call, CallRecorder, Recorder, hand_in, recorders_of, take_back

BACKENDS = (None, "triton", "torch", "cupy")
STEP_MODES = ("s", "m")


def check_tau(name: str, tau: float) -> None:
    if not isinstance(tau, float) or not tau > 1.0:
        remedy = "write it as a float" if isinstance(tau, int) and tau > 1 else "an IFNode has no leak"
        raise ValueError(f"{name} must be a float > 1.0, got {tau!r}; {remedy}")


def _check_constant(name: str, value: Any) -> None:
    """Raises TypeError or ValueError for what this constant of the dynamics cannot be."""
    if name == "tau":
        check_tau(name, value)
    elif name == "v_threshold" and not isinstance(value, float):
        raise TypeError(f"v_threshold must be a float, got {value!r}; 1.0 is the default")
    elif name == "v_reset" and not (value is None or isinstance(value, float)):
        raise TypeError(f"v_reset must be a float or None (soft reset), got {value!r}")
    elif name in ("decay_input", "detach_reset") and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def constant(name: str) -> Any:
    """A constant of the dynamics as an attribute that reads and writes, as SpikingJelly's do."""

    def read(node: BaseNode) -> Any:
        return getattr(node.dynamics, name)

    def write(node: BaseNode, value: Any) -> None:
        _check_constant(name, value)
        node.dynamics = replace(node.dynamics, **{name: value})

    return property(read, write)


def _kind(v_seq: Tensor) -> tuple[Any, ...]:
    return v_seq.shape[1:], v_seq.dtype, v_seq.device


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class _State:
    """What calls change: not attributes of the module, which are slow to set."""

    def __init__(self, v: float) -> None:
        self.v: Any = v  # a number, a tensor, or what computes the tensor
        self.v_seq: Tensor | None = None
        self.keeps_v = False  # whether v has been read where it was not written


class _OwnRecorder(CallRecorder):
    """That of ``collect_statistics``, which a reset of the node empties."""

    def reset(self) -> None:
        self.calls = []


def _gone(name: str, instead: str) -> Any:
    """An attribute that is no longer set, and says so."""

    def refuse(node: BaseNode, _value: Any) -> None:
        raise AttributeError(f"{type(node).__name__}.{name} is gone: {instead}")

    return property(None, refuse)


class BaseNode(nn.Module):
    """State, step modes and the slot for a recorder, common to the neurons.

    Attributes:
        recorder: None, or what measures the calls (``sadp_fast.record``, or ``recorder.hand_in``).
    """

    v_threshold = constant("v_threshold")
    v_reset = constant("v_reset")
    detach_reset = constant("detach_reset")
    energy_buffers = _gone("energy_buffers", "a recorder hands rows in by call.write_energies_into(output, delta)")
    channel_scale = _gone("channel_scale", "a recorder sets call.channel_scale in its begin(call)")

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
        super().__init__()
        self.dynamics = Dynamics(None, False, v_threshold, v_reset, detach_reset)  # subclasses set the leak
        self.v_threshold, self.v_reset, self.detach_reset = v_threshold, v_reset, detach_reset
        # A class would be called in forward as if it were its instance.
        if surrogate_function is not None and (
            not callable(surrogate_function) or isinstance(surrogate_function, type)
        ):
            raise TypeError(
                f"surrogate_function must be a callable such as sadp_fast.surrogate.ATan(), got "
                f"{surrogate_function!r}: pass an instance, not a name or a class"
            )
        self.surrogate_function = surrogates.Sigmoid() if surrogate_function is None else surrogate_function
        self._state = _State(self.dynamics.v_rest)
        self.step_mode = step_mode
        self.backend = backend
        self.store_v_seq = store_v_seq
        self.recorder: Recorder | None = None
        self._own_recorder = _OwnRecorder()  # of collect_statistics
        self._said_not_fused = False

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

    def __getstate__(self) -> dict[str, Any]:
        self.v  # noqa: B018  computed now: what computes it cannot be copied
        own = _OwnRecorder()
        recorder = own if self.collect_statistics else None  # others measure this node, not its copies
        return {**self.__dict__, "recorder": recorder, "_own_recorder": own}

    def reset(self) -> None:
        """Return ``v`` to its initial float and forget ``v_seq`` and the node's own statistics."""
        state = self._state
        state.v, state.v_seq = self.dynamics.v_rest, None
        if self.recorder is not None:
            self.recorder.reset()

    def detach(self) -> None:
        """Cut the graph behind ``v`` and ``v_seq`` (truncated back-propagation through time)."""
        if isinstance(self.v, Tensor):
            self.v = self.v.detach()
        if self.v_seq is not None:
            self.v_seq = self.v_seq.detach()

    def _replicate_for_data_parallel(self) -> BaseNode:
        replica: BaseNode = super()._replicate_for_data_parallel()
        replica._state, replica.recorder = copy.copy(self._state), None  # each has its own part of the batch
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BaseNode:
        if isinstance(self.v, Tensor):
            self.v = fn(self.v)
        if self.v_seq is not None:
            self.v_seq = fn(self.v_seq)
        super()._apply(fn, recurse)
        return self

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

    @property
    def collect_statistics(self) -> bool:
        """Whether the node has a recorder of its own, for ``spike_count`` and ``grad_norm_sq``."""
        return self._own_recorder in recorders_of(self)

    @collect_statistics.setter
    def collect_statistics(self, on: bool) -> None:
        if on and not self.collect_statistics:
            self._own_recorder = _OwnRecorder()
            hand_in(self, self._own_recorder)
        elif not on:
            take_back(self, self._own_recorder)

    @property
    def spike_count(self) -> Tensor | None:
        """With ``collect_statistics``, ``CallRecorder.spike_count``; None after ``reset()``."""
        return self._own_recorder.spike_count

    @property
    def grad_norm_sq(self) -> Tensor | None:
        """With ``collect_statistics``, ``CallRecorder.grad_norm_sq``; None after ``reset()``."""
        return self._own_recorder.grad_norm_sq

    @property
    def calls(self) -> list[Call]:
        """With ``collect_statistics``, the calls behind ``spike_count`` and ``grad_norm_sq``."""
        return self._own_recorder.calls

    def _begin(self, shape: tuple[int, ...], device: torch.device) -> Call | None:
        """What a call with output [T, N, *] measures, or None; the node has a recorder."""
        assert self.recorder is not None
        if len(shape) < 2:
            raise ValueError(f"a recorder needs a batch dimension, got input of shape {tuple(shape)}")
        call = Call(shape, self._step_mode, device)
        return call if self.recorder.begin(call) else None

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
        if not runs_kernels or x.ndim < 2 or x.dtype not in KERNEL_DTYPES:
            return None
        if torch.jit.is_tracing():  # type: ignore[attr-defined]  # sizes are tensors then
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

    def _run(self, x_seq: Tensor, call: Call | None) -> Tensor:
        """All steps of x_seq [T, N, *]; updates the state, and what the call measures."""
        v = self._initial_v(x_seq)
        fused = self._fused_surrogate(x_seq)
        if fused is None:
            spikes, v_seq = self._run_reference(x_seq, v, call)
        else:
            spikes, v_seq = self._run_kernels(x_seq, v, fused, call)
        if v_seq is not None:
            earlier = self.v_seq if self._step_mode == "s" else None
            if earlier is not None and _kind(earlier) == _kind(v_seq):
                v_seq = torch.cat((earlier, v_seq))
            self.v_seq = v_seq
        binary = fused is not None or surrogates.fused_index(self.surrogate_function) is not None
        return mark(spikes, 1) if binary else spikes

    def _reciprocal_tau(self, x: Tensor) -> Tensor | None:
        """1 / tau for input x where it is learned: 0-dim, in the dtype of the state."""
        return None

    def _run_reference(self, x_seq: Tensor, v: Tensor | float, call: Call | None) -> tuple[Tensor, Tensor | None]:
        """Spikes and v_seq by plain torch; sets the potential."""
        if not isinstance(v, Tensor):
            v = torch.full_like(x_seq[0], v, dtype=reference.state_dtype(x_seq.dtype), requires_grad=False)
        reciprocal_tau = self._reciprocal_tau(x_seq)
        if call is not None and call.awaits_norms:
            x_seq = reference.GradientNormTap.apply(x_seq, call.norms_buffer(), call.channel_scale, reciprocal_tau, v)
        spikes, self._state.v, v_seq = reference.multi_step(
            x_seq, v, self.dynamics, self.surrogate_function, self._store_v_seq, reciprocal_tau
        )
        if call is not None and call.counts:
            call.spikes = reference.spike_count(spikes)
        return spikes, v_seq

    def _run_kernels(
        self, x_seq: Tensor, v: Tensor | float, surrogate: int, call: Call | None
    ) -> tuple[Tensor, Tensor | None]:
        """Spikes and v_seq by the fused kernels; sets the potential."""
        from ..ops.lif import op as ops  # Triton is imported where it is used, so that CPU users need no Triton

        alpha = self.surrogate_function.alpha  # type: ignore[union-attr]
        tau, d, store = self._reciprocal_tau(x_seq), self.dynamics, self._store_v_seq
        counts, scale = (False, None) if call is None else (call.counts, call.channel_scale)
        awaited = call if call is not None and call.awaits_norms else None
        if runs_directly():
            ops.check(x_seq, v, tau, d, scale)
            record, defer_v = None if awaited is None else awaited.record_norms, not self._state.keeps_v
            outputs = ops.multi_step(x_seq, v, tau, d, surrogate, alpha, store, counts, record, scale, defer_v)
        else:
            options: dict[str, Any] = {"reciprocal_tau": tau, "store_v_seq": store, "count_spikes": counts}
            norms = None if awaited is None else awaited.norms_buffer()
            outputs = ops.lif(x_seq, v, d, surrogate, alpha, **options, grad_norm_sq=norms, channel_scale=scale)
        spikes, self._state.v, v_seq, count = outputs
        if call is not None:
            call.spikes = count
        return spikes, v_seq

    def forward(self, x: Tensor) -> Tensor:
        """Input current to spikes, same shape and dtype: [N, *] in step mode 's', [T, N, *] in 'm'.

        Raises:
            ValueError: the input has no step, or the node has a recorder and it has no batch dimension.
        """
        single = self._step_mode == "s"
        if not single and (x.ndim == 0 or x.shape[0] == 0):
            raise ValueError(f"step_mode='m' needs input [T, N, *] with T >= 1, got shape {tuple(x.shape)}")
        x_seq = x.unsqueeze(0) if single else x
        spikes = self._run(x_seq, None if self.recorder is None else self._begin(x_seq.shape, x.device))
        return spikes.squeeze(0) if single else spikes

    def extra_repr(self) -> str:
        d = self.dynamics
        return (
            f"v_threshold={d.v_threshold}, v_reset={d.v_reset}, detach_reset={d.detach_reset}, "
            f"step_mode={self.step_mode}, backend={self.backend}"
        )


def reset(module: nn.Module) -> None:
    """Call ``reset()`` of every neuron of this package in ``module``; what else keeps a state is left alone."""
    for child in module.modules():
        if isinstance(child, BaseNode):
            child.reset()


def neurons(module: nn.Module) -> dict[str, BaseNode]:
    """The neurons of this package in ``module``, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, BaseNode)}


@contextmanager
def restored(modules: Iterable[nn.Module], *names: str) -> Iterator[None]:
    """Afterwards these attributes of the modules are what they are now."""
    before = [(module, name, getattr(module, name)) for module in modules for name in names]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """The neurons of ``module`` at rest and not measured; afterwards their states and recorders are put back.

    Not by their ``reset``, which would forget what a training loop has not read yet.
    """
    nodes = neurons(module).values()
    with restored(nodes, "_state", "recorder"):
        for node in nodes:
            node._state, node.recorder = _State(node.dynamics.v_rest), None
        yield
