"""Weights cast together are autocast's own, bit for bit."""

import pytest
import torch
from torch import nn

from sadp_fast import SADP, models, reset
from sadp_fast.memory.weight_casting import cast_weights_at_once


def build(device, seed=0):
    torch.manual_seed(seed)
    return models.build("conv", (3, 8, 8), 5, 3).to(device, memory_format=torch.channels_last)


def train(model, device, dtype=torch.bfloat16, steps=3):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    outputs = []
    for _ in range(steps):
        images, labels = torch.randn(6, 3, 8, 8, device=device), torch.arange(6, device=device) % 5
        with torch.autocast(device, dtype):
            output = model(images)
        optimizer.zero_grad()
        nn.functional.cross_entropy(output, labels).backward()
        optimizer.step()
        reset(model)
        outputs.append(output.detach())
    return outputs, [p.grad for p in model.parameters()], [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_is_autocasts_to_the_bit(device, dtype):
    ours, plain = build(device), build(device)
    cast_weights_at_once(ours)
    results = train(ours, device, dtype), train(plain, device, dtype)
    for a, b in zip(*results, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype and x.stride() == y.stride() and torch.equal(x, y)


def test_every_weight_is_cast_by_no_other(device):
    model, seen = build(device), []
    cast_weights_at_once(model)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append((layer.weight.dtype, layer.bias)))
    with torch.autocast(device, torch.bfloat16):
        model(torch.randn(2, 3, 8, 8, device=device))
    assert [dtype for dtype, _ in seen] == [torch.bfloat16] * len(layers)
    assert seen[-1][1].dtype == torch.bfloat16
    assert all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in model.parameters())


def test_outside_of_autocast_nothing_changes(device):
    model, seen = build(device), []
    cast_weights_at_once(model)
    model.stem[0].register_forward_hook(lambda layer, inputs, output: seen.append((layer.weight, output.dtype)))
    model(torch.randn(2, 3, 8, 8, device=device))
    assert seen[0][0] is model.stem[0].weight and seen[0][1] == torch.float32


def test_an_error_in_the_forward_pass_leaves_the_weights(device):
    model = build(device)
    cast_weights_at_once(model)
    weights = list(model.parameters())
    with pytest.raises(RuntimeError), torch.autocast(device, torch.bfloat16):
        model(torch.randn(2, 7, 8, 8, device=device))
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))


def test_shared_frozen_and_unused_weights(device):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.frozen, self.unused = (nn.Linear(4, 4) for _ in range(4))
            self.b.weight = self.a.weight
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.b(self.a(x)))

    results = []
    for together in (True, False):
        torch.manual_seed(0)
        net = Net().to(device)
        if together:
            cast_weights_at_once(net)
        with torch.autocast(device, torch.bfloat16):
            net(torch.ones(3, 4, device=device)).sum().backward()
        results.append([p.grad for p in net.parameters()])
    assert results[0][-1] is None and results[1][-1] is None
    for ours, plain in zip(*results, strict=True):
        assert (ours is None) == (plain is None) and (ours is None or torch.allclose(ours, plain, rtol=1e-2))


def test_scores_are_the_same(device):
    def scores(together):
        model = build(device)
        if together:
            cast_weights_at_once(model)
        x = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(device)
        sadp = SADP(model, 24, epochs=8, warmup_epochs=2)
        for _ in range(2):
            for index in sadp.batches(6):
                with torch.autocast(device, torch.bfloat16):
                    output = model(x[index])
                sadp.loss(nn.CrossEntropyLoss(), output, index % 5).backward()
                reset(model)
        return sadp.scores

    assert torch.equal(scores(True), scores(False))
