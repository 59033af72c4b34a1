"""The dataflow read from the autograd graph: which neuron measures which weight layer."""

import pytest
import torch
from torch import nn
from unfused import unfused

from sadp_fast import SADP, BatchNormIF, BatchNormLIF, BatchNormParametricLIF, IFNode, LIFNode, ParametricLIFNode, reset
from sadp_fast.statistics.autograd_graph import Probe, batch_norm_scale
from sadp_fast.statistics.energies import energy_per_example

T, N = 3, 4


class OverTime(nn.Sequential):
    """Layers that know no time: [T, N, *] -> [T * N, *] -> [T, N, *]."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def lif():
    return LIFNode(step_mode="m")


def read(model, x):
    probe = Probe(model)
    attachment = probe.attach()
    output = model(x)
    layers = probe.resolve(output.sum())
    attachment.close()
    return {layer.name: layer for layer in layers}


def found(model, x):
    """{layer: (neuron of its input, norm, neuron of its output)}"""
    return {name: (p.input_neuron, p.norm, p.output_neuron) for name, p in read(model, x).items()}


def test_sequential_with_normalisation():
    model = nn.Sequential(
        OverTime(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)),
        lif(),
        OverTime(nn.Conv2d(4, 4, 3, padding=1)),
        lif(),
        OverTime(nn.Flatten(), nn.Linear(4 * 36, 8), nn.BatchNorm1d(8)),
        lif(),
        nn.Linear(8, 5),
    )
    assert found(model, torch.rand(T, N, 2, 6, 6) * 3) == {
        "0.0": (None, "0.1", "1"),  # analogue input: reduced
        "2.0": ("1", None, "3"),
        "4.1": ("3", "4.2", "5"),
        "6": ("5", None, None),  # no neuron behind it: its gradient is reduced
    }


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_learned_time_constant_is_no_input_of_a_layer(backend, kernel_device):
    model = nn.Sequential(
        OverTime(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)),
        ParametricLIFNode(step_mode="m", backend=backend),
        OverTime(nn.Conv2d(4, 4, 3, padding=1)),
        BatchNormParametricLIF(4, backend=backend),
        OverTime(nn.Flatten(), nn.Linear(4 * 36, 5)),
    ).to(kernel_device)
    assert found(model, torch.rand(T, N, 2, 6, 6, device=kernel_device) * 3) == {
        "0.0": (None, "0.1", "1"),
        "2.0": ("1", None, "3"),
        "4.1": ("3", None, None),
    }


class BatchFirst(nn.Module):
    """[N, T, *] everywhere but in the neuron."""

    def __init__(self, norm, steps):
        super().__init__()
        self.conv, self.norm, self.neuron = nn.Conv2d(2, 4, 3, padding=1), norm, lif()
        self.head, self.steps = nn.Linear(4 * 36, 5), steps

    def forward(self, x):
        current = self.norm(self.conv(x.flatten(0, 1))).unflatten(0, (-1, self.steps))
        spikes = self.neuron(current.transpose(0, 1)).permute(1, 0, 2, 3, 4)
        return self.head(spikes.flatten(2)).mean(1)


@pytest.mark.parametrize("steps", [T, N])
@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm2d(4)])
def test_batch_first_beside_neurons_is_refused(norm, steps):
    """Whether N * T examples' steps are in the order of N or of T cannot be told from the shape."""
    model = BatchFirst(norm(), steps)
    x = torch.rand(N, steps, 2, 6, 6) * 3
    sadp = SADP(model, N, epochs=3)
    next(batches := sadp.batches(N))
    with pytest.raises(ValueError, match=r"conv takes \[N, T, \*\].*put time first"):
        sadp.loss(nn.CrossEntropyLoss(), model(x), torch.zeros(N, dtype=torch.long))
    batches.close()


def test_single_step_neurons_in_a_container_over_time():
    """Nothing says then what T is; the remedy is not another score."""

    class Container(nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron = LIFNode()

        def forward(self, x_seq):
            return torch.stack([self.neuron(x) for x in x_seq])

    model = nn.Sequential(OverTime(nn.Linear(6, 6)), Container(), OverTime(nn.Linear(6, 5)))
    sadp = SADP(model, N, epochs=3)
    next(batches := sadp.batches(N))
    with pytest.raises(ValueError, match=r"make its neurons take them too: LIFNode\(step_mode='m'\)"):
        sadp.loss(nn.CrossEntropyLoss(), model(torch.rand(T, N, 6)).mean(0), torch.zeros(N, dtype=torch.long))
    batches.close()


class Residual(nn.Module):
    def __init__(self, add_before_neuron):
        super().__init__()
        self.stem, self.stem_neuron = OverTime(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)), lif()
        self.branch, self.neuron = OverTime(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), lif()
        self.head = OverTime(nn.Conv2d(4, 3, 1))
        self.add_before_neuron = add_before_neuron

    def forward(self, x):
        x = self.stem_neuron(self.stem(x))
        branch = self.branch(x)
        x = self.neuron(branch + x) if self.add_before_neuron else self.neuron(branch) + x
        return self.head(x)


def test_residual_sum_behind_the_neuron_is_not_binary():
    assert found(Residual(add_before_neuron=False), torch.rand(T, N, 2, 6, 6) * 3) == {
        "stem.0": (None, "stem.1", "stem_neuron"),
        "branch.0": ("stem_neuron", "branch.1", "neuron"),
        "head.0": (None, None, None),
    }


def test_residual_sum_before_the_neuron():
    # The sum hands its gradient on unchanged, but a sum is no view: the gradient is reduced behind the normalisation.
    assert found(Residual(add_before_neuron=True), torch.rand(T, N, 2, 6, 6) * 3) == {
        "stem.0": (None, "stem.1", "stem_neuron"),
        "branch.0": ("stem_neuron", "branch.1", None),
        "head.0": ("neuron", None, None),
    }


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5)])
def test_what_changes_spikes_is_reduced(pool):
    model = nn.Sequential(OverTime(nn.Conv2d(2, 4, 3)), lif(), OverTime(pool, nn.Conv2d(4, 3, 1)), lif())
    assert found(model, torch.rand(T, N, 2, 6, 6) * 3)["2.1"] == (None, None, "3")


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)])
def test_what_changes_the_current_is_reduced(norm):
    model = nn.Sequential(OverTime(nn.Conv2d(2, 4, 3), norm), lif(), OverTime(nn.Conv2d(4, 3, 1)), lif())
    assert found(model, torch.rand(T, N, 2, 6, 6) * 3)["0.0"] == (None, None, None)


def test_two_consumers_of_one_output_are_not_taken_for_one():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.neuron = nn.Linear(6, 6), lif()

        def forward(self, x):
            current = self.layer(x)
            return self.neuron(current) + current

    assert found(Fork(), torch.rand(T, N, 6))["layer"] == (None, None, None)


def test_one_neuron_behind_two_layers_measures_neither():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.neuron, self.c = nn.Linear(6, 6), nn.Linear(6, 6), lif(), nn.Linear(6, 2)

        def forward(self, x):
            first = self.neuron(self.a(x))
            reset(self)
            return self.c(self.neuron(self.b(first)))

    layers = found(Shared(), torch.rand(T, N, 6) * 3)
    assert layers["a"] == (None, None, None) and layers["b"][1:] == (None, None)


def test_one_layer_called_twice_keeps_what_holds_for_both_calls():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.first, self.second = nn.Linear(6, 6), lif(), lif()

        def forward(self, x):
            return self.second(self.layer(self.first(self.layer(x))))

    assert found(Tied(), torch.rand(T, N, 6) * 3)["layer"] == (None, None, None)


def test_static_first_layer_repeated_over_time():
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.neuron = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), lif()

        def forward(self, x):
            current = self.norm(self.conv(x))
            return self.neuron(current.expand(T, *current.shape))

    # The gradient behind the normalisation is the sum over time already: reduced there, [N, *].
    assert found(Repeated(), torch.rand(N, 2, 6, 6))["conv"] == (None, "norm", None)


def test_single_step_mode_calls_every_layer_t_times():
    class Stepwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.neuron, self.b = nn.Linear(6, 6), IFNode(step_mode="s"), nn.Linear(6, 2)

        def forward(self, x):
            return sum(self.b(self.neuron(self.a(x))) for _ in range(T))

    assert found(Stepwise(), torch.rand(N, 6)) == {"a": (None, None, "neuron"), "b": ("neuron", None, None)}


def test_normalisation_over_moved_dimensions_is_reduced_at_the_normalisation():
    class Tokens(nn.Module):  # as in spiking transformers: BatchNorm1d over [T * N, C, L]
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.neuron = nn.Linear(6, 5), nn.BatchNorm1d(5), lif()

        def forward(self, x):
            y = self.linear(x.flatten(0, 1))
            y = self.norm(y.transpose(1, 2)).transpose(1, 2)
            return self.neuron(y.unflatten(0, (T, N)))

    assert found(Tokens(), torch.rand(T, N, 7, 6))["linear"] == (None, "norm", None)


class SEW(nn.Module):
    """A stem that is repeated over time, and a residual sum within a neuron, whose output two layers read."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(2, 4, 3, padding=1), BatchNormLIF(4)
        self.conv, self.neuron = OverTime(nn.Conv2d(4, 4, 3, padding=1)), BatchNormIF(4)
        self.head, self.other = OverTime(nn.Conv2d(4, 3, 1)), OverTime(nn.Conv2d(4, 3, 1))

    def forward(self, x):
        x = self.first(self.stem(x), repeat=T)
        x = self.neuron(self.conv(x), x)
        return self.head(x) + self.other(x)


def test_a_neuron_with_its_own_normalisation_measures_both_sides():
    assert found(SEW(), torch.rand(N, 2, 6, 6) * 3) == {
        "stem": (None, None, "first"),
        "conv.0": ("first", None, "neuron"),
        "head.0": ("neuron", None, None),
        "other.0": ("neuron", None, None),
    }


def test_a_neuron_with_its_own_normalisation_behind_two_layers_measures_neither():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.neuron = nn.Linear(6, 6), nn.Linear(6, 6), BatchNormLIF(6)

        def forward(self, x):
            first = self.neuron(self.a(x))
            reset(self)
            return self.neuron(self.b(first))

    layers = found(Shared(), torch.rand(T, N, 6) * 3)
    assert layers == {"a": (None, None, None), "b": ("neuron", None, None)}


def scores(model, x, epochs=3):
    sadp = SADP(model, len(x), epochs=10, warmup_epochs=epochs, weights="unbiased")
    for _ in range(epochs):
        for index in sadp.batches(N):
            output = model(x[index]).flatten(1)
            sadp.loss(nn.CrossEntropyLoss(), output, index % output.shape[1]).backward()
            reset(model)
    return sadp.scores.clone()


def test_energies_of_several_calls_are_summed(device):
    """Step by step, and a layer with its neuron called twice: as the plain layers, which sum over their calls."""

    class Stepwise(nn.Module):
        def __init__(self, mode):
            super().__init__()
            self.a, self.first = nn.Linear(6, 8), BatchNormLIF(8, step_mode=mode)
            self.b, self.second, self.c = nn.Linear(8, 8), BatchNormLIF(8, step_mode=mode), nn.Linear(8, 4)
            self.mode = mode

        def forward(self, x):
            if self.mode == "s":
                return sum(self.twice(self.first(self.a(x))) for _ in range(T)) / T
            return self.twice(self.first(self.a(x).expand(T, -1, -1))).mean(0)

        def twice(self, s):
            s = self.second(self.b(s))
            return self.c(s)

    torch.manual_seed(0)
    x = torch.randn(3 * N, 6, device=device) * 3
    multi = Stepwise("m").to(device)
    single = Stepwise("s").to(device)
    for _ in range(20):
        multi(x)
        reset(multi)
    single.load_state_dict(multi.state_dict())
    expected = scores(unfused(single.eval()), x)
    assert expected.min() > 0
    torch.testing.assert_close(scores(single, x), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
def test_a_normalisation_in_front_of_one(training, device):
    """The scale of both counts: what the neuron knows is the gradient in front of its own normalisation alone."""

    class Net(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.a, self.first, self.c = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
            self.second = BatchNormLIF(8) if fused else nn.BatchNorm1d(8)
            self.neuron = None if fused else lif()

        def forward(self, x):
            y = self.first(self.a(x))
            if self.neuron is None:
                return self.c(self.second(y, repeat=T)).mean(0)
            return self.c(self.neuron(self.second(y).expand(T, -1, -1))).mean(0)

    torch.manual_seed(0)
    x, fused, plain = torch.randn(3 * N, 6, device=device) * 3, Net(True).to(device), Net(False).to(device)
    with torch.no_grad():
        fused.first.weight.mul_(10)
        for _ in range(20):  # running statistics
            fused(x)
            reset(fused)
    plain.load_state_dict(fused.state_dict())
    expected = scores(plain.train(training), x)
    assert expected.min() > 0
    torch.testing.assert_close(scores(fused.train(training), x), expected, rtol=1e-3, atol=1e-7)


def test_a_layer_and_a_neuron_called_twice(device):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.neuron, self.c = nn.Linear(6, 6), BatchNormLIF(6), nn.Linear(6, 4)

        def forward(self, x):
            first = self.neuron(self.a(x.expand(T, -1, -1)))
            reset(self)
            return self.c(self.neuron(self.a(first))).mean(0)

    torch.manual_seed(0)
    model, x = Twice().to(device), torch.randn(3 * N, 6, device=device) * 3
    for _ in range(20):
        model(x)
        reset(model)
    expected = scores(unfused(model.eval()), x)
    assert expected.min() > 0
    torch.testing.assert_close(scores(model, x), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("node", [BatchNormLIF, LIFNode])
def test_forward_passes_that_change_are_errors(node):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(6, 6), nn.Linear(6, 4)
            self.neuron = BatchNormLIF(6) if node is BatchNormLIF else lif()
            self.skip = self.double = False

        def forward(self, x):
            y = self.a(x.expand(T, -1, -1))
            y = torch.cat((y, y), 1) if self.double else y
            return self.c(y if self.skip else self.neuron(y))[:, : len(x)].mean(0)

    for change, error, message in (
        ({"skip": True}, RuntimeError, "neuron was called in the first batch but not in this one"),
        ({"double": True}, ValueError, r"neuron .*with N = 8, in a batch of 4: put time first|N = 8 examples"),
    ):
        model = Changing()
        sadp = SADP(model, 12, epochs=8, warmup_epochs=2, weights="unbiased")
        rows = sadp.batches(N)
        with pytest.raises(error, match=message):
            for index in rows:
                sadp.loss(nn.CrossEntropyLoss(), model(torch.rand(N, 6)), index % 4).backward()
                reset(model)
                vars(model).update(change)
        rows.close()


def test_what_a_batch_does_not_measure_is_not_taken_from_the_one_before():
    """A neuron whose output the loss does not see: its energies are not known, so neither is a score."""

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.neuron, self.c, self.cut = nn.Linear(6, 6), BatchNormLIF(6), nn.Linear(6, 4), False

        def forward(self, x):
            s = self.neuron(self.a(x.expand(T, -1, -1)))
            return self.c(s.detach() if self.cut else s).mean(0)

    model = Detached()
    sadp = SADP(model, 3 * N, epochs=8, warmup_epochs=2, weights="unbiased")
    for count, index in enumerate(sadp.batches(N)):
        model.cut = count == 2
        sadp.loss(nn.CrossEntropyLoss(), model(torch.randn(N, 6) * 3), index % 4).backward()
        reset(model)
    assert sadp.scores.isfinite().sum() == 2 * N and sadp.scores[index].isnan().all()


def test_frozen_layers_are_left_out():
    model = nn.Sequential(nn.Linear(6, 6), lif(), nn.Linear(6, 2))
    model[0].weight.requires_grad_(False)
    assert list(found(model, torch.rand(T, N, 6))) == ["2"]


def test_spikingjelly_layers():
    layer = pytest.importorskip("spikingjelly.activation_based.layer", exc_type=ImportError)
    model = nn.Sequential(
        layer.Conv2d(2, 4, 3, step_mode="m"),
        layer.BatchNorm2d(4, step_mode="m"),
        lif(),
        layer.Flatten(step_mode="m"),
        layer.Linear(4 * 16, 3, step_mode="m"),
        lif(),
    )
    assert found(model, torch.rand(T, N, 2, 6, 6) * 3) == {"0": (None, "1", "2"), "4": ("2", None, "5")}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_scale(device, training, affine):
    norm = nn.BatchNorm2d(5, affine=affine).to(device)
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.uniform_(norm.weight, -2, 2)
    variance = norm.running_var.clone()
    norm.train(training)
    x = torch.randn(8, 5, 6, 7, device=device, requires_grad=True)
    if training:
        variance = x.var((0, 2, 3), unbiased=False)
    expected = torch.rsqrt(variance + norm.eps) * (norm.weight if affine else 1)
    torch.testing.assert_close(batch_norm_scale(norm, x, norm(x)), expected.detach(), rtol=1e-4, atol=1e-6)


def test_batch_norm_scale_sees_through_views_and_half_types(device):
    norm = nn.BatchNorm2d(5).to(device)
    x = torch.randn(8, 5, 6, 7, device=device, requires_grad=True)
    expected = torch.rsqrt(x.var((0, 2, 3), unbiased=False) + norm.eps)
    output = norm(x.to(memory_format=torch.channels_last)).unflatten(0, (2, 4)).half()
    torch.testing.assert_close(batch_norm_scale(norm, x, output), expected.detach(), rtol=1e-4, atol=1e-6)


def test_energy_per_example():
    x = torch.randn(T, N, 5, 2)
    energy = x.square().sum((0, 2, 3))
    torch.testing.assert_close(energy_per_example(x, T, N), energy)
    torch.testing.assert_close(energy_per_example(x.flatten(0, 1), T, N), energy)
    torch.testing.assert_close(energy_per_example(x[0], T, N), x[0].square().sum((1, 2)))
    scale = torch.rand(5)
    torch.testing.assert_close(energy_per_example(x, T, N, scale), (x * scale[:, None]).square().sum((0, 2, 3)))
    with pytest.raises(ValueError, match="cannot tell the 4 examples apart"):
        energy_per_example(torch.rand(5, 2), T, N)
