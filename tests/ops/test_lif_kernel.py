"""The fused operator against a float64 oracle and against the plain torch reference.

The oracle below is a third, independent statement of the neuron: the step equations and the hand-derived backward
pass, in double precision. Criterion for gradients (after apple/ml-cross-entropy): the error of the fused pass against
the oracle may not exceed the error of plain torch in the same dtype plus a small tolerance. Criterion for spikes: bit
for bit those of the reference on the CPU, and those of the oracle wherever its potential is not within MARGIN of the
threshold. A neuron that comes so near has no incoming gradient in these tests, since one other spike is another
gradient altogether.

On a machine without a GPU the kernels run in Triton's interpreter, about 10 ms a program, so the shapes are small;
on a GPU larger ones are added.
"""

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sadp_fast import LIFNode
from sadp_fast.ops.common.dynamics import Dynamics
from sadp_fast.ops.lif import configuration
from sadp_fast.ops.lif import launch as lif_launch
from sadp_fast.ops.lif import reference as reference
from sadp_fast.ops.lif.op import lif
from sadp_fast.surrogate import FUSED, ATan

CHUNK = 8  # steps of a chunk in these tests: several chunks without many steps, which the interpreter is slow at
MARGIN = 1e-4
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ON_GPU = torch.cuda.is_available()

LIF = Dynamics(tau=2.0, decay_input=True, v_threshold=1.0, v_reset=0.0, detach_reset=False)
SIGMOID, ATAN, RECT = 0, 1, 7


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch, request):
    if "real_chunks" not in request.fixturenames:
        monkeypatch.setattr(configuration, "LONGEST_CHUNK", {4: CHUNK, 2: CHUNK})
    for plans in (lif_launch._forward_plans, lif_launch._backward_plans):
        plans.clear()


@pytest.fixture
def real_chunks():
    """Marks a test that runs with the chunks that users get."""


@pytest.fixture(params=["recursion", "tile"])
def walk(request, monkeypatch):
    """Both ways to walk a chunk, whichever is chosen for the case, on a GPU too large for it."""
    monkeypatch.setattr(configuration, "multiprocessors", lambda device: 10**6)
    tuned = configuration.Tuning(elements=1, warps=1, tile=request.param == "tile", call_ahead=1)
    monkeypatch.setattr(configuration, "TUNING", {key: ((math.inf, tuned),) for key in configuration.TUNING})
    return request.param


def shapes(small, large=()):
    """The parameters of a test: small shapes everywhere, large ones too where the kernels run on a GPU."""
    return [*small, *(large if ON_GPU else ())]


# ----------------------------------------------------------------------------------------------------- the oracle


def surrogate_gradient(u: Tensor, index: int, alpha: float) -> Tensor:
    a, name = alpha, FUSED[index].__name__
    if name == "Sigmoid":
        return a * torch.sigmoid(a * u) * torch.sigmoid(-a * u)
    if name == "ATan":
        return a / 2 / (1 + (math.pi / 2 * a * u) ** 2)
    if name == "PiecewiseQuadratic":
        return torch.relu(a - a * a * u.abs())
    if name == "PiecewiseExp":
        return a / 2 * torch.exp(-a * u.abs())
    if name == "SoftSign":
        return 1 / (2 * a * (1 / a + u.abs()) ** 2)
    if name == "SuperSpike":
        return a / (1 + u.abs()) ** 2
    if name == "Erf":
        return a / math.sqrt(math.pi) * torch.exp(-((a * u) ** 2))
    assert name == "Rect"
    return torch.where(u.abs() < 0.5 / a, a, 0.0)


class Truth(NamedTuple):
    spikes: Tensor
    v_seq: Tensor
    h: Tensor
    clear: Tensor  # [N, *], neurons that never come within MARGIN of a discontinuity


def oracle_forward(x: Tensor, v: Tensor, d: Dynamics, index: int, alpha: float) -> Truth:
    x, v = x.double(), v.double()
    spikes, v_seq, h_seq = [], [], []
    for current in x:
        if d.tau is None:
            h = v + current
        elif d.decay_input:
            h = v + (current - (v - d.v_rest)) / d.tau
        else:
            h = v - (v - d.v_rest) / d.tau + current
        s = (h >= d.v_threshold).double()
        v = h - s * d.v_threshold if d.v_reset is None else torch.where(s == 1, d.v_reset, h)
        for sequence, value in zip((spikes, v_seq, h_seq), (s, v, h), strict=True):
            sequence.append(value)
    h = torch.stack(h_seq)
    distance = (h - d.v_threshold).abs()
    clear = (distance > MARGIN).all(0)
    if index == RECT:
        clear &= ((distance - 0.5 / alpha).abs() > MARGIN).all(0)
    return Truth(torch.stack(spikes), torch.stack(v_seq), h, clear)


def oracle_backward(
    truth: Truth, d: Dynamics, index: int, alpha: float, g_spikes: Tensor, g_v: Tensor, g_v_seq: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x [T, N, *] and to the initial potential [N, *]."""
    carry = g_v.double()
    grad_x = torch.empty_like(truth.h)
    for t in reversed(range(len(truth.h))):
        h, s = truth.h[t], truth.spikes[t]
        sg = surrogate_gradient(h - d.v_threshold, index, alpha)
        reset_sg = 0.0 if d.detach_reset else sg
        dv_dh = 1 - d.v_threshold * reset_sg if d.v_reset is None else (1 - s) + (d.v_reset - h) * reset_sg
        g_h = g_spikes[t].double() * sg + (g_v_seq[t].double() + carry) * dv_dh
        grad_x[t] = g_h / d.tau if d.tau is not None and d.decay_input else g_h
        carry = g_h if d.tau is None else g_h * (1 - 1 / d.tau)
    return grad_x, carry


def tau_products(truth: Truth, d: Dynamics, x: Tensor, v: Tensor, grad_x: Tensor) -> Tensor:
    """What the gradient with respect to 1 / tau is the sum of, [T, N, *]: dL/dh dh/d(1/tau)."""
    grad_h = grad_x * d.tau if d.decay_input else grad_x
    v_before = torch.cat([v.double().unsqueeze(0), truth.v_seq[:-1]])
    return grad_h * ((x.double() if d.decay_input else 0.0) - (v_before - d.v_rest))


def reciprocal_tau(d: Dynamics, device: str) -> Tensor | None:
    return torch.tensor(1 / d.tau, device=device, requires_grad=True) if d.learned_tau else None


def assert_sum_no_less_exact(fused: Tensor, plain: Tensor, products: Tensor, what: str) -> None:
    """The criterion for one number, the sum of ``products``; its rounding errors are relative to their size."""
    truth, tolerance = products.sum(), 2e-6 * products.abs().sum() + 1e-9
    assert (fused.double() - truth).abs() <= (plain.double() - truth).abs() + tolerance, what
    assert (plain.double() - truth).abs() <= 10 * tolerance, what


def assert_norms_close(fused: Tensor, truth: Tensor) -> None:
    # The kernel sums the squares of gradients before they are rounded to the tensor's dtype, so one bound serves all.
    torch.testing.assert_close(fused.double(), truth, rtol=2e-5, atol=1e-6 * truth.max().item())


def norm_sq_per_example(g: Tensor) -> Tensor:
    return g.double().square().reshape(*g.shape[:2], -1).sum(-1)


# ------------------------------------------------------------------------------------------------------- one check


def current(shape, dtype, seed=0) -> Tensor:
    """Input that makes between a tenth and a half of the neurons fire."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 1.5 + 0.5).to(dtype)


def upstream(shape, clear: Tensor, seed: int, dtype=torch.float32) -> Tensor:
    """A random incoming gradient, zero for neurons that are not clear."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * clear).to(dtype)


def leaf(t: Tensor, device) -> Tensor:
    """A copy on the device with the same strides that wants a gradient."""
    copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    return copy.copy_(t).requires_grad_()


class Result(NamedTuple):
    spikes: Tensor
    v: Tensor
    v_seq: Tensor
    grad_x: Tensor
    grad_v_init: Tensor | None
    grad_reciprocal_tau: Tensor | None
    spike_count: Tensor
    grad_norm_sq: Tensor


def run_fused(x, v, d, index, alpha, grads, device, channel_scale=None) -> Result:
    x = leaf(x, device) if x.is_leaf else x
    v = leaf(v, device) if isinstance(v, Tensor) else v
    grad_norm_sq = torch.full(x.shape[:2], torch.nan, device=device)
    tau = reciprocal_tau(d, device)
    spikes, v_final, v_seq, spike_count = lif(
        x,
        v,
        d,
        index,
        alpha,
        reciprocal_tau=tau,
        store_v_seq=True,
        count_spikes=True,
        grad_norm_sq=grad_norm_sq,
        channel_scale=None if channel_scale is None else channel_scale.to(device),
    )
    torch.autograd.backward((spikes, v_final, v_seq), [g.to(device) for g in grads])
    grad_v = v.grad.cpu() if isinstance(v, Tensor) else None
    grad_tau = None if tau is None else tau.grad.cpu()
    outputs = [t.detach().cpu() for t in (spikes, v_final, v_seq)]
    return Result(*outputs, x.grad.cpu(), grad_v, grad_tau, spike_count.cpu(), grad_norm_sq.cpu())


def run_reference(x, v, d, index, alpha, grads) -> Result:
    """Plain torch on the CPU, float32 state: the float32 and half-precision specification."""
    x = leaf(x, "cpu")
    v_init = leaf(v, "cpu") if isinstance(v, Tensor) else torch.full(x.shape[1:], v, dtype=torch.float32)
    tapped = reference.GradientNormTap.apply(x, buffer := torch.full(x.shape[:2], torch.nan), None)
    tau = reciprocal_tau(d, "cpu")
    spikes, v_final, v_seq = reference.multi_step(tapped, v_init, d, FUSED[index](alpha), True, tau)
    torch.autograd.backward((spikes, v_final, v_seq), list(grads))
    outputs, grad_tau = [t.detach() for t in (spikes, v_final, v_seq)], None if tau is None else tau.grad
    return Result(*outputs, x.grad, v_init.grad, grad_tau, reference.spike_count(spikes), buffer)


def assert_no_less_exact(fused: Tensor, plain: Tensor, truth: Tensor, what: str, device: str) -> None:
    """The criterion for gradients, in the largest and in the root-mean-square error."""
    assert fused.shape == truth.shape, what
    fused_error, plain_error = (fused.double() - truth).abs(), (plain.double() - truth).abs()
    tolerance = 5e-6 * truth.abs().max().item() + 1e-7
    if fused.dtype == torch.bfloat16 and device == "cpu":
        # Triton's interpreter cuts float32 to bfloat16 instead of rounding: up to one unit in the last place.
        assert (fused_error <= 2**-7 * truth.abs() + tolerance).all(), what
    else:
        assert fused_error.max() <= plain_error.max() + tolerance, what
        assert fused_error.square().mean().sqrt() <= plain_error.square().mean().sqrt() + tolerance, what
    # Plain torch itself has to be near the truth, or the comparison says nothing.
    unit = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[plain.dtype]
    assert plain_error.max() <= unit * truth.abs().max() + 1e-6, what


def check(
    shape,
    dtype,
    d=LIF,
    index=SIGMOID,
    alpha=4.0,
    *,
    v=0.0,
    x=None,
    device="cpu",
    flows=(True, True, True),
    seed=0,
    representative=True,
) -> tuple[Result, Truth]:
    """Run oracle, reference and fused operator on one case, forward and backward, and compare everything.

    ``flows`` says through which of spikes, final v and v_seq a gradient comes in, ``representative`` whether the case
    is one in which some neurons fire, some do not, and few come near the threshold.
    """
    x = current(shape, dtype, seed) if x is None else x
    v_tensor = v if isinstance(v, Tensor) else torch.full(x.shape[1:], v)
    truth = oracle_forward(x, v_tensor, d, index, alpha)
    if representative and x.numel() >= 100:
        assert truth.clear.double().mean() > 0.9
        assert 0.02 < truth.spikes.mean() < 0.98
    scales = [float(flow) for flow in flows]
    grads = (
        upstream(x.shape, truth.clear, seed + 1, dtype) * scales[0],
        upstream(x.shape[1:], truth.clear, seed + 2) * scales[1],
        upstream(x.shape, truth.clear, seed + 3) * scales[2],
    )
    grad_x, grad_v_init = oracle_backward(truth, d, index, alpha, *grads)

    plain = run_reference(x, v, d, index, alpha, grads)
    fused = run_fused(x, v, d, index, alpha, grads, device)

    assert (fused.spikes.dtype, fused.grad_x.dtype) == (dtype, dtype)
    assert (fused.v.dtype, fused.v_seq.dtype) == (torch.float32, torch.float32)
    for name in ("spikes", "v", "v_seq", "spike_count"):
        assert torch.equal(getattr(fused, name), getattr(plain, name)), name
    assert torch.equal((fused.spikes.double() * truth.clear), truth.spikes * truth.clear)
    assert_no_less_exact(
        fused.v_seq * truth.clear, plain.v_seq * truth.clear, truth.v_seq * truth.clear, "v_seq", device
    )
    assert_no_less_exact(fused.grad_x, plain.grad_x, grad_x, "grad_x", device)
    if isinstance(v, Tensor):
        assert_no_less_exact(fused.grad_v_init, plain.grad_v_init, grad_v_init, "grad_v_init", device)
    if d.learned_tau:
        products = tau_products(truth, d, x, v_tensor, grad_x)
        assert_sum_no_less_exact(fused.grad_reciprocal_tau, plain.grad_reciprocal_tau, products, "grad_reciprocal_tau")
    assert_norms_close(fused.grad_norm_sq, norm_sq_per_example(grad_x))
    return fused, truth


# ---------------------------------------------------------------------------------------------------- the test grid


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 4, 7, CHUNK, CHUNK + 1, 2 * CHUNK + 1, 3 * CHUNK])
def test_steps_and_dtypes(steps, dtype, walk, kernel_device):
    """Every way that T falls into chunks, with an initial potential, every output used."""
    shape = (steps, *((2, 9, 5) if not ON_GPU else (16, 64, 14, 14)))
    v = torch.randn(shape[1:], generator=torch.Generator().manual_seed(9)) * 0.4
    check(shape, dtype, v=v, device=kernel_device)


NEURONS = [
    Dynamics(tau, decay_input, 0.8, v_reset, detach_reset)
    for (tau, decay_input), v_reset, detach_reset in itertools.product(
        [(None, False), (2.0, True), (2.0, False), (3.0, True), (3.0, False)], [0.0, -0.3, 0.2, None], [False, True]
    )
]
NEURONS += [
    Dynamics(1.7, decay_input, 0.8, v_reset, detach_reset, learned_tau=True)
    for decay_input, v_reset, detach_reset in itertools.product([True, False], [-0.3, None], [False, True])
]
PLIF = replace(LIF, tau=1.7, learned_tau=True)


@pytest.mark.parametrize("dynamics", NEURONS, ids=str)
def test_dynamics(dynamics, walk, kernel_device):
    v = torch.randn(2, 40, generator=torch.Generator().manual_seed(3)) * 0.3
    check((4, 2, 40), torch.float32, dynamics, ATAN, 2.0, v=v, device=kernel_device)


@pytest.mark.parametrize("dynamics", [d for d in NEURONS if d.tau != 2.0 and not d.detach_reset], ids=str)
def test_dynamics_over_several_chunks_in_bfloat16(dynamics, kernel_device):
    check((2 * CHUNK + 1, 1, 33), torch.bfloat16, dynamics, ATAN, 2.0, v=dynamics.v_rest, device=kernel_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [1, CHUNK + 1])
@pytest.mark.parametrize("decay_input", [True, False])
def test_learned_tau(decay_input, steps, dtype, walk, kernel_device):
    """Its gradient from whole and ragged chunks, several programs, an initial potential, and every output."""
    shape = (steps, 2, 150) if not ON_GPU else (steps, 16, 64, 15, 15)
    v = torch.randn(shape[1:], generator=torch.Generator().manual_seed(9)) * 0.4
    check(shape, dtype, replace(PLIF, decay_input=decay_input), v=v, device=kernel_device)


def test_the_gradient_of_tau_alone(kernel_device):
    """x and v want none; and where tau wants none, none is computed."""
    x, d = current((3, 2, 40), torch.float32), PLIF
    products = []
    for wants in (True, False):
        tau = torch.tensor(1 / d.tau, device=kernel_device, requires_grad=wants)
        x_in = leaf(x, kernel_device).requires_grad_(not wants)
        spikes, _, _, _ = lif(x_in, 0.0, d, SIGMOID, 4.0, reciprocal_tau=tau)
        spikes.sum().backward()
        products.append(tau.grad)
    truth = oracle_forward(x, torch.zeros(x.shape[1:]), d, SIGMOID, 4.0)
    ones, zeros = torch.ones_like(x), torch.zeros_like(x)
    grad_x, _ = oracle_backward(truth, d, SIGMOID, 4.0, ones, zeros[0], zeros)
    torch.testing.assert_close(
        products[0].cpu().double(), tau_products(truth, d, x, zeros[0], grad_x).sum(), rtol=1e-5, atol=0
    )
    assert products[1] is None


@pytest.mark.parametrize("decay_input", [True, False])
def test_spikes_with_a_learned_tau_do_not_flip_near_the_threshold(decay_input, kernel_device):
    """The product with 1 / tau is rounded before the sum, as the reference and SpikingJelly do."""
    tau = torch.tensor(0.3)
    scale = 1 / 0.3 if decay_input else 1.0
    nearby = 1 + torch.arange(-256, 256) * 2.0**-24
    x = scale * torch.stack([torch.full((512,), 0.3), nearby - 0.3 * 0.7, nearby]).reshape(3, 1, 512)
    d = replace(PLIF, decay_input=decay_input)
    expected = reference.multi_step(x, torch.zeros(1, 512), d, FUSED[SIGMOID](), True, tau)
    on_device = (x.to(kernel_device), 0.0, d, SIGMOID, 4.0)
    found = lif(*on_device, reciprocal_tau=tau.to(kernel_device), store_v_seq=True)
    assert 0.1 < expected[0][1:].mean() < 0.9
    for name, want, got in zip(("spikes", "v", "v_seq"), expected, found, strict=False):
        assert torch.equal(got.cpu(), want), name


@pytest.mark.parametrize("tau", [torch.ones(1), torch.tensor(0.5, dtype=torch.float64)], ids=["shape", "dtype"])
def test_a_reciprocal_tau_of_another_kind_is_refused(tau, kernel_device):
    with pytest.raises(ValueError, match="must be one float32 number on"):
        lif(torch.zeros(1, 1, 1, device=kernel_device), 0.0, PLIF, SIGMOID, 4.0, reciprocal_tau=tau.to(kernel_device))


@pytest.mark.parametrize("d, tau", [(PLIF, None), (LIF, torch.tensor(0.5))], ids=["missing", "without use"])
def test_a_reciprocal_tau_belongs_to_a_learned_tau(d, tau, kernel_device):
    tau, x = None if tau is None else tau.to(kernel_device), torch.zeros(1, 1, 1, device=kernel_device)
    with pytest.raises(ValueError, match="if and only if tau is learned"):
        lif(x, 0.0, d, SIGMOID, 4.0, reciprocal_tau=tau)
    with pytest.raises(ValueError, match="if and only if tau is learned"):
        reference.multi_step(x, torch.zeros_like(x[0]), d, FUSED[SIGMOID](), reciprocal_tau=tau)


@pytest.mark.parametrize("alpha", [None, 0.6, 2.5])
@pytest.mark.parametrize("index", range(len(FUSED)), ids=[cls.__name__ for cls in FUSED])
def test_surrogates(index, alpha, kernel_device):
    alpha = FUSED[index]().alpha if alpha is None else alpha
    fused, _ = check((3, 2, 50), torch.float32, LIF, index, alpha, device=kernel_device)
    assert (fused.grad_x != 0).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "inner",
    shapes(
        [(5, 3, 7, 1), (1, 1), (2,), (1,), (3, 130), (1, 1025), (2, 2, 23, 25), (2, 1024), (33, 1)],
        [(64, 64, 56, 56), (7, 1_000_003), (100_000, 3), (32, 128, 28, 28)],
    ),
    ids=str,
)
def test_shapes(inner, dtype, kernel_device):
    """Odd sizes, sizes over one block, whole blocks, an example of one element."""
    check((3, *inner), dtype, device=kernel_device)


@pytest.mark.parametrize("v", [0.7, -0.25, 1.5, "tensor"])
@pytest.mark.parametrize("steps", [1, CHUNK + 2])
def test_initial_potential(v, steps, kernel_device):
    v = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(5)) if v == "tensor" else v
    check((steps, 2, 3, 5), torch.float32, v=v, device=kernel_device)


def test_threshold_is_reached_at_equality(kernel_device):
    """h - v_threshold = 0 fires, in the backward pass's own walk too; the next float below does not."""
    one, zero, two = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(2.0)
    below, above = torch.nextafter(one, zero), torch.nextafter(one, two)
    x = torch.stack([one, below, above]).reshape(1, 1, 3)
    neuron = Dynamics(None, False, 1.0, 0.0, True)
    x_in = leaf(x, kernel_device)
    spikes, v, _, _ = lif(x_in, 0.0, neuron, SIGMOID, 4.0)
    assert spikes.flatten().tolist() == [1.0, 0.0, 1.0]
    assert v.flatten().tolist() == [0.0, below.item(), 0.0]
    v.sum().backward()  # a detached hard reset lets the gradient through where no spike was
    assert x_in.grad.flatten().tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("tau", [2.0, 3.0, 1.1, 7.3])
@pytest.mark.parametrize("decay_input", [True, False])
def test_spikes_do_not_flip_near_the_threshold(tau, decay_input, kernel_device):
    """Inputs within some float32 steps of the threshold, where an inexact division or a contraction would show."""
    scale = tau if decay_input else 1.0
    nearby = 1 + torch.arange(-256, 256) * 2.0**-24
    # The second step is aimed at h = 1 from a leaked 0.3, the third from v = 0 after a spike.
    x = scale * torch.stack([torch.full((512,), 0.3), nearby - 0.3 * (1 - 1 / tau), nearby]).reshape(3, 1, 512)
    d = Dynamics(tau, decay_input, 1.0, 0.0, False)
    expected = reference.multi_step(x, torch.zeros(1, 512), d, FUSED[SIGMOID](), store_v_seq=True)
    found = lif(x.to(kernel_device), 0.0, d, SIGMOID, 4.0, store_v_seq=True)
    assert 0.1 < expected[0][1:].mean() < 0.9
    for name, want, got in zip(("spikes", "v", "v_seq"), expected, found, strict=False):
        assert torch.equal(got.cpu(), want), name


@pytest.mark.parametrize("steps, dtype", [(17, torch.float32), (33, torch.float32), (33, torch.bfloat16)], ids=str)
def test_chunks_of_real_length(steps, dtype, real_chunks, kernel_device):
    """Lengths that do not divide into chunks; at most 1/16 of the input's bytes are saved beyond it."""
    check((steps, 1, 90), dtype, v=0.1, device=kernel_device)
    for t in range(1, 200):
        size = dtype.itemsize
        chunk = configuration.chunk_steps(t, size)
        checkpoints = -(-t // chunk) - 1
        assert 1 <= chunk <= configuration.LONGEST_CHUNK[size] and checkpoints * 4 * 16 <= t * size


# ------------------------------------------------------------------------------------------------- memory layouts


@pytest.mark.parametrize("steps", [3, 2 * CHUNK + 1])
@pytest.mark.parametrize("inner", ["channels last", "every other step"])
def test_what_was_saved_may_come_back_in_another_layout(inner, steps, kernel_device):
    """Offloading to the host, say, may give x back contiguous."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * steps, 2, 3, 4, 4, generator=generator).to(kernel_device)
    x = x[::2] if inner == "every other step" else x[:steps].movedim(2, -1).contiguous().movedim(-1, 2)
    g = torch.randn(x.shape, generator=generator).to(kernel_device)
    gradients = []
    for packed in (False, True):
        node = LIFNode(step_mode="m", surrogate_function=ATan(), backend="triton")
        leaf = x.detach().requires_grad_()
        assert leaf.stride() == x.stride()
        pack = (lambda t: t.contiguous().clone()) if packed else (lambda t: t)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            spikes = node(leaf)
        gradients += torch.autograd.grad(spikes, leaf, g)
    assert torch.equal(*gradients)


LAYOUTS = {
    "batch first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda t: t.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "batch first, channels last": lambda t: t.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3),
    "width and height swapped": lambda t: t.transpose(3, 4).contiguous().transpose(3, 4),
    "slice of the steps": lambda t: torch.cat([t, t, t])[1 : 2 * len(t) : 2],
    "slice of the examples": lambda t: torch.cat([t, t], 1)[:, 1 : 2 * t.shape[1] : 2],
    "slice of the channels": lambda t: torch.cat([t, t], 2)[:, :, 1 : 1 + t.shape[2]],
    "slice of the rows": lambda t: torch.cat([t, t], 4)[..., ::2],
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    "one example expanded": lambda t: t[:, :1].expand_as(t),
    "one step expanded": lambda t: t[:1].expand_as(t),
    "one channel expanded": lambda t: t[:, :, :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_of_x(layout, dtype, kernel_device):
    """A view gives what its contiguous copy gives, to the bit, forward and backward."""
    base = current((3, 2, 4, 3, 5) if not ON_GPU else (3, 8, 32, 15, 17), dtype).to(kernel_device)
    results = []
    for contiguous in (False, True):
        root = base.clone().requires_grad_()
        view = LAYOUTS[layout](root)
        x = view.contiguous() if contiguous else view
        norm = torch.full(x.shape[:2], torch.nan, device=kernel_device)
        spikes, v, v_seq, count = lif(x, 0.2, LIF, SIGMOID, 4.0, store_v_seq=True, count_spikes=True, grad_norm_sq=norm)
        weights = torch.arange(x.numel(), device=kernel_device).reshape(x.shape) % 7 - 3.0
        ((spikes * weights).sum() + (v * weights[0]).sum() + (v_seq * weights).sum()).backward()
        results.append((spikes, v, v_seq, count, root.grad, norm))
    view_results, copy_results = results
    names = ("spikes", "v", "v_seq", "spike_count", "grad")
    for name, a, b in zip(names, view_results, copy_results, strict=False):
        assert torch.equal(a, b), name
    torch.testing.assert_close(view_results[5], copy_results[5], rtol=1e-5, atol=0)


def test_channels_last_is_kept(kernel_device):
    x = LAYOUTS["channels last"](current((2, 2, 4, 3, 5), torch.float32)).to(kernel_device).requires_grad_()
    assert x[0].is_contiguous(memory_format=torch.channels_last)
    spikes, v, v_seq, _ = lif(x, 0.0, LIF, SIGMOID, 4.0, store_v_seq=True)
    assert spikes.stride() == v_seq.stride() == x.stride()
    assert v.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(spikes.sum(), x)
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (3, 1, 0, 2), (0, 3, 2, 1)])
@pytest.mark.parametrize("steps", [2, CHUNK + 1])
def test_layouts_of_the_state(order, steps, kernel_device):
    """v and the gradients of v and v_seq come in any memory order while x is channels_last."""
    x = LAYOUTS["channels last"](current((steps, 2, 4, 3, 5), torch.float32))
    v = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1)).permute(order).contiguous()
    v = v.permute([order.index(i) for i in range(4)])
    fused, _ = check(None, torch.float32, x=x, v=v, device=kernel_device)
    straight, _ = check(None, torch.float32, x=x.contiguous(), v=v.contiguous(), device=kernel_device)
    for name in ("spikes", "v", "v_seq", "grad_x", "grad_v_init", "spike_count"):
        assert torch.equal(getattr(fused, name), getattr(straight, name)), name


GRADIENTS = {
    # One step's gradient, or one example's, expanded: read in place, with a stride of zero.
    "sum over the steps": lambda s: (s.sum(0) * torch.arange(s.shape[2], device=s.device)).sum(),
    "sum over the examples": lambda s: (s.sum(1) * torch.arange(s.shape[2], device=s.device)).sum(),
    "batch first": lambda s: (s.transpose(0, 1).reshape(2, -1) * torch.arange(s[:, 0].numel(), device=s.device)).sum(),
    "mean over the steps": lambda s: s.mean(0).sum(),
    "mean over the examples": lambda s: (s.mean(1) * torch.arange(s.shape[2], device=s.device)).sum(),
    "sum": lambda s: s.sum(),
    "last step": lambda s: (s[-1] * 2).sum(),
    "transposed": lambda s: (s.transpose(1, 2) * torch.arange(s.shape[1], device=s.device)).sum(),
    "flipped": lambda s: (s.flip(2) * torch.arange(s.shape[2], device=s.device)).sum(),
}


@pytest.mark.parametrize("loss", GRADIENTS)
@pytest.mark.parametrize("steps", [3, CHUNK + 2])
def test_gradients_in_any_layout(loss, steps, kernel_device):
    """Expanded and strided gradients, as losses give them."""
    x = current((steps, 2, 37), torch.float32)
    grads = []
    for run in ("fused", "reference"):
        leaf_x = leaf(x, kernel_device if run == "fused" else "cpu")
        if run == "fused":
            spikes = lif(leaf_x, 0.0, LIF, SIGMOID, 4.0)[0]
        else:
            spikes = reference.multi_step(leaf_x, torch.zeros(2, 37), LIF, FUSED[SIGMOID]())[0]
        GRADIENTS[loss](spikes).backward()
        grads.append(leaf_x.grad.cpu())
    assert grads[1].abs().max() > 1e-3
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ flow of gradients


@pytest.mark.parametrize("flows", [f for f in itertools.product((True, False), repeat=3) if any(f)], ids=str)
@pytest.mark.parametrize("steps", [3, CHUNK + 1])
def test_gradient_through_each_output(flows, steps, walk, kernel_device):
    v = torch.randn(2, 20, generator=torch.Generator().manual_seed(4)) * 0.3
    check((steps, 2, 20), torch.float32, v=v, flows=flows, device=kernel_device)


@pytest.mark.parametrize("outputs", ["spikes", "v", "v_seq"])
@pytest.mark.parametrize("x_wants, v_wants", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unused_outputs_and_partial_requires_grad(outputs, x_wants, v_wants, dtype, kernel_device):
    """Only one output is in the loss (the others' gradients are None), only some inputs want one."""
    x, v = current((3, 2, 20), dtype), torch.full((2, 20), 0.1)
    grads = []
    for run in ("fused", "reference"):
        device = kernel_device if run == "fused" else "cpu"
        x_in, v_in = leaf(x, device).requires_grad_(x_wants), leaf(v, device).requires_grad_(v_wants)
        if run == "fused":
            s, v_final, v_seq, _ = lif(x_in, v_in, LIF, SIGMOID, 4.0, store_v_seq=outputs == "v_seq")
            assert (v_seq is None) == (outputs != "v_seq")
        else:
            s, v_final, v_seq = reference.multi_step(x_in, v_in, LIF, FUSED[SIGMOID](), outputs == "v_seq")
        out = {"spikes": s, "v": v_final, "v_seq": v_seq}[outputs]
        (out.float() * torch.arange(20, device=device)).sum().backward()
        grads.append([None if t.grad is None else t.grad.float().cpu() for t in (x_in, v_in)])
    for wants, fused, plain in zip((x_wants, v_wants), *grads, strict=True):
        assert (fused is not None) == wants
        if wants:
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(fused, plain, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("steps", [2, CHUNK + 1])
def test_no_grad(steps, kernel_device):
    x = current((steps, 2, 20), torch.float32).to(kernel_device).requires_grad_()
    with torch.no_grad():
        spikes, v, v_seq, count = lif(x, 0.0, LIF, SIGMOID, 4.0, store_v_seq=True, count_spikes=True)
    assert not (spikes.requires_grad or v.requires_grad or v_seq.requires_grad or count.requires_grad)
    graph = lif(x, 0.0, LIF, SIGMOID, 4.0, store_v_seq=True, count_spikes=True)
    for without, with_graph in zip((spikes, v, v_seq, count), graph, strict=True):
        assert torch.equal(without, with_graph)


def test_what_the_backward_pass_keeps(kernel_device):
    """Nothing but the input, and for longer sequences one potential per CHUNK steps."""
    for steps, checkpoints in ((CHUNK, 0), (CHUNK + 1, 1), (2 * CHUNK, 1), (2 * CHUNK + 1, 2)):
        x = current((steps, 1, 20), torch.float32).to(kernel_device).requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            lif(x, 0.0, LIF, SIGMOID, 4.0)
        assert sum(t.numel() for t in saved if t is not None and t.data_ptr() != x.data_ptr()) == 20 * checkpoints
        assert any(t is not None and t.data_ptr() == x.data_ptr() for t in saved)


class Flags(TorchDispatchMode):
    """Records store_checkpoints of every lif_forward."""

    def __init__(self):
        super().__init__()
        self.store_checkpoints = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.sadp_fast.lif_forward.default:
            self.store_checkpoints.append(args[-2])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("grad_mode", [False, True])
def test_no_checkpoint_is_written_for_no_backward_pass(grad_mode, wants, kernel_device):
    x = current((CHUNK + 1, 1, 20), torch.float32).to(kernel_device).requires_grad_(wants)
    with torch.set_grad_enabled(grad_mode), Flags() as flags:
        lif(x, 0.0, LIF, SIGMOID, 4.0)
    assert flags.store_checkpoints == [grad_mode and wants]


def test_gradient_crosses_calls(kernel_device):
    """v of one call is the v of the next, and is used twice."""
    x = current((5, 2, 30), torch.float32)
    grads = []
    for run in ("fused", "reference"):
        x_in = leaf(x, kernel_device if run == "fused" else "cpu")
        if run == "fused":
            s1, v1, _, _ = lif(x_in[:2], 0.0, LIF, SIGMOID, 4.0)
            s2, v2, _, _ = lif(x_in[2:], v1, LIF, SIGMOID, 4.0)
        else:
            s1, v1, _ = reference.multi_step(x_in[:2], torch.zeros(2, 30), LIF, FUSED[SIGMOID]())
            s2, v2, _ = reference.multi_step(x_in[2:], v1, LIF, FUSED[SIGMOID]())
        (s1.sum() + 2 * s2.sum() + (v1 * 3).sum() + v2.square().sum()).backward()
        grads.append(x_in.grad.cpu())
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_calls_in_a_row_are_one_call(kernel_device):
    x = current((CHUNK + 5, 2, 30), torch.float32).to(kernel_device)
    whole, v_whole, _, _ = lif(x, 0.1, LIF, SIGMOID, 4.0)
    v, parts = 0.1, []
    for part in x.split([1, 3, CHUNK, 1]):
        spikes, v, _, _ = lif(part, v, LIF, SIGMOID, 4.0)
        parts.append(spikes)
    assert torch.equal(torch.cat(parts), whole) and torch.equal(v, v_whole)


def test_second_backward_is_an_error_not_a_wrong_number(kernel_device):
    x = current((2, 1, 4), torch.float32).to(kernel_device).requires_grad_()
    weight = torch.ones(4, device=kernel_device, requires_grad=True)
    spikes = lif(x, 0.0, LIF, SIGMOID, 4.0)[0]
    # Also where the gradient that comes in is a constant: its second derivative would silently be taken for zero.
    for loss in ((spikes * weight).sum(), spikes.sum()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, x, create_graph=True)


# -------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", shapes([(5,), (3, 7), (5, 3, 2), (3, 19, 23)], [(64, 28, 28)]), ids=str)
def test_channel_scale(inner, dtype, channels_last, walk, kernel_device):
    """grad_norm_sq is that of the gradient times the scale along dimension 2, in both layouts."""
    if channels_last and len(inner) != 3:
        pytest.skip("channels_last needs height and width")
    x = current((3, 2, *inner), dtype)
    x = LAYOUTS["channels last"](x) if channels_last else x
    truth = oracle_forward(x, torch.zeros(x.shape[1:]), LIF, SIGMOID, 4.0)
    scale = torch.linspace(-1.5, 2.0, inner[0])
    grads = [upstream(x.shape, truth.clear, 1, dtype), torch.zeros(x.shape[1:]), torch.zeros(x.shape)]
    grad_x, _ = oracle_backward(truth, LIF, SIGMOID, 4.0, *grads)
    fused = run_fused(x, 0.0, LIF, SIGMOID, 4.0, grads, kernel_device, channel_scale=scale)
    expected = norm_sq_per_example(grad_x * scale.double().reshape(-1, *[1] * (len(inner) - 1)))
    assert_norms_close(fused.grad_norm_sq, expected)
    plain = reference.squared_norm_per_example(grad_x, scale.double())
    torch.testing.assert_close(plain, expected, rtol=1e-10, atol=0)
    unscaled = run_fused(x, 0.0, LIF, SIGMOID, 4.0, grads, kernel_device)
    assert torch.equal(fused.grad_x, unscaled.grad_x)  # the scale is for the statistic only


def test_spike_count_counts_only_real_elements(walk, kernel_device):
    """Lanes past the end of an example start from v and must not count: here they would all fire."""
    dynamics = Dynamics(None, False, 1.0, None, False)
    x = torch.full((2, 3, 1030 if ON_GPU else 37), 5.0, device=kernel_device)
    _, _, _, count = lif(x, 5.0, dynamics, SIGMOID, 4.0, count_spikes=True)
    assert count.dtype == torch.int32
    assert torch.equal(count.cpu(), torch.full((2, 3), x.shape[2], dtype=torch.int32))


def test_statistics_off_emit_nothing(kernel_device):
    x = current((2, 2, 8), torch.float32).to(kernel_device)
    _, _, v_seq, count = lif(x, 0.0, LIF, SIGMOID, 4.0)
    assert v_seq is None and count is None


@pytest.mark.parametrize("elements", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps, size", shapes([(8, 64), (9, 64), (12, 75), (16, 64), (17, 64)], [(15, 1030), (16, 2)]))
def test_norms_of_steps_summed_at_once(steps, size, dtype, elements, real_chunks, kernel_device, monkeypatch):
    """Chunks of 9 to 16 steps, by programs of one warp, in layouts that depend on what a thread holds."""
    tuned = configuration.Tuning(elements, warps_per_multiprocessor=0)
    monkeypatch.setattr(configuration, "TUNING", {key: ((math.inf, tuned),) for key in configuration.TUNING})
    _, truth = check((steps, 2, size), dtype, device=kernel_device)
    (prepared,) = lif_launch._backward_plans.values()
    at_once = 8 < configuration.chunk_steps(steps, dtype.itemsize) <= 16
    assert (prepared.plan.launch._constants["HOW"].cut.neighbours > 0) == at_once
    scale = torch.linspace(-1.5, 2.0, size)
    grads = [upstream((steps, 2, size), truth.clear, 1, dtype), torch.zeros(2, size), torch.zeros(steps, 2, size)]
    grad_x, _ = oracle_backward(truth, LIF, SIGMOID, 4.0, *grads)
    x = current((steps, 2, size), dtype)
    scaled = run_fused(x, 0.0, LIF, SIGMOID, 4.0, grads, kernel_device, channel_scale=scale)
    assert_norms_close(scaled.grad_norm_sq, norm_sq_per_example(grad_x * scale.double()))


@pytest.mark.parametrize("inner", shapes([(1500,)], [(3, 1_000_003), (128, 56, 56)]), ids=str)
def test_deterministic(inner, walk, kernel_device):
    """Run to run the same bits, sums over several blocks included."""
    x = current((4, 2, *inner), torch.float32)
    grads = [torch.randn(x.shape), torch.randn(x.shape[1:]), torch.randn(x.shape)]
    scale = torch.randn(inner[0]) if len(inner) > 1 else None
    first = run_fused(x, 0.0, LIF, SIGMOID, 4.0, grads, kernel_device, scale)
    again = run_fused(x, 0.0, LIF, SIGMOID, 4.0, grads, kernel_device, scale)
    for name in ("spikes", "v", "v_seq", "grad_x", "spike_count", "grad_norm_sq"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert torch.isfinite(first.grad_norm_sq).all()


# ----------------------------------------------------------------------------------------------- edges and refusals


@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 2, 0), (1, 0), (CHUNK + 1, 0, 4, 2)], ids=str)
def test_empty(shape, kernel_device):
    x = torch.zeros(shape, device=kernel_device, requires_grad=True)
    v = torch.zeros(shape[1:], device=kernel_device, requires_grad=True)
    norm = torch.full(shape[:2], torch.nan, device=kernel_device)
    spikes, v_final, v_seq, count = lif(x, v, LIF, SIGMOID, 4.0, store_v_seq=True, count_spikes=True, grad_norm_sq=norm)
    assert spikes.shape == v_seq.shape == shape and v_final.shape == shape[1:]
    assert torch.equal(count.cpu(), torch.zeros(shape[:2], dtype=torch.int32))
    (spikes.sum() + v_final.sum() + v_seq.sum()).backward()
    assert x.grad.shape == shape and v.grad.shape == shape[1:]
    assert torch.equal(norm.cpu(), torch.zeros(shape[:2]))


@pytest.mark.parametrize(
    "shape, dtype, v, options, message",
    [
        ((2, 3), torch.float64, 0.0, {}, "x must be float32, float16 or bfloat16, got torch.float64"),
        ((2, 3), torch.int32, 0.0, {}, "x must be float32, float16 or bfloat16, got torch.int32"),
        ((2,), torch.float32, 0.0, {}, r"got shape \(2,\)"),
        ((0, 3), torch.float32, 0.0, {}, r"got shape \(0, 3\)"),
        ((2, 3, 4), torch.float32, torch.zeros(3, 5), {}, r"v must have the shape .* \(3, 4\), got \(3, 5\)"),
        ((2, 3, 4), torch.float32, 0.0, {"channel_scale": torch.ones(3)}, r"channel_scale must .*\(4,\).* got \(3,\)"),
    ],
)
def test_refusals(shape, dtype, v, options, message, kernel_device):
    v, *values = [t.to(kernel_device) if isinstance(t, Tensor) else t for t in (v, *options.values())]
    with pytest.raises(ValueError, match=message):
        lif(
            torch.zeros(shape, dtype=dtype, device=kernel_device),
            v,
            LIF,
            SIGMOID,
            4.0,
            **dict(zip(options, values, strict=True)),
        )


@settings(
    max_examples=100 if ON_GPU else 50,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_case(data, kernel_device):
    """Random shape, T, dtype, neuron, surrogate, layout and flow of gradients."""
    rank = data.draw(st.integers(1, 3), label="rank")
    inner = data.draw(st.lists(st.integers(1, 6), min_size=rank, max_size=rank), label="inner")
    steps = data.draw(st.integers(1, CHUNK + 2), label="steps")
    examples = data.draw(st.integers(1, 2), label="examples")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    tau = data.draw(st.sampled_from([None, 1.5, 2.0, 4.0, 10.0]), label="tau")
    v_reset = data.draw(st.sampled_from([None, 0.0, -0.5, 0.25]), label="v_reset")
    dynamics = Dynamics(
        tau,
        data.draw(st.booleans(), label="decay_input"),
        data.draw(st.sampled_from([0.5, 1.0, 1.3]), label="v_threshold"),
        v_reset,
        data.draw(st.booleans(), label="detach_reset"),
    )
    index = data.draw(st.integers(0, len(FUSED) - 1), label="surrogate")
    alpha = data.draw(st.sampled_from([0.5, 1.0, 2.0, 4.0]), label="alpha")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    order = data.draw(st.permutations(range(rank + 2)), label="memory order")
    flows = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()), label="flows")
    x = current((steps, examples, *inner), dtype, seed)
    x = x.permute(order).contiguous().permute([order.index(i) for i in range(rank + 2)])
    v = current((examples, *inner), torch.float32, seed + 7) if data.draw(st.booleans(), label="v tensor") else 0.1
    options = {"device": kernel_device, "flows": flows, "seed": seed, "representative": False}
    check(None, dtype, dynamics, index, alpha, v=v, x=x, **options)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Offsets past 2^31 elements, in x, in the state and between steps: some slices against the reference."""
    needed = 40 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    size = 2**28 + 2**20 + 16
    steps, examples = 4, 2
    assert steps * examples * size > 2**31
    torch.manual_seed(0)
    x = torch.empty(steps, examples, size, dtype=torch.bfloat16, device="cuda").normal_(0.5, 1.5).requires_grad_()
    norm = torch.full((steps, examples), torch.nan, device="cuda")
    spikes, v, _, count = lif(x, 0.0, LIF, SIGMOID, 4.0, count_spikes=True, grad_norm_sq=norm)
    total = 0
    for t in range(steps):
        for n in range(examples):
            parts = spikes[t, n].split(2**26)
            found = sum(int(part.float().sum(dtype=torch.float64)) for part in parts)
            assert count[t, n] == found
            total += found
    assert 0.1 < total / x.numel() < 0.5
    spikes.backward(torch.ones((), dtype=torch.bfloat16, device="cuda").expand_as(spikes))
    assert torch.isfinite(norm).all() and (norm > 0).all()
    for start in (0, 2**27 - 500, size // 2, size - 1000):
        part = slice(start, start + 1000)
        x_part = x.detach()[:, :, part].cpu().requires_grad_()
        s_ref, v_ref, _ = reference.multi_step(x_part, torch.zeros(examples, 1000), LIF, FUSED[SIGMOID]())
        s_ref.sum().backward()
        assert torch.equal(spikes[:, :, part].cpu(), s_ref)
        assert torch.equal(v[:, part].cpu(), v_ref)
        torch.testing.assert_close(x.grad[:, :, part].cpu(), x_part.grad, rtol=1e-2, atol=1e-3)
