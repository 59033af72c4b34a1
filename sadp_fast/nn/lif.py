"""The neurons: SpikingJelly's constructors around ``node.BaseNode``.

A new one has its constants in ``ops/common/dynamics.py``, its step in ``ops/lif/reference.py`` and state beside v in
``node.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..ops.lif.reference import state_dtype
from .node import BaseNode, check_tau, constant


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
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq, backend)
        self.tau, self.decay_input = tau, decay_input

    tau = constant("tau")
    decay_input = constant("decay_input")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tau={self.tau}, decay_input={self.decay_input}"


class IFNode(BaseNode):
    """Integrate-and-fire neurons without leak, a drop-in for SpikingJelly's ``IFNode``: ``h = v + x``.

    Arguments, state and errors are those of ``LIFNode``, without ``tau`` and ``decay_input``.
    """


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
        check_tau("init_tau", init_tau)
        if math.isinf(init_tau):
            raise ValueError("init_tau must be finite, got inf, from which w could never move; an IFNode has no leak")
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq, backend)
        self.dynamics = replace(self.dynamics, tau=init_tau, learned_tau=True)
        self.decay_input = decay_input
        self.w = nn.Parameter(torch.tensor(-math.log(init_tau - 1.0)))

    decay_input = constant("decay_input")

    def _reciprocal_tau(self, x: Tensor) -> Tensor:
        return self.w.to(state_dtype(x.dtype)).sigmoid()

    def extra_repr(self) -> str:
        tau = "" if self.w.is_meta else f"{(1 + (-self.w.detach().double()).exp()).item():.4g} "
        return f"{super().extra_repr()}, tau={tau}(learned), decay_input={self.decay_input}"
