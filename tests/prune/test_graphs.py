"""A recorded training step does what the eager one does."""

import pytest
import torch
from torch import nn

import sadp_fast
from sadp_fast import SADP, GraphedStep, LIFNode

pytestmark = pytest.mark.gpu

N, BATCH, EPOCHS, T = 2000, 64, 7, 4


def train(graphed, score, optimizer_class):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 64), LIFNode(step_mode="m"), nn.Linear(64, 64), LIFNode(step_mode="m"), nn.Linear(64, 5)
    ).cuda()
    generator = torch.Generator("cuda").manual_seed(1)
    x, y = torch.randn(N, 20, device="cuda") * 2, torch.randint(5, (N,), device="cuda")
    sadp = SADP(model, N, epochs=EPOCHS, score=score, seed=3, weights="unbiased")
    rate = torch.tensor(0.01, device="cuda")
    options = {"capturable": True} if optimizer_class is torch.optim.AdamW else {"momentum": 0.9}
    optimizer = optimizer_class(model.parameters(), lr=rate, fused=True, **options)
    criterion = nn.CrossEntropyLoss()

    def step(index):
        noisy = x[index] + 0.01 * torch.randn(len(index), 20, device="cuda", generator=generator)
        loss = sadp.loss(criterion, model(noisy.expand(T, -1, -1)).mean(0), y[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        sadp_fast.reset(model)
        return loss.detach()

    run = GraphedStep(step, sadp, [generator]) if graphed else step
    losses = []
    for epoch in range(EPOCHS):
        for i, index in enumerate(sadp.batches(BATCH)):
            rate.fill_(0.01 * (epoch + 1) / (1 + i % 3))
            losses.append(run(index).clone())
    # One for the epochs that take scores, full and pruned, and one for those at the end that take none.
    assert not graphed or len(run._recorded) == (1 if score == "random" else 2)
    return torch.stack(losses), sadp.scores, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("score", ["all", "last", "loss", "el2n", "random"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_graphed_training_is_eager_training(score, optimizer_class):
    eager, graphed = train(False, score, optimizer_class), train(True, score, optimizer_class)
    torch.testing.assert_close(graphed[0], eager[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(graphed[1], eager[1], rtol=1e-3, atol=1e-6, equal_nan=True)
    for a, b in zip(graphed[2], eager[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_every_batch_but_the_first_two_of_a_kind_is_replayed():
    """Full and pruned epochs are of one kind, and so is the padded batch at the end."""
    model = nn.Sequential(nn.Linear(20, 64), LIFNode(step_mode="m"), nn.Linear(64, 5)).cuda()
    x, y = torch.randn(N, 20, device="cuda"), torch.randint(5, (N,), device="cuda")
    sadp = SADP(model, N, epochs=EPOCHS, weights="unbiased")
    calls = []

    def step(index):
        calls.append(sadp.batch.kind)
        model.zero_grad(set_to_none=True)
        loss = sadp.loss(nn.CrossEntropyLoss(), model(x[index].expand(T, -1, -1)).mean(0), y[index])
        loss.backward()
        sadp_fast.reset(model)
        return loss.detach()

    run = GraphedStep(step, sadp)
    for _ in range(EPOCHS):
        for index in sadp.batches(BATCH):
            run(index)
    assert calls == [None, *[(True, True, BATCH)] * 2, *[(True, False, BATCH)] * 2]


def test_a_change_of_the_batch_size_is_another_graph():
    def scores(graphed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 32), LIFNode(step_mode="m"), nn.Linear(32, 5)).cuda()
        x, y = torch.randn(N, 20, device="cuda"), torch.arange(N, device="cuda") % 5
        sadp = SADP(model, N, epochs=20, warmup_epochs=4, weights="unbiased")

        def step(index):
            model.zero_grad(set_to_none=True)
            loss = sadp.loss(nn.CrossEntropyLoss(), model(x[index].expand(T, -1, -1)).mean(0), y[index])
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
            sadp_fast.reset(model)
            return loss.detach()

        run = GraphedStep(step, sadp) if graphed else step
        for size in (64, 128, 64, 128):
            for index in sadp.batches(size):
                run(index)
        return sadp.scores

    torch.testing.assert_close(scores(True), scores(False), rtol=1e-3, atol=1e-6)
