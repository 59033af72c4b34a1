"""BatchNormLIF, BatchNormIF and BatchNormParametricLIF against a float64 oracle and against the layers that they fuse.

The oracle is nn.functional.batch_norm in float64 in front of the oracle neuron of test_lif_kernel. Criterion: the error
of the fused pass against the oracle may not exceed the error of plain torch (the module's own unfused path on the CPU)
by more than a small tolerance. Plain torch computes in float32 on the same numbers and rounds its result to the dtype
once: in half precision torch's own batch normalisation also rounds what the neurons get, which flips spikes. Spikes are
those of the oracle wherever its potential is not within MARGIN of the threshold; a neuron that comes so near has no
incoming gradient in these tests.

The kernels read statistics in float32, so a neuron's potential is exact to about 1e-6, not bit for bit torch's.
"""

import contextlib
import copy
import gc
import io
import math
import pickle
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_lif_kernel import (
    ATAN,
    DTYPES,
    LIF,
    MARGIN,
    NEURONS,
    ON_GPU,
    PLIF,
    RECT,
    SIGMOID,
    oracle_backward,
    oracle_forward,
    tau_products,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from unfused import Unfused

from sadp_fast import BatchNormIF, BatchNormLIF, BatchNormParametricLIF, LIFNode, reset, surrogate
from sadp_fast.memory.packed_spikes import packed_spikes
from sadp_fast.nn.recorder import Recorder
from sadp_fast.ops.batch_norm_lif import configuration, launch
from sadp_fast.ops.batch_norm_lif import op as ops
from sadp_fast.ops.common.dynamics import Dynamics
from sadp_fast.ops.common.spike_marks import mark, max_count
from sadp_fast.surrogate import FUSED, Sigmoid

IF = Dynamics(None, False, 1.0, 0.0, False)
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels last"


FUSED_CALLS = []  # shapes of x in the calls of a test that reached the fused operator


@pytest.fixture(autouse=True)
def fused_calls(monkeypatch):
    operator = ops.batch_norm_lif

    def spy(x, *args, **kwargs):
        FUSED_CALLS.append(x.shape)
        return operator(x, *args, **kwargs)

    monkeypatch.setattr(ops, "batch_norm_lif", spy)
    FUSED_CALLS.clear()
    return FUSED_CALLS


def forget_launches():
    """Launches are kept by shape; not where a test changes what the host computes them from."""
    launch._layers.clear()


@pytest.fixture
def real_configurations():
    """Marks a test that runs with the launch configurations that users get."""


@pytest.fixture(autouse=True)
def small_launches(monkeypatch, request):
    """In the interpreter, which takes its time for each program: few of them, another number for each kernel."""
    if ON_GPU or "real_configurations" in request.fixturenames:
        yield
        return
    for name, elements, programs in (("statistics", 4, 3), ("forward", 8, 3), ("sums", 4, 2), ("gradient", 2, 4)):
        curated, *others = configuration.TUNING[name]
        small = replace(curated, elements=elements, warps=4, programs=programs)
        monkeypatch.setitem(configuration.TUNING, name, (small, *others))
    forget_launches()
    yield
    monkeypatch.undo()
    forget_launches()


@pytest.fixture
def processors(monkeypatch, small_launches):
    """Sets how many multiprocessors the work is cut for."""

    def set_to(number):
        monkeypatch.setattr(configuration, "multiprocessors", lambda device: number)
        forget_launches()

    yield set_to
    monkeypatch.undo()
    forget_launches()


# -------------------------------------------------------------------------------------------------------- one check


def make(channels, d=LIF, index=SIGMOID, alpha=4.0, **options) -> BatchNormLIF | BatchNormIF | BatchNormParametricLIF:
    """A layer on the CPU with random weights, some of them negative, and random running statistics."""
    options = {
        "v_threshold": d.v_threshold,
        "v_reset": d.v_reset,
        "detach_reset": d.detach_reset,
        "surrogate_function": FUSED[index](alpha),
        "backend": "triton",
        **options,
    }
    if d.tau is not None:
        options |= {"init_tau" if d.learned_tau else "tau": d.tau, "decay_input": d.decay_input}
    layer = (BatchNormIF if d.tau is None else BatchNormParametricLIF if d.learned_tau else BatchNormLIF)(
        channels, **options
    )
    generator = torch.Generator().manual_seed(channels)
    with torch.no_grad():
        for name, low, high in (
            ("weight", 1.0, 2.5),
            ("bias", 0.0, 1.0),
            ("running_mean", -0.5, 0.5),
            ("running_var", 0.5, 2),
        ):
            if getattr(layer, name) is not None:
                getattr(layer, name).uniform_(low, high, generator=generator)
        if layer.weight is not None:
            layer.weight[1::3] *= -1
    return layer


def input_current(shape, dtype=torch.float32, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 1.5 + 0.5).to(dtype)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """t [T, N, C, *] in another order of memory."""
    if layout == CHANNELS_LAST:
        return t.movedim(2, -1).contiguous().movedim(-1, 2)
    assert layout == CONTIGUOUS
    return t.contiguous()


def leaf(t: Tensor, device: str, wants: bool = True) -> Tensor:
    """A copy with the same strides."""
    copied = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    return copied.copy_(t).requires_grad_(wants)


class Truth(NamedTuple):
    out: Tensor
    v: Tensor
    clear: Tensor  # [N, C, *], neurons that never come within MARGIN of a discontinuity
    upstream: Tensor  # the gradient of the output, in x's dtype
    grad_x: Tensor
    grads: dict[str, Tensor]  # of the parameters
    delta: Tensor
    sizes: dict[str, float]  # what the rounding errors of a gradient are relative to
    running: dict[str, Tensor]


def oracle(layer, x, residual, repeat, index, alpha, seed, margin=MARGIN, upstream=None) -> Truth:
    """Everything in float64, from the layer's state before the call."""
    d = layer.dynamics
    dtype, x = x.dtype, x.detach().double().requires_grad_()
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, var = (
        None if getattr(layer, name) is None else getattr(layer, name).detach().double().clone() for name in names
    )
    for parameter in (weight, bias):
        if parameter is not None:
            parameter.requires_grad_()
    by_batch = layer.training or mean is None
    folded = x if repeat is not None else x.flatten(0, 1)
    momentum = 0.0 if layer.momentum is None else layer.momentum
    y = nn.functional.batch_norm(folded, mean, var, weight, bias, by_batch, momentum, layer.eps)
    used = folded.transpose(0, 1).flatten(1).var(1, correction=0) if by_batch else var
    gain = (1.0 if weight is None else weight) / torch.sqrt(used + layer.eps)
    gain = gain.detach().reshape(-1, *[1] * (x.ndim - 2 - (repeat is None)))
    y_seq = y.expand(repeat, *y.shape) if repeat is not None else y.unflatten(0, x.shape[:2])
    fired = oracle_forward(y_seq.detach(), torch.full(y_seq.shape[1:], d.v_rest), d, index, alpha)
    distance = (fired.h - d.v_threshold).abs()
    clear = (distance > margin).all(0)
    if index == RECT:
        clear &= ((distance - 0.5 / alpha).abs() > margin).all(0)
    if upstream is None:
        upstream = torch.randn(fired.spikes.shape, generator=torch.Generator().manual_seed(seed + 1))
        upstream = (upstream + 0.2) * clear
    upstream = upstream.to(dtype)
    zeros = torch.zeros_like(fired.h)
    grad_y_seq, _ = oracle_backward(fired, d, index, alpha, upstream.double(), zeros[0], zeros)
    grad_y = grad_y_seq.sum(0) if repeat is not None else grad_y_seq.flatten(0, 1)
    y.backward(grad_y)
    direct = (grad_y * gain) if repeat is not None else (grad_y * gain).unflatten(0, x.shape[:2])
    delta = direct.square().flatten(1).sum(1) if repeat is not None else direct.square().flatten(2).sum((0, 2))
    normalised = (
        (folded.detach() - folded.detach().transpose(0, 1).flatten(1).mean(1).reshape(gain.shape)) * gain
    ).abs()
    sizes = {
        "x": direct.abs().max().item(),
        "weight": (grad_y.abs() * normalised).transpose(0, 1).flatten(1).sum(1).max().item(),
        "bias": grad_y.abs().transpose(0, 1).flatten(1).sum(1).max().item(),
    }
    out = fired.spikes if residual is None else fired.spikes + residual.double()
    grads = {} if weight is None else {"weight": weight.grad, "bias": bias.grad}
    if d.learned_tau:
        slope = (1 - 1 / d.tau) / d.tau  # of 1 / tau with respect to w
        rest = torch.full(y_seq.shape[1:], d.v_rest)
        products = slope * tau_products(fired, d, y_seq.detach(), rest, grad_y_seq)
        grads["w"], sizes["w"] = products.sum(), products.abs().sum().item()
    running = {} if mean is None else {"running_mean": mean, "running_var": var}
    return Truth(out, fired.v_seq[-1], clear, upstream, x.grad, grads, delta, sizes, running)


class Result(NamedTuple):
    out: Tensor
    v: Tensor
    grad_x: Tensor
    grads: dict[str, Tensor]
    grad_residual: Tensor | None
    energies: tuple[Tensor, Tensor]
    running: dict[str, Tensor]


def run(layer, x, residual, repeat, upstream, device) -> Result:
    """One training or evaluation step of the layer; x and residual keep their strides."""
    layer = layer.to(device)
    layer.collect_statistics = True
    x = leaf(x, device)
    residual = None if residual is None else leaf(residual, device)
    out = layer(x, residual, repeat=repeat)
    out.backward(upstream.to(device))
    assert out.dtype == x.grad.dtype == x.dtype and layer.v.dtype == torch.float32
    return Result(
        out.detach().cpu(),
        layer.v.detach().cpu(),
        x.grad.cpu(),
        {name: parameter.grad.cpu() for name, parameter in layer.named_parameters()},
        None if residual is None else residual.grad.cpu(),
        tuple(t.cpu() for t in layer.energies[0]),
        {name: buffer.cpu() for name, buffer in layer.named_buffers()},
    )


def assert_no_less_exact(
    fused: Tensor, plain: Tensor, truth: Tensor, size: float, what: str, device="cpu", luck=1.0, rounding=5e-6
) -> None:
    """The criterion; ``size``: what errors are relative to; ``luck``: factor by which plain torch's may vary."""
    assert fused.shape == truth.shape, what
    assert torch.isfinite(fused).all(), what
    fused_error, plain_error = (fused.double() - truth).abs(), (plain.double() - truth).abs()
    tolerance = rounding * size + 1e-9
    if fused.dtype == torch.bfloat16 and device == "cpu":
        # Triton's interpreter cuts float32 to bfloat16 instead of rounding: up to one unit in the last place.
        assert (fused_error <= 2**-7 * truth.abs() + plain_error + tolerance).all(), what
    else:
        largest, typical = luck * plain_error.max(), luck * plain_error.square().mean().sqrt()
        assert fused_error.max() <= largest + tolerance, (what, fused_error.max(), plain_error.max(), size)
        assert fused_error.square().mean().sqrt() <= typical + tolerance, what


def check(
    shape,
    dtype=torch.float32,
    d=LIF,
    index=SIGMOID,
    alpha=4.0,
    *,
    device,
    x=None,
    layout=CONTIGUOUS,
    residual=False,
    repeat=None,
    training=True,
    seed=0,
    margin=MARGIN,
    typical=True,
    plain_size=3e-5,
    upstream=None,
    luck=1.0,
    rounding=5e-6,
    **options,
) -> tuple[Result, Truth]:
    """Oracle, unfused and fused pass on one case, forward and backward; compares everything.

    ``residual``: False, True (small integers) or a tensor; ``typical``: whether some neurons fire, some do not and few
    come near the threshold; ``plain_size``: how near the truth plain torch has to be for the comparison to say much.
    """
    if x is None:
        x = laid_out(input_current(shape if repeat is None else (1, *shape), dtype, seed), layout)
        x = x if repeat is None else x[0]
    shape, dtype = x.shape if repeat is None else (repeat, *x.shape), x.dtype
    if not isinstance(residual, Tensor):
        integers = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed + 5)).to(dtype)
        residual = laid_out(integers, layout) if residual else None
    layer = make(shape[2], d, index, alpha, **options).train(training)
    truth = oracle(layer, x, residual, repeat, index, alpha, seed, margin, upstream)
    if typical:
        assert truth.clear.double().mean() > 0.9
        fired = truth.out if residual is None else truth.out - residual.double()
        assert 0.02 < fired.mean() < 0.98

    plain_layer = copy.deepcopy(layer)
    plain_layer.backend = "torch"
    wide = None if residual is None else residual.float()
    plain = run(plain_layer, x.float().contiguous(), wide, repeat, truth.upstream.float(), "cpu")
    before = len(FUSED_CALLS)
    fused = run(layer, x, residual, repeat, truth.upstream, device)
    assert len(FUSED_CALLS) == before + 1

    exact = (truth.out.float() * truth.clear).to(dtype)
    assert torch.equal(plain.out.to(dtype) * truth.clear, exact)
    if residual is None or not (dtype == torch.bfloat16 and device == "cpu" and residual.frac().any()):
        assert torch.equal(fused.out * truth.clear, exact)
    near = partial(assert_no_less_exact, device=device, luck=luck, rounding=rounding)
    near(fused.v * truth.clear, plain.v * truth.clear, truth.v * truth.clear, truth.v.abs().max().item(), "v")
    near(fused.grad_x, plain.grad_x.to(dtype), truth.grad_x, truth.sizes["x"], "grad_x")
    if math.isfinite(plain_size):  # plain torch itself has to be near the truth, or the comparison says nothing
        assert (plain.grad_x.double() - truth.grad_x).abs().max() <= plain_size * truth.sizes["x"]
    assert set(fused.grads) == set(truth.grads)
    for name, grad in truth.grads.items():
        near(fused.grads[name], plain.grads[name], grad, truth.sizes[name], name)
    if residual is not None:
        assert torch.equal(fused.grad_residual, truth.upstream)
    output_energy = fused.out.double().square().transpose(0, 1).flatten(1).sum(1)
    rounding = 2e-6 if dtype == torch.float32 or residual is None else 1e-2  # the kernel squares before it rounds
    torch.testing.assert_close(fused.energies[0].double(), output_energy, rtol=rounding, atol=0)
    torch.testing.assert_close(fused.energies[1].double(), truth.delta, rtol=5e-5, atol=1e-6 * truth.delta.max().item())
    for name, buffer in truth.running.items():
        if training and layer.momentum is not None:
            near(fused.running[name], plain.running[name], buffer, buffer.abs().max().item(), name)
        elif not training:
            assert torch.equal(fused.running[name].double(), buffer)
    return fused, truth


# ------------------------------------------------------------------------------------------------------ the test grid


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 16])
def test_steps_dtypes_and_layouts(steps, dtype, layout, kernel_device):
    shape = (steps, 3, 5, 3, 4) if not ON_GPU else (steps, 32, 64, 14, 14)
    check(shape, dtype, layout=layout, device=kernel_device)


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 3, 5, 7, 9),  # odd sizes, three dimensions of pixels
        (4, 3, 1, 3, 5),
        (3, 2, 3, 19, 23),
        (2, 2, 30, 5, 3),
        (2, 3, 130, 2, 3),
        (2, 2, 257, 2),
        (4, 6, 30),  # no pixels
        (3, 40, 3),
        (4, 5, 30, 1, 1),
        (4, 1, 3, 4, 4),  # one example
        (4, 1, 30, 1),  # one example and one pixel
        (1, 2, 3, 8),
        (2, 70, 16, 2, 2),  # more examples than programs
        (4, 2, 64, 8, 8),  # tiles without a rest
        *([(4, 128, 64, 32, 32), (4, 128, 512, 4, 4), (4, 64, 130, 7, 7), (16, 32, 96, 15, 15)] if ON_GPU else []),
    ],
    ids=str,
)
def test_shapes(shape, layout, kernel_device):
    check(shape, torch.float32, layout=layout, residual=math.prod(shape) % 2 == 0, device=kernel_device)


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
@pytest.mark.parametrize("number", [1, 3, 40])
def test_any_number_of_multiprocessors(number, layout, kernel_device, processors):
    """Many tiles and examples for few programs, and more programs than there is work."""
    processors(number)
    check((2, 7, 5, 15, 17), layout=layout, residual=True, device=kernel_device)
    check((2, 11, 3, 3), layout=layout, device=kernel_device)


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
@pytest.mark.parametrize(
    "shape, dtype",
    [((4, 5, 6, 11, 9), torch.float32), ((2, 2, 130, 5), torch.bfloat16), ((16, 2, 6, 9), torch.float32)],
    ids=str,
)
def test_the_launch_configurations_that_users_get(shape, dtype, layout, kernel_device, real_configurations):
    check(shape, dtype, layout=layout, residual=True, device=kernel_device)


@pytest.mark.parametrize("dynamics", NEURONS, ids=str)
def test_dynamics(dynamics, kernel_device):
    check((4, 3, 6, 9), torch.float32, dynamics, ATAN, 2.0, device=kernel_device)


@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize(
    "training, affine, layout",
    [
        (True, True, CHANNELS_LAST),
        (True, False, CONTIGUOUS),
        (False, True, CONTIGUOUS),
        (False, False, CHANNELS_LAST),
    ],
)
def test_learned_tau(training, affine, layout, decay_input, kernel_device):
    """Its gradient from both ways that a pass may end, several steps, and one input for all of them."""
    d = replace(PLIF, decay_input=decay_input)
    options = {"d": d, "training": training, "affine": affine, "layout": layout, "device": kernel_device}
    check((5, 4, 6, 7), torch.float32, residual=True, **options)
    check((4, 6, 7), torch.float32, repeat=3, **options)
    check((16, 2, 6, 5), torch.bfloat16, **options)


def test_a_frozen_tau_gets_no_gradient(kernel_device):
    """And nothing is kept for one."""
    layer = make(6, PLIF).to(kernel_device)
    layer.w.requires_grad_(False)
    x = input_current((3, 4, 6, 5)).to(kernel_device).requires_grad_()
    out = layer(x)
    layer.weight.data.mul_(2)
    out.sum().backward()
    assert layer.w.grad is None and x.grad.abs().sum() > 0 and layer.weight.grad is not None


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_learned_tau_that_is_nearly_infinite(backend, affine, kernel_device):
    """1 / tau is 0 in float32: no neuron fires, and no gradient is NaN."""
    layer = make(6, PLIF, backend=backend, affine=affine).to(kernel_device)
    layer.w.data.fill_(-110.0)
    x = input_current((3, 4, 6, 5)).to(kernel_device).requires_grad_()
    out = layer(x)
    out.sum().backward()
    assert (out == 0).all() and layer.w.grad == 0 and torch.isfinite(x.grad).all()


def test_a_learned_tau_elsewhere_is_refused():
    layer = make(6, PLIF, affine=False, track_running_stats=False).to("meta")
    with pytest.raises(ValueError, match="x is on cpu and the layer on meta"):
        layer(torch.zeros(3, 4, 6, 5))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_energies_where_only_a_learned_tau_wants_a_gradient(backend, kernel_device):
    layer = make(6, PLIF, backend=backend, affine=False).to(kernel_device)
    layer.collect_statistics = True
    layer(input_current((3, 4, 6, 5)).to(kernel_device)).sum().backward()
    assert (layer.energies[0].delta > 0).all()


@pytest.mark.parametrize("alpha", [0.7, 2.0])
@pytest.mark.parametrize("index", range(len(FUSED)), ids=[s.__name__ for s in FUSED])
def test_surrogates(index, alpha, kernel_device):
    d = LIF if alpha < 1 else Dynamics(3.0, False, 0.8, None, False)
    check((4, 3, 6, 9), torch.float32, d, index, alpha, device=kernel_device)


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training, tracks", [(False, True), (True, False), (False, False), (True, True)])
def test_training_and_evaluation(training, tracks, affine, layout, kernel_device):
    """Evaluation with running statistics writes the gradient in one pass; without them it is as training."""
    for dtype, residual in ((torch.float32, False), (torch.bfloat16, True)):
        check(
            (3, 4, 5, 6),
            dtype,
            training=training,
            layout=layout,
            residual=residual,
            affine=affine,
            track_running_stats=tracks,
            device=kernel_device,
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_repeat(steps, layout, training, kernel_device):
    """One input for all steps: the normalisation before an expand; its gradient is summed over the steps."""
    for shape, dtype, residual in (((3, 5, 4, 7), torch.float32, True), ((9, 6), torch.float16, False)):
        options = {"residual": residual, "training": training, "repeat": steps, "device": kernel_device}
        check(shape, dtype, layout=layout if len(shape) > 2 else CONTIGUOUS, **options)


def test_repeat_spikes_as_the_expanded_input_does(kernel_device):
    x = input_current((3, 5, 4, 7)).to(kernel_device)
    layer = make(5).to(kernel_device)
    spikes = layer(x, repeat=4)
    v = layer.v
    layer.reset()
    torch.testing.assert_close(layer(x.expand(4, *x.shape)), spikes, rtol=0, atol=0)
    torch.testing.assert_close(layer.v, v, rtol=1e-5, atol=1e-5)


LAYOUTS = {
    "batch first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "batch first, channels last": lambda t: t.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3),
    "width and height swapped": lambda t: t.transpose(3, 4).contiguous().transpose(3, 4),
    "slice of the steps": lambda t: torch.cat([t, t, t])[1 : 2 * len(t) : 2],
    "slice of the channels": lambda t: torch.cat([t, t], 2)[:, :, 1 : 1 + t.shape[2]],
    "slice of the rows": lambda t: torch.cat([t, t], 4)[..., ::2],
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    "one step expanded": lambda t: t[:1].expand_as(t),
    "one example expanded": lambda t: t[:, :1].expand_as(t),
    "one pixel expanded": lambda t: t[..., :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_and_of_the_residual(layout, kernel_device):
    """All strides are read as they are, or copied."""
    values, integers = input_current((3, 4, 5, 3, 4)), torch.randint(0, 3, (3, 4, 5, 3, 4)).float()
    for change_x, change_residual in ((True, False), (False, True), (True, True)):
        x = LAYOUTS[layout](values) if change_x else values
        residual = LAYOUTS[layout](integers) if change_residual else laid_out(integers, CHANNELS_LAST)
        if "expanded" not in layout:
            check(None, x=x, residual=residual, device=kernel_device)
            continue
        # ``leaf`` cannot copy overlapping memory.
        results = []
        for order in (lambda t: t, lambda t: t.contiguous()):
            layer = make(5).to(kernel_device)
            x_in = order(x.to(kernel_device)).requires_grad_()
            out = layer(x_in, order(residual.to(kernel_device)))
            (grad,) = torch.autograd.grad((out * torch.arange(4, device=kernel_device)).sum(), x_in)
            results.append((out, grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", [3, 4, 5, 6])
def test_the_output_has_the_memory_order_of_x(dims, kernel_device):
    for layout in (CONTIGUOUS, CHANNELS_LAST):
        x = laid_out(input_current((2, 3, 4, 2, 3, 5)[:dims]), layout).to(kernel_device).requires_grad_()
        out = make(4).to(kernel_device)(x)
        out.sum().backward()
        assert out.stride() == x.grad.stride() == x.stride()


@pytest.mark.parametrize("repeat", [None, 3])
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
@pytest.mark.parametrize("kind", ["expanded", "per example", "per step", "other order", "strided"])
def test_layouts_of_the_incoming_gradient(kind, layout, repeat, kernel_device):
    shape = (3, 4, 5, 3, 4)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    grad = {
        "expanded": torch.tensor(1.5).expand(shape),
        "per example": values[:1].expand(shape),
        "per step": values[:, :1].expand(shape),
        "other order": laid_out(values, CHANNELS_LAST if layout == CONTIGUOUS else CONTIGUOUS),
        "strided": torch.stack([values, values], 5)[..., 1],
    }[kind].to(kernel_device)
    x = laid_out(input_current(shape), layout).to(kernel_device)
    x = x if repeat is None else x[0]
    results = []
    for g in (grad, laid_out(grad, layout)):
        layer = make(5).to(kernel_device)
        layer.collect_statistics = True
        x_in = x.clone().requires_grad_()
        layer(x_in, repeat=repeat).backward(g)
        results.append((x_in.grad, layer.weight.grad, layer.bias.grad, *layer.energies[0]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert results[0][0].abs().max() > 1e-3


@pytest.mark.parametrize("dtype, other", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_incoming_gradient_of_another_dtype(dtype, other, kernel_device):
    x = input_current((3, 4, 5, 6), dtype).to(kernel_device)
    grad = torch.randint(-2, 3, x.shape, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    results = []
    for kind in (dtype, other):
        layer, x_in = make(5).to(kernel_device), x.clone().requires_grad_()
        layer(x_in).backward(grad.to(kind))
        results.append((x_in.grad, layer.weight.grad, layer.bias.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@settings(
    max_examples=60 if ON_GPU else 15,  # every one compiles kernels of its own there
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_case(data, kernel_device, processors):
    """Random shape, T, dtype, neuron, surrogate, layout, statistics, residual and repeat."""
    rank = data.draw(st.integers(0, 3), label="rank")
    pixels = data.draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank), label="pixels")
    steps = data.draw(st.integers(1, launch.MAX_STEPS), label="steps")
    examples = data.draw(st.integers(2, 5), label="examples")
    channels = data.draw(st.sampled_from([1, 2, 3, 8, 17]), label="channels")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    d = Dynamics(
        data.draw(st.sampled_from([None, 1.5, 2.0, 10.0]), label="tau"),
        data.draw(st.booleans(), label="decay_input"),
        data.draw(st.sampled_from([0.5, 1.0, 1.3]), label="v_threshold"),
        data.draw(st.sampled_from([None, 0.0, -0.5, 0.25]), label="v_reset"),
        data.draw(st.booleans(), label="detach_reset"),
    )
    index = data.draw(st.integers(0, len(FUSED) - 1), label="surrogate")
    alpha = data.draw(st.sampled_from([0.5, 1.0, 4.0]), label="alpha")
    repeats = data.draw(st.booleans(), label="repeat")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    options = {
        "layout": data.draw(st.sampled_from([CONTIGUOUS, CHANNELS_LAST]), label="layout"),
        "residual": data.draw(st.booleans(), label="residual"),
        "training": data.draw(st.booleans(), label="training"),
        "affine": data.draw(st.booleans(), label="affine"),
        "track_running_stats": data.draw(st.booleans(), label="track"),
    }
    processors(data.draw(st.sampled_from([1, 2, 132]), label="processors"))
    shape = (examples, channels, *pixels)
    shape, repeat = (shape, steps) if repeats else ((steps, *shape), None)
    # Two or three values a channel can be all but equal, which makes the normalisation's gradient hard for torch too.
    bound = {"typical": False, "plain_size": math.inf}
    # Dynamics drawn at random amplify a rounding error a thousandfold now and then: whose is the larger one is luck.
    check(shape, dtype, d, index, alpha, repeat=repeat, seed=seed, device=kernel_device, luck=4.0, **options, **bound)


# ------------------------------------------------------------------------------------- numbers that are hard to handle


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
@pytest.mark.parametrize("mean, dtype", [(1000.0, torch.float32), (-1000.0, torch.float32), (30.0, torch.float16)])
def test_means_far_from_zero(mean, dtype, layout, kernel_device, processors):
    """Float32 knows x to 3e-5 of its deviation here, so neurons within 1e-3 of the threshold are left out."""
    processors(2)
    x = laid_out((input_current((4, 6, 3, 9, 11)) + mean).to(dtype), layout)
    check(None, x=x, margin=1e-3, plain_size=1e-3, device=kernel_device)


@pytest.mark.parametrize("value", [0.0, 3.7, -1000.3])
def test_constant_channels(value, kernel_device):
    """Variance 0: the normalisation gives its bias, and gradients of size 1 / sqrt(eps)."""
    x = input_current((3, 4, 5, 6))
    x[:, :, 1::2] = value
    fused, truth = check(None, x=x, device=kernel_device, typical=False, plain_size=math.inf)
    assert (fused.grad_x - truth.grad_x).abs().max() <= 3e-5 * truth.sizes["x"]  # plain torch is off by 5e-2
    all_constant = torch.full((3, 4, 2, 6), value)
    fused, _ = check(None, x=all_constant, device=kernel_device, typical=False, margin=0.0, plain_size=math.inf)
    layer = make(2)
    expected = Unfused(layer).node(layer.bias.detach().reshape(2, 1).expand(3, 4, 2, 6).contiguous())
    assert torch.equal(fused.out, expected)


@pytest.mark.parametrize("where", [(0, 0, 2, 0), (2, 3, 2, 5), (1, 2, 2, 3), (0, 0, 2, slice(None))], ids=str)
@pytest.mark.parametrize("outlier", [1e4, 1e6, 1e12])
def test_one_huge_value(outlier, where, kernel_device):
    """Wherever it lies: first in its channel, last, amid."""
    x = input_current((3, 4, 5, 6))
    x[where] = outlier
    # Beside 1e12 the others are alike to float32, and so is what decides between the ones and the others' gradients.
    # Deviations are taken from the first value: where that is the huge one, the variance loses digits.
    check(None, x=x, device=kernel_device, typical=False, plain_size=math.inf, margin=1e-3, rounding=2e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_seen(bad, kernel_device):
    """Gradients that are not finite are what a gradient scaler looks for; the other channels are untouched."""
    results = []
    for spoil in (False, True):
        x = input_current((3, 4, 5, 6)).to(kernel_device)
        if spoil:
            x[1, 2, 3, 4] = bad
        x.requires_grad_()
        layer = make(5).to(kernel_device)
        out = layer(x)
        out.sum().backward()
        results.append((out, x.grad, layer))
    (out, grad, layer), (bad_out, bad_grad, bad_layer) = results
    others = [0, 1, 2, 4]
    assert torch.equal(out[:, :, others], bad_out[:, :, others])
    assert torch.equal(grad[:, :, others], bad_grad[:, :, others])
    assert not torch.isfinite(bad_grad[:, :, 3]).any()
    assert not torch.isfinite(bad_layer.weight.grad[3]) and torch.isfinite(bad_layer.weight.grad[others]).all()
    assert not torch.isfinite(bad_layer.running_var[3]) and not torch.isfinite(bad_layer.running_mean[3])
    assert torch.equal(layer.running_var[others], bad_layer.running_var[others])


@pytest.mark.parametrize("dimension", ["steps", "examples"])
def test_offsets_past_two_to_the_31(dimension, tmp_path, kernel_device):
    """The last steps of x and of a residual lie beyond 2^31 elements, by strides that are below that."""
    if ON_GPU and torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    apart, middle = 2**30 + 16, 2**32 + 64  # what wraps around in 32 bits lands in the memory before the middle
    elements = middle + 2**31 + 1024
    if ON_GPU:
        memory = torch.zeros(elements, dtype=torch.bfloat16, device="cuda")
    else:  # a file with holes takes neither memory nor room
        memory = torch.from_file(str(tmp_path / "sparse"), True, elements, dtype=torch.bfloat16)
    strides = (apart, 32, 8, 1) if dimension == "steps" else (32, apart, 8, 1)
    shape = (3, 2, 3, 8) if dimension == "steps" else (2, 3, 3, 8)
    x = memory.as_strided(shape, strides, middle).copy_(input_current(shape, torch.bfloat16))
    residual = memory.as_strided(shape, strides, middle + 512).copy_(torch.randint(0, 3, shape))
    results = []
    for inputs in ((x, residual), (x.clone(), residual.clone())):
        layer = make(3).to(kernel_device)
        x_in = inputs[0].detach().requires_grad_()
        out = layer(x_in, inputs[1])
        (out * torch.arange(8, device=kernel_device)).sum().backward()
        results.append((out.detach(), x_in.grad, layer.weight.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------- running statistics


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
def test_running_statistics_after_several_passes(momentum, backend, kernel_device):
    """Those of nn.BatchNorm2d on the folded input; evaluation changes nothing and uses them."""
    layer = make(5, momentum=momentum, backend=backend).to(kernel_device)
    norm = nn.BatchNorm2d(5, momentum=momentum)
    norm.load_state_dict({name: value.cpu() for name, value in layer.state_dict().items()})
    for seed in range(4):
        x = input_current((3, 4, 5, 3, 2), seed=seed) * (1 + seed) + seed
        layer(x.to(kernel_device))
        layer.reset()
        norm(x.flatten(0, 1))
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(layer, name).cpu(), getattr(norm, name), rtol=2e-6, atol=1e-6)
        assert layer.num_batches_tracked == norm.num_batches_tracked == seed + 1
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    layer(x.to(kernel_device))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_pass_without_gradients_updates_the_running_statistics_too(kernel_device):
    x = input_current((3, 4, 5, 6)).to(kernel_device)
    layers = [make(5).to(kernel_device) for _ in range(2)]
    layers[0](x)
    with torch.no_grad():
        layers[1](x)
    for a, b in zip(layers[0].state_dict().values(), layers[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(layers[0].running_mean, make(5).running_mean.to(kernel_device))


def test_repeat_counts_one_step_in_the_running_variance(kernel_device):
    layer, norm = make(5).to(kernel_device), nn.BatchNorm1d(5)
    norm.load_state_dict({name: value.cpu() for name, value in layer.state_dict().items()})
    x = input_current((3, 5))
    layer(x.to(kernel_device), repeat=4)
    norm(x)
    torch.testing.assert_close(layer.running_var.cpu(), norm.running_var, rtol=2e-6, atol=0)


# ----------------------------------------------------------------------------------------------------------- residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_residual_of_any_numbers(dtype, kernel_device):
    x, residual = input_current((4, 3, 5, 6), dtype), input_current((4, 3, 5, 6), dtype, seed=9)
    check(None, dtype, x=x, residual=residual, device=kernel_device)


@pytest.mark.parametrize("training", [True, False])
def test_residual_without_a_gradient(training, kernel_device):
    x = input_current((3, 4, 5, 6)).to(kernel_device).requires_grad_()
    residual = torch.ones_like(x)
    layer = make(5).to(kernel_device).train(training)
    layer(x, residual).sum().backward()
    assert residual.grad is None and x.grad.abs().max() > 0


def test_residual_that_is_the_input(kernel_device):
    """Both gradients are added."""
    grads = []
    for residual_is_x in (True, False):
        x = input_current((3, 4, 5, 6)).to(kernel_device).requires_grad_()
        other = x if residual_is_x else x.detach().clone().requires_grad_()
        (make(5).to(kernel_device)(x, other) * torch.arange(6, device=kernel_device)).sum().backward()
        grads.append(x.grad if residual_is_x else x.grad + other.grad)
    assert torch.equal(*grads)


# ------------------------------------------------------------------------------------------- who wants a gradient


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "wants", [(False, True, True), (False, True, False), (True, False, True), (True, False, False)]
)
def test_partial_requires_grad(wants, training, kernel_device):
    """x, weight, bias: each gradient is there if it is wanted, and the same as when all are."""
    results = []
    for flags in (wants, (True, True, True)):
        layer = make(5).to(kernel_device).train(training)
        layer.collect_statistics = True
        x = input_current((3, 4, 5, 6)).to(kernel_device).requires_grad_(flags[0])
        layer.weight.requires_grad_(flags[1])
        layer.bias.requires_grad_(flags[2])
        out = layer(x)
        (out * torch.arange(6, device=kernel_device)).sum().backward()
        results.append([t.grad for t in (x, layer.weight, layer.bias)])
        assert torch.isfinite(layer.energies[0].delta).all()
    for flag, grad, full in zip(wants, *results, strict=True):
        assert (grad is not None) == flag
        assert grad is None or torch.equal(grad, full)


class Repacked(torch.autograd.graph.saved_tensors_hooks):
    """As offloading to the host does: what is saved comes back contiguous, whatever it was."""

    def __init__(self):
        super().__init__(lambda t: t.contiguous().clone(), lambda t: t)


@pytest.mark.parametrize("case", ["channels last", "every other step", "repeated"])
def test_what_was_saved_may_come_back_in_another_layout(case, kernel_device):
    generator = torch.Generator().manual_seed(0)
    shape = (6, 4, 5, 4, 4) if case == "every other step" else (3, 4, 5, 4, 4)
    x = torch.randn(shape, generator=generator).to(kernel_device)
    x = {"every other step": x[::2], "repeated": x[0], "channels last": x}[case]
    if case != "every other step":
        x = x.movedim(-3, -1).contiguous().movedim(-1, -3)
    g = torch.randn(3, 4, 5, 4, 4, generator=generator).to(kernel_device)
    results = []
    for hooks in (contextlib.nullcontext(), Repacked()):
        node = BatchNormLIF(5, surrogate_function=surrogate.ATan(), backend="triton").to(kernel_device)
        node.collect_statistics = True
        leaf = x.detach().requires_grad_()
        assert leaf.stride() == x.stride()
        with hooks:
            out = node(leaf, repeat=3 if case == "repeated" else None)
        gradients = torch.autograd.grad(out, [leaf, node.weight, node.bias], g)
        results.append([out.detach(), *gradients, *node.energies[0]])
    for plain, repacked in zip(*results, strict=True):
        torch.testing.assert_close(repacked, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_whose_batches_nobody_counts_run_unfused(momentum, kernel_device):
    x = torch.randn(3, 4, 5, 4, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    node = BatchNormLIF(5, momentum=momentum, backend="triton").to(kernel_device)
    plain = torch.nn.BatchNorm2d(5, momentum=momentum).to(kernel_device)
    node.num_batches_tracked = plain.num_batches_tracked = None
    node(x)
    plain(x.flatten(0, 1).unsqueeze(-1))
    torch.testing.assert_close(node.running_mean, plain.running_mean)
    torch.testing.assert_close(node.running_var, plain.running_var)
    assert not FUSED_CALLS


def test_a_momentum_that_changes_prepares_nothing_but_its_own_launch(kernel_device):
    launch._layers.clear()
    x = torch.randn(3, 4, 5, 4, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    node, plain = BatchNormLIF(5, backend="triton").to(kernel_device), torch.nn.BatchNorm2d(5).to(kernel_device)
    for momentum in (0.1, 0.2, 0.5):
        node.momentum = plain.momentum = momentum
        reset(node)
        node(x)
        plain(x.flatten(0, 1).unsqueeze(-1))
        torch.testing.assert_close(node.running_mean, plain.running_mean)
    (layer,) = launch._layers.values()
    assert len(layer._constants) == 3 and len(layer._fire) == 1


def test_nobody_wants_a_gradient(kernel_device):
    layer = make(5).to(kernel_device).requires_grad_(False)
    layer.collect_statistics = True
    out = layer(input_current((3, 4, 5, 6)).to(kernel_device))
    assert not out.requires_grad and layer.v.grad_fn is None
    assert torch.isnan(torch.stack(layer.energies[0])).all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_no_grad(training, context, kernel_device):
    x = input_current((3, 4, 5, 6)).to(kernel_device)
    layer, other = (make(5).to(kernel_device).train(training) for _ in range(2))
    layer.collect_statistics = True
    with context():
        out = layer(x)
        v = layer.v
    assert torch.equal(out, other(x)) and torch.equal(v, other.v)
    assert not out.requires_grad and layer.energies == []


def test_what_the_backward_pass_keeps(kernel_device):
    """x itself, four numbers a channel and a few an example, whatever else is asked for."""
    for layout in (CONTIGUOUS, CHANNELS_LAST):
        x = laid_out(input_current((4, 4, 30, 6, 5)), layout).to(kernel_device).requires_grad_()
        layer = make(30).to(kernel_device)
        layer.collect_statistics = True
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            layer(x, torch.ones_like(x))
        others = [t for t in saved if t.data_ptr() != x.data_ptr()]
        assert len(others) == len(saved) - 1
        assert sum(t.numel() for t in others) <= 4 * 30 + x.numel() // 50


def test_a_layer_on_another_device_is_refused():
    layer = make(5)
    with pytest.raises(ValueError, match=r"x is on meta and the layer on cpu; move one of them"):
        layer(torch.empty(3, 4, 5, 6, device="meta"))


def test_an_input_of_inference_mode(kernel_device):
    layer = make(5).to(kernel_device).requires_grad_(False)
    with torch.inference_mode():
        x = input_current((3, 4, 5, 6)).to(kernel_device)
    expected = copy.deepcopy(layer)
    assert torch.equal(layer(x), expected(x.clone())) and torch.equal(layer.v, expected.v)


def test_what_is_kept_for_v(kernel_device):
    """Nothing of x in evaluation; in training x until the reset."""
    layer = make(5).to(kernel_device)
    for grad_mode in (False, True):
        x = input_current((3, 4, 5, 6)).to(kernel_device)
        memory = StorageWeakRef(x.untyped_storage())
        with torch.set_grad_enabled(grad_mode):
            layer(x)
        del x
        gc.collect()  # what Triton's interpreter leaves behind
        assert memory.expired() != grad_mode
        layer.reset()
        assert memory.expired()


@pytest.mark.parametrize("training", [True, False])
def test_second_derivative_is_an_error_not_a_wrong_number(training, kernel_device):
    layer = make(5).to(kernel_device).train(training)
    x = input_current((3, 4, 5, 6)).to(kernel_device).requires_grad_()
    loss = (layer(x) * layer.weight.sum()).sum()
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='torch'"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_backward_twice_gives_the_same(kernel_device):
    layer = make(5).to(kernel_device)
    layer.collect_statistics = True
    x = input_current((3, 4, 5, 6)).to(kernel_device).requires_grad_()
    out = layer(x).sum()
    out.backward(retain_graph=True)
    first, delta = x.grad.clone(), layer.energies[0].delta.clone()
    x.grad = None
    out.backward()
    assert torch.equal(x.grad, first) and torch.equal(layer.energies[0].delta, delta)


# ----------------------------------------------------------------------------------------------------------- energies


@pytest.mark.parametrize("repeat", [None, 4])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_energies_are_written_by_the_backward_pass(backend, repeat, kernel_device):
    layer = make(5, backend=backend).to(kernel_device)
    x = input_current((4, 3, 5, 6)).to(kernel_device).requires_grad_()
    x_in = x if repeat is None else x[0]
    layer(x_in, repeat=repeat)
    assert layer.energies == []  # not asked for
    layer.reset()
    layer.collect_statistics = True
    out = layer(x_in, repeat=repeat)
    (energies,) = layer.energies
    assert energies.output.shape == energies.delta.shape == (3,) and energies.delta.dtype == torch.float32
    assert torch.isnan(energies.delta).all()
    if backend == "triton":
        assert torch.isnan(energies.output).all()
    assert layer.energies[0] is energies
    out.sum().backward()
    assert torch.equal(energies.output, out.detach().sum((0, 2, 3)))
    assert (energies.delta > 0).all()
    assert torch.equal(layer.spike_count, out.detach().sum((2, 3)).int())
    assert torch.equal(layer.grad_norm_sq, energies.delta.unsqueeze(0))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("repeat", [None, 3])
def test_energies_by_their_definition(repeat, training, backend, kernel_device):
    """The gradient with respect to x where the normalisation is a scale and a shift that do not depend on x."""
    layer = make(5, backend=backend).to(kernel_device).train(training)
    layer.collect_statistics = True
    x = input_current((3, 4, 5, 6) if repeat is None else (4, 5, 6)).to(kernel_device).requires_grad_()
    factor = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(2)).to(kernel_device)
    residual = torch.randint(0, 3, (3, 4, 5, 6)).float().to(kernel_device)
    statistics = make(5, backend="torch").to(kernel_device)
    (layer(x, residual, repeat=repeat) * factor).sum().backward()

    folded = x.detach().flatten(0, 1) if repeat is None else x.detach()
    if training:
        mean, var = folded.mean((0, 2)), folded.transpose(0, 1).flatten(1).var(1, correction=0)
    else:
        mean, var = statistics.running_mean, statistics.running_var
    x_in = x.detach().requires_grad_()
    scale = (layer.weight / (var + layer.eps).sqrt()).detach().reshape(5, 1)
    y = (x_in - mean.reshape(5, 1)) * scale + layer.bias.detach().reshape(5, 1)
    out = Unfused(layer).node(y if repeat is None else y.expand(repeat, *y.shape)) + residual
    (out * factor).sum().backward()
    delta = x_in.grad.square().sum((0, 2, 3) if repeat is None else (1, 2))
    (energies,) = layer.energies
    torch.testing.assert_close(energies.delta, delta, rtol=1e-4, atol=0)
    torch.testing.assert_close(energies.output, out.detach().square().sum((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_energies_where_only_the_initial_potential_wants_a_gradient(backend, kernel_device):
    layer = make(5, affine=False, backend=backend).to(kernel_device)
    layer.collect_statistics = True
    v = torch.zeros(2, 5, 6, device=kernel_device, requires_grad=True)
    layer.v = v
    layer(input_current((1, 2, 5, 6)).to(kernel_device)).sum().backward()
    assert v.grad.norm() > 0 and (layer.energies[0].delta > 0).all()


class Rows(Recorder):
    """Energies in rows of its own, and nothing else."""

    def __init__(self, output, delta):
        self.rows, self.calls = (output, delta), []

    def begin(self, call):
        call.write_energies_into(*self.rows)
        self.calls.append(call)
        return True


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_for_energies(backend, kernel_device):
    """Written into; columns of a larger tensor too, call after call."""
    layer = make(5, backend=backend).to(kernel_device)
    store = torch.full((2, 3, 4), torch.nan, device=kernel_device)
    factor = torch.arange(6, device=kernel_device)
    for call in range(2):
        layer.reset()
        layer.recorder = Rows(store[0, call], store[1, call])
        x = input_current((3, 4, 5, 6), seed=call).to(kernel_device).requires_grad_()
        (layer(x) * factor).sum().backward()
        assert layer.recorder.calls[0].energies.output.data_ptr() == store[0, call].data_ptr()
        assert layer.recorder.calls[0].spike_count is None
        fresh = make(5, backend=backend).to(kernel_device)
        fresh.collect_statistics = True
        (fresh(x) * factor).sum().backward()
        assert torch.equal(store[:, call], torch.stack(fresh.energies[0]))
        assert torch.isnan(store[:, call + 1 :]).all()
    with pytest.raises(ValueError, match=r"into two contiguous float32 tensors \[N\] .*N = 3 examples"):
        layer(input_current((3, 3, 5, 6)).to(kernel_device))
    layer.recorder = Rows(*(torch.zeros(4, dtype=torch.float64, device=kernel_device),) * 2)
    with pytest.raises(ValueError, match=r"float64.*hand in rows for this batch"):
        layer(x)
    layer.recorder = Rows(*torch.zeros(4, 2, device=kernel_device).unbind(1))
    with pytest.raises(ValueError, match=r"into two contiguous float32 tensors \[N\]"):
        layer(x)
    layer.recorder = None
    layer.collect_statistics = True
    layer(x)
    assert layer.energies[0].output.shape == (4,)


@pytest.mark.parametrize("name", ["energy_buffers", "channel_scale"])
def test_attributes_of_old_say_what_has_taken_their_place(name):
    for node in (make(5), LIFNode()):
        with pytest.raises(AttributeError, match=rf"{name} is gone: a recorder (hands|sets)"):
            setattr(node, name, None)
        assert not hasattr(node, name)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_numbers_of_the_channels_in_any_layout(name, kernel_device, fused_calls):
    """Columns of a matrix: not what the kernels read, so that the layer runs unfused."""
    columns = torch.rand(5, 2, device=kernel_device) + 0.5
    layer, expected = (make(5).to(kernel_device).train(name in ("weight", "bias")) for _ in range(2))
    for one, values in ((layer, columns[:, 0]), (expected, columns[:, 0].clone())):
        setattr(one, name, nn.Parameter(values) if name in ("weight", "bias") else values)
    x = input_current((3, 2, 5, 6)).to(kernel_device)
    out = layer(x)
    assert not fused_calls
    assert torch.equal(out, expected(x)) and fused_calls


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_statistics_that_are_no_longer_tracked(backend, kernel_device):
    """As nn.BatchNorm2d: neither read in training nor updated."""
    layer = make(5, backend=backend).to(kernel_device)
    theirs = nn.BatchNorm2d(5).to(kernel_device)
    theirs.load_state_dict(layer.state_dict())
    x = input_current((3, 2, 5, 6, 4)).to(kernel_device)
    for track in (True, False):
        layer.track_running_stats = theirs.track_running_stats = track
        layer.reset()
        layer(x)
        theirs(x.flatten(0, 1))
        torch.testing.assert_close(layer.running_mean, theirs.running_mean)
        torch.testing.assert_close(layer.running_var, theirs.running_var)
        assert layer.num_batches_tracked == theirs.num_batches_tracked == 1


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_an_infinite_tau_has_a_gradient_of_zero(backend, kernel_device):
    layer = make(5, replace(LIF, tau=math.inf), backend=backend).to(kernel_device)
    x = input_current((3, 2, 5, 6)).to(kernel_device).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() < 1e-6
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_energies_under_compile_want_memory(kernel_device):
    layer = make(5, backend="torch").to(kernel_device)
    layer.collect_statistics = True
    with pytest.raises(Exception, match=r"run one forward pass with this \[T, N\] = \(3, 2\) uncompiled first"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(input_current((3, 2, 5, 6)).to(kernel_device))


def test_energies_of_several_calls(kernel_device):
    """In step mode 'm' those of the last call, in 's' of each one since the reset."""
    layer = make(5).to(kernel_device)
    layer.collect_statistics = True
    x = input_current((3, 4, 5, 6)).to(kernel_device).requires_grad_()
    layer(x).sum().backward()
    first = layer.energies[0]
    layer.reset()
    assert layer.energies == []
    layer(x)
    assert len(layer.energies) == 1 and layer.energies[0] is not first
    layer.reset()
    layer.step_mode = "s"
    sum(layer(step) for step in x).sum().backward()
    assert len(layer.energies) == 3
    assert all((e.delta > 0).all() and (e.output >= 0).all() for e in layer.energies)


# -------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("repeat", [None, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("read", ["before", "after", "always"])
def test_v_is_that_of_the_unfused_layers(read, training, repeat, kernel_device):
    layer = make(5).to(kernel_device).train(training)
    expected = Unfused(make(5)).train(training)
    for call in range(2):
        x = input_current((3, 4, 5, 6) if repeat is None else (4, 5, 6), seed=call)
        spikes = expected(x, repeat=repeat)
        x_in = x.to(kernel_device).requires_grad_()
        out = layer(x_in, repeat=repeat)
        before = layer.v if read != "after" else None
        out.sum().backward()
        for v in (before, layer.v):
            if v is not None:
                assert v.dtype == torch.float32 and v.grad_fn is None and v.shape == x.shape[-3:]
                torch.testing.assert_close(v.cpu(), expected.node.v.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(out.detach().cpu(), spikes.detach())
        layer.reset()
        expected.node.reset()
        assert layer.v == layer.dynamics.v_rest
        if read != "always":
            layer = make(5).to(kernel_device).train(training)
            expected = Unfused(make(5)).train(training)


def test_v_starts_and_resets_to_v_reset(kernel_device):
    d = Dynamics(2.0, True, 1.0, -0.25, False)
    layer = make(5, d).to(kernel_device)
    assert layer.v == -0.25
    layer(input_current((3, 4, 5, 6)).to(kernel_device))
    layer.reset()
    assert layer.v == -0.25


def test_a_second_call_goes_on_from_v(kernel_device, fused_calls):
    layer, expected = make(5).to(kernel_device), Unfused(make(5))
    for seed in range(3):
        x = input_current((2, 4, 5, 6), seed=seed)
        assert torch.equal(layer(x.to(kernel_device)).cpu(), expected(x))
        torch.testing.assert_close(layer.v.detach().cpu(), expected.node.v.detach(), rtol=1e-5, atol=1e-5)
    assert len(fused_calls) == 1


def test_gradients_do_not_cross_from_a_fused_call(kernel_device):
    layer = make(5).to(kernel_device)
    x = [input_current((2, 4, 5, 6), seed=seed).to(kernel_device).requires_grad_() for seed in range(2)]
    layer(x[0])
    layer(x[1]).sum().backward()
    assert x[0].grad is None and x[1].grad is not None


def test_a_v_that_was_set_is_where_it_starts(kernel_device, fused_calls):
    layer, expected = make(5).to(kernel_device), Unfused(make(5))
    layer.v = expected.node.v = 0.4
    x = input_current((2, 4, 5, 6))
    assert torch.equal(layer(x.to(kernel_device)).cpu(), expected(x))
    assert fused_calls == []


def test_an_input_changed_before_v_is_read_is_an_error(kernel_device):
    x = input_current((3, 4, 5, 6)).to(kernel_device)
    layer = make(5).to(kernel_device)
    layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place before its potential v was read; read v first"):
        layer.v  # noqa: B018
    layer.reset()
    layer(x)
    v = layer.v
    x.add_(1)
    assert layer.v is v
    layer.reset()
    layer(x)  # has been read once: written with the spikes from now on
    x.add_(1)
    assert layer.v.shape == (4, 5, 6)


def test_v_of_an_input_in_another_order_and_of_a_residual(kernel_device):
    """What computes the potential later gets x as it was given."""
    values, ones = input_current((3, 4, 5, 3, 4)).to(kernel_device), torch.ones(3, 4, 5, 3, 4, device=kernel_device)
    potentials = []
    for x in (values, laid_out(values, CHANNELS_LAST), LAYOUTS["width and height swapped"](values)):
        layer = make(5).to(kernel_device)
        layer(x, ones)
        potentials.append(layer.v)
    for v in potentials[1:]:
        torch.testing.assert_close(v, potentials[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("read_first", [True, False])
def test_copies_and_pickles(read_first, kernel_device):
    layer = make(5).to(kernel_device)
    layer.collect_statistics = True
    x = input_current((3, 4, 5, 6)).to(kernel_device)
    layer(x)
    if read_first:
        layer.v  # noqa: B018
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    for other in copies:
        assert torch.equal(other.v, layer.v)
        for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
        other.reset()
        spikes = other(x)
    layer.reset()
    assert torch.equal(layer(x), spikes)


# -------------------------------------------------------------------------------------------------- the unfused path


class Wave(nn.Module):
    """A surrogate that no kernel knows."""

    def forward(self, x):
        return Sigmoid(3.0)(x)


UNFUSED = {
    "one step a call": ({"step_mode": "s"}, torch.float32, 3),
    "store_v_seq": ({"store_v_seq": True}, torch.float32, 3),
    "float64": ({}, torch.float64, 3),
    "many steps": ({}, torch.float32, launch.MAX_STEPS + 1),
    "backend": ({"backend": "torch"}, torch.float32, 3),
    "surrogate": ({"surrogate_function": Wave()}, torch.float32, 3),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", UNFUSED)
@pytest.mark.filterwarnings("ignore:the surrogate Wave is not fused")
def test_unfused_path(case, training, kernel_device, fused_calls):
    """The same results as the two layers, wherever the kernels do not run."""
    options, dtype, steps = UNFUSED[case]
    layer = make(5, **options).to(kernel_device, dtype).train(training)
    two = Unfused(make(5, **options)).to(kernel_device, dtype).train(training)
    layer.collect_statistics = True
    values = input_current((steps, 3, 5, 4), dtype).to(kernel_device)
    factor = torch.randn(values.shape, generator=torch.Generator().manual_seed(3)).to(kernel_device, dtype)
    residual = torch.ones_like(values)
    results = []
    for module in (layer, two):
        x = values.clone().requires_grad_()
        single = options.get("step_mode") == "s"
        out = torch.stack([module(a, b) for a, b in zip(x, residual)]) if single else module(x, residual)
        (out * factor).sum().backward()
        node, norm = (module, module) if module is layer else (module.node, module.norm)
        results.append((out.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_var, node.v.detach()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert fused_calls == []
    assert len(layer.energies) == (steps if single else 1) and (layer.energies[0].delta > 0).all()
    assert (layer.v_seq is not None) == layer.store_v_seq
    if layer.store_v_seq:
        assert layer.v_seq.shape == values.shape


def test_unfused_residual_of_another_dtype(kernel_device, fused_calls):
    layer = make(5).to(kernel_device)
    x = input_current((3, 4, 5, 6), torch.bfloat16).to(kernel_device)
    out = layer(x, torch.ones(3, 4, 5, 6, device=kernel_device))
    assert out.dtype == torch.float32 and fused_calls == [] and out.min() >= 1 and out.max() == 2


@pytest.mark.parametrize("surrogate", ["Sigmoid", "ATan"])
def test_surrogates_of_spikingjelly(surrogate, kernel_device, fused_calls):
    theirs = pytest.importorskip("spikingjelly.activation_based.surrogate")
    grads = []
    for function in (getattr(theirs, surrogate)(alpha=2), FUSED[0 if surrogate == "Sigmoid" else 1](2.0)):
        forget_launches()  # an integer alpha and the same float are one key
        layer = make(5, surrogate_function=function).to(kernel_device)
        x = input_current((3, 4, 5, 6)).to(kernel_device).requires_grad_()
        layer(x).sum().backward()
        grads.append(x.grad)
    assert len(fused_calls) == 2
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 0, 5, 4), (3, 2, 5, 0)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_empty(shape, training, kernel_device, fused_calls):
    """No elements: what the two layers make of it."""
    x = torch.zeros(shape, device=kernel_device, requires_grad=True)
    layer, two = make(5).to(kernel_device).train(training), Unfused(make(5)).to(kernel_device).train(training)
    out, expected = layer(x), two(x)
    assert out.shape == expected.shape == shape and fused_calls == []
    out.sum().backward()
    assert x.grad.shape == shape


# ------------------------------------------------------------------------------------------------------ as a module


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine, tracks", [(True, True), (False, True), (True, False), (False, False)])
def test_state_dict_is_that_of_batch_norm(affine, tracks, momentum):
    norm = nn.BatchNorm2d(5, 1e-3, momentum, affine, tracks)
    norm(torch.randn(2, 5, 3, 3))
    for cls in (BatchNormLIF, BatchNormIF):
        layer = cls(5, 1e-3, momentum, affine, tracks)
        assert list(layer.state_dict()) == list(norm.state_dict())
        for (name, a), b in zip(layer.state_dict().items(), nn.BatchNorm2d(5, affine=affine).state_dict().values()):
            assert a.dtype == b.dtype and torch.equal(a, b), name
        layer.load_state_dict(norm.state_dict())
        for a, b in zip(layer.state_dict().values(), norm.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        norm.load_state_dict(layer.state_dict())
        assert (layer.eps, layer.momentum, layer.affine, layer.track_running_stats) == (1e-3, momentum, affine, tracks)


def test_loaded_weights_are_used(kernel_device):
    """Loading writes into the tensors that the kernels get."""
    layer = make(5).to(kernel_device).eval()
    x = input_current((3, 4, 5, 6)).to(kernel_device)
    first = layer(x)
    layer.load_state_dict({name: value * 0.1 for name, value in layer.state_dict().items()})
    layer.reset()
    assert not torch.equal(layer(x), first)


def test_repr_names_both_halves():
    assert repr(BatchNormLIF(8, momentum=None, tau=3.0)).startswith(
        "BatchNormLIF(\n  8, eps=1e-05, momentum=None, affine=True, track_running_stats=True, v_threshold=1.0, "
        "v_reset=0.0, detach_reset=False, step_mode=m, backend=None, tau=3.0, decay_input=True"
    )
    assert "tau" not in repr(BatchNormIF(8)) and "8, eps=1e-05" in repr(BatchNormIF(8))


def test_defaults_are_those_of_the_two_layers():
    layer, norm = BatchNormLIF(3), nn.BatchNorm2d(3)
    assert (layer.eps, layer.momentum) == (norm.eps, norm.momentum) and layer.step_mode == "m"
    assert isinstance(layer.surrogate_function, Sigmoid) and (layer.tau, layer.v_threshold) == (2.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_layer_in_another_dtype_runs_unfused(dtype, kernel_device, fused_calls):
    layer = make(5).to(kernel_device)
    layer(input_current((3, 4, 5, 6)).to(kernel_device))
    layer.to(dtype)
    assert layer.weight.dtype == layer.running_var.dtype == dtype and layer.num_batches_tracked.dtype == torch.int64
    layer.reset()
    x = input_current((3, 4, 5, 6), dtype).to(kernel_device).requires_grad_()
    out = layer(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype and len(fused_calls) == 1


def test_half_and_float(kernel_device):
    layer = make(5).to(kernel_device)
    layer(input_current((3, 4, 5, 6)).to(kernel_device))
    assert layer.half().v.dtype == layer.weight.dtype == torch.float16
    layer = layer.float()
    layer.reset()
    layer(input_current((3, 4, 5, 6), torch.float16).to(kernel_device)).sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_convert_sync_batchnorm_leaves_it_alone(kernel_device):
    """Documented: it normalises by its own rank's statistics."""
    model = nn.Sequential(nn.BatchNorm2d(5), make(5))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[0], nn.SyncBatchNorm) and converted[1] is model[1]
    assert isinstance(converted[1], BatchNormLIF) and "SyncBatchNorm" in BatchNormLIF.__doc__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast(backend, dtype, kernel_device, fused_calls):
    """Half-precision current of a linear layer, float32 statistics and weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), make(5, backend=backend), nn.Linear(5, 2)).to(kernel_device)
    seen = []
    model[1].register_forward_hook(lambda _, args, out: seen.extend([args[0].dtype, out.dtype]))
    with torch.autocast(kernel_device, dtype):
        loss = model(input_current((4, 3, 6)).to(kernel_device)).float().square().sum()
    loss.backward()
    assert seen == [dtype, dtype] and model[1].v.dtype == torch.float32
    assert len(fused_calls) == (backend == "triton")
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0 or name == "0.bias", name  # a normalisation takes biases away


@pytest.mark.parametrize("training", [True, False])
def test_compiled_by_dynamo(training, kernel_device):
    """Traced whole (the unfused path); the same results."""
    torch._dynamo.reset()
    backend = "triton" if ON_GPU else None
    eager, other = (make(5, backend=backend).to(kernel_device).train(training) for _ in range(2))
    run_other = torch.compile(other, backend="eager", fullgraph=True)
    residual = torch.ones(3, 4, 5, 6, device=kernel_device)
    for call in range(2):
        results = []
        for function in (eager, run_other):
            x = input_current((3, 4, 5, 6), seed=call).to(kernel_device).requires_grad_()
            out = function(x, residual)
            out.sum().backward()
            results.append((out.detach(), x.grad))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-6)
        eager.reset()
        other.reset()
    for a, b in zip(eager.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_marks_for_packed_spikes(backend, kernel_device):
    """The greatest value is promised where all that is added has promised its own."""
    layer = make(5, backend=backend).to(kernel_device)
    x = input_current((3, 4, 5, 6)).to(kernel_device)
    assert max_count(layer(x)) == 1
    layer.reset()
    assert max_count(layer(x[0], repeat=3)) == 1
    layer.reset()
    assert max_count(layer(x, torch.ones_like(x))) is None
    layer.reset()
    assert max_count(layer(x, mark(torch.full_like(x, 2.0), 2))) == 3
    layer.reset()
    layer.step_mode = "s"
    assert max_count(layer(x[0])) == 1


def test_packed_spikes_keeps_bits_behind_it(kernel_device):
    layer, linear = make(5).to(kernel_device), nn.Linear(6, 7).to(kernel_device)
    x = input_current((3, 4, 5, 6)).to(kernel_device)
    grads = []
    for packs in (True, False):
        linear.zero_grad()
        layer.reset()
        x_in = x.clone().requires_grad_()
        if packs:
            with packed_spikes():
                loss = linear(layer(x_in)).square().sum()
        else:
            loss = linear(layer(x_in)).square().sum()
        loss.backward()
        grads.append((x_in.grad, linear.weight.grad.clone()))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((3, 4), {}, r"x must be \[T, N, C, \*\] with C = 5 channels, got shape \(3, 4\)"),
        ((3, 4, 6), {}, r"x must be \[T, N, C, \*\] with C = 5 channels, got shape \(3, 4, 6\)"),
        ((4, 6), {"repeat": 2}, r"x must be \[N, C, \*\] with C = 5 channels, got shape \(4, 6\)"),
        ((4, 5), {"repeat": 0}, r"repeat must be at least 1 and needs step_mode='m', got 0 in 'm'"),
        ((3, 4, 5), {"residual": (3, 4, 6)}, r"residual must have the output's shape \(3, 4, 5\), got \(3, 4, 6\)"),
        ((4, 5), {"residual": (4, 5), "repeat": 2}, r"residual must have .*\(2, 4, 5\), got \(4, 5\)"),
        (
            (1, 1, 5, 1),
            {},
            r"statistics of the batch need more than one value per channel, got x of shape \(1, 1, 5, 1\)",
        ),
        ((1, 5), {"repeat": 4}, r"more than one value per channel, got x of shape \(1, 5\)"),
    ],
)
def test_refusals(shape, options, message, backend, kernel_device):
    layer = make(5, backend=backend).to(kernel_device)
    if "residual" in options:
        options = options | {"residual": torch.zeros(options["residual"], device=kernel_device)}
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape, device=kernel_device), **options)
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), before.values(), strict=True))


def test_refusals_in_step_mode_s(kernel_device):
    layer = make(5, step_mode="s").to(kernel_device)
    with pytest.raises(ValueError, match=r"x must be \[N, C, \*\] with C = 5 channels, got shape \(5,\)"):
        layer(torch.zeros(5, device=kernel_device))
    with pytest.raises(ValueError, match="needs step_mode='m', got 2 in 's'"):
        layer(torch.zeros(4, 5, device=kernel_device), repeat=2)


def test_one_value_per_channel_is_refused_wherever_it_is_normalised_by_itself(kernel_device):
    x = torch.zeros(1, 1, 5, device=kernel_device)
    assert make(5).to(kernel_device).eval()(x).shape == (1, 1, 5)
    for backend in ("triton", "torch"):
        layer = make(5, track_running_stats=False, backend=backend).to(kernel_device).eval()
        with pytest.raises(ValueError, match="more than one value per channel"):
            layer(x)


@pytest.mark.parametrize("cls", [BatchNormLIF, BatchNormIF])
def test_refusals_of_the_constructor(cls):
    with pytest.raises(ValueError, match="num_features must be the number of channels, at least 1, got 0"):
        cls(0)
    with pytest.raises(TypeError, match="v_threshold must be a float"):
        cls(3, v_threshold=1)
    with pytest.raises(ValueError, match="step_mode must be"):
        cls(3, step_mode="x")
    with pytest.raises(ValueError, match="backend must be one of"):
        cls(3, backend="numpy")


def test_no_kernels_where_there_are_none(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="backend='triton' needs a CUDA tensor"):
        make(5)(input_current((3, 4, 5)))


# --------------------------------------------------------------------------------------------------- large and again


@pytest.mark.parametrize(
    "shape", [(4, 5, 30, 9, 7), pytest.param((4, 128, 96, 33, 31), marks=pytest.mark.gpu)], ids=str
)
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
def test_deterministic(shape, layout, kernel_device):
    """Two runs, the same bits."""
    x = laid_out(input_current(shape), layout)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    results = [run(make(shape[2]), x, None, None, upstream, kernel_device) for _ in range(2)]
    for a, b in zip(*results, strict=True):
        for one, other in zip(
            *(t.values() if isinstance(t, dict) else [t] if isinstance(t, Tensor) else t or [] for t in (a, b))
        ):
            assert torch.equal(one, other)
    assert torch.isfinite(results[0].energies[1]).all()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
def test_more_than_two_to_the_31_elements(layout):
    """Offsets past 2^31 elements: some examples against the oracle, given what the sums over all came to."""
    needed = 32 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    steps, examples, channels, side = 4, 132, 64, 256
    assert steps * examples * channels * side**2 > 2**31
    torch.manual_seed(0)
    x = torch.empty(steps, examples, channels, side, side, dtype=torch.bfloat16, device="cuda")
    x = x if layout == CONTIGUOUS else x.reshape(steps, examples, side, side, channels).permute(0, 1, 4, 2, 3)
    x.normal_(0.5, 1.5).requires_grad_()
    layer = make(channels, momentum=1.0).to("cuda")
    layer.collect_statistics = True
    out = layer(x)
    upstream = torch.randn(channels, side, side, device="cuda").bfloat16().expand_as(out)
    out.backward(upstream)
    assert out.stride() == x.stride() == x.grad.stride()
    values = torch.stack([part.double().sum((0, 1, 3, 4)) for part in x.detach().split(4, 1)])
    squares = torch.stack([part.double().square().sum((0, 1, 3, 4)) for part in x.detach().split(4, 1)])
    count = x.numel() // channels
    mean = values.sum(0) / count
    variance = squares.sum(0) / count - mean.square()
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), variance * count / (count - 1), rtol=1e-5, atol=0)
    # Given what the sums over all examples came to, each example's gradient is its own.
    gain = layer.weight.detach().double() / torch.sqrt(variance + layer.eps)
    product = layer.weight.grad.double() * torch.sqrt(variance + layer.eps)
    for n in (0, 1, 65, examples - 1):
        part = x.detach()[:, n : n + 1].double()
        deviation = part - mean.reshape(-1, 1, 1)
        y = deviation * gain.reshape(-1, 1, 1) + layer.bias.detach().double().reshape(-1, 1, 1)
        truth = oracle_forward(y, torch.zeros_like(y[0]), LIF, SIGMOID, 4.0)
        zeros = torch.zeros_like(y)
        grad_y, _ = oracle_backward(truth, LIF, SIGMOID, 4.0, upstream[:, n : n + 1].double(), zeros[0], zeros)
        assert torch.equal(out[:, n : n + 1].double() * truth.clear, truth.spikes * truth.clear)
        indirect = deviation * (product / (variance + layer.eps)).reshape(-1, 1, 1)
        indirect = (indirect + layer.bias.grad.double().reshape(-1, 1, 1)) / count
        expected = (grad_y - indirect) * gain.reshape(-1, 1, 1) * truth.clear
        torch.testing.assert_close(x.grad[:, n : n + 1].double() * truth.clear, expected, rtol=1e-2, atol=1e-4)
        delta = (grad_y * gain.reshape(-1, 1, 1)).square().sum()
        torch.testing.assert_close(layer.energies[0].delta[n].double(), delta, rtol=1e-3, atol=0)
        assert layer.energies[0].output[n] == out[:, n].sum(dtype=torch.float32)
