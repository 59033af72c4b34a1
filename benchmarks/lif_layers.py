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

TAU, ALPHA = 2.0, 4.0
HALF = (torch.float16, torch.bfloat16)
LEAKY = dict(tau=TAU, decay_input=True, v_threshold=1.0, v_reset=0.0, detach_reset=False)

Layer = Callable[[Tensor], Tensor]


class Peer(NamedTuple):
    """Somebody else's way to compute the layer.

    build: from the input's dtype, the layer. exact_spikes / exact_gradient: whether they must agree with the float64
    reference (a half-precision membrane potential flips spikes; snntorch detaches the reset). slow: it takes many
    times as long as the fastest, so that it is measured at one large shape only. compiles: for seconds, at each shape.
    """

    name: str
    build: Callable[[torch.dtype], Layer]
    exact_spikes: bool = True
    exact_gradient: bool = True
    slow: bool = False
    compiles: bool = False


def peers(dtype: torch.dtype) -> list[Peer]:
    """The peers for inputs of this dtype."""
    half = dtype in HALF
    found = []
    if importlib.util.find_spec("spikingjelly"):
        name = f"SpikingJelly {version('spikingjelly')}"
        # In half types its module runs step by step in plain torch, and its faster settings run fused.
        found.append(Peer(name, _spikingjelly, not half, not half, slow=half))
        if half and torch.cuda.is_available():
            found.append(Peer(f"{name}, float32 state", _spikingjelly_float32_state, slow=dtype == torch.float16))
            found.append(Peer(f"{name}, half storage", _spikingjelly_half_storage, False, False))
    if importlib.util.find_spec("snntorch"):
        found.append(Peer(f"snntorch {version('snntorch')}", _snntorch, not half, False, slow=True))
    found.append(Peer("torch loop", lambda _: torch_loop, slow=True))
    if torch.cuda.is_available():
        found.append(Peer("torch.compile of the loop", _compiled_loop, compiles=True))
    return found


# ------------------------------------------------------------------------------------------------------------- ours


def our_node(statistics: bool = False) -> sadp_fast.LIFNode:
    node = sadp_fast.LIFNode(**LEAKY, surrogate_function=surrogate.Sigmoid(ALPHA), step_mode="m")
    node.collect_statistics = statistics
    return node


def from_rest(node: torch.nn.Module) -> Layer:
    """The node's forward pass, started from rest each time."""

    def layer(x: Tensor) -> Tensor:
        node.reset()
        return node(x)

    return layer


def learners() -> dict[str, Callable[[], torch.nn.Module]]:
    """The layer with a learned time constant, a parameter w that begins as LEAKY's: by name, ours first."""
    options = {name: value for name, value in LEAKY.items() if name != "tau"} | {"init_tau": TAU, "step_mode": "m"}

    def ours() -> torch.nn.Module:
        node = sadp_fast.ParametricLIFNode(**options, surrogate_function=surrogate.Sigmoid(ALPHA))
        node.collect_statistics = True
        return node

    def theirs() -> torch.nn.Module:
        from spikingjelly.activation_based import neuron
        from spikingjelly.activation_based import surrogate as their_surrogate

        return neuron.ParametricLIFNode(**options, surrogate_function=their_surrogate.Sigmoid(ALPHA))

    found = {"ParametricLIFNode with statistics": ours}
    if importlib.util.find_spec("spikingjelly"):
        found[f"SpikingJelly {version('spikingjelly')}"] = theirs
    return found


# ------------------------------------------------------------------------------------------------------------ peers


def _spikingjelly(dtype: torch.dtype) -> Layer:
    from spikingjelly.activation_based import neuron
    from spikingjelly.activation_based import surrogate as theirs

    return from_rest(neuron.LIFNode(**LEAKY, surrogate_function=theirs.Sigmoid(ALPHA), step_mode="m"))


def _spikingjelly_function(state: torch.dtype, **precision: str) -> Layer:
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based import surrogate as theirs

    spike = theirs.Sigmoid(ALPHA)

    def layer(x: Tensor) -> Tensor:
        v = torch.zeros_like(x[0], dtype=state)
        return functional.lif_multi_step(x, v, **LEAKY, surrogate_function=spike, **precision)[0]

    return layer


def _spikingjelly_float32_state(dtype: torch.dtype) -> Layer:
    return _spikingjelly_function(torch.float32)


def _spikingjelly_half_storage(dtype: torch.dtype) -> Layer:
    storage = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    return _spikingjelly_function(dtype, neuron_storage=storage, neuron_fwd="fp32", neuron_bwd="fp32")


def _snntorch(dtype: torch.dtype) -> Layer:
    import snntorch

    # v <- v / 2 + x with threshold 2 is our neuron with its potential doubled.
    neuron = snntorch.Leaky(
        beta=1 - 1 / TAU,
        threshold=TAU,
        spike_grad=snntorch.surrogate.sigmoid(slope=ALPHA / TAU),
        reset_mechanism="zero",
    ).to("cuda" if torch.cuda.is_available() else "cpu")

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


def _compiled_loop(dtype: torch.dtype) -> Layer:
    torch._dynamo.reset()  # each shape and dtype is compiled on its own
    return torch.compile(torch_loop, fullgraph=True, dynamic=False)
