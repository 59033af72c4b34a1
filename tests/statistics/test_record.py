"""``sadp_fast.record``: what a model's neurons do, by layer and example, against autograd and the equations."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sadp_fast
from sadp_fast import SADP, BatchNormIF, BatchNormLIF, BatchNormParametricLIF, IFNode, LIFNode, ParametricLIFNode
from sadp_fast.nn.node import neurons
from sadp_fast.ops.lif import reference

T, N, C, SIDE, CLASSES = 3, 4, 5, 4, 3
PLAIN = {"LIF": LIFNode, "IF": IFNode, "PLIF": ParametricLIFNode}
NORMALISED = {"BN + LIF": BatchNormLIF, "BN + IF": BatchNormIF, "BN + PLIF": BatchNormParametricLIF}
BACKENDS = ("torch", "triton")


class Net(nn.Module):
    """Two neurons behind convolutions, a linear layer behind them; what goes into a neuron keeps its gradient."""

    def __init__(self, first, second, residual=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.first = nn.Conv2d(2, C, 3, padding=1), first
        self.b, self.second = nn.Conv2d(C, C, 3, padding=1), second
        self.head, self.residual = nn.Linear(C * SIDE * SIDE, CLASSES), residual
        self.currents, self.outputs = [], []

    def forward(self, x):
        s = self.first(self.kept(self.a(x.flatten(0, 1)).unflatten(0, x.shape[:2]) * 2))
        y = self.kept(self.b(s.flatten(0, 1)).unflatten(0, x.shape[:2]) * 8)
        out = self.second(y, s) if self.residual else self.second(y)
        self.outputs = [s.detach(), out.detach() - s.detach() if self.residual else out.detach()]
        return self.head(out.flatten(2))

    def kept(self, current):
        self.currents.append(current)
        current.retain_grad() if current.requires_grad else None
        return current


def data(device="cpu", seed=0, examples=N, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, examples, 2, SIDE, SIDE, generator=generator, dtype=dtype) * 2
    return x.to(device), (torch.arange(examples) % CLASSES).to(device)


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x).mean(0), y)


def counts(outputs):
    return outputs.flatten(2).sum(2).int()


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_neurons_by_layer_and_step(kind, backend, kernel_device):
    """Counts of the output; norms of the gradient that autograd keeps for the input current."""
    options = {"step_mode": "m", "backend": backend}
    model = Net(PLAIN[kind](**options), PLAIN[kind](v_reset=None, **options)).to(kernel_device)
    with sadp_fast.record(model) as statistics:
        loss_of(model, *data(kernel_device)).backward()
    assert list(statistics) == ["first", "second"] and len(statistics) == 2
    for layer, current, output in zip(statistics.values(), model.currents, model.outputs, strict=True):
        assert layer.spike_count.dtype == torch.int32 and layer.grad_norm_sq.dtype == torch.float32
        assert torch.equal(layer.spike_count, counts(output)) and 0 < output.mean() < 1
        expected = current.grad.double().square().flatten(2).sum(2)
        torch.testing.assert_close(layer.grad_norm_sq.double(), expected, rtol=1e-5, atol=1e-14)
        torch.testing.assert_close(layer.firing_rate, output.transpose(0, 1).flatten(1).mean(1))


def in_front_of_the_normalisation(node, x, repeat, upstream):
    """Spikes, and squared norms [T, N] of the gradient for x by step, the statistics of the batch held constant.

    In float64; the neuron is the reference's.
    """
    node, x = copy.deepcopy(node).double(), x.detach().double()
    folded = x if repeat is not None else x.flatten(0, 1)
    mean, variance = node.running_mean, node.running_var
    if node.training:
        channels = folded.transpose(0, 1).flatten(1)
        mean, variance = channels.mean(1), channels.var(1, correction=0)
    broadcast = (-1,) + (1,) * (folded.ndim - 2)
    gain = (node.weight / (variance + node.eps).sqrt()).detach().view(broadcast)
    steps = (x.expand(repeat, *x.shape) if repeat is not None else x).clone().requires_grad_()
    y = (steps - mean.view(broadcast)) * gain + node.bias.detach().view(broadcast)
    spikes, _, _ = reference.multi_step(
        y, torch.zeros_like(y[0]), node.dynamics, node.surrogate_function, reciprocal_tau=node._reciprocal_tau(y)
    )
    (spikes * upstream.double()).sum().backward()
    return spikes.detach(), steps.grad.square().flatten(2).sum(2), steps.grad


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("repeat", [None, T])
@pytest.mark.parametrize("kind", NORMALISED)
def test_normalised_neurons(kind, repeat, training, backend, kernel_device):
    """Spikes by step always; gradients summed over the steps, or by step by another variant."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*(() if repeat else (T,)), N, C, 6, generator=generator).to(kernel_device) * 2
    upstream = torch.randn(T, N, C, 6, generator=generator).to(kernel_device)
    node = NORMALISED[kind](C, backend=backend).to(kernel_device).train(training)
    with torch.no_grad():
        node.weight.copy_(torch.linspace(0.5, 2.0, C))
        node.bias.copy_(torch.linspace(0.2, 0.6, C))
    spikes, norms, gradient = in_front_of_the_normalisation(node, x, repeat, upstream)
    at_all_steps = norms.sum(0) if repeat is None else gradient.sum(0).square().flatten(1).sum(1)
    residual = torch.randint(3, upstream.shape, generator=generator).float().to(kernel_device)
    for by_step in (False, True):
        for added in (None, residual):
            leaf = x.clone().requires_grad_()
            with sadp_fast.record(node, by_step=by_step) as statistics:
                out = node(leaf, added, repeat=repeat)
                (out * upstream).sum().backward()
            layer = statistics[""]
            assert torch.equal(out if added is None else out - added, spikes.to(out))
            assert torch.equal(layer.spike_count, counts(spikes))
            expected = norms if by_step else at_all_steps.unsqueeze(0)
            torch.testing.assert_close(layer.grad_norm_sq.double(), expected, rtol=1e-4, atol=1e-10)
            node.reset()


def test_by_step_changes_no_result(backend, kernel_device):
    """Spikes, gradients, running statistics, the graph behind v."""
    x, y = data(kernel_device)
    results = []
    for by_step in (None, False, True):
        model = Net(BatchNormLIF(C, backend=backend), BatchNormLIF(C, backend=backend), residual=True).to(kernel_device)
        context = sadp_fast.record(model, by_step=by_step) if by_step is not None else torch.enable_grad()
        with context:
            loss = loss_of(model, x, y)
            loss.backward()
        state = [p.grad for p in model.parameters()] + list(model.state_dict().values())
        results.append([loss.detach(), *state, model.second.v.detach()])
        if backend == "triton":
            assert model.second.v.grad_fn is None
    for plain, other, by_step in zip(*results, strict=True):
        assert torch.equal(plain, other)
        torch.testing.assert_close(by_step, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_by_step_normalises_half_precision_as_the_kernels_do(dtype, backend, kernel_device):
    x = (torch.randn(T, 8, C, 6, generator=torch.Generator().manual_seed(0)) * 2).to(kernel_device, dtype)
    outputs = []
    for by_step in (False, True):
        node = BatchNormLIF(C, backend=backend).to(kernel_device)
        with sadp_fast.record(node, by_step=by_step) as statistics:
            out = node(x.clone().requires_grad_(), torch.ones_like(x))
            out.sum().backward()
        outputs.append(out.detach())
        assert out.dtype == dtype and statistics[""].grad_norm_sq.dtype == torch.float32
        assert (statistics[""].grad_norm_sq > 0).all()
    assert torch.equal(*outputs)


def test_single_steps_are_one_pass_until_the_reset(backend, kernel_device):
    model = nn.Sequential(nn.Linear(6, 8), LIFNode(backend=backend), nn.Linear(8, 8), IFNode(backend=backend))
    norm = nn.Sequential(nn.Linear(8, C), BatchNormLIF(C, step_mode="s", backend=backend))
    model = nn.Sequential(model, norm).to(kernel_device)
    x = torch.randn(T, N, 6, generator=torch.Generator().manual_seed(0)).to(kernel_device) * 3
    with sadp_fast.record(model) as statistics:
        for _ in range(2):
            sum(model(step).sum() for step in x).backward()
            sadp_fast.reset(model)
    for layer in statistics.values():
        assert layer.spike_count.shape == layer.grad_norm_sq.shape == (T, N) and layer.grad_norm_sq.isfinite().all()
    assert model[0][1].recorder is None and (statistics["0.1"].grad_norm_sq > 0).any()
    assert list(statistics) == ["0.1", "0.3", "1.1"]


def test_the_last_pass_is_kept(kernel_device):
    """Through a reset, a later backward pass and the end of the `with`; the next pass takes its place."""
    model = Net(LIFNode(step_mode="m"), BatchNormLIF(C)).to(kernel_device)
    with sadp_fast.record(model) as statistics:
        assert statistics["first"].spike_count is None and statistics["first"].grad_norm_sq is None
        for seed in (1, 0):
            loss = loss_of(model, *data(kernel_device, seed))
            sadp_fast.reset(model)
        assert statistics["first"].grad_norm_sq.isnan().all() and statistics["second"].grad_norm_sq.isnan().all()
    loss_of(model, *data(kernel_device, 2))  # is not recorded
    loss.backward()
    assert (statistics["first"].grad_norm_sq > 0).any() and (statistics["second"].grad_norm_sq > 0).all()
    expected = model.currents[2].grad.double().square().flatten(2).sum(2)  # of the second pass's first neuron
    torch.testing.assert_close(statistics["first"].grad_norm_sq.double(), expected, rtol=1e-5, atol=1e-14)


def test_without_gradients(backend, kernel_device):
    model = Net(LIFNode(step_mode="m", backend=backend), BatchNormLIF(C, backend=backend), residual=True)
    model.to(kernel_device).eval()
    for by_step in (False, True):
        with torch.no_grad(), sadp_fast.record(model, by_step=by_step) as statistics:
            model(data(kernel_device)[0])
        for layer, output in zip(statistics.values(), model.outputs, strict=True):
            assert torch.equal(layer.spike_count, counts(output)) and layer.grad_norm_sq is None
        sadp_fast.reset(model)


# ------------------------------------------------------------------------------------------------- the model as it was


def attributes(model):
    return {name: (node.recorder, node.collect_statistics, set(vars(node))) for name, node in neurons(model).items()}


def test_the_model_is_left_as_it_was():
    model = Net(LIFNode(step_mode="m"), BatchNormLIF(C))
    before = attributes(model)
    with pytest.raises(ZeroDivisionError), sadp_fast.record(model):
        loss_of(model, *data())
        raise ZeroDivisionError
    assert attributes(model) == before and not any(m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError), sadp_fast.record(model):
        model(data()[0][..., :1, :1].double())
    assert attributes(model) == before


def test_what_the_user_collects_stays_on(kernel_device):
    model = Net(LIFNode(step_mode="m"), BatchNormLIF(C)).to(kernel_device)
    for node in neurons(model).values():
        node.collect_statistics = True
    before = attributes(model)
    with sadp_fast.record(model, by_step=True) as statistics:
        loss_of(model, *data(kernel_device)).backward()
    assert attributes(model) == before
    for node, layer in zip(neurons(model).values(), statistics.values(), strict=True):
        assert torch.equal(node.spike_count, layer.spike_count) and torch.equal(node.grad_norm_sq, layer.grad_norm_sq)
    sadp_fast.reset(model)
    assert model.first.spike_count is None and model.second.grad_norm_sq is None
    assert all(layer.spike_count is not None for layer in statistics.values())


def test_nested(kernel_device):
    """Both see the same; what is inside sees the gradients by step, and so does what is around it."""
    model = Net(LIFNode(step_mode="m"), BatchNormLIF(C)).to(kernel_device)
    x, y = data(kernel_device)
    with sadp_fast.record(model) as outer:
        with sadp_fast.record(model.second, by_step=True) as inner:
            loss_of(model, x, y).backward()
        assert list(inner) == [""] and inner[""].grad_norm_sq.shape == outer["second"].grad_norm_sq.shape == (T, N)
        assert torch.equal(inner[""].grad_norm_sq, outer["second"].grad_norm_sq)
        kept = inner[""].spike_count.clone()
        sadp_fast.reset(model)
        loss_of(model, *data(kernel_device, 5)).backward()
        assert outer["second"].grad_norm_sq.shape == (1, N) and torch.equal(inner[""].spike_count, kept)
    assert model.second.recorder is None


def test_ended_in_another_order(kernel_device):
    model = Net(LIFNode(step_mode="m"), BatchNormLIF(C)).to(kernel_device)
    first, second = sadp_fast.record(model), sadp_fast.record(model)
    one, other = first.__enter__(), second.__enter__()
    model(data(kernel_device)[0])
    first.__exit__(None, None, None)
    kept = one["first"].spike_count
    sadp_fast.reset(model)
    model(data(kernel_device, 1)[0])
    assert one["first"].spike_count is not None and torch.equal(one["first"].spike_count, kept)
    assert torch.equal(other["first"].spike_count, counts(model.outputs[0]))
    second.__exit__(None, None, None)
    assert model.first.recorder is None and model.second.recorder is None


class Classifier(nn.Module):
    """[B, 6] -> [B, CLASSES]; a normalisation in front of one neuron, another neuron with one of its own."""

    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.lif = nn.Linear(6, 8), nn.BatchNorm1d(8), LIFNode(step_mode="m", backend=backend)
        self.b, self.bn_lif, self.head = nn.Linear(8, C), BatchNormLIF(C, backend=backend), nn.Linear(C, CLASSES)
        self.current = None

    def forward(self, x):
        y = self.norm(self.a(x.expand(T, *x.shape)).flatten(0, 1)).unflatten(0, (T, -1))
        self.current = y
        y.retain_grad() if y.requires_grad else None
        return self.head(self.bn_lif(self.b(self.lif(y)))).mean(0)


@pytest.mark.parametrize("by_step", [None, False, True])
def test_beside_sadp(by_step, backend, kernel_device):
    """Scores are as without it, and so is what is recorded: the neuron's own gradient, not the one SADP scales."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(48, 6, generator=generator).to(kernel_device) * 3, (torch.arange(48) % CLASSES).to(kernel_device)
    results = []
    for recorded in (False, True):
        model = Classifier(backend).to(kernel_device).eval()
        sadp = SADP(model, 48, epochs=8, warmup_epochs=3, tail_epochs=0)
        for _ in range(2):
            for batch, row in enumerate(sadp.batches(16)):
                context = sadp_fast.record(model, by_step=bool(by_step)) if recorded and batch else torch.enable_grad()
                with context as statistics:  # around the forward pass, or around the loss too
                    output = model(x[row])
                    loss = None if by_step is None else sadp.loss(nn.CrossEntropyLoss(), output, y[row])
                loss = sadp.loss(nn.CrossEntropyLoss(), output, y[row]) if loss is None else loss
                loss.backward()
                sadp_fast.reset(model)
                if recorded and batch:
                    norms = model.current.grad.double().square().sum(2)
                    torch.testing.assert_close(statistics["lif"].grad_norm_sq.double(), norms, rtol=1e-5, atol=1e-14)
                    assert statistics["bn_lif"].grad_norm_sq.shape == (T if by_step else 1, 16)
                    assert statistics["bn_lif"].grad_norm_sq.isfinite().all()
        assert model.lif.recorder is None and model.bn_lif.recorder is None
        results.append(sadp.scores)
    assert results[0].isfinite().all()
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("by_step", [False, True])
def test_activation_checkpoints(by_step, reentrant, backend, kernel_device):
    """The second forward pass, within the backward one, does not take the first one's place."""
    x = torch.randn(T, N, C, 6, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    found = []
    for checkpointed in (False, True):
        model = nn.Sequential(BatchNormLIF(C, backend=backend), LIFNode(step_mode="m", backend=backend))
        model.to(kernel_device).eval()
        leaf = x.clone().requires_grad_()
        with sadp_fast.record(model, by_step=by_step) as statistics:
            out = checkpoint(model, leaf, use_reentrant=reentrant) if checkpointed else model(leaf)
            sadp_fast.reset(model)
            (out * torch.arange(6, device=kernel_device)).sum().backward()
        found.append([(layer.spike_count, layer.grad_norm_sq) for layer in statistics.values()])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain[0], again[0]) and (plain[1] > 0).any()
        torch.testing.assert_close(again[1], plain[1], rtol=1e-6, atol=0)


def test_copies_are_not_recorded():
    model = Net(LIFNode(step_mode="m"), BatchNormLIF(C))
    with sadp_fast.record(model) as statistics:
        other = copy.deepcopy(model)
        torch.save(model, io.BytesIO())
        other(data()[0])
        assert not statistics["first"].calls and other.first.recorder is None


# ------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("by_step", [False, True])
def test_compiled(by_step, backend, kernel_device):
    """From the first call on, for several batch sizes, and on the model or on what compiles it."""
    torch._dynamo.reset()
    engine = "inductor" if kernel_device == "cuda" else "aot_eager"
    eager, model = (
        Net(LIFNode(step_mode="m", backend=backend), BatchNormLIF(C, backend=backend)).to(kernel_device)
        for _ in range(2)
    )
    for part in (eager, model):  # a graph returns no tensor that is kept for its gradient
        part.kept = lambda current: current
    run = torch.compile(model, fullgraph=True, backend=engine)
    for seed, examples in enumerate((N, N + 2)):
        x, y = data(kernel_device, seed, examples)
        found = []
        for recorded, forward in ((eager, eager), (run, run)):
            sadp_fast.reset(recorded)
            with sadp_fast.record(recorded, by_step=by_step) as statistics:
                loss = loss_of(forward, x, y)
                assert all(layer.grad_norm_sq.isnan().all() for layer in statistics.values())
                loss.backward()
            assert list(statistics) == ["first", "second"]
            found.append([(layer.spike_count, layer.grad_norm_sq) for layer in statistics.values()])
            sadp_fast.reset(recorded)
            loss_of(forward, x, y)  # is not recorded
        for (count, norms), (compiled_count, compiled_norms) in zip(*found, strict=True):
            assert torch.equal(count, compiled_count) and norms.shape == compiled_norms.shape
            torch.testing.assert_close(compiled_norms, norms, rtol=1e-4, atol=1e-12)


def test_compiled_batches_beyond_the_memory_say_what_to_do(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("sadp_fast.nn.recorder.COMPILED_CAPACITY", T * N - 1)
    model = nn.Sequential(nn.Linear(6, 8), LIFNode(step_mode="m"))
    x = torch.randn(T, N, 6)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    with sadp_fast.record(model) as statistics:
        with pytest.raises(Exception, match=r"run one forward pass with this \[T, N\] = \(3, 4\) uncompiled first"):
            run(x)
        model(x)
        sadp_fast.reset(model)
        run(x).sum().backward()
    assert (statistics["1"].grad_norm_sq > 0).any()


# --------------------------------------------------------------------------------------------------------------- table


def test_table():
    """Rates of known spikes: all, a half, none; a layer that was not called is left out."""

    class Known(nn.Module):
        def __init__(self):
            super().__init__()
            self.every, self.some, self.none, self.unused = (IFNode(step_mode="m") for _ in range(4))

        def forward(self, x):
            return self.every(x + 1), self.some(x + 0.5), self.none(x)

    model = Known()
    with sadp_fast.record(model) as statistics:
        model(torch.zeros(4, 2, 3, 5))
    assert str(statistics).splitlines() == [
        "layer  kind    steps  neurons  spikes an example  firing rate",
        "every  IFNode      4       15               60.0      100.00%",
        "some   IFNode      4       15               30.0       50.00%",
        "none   IFNode      4       15                0.0        0.00%",
        "total                                                  50.00%",
    ]
    assert statistics["some"].firing_rate.tolist() == [0.5, 0.5] and statistics["unused"].firing_rate is None


def test_what_cannot_be_recorded():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got the class Linear"):
        sadp_fast.record(nn.Linear).__enter__()
    with pytest.raises(ValueError, match=r"no neuron of sadp_fast to record, got Linear: put sadp_fast.LIFNode"):
        sadp_fast.record(nn.Linear(2, 2)).__enter__()


def test_what_was_read_of_a_compiled_call_is_not_the_next_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), LIFNode(step_mode="m"))
    run, x, kept = torch.compile(model, backend="aot_eager", fullgraph=True), torch.rand(T, N, 4) * 4, []
    with sadp_fast.record(model) as statistics:
        for factor in (1.0, 0.5):
            sadp_fast.reset(model)
            (run(x).sum() * factor).backward()
            kept.append(statistics["1"].grad_norm_sq)
    assert (kept[0] > 0).any()
    torch.testing.assert_close(kept[1], kept[0] / 4)
