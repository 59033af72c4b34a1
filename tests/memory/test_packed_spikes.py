"""Spikes kept as bits: the kernels against plain torch, and training that must not notice."""

import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from sadp_fast import LIFNode
from sadp_fast.memory import packed_spikes as spike_storage
from sadp_fast.memory.packed_spikes import packed_spikes
from sadp_fast.ops.common.spike_marks import mark, max_count
from sadp_fast.ops.spike_bits import reference as reference
from sadp_fast.surrogate import Sigmoid

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from sadp_fast.ops.spike_bits import op as spike_bits

    return spike_bits


def counts(shape, greatest=1, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(greatest + 1, shape, generator=generator).to(device, dtype)


# -------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("greatest", [1, 2, 3, 5, 15])
def test_bits_and_back(greatest, device):
    for count, dtype in itertools.product((1, 7, 8, 4095, 4096, 4097, 9000), DTYPES):
        flat = counts((count,), greatest, dtype, device)
        flat[-1] = greatest
        buffer = reference.pack(flat, greatest)
        assert buffer.dtype == torch.uint8 and len(buffer) == reference.buffer_bytes(count, greatest)
        assert not reference.broken(buffer, count).any()
        assert torch.equal(reference.unpack(buffer, count, greatest, dtype), flat)


def test_the_format():
    flat = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 1, 0, 1])
    buffer = reference.pack(flat, 1)
    assert buffer[:3].tolist() == [0b10000001, 0b10, 0] and len(buffer) == 512 + 1
    buffer = reference.pack(torch.tensor([1.0, 2, 3]), 3)
    assert buffer[0] == 0b101 and buffer[512] == 0b110


@pytest.mark.parametrize("greatest", [1, 2, 7, 15])
def test_kernels_write_the_same_bits(greatest, kernels, kernel_device):
    for count, dtype in itertools.product((4096, 9001), DTYPES):
        flat = counts((count,), greatest, dtype, kernel_device)
        buffer = kernels.pack(flat, greatest)
        assert torch.equal(buffer, reference.pack(flat, greatest))
        assert torch.equal(kernels.unpack(buffer, count, greatest, dtype), flat)


@pytest.mark.parametrize("wrong", [-1.0, 0.5, 4.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("greatest", [1, 3])
def test_a_broken_promise_makes_its_block_nan(greatest, wrong, kernels, kernel_device):
    flat = counts((3 * 4096 + 5,), greatest, device=kernel_device)
    flat[5000] = wrong
    buffer = kernels.pack(flat, greatest)
    assert torch.equal(buffer, reference.pack(flat, greatest))
    assert reference.broken(buffer, len(flat)).tolist() == [0, 1, 0, 0]
    for unpack in (kernels.unpack, reference.unpack):
        back = unpack(buffer, len(flat), greatest, flat.dtype)
        assert back[4096:8192].isnan().all()
        assert torch.equal(back[:4096], flat[:4096]) and torch.equal(back[8192:], flat[8192:])


def test_minus_zero_is_zero(kernels, kernel_device):
    flat = torch.tensor([-0.0, 1.0], device=kernel_device)
    assert torch.equal(kernels.pack(flat, 1), reference.pack(flat, 1))
    assert reference.broken(reference.pack(flat, 1), 2).tolist() == [0]


# -------------------------------------------------------------------------------------------------------------- marks


def test_a_mark_is_seen_through_views():
    spikes = mark(counts((4, 2, 3, 5)), 1)
    for view in (spikes, spikes.flatten(0, 1), spikes.flatten(0, 1).unflatten(0, (4, 2)), spikes[1], spikes.mT):
        assert max_count(view) == 1
    for other in (
        spikes.clone(),
        spikes + 1,
        spikes.view(torch.int32),
        spikes.view(torch.bfloat16),
        spikes.half(),
        torch.ones(3),
    ):
        assert max_count(other) is None


def test_a_marked_view_of_a_whole_tensor_marks_it():
    """Step mode 's' returns a view of the kernel's output."""
    base = counts((1, 2, 3))
    spikes = mark(base.squeeze(0), 2)
    assert max_count(base) == max_count(spikes.flatten()) == 2
    part = mark(counts((2, 2, 3))[0], 1)
    assert max_count(part) == 1 and max_count(part._base) is None


@pytest.mark.parametrize("change", ["itself", "a view of it"])
def test_a_change_in_place_ends_the_promise(change):
    spikes = mark(counts((4, 6)), 1)
    (spikes if change == "itself" else spikes[1]).mul_(0.3)
    assert max_count(spikes) is None and max_count(spikes[0]) is None
    assert max_count(mark(spikes, 1)) == 1


def test_inference_tensors_are_left_alone():
    with torch.inference_mode():
        spikes = mark(counts((4, 6)), 1)
        assert not hasattr(spikes, "_sadp_max_count")


# ----------------------------------------------------------------------------------------------- what autograd keeps


class Keep(torch.autograd.Function):
    """Saves its inputs, and shows in the backward pass what it gets back."""

    @staticmethod
    def forward(ctx, show, *inputs):
        ctx.show = show
        ctx.save_for_backward(*inputs)
        return sum(x.sum() for x in inputs)

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        ctx.show(saved)
        return None, *(grad.expand(x.shape) for x in saved)


def spikes_of(shape, greatest=1, dtype=torch.float32, device="cpu", layout=torch.contiguous_format):
    """Marked spikes inside a graph, as a neuron's output is."""
    values = counts(shape, greatest, dtype, device).contiguous(memory_format=layout)
    return mark(values.requires_grad_() * 1, greatest)


def bytes_of(bits):
    return bits.numel() * bits.element_size()


@pytest.fixture
def packed(monkeypatch):
    """Every block that is packed: weak references to it."""
    made = []
    original = spike_storage._PackedBlock

    class Block(original):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(spike_storage, "_PackedBlock", Block)
    return made


VIEWS = {
    "itself": lambda s: s,
    "flattened": lambda s: s.flatten(0, 1),
    "unflattened": lambda s: s.flatten(0, 1).unflatten(0, s.shape[:2]),
    "permuted": lambda s: s.permute(4, 0, 2, 1, 3),
    "one step": lambda s: s[2],
    "strided": lambda s: s[..., ::2],
    "expanded": lambda s: s[1:2].expand(7, *s.shape[1:]),
    "scalar": lambda s: s[0, 1, 1, 2, 0],
}


@pytest.mark.parametrize("keep_alive", [False, True], ids=["freed", "alive"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", VIEWS)
def test_views_come_back_as_they_were(kind, channels_last, keep_alive, packed, device):
    spikes = spikes_of((4, 2, 3, 5, 6), 2, torch.bfloat16, device)
    if channels_last:
        spikes = spikes.detach().flatten(0, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
        spikes = mark((spikes * 1).unflatten(0, (4, 2)), 2)
    view = VIEWS[kind](spikes)
    seen = []
    with packed_spikes():
        out = Keep.apply(seen.extend, view)
    expected, geometry = view.detach().clone(), (view.shape, view.stride(), view.dtype)
    storage = StorageWeakRef(spikes.untyped_storage())
    if not keep_alive:
        del spikes, view
        assert storage.expired()
    out.backward()
    assert len(packed) == 1
    assert (seen[0].shape, seen[0].stride(), seen[0].dtype) == geometry
    assert torch.equal(seen[0], expected)
    assert (StorageWeakRef(seen[0].untyped_storage()) == storage) == keep_alive


def test_two_consumers_share_the_bits_and_the_expansion(packed, monkeypatch):
    spikes = spikes_of((4, 2, 30))
    expansions, seen = [], []
    original = spike_storage._unpack_bits
    monkeypatch.setattr(spike_storage, "_unpack_bits", lambda *a: expansions.append(1) or original(*a))
    with packed_spikes():
        a = Keep.apply(seen.extend, spikes, spikes.flatten(0, 1))
        b = Keep.apply(seen.extend, spikes.flatten())
    expected = spikes.detach().clone()
    del spikes
    assert len(packed) == 1
    a.backward(retain_graph=True)
    assert len(expansions) == 1 and seen[0].data_ptr() == seen[1].data_ptr()
    b.backward(retain_graph=True)  # `seen` still holds the expansion
    assert len(expansions) == 1 and seen[2].data_ptr() == seen[0].data_ptr()
    for view in seen:
        assert torch.equal(view, expected.view(view.shape))
    del view
    expanded = StorageWeakRef(seen[0].untyped_storage())
    seen.clear()
    assert expanded.expired()
    a.backward()
    assert len(expansions) == 2 and torch.equal(seen[0], expected)
    seen.clear()
    del a, b
    gc.collect()
    assert packed[0]() is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("greatest", [1, 2, 3, 15])
def test_what_is_saved_is_its_bits(greatest, dtype, packed, device):
    spikes = spikes_of((4, 8, 16, 32, 32), greatest, dtype, device)
    with packed_spikes():
        out = Keep.apply(print, spikes)
    (block,) = packed
    share = bytes_of(block().bits) / (spikes.numel() * spikes.element_size())
    ideal = greatest.bit_length() / (8 * spikes.element_size())
    assert ideal <= share <= 1.002 * ideal
    assert block().bits.untyped_storage().nbytes() == bytes_of(block().bits)
    del out


KEPT_DENSE = {
    "no mark": lambda: counts((4, 6)).requires_grad_() * 1,
    "five bits": lambda: spikes_of((4, 6), 16),
    "float64": lambda: spikes_of((4, 6), 1, torch.float64),
    "a cast copy": lambda: spikes_of((4, 6)).half(),
    "changed in place": lambda: spikes_of((4, 6)).mul_(2),
    "empty": lambda: spikes_of((0, 6)),
}


@pytest.mark.parametrize("kind", KEPT_DENSE)
def test_kept_dense(kind, packed):
    tensor = KEPT_DENSE[kind]()
    seen = []
    with packed_spikes():
        Keep.apply(seen.extend, tensor).backward()
    assert not packed
    assert torch.equal(seen[0], tensor) and seen[0].dtype == tensor.dtype


def test_a_change_after_packing_changes_nothing_that_was_saved(packed):
    spikes = spikes_of((4, 6))
    seen = []
    with packed_spikes():
        out = Keep.apply(seen.extend, spikes)
        expected = spikes.detach().clone()
        with torch.no_grad():
            spikes.mul_(2)
        again = Keep.apply(seen.extend, mark(spikes, 2))
    (out + again).backward()
    assert len(packed) == 2
    values = sorted(seen, key=lambda t: t.max())
    assert torch.equal(values[0], expected) and torch.equal(values[1], 2 * expected)


def test_data_exchanged_after_packing_changes_nothing_that_was_saved():
    """Which torch's versions do not tell."""
    spikes, seen = spikes_of((4, 6)), []
    with packed_spikes():
        out = Keep.apply(seen.extend, spikes)
    expected = spikes.detach().clone()
    spikes.data = torch.full((4, 6), 3.0)
    out.backward()
    assert torch.equal(seen[0], expected)


def test_a_dense_tensor_changed_after_saving_is_an_error():
    """As without hooks, which would otherwise skip torch's own check."""
    x = torch.rand(4, requires_grad=True) * 1
    with packed_spikes():
        out = x.square().sum()
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match=r"changed in place \(version 1, saved at 0\)"):
        out.backward()


def test_an_output_that_its_own_node_keeps_is_freed():
    with packed_spikes():
        out = torch.rand(4, requires_grad=True).exp()
    gone = weakref.ref(out)
    gc.collect()
    gc.disable()
    try:
        del out
        assert gone() is None
    finally:
        gc.enable()


def test_a_wrong_promise_is_an_error_on_the_cpu():
    spikes = mark(torch.rand(4, requires_grad=True) * 1, 1)
    with pytest.raises(ValueError, match=r"integers 0\.\.1 holds other values"), packed_spikes():
        Keep.apply(print, spikes)


@pytest.mark.gpu
def test_a_wrong_promise_gives_nan_on_the_gpu():
    weight = torch.rand(6, 6, device="cuda", requires_grad=True)
    spikes = mark(torch.rand(4, 6, device="cuda"), 1)
    with packed_spikes():
        out = (spikes @ weight).sum()
    del spikes
    out.backward()
    assert weight.grad.isnan().all()


def test_nothing_is_kept_without_a_backward_pass(packed):
    layer = nn.Linear(6, 3)
    with packed_spikes(), torch.no_grad():
        layer(mark(counts((4, 6)), 1))
    assert not packed


def test_nested(packed):
    spikes = spikes_of((4, 6))
    inner = []
    with packed_spikes():
        with saved_tensors_hooks(lambda t: inner.append(1) or t.detach(), lambda t: t):
            a = Keep.apply(lambda _: None, spikes)
        assert inner == [1] and not packed
        with packed_spikes():
            b = Keep.apply(lambda _: None, spikes)
        c = Keep.apply(lambda _: None, spikes)
    assert len(packed) == 2 and inner == [1]
    (a + b + c).backward()


# ----------------------------------------------------------------------------------------------------------- networks


class Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + x.float().square()).to(grad.dtype)


class Network(nn.Module):
    """Convolutions, a shortcut that reads the same spikes, a residual sum of spikes, a linear layer; odd sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.branch = nn.Conv2d(5, 7, 3, padding=1, stride=2)
        self.shortcut = nn.Conv2d(5, 7, 1, stride=2)
        self.last = nn.Conv2d(7, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        s = mark(Fire.apply(self.stem(x)), 1)
        total = mark(Fire.apply(self.branch(s)) + Fire.apply(self.shortcut(s)), 2)
        s = mark(Fire.apply(self.last(total)).amax((2, 3)), 1)
        return self.fc(s)


def train(network, x, context, dtype=None):
    network.zero_grad()
    x = x.clone().requires_grad_()
    with context(), torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        loss = network(x).float().square().sum()
    loss.backward()
    return [x.grad, *(p.grad.clone() for p in network.parameters())]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_gradients_are_the_same_bits(layout, dtype, packed, device):
    network = Network().to(device, memory_format=layout)
    x = torch.randn(5, 3, 13, 11, generator=torch.Generator().manual_seed(1)).to(device, memory_format=layout)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        plain = train(network, x, partial(torch.enable_grad), dtype)
        assert not packed
        saved = train(network, x, packed_spikes, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(packed) == 3  # the stem's spikes once for both of their readers, the sum, and the last ones
    for a, b in zip(plain, saved, strict=True):
        assert a.abs().max() > 0 and torch.equal(a, b)


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_neurons_mark_their_spikes(backend, step_mode, packed, kernel_device):
    torch.manual_seed(0)
    node = LIFNode(step_mode=step_mode, backend=backend)
    layers = nn.Sequential(nn.Linear(6, 9), node, nn.Linear(9, 2)).to(kernel_device)
    x = 3 * torch.randn(4, 5, 6, device=kernel_device)
    assert max_count(node(layers[0](x))) == max_count(node(layers[0](x)).flatten()) == 1
    node.reset()
    plain = train(layers, x, torch.enable_grad)
    node.reset()
    assert not packed
    for a, b in zip(plain, train(layers, x, packed_spikes), strict=True):
        assert a.abs().max() > 0 and torch.equal(a, b)
    assert len(packed) == 1


def test_a_surrogate_that_may_not_be_binary_promises_nothing():
    with torch.no_grad():
        for surrogate in (torch.sigmoid, Sigmoid(spiking=False)):
            assert max_count(LIFNode(surrogate_function=surrogate, step_mode="m")(torch.rand(4, 5, 6))) is None


def test_the_kernels_in_the_hooks(kernels, kernel_device, monkeypatch):
    """On a machine without a GPU: the interpreter in place of the plain path."""
    monkeypatch.setattr(spike_storage, "reference", kernels)
    monkeypatch.setattr(kernels, "broken", reference.broken, raising=False)
    network = Network().to(kernel_device)
    x = torch.randn(2, 3, 13, 11, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    plain = train(network, x, torch.enable_grad)
    for a, b in zip(plain, train(network, x, packed_spikes), strict=True):
        assert torch.equal(a, b)


def test_dense_spikes_are_freed_before_the_backward_pass(device):
    """Between the passes the storage of each spike tensor is gone."""
    storages = []

    class Watched(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            spikes = mark(Fire.apply(x), 1)
            storages.append(StorageWeakRef(spikes.untyped_storage()))
            return self.layer(spikes)

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), Watched(nn.Linear(8, 8)), Watched(nn.Linear(8, 3))).to(device)
    for context, freed in ((torch.enable_grad, False), (packed_spikes, True)):
        storages.clear()
        with context():
            loss = network(torch.rand(5, 6, device=device)).sum()
        assert [s.expired() for s in storages] == [freed, freed]
        loss.backward()


def test_second_derivatives_pass(device):
    """The graph behind a saved tensor survives its packing."""
    results = []
    for context in (torch.enable_grad, packed_spikes):
        w = torch.full((6,), 2.0, device=device, requires_grad=True)
        with context():
            s = mark(Fire.apply(w - torch.arange(6.0, device=device)), 1)
            out = (s * s * w).sum()
            (g,) = torch.autograd.grad(out, w, create_graph=True)
        g.square().sum().backward()
        results.append(w.grad)
    assert torch.equal(*results) and results[0].abs().max() > 0


@pytest.mark.gpu
def test_in_a_cuda_graph():
    network = Network().to("cuda", memory_format=torch.channels_last)
    x = torch.randn(5, 3, 13, 11, device="cuda").to(memory_format=torch.channels_last)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            train(network, x, packed_spikes)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = train(network, x, packed_spikes)
    for _ in range(2):
        x.normal_()
        graph.replay()
        replayed = [g.clone() for g in grads]
        for a, b in zip(train(network, x, torch.enable_grad), replayed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
