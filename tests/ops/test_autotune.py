"""autotune(): what is measured, what is kept, and that any configuration gives the same results."""

import dataclasses

import pytest
import torch

import sadp_fast
from sadp_fast import surrogate
from sadp_fast.ops.batch_norm_lif import launch as norm_launch
from sadp_fast.ops.common import autotune
from sadp_fast.ops.lif import launch as lif_launch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
needs_interpreter = pytest.mark.skipif(ON_GPU, reason="replaces the clock; on a GPU the real one is tested")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """Each test starts as a process does, and leaves no choice behind."""
    for prepared in (lif_launch._forward_plans, lif_launch._backward_plans, norm_launch._layers):
        prepared.clear()
    for choices in (*lif_launch._CHOICES.values(), *norm_launch._CHOICES.values()):
        monkeypatch.setattr(choices, "_measured", {})
    yield
    for prepared in (lif_launch._forward_plans, lif_launch._backward_plans, norm_launch._layers):
        prepared.clear()


class Clock:
    """Stands in for the measurement: runs every configuration, and says how long each took."""

    def __init__(self, seconds):
        self.seconds, self.results = seconds, []

    def __call__(self, run, configurations, device):
        self.results.append([run(configuration) for configuration in configurations])
        return [self.seconds(number, len(configurations)) for number in range(len(configurations))]


@pytest.fixture
def clock(monkeypatch):
    """The last configuration is always the fastest."""
    clock = Clock(lambda number, count: 1.0 if number < count - 1 else 0.5)
    monkeypatch.setattr(autotune, "_seconds", clock)
    monkeypatch.setattr(autotune, "_measurable", lambda x: True)
    return clock


def lif_step(steps=3, dtype=torch.float32):
    """Spikes, gradient and per-example statistics of one layer."""
    generator = torch.Generator().manual_seed(steps)
    x, g = (torch.randn(steps, 2, 40, generator=generator).to(DEVICE, dtype) for _ in range(2))
    x = (x + 1).requires_grad_()
    node = sadp_fast.LIFNode(step_mode="m", surrogate_function=surrogate.ATan(), backend="triton")
    node.collect_statistics = True
    spikes = node(x)
    (grad,) = torch.autograd.grad(spikes, x, g)
    return spikes.detach(), grad, node.spike_count, node.grad_norm_sq


def norm_step(dtype=torch.float32):
    """The same of a layer with batch normalisation, and what that learns and keeps."""
    generator = torch.Generator().manual_seed(1)
    x, residual, g = (torch.randn(3, 4, 5, 6, 4, generator=generator).to(DEVICE, dtype) for _ in range(3))
    node = sadp_fast.BatchNormLIF(5, surrogate_function=surrogate.ATan(), detach_reset=True, backend="triton")
    node.to(DEVICE).collect_statistics = True
    x.requires_grad_()
    out = node(x, residual)
    gradients = torch.autograd.grad(out, [x, node.weight, node.bias], g)
    return out.detach(), *gradients, node.running_mean, node.running_var, *node.energies[0]


def assert_same(results, others, *, bits):
    """The first ``bits`` results to the bit, the others, which are sums, but for rounding."""
    for number, (a, b) in enumerate(zip(results, others, strict=True)):
        if number < bits:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def configurations(plans):
    """Of the launches that are prepared."""
    constants = [prepared.plan.launch._constants for prepared in plans.values()]
    cuts = [(c["HOW"].cut, c["num_warps"]) for c in constants]
    return [(cut.elements, warps, cut.tile, cut.call_ahead) for cut, warps in cuts]


@needs_interpreter
def test_outside_nothing_is_measured(clock):
    lif_step()
    norm_step()
    assert clock.results == []
    assert all(not c._measured for c in norm_launch._CHOICES.values())


def test_on_the_cpu_nothing_is_measured():
    with sadp_fast.autotune() as choices:
        node = sadp_fast.LIFNode(step_mode="m")
        node(torch.ones(2, 3, 4))
    assert choices == []


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [3, 40])
def test_a_neuron_keeps_the_fastest_configuration_with_the_same_results(clock, steps, dtype):
    curated = lif_step(steps, dtype)
    before = configurations(lif_launch._forward_plans), configurations(lif_launch._backward_plans)
    with sadp_fast.autotune() as choices:
        tuned = lif_step(steps, dtype)
        assert_same(lif_step(steps, dtype), tuned, bits=4)
    assert_same(tuned, curated, bits=3)
    assert [choice.kernel for choice in choices] == ["LIF forward", "LIF backward"]
    assert all(choice.seconds == 0.5 and choice.curated_seconds == 1.0 for choice in choices)
    assert all(choice.shape == (steps, 2, 40) and choice.dtype == dtype for choice in choices)
    assert len(clock.results) == 2
    for results in clock.results:  # of every configuration
        assert len(results) >= 5
        for result in results:
            first, own = ([t for t in r if t is not None] for r in (results[0], result))
            assert_same(first[:-1], own[:-1], bits=len(first))  # the last are sums of programs, of another number
            torch.testing.assert_close(first[-1].sum(1), own[-1].sum(1))

    assert_same(lif_step(steps, dtype), tuned, bits=4)  # outside again: kept
    after = configurations(lif_launch._forward_plans), configurations(lif_launch._backward_plans)
    for was, now, choice in zip(before, after, choices, strict=True):
        assert len(was) == len(now) == 1 and was != now
        assert (
            now[0][1:] == dataclasses.astuple(choice.configuration)[1:]
        )  # elements are fewer where an example has fewer
    with sadp_fast.autotune() as again:
        lif_step(steps, dtype)
    assert again == [] and len(clock.results) == 2


@needs_interpreter
def test_another_shape_is_measured_where_it_runs(clock):
    with sadp_fast.autotune() as choices:
        lif_step(3)
    lif_step(4)
    assert [choice.shape[0] for choice in choices] == [3, 3]
    with sadp_fast.autotune() as choices:
        lif_step(4)
    assert [choice.shape[0] for choice in choices] == [4, 4]


@needs_interpreter
def test_a_small_advantage_is_noise(clock):
    clock.seconds = lambda number, count: 1.0 if number == 0 else 0.99
    curated = lif_step()
    before = configurations(lif_launch._forward_plans)
    with sadp_fast.autotune() as choices:
        assert_same(lif_step(), curated, bits=4)
    assert configurations(lif_launch._forward_plans) == before
    assert all(choice.seconds == choice.curated_seconds == 1.0 for choice in choices) and len(choices) == 2


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_normalisation_keeps_the_fastest_of_each_kernel_with_the_same_results(clock, dtype):
    curated = norm_step(dtype)
    with sadp_fast.autotune() as choices:
        tuned = norm_step(dtype)
    kernels = [f"BatchNorm + LIF {name}" for name in ("statistics", "forward", "sums", "gradient")]
    assert [choice.kernel for choice in choices] == kernels
    for choice, measured in zip(choices, norm_launch._CHOICES.values(), strict=True):
        assert list(measured._measured.values()) == [choice.configuration]
    if dtype == torch.float32:
        assert_same(tuned, curated, bits=1)
    else:
        assert torch.equal(tuned[0], curated[0])
        torch.testing.assert_close(tuned[1], curated[1], rtol=2**-7, atol=1e-4)
    assert all(len(results) == 6 for results in clock.results)
    for out, _, energy in clock.results[1]:
        assert torch.equal(out, tuned[0])
        torch.testing.assert_close(energy.sum(1), clock.results[1][0][2].sum(1))
    assert_same(norm_step(dtype), tuned, bits=len(tuned))


@needs_interpreter
def test_an_inner_autotune_has_its_own_choices(clock):
    with sadp_fast.autotune() as outer:
        lif_step(2)
        with sadp_fast.autotune() as inner:
            lif_step(3)
        lif_step(4)
    assert [choice.shape[0] for choice in inner] == [3, 3]
    assert [choice.shape[0] for choice in outer] == [2, 2, 4, 4]


@needs_interpreter
def test_an_error_inside_ends_it(clock):
    with pytest.raises(KeyError), sadp_fast.autotune():
        raise KeyError
    lif_step()
    assert clock.results == []


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    curated = *lif_step(4, dtype), *lif_step(70, dtype)
    normalised = norm_step(dtype)
    with sadp_fast.autotune() as choices:
        tuned = *lif_step(4, dtype), *lif_step(70, dtype)
        assert_same(tuned[:4], curated[:4], bits=3)
        assert_same(tuned[4:], curated[4:], bits=3)
        torch.testing.assert_close(norm_step(dtype), normalised, rtol=2**-7, atol=1e-3)
    assert len(choices) == 2 + 2 + 4
    for choice in choices:
        assert 0 < choice.seconds < 1e-3 and choice.seconds <= choice.curated_seconds < 1e-3
    assert_same(lif_step(70, dtype), tuned[4:], bits=4)


@needs_gpu
def test_while_a_graph_is_recorded_nothing_is_measured():
    node = sadp_fast.LIFNode(step_mode="m")
    x = torch.ones(4, 2, 40, device="cuda")
    node(x)
    sadp_fast.reset(node)
    graph = torch.cuda.CUDAGraph()
    with sadp_fast.autotune() as choices, torch.no_grad(), torch.cuda.graph(graph):
        node(x)
    assert choices == []
