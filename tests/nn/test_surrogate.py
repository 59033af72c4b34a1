"""The surrogate functions: against their formulae, against SpikingJelly's, and fused against both."""

import itertools
import math

import pytest
import torch

from sadp_fast import surrogate as surrogates
from sadp_fast.ops.common.dynamics import Dynamics

# gradient(x, a) of every fused surrogate, written a second time, in double precision and one element at a time.
FORMULAE = {
    "Sigmoid": lambda x, a: a * math.exp(-abs(a * x)) / (1 + math.exp(-abs(a * x))) ** 2,
    "ATan": lambda x, a: (a / 2) / (1 + (math.pi * a * x / 2) ** 2),
    "PiecewiseQuadratic": lambda x, a: max(0.0, a - a * a * abs(x)),
    "PiecewiseExp": lambda x, a: a / 2 * math.exp(-a * abs(x)),
    "SoftSign": lambda x, a: 1 / (2 * a * (1 / a + abs(x)) ** 2),
    "SuperSpike": lambda x, a: a / (1 + abs(x)) ** 2,
    "Erf": lambda x, a: a / math.sqrt(math.pi) * math.exp(-a * a * x * x),
    "Rect": lambda x, a: a if abs(x) < 1 / (2 * a) else 0.0,
}
DEFAULT_ALPHA = {
    "Sigmoid": 4.0,
    "ATan": 2.0,
    "PiecewiseQuadratic": 1.0,
    "PiecewiseExp": 1.0,
    "SoftSign": 2.0,
    "SuperSpike": 1.0,
    "Erf": 2.0,
    "Rect": 1.0,
}
NAMES = list(FORMULAE)
ALPHAS = (None, 0.7, 3.0)  # None: the default


def make(name, alpha=None, module=surrogates, **options):
    cls = getattr(module, name)
    return cls(**options) if alpha is None else cls(alpha=alpha, **options)


def spikingjelly_surrogates():
    pytest.importorskip("loguru", reason="SpikingJelly needs loguru")
    return pytest.importorskip("spikingjelly.activation_based.surrogate", reason="SpikingJelly is not installed")


def points(dtype=torch.float64):
    """Both sides of the threshold and of every kink, the threshold itself, and the far ends."""
    kinks = [k for a in (1.0, 2.0, 0.7, 3.0) for k in (1 / a, 0.5 / a)]
    near = [sign * k * (1 + shift) for k in kinks for sign in (-1, 1) for shift in (-0.01, 0.01)]
    return torch.tensor([0.0, -0.0, 1e-7, -1e-7, 8.0, -8.0, *near, *torch.linspace(-2, 2, 41).tolist()], dtype=dtype)


def gradient_of(function, x):
    x = x.detach().clone().requires_grad_()
    function(x).sum().backward()
    return x.grad


def test_the_table_is_complete_and_in_the_kernels_order():
    assert [cls.__name__ for cls in surrogates.FUSED] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_formula(name, device):
    for alpha in ALPHAS:
        function = make(name, alpha).to(device)
        x = points()
        a = DEFAULT_ALPHA[name] if alpha is None else alpha
        expected = torch.tensor([FORMULAE[name](value, a) for value in x.tolist()], dtype=torch.float64)
        torch.testing.assert_close(gradient_of(function, x.to(device)).cpu(), expected, rtol=1e-12, atol=1e-14)
        single = gradient_of(function, x.to(device, torch.float32))
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.cpu(), expected.float(), rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_scales_with_the_incoming_gradient(name):
    x = torch.tensor([-0.2, 0.1], dtype=torch.float64, requires_grad=True)
    function = make(name)
    function(x).backward(torch.tensor([2.0, -3.0], dtype=torch.float64))
    expected = [g * FORMULAE[name](v, DEFAULT_ALPHA[name]) for v, g in zip(x.tolist(), (2.0, -3.0), strict=True)]
    torch.testing.assert_close(x.grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_spikes_at_and_above_the_threshold(name, device):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = torch.tensor([-1.0, -1e-3, -0.0, 0.0, 1e-3, 1.0], dtype=dtype, device=device)
        spikes = make(name)(x)
        assert spikes.dtype == dtype
        assert spikes.tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "SuperSpike"])
def test_primitive_has_the_gradient(name):
    for alpha in ALPHAS:
        smooth = make(name, alpha, spiking=False)
        x = points()
        # A kink belongs to either side there: autograd of abs, clamp or where may take the other one.
        x = x[x != 0]
        torch.testing.assert_close(gradient_of(smooth, x), smooth.gradient(x, smooth.alpha), rtol=1e-9, atol=1e-12)
        ends = smooth(torch.tensor([-1e4, 1e4], dtype=torch.float64))
        torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-3)
        assert smooth(torch.zeros(1, dtype=torch.float64)).item() == pytest.approx(0.5)


def test_super_spike_has_no_primitive():
    with pytest.raises(NotImplementedError, match="spiking=True"):
        surrogates.SuperSpike(spiking=False)(torch.zeros(2))


def test_set_spiking_mode_switches_between_spikes_and_primitive():
    function = surrogates.Sigmoid()
    x = torch.tensor([0.3])
    assert function(x).item() == 1.0
    function.set_spiking_mode(False)
    assert function(x).item() == pytest.approx(torch.sigmoid(4 * x).item())
    function.set_spiking_mode(True)
    assert function(x).item() == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_alpha_must_be_positive(name):
    for alpha in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"alpha must be > 0, got {alpha}"):
            make(name, alpha)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_far_from_the_threshold_is_finite(name):
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4])
    gradient = gradient_of(make(name), x)
    assert torch.isfinite(gradient).all() and (gradient >= 0).all()


# ------------------------------------------------------------------------------------------------- SpikingJelly


@pytest.mark.parametrize("name", NAMES)
def test_same_as_spikingjelly(name):
    for alpha, dtype in itertools.product(ALPHAS, (torch.float32, torch.float64)):
        theirs = make(name, alpha, spikingjelly_surrogates())
        ours = make(name, alpha)
        assert ours.alpha == theirs.alpha
        x = points(dtype)
        assert torch.equal(ours(x), theirs(x))
        tolerance = {"rtol": 2e-6, "atol": 5e-7} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
        torch.testing.assert_close(gradient_of(ours, x), gradient_of(theirs, x), **tolerance)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "SuperSpike"])
def test_primitive_same_as_spikingjelly(name):
    for alpha in ALPHAS:
        theirs = make(name, alpha, spikingjelly_surrogates(), spiking=False)
        ours = make(name, alpha, spiking=False)
        x = points()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_spikingjellys_surrogates_are_fused_and_others_are_not():
    theirs = spikingjelly_surrogates()
    for index, name in enumerate(NAMES):
        assert surrogates.fused_index(make(name)) == index
        assert surrogates.fused_index(make(name, module=theirs)) == index
        assert surrogates.fused_index(make(name, spiking=False)) is None
        assert surrogates.fused_index(make(name, module=theirs, spiking=False)) is None
    for name in ("QPseudoSpike", "S2NN", "LeakyKReLU", "PiecewiseLeakyReLU", "LogTailedReLU"):
        assert surrogates.fused_index(getattr(theirs, name)()) is None


def test_a_subclass_is_not_taken_for_its_parent():
    class Doubled(surrogates.Sigmoid):
        @staticmethod
        def gradient(x, alpha):
            return 2 * surrogates.Sigmoid.gradient(x, alpha)

    assert surrogates.fused_index(Doubled()) is None


@pytest.mark.parametrize("function", [torch.sigmoid, lambda x: (x > 0).float(), torch.nn.ReLU()])
def test_any_other_callable_is_not_fused(function):
    assert surrogates.fused_index(function) is None


# ----------------------------------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_fused_gradient_is_the_formula_and_not_zero(index, alpha, kernel_device):
    """One step of a neuron that does not leak, from v = 0: the gradient is the surrogate's at x - v_threshold."""
    from sadp_fast.ops.lif.op import lif

    name = NAMES[index]
    a = DEFAULT_ALPHA[name] if alpha is None else alpha
    threshold = 1.0
    distance = points(torch.float32)
    x = (distance + threshold).reshape(1, 1, -1).to(kernel_device).requires_grad_()
    dynamics = Dynamics(tau=None, decay_input=False, v_threshold=threshold, v_reset=0.0, detach_reset=True)
    lif(x, 0.0, dynamics, index, a)[0].sum().backward()
    rounded = (x.detach().cpu() - threshold).flatten().tolist()  # what the kernel sees after rounding
    expected = torch.tensor([FORMULAE[name](value, a) for value in rounded])
    gradient = x.grad.flatten().cpu()
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert gradient[(distance.abs() < 0.1)].min() > 0.05
