"""Exact per-example gradient norms: against autograd on one example at a time, and what they leave alone."""

import copy

import pytest
import torch
from torch import nn

from sadp_fast import BatchNormLIF, BatchNormParametricLIF, LIFNode, reset
from sadp_fast.lab import models
from sadp_fast.statistics import exact_norms
from sadp_fast.statistics.exact_norms import gradient_norms

CLASSES, EXAMPLES = 5, 6
criterion = nn.CrossEntropyLoss()


def example(name, device, dtype=torch.float32):
    torch.manual_seed(3)
    model = models.build(name, (1, 8, 8), CLASSES, 3).to(device, dtype)
    x = torch.randn(EXAMPLES, 1, 8, 8, dtype=dtype) * 2
    y = torch.randint(CLASSES, (EXAMPLES,))
    for layer in model.modules():
        if isinstance(layer, BatchNormLIF):
            layer.momentum = 1.0  # running statistics of these examples: neurons fire
    with torch.no_grad():
        model(x.to(device))
    reset(model)
    return model, x.to(device), y.to(device)


def one_at_a_time(model, x, y, least_dimensions):
    """Norms by the definition, on a copy in evaluation mode."""
    model = copy.deepcopy(model).eval()
    norms = []
    for i in range(len(x)):
        reset(model)
        model.zero_grad()
        criterion(model(x[i : i + 1]), y[i : i + 1]).backward()
        norms.append(sum(p.grad.square().sum() for p in model.parameters() if p.ndim >= least_dimensions).sqrt())
    return torch.stack(norms)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("name", ["mlp", "conv", "spikformer", "sew_resnet18"])
def test_norms_are_those_of_autograd(name, weights_only, device, monkeypatch):
    monkeypatch.setattr(exact_norms, "_one_by_one", None)  # all of these can be batched
    # In float64, where a sum in another order makes no neuron fire that did not.
    model, x, y = example(name, device, torch.float64)
    norms = gradient_norms(model, x, y, criterion, weights_only=weights_only)
    expected = one_at_a_time(model, x, y, 2 if weights_only else 1)
    assert expected.min() > 0 and expected.max() / expected.min() > 1.01
    torch.testing.assert_close(norms, expected, rtol=1e-9, atol=0)


def test_time_constants_are_parameters_too(device, monkeypatch):
    monkeypatch.setattr(exact_norms, "_one_by_one", None)
    monkeypatch.setattr(models.plain, "lif", lambda features: BatchNormParametricLIF(features, decay_input=False))
    model, x, y = example("conv", device, torch.float64)
    norms = [gradient_norms(model, x, y, criterion, weights_only=only) for only in (False, True)]
    expected = [one_at_a_time(model, x, y, least) for least in (0, 2)]
    torch.testing.assert_close(norms, expected, rtol=1e-9, atol=0)
    assert ((expected[0] - one_at_a_time(model, x, y, 1)) / expected[0] > 1e-6).any()  # they count


def test_any_number_of_examples_and_small_chunks(device, monkeypatch):
    model, x, y = example("mlp", device, torch.float64)
    whole = gradient_norms(model, x, y, criterion)
    monkeypatch.setattr(exact_norms, "_LARGEST_CHUNK", 4)
    torch.testing.assert_close(gradient_norms(model, x, y, criterion), whole, rtol=1e-9, atol=0)


def test_what_vmap_cannot_batch_passes_one_by_one(device, monkeypatch):
    class Unbatchable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.neuron, self.last = nn.Linear(64, 16), LIFNode(), nn.Linear(16, CLASSES)

        def forward(self, x):
            return self.last(self.neuron(Unbatchable.apply(self.first(x.flatten(1)))))

    _, x, y = example("mlp", device, torch.float64)
    model, calls = Net().to(device, torch.float64), []
    real = exact_norms._one_by_one
    monkeypatch.setattr(exact_norms, "_one_by_one", lambda *args: calls.append(1) or real(*args))
    norms = gradient_norms(model, x, y, criterion)
    assert len(calls) == EXAMPLES
    torch.testing.assert_close(norms, one_at_a_time(model, x, y, 1), rtol=1e-9, atol=0)


def test_an_error_of_the_model_is_raised(device):
    model, x, y = example("mlp", device)
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size mismatch"):
        gradient_norms(model, x[..., :4], y, criterion)
    with pytest.raises(ValueError, match="no trainable parameter"):
        gradient_norms(model.requires_grad_(False), x, y, criterion)


def test_training_goes_on_as_if_nothing_had_been_asked(device):
    """Between a forward and its backward pass: gradients, running statistics, potentials, modes, backends."""

    def step(ask):
        model, x, y = example("conv", device)
        model.train()
        node = model.neuron
        node.collect_statistics = True
        surrogate = node.surrogate_function
        loss = criterion(model(x), y)
        if ask:
            gradient_norms(model, x, y, criterion)
        loss.backward()
        assert node.surrogate_function is surrogate and node.backend is None and node.collect_statistics
        assert model.training and all(module.training for module in model.modules())
        grads = [p.grad for p in model.parameters()]
        return grads, [b.clone() for b in model.buffers()], node.v.detach(), node.energies[0].delta

    for left, asked in zip(step(False), step(True), strict=True):
        for a, b in zip(left, asked, strict=True) if isinstance(left, list) else [(left, asked)]:
            assert torch.equal(a, b)


def test_low_precision_inputs_are_raised_to_the_parameters(device):
    model, x, y = example("conv", device)
    half = x.bfloat16()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        norms = gradient_norms(model, half, y, criterion)
    assert norms.dtype == torch.float32
    assert torch.equal(norms, gradient_norms(model, half.float(), y, criterion))
