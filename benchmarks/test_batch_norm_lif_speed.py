"""Every BatchNorm + LIF layer of one SEW-ResNet18 training step, forward and backward, at the network's shapes.

T = 4, batch 128, 3x32x32, bf16, channels_last. The network (width 64, ADD) has 20 such layers, eight of which end a
block, where the block's other branch is added to the spikes. Equal layers are measured once and counted as often as
they occur; the compiled peer gets all 20 in one graph, as it would in a network.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from bench_report import set_value
from bench_timing import tensor_bytes
from torch import Tensor, nn

import sadp_fast
from sadp_fast import surrogate
from sadp_fast.nn.recorder import Call, Recorder
from sadp_fast.ops.common.dynamics import Dynamics
from sadp_fast.ops.lif.reference import multi_step

CUDA = torch.cuda.is_available()
T, BATCH = 4, 128 if CUDA else 2
DTYPE = torch.bfloat16 if CUDA else torch.float32
# A normalisation of its own rounds its output to half precision, which flips spikes; the fused one does not.
UNFUSED_IS_EXACT = not CUDA
SIZE = 32 if CUDA else 16  # of the image
SUITE, MEASURE = "BatchNorm + LIF", "all BatchNorm + LIF layers of a SEW-ResNet18 step"
# As sadp_fast.models builds them, and as the reference code of SEW-ResNet does.
NEURON = dict(tau=2.0, decay_input=True, v_threshold=1.0, v_reset=0.0, detach_reset=True)
NEAR = 1e-3  # of the threshold, where the rounding of a normalised current decides
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2}  # ||error|| / ||reference|| of the current's gradient


class LayerShape(NamedTuple):
    """One kind of layer: [T,] N, channels, size, size; how often it occurs; whether a residual is added; whether it is
    the first one, whose current is the same at every step and is normalised once."""

    channels: int
    size: int
    count: int
    residual: bool = False
    first: bool = False

    def current(self, batch: int) -> tuple[int, ...]:
        frame = (batch, self.channels, self.size, self.size)
        return frame if self.first else (T, *frame)

    def moved_elements(self, batch: int) -> tuple[int, int]:
        """Elements that the fused forward and backward must read or write.

        Forward: the current for its statistics, the current again, the spikes, and the residual where there is one.
        Backward: the current and the output's gradient for the sums, both again, and the current's gradient.
        """
        steps = T * batch * self.channels * self.size**2
        current = steps // T if self.first else steps
        return 2 * current + steps + steps * self.residual, 3 * current + 2 * steps


def layers_of_network() -> list[LayerShape]:
    kinds = [LayerShape(64, SIZE, 1, first=True)]
    for stage in range(4):
        shape = (64 << stage, SIZE >> stage)
        # Two blocks of two layers; the first block of a later stage has a third one in its shortcut.
        kinds += [LayerShape(*shape, 2 + (stage > 0)), LayerShape(*shape, 2, residual=True)]
    return kinds


KINDS = layers_of_network()


def floor_bytes(batch: int = BATCH, kinds: list[LayerShape] = KINDS) -> int:
    return sum(kind.count * sum(kind.moved_elements(batch)) for kind in kinds) * DTYPE.itemsize


class Layer(NamedTuple):
    """Current and, for some, residual to spikes [T, N, C, *]; and the normalisation's weight and bias."""

    run: Callable[..., Tensor]
    parameters: list[Tensor]


# ------------------------------------------------------------------------------------------------- implementations


def per_step(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def unfused(norm: nn.Module, neuron: nn.Module, kind: LayerShape) -> Callable[..., Tensor]:
    """As a network of modules computes it: normalise, fire, add."""

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        current = norm(x).expand(T, *x.shape) if kind.first else per_step(norm, x)
        spikes = neuron(current)
        return spikes if residual is None else spikes + residual

    return run


def layer(norm: nn.Module, neuron: nn.Module, run: Callable[..., Tensor]) -> Layer:
    """The layer that starts from rest each time."""

    def restarted(*inputs: Tensor) -> Tensor:
        neuron.reset()
        return run(*inputs)

    return Layer(restarted, list(norm.parameters()))


def norm_of(kind: LayerShape) -> nn.Module:
    return nn.BatchNorm2d(kind.channels).to("cuda" if CUDA else "cpu")


class Energies(Recorder):
    """What SADP asks of the node: the two energies of each example."""

    def begin(self, call: Call) -> bool:
        call.wants_energies = True
        return True


def fused(kind: LayerShape, statistics: bool = False) -> Layer:
    node = sadp_fast.BatchNormLIF(kind.channels, **NEURON, surrogate_function=surrogate.ATan(), step_mode="m")
    node.to(device="cuda" if CUDA else "cpu").recorder = Energies() if statistics else None
    return layer(node, node, (lambda x: node(x, repeat=T)) if kind.first else node)


def fused_with_statistics(kind: LayerShape) -> Layer:
    return fused(kind, statistics=True)


def norm_then_our_node(kind: LayerShape) -> Layer:
    node, norm = sadp_fast.LIFNode(**NEURON, surrogate_function=surrogate.ATan(), step_mode="m"), norm_of(kind)
    return layer(norm, node, unfused(norm, node, kind))


def spikingjelly_node() -> nn.Module:
    from spikingjelly.activation_based import neuron
    from spikingjelly.activation_based import surrogate as theirs

    return neuron.LIFNode(**NEURON, surrogate_function=theirs.ATan(), step_mode="m")


def spikingjelly(kind: LayerShape) -> Layer:
    node, norm = spikingjelly_node(), norm_of(kind)
    return layer(norm, node, unfused(norm, node, kind))


def prepared_node() -> nn.Module:
    from spikingjelly.activation_based.precision import prepare_model_for_precision

    config = {"mode": "bf16", "neuron_storage": "bf16"}
    return prepare_model_for_precision(nn.Sequential(spikingjelly_node()).cuda(), "cuda", config).model


def spikingjelly_bf16_storage(kind: LayerShape) -> Layer:
    node, norm = prepared_node(), norm_of(kind)
    return layer(norm, node[0], unfused(norm, node, kind))


OURS = (
    ("BatchNormLIF", fused, "norm"),
    ("BatchNormLIF with statistics", fused_with_statistics, ""),
    ("BatchNorm2d then LIFNode", norm_then_our_node, ""),
)


def peer_builders() -> list[tuple[str, Callable[[LayerShape], Layer]]]:
    if not find_spec("spikingjelly"):
        return []
    name = f"SpikingJelly {version('spikingjelly')}"
    found = [(name, spikingjelly)]
    return [*found, (f"{name}, bf16 storage", spikingjelly_bf16_storage)] if CUDA else found


# ---------------------------------------------------------------------------------------------------------- inputs


def channels_last(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers [T, N, C, H, W] or [N, C, H, W] whose frames are channels_last."""
    device = generator.device
    t = torch.randn(shape, device=device, dtype=DTYPE, generator=generator)
    if len(shape) == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])


def inputs(kind: LayerShape, batch: int, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    """Current (and residual), and the gradient of the output."""
    current = channels_last(kind.current(batch), generator).mul_(2).add_(1).requires_grad_()
    spikes = (T, *kind.current(batch)[-4:])
    gradient = channels_last(spikes, generator)
    if not kind.residual:
        return (current,), gradient
    return (current, channels_last(spikes, generator).gt(0).to(DTYPE)), gradient


CHECKED_KINDS = (LayerShape(16, 8, 1, first=True), LayerShape(16, 8, 1), LayerShape(16, 8, 1, residual=True))
CHECKED_BATCH = 8


def check(build: Callable[[LayerShape], Layer], exact: bool, generator: torch.Generator) -> None:
    """Compare a small layer of each kind with float64."""
    for kind in CHECKED_KINDS:
        (current, *residual), gradient = inputs(kind, CHECKED_BATCH, generator)
        output = build(kind).run(current, *residual)
        (got,) = torch.autograd.grad(output, current, gradient)
        assert output.shape == gradient.shape and output.dtype == DTYPE and torch.isfinite(got).all()
        x = current.detach().double().requires_grad_()
        norm = nn.BatchNorm2d(16).to(x.device).double()
        y = norm(x).expand(T, *x.shape) if kind.first else per_step(norm, x)
        v = torch.zeros_like(y[0])
        spikes = multi_step(y, v, Dynamics(**NEURON), surrogate.ATan())[0]
        (wanted,) = torch.autograd.grad(spikes, x, gradient.double())
        with torch.no_grad():
            settled = torch.ones_like(v, dtype=torch.bool)
            for step, spike in zip(y, spikes):
                h = v + (step - v) / 2
                settled &= (h - 1).abs() > (NEAR if exact else 0.03)
                v = (1 - spike) * h
        fired = output.detach().double() - (residual[0].double() if residual else 0)
        assert 0.005 < fired.mean() < 0.995
        different = (fired != spikes.detach()) & settled
        assert different.double().mean() <= (0 if exact else 0.01), "spikes differ from the float64 reference"
        if exact:
            error = ((got.double() - wanted).norm() / wanted.norm()).item()
            assert error < TOLERANCE[DTYPE], f"gradient differs from the reference by {error:.1e}"


# ---------------------------------------------------------------------------------------------------------- timing


def grad(state: tuple[Layer, tuple[tuple[Tensor, ...], Tensor]]) -> tuple[Tensor, ...]:
    layer, (tensors, gradient) = state
    return torch.autograd.grad(layer.run(*tensors), [tensors[0], *layer.parameters], gradient)


def run_once(build: Callable[[LayerShape], Layer], kind: LayerShape) -> None:
    """One forward and backward pass of a layer, untimed: compiles its kernels."""
    generator = torch.Generator("cuda" if CUDA else "cpu").manual_seed(0)
    grad((build(kind), inputs(kind, CHECKED_BATCH if kind in CHECKED_KINDS else BATCH, generator)))


def time_layers(benchmark, bench, build: Callable[[LayerShape], Layer], row: dict[str, Any]) -> None:
    """The sum over all layers of their device time, and each kind's beside its floor."""
    device, generator = bench.device, bench.device.generator(3)
    total, row["layers"] = 0.0, []
    for number, kind in enumerate(KINDS):
        built = build(kind)
        elements = kind.moved_elements(BATCH)
        data = [inputs(kind, BATCH, generator)]
        buffers = device.buffers(tensor_bytes(*data[0][0], data[0][1])) if device.is_cuda else 1
        data += [inputs(kind, BATCH, generator) for _ in range(buffers - 1)]

        def prepare(i: int, built=built, data=data):
            return built, data[i]

        if benchmark.disabled or number == 0:
            if number == 0:  # pytest-benchmark times one function a test
                figures = device.measure(benchmark, prepare, grad, buffers=len(data))
            else:
                grad(prepare(0))
        else:
            for _ in range(2):
                grad(prepare(0))
            if device.is_cuda:
                figures = device.device_seconds(prepare, grad, len(data))
            else:
                figures = {"device_seconds": device.host_seconds(prepare, grad, 1)}
        if not benchmark.disabled:
            seconds = figures["device_seconds"]
            total += kind.count * seconds
            floor = device.floor_seconds(sum(elements) * DTYPE.itemsize)
            row["layers"].append({**kind._asdict(), "seconds": seconds, "floor": floor, "share": floor / seconds})
            if figures.get("bound_by_host"):
                row["bound_by_host"] = True
    if not benchmark.disabled:
        set_value(row, total, "s", "device")


@pytest.mark.skipif(not hasattr(sadp_fast, "BatchNormLIF"), reason="this sadp_fast has no BatchNormLIF")
@pytest.mark.parametrize("name, build, goal", OURS, ids=[name.replace(" ", "-") for name, _, _ in OURS])
def test_batch_norm_lif(benchmark, bench, name: str, build: Callable, goal: str) -> None:
    with bench.row(SUITE, MEASURE, name, "ours") as row:
        check(build, UNFUSED_IS_EXACT or build is not norm_then_our_node, bench.device.generator(4))
        time_layers(benchmark, bench, build, row)
        if CUDA and goal:
            row["goal"] = goal
        bench.set_floor(row, floor_bytes())
        benchmark.extra_info.update(row)


PEERS = peer_builders()


@pytest.mark.parametrize("name, build", PEERS, ids=[name.replace(" ", "-") for name, _ in PEERS])
def test_batch_norm_lif_peer(benchmark, bench, name: str, build: Callable) -> None:
    with bench.row(SUITE, MEASURE, name, "peer") as row:
        check(build, UNFUSED_IS_EXACT, bench.device.generator(4))
        time_layers(benchmark, bench, build, row)
        bench.set_floor(row, floor_bytes())
        benchmark.extra_info.update(row)


class AllLayers(nn.Module):
    """All layers of the network side by side, for a compiler to see at once."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = [kind for kind in KINDS for _ in range(kind.count)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(kind.channels) for kind in self.kinds).cuda()
        self.neurons = nn.ModuleList(prepared_node() for _ in self.kinds)

    def forward(self, inputs: list[tuple[Tensor, ...]]) -> list[Tensor]:
        layers = zip(self.norms, self.neurons, self.kinds, inputs)
        return [unfused(norm, node, kind)(*tensors) for norm, node, kind, tensors in layers]

    def compiled(self, generator: torch.Generator) -> Callable[[Any], tuple[Tensor, ...]]:
        """A forward and a backward pass of the compiled layers on random inputs."""
        torch._dynamo.reset()
        forward = torch.compile(self, dynamic=False)
        data = [inputs(kind, BATCH, generator) for kind in self.kinds]
        tensors, gradients = [d[0] for d in data], [d[1] for d in data]
        wanted = [*(t[0] for t in tensors), *self.norms.parameters()]

        def call(_: Any) -> tuple[Tensor, ...]:
            for node in self.neurons:
                node[0].reset()
            return torch.autograd.grad(forward(tensors), wanted, gradients)

        return call

    @classmethod
    def compile_once(cls) -> None:
        cls().compiled(torch.Generator("cuda").manual_seed(0))(None)


COMPILED = CUDA and find_spec("spikingjelly") is not None


@pytest.mark.skipif(not COMPILED, reason="needs a GPU and SpikingJelly")
def test_batch_norm_lif_peer_compiled(benchmark, bench) -> None:
    name = f"SpikingJelly {version('spikingjelly')}, bf16 storage, compiled"
    with bench.row(SUITE, MEASURE, name, "peer") as row:
        call = AllLayers().compiled(bench.device.generator(3))
        row.update(bench.device.measure(benchmark, lambda _: None, call, buffers=1))
        set_value(row, row.get("device_seconds"), "s", "device")
        bench.set_floor(row, floor_bytes())
        benchmark.extra_info.update(row)
