"""Everything that computes the same layer of LIF neurons: ours, and its peers as far as they are installed.

The neuron: tau = 2 with the input decayed too, threshold 1, hard reset to 0, surrogate Sigmoid(alpha=4), gradients
through the reset. Input current x [T, N, *] to spikes of the same shape and dtype.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor

import sadp_fast
from sadp_fast import surrogate

DIRECTIONS = ("forward", "backward", "forward+backward")
TAU, ALPHA = 2.0, 4.0
HALF = (torch.float16, torch.bfloat16)
LEAKY = dict(tau=TAU, decay_input=True, v_threshold=1.0, v_reset=0.0, detach_reset=False)

Layer = Callable[[Tensor], Tensor]


class Implementation(NamedTuple):
    """One way to compute the layer.

    role: "ours", "ours with statistics", "our module" or "peer". build: from an example of the input, the layer.
    exact_spikes / exact_gradient: whether they must agree with the float64 reference for this dtype (a half-precision
    membrane potential flips spikes; snntorch detaches the reset). directions: what is measured.
    """

    name: str
    role: str
    build: Callable[[Tensor], Layer]
    exact_spikes: bool = True
    exact_gradient: bool = True
    directions: tuple[str, ...] = DIRECTIONS


def implementations(cuda: bool, dtype: torch.dtype) -> list[Implementation]:
    """What is measured on this device for inputs of this dtype; ours come first."""
    half = dtype in HALF
    if cuda:
        ours = [
            Implementation("sadp_fast lif", "ours", _lif),
            Implementation("sadp_fast lif with statistics", "ours with statistics", _lif_with_statistics),
            Implementation("sadp_fast LIFNode", "our module", _node, directions=("forward+backward",)),
        ]
    else:
        ours = [
            Implementation("sadp_fast LIFNode", "ours", _node),
            Implementation("sadp_fast LIFNode with statistics", "ours with statistics", _node_with_statistics),
        ]
    peers = []
    if importlib.util.find_spec("spikingjelly"):
        name = f"SpikingJelly {version('spikingjelly')}"
        peers.append(Implementation(name, "peer", _spikingjelly, not half, not half))
        if cuda and half:
            peers.append(Implementation(f"{name}, float32 state", "peer", _spikingjelly_float32_state))
            peers.append(Implementation(f"{name}, half storage", "peer", _spikingjelly_half_storage, False, False))
    if importlib.util.find_spec("snntorch"):
        peers.append(Implementation(f"snntorch {version('snntorch')}", "peer", _snntorch, not half, False))
    peers.append(Implementation("torch loop", "peer", lambda x: torch_loop))
    if cuda and dtype != torch.float16:  # compiling takes seconds; float16 would repeat bfloat16
        peers.append(Implementation("torch.compile of the loop", "peer", _compiled_loop))
    return ours + peers


# ------------------------------------------------------------------------------------------------------------- ours


def _lif(x: Tensor) -> Layer:
    from sadp_fast.dynamics import Dynamics
    from sadp_fast.ops.lif import lif

    dynamics, index = Dynamics(**LEAKY), surrogate.FUSED.index(surrogate.Sigmoid)
    return lambda x: lif(x, 0.0, dynamics, index, ALPHA)[0]


def _lif_with_statistics(x: Tensor) -> Layer:
    from sadp_fast.dynamics import Dynamics
    from sadp_fast.ops.lif import lif

    dynamics, index = Dynamics(**LEAKY), surrogate.FUSED.index(surrogate.Sigmoid)
    norms = torch.zeros(x.shape[:2], device=x.device)
    return lambda x: lif(x, 0.0, dynamics, index, ALPHA, count_spikes=True, grad_norm_sq=norms)[0]


def _module(node: torch.nn.Module) -> Layer:
    def layer(x: Tensor) -> Tensor:
        node.reset()
        return node(x)

    return layer


def _node(x: Tensor) -> Layer:
    return _module(sadp_fast.LIFNode(**LEAKY, surrogate_function=surrogate.Sigmoid(ALPHA), step_mode="m"))


def _node_with_statistics(x: Tensor) -> Layer:
    node = sadp_fast.LIFNode(**LEAKY, surrogate_function=surrogate.Sigmoid(ALPHA), step_mode="m")
    node.collect_statistics = True
    return _module(node)


# ------------------------------------------------------------------------------------------------------------ peers


def _spikingjelly(x: Tensor) -> Layer:
    from spikingjelly.activation_based import neuron
    from spikingjelly.activation_based import surrogate as theirs

    return _module(neuron.LIFNode(**LEAKY, surrogate_function=theirs.Sigmoid(ALPHA), step_mode="m"))


def _spikingjelly_function(x: Tensor, state: torch.dtype, **precision: str) -> Layer:
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based import surrogate as theirs

    spike = theirs.Sigmoid(ALPHA)

    def layer(x: Tensor) -> Tensor:
        v = torch.zeros_like(x[0], dtype=state)
        return functional.lif_multi_step(x, v, **LEAKY, surrogate_function=spike, **precision)[0]

    return layer


def _spikingjelly_float32_state(x: Tensor) -> Layer:
    return _spikingjelly_function(x, torch.float32)


def _spikingjelly_half_storage(x: Tensor) -> Layer:
    storage = {torch.float16: "fp16", torch.bfloat16: "bf16"}[x.dtype]
    return _spikingjelly_function(x, x.dtype, neuron_storage=storage, neuron_fwd="fp32", neuron_bwd="fp32")


def _snntorch(x: Tensor) -> Layer:
    import snntorch

    # v <- v / 2 + x with threshold 2 is our neuron with its potential doubled.
    neuron = snntorch.Leaky(
        beta=1 - 1 / TAU,
        threshold=TAU,
        spike_grad=snntorch.surrogate.sigmoid(slope=ALPHA / TAU),
        reset_mechanism="zero",
    ).to(x.device)

    def layer(x: Tensor) -> Tensor:
        mem = torch.zeros_like(x[0])
        spikes = []
        for current in x:
            spike, mem = neuron(current, mem)
            spikes.append(spike)
        return torch.stack(spikes).to(x.dtype)  # its spikes are float32 for half types

    return layer


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        q = torch.sigmoid(ALPHA * u)
        return grad * (ALPHA * q * (1 - q))


def torch_loop(x: Tensor) -> Tensor:
    """The layer as one writes it in plain torch, with a float32 membrane potential."""
    v = torch.zeros_like(x[0], dtype=torch.float32)
    spikes = []
    for current in x.unbind(0):
        h = v + (current.float() - v) / TAU
        spike = _Fire.apply(h - 1.0)
        v = (1.0 - spike) * h
        spikes.append(spike.to(x.dtype))
    return torch.stack(spikes)


def _compiled_loop(x: Tensor) -> Layer:
    torch._dynamo.reset()  # each shape and dtype is compiled on its own
    return torch.compile(torch_loop, fullgraph=True, dynamic=False)
