"""The drop-in contract: the neurons against SpikingJelly's of the same names, option by option and rule by rule.

SpikingJelly always runs on the CPU here; ours runs on each of its paths: the plain torch reference on the CPU, and the
fused kernels (on the GPU, or in Triton's interpreter). Spikes and potentials have to agree to the bit.
"""

import copy
import gc
import math
import warnings
import weakref
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import sadp_fast.surrogate as surrogates
from sadp_fast.nn.batch_norm_lif import BatchNormLIF
from sadp_fast.nn.lif import IFNode, LIFNode, ParametricLIFNode
from sadp_fast.nn.node import neurons, reset
from sadp_fast.nn.recorder import CallRecorder


@pytest.fixture
def sj():
    """SpikingJelly's activation_based package."""
    pytest.importorskip("loguru", reason="SpikingJelly needs loguru")
    package = pytest.importorskip("spikingjelly.activation_based", reason="SpikingJelly is not installed")
    from spikingjelly.activation_based import base, functional, layer, neuron, surrogate  # noqa: F401

    return package


class Path(NamedTuple):
    device: str
    backend: str


@pytest.fixture(params=["reference", "kernels"])
def path(request, kernel_device) -> Path:
    """Where a node of ours runs and by which backend."""
    return Path("cpu", "torch") if request.param == "reference" else Path(kernel_device, "triton")


OURS = {"LIF": LIFNode, "IF": IFNode, "PLIF": ParametricLIFNode}


def spikingjellys(sj) -> dict[str, type]:
    return {"LIF": sj.neuron.LIFNode, "IF": sj.neuron.IFNode, "PLIF": sj.neuron.ParametricLIFNode}


def pair(sj, path, kind="LIF", **options):
    """SpikingJelly's neuron and ours with the same options."""
    theirs = spikingjellys(sj)[kind](**options)
    if "surrogate_function" in options:
        options["surrogate_function"] = copy.deepcopy(options["surrogate_function"])
    return theirs, OURS[kind](**options, backend=path.backend).to(path.device)


def current(*shape, seed=0) -> Tensor:
    """Input that makes between a tenth and a half of the neurons fire."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.5


def run(node, x: Tensor) -> Tensor:
    """All steps of x [T, N, *] in the node's step mode."""
    return node(x) if node.step_mode == "m" else torch.stack([node(step) for step in x])


def weights(t: Tensor, seed=11) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)).to(t.device)


def leaf(x: Tensor, path: Path) -> Tensor:
    return x.detach().clone().to(path.device).requires_grad_()


def assert_same_state(ours, theirs):
    assert torch.equal(ours.v.cpu(), theirs.v)
    assert (ours.v_seq is None) == (theirs.v_seq is None)
    if theirs.v_seq is not None:
        assert torch.equal(ours.v_seq.cpu(), theirs.v_seq)


def assert_gradients_close(ours: Tensor, theirs: Tensor):
    assert theirs.abs().max() > 1e-3  # or the comparison says nothing
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- options, one by one

OPTIONS = [
    ("LIF", {}),
    ("LIF", {"tau": 3.0}),
    ("LIF", {"tau": 1.3, "v_threshold": 0.7}),
    ("LIF", {"decay_input": False}),
    ("LIF", {"tau": 3.0, "decay_input": False, "v_reset": 0.2}),
    ("LIF", {"v_reset": None}),
    ("LIF", {"tau": 5.0, "decay_input": False, "v_reset": None}),
    ("LIF", {"v_reset": -0.3}),
    ("LIF", {"detach_reset": True}),
    ("LIF", {"tau": 3.0, "v_reset": None, "detach_reset": True}),
    ("LIF", {"v_reset": -0.3, "detach_reset": True, "decay_input": False}),
    ("IF", {}),
    ("IF", {"v_reset": None, "v_threshold": 1.5}),
    ("IF", {"v_reset": 0.4, "detach_reset": True}),
    ("IF", {"v_reset": None, "detach_reset": True}),
    ("IF", {"v_reset": -0.1}),
    ("PLIF", {}),
    ("PLIF", {"init_tau": 1.7}),
    ("PLIF", {"init_tau": 3.0, "decay_input": False}),
    ("PLIF", {"init_tau": 1.3, "v_reset": 0.2, "v_threshold": 0.7}),
    ("PLIF", {"init_tau": 5.0, "v_reset": None}),
    ("PLIF", {"init_tau": 3.0, "decay_input": False, "v_reset": None, "detach_reset": True}),
    ("PLIF", {"init_tau": 1.7, "v_reset": -0.3, "detach_reset": True}),
]


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("kind, options", OPTIONS, ids=str)
def test_every_option(kind, options, step_mode, path, sj):
    """Spikes, v and v_seq to the bit; the gradient through all three, that of a learned time constant too."""
    theirs, ours = pair(sj, path, kind, **options, step_mode=step_mode, store_v_seq=True)
    x = current(4, 2, 15)
    gradients = []
    for node, x_in in ((theirs, leaf(x, Path("cpu", ""))), (ours, leaf(x, path))):
        spikes = run(node, x_in)
        loss = (spikes * weights(spikes)).sum() + (node.v * weights(node.v, 12)).sum()
        (loss + (node.v_seq * weights(node.v_seq, 13)).sum()).backward()
        gradients.append((spikes.detach(), x_in.grad))
    (their_spikes, their_grad), (our_spikes, our_grad) = gradients
    assert 0.02 < their_spikes.mean() < 0.9
    assert torch.equal(our_spikes.cpu(), their_spikes)
    assert_same_state(ours, theirs)
    assert_gradients_close(our_grad, their_grad)
    assert set(dict(ours.named_parameters())) == set(dict(theirs.named_parameters()))
    for name, parameter in theirs.named_parameters():
        assert_gradients_close(ours.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("kind, options", [OPTIONS[1], OPTIONS[5], OPTIONS[11], OPTIONS[17]], ids=str)
def test_single_steps_are_the_multi_step(kind, options, path):
    x = current(5, 2, 12).to(path.device)
    single = OURS[kind](**options, backend=path.backend).to(path.device)
    multi = OURS[kind](**options, backend=path.backend, step_mode="m").to(path.device)
    assert torch.equal(run(single, x), run(multi, x))
    assert torch.equal(single.v, multi.v)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 1), (3, 2, 3, 5, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_any_rank(shape, step_mode, path, sj):
    theirs, ours = pair(sj, path, step_mode=step_mode)
    x = current(*shape)
    assert torch.equal(run(ours, x.to(path.device)).cpu(), run(theirs, x))
    assert_same_state(ours, theirs)


def test_defaults_are_spikingjellys(sj):
    for kind, names in {
        "LIF": ("tau", "decay_input", "v_threshold", "v_reset", "detach_reset", "step_mode", "store_v_seq", "v"),
        "IF": ("v_threshold", "v_reset", "detach_reset", "step_mode", "store_v_seq", "v"),
        "PLIF": ("decay_input", "v_threshold", "v_reset", "detach_reset", "step_mode", "store_v_seq", "v", "w"),
    }.items():
        theirs, ours = spikingjellys(sj)[kind](), OURS[kind]()
        for name in names:
            assert getattr(ours, name) == getattr(theirs, name), name
        assert type(ours.surrogate_function).__name__ == type(theirs.surrogate_function).__name__
        assert ours.surrogate_function.alpha == theirs.surrogate_function.alpha


def test_arguments_come_in_spikingjellys_order(sj):
    values = (3.0, False, 0.8, -0.2, surrogates.ATan(), True, "m", True)
    theirs, ours = sj.neuron.LIFNode(*values), LIFNode(*values)
    for name in ("tau", "decay_input", "v_threshold", "v_reset", "detach_reset", "step_mode", "store_v_seq"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.surrogate_function is values[4]
    theirs, ours = sj.neuron.ParametricLIFNode(*values), ParametricLIFNode(*values)
    for name in ("w", "decay_input", "v_threshold", "v_reset", "detach_reset", "step_mode", "store_v_seq"):
        assert getattr(ours, name) == getattr(theirs, name), name
    theirs, ours = sj.neuron.IFNode(*values[2:]), IFNode(*values[2:])
    for name in ("v_threshold", "v_reset", "detach_reset", "step_mode", "store_v_seq"):
        assert getattr(ours, name) == getattr(theirs, name), name


# -------------------------------------------------------------------------------------------------- rules of state


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None])
def test_state_and_gradient_cross_calls(v_reset, step_mode, path, sj):
    """Two calls; v of the first is used by the second and by the loss."""
    theirs, ours = pair(sj, path, v_reset=v_reset, step_mode=step_mode, tau=3.0)
    x = current(5, 2, 15)
    gradients = []
    for node, x_in in ((theirs, leaf(x, Path("cpu", ""))), (ours, leaf(x, path))):
        first = run(node, x_in[:2])
        v_between = node.v
        second = run(node, x_in[2:])
        loss = (second * weights(second)).sum() + (v_between * weights(v_between, 12)).sum() + node.v.square().sum()
        (loss + first.sum()).backward()
        gradients.append(x_in.grad)
    assert_same_state(ours, theirs)
    assert_gradients_close(gradients[1], gradients[0])


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_gradients_of_a_learned_tau_cross_calls(step_mode, path, sj):
    theirs, ours = pair(sj, path, "PLIF", init_tau=1.7, step_mode=step_mode)
    x = current(5, 2, 15)
    for node, where in ((theirs, "cpu"), (ours, path.device)):
        spikes = [run(node, part.to(where)) for part in (x[:2], x[2:])]  # of data: only w wants a gradient
        loss = sum((s * weights(s)).sum() for s in spikes) + node.v.square().sum()
        loss.backward()
    assert_same_state(ours, theirs)
    assert_gradients_close(ours.w.grad, theirs.w.grad)


def test_statistics_where_only_a_learned_tau_wants_a_gradient(path):
    """Data in front of the first neuron: there is a backward pass, and the norm is that of a gradient for x."""
    x, norms = current(3, 2, 15).to(path.device), []
    for wants in (False, True):
        node = ParametricLIFNode(step_mode="m", backend=path.backend).to(path.device)
        node.collect_statistics = True
        node(x.clone().requires_grad_(wants)).sum().backward()
        norms.append(node.grad_norm_sq)
    assert torch.equal(*norms) and (norms[0] > 0).all()


def test_a_learned_tau_is_shown(path):
    node = ParametricLIFNode(init_tau=2.5, backend=path.backend)
    assert "tau=2.5 (learned)" in repr(node)
    node.w.data.fill_(-800.0)
    assert "tau=inf (learned)" in repr(node)
    assert "tau=(learned)" in repr(node.to("meta"))
    with pytest.raises(ValueError, match="init_tau must be finite, got inf"):
        ParametricLIFNode(init_tau=math.inf)
    with pytest.raises(ValueError, match=r"init_tau must be a float > 1\.0, got 2"):
        ParametricLIFNode(init_tau=2)


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_detach_cuts_the_graph(step_mode, path, sj):
    theirs, ours = pair(sj, path, step_mode=step_mode, store_v_seq=True)
    x = current(4, 2, 15)
    gradients = []
    for node, x_in in ((theirs, leaf(x, Path("cpu", ""))), (ours, leaf(x, path))):
        run(node, x_in[:2])
        node.detach()
        assert not (node.v.requires_grad or node.v_seq.requires_grad)
        spikes = run(node, x_in[2:])
        ((spikes * weights(spikes)).sum() + node.v.sum()).backward()
        gradients.append(x_in.grad)
    assert (gradients[1][:2] == 0).all()
    assert_same_state(ours, theirs)
    assert_gradients_close(gradients[1], gradients[0])


def test_detach_before_the_first_call_does_nothing(path):
    node = LIFNode(backend=path.backend)
    node.detach()
    assert node.v == 0.0


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("v_reset", [0.0, 0.25, None])
def test_reset_returns_to_the_float(v_reset, step_mode, path, sj):
    theirs, ours = pair(sj, path, v_reset=v_reset, step_mode=step_mode, store_v_seq=True)
    initial = 0.0 if v_reset is None else v_reset
    x = current(3, 2, 15)
    runs = []
    for _ in range(2):
        runs.append(run(ours, x.to(path.device)))
        run(theirs, x)
        assert isinstance(ours.v, Tensor)
        for node in (theirs, ours):
            node.reset()
            assert isinstance(node.v, float) and node.v == initial
            assert node.v_seq is None
    assert torch.equal(*runs)


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("v_reset", [0.0, 0.25, None])
def test_a_new_shape_starts_from_rest(v_reset, step_mode, path, sj):
    theirs, ours = pair(sj, path, v_reset=v_reset, step_mode=step_mode, store_v_seq=True)
    for shape in ((3, 2, 15), (3, 5, 15), (2, 5, 3, 2), (2, 5, 3, 2)):  # the last one carries on
        x = current(*shape)
        assert torch.equal(run(ours, x.to(path.device)).cpu(), run(theirs, x))
        assert_same_state(ours, theirs)


@pytest.mark.parametrize("v", [0.6, "tensor", "tensor with a gradient", "tensor of another shape"])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_v_set_by_the_user(v, step_mode, path, sj):
    theirs, ours = pair(sj, path, v_reset=0.1, step_mode=step_mode)
    x = current(2, 2, 15)
    gradients = []
    for node, where in ((theirs, Path("cpu", "")), (ours, path)):
        value = v
        if v != 0.6:
            value = current(2, 7 if "shape" in v else 15, seed=3).to(where.device) * 0.4
            value.requires_grad_("gradient" in v)
        node.v = value
        spikes = run(node, x.to(where.device))
        if v == "tensor with a gradient":
            ((spikes * weights(spikes)).sum() + node.v.sum()).backward()
            gradients.append(value.grad)
        else:
            assert not spikes.requires_grad
    assert_same_state(ours, theirs)
    if gradients:
        assert_gradients_close(gradients[1], gradients[0])


def test_v_seq_grows_by_a_step_until_reset(path, sj):
    theirs, ours = pair(sj, path, store_v_seq=True)
    x = current(3, 2, 15)
    for t, step in enumerate(x):
        for node, where in ((theirs, "cpu"), (ours, path.device)):
            node(step.to(where))
            assert node.v_seq.shape == (t + 1, 2, 15)
        assert_same_state(ours, theirs)
    ours.reset()
    ours(x[0].to(path.device))
    assert ours.v_seq.shape == (1, 2, 15)


def test_v_seq_is_that_of_the_last_call_in_multi_step(path, sj):
    theirs, ours = pair(sj, path, store_v_seq=True, step_mode="m")
    for x in (current(3, 2, 15), current(2, 2, 15, seed=1)):
        ours(x.to(path.device)), theirs(x)
        assert_same_state(ours, theirs)


def test_v_seq_after_a_change_of_step_mode(path, sj):
    theirs, ours = pair(sj, path, store_v_seq=True, step_mode="m")
    x = current(3, 2, 15)
    for node, where in ((theirs, "cpu"), (ours, path.device)):
        node(x.to(where))
        node.step_mode = "s"
        node(x[0].to(where))
    assert_same_state(ours, theirs)


def test_v_seq_starts_again_when_the_dtype_changes(path, sj):
    theirs, ours = pair(sj, path, store_v_seq=True)
    x = current(2, 15)
    for node, where in ((theirs, "cpu"), (ours, path.device)):
        node(x.to(where))
        node(x.double().to(where))
    assert ours.v_seq.dtype == theirs.v_seq.dtype == torch.float64
    assert_same_state(ours, theirs)


def test_store_v_seq_can_be_switched(path, sj):
    theirs, ours = pair(sj, path, step_mode="m")
    x = current(3, 2, 15)
    for node, where in ((theirs, "cpu"), (ours, path.device)):
        node(x.to(where))
        assert node.v_seq is None
        node.store_v_seq = True
        node(x.to(where))
        assert node.v_seq.shape == x.shape
        node.store_v_seq = False
        assert node.v_seq is None


def test_step_mode_can_be_switched(path, sj):
    theirs, ours = pair(sj, path)
    x = current(4, 2, 15)
    for node, where in ((theirs, "cpu"), (ours, path.device)):
        node(x[0].to(where))
        node.step_mode = "m"
        node(x[1:].to(where))
    assert_same_state(ours, theirs)


# ------------------------------------------------------------------------------------------- a potential read late


def is_pending(node) -> bool:
    """Whether the last call has left its potential to whoever reads it."""
    return not isinstance(node._state.v, (Tensor, float))


def pending_node(kernel_device, **options):
    """A node of ours after a multi-step call that recorded gradients, its input and its spikes."""
    node = LIFNode(tau=3.0, step_mode="m", backend="triton", **options)
    x = current(4, 2, 15).to(kernel_device).requires_grad_()
    return node, x, node(x)


def test_the_potential_is_computed_when_it_is_read(kernel_device):
    node, x, _ = pending_node(kernel_device)
    assert is_pending(node)
    plain = LIFNode(tau=3.0, step_mode="m", backend="torch")
    plain(x.cpu())
    assert torch.equal(node.v.cpu(), plain.v) and not is_pending(node) and node.v is node.v
    node(x), plain(x.cpu())  # goes on from there, and now writes it
    assert not is_pending(node) and torch.equal(node.v.cpu(), plain.v)


def test_the_potential_is_written_where_no_gradient_is_recorded(kernel_device):
    x = current(4, 2, 15).to(kernel_device)
    for mode, steps, wants in (("m", 4, False), ("m", 1, True), ("s", 4, True)):
        node = LIFNode(step_mode=mode, backend="triton")
        run(node, x[:steps].clone().requires_grad_(wants))
        assert not is_pending(node), (mode, steps, wants)


@pytest.mark.parametrize("when", ["before the backward pass", "after it", "without gradients"])
def test_when_the_potential_is_read(when, path):
    """Its value is the same; its gradient comes in where it is used in the loss, also if it was read in no_grad."""
    x = current(4, 2, 15)
    results = []
    for node, x_in in (
        (LIFNode(step_mode="m", backend="torch"), leaf(x, Path("cpu", ""))),
        (LIFNode(step_mode="m", backend=path.backend), leaf(x, path)),
    ):
        spikes = node(x_in)
        loss = (spikes * weights(spikes)).sum()
        if when == "without gradients":
            with torch.no_grad():
                node.v  # noqa: B018
        if when != "after it":
            loss = loss + (node.v * weights(node.v, 12)).sum()
        loss.backward()
        results.append((node.v.detach().cpu(), x_in.grad.cpu()))
    assert torch.equal(results[0][0], results[1][0])
    assert_gradients_close(results[1][1], results[0][1])


def test_gradients_through_the_potential_again_and_alone(path):
    """A retained graph gives the same gradients twice; the potential alone gives its own."""
    x = leaf(current(4, 2, 15), path)
    node = LIFNode(step_mode="m", backend=path.backend)
    spikes = node(x)
    losses = {"spikes": (spikes * weights(spikes)).sum(), "v": node.v.square().sum()}
    grads = {name: torch.autograd.grad(loss, x, retain_graph=True)[0] for name, loss in losses.items()}
    for _ in range(2):
        (both,) = torch.autograd.grad(losses["spikes"] + losses["v"], x, retain_graph=True)
        assert_gradients_close(both, (grads["spikes"] + grads["v"]).cpu())


def test_a_changed_input_is_an_error(kernel_device):
    node, x, _ = pending_node(kernel_device)
    x.detach().add_(1)
    with pytest.raises(RuntimeError, match="changed in place since; read v before"):
        node.v  # noqa: B018
    node.reset()
    assert node.v == 0.0


def test_a_pending_potential_keeps_the_rules_of_state(kernel_device):
    node, x, _ = pending_node(kernel_device)
    node.detach()
    assert not node.v.requires_grad and node.v.abs().max() > 0.1
    node, x, _ = pending_node(kernel_device)
    node.v = 0.25
    assert node.v == 0.25
    node, x, _ = pending_node(kernel_device)
    node.to(torch.float64)
    assert node.v.dtype == torch.float64
    node, x, _ = pending_node(kernel_device, store_v_seq=True)
    assert torch.equal(node.v, node.v_seq[-1])
    node, x, _ = pending_node(kernel_device)
    node.step_mode = "s"
    plain = LIFNode(tau=3.0, backend="torch")
    run(plain, x.cpu())
    assert torch.equal(node(x[0]).cpu(), plain(x[0].cpu())) and torch.equal(node.v.cpu(), plain.v)


def test_saved_tensor_hooks_are_not_circumvented(kernel_device):
    """Where tensors for the backward pass are kept elsewhere, the input does not stay for the potential's sake."""
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("this torch does not tell whether there are hooks")
    with torch.autograd.graph.save_on_cpu():
        node, _, _ = pending_node(kernel_device)
    assert not is_pending(node)


def test_no_reference_cycle_keeps_the_input(kernel_device):
    node, x, spikes = pending_node(kernel_device)
    intermediate = x * 1.0
    node.reset()
    spikes = node(intermediate)
    alive = weakref.ref(intermediate)
    node.reset()
    gc.disable()
    try:
        del spikes, intermediate
        assert alive() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------ dtypes and devices


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_float64(step_mode, path, sj):
    """float64 stays float64 and takes the reference on every device."""
    theirs, ours = pair(sj, path, tau=3.0, step_mode=step_mode, store_v_seq=True)
    x = current(4, 2, 15).double()
    x_ours, x_theirs = leaf(x, path), leaf(x, Path("cpu", ""))
    spikes, expected = run(ours, x_ours), run(theirs, x_theirs)
    assert spikes.dtype == torch.float64
    assert torch.equal(spikes.cpu(), expected)
    torch.testing.assert_close(ours.v.cpu(), theirs.v, rtol=1e-14, atol=1e-14)
    assert ours.v_seq.dtype == torch.float64
    (spikes * weights(spikes)).sum().backward()
    (expected * weights(expected)).sum().backward()
    torch.testing.assert_close(x_ours.grad.cpu(), x_theirs.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_half_types_keep_a_float32_potential(dtype, step_mode, path, sj):
    """The spikes are those of SpikingJelly in float32 on the same (rounded) numbers."""
    theirs, ours = pair(sj, path, tau=3.0, step_mode=step_mode)
    x = current(4, 2, 15).to(dtype)
    x_ours = leaf(x, path)
    spikes = run(ours, x_ours)
    assert spikes.dtype == dtype and ours.v.dtype == torch.float32
    assert torch.equal(spikes.float().cpu(), run(theirs, x.float()))
    assert torch.equal(ours.v.cpu(), theirs.v)
    spikes.sum().backward()
    assert x_ours.grad.dtype == dtype and x_ours.grad.abs().max() > 1e-2


def test_to_moves_and_casts_the_state(path, sj):
    theirs, ours = pair(sj, path, step_mode="m", store_v_seq=True)
    x = current(3, 2, 15)
    for node, where in ((theirs, "cpu"), (ours, path.device)):
        node(x.to(where))
        nn.Sequential(node).to(torch.float64)
        assert node.v.dtype == torch.float64
        node.to("meta")
        assert node.v.is_meta
    assert ours.v_seq.is_meta  # SpikingJelly leaves v_seq behind


def test_input_of_another_dtype_casts_the_state(path, sj):
    theirs, ours = pair(sj, path, tau=3.0, step_mode="m")
    x = current(3, 2, 15)
    for node, where in ((theirs, "cpu"), (ours, path.device)):
        node(x.to(where))
        node(x.double().to(where))
    assert ours.v.dtype == theirs.v.dtype == torch.float64
    torch.testing.assert_close(ours.v.cpu(), theirs.v, rtol=1e-14, atol=1e-14)
    ours(x.to(path.device))
    assert ours.v.dtype == torch.float32


@pytest.mark.gpu
def test_the_state_follows_the_input_to_the_gpu():
    node = LIFNode(step_mode="m")
    x = current(3, 2, 15)
    node(x)
    on_cpu = copy.deepcopy(node)
    assert torch.equal(node(x.cuda()).cpu(), on_cpu(x))
    assert node.v.is_cuda and torch.equal(node.v.cpu(), on_cpu.v)
    assert node.cpu().v.device.type == "cpu"


@pytest.mark.gpu
def test_the_default_backend_runs_the_kernels_on_the_gpu(monkeypatch):
    calls = []
    run_kernels = LIFNode._run_kernels
    monkeypatch.setattr(LIFNode, "_run_kernels", lambda *a: calls.append(1) or run_kernels(*a))
    x = current(3, 2, 15).cuda()
    for backend, expected in ((None, 1), ("cupy", 2), ("triton", 3), ("torch", 3)):
        LIFNode(step_mode="m", backend=backend)(x)
        assert len(calls) == expected


def test_state_dict_is_empty(path):
    node = LIFNode(step_mode="m", store_v_seq=True, backend=path.backend)
    node.collect_statistics = True
    node(current(3, 2, 15).to(path.device))
    assert len(node.state_dict()) == 0 and not list(node.parameters()) and not list(node.buffers())
    model = nn.Sequential(nn.Linear(2, 2), node)
    model.load_state_dict(nn.Sequential(nn.Linear(2, 2), LIFNode()).state_dict())


def test_train_and_eval_compute_the_same(path):
    x = current(3, 2, 15).to(path.device)
    node = LIFNode(step_mode="m", backend=path.backend)
    trained = node.train()(x)
    node.reset()
    assert torch.equal(node.eval()(x), trained)


def test_copies(path):
    """A node can be copied before its first call and after detach(), state included."""
    node = LIFNode(tau=3.0, v_reset=None, step_mode="m", backend=path.backend)
    x = current(3, 2, 15).to(path.device)
    twin = copy.deepcopy(node)
    assert torch.equal(node(x), twin(x))
    node.detach()
    again = copy.deepcopy(node)
    assert torch.equal(node(x), again(x)) and torch.equal(node.v, again.v)


# ---------------------------------------------------------------------------------------------- SpikingJelly's tools


def test_spikingjellys_functions_on_a_model_of_ours(path, sj):
    torch.manual_seed(0)
    model = nn.Sequential(
        sj.layer.Linear(6, 8),
        LIFNode(v_reset=0.1, backend=path.backend, store_v_seq=True),
        sj.layer.Linear(8, 4),
        IFNode(backend=path.backend),
    ).to(path.device)
    x = current(3, 2, 6).to(path.device)
    single = torch.stack([model(step) for step in x])
    sj.functional.reset_net(model)
    assert (model[1].v, model[1].v_seq, model[3].v) == (0.1, None, 0.0)
    sj.functional.set_step_mode(model, "m")
    assert model[1].step_mode == model[3].step_mode == "m"
    torch.testing.assert_close(model(x), single)
    assert model[1].v.requires_grad and model[3].v.requires_grad
    sj.functional.detach_net(model)
    assert not (model[1].v.requires_grad or model[1].v_seq.requires_grad or model[3].v.requires_grad)
    with pytest.raises(ValueError, match="step_mode"):
        sj.functional.set_step_mode(model, "x")


def test_a_whole_network_trains_as_spikingjellys(path, sj):
    """Convolution, normalisation, pooling and two kinds of neuron: the same loss and the same parameter gradients."""

    def build(lif, if_, **backend):
        torch.manual_seed(1)
        return nn.Sequential(
            sj.layer.SeqToANNContainer(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)),
            lif(tau=3.0, step_mode="m", detach_reset=True, **backend),
            sj.layer.SeqToANNContainer(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5)),
            if_(v_threshold=0.3, v_reset=None, step_mode="m", **backend),
        )

    theirs = build(sj.neuron.LIFNode, sj.neuron.IFNode)
    ours = build(LIFNode, IFNode, backend=path.backend).to(path.device)
    x = current(4, 3, 1, 6, 6)
    expected = theirs(x).mean(0)
    assert 0.1 < expected.mean() < 0.9
    expected.square().sum().backward()
    with torch.backends.cudnn.flags(enabled=False):  # TensorFloat-32 convolutions would flip spikes
        found = ours(x.to(path.device)).mean(0)
        found.square().sum().backward()
    torch.testing.assert_close(found.cpu(), expected)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert b.grad.abs().max() > 1e-4, name
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- constructor refusals


@pytest.mark.parametrize(
    "cls, options, error, message",
    [
        (LIFNode, {"tau": 1.0}, ValueError, "tau must be a float > 1.0, got 1.0"),
        (LIFNode, {"tau": 0.5}, ValueError, "tau .* got 0.5"),
        (LIFNode, {"tau": 2}, ValueError, "tau .* got 2"),
        (LIFNode, {"tau": float("nan")}, ValueError, "tau .* got nan"),
        (LIFNode, {"v_threshold": 1}, TypeError, "v_threshold .* got 1"),
        (IFNode, {"v_threshold": "1"}, TypeError, "v_threshold .* got '1'"),
        (LIFNode, {"v_reset": 0}, TypeError, "v_reset .* got 0"),
        (IFNode, {"v_reset": "soft"}, TypeError, "v_reset .* got 'soft'"),
        (LIFNode, {"detach_reset": 1}, TypeError, "detach_reset .* got 1"),
        (IFNode, {"detach_reset": None}, TypeError, "detach_reset .* got None"),
        (LIFNode, {"step_mode": "multi"}, ValueError, "step_mode .* got 'multi'"),
        (IFNode, {"step_mode": None}, ValueError, "step_mode .* got None"),
        (LIFNode, {"backend": "cuda"}, ValueError, "backend .* got 'cuda'"),
        (IFNode, {"tau": 2.0}, TypeError, "tau"),
        (LIFNode, {"surrogate_function": "atan"}, TypeError, r"sadp_fast.surrogate.ATan\(\), got 'atan': pass an inst"),
        (IFNode, {"surrogate_function": 2.0}, TypeError, "surrogate_function must be a callable .* got 2.0"),
        (LIFNode, {"surrogate_function": surrogates.ATan}, TypeError, "got <class .*ATan'>: pass an instance, not a"),
    ],
)
def test_wrong_arguments_are_named(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls(**options)


@pytest.mark.parametrize("options", [{"tau": 1.0}, {"tau": 2}, {"v_threshold": 1}, {"v_reset": 0}, {"detach_reset": 1}])
def test_spikingjelly_refuses_the_same(options, sj):
    with pytest.raises(AssertionError):
        sj.neuron.LIFNode(**options)


@pytest.mark.parametrize("name, value", [("step_mode", "x"), ("backend", "numpy")])
def test_setters_refuse_and_keep_the_old_value(name, value):
    node = LIFNode()
    before = getattr(node, name)
    with pytest.raises(ValueError, match=f"{name} .* got {value!r}"):
        setattr(node, name, value)
    assert getattr(node, name) == before


@pytest.mark.parametrize("shape", [(0, 2, 3), ()])
def test_multi_step_needs_a_step(shape, path):
    with pytest.raises(ValueError, match="T >= 1"):
        LIFNode(step_mode="m", backend=path.backend)(torch.zeros(shape, device=path.device))


@pytest.mark.parametrize("backend", [None, "torch", "cupy"])
def test_backends_on_the_cpu(backend, sj):
    """The keyword of SpikingJelly 0.0.0.0.14; on the CPU each of these is the reference."""
    x = current(3, 2, 15)
    node = LIFNode(tau=2.0, backend=backend, step_mode="m")
    assert node.backend == backend and backend in node.supported_backends
    assert torch.equal(node(x), sj.neuron.LIFNode(tau=2.0, step_mode="m")(x))


def test_triton_on_the_cpu_without_the_interpreter_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend='triton' needs a CUDA tensor"):
        LIFNode(backend="triton")(torch.zeros(2, 3))


def test_repr_shows_the_options():
    text = repr(LIFNode(tau=3.0, v_reset=None, step_mode="m"))
    for part in ("tau=3.0", "v_reset=None", "step_mode=m", "v_threshold=1.0", "Sigmoid"):
        assert part in text


# -------------------------------------------------------------------------------------------------------- surrogates


@pytest.mark.filterwarnings("error:.*is not fused")
@pytest.mark.parametrize("alpha", [None, 1.7])
@pytest.mark.parametrize("cls", surrogates.FUSED)
def test_surrogates_ours_and_theirs(cls, alpha, path, sj):
    """Ours in our node, SpikingJelly's in our node, SpikingJelly's in SpikingJelly's: one gradient, no warning."""
    options = {} if alpha is None else {"alpha": alpha}
    theirs = getattr(sj.surrogate, cls.__name__)
    x = current(3, 2, 15)
    results = []
    for node, x_in in (
        (sj.neuron.LIFNode(surrogate_function=theirs(**options), step_mode="m"), leaf(x, Path("cpu", ""))),
        (LIFNode(surrogate_function=theirs(**options), step_mode="m", backend=path.backend), leaf(x, path)),
        (LIFNode(surrogate_function=cls(**options), step_mode="m", backend=path.backend), leaf(x, path)),
    ):
        spikes = node(x_in)
        (spikes * weights(spikes)).sum().backward()
        results.append((spikes.detach().cpu(), x_in.grad.cpu()))
    for spikes, grad in results[1:]:
        assert torch.equal(spikes, results[0][0])
        assert_gradients_close(grad, results[0][1])


class Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad * (1 - u.abs()).clamp(min=0)


def fast_sigmoid(slope=25):
    """A surrogate as snnTorch writes them: a closure over a constant."""

    class FastSigmoid(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            ctx.save_for_backward(u)
            return (u > 0).to(u.dtype)

        @staticmethod
        def backward(ctx, grad):
            (u,) = ctx.saved_tensors
            return grad / (slope * u.abs() + 1.0) ** 2

    def inner(x):
        return FastSigmoid.apply(x)

    return inner


class Trainable(nn.Module):
    """A surrogate with a parameter, which has to get its gradient."""

    def __init__(self):
        super().__init__()
        self.width = nn.Parameter(torch.tensor(2.0))

    def forward(self, u):
        soft = torch.sigmoid(self.width * u)
        return soft + ((u >= 0).to(u.dtype) - soft).detach()


@pytest.mark.parametrize(
    "surrogate", [Triangle.apply, fast_sigmoid(), Trainable()], ids=["function", "closure", "module"]
)
def test_any_callable_surrogate(surrogate, path, sj):
    """It runs through the reference, as in SpikingJelly, and the kernel path, and only that, says so once."""
    x = current(4, 2, 15)
    theirs = sj.neuron.LIFNode(surrogate_function=surrogate, step_mode="m")
    ours = LIFNode(surrogate_function=surrogate, step_mode="m", backend=path.backend).to(path.device)
    x_ours, x_theirs = leaf(x, path), leaf(x, Path("cpu", ""))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spikes = ours(x_ours)
        ours.reset()
        ours(x_ours.detach())
    messages = [str(w.message) for w in caught if "is not fused" in str(w.message)]
    assert len(messages) == (1 if path.backend == "triton" else 0)
    assert all("Sigmoid, ATan" in message for message in messages)
    (spikes * weights(spikes)).sum().backward()
    if isinstance(surrogate, nn.Module):
        assert surrogate.width.grad.abs() > 1e-3
        surrogate.cpu()
    expected = theirs(x_theirs)
    (expected * weights(expected)).sum().backward()
    assert torch.equal(spikes.cpu(), expected)
    assert_gradients_close(x_ours.grad, x_theirs.grad)


@pytest.mark.parametrize("name", ["QPseudoSpike", "S2NN", "LeakyKReLU", "PiecewiseLeakyReLU", "LogTailedReLU"])
@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_spikingjellys_other_surrogates(name, path, sj):
    theirs, ours = pair(sj, path, surrogate_function=getattr(sj.surrogate, name)(), step_mode="m")
    x = current(3, 2, 15)
    x_ours, x_theirs = leaf(x, path), leaf(x, Path("cpu", ""))
    spikes, expected = ours(x_ours), theirs(x_theirs)
    (spikes * weights(spikes)).sum().backward()
    (expected * weights(expected)).sum().backward()
    assert torch.equal(spikes.cpu(), expected)
    assert_gradients_close(x_ours.grad, x_theirs.grad)


@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_a_surrogate_that_is_not_spiking_gives_the_primitive(mine, path, sj):
    theirs = sj.neuron.LIFNode(surrogate_function=sj.surrogate.ATan(spiking=False), step_mode="m")
    surrogate = surrogates.ATan(spiking=False) if mine else sj.surrogate.ATan(spiking=False)
    ours = LIFNode(surrogate_function=surrogate, step_mode="m", backend=path.backend)
    x = current(3, 2, 15)
    out = ours(x.to(path.device))
    assert ((out > 0) & (out < 1)).all()
    torch.testing.assert_close(out.cpu(), theirs(x), rtol=1e-5, atol=1e-6)


def test_a_surrogate_can_be_exchanged(path):
    node = IFNode(step_mode="m", backend=path.backend)
    gradients = []
    for surrogate in (surrogates.Sigmoid(), surrogates.Sigmoid(alpha=1.0), surrogates.SuperSpike()):
        node.reset()
        node.surrogate_function = surrogate
        x = torch.full((1, 1, 1), 0.5, device=path.device, requires_grad=True)
        node(x).sum().backward()
        gradients.append(x.grad.item())
    q = [1 / (1 + math.exp(0.5 * a)) for a in (4.0, 1.0)]
    assert gradients == pytest.approx([4 * q[0] * (1 - q[0]), q[1] * (1 - q[1]), 1 / 1.5**2], rel=1e-5)


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_replicas_of_data_parallel_have_a_state_of_their_own(step_mode, path):
    node = LIFNode(step_mode=step_mode, backend=path.backend)
    x = current(3, 2, 7).to(path.device)
    replicas = [node._replicate_for_data_parallel() for _ in range(2)]
    first, second = (run(replica, x) for replica in replicas)
    assert torch.equal(first, second) and node.v == 0.0
    assert torch.equal(replicas[0].v, replicas[1].v)


@pytest.mark.parametrize("kind", ["LIF", "BatchNorm + LIF"])
def test_training_goes_on_from_a_state_of_inference_mode(kind, path):
    node = LIFNode(step_mode="m", backend=path.backend) if kind == "LIF" else BatchNormLIF(7, backend=path.backend)
    node.to(path.device)
    x = current(3, 2, 7).to(path.device)
    with torch.inference_mode():
        node(x)
    x = x.clone().requires_grad_()
    node(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("value", [np.float32(0.5), 1, True])
def test_v_takes_any_number(value, path):
    node = LIFNode(step_mode="m", backend=path.backend)
    node.v = value
    spikes = node(current(3, 2, 7).to(path.device))
    other = LIFNode(step_mode="m", backend=path.backend)
    other.v = float(value)
    assert torch.equal(spikes, other(current(3, 2, 7).to(path.device)))


def test_v_takes_nothing_else():
    with pytest.raises(TypeError, match=r"v must be a number or a tensor .*got None.*reset\(\)"):
        LIFNode().v = None


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("tau", 0.5, ValueError, "tau must be a float > 1.0, got 0.5"),
        ("tau", torch.tensor(3.0), ValueError, "tau must be a float > 1.0, got tensor"),
        ("v_threshold", np.float32(0.7), TypeError, "v_threshold must be a float"),
        ("v_threshold", torch.tensor(0.7), TypeError, "v_threshold must be a float, got tensor"),
        ("v_reset", 0, TypeError, "v_reset must be a float or None"),
        ("detach_reset", 1, TypeError, "detach_reset must be True or False, got 1"),
        ("decay_input", "no", TypeError, "decay_input must be True or False, got 'no'"),
    ],
)
def test_constants_that_are_set_are_checked_as_the_constructors(name, value, error, message):
    node = LIFNode()
    before = getattr(node, name)
    with pytest.raises(error, match=message):
        setattr(node, name, value)
    assert getattr(node, name) == before
    with pytest.raises(error, match=message):
        LIFNode(**{name: value})


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["LIF", "BatchNorm + LIF"])
def test_traced_by_torchscript(kind, path):
    """By the reference: to the tracer, sizes are tensors."""
    node = LIFNode(step_mode="m", backend=path.backend) if kind == "LIF" else BatchNormLIF(5, backend=path.backend)
    node.to(path.device).eval()
    x = current(3, 2, 5).to(path.device)
    with torch.no_grad():
        traced = torch.jit.trace(node, x, check_trace=False)
        node.reset()
        expected = node(x)
        assert expected.mean() > 0 and torch.equal(traced(x), expected)


def test_forward_mode_differentiation_is_refused(path):
    """Torch's own refusal; a tangent that is lost would be a gradient of zero."""
    x = current(3, 2, 7).to(path.device)
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match=r"forward|jvp|vmap"):
        LIFNode(step_mode="m", backend=path.backend)(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("cls", [LIFNode, ParametricLIFNode])
def test_integers_as_input(cls, path):
    """Spikes are of the state's dtype, as SpikingJelly's are; a learned tau gets its gradient."""
    x = (current(3, 2, 7) * 2).round().to(path.device)
    spikes, expected = (cls(step_mode="m", backend=path.backend).to(path.device)(values) for values in (x.int(), x))
    assert spikes.dtype == torch.float32 and torch.equal(spikes, expected) and 0 < spikes.mean() < 1
    assert spikes.requires_grad == (cls is ParametricLIFNode)


# -------------------------------------------------------------------------------------------------------- statistics


def statistics_node(path, step_mode="m", cls=LIFNode, **options):
    node = cls(step_mode=step_mode, backend=path.backend, **options)
    node.collect_statistics = True
    return node


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 15), (3, 2, 4, 3, 5), (18, 2, 7)], ids=str)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_statistics(shape, step_mode, path):
    """Counts are exact; the norm is that of x's gradient, known after the backward pass."""
    node = statistics_node(path, step_mode)
    x = leaf(current(*shape), path)
    spikes = run(node, x)
    assert node.spike_count.dtype == torch.int32 and node.grad_norm_sq.dtype == torch.float32
    assert node.spike_count.shape == node.grad_norm_sq.shape == shape[:2]
    assert node.grad_norm_sq.isnan().all()
    (spikes * weights(spikes)).sum().backward()
    expected = spikes.detach().cpu().flatten(2).sum(-1) if len(shape) > 2 else spikes.detach().cpu()
    assert torch.equal(node.spike_count.cpu(), expected.int())
    flat = x.grad.cpu().double().reshape(*shape[:2], -1)
    torch.testing.assert_close(node.grad_norm_sq.cpu().double(), flat.square().sum(-1), rtol=1e-5, atol=1e-12)
    assert not node.spike_count.requires_grad and not node.grad_norm_sq.requires_grad


def test_statistics_do_not_change_the_results(path):
    x = current(4, 2, 15)
    results = []
    for on in (False, True):
        node = LIFNode(step_mode="m", backend=path.backend)
        node.collect_statistics = on
        x_in = leaf(x, path)
        spikes = node(x_in)
        (spikes * weights(spikes)).sum().backward()
        results.append((spikes.detach(), node.v.detach(), x_in.grad))
    for without, with_statistics in zip(*results, strict=True):
        assert torch.equal(without, with_statistics)


def test_statistics_off_and_after_reset(path):
    node = LIFNode(step_mode="m", backend=path.backend)
    x = leaf(current(3, 2, 15), path)
    node(x).sum().backward()
    assert node.spike_count is None and node.grad_norm_sq is None and node.calls == [] and node.recorder is None
    node.collect_statistics = True
    node.reset()
    node(x)
    assert node.spike_count is not None
    node.reset()
    assert node.spike_count is None and node.grad_norm_sq is None


def test_statistics_without_a_backward_pass(path):
    node = statistics_node(path)
    with torch.no_grad():
        node(current(3, 2, 15).to(path.device))
    assert node.spike_count is not None and node.grad_norm_sq is None


def test_two_calls_before_the_backward_pass(path):
    """Each call keeps its own buffer, which its own backward pass writes."""
    node = statistics_node(path)
    xs = [leaf(current(3, 2, 15, seed=seed), path) for seed in (0, 1)]
    losses, calls = [], []
    for factor, x in zip((1.0, 10.0), xs, strict=True):
        node.reset()
        losses.append((node(x) * factor).sum())
        calls += node.calls
    sum(losses).backward()
    for x, call in zip(xs, calls, strict=True):
        expected = x.grad.double().square().sum(-1)
        torch.testing.assert_close(call.grad_norm_sq.double(), expected, rtol=1e-5, atol=1e-12)
        assert call.spike_count.shape == (3, 2)
    assert torch.equal(node.grad_norm_sq, calls[1].grad_norm_sq)


def test_one_layer_used_twice_in_one_forward_pass(path):
    """Gradients cross the calls; the statistics in 'm' are the last call's."""
    node = statistics_node(path)
    x = leaf(current(6, 2, 15), path)
    first = node(x[:3])
    first_call = node.calls[0]
    second = node(x[3:])
    (first.sum() + second.sum()).backward()
    expected = x.grad.double().square().sum(-1)
    norms = torch.cat((first_call.grad_norm_sq, node.grad_norm_sq)).double()
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=1e-12)


def test_statistics_of_large_examples(path):
    """Over several programs, read several times, and after another backward pass through the same graph."""
    node = statistics_node(path)
    x = leaf(current(2, 2, 1500), path)
    spikes = node(x)
    for factor in (1.0, 3.0):
        (gradient,) = torch.autograd.grad(spikes.sum() * factor, x, retain_graph=True)
        for _ in range(2):
            torch.testing.assert_close(node.grad_norm_sq, gradient.square().sum(-1), rtol=1e-5, atol=0)
            assert torch.equal(node.spike_count, spikes.detach().sum(-1).int())


class Scaled(CallRecorder):
    """Norms of the gradient times a scale, as behind a normalisation."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def begin(self, call):
        call.channel_scale = self.scale
        return super().begin(call)


def scaled_node(path, step_mode, scale):
    node = LIFNode(step_mode=step_mode, backend=path.backend)
    node.recorder = Scaled(scale)
    return node


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_channel_scale(step_mode, channels_last, path):
    scale = torch.tensor([0.5, -2.0, 3.0], device=path.device)
    node = scaled_node(path, step_mode, scale)
    x = current(2, 2, 3, 4, 5)
    if channels_last:
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 2))
    x = x.to(path.device).requires_grad_()
    spikes = run(node, x)
    (spikes * weights(spikes)).sum().backward()
    scaled = (x.grad * scale.view(3, 1, 1)).double()
    torch.testing.assert_close(
        node.recorder.grad_norm_sq.double(), scaled.square().sum((2, 3, 4)), rtol=1e-5, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["strided", "expanded", "float64"])
def test_channel_scale_in_any_layout(kind, path):
    scale = torch.tensor([[0.5, 9.0], [-2.0, 9.0], [3.0, 9.0]], device=path.device)[:, 0]
    if kind == "expanded":
        scale = scale[:1].expand(3)
    elif kind == "float64":
        scale = scale.double()
    node = scaled_node(path, "m", None)
    x = leaf(current(2, 2, 3, 4), path)
    for scaled_by in (torch.ones(3, device=path.device), scale):  # the launch is prepared by the first
        node.recorder.scale, x.grad = scaled_by, None
        node.reset()
        node(x).sum().backward()
        scaled = (x.grad * scaled_by.view(3, 1)).double()
        torch.testing.assert_close(
            node.recorder.grad_norm_sq.double(), scaled.square().sum((2, 3)), rtol=1e-5, atol=1e-12
        )


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_statistics_where_only_the_initial_potential_wants_a_gradient(step_mode, path):
    node = statistics_node(path, step_mode)
    v = torch.zeros(2, 7, device=path.device, requires_grad=True)
    node.v = v
    run(node, current(1, 2, 7).to(path.device)).sum().backward()
    assert v.grad.norm() > 0 and node.grad_norm_sq.shape == (1, 2) and (node.grad_norm_sq > 0).all()


def test_statistics_of_single_steps_start_anew_with_another_batch(path):
    node = statistics_node(path, "s")
    x = current(3, 4, 7).to(path.device)
    node(x[0]), node(x[1])
    assert node.spike_count.shape == (2, 4)
    node(x[2, :1])
    assert node.spike_count.shape == (1, 1) and node.grad_norm_sq.shape == (1, 1)


def test_statistics_need_a_batch_dimension(path):
    with pytest.raises(ValueError, match=r"batch dimension, got input of shape \(3,\)"):
        statistics_node(path)(torch.zeros(3, device=path.device))


@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_statistics_with_a_surrogate_that_is_not_fused(path):
    node = statistics_node(path, surrogate_function=fast_sigmoid())
    x = leaf(current(3, 2, 15), path)
    spikes = node(x)
    spikes.sum().backward()
    assert torch.equal(node.spike_count, spikes.sum(-1).int())
    torch.testing.assert_close(node.grad_norm_sq, x.grad.square().sum(-1))


def test_reset_and_neurons_of_a_model(path):
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(statistics_node(path), nn.Identity()), IFNode(v_reset=0.2))
    model[2].step_mode, model[2].backend = "m", path.backend
    model.to(path.device)(current(2, 3, 4).to(path.device))
    assert list(neurons(model)) == ["1.0", "2"]
    assert neurons(model)["2"] is model[2]
    reset(model)
    assert (model[1][0].v, model[1][0].calls, model[2].v) == (0.0, [], 0.2)


def test_constants_can_be_set_afterwards():
    node, built = LIFNode(step_mode="m"), LIFNode(4.0, False, 0.5, -0.1, detach_reset=True, step_mode="m")
    node.tau, node.decay_input, node.v_threshold, node.v_reset, node.detach_reset = 4.0, False, 0.5, -0.1, True
    node.reset()
    x = torch.randn(3, 2, 9)
    assert torch.equal(node(x), built(x)) and torch.equal(node.v, built.v)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_input_without_batch_dimension(shape, kernel_device):
    x = torch.randn(shape, device=kernel_device)
    fused, plain = LIFNode(step_mode="m", backend="triton"), LIFNode(step_mode="m", backend="torch")
    assert torch.equal(fused(x), plain(x)) and torch.equal(fused.v, plain.v)
