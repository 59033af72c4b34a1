"""SADP around a training loop: what it must leave alone, what it must divide out, and what it must not lose."""

import copy
import functools
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import sadp_fast
from sadp_fast import SADP, LIFNode

N, FEATURES, CLASSES, T = 103, 12, 4, 3


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Linear(FEATURES, 16),
            LIFNode(step_mode="m"),
            nn.Linear(16, 16),
            LIFNode(step_mode="m", v_threshold=0.2),
            nn.Linear(16, CLASSES),
        )

    def forward(self, x):
        return self.body(x.expand(T, *x.shape)).mean(0)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, FEATURES, generator=generator) * 2
    return TensorDataset(x, torch.randint(CLASSES, (N,), generator=generator))


criterion = nn.CrossEntropyLoss()


def train(sadp, model, loader, epochs, lr=0.05, step_hook=None):
    """An ordinary loop; returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for x, y in loader:
            loss = criterion(model(x), y) if sadp is None else sadp.loss(criterion, model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sadp_fast.reset(model)
            losses.append(loss.item())
            if step_hook is not None:
                step_hook(x, y)
    return losses


# ---------------------------------------------------------------------------------------------------- ordinary training


@pytest.mark.parametrize("drop_last", [False, True])
def test_ratio_zero_is_ordinary_training_to_the_bit(data, drop_last):
    def run(pruned):
        model = Net()
        torch.manual_seed(9)  # of the loader's shuffling
        loader = DataLoader(data, batch_size=16, shuffle=True, drop_last=drop_last)
        sadp = SADP(model, N, epochs=3, prune_ratio=0.0) if pruned else None
        losses = train(sadp, model, sadp.loader(loader) if pruned else loader, 3)
        return losses, [p.detach().clone() for p in model.parameters()], sadp

    ordinary, weights, _ = run(False)
    losses, pruned_weights, sadp = run(True)
    assert losses == ordinary
    assert all(torch.equal(a, b) for a, b in zip(weights, pruned_weights, strict=True))
    assert sadp.epoch == 3 and sadp.examples_trained == 3 * (96 if drop_last else N)
    assert sadp.scores.isnan().all()


def test_collecting_scores_does_not_change_full_data_training(data):
    """Warm-up epochs train on everything with weights of 1: the same losses, to the bit, as without SADP."""
    order = []

    def run(sadp, model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        rows = sadp.batches(16) if sadp is not None else iter(order)
        for row in rows:
            if sadp is not None:
                order.append(row)
            x, y = data.tensors[0][row], data.tensors[1][row]
            loss = sadp.loss(criterion, model(x), y) if sadp is not None else criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sadp_fast.reset(model)
            losses.append(loss.item())
        return losses

    model = Net()
    sadp = SADP(model, N, epochs=8, prune_ratio=0.5)
    with_scores = run(sadp, model)
    assert sadp.scores.isfinite().sum() == len(order) * 16
    assert with_scores == run(None, Net())


def test_progress_counts_examples_and_a_state_saved_within_an_epoch_does_not(data):
    """Two of four epochs are on all data: they make up 2 / 2.4 of the training, not half of it."""
    sadp = SADP(Net(), N, epochs=4, prune_ratio=0.4, warmup_epochs=1, tail_epochs=1, score="random")
    assert sadp.ratios == [0.0, 0.8, 0.8, 0.0] and sadp.progress == 0
    list(sadp.batches(16))
    assert sadp.progress == pytest.approx(1 / 2.4)
    within, before = sadp.batches(16), sadp.examples_trained
    next(within)
    assert sadp.examples_trained == before + 16 and sadp.state_dict()["examples_trained"] == before
    assert 1 / 2.4 < sadp.progress <= 1.2 / 2.4
    list(within)
    assert sadp.progress == pytest.approx(1.2 / 2.4)
    for _ in range(2):
        list(sadp.batches(16))
    assert sadp.progress == 1

    passive = SADP(Net(), N, epochs=2, prune_ratio=0.0)
    loader = passive.loader(DataLoader(data, batch_size=16))
    running = iter(loader)
    next(running)
    assert passive.progress == 16 / N / 2 and passive.state_dict()["examples_trained"] == 0
    running.close()  # an epoch that is left early has ended, as a pruned one has
    assert passive.progress == 0.5 and passive.state_dict()["examples_trained"] == 16
    list(loader)
    assert passive.progress == 1


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_loaders_length_is_that_of_the_coming_or_the_running_epoch(data, drop_last):
    sadp = SADP(Net(), N, epochs=8, prune_ratio=0.5, score="random")
    loader = sadp.loader(DataLoader(data, batch_size=16, drop_last=drop_last))
    for epoch in range(8):
        expected = len(loader)
        running = [len(loader) for _ in loader]
        steps = len(running)
        assert set(running) == {steps}
        # 103 or about 44 examples; as many as 15 are carried over, and a draw may be 15 off by three standard errors.
        assert abs(expected - steps) <= (0 if epoch == 0 else 2)
    assert len(loader) == steps


def test_few_scores_are_warned_of_once(data):
    sadp = SADP(Net(), N, epochs=6, prune_ratio=0.5, score="given")
    loader = sadp.loader(DataLoader(data, batch_size=16))
    list(loader)
    with pytest.warns(UserWarning, match=r"0 of 103 examples have a finite score.*call sadp.give\(scores\)") as caught:
        list(loader)
        list(loader)
    assert len(caught) == 1
    broken = TensorDataset(data.tensors[0].clone().fill_(torch.nan), data.tensors[1])
    sadp = SADP(Net(), N, epochs=6, prune_ratio=0.5, score="loss")
    model, loader = Net(), sadp.loader(DataLoader(broken, batch_size=16))
    with pytest.warns(UserWarning, match="look for NaN in the data"):
        for _ in range(2):
            for x, y in loader:
                sadp.loss(criterion, model(x) + x.sum(1, keepdim=True), y)


def test_passive_batches_cover_every_epoch_and_pad_only_the_last(data):
    sadp = SADP(Net(), N, epochs=3, prune_ratio=0.0)
    rows = [list(sadp.batches(16)) for _ in range(3)]
    assert all(row.shape == (16,) for epoch in rows for row in epoch)
    everything = torch.cat([row for epoch in rows for row in epoch])
    padding = everything.numel() - 3 * N
    assert 0 <= padding < 16
    counts = torch.bincount(everything[: 3 * N], minlength=N)
    assert (counts == 3).all()
    assert sadp.examples_trained == 3 * N


# ------------------------------------------------------------------------------------------------------------- scores


def exact_scores(model, data, score):
    """Scores of every example by one batch of its own, unweighted."""
    probe = SADP(model, N, epochs=8, score=score)
    for row in probe.batches(1):
        model.zero_grad()
        probe.loss(criterion, model(data.tensors[0][row]), data.tensors[1][row]).backward()
        sadp_fast.reset(model)
    return probe.scores.clone()


@pytest.mark.parametrize("score", ["all", "last", "loss", "el2n"])
@pytest.mark.parametrize("factor", [1.0, 65536.0, 0.25])
def test_scores_are_those_of_the_unweighted_loss(data, score, factor):
    """Neither 1/B, nor the weights of a pruned epoch, nor a GradScaler's or an accumulation's factor shows in them."""
    model = Net()
    sadp = SADP(model, N, epochs=4, score=score, warmup_epochs=1, tail_epochs=0, seed=2, weights="unbiased")
    for _ in range(3):
        for row in sadp.batches(16):
            loss = sadp.loss(criterion, model(data.tensors[0][row]), data.tensors[1][row])
            model.zero_grad()
            (loss * factor).backward()
            sadp_fast.reset(model)
    assert sadp.ratios[2] > 0 and sadp.scores.isfinite().all() and (sadp.scores > 0).float().mean() > 0.9
    torch.testing.assert_close(sadp.scores, exact_scores(model, data, score), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("score", ["all", "last", "loss", "el2n", "given", "random"])
def test_scores_are_taken_from_one_loss_a_batch(data, score):
    """Two losses before one backward pass, as of mixup, are refused where scores would be those of the last alone."""
    model, (x, y) = Net(), data.tensors
    sadp = SADP(model, N, epochs=4, score=score)
    row = next(batches := sadp.batches(16))
    output = model(x[row])
    first = sadp.loss(criterion, output, y[row])
    if score in ("given", "random"):
        (first + sadp.loss(criterion, output, y[row].flip(0))).backward()
        return
    with pytest.raises(RuntimeError, match="a second time in a batch, before backward"):
        sadp.loss(criterion, output, y[row].flip(0))
    first.backward()
    sadp_fast.reset(model)
    sadp.loss(criterion, model(x[row]), y[row]).backward()  # as of an optimizer that takes two passes a step
    sadp_fast.reset(model)
    row_2 = next(batches)
    assert (sadp.scores[row] > 0).any()
    sadp.loss(criterion, model(x[row_2]), y[row_2]).backward()


def test_silent_neurons_are_warned_of(data):
    model = Net()
    model.body[3].v_threshold = 100.0
    sadp = SADP(model, N, epochs=3, score="last")
    train(sadp, model, sadp.loader(DataLoader(data, batch_size=16)), 1)
    with pytest.warns(UserWarning, match=f"{N} of {N} examples have a score of 0"):
        train(sadp, model, sadp.loader(DataLoader(data, batch_size=16)), 1)


def test_a_pruned_loader_has_what_a_loader_has(data):
    ordinary = DataLoader(data, batch_size=16, drop_last=True)
    loader = SADP(Net(), N, epochs=3).loader(ordinary)
    assert (
        loader.dataset is data and loader.drop_last and loader.num_workers == 0 and loader.sampler is ordinary.sampler
    )
    with pytest.raises(AttributeError, match="'DataLoader' object has no attribute 'data_set'"):
        _ = loader.data_set
    assert copy.copy(loader).dataset is data


def test_a_real_grad_scaler_is_divided_out(data):
    model = Net()
    sadp = SADP(model, N, epochs=4, warmup_epochs=1, tail_epochs=0, weights="unbiased")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        for row in sadp.batches(16):
            loss = sadp.loss(criterion, model(data.tensors[0][row]), data.tensors[1][row])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            sadp_fast.reset(model)
    torch.testing.assert_close(sadp.scores, exact_scores(model, data, "all"), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_reduction_gives_the_same_scores(data, reduction):
    model = Net()
    sadp = SADP(model, N, epochs=4, warmup_epochs=1, tail_epochs=0, weights="unbiased")
    loss_function = nn.CrossEntropyLoss(reduction=reduction)
    for _ in range(2):
        for row in sadp.batches(16):
            loss = sadp.loss(loss_function, model(data.tensors[0][row]), data.tensors[1][row])
            assert loss.ndim == 0
            loss.backward()
            sadp_fast.reset(model)
    torch.testing.assert_close(sadp.scores, exact_scores(model, data, "all"), rtol=1e-4, atol=1e-7)


def test_statistics_survive_a_reset_before_the_next_batch_and_are_off_outside(data):
    model = Net()
    sadp = SADP(model, N, epochs=8, warmup_epochs=2, tail_epochs=0)
    for _ in range(2):
        for row in sadp.batches(16):
            sadp.loss(criterion, model(data.tensors[0][row]), data.tensors[1][row]).backward()
            sadp_fast.reset(model)
    assert not any(m.collect_statistics for m in model.modules() if isinstance(m, LIFNode))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_evaluation_between_loss_and_step_is_not_scored(data):
    def run(evaluate):
        model = Net()
        sadp = SADP(model, N, epochs=8, warmup_epochs=2, tail_epochs=0)
        for _ in range(2):
            for row in sadp.batches(16):
                loss = sadp.loss(criterion, model(data.tensors[0][row]), data.tensors[1][row])
                if evaluate:
                    model(data.tensors[0])  # with gradients enabled: worse than no_grad
                loss.backward()
                sadp_fast.reset(model)
        return sadp.scores

    torch.testing.assert_close(run(False), run(True), rtol=0, atol=0)


def test_unusable_gradients_leave_the_old_score(data):
    model = Net()
    sadp = SADP(model, N, epochs=8, warmup_epochs=3, tail_epochs=0)
    for epoch in range(3):
        for row in sadp.batches(16):
            x = data.tensors[0][row].clone()
            if epoch == 2:
                x[row == 7] = torch.nan
            sadp.loss(criterion, model(x), data.tensors[1][row]).backward()
            sadp_fast.reset(model)
        if epoch == 1:
            before = sadp.scores.clone()
    # The bad example spoils the batch mean it is part of, no other score.
    assert sadp.scores.isfinite().all()
    assert sadp.scores[7] == before[7]


def test_skipped_batches_are_not_scored(data):
    sadp = SADP(Net(), N, epochs=4, warmup_epochs=1)
    for _ in sadp.batches(16):
        pass
    assert sadp.scores.isnan().all() and sadp.epoch == 1


# ------------------------------------------------------------------------------------------------ drawing and weighting


@pytest.mark.parametrize("score", ["all", "loss", "random"])
def test_mean_ratio_and_shapes(data, score):
    model = Net()
    sadp = SADP(model, N, epochs=20, prune_ratio=0.6, score=score, seed=4, weights="unbiased")
    shapes = set()
    for _ in range(20):
        for row in sadp.batches(8):
            shapes.add(tuple(row.shape))
            sadp.loss(criterion, model(data.tensors[0][row]), data.tensors[1][row]).backward()
            sadp_fast.reset(model)
    assert shapes == {(8,)}
    assert sum(sadp.ratios) / 20 == pytest.approx(0.6)
    # Bernoulli draws: standard deviation at most sqrt(20 N / 4) = 23; a right program fails 2e-9 of the time.
    assert abs(sadp.examples_trained - 0.4 * 20 * N) < 6 * 23


def test_weighted_gradient_is_unbiased(data):
    """Mean over 400 draws of the epoch's weighted gradient sum, against the full gradient.

    Each coordinate's deviation is held to 6 of its own standard errors: a right program fails with probability below
    n_coordinates * 2e-9 ~ 2e-6.
    """
    model = Net()
    torch.manual_seed(0)
    per_example = torch.randn(N, 30)
    scores = torch.rand(N) ** 3
    draws = []
    for seed in range(400):
        sadp = SADP(model, N, epochs=4, warmup_epochs=0, tail_epochs=0, prune_ratio=0.5, seed=seed, weights="unbiased")
        sadp.scores.copy_(scores)
        total = torch.zeros(30)
        # One epoch of the four, flushed by padding: the estimator of sum_i g_i / N times the batches' B / m.
        batches = sadp.open_epoch(16, pad=True)
        for row, weight in zip(batches.indices, batches.weights, strict=True):
            total += (weight.unsqueeze(1) * per_example[row]).sum(0)
        draws.append(total / (0.5 * N))
    draws = torch.stack(draws)
    error = draws.mean(0) - per_example.mean(0)
    assert (error.abs() < 6 * draws.std(0) / 400**0.5).all()


def test_weights_reach_the_loss(data):
    model = Net()
    sadp = SADP(model, N, epochs=4, warmup_epochs=1, tail_epochs=0, seed=1, weights="unbiased")
    for _ in range(2):
        for row in sadp.batches(16):
            output, target = model(data.tensors[0][row]), data.tensors[1][row]
            loss = sadp.loss(criterion, output, target)
            losses = nn.functional.cross_entropy(output, target, reduction="none")
            weights = sadp.batch.weights
            if weights is not None:
                assert loss.item() == pytest.approx((weights * losses).sum().item() / 16, rel=1e-6)
            loss.backward()
            sadp_fast.reset(model)
    keep = (1 - sadp.ratios[1]) * N
    assert weights.max() <= keep / N / sadp.probabilities.min() * (1 + 1e-6)


# -------------------------------------------------------------------------------------------------------- DataLoader


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_dataloader(data, workers, drop_last):
    indexed = TensorDataset(torch.arange(N), *data.tensors)
    model = Net()
    sadp = SADP(model, N, epochs=6, warmup_epochs=1, tail_epochs=1, seed=3, weights="unbiased")
    loader = sadp.loader(DataLoader(indexed, batch_size=16, shuffle=True, num_workers=workers, drop_last=drop_last))
    seen = []
    for _ in range(6):
        epoch = []
        for i, x, y in loader:
            assert torch.equal(i, sadp.batch.indices)  # the batch in hand is the batch that SADP scores
            epoch.append(i)
            sadp.loss(criterion, model(x), y).backward()
            sadp_fast.reset(model)
        seen.append(epoch)
    assert {tuple(i.shape) for epoch in seen for i in epoch} == {(16,)}
    assert sadp.scores.isfinite().all()
    assert sadp.epoch == 6
    first = torch.cat(seen[0])
    assert len(first.unique()) == (96 if drop_last else N)  # the first epoch is full; its rest is carried or padded
    if drop_last:
        missed = set(range(N)) - set(first.tolist())
        assert missed <= set(seen[1][0].tolist())  # ... and opens the second


@pytest.mark.gpu
def test_dataloader_with_pinned_memory(data):
    model = Net().cuda()
    sadp = SADP(model, N, epochs=4)
    loader = sadp.loader(DataLoader(data, batch_size=16, shuffle=True, num_workers=2, pin_memory=True))
    for _ in range(4):
        for x, y in loader:
            assert x.is_pinned()
            sadp.loss(criterion, model(x.cuda(non_blocking=True)), y.cuda(non_blocking=True)).backward()
            sadp_fast.reset(model)
    assert sadp.scores.is_cuda and sadp.scores.isfinite().all()


def test_loader_and_batches_train_alike(data):
    def run(through_loader):
        model = Net()
        sadp = SADP(model, N, epochs=4, seed=3, weights="unbiased")
        loader = sadp.loader(DataLoader(data, batch_size=16, drop_last=True))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(4):
            batches = loader if through_loader else ((t[i] for t in data.tensors) for i in sadp.batches(16))
            for x, y in batches:
                optimizer.zero_grad()
                sadp.loss(criterion, model(x), y).backward()
                optimizer.step()
                sadp_fast.reset(model)
        return sadp.scores

    assert torch.equal(run(True), run(False))


def test_breaking_out_of_an_epoch_is_safe(data):
    model = Net()
    sadp = SADP(model, N, epochs=4)
    loader = sadp.loader(DataLoader(data, batch_size=16))
    for _ in range(2):
        for x, y in itertools.islice(loader, 2):
            sadp.loss(criterion, model(x), y).backward()
            sadp_fast.reset(model)
    assert sadp.epoch == 2
    assert not any(m._forward_hooks for m in model.modules())


# ------------------------------------------------------------------------------------------------------------- state


def test_resuming_gives_the_same_training(data):
    def run(interrupted):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        sadp = SADP(model, N, epochs=6, seed=8, weights="unbiased")
        losses = []
        while sadp.epoch < 6:
            for row in sadp.batches(16):
                loss = sadp.loss(criterion, model(data.tensors[0][row]), data.tensors[1][row])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                sadp_fast.reset(model)
                losses.append(loss.item())
            if interrupted and sadp.epoch == 3:
                saved = copy.deepcopy(sadp.state_dict())
                sadp = SADP(model, N, epochs=6, seed=8, weights="unbiased")
                sadp.load_state_dict(saved)
        return losses, sadp.scores, sadp.examples_trained

    straight, resumed = run(False), run(True)
    assert straight[0] == resumed[0] and straight[2] == resumed[2]
    assert torch.equal(straight[1], resumed[1])


def test_state_of_another_setting_is_refused():
    state = SADP(Net(), N, epochs=6, seed=8).state_dict()
    with pytest.raises(ValueError, match="saved with seed=8, but SADP was built with 9"):
        SADP(Net(), N, epochs=6, seed=9).load_state_dict(state)


def test_same_draws_on_every_device(data, device):
    def rows(device):
        model = Net().to(device)
        sadp = SADP(model, N, epochs=4, score="random", seed=11)
        return torch.cat([row for _ in range(4) for row in sadp.batches(16)]).cpu()

    assert torch.equal(rows("cpu"), rows(device))


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prune_ratio": 1.0}, r"prune_ratio must be a number in \[0, 1\), got 1\.0"),
        ({"prune_ratio": -0.1}, "prune_ratio must be"),
        ({"prune_ratio": "0.5"}, "prune_ratio must be a number"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*64\), got -1"),
        ({"score": "entropy"}, "score must be one of all, last, loss, .*static_random, got 'entropy'"),
        ({"policy": "best"}, "policy"),
        ({"smoothing": 2.0}, "smoothing"),
        ({"schedule": "step"}, "schedule"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 2, "warmup_epochs": 2}, "warmup_epochs"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SADP(Net(), N, **{"epochs": 10, **kwargs})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Net, N, 10), "model must be a torch.nn.Module, got the class Net: pass the network itself"),
        ((Net(), [1, 2], 10), r"num_examples must be an integer, got list: pass len\(train_set\)"),
        ((Net(), float(N), 10), "num_examples must be an integer, got float"),
        ((Net(), N, 4.0), "epochs must be an integer, got float: pass the number of epochs"),
    ],
)
def test_arguments_of_another_kind(arguments, message):
    model, count, epochs = arguments
    with pytest.raises(TypeError, match=message):
        SADP(model, count, epochs=epochs)


@pytest.mark.parametrize("name", ["warmup_epochs", "tail_epochs"])
def test_halves_of_epochs(name):
    with pytest.raises(TypeError, match=f"{name} must be an integer or None, got 1.5"):
        SADP(Net(), N, epochs=10, **{name: 1.5})


@pytest.mark.parametrize(
    ("state", "found"), [({"model": 1, "sadp": 2}, "a dict with model, sadp"), (None, "NoneType")], ids=str
)
def test_a_foreign_state_is_refused(state, found):
    sadp = SADP(Net(), N, epochs=4)
    with pytest.raises(ValueError, match=f"state must be what .* returned, got {found}: pass SADP's part of it"):
        sadp.load_state_dict(state)


def test_a_loop_too_many_says_what_counts_as_one(data):
    loader = SADP(Net(), N, epochs=3, score="random").loader(DataLoader(data, batch_size=16))
    for _ in range(3):
        next(iter(loader))
    with pytest.raises(RuntimeError, match=r"all 3 planned epochs are trained.*next\(iter\(loader\)\) too"):
        next(iter(loader))


def test_graphed_step_without_a_gpu():
    sadp = SADP(Net(), N, epochs=4)
    with pytest.raises(ValueError, match="needs a CUDA GPU, but this SADP is on cpu"):
        sadp_fast.GraphedStep(lambda index: index, sadp)


def test_outputs_that_do_not_show_their_examples(data):
    """Also in an epoch on all data, whose criterion would take them."""
    sadp = SADP(Net(), N, epochs=4, score="loss")
    next(rows := sadp.batches(16))
    with pytest.raises(ValueError, match=r"one row for each of the 16 examples, \[B, \*\], got shape \(48, 4\)"):
        sadp.loss(criterion, torch.zeros(48, 4), torch.zeros(48, dtype=torch.long))
    rows.close()


def test_neurons_of_another_library(data):
    """The number of time steps comes from our neurons; without one, the remedy is named."""

    class Threshold(nn.Module):
        def forward(self, x):
            return (x > 0).float() + x - x.detach()

    model = nn.Sequential(nn.Linear(FEATURES, 8), Threshold(), nn.Linear(8, CLASSES))
    sadp = SADP(model, N, epochs=4)
    row = next(rows := sadp.batches(16))
    output = model(data.tensors[0][row].expand(T, -1, -1)).mean(0)
    with pytest.raises(ValueError, match=r"score='all' found no neuron of sadp_fast.*put sadp_fast\.LIFNode"):
        sadp.loss(criterion, output, data.tensors[1][row])
    rows.close()


def test_use_outside_its_place(data):
    sadp = SADP(Net(), N, epochs=1, prune_ratio=0.0)
    list(sadp.batches(16))
    with pytest.raises(RuntimeError, match="all 1 planned epochs are trained"):
        list(sadp.batches(16))
    with pytest.raises(RuntimeError, match="inside a loop"):
        SADP(Net(), N, epochs=4).loss(criterion, torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))
    running = SADP(Net(), N, epochs=4)
    first = running.batches(16)
    next(first)
    with pytest.raises(RuntimeError, match="still running"):
        next(running.batches(16))
    with pytest.raises(ValueError, match="batch_size"):
        next(SADP(Net(), N, epochs=4).batches(0))


def test_wrong_loaders(data):
    sadp = SADP(Net(), N, epochs=4)
    with pytest.raises(ValueError, match="num_examples=103"):
        sadp.loader(DataLoader(TensorDataset(torch.zeros(5, 1)), batch_size=2))
    with pytest.raises(ValueError, match="batch_size"):
        sadp.loader(DataLoader(data, batch_size=None))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(ValueError, match="map-style"):
        sadp.loader(DataLoader(Stream()))
    with pytest.raises(TypeError, match="loader must be a torch DataLoader, got TensorDataset"):
        sadp.loader(data)


def test_a_sampler_that_would_be_replaced_is_refused_where_anything_is_pruned(data):
    part = torch.utils.data.SubsetRandomSampler(range(50))
    weighted = torch.utils.data.WeightedRandomSampler([1.0] * N, N)
    again = torch.utils.data.RandomSampler(data, replacement=True)
    for sampler in (part, weighted, again):
        loader = DataLoader(data, batch_size=16, sampler=sampler)
        with pytest.raises(ValueError, match=f"{type(sampler).__name__}, in whose place SADP draws.*Subset"):
            SADP(Net(), N, epochs=4).loader(loader)
    assert len(list(SADP(Net(), N, epochs=4, prune_ratio=0.0).loader(DataLoader(data, 10, sampler=part)))) == 5
    shards = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=0)
    SADP(Net(), N, epochs=4).loader(DataLoader(data, batch_size=16, sampler=shards))


def test_criterion_without_reduction(data):
    sadp = SADP(Net(), N, epochs=4)
    next(rows := sadp.batches(16))
    with pytest.raises(TypeError, match="has no `reduction`"):
        sadp.loss(lambda a, b: (a - b).mean(), torch.zeros(16, 2), torch.zeros(16))
    rows.close()


def test_compiled_model_is_refused_for_gradient_scores():
    with pytest.raises(ValueError, match=r"torch.compile hides"):
        SADP(torch.compile(Net()), N, epochs=4)
    SADP(torch.compile(Net()), N, epochs=4, score="loss")


def test_model_without_weight_layers(data):
    model = nn.Sequential(nn.Embedding(5, CLASSES), nn.Flatten(0, 1))
    sadp = SADP(model, N, epochs=4)
    row = next(rows := sadp.batches(16))
    with pytest.raises(ValueError, match="found no weight layer"):
        sadp.loss(criterion, model(row.unsqueeze(1) % 5), data.tensors[1][row])
    rows.close()


def test_weights_that_no_module_call_shows_are_named(data):
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.raw, self.head = nn.Parameter(torch.randn(FEATURES, 8)), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.head(x @ self.raw)

    model = Raw()
    sadp = SADP(model, N, epochs=4)
    rows = sadp.batches(16)
    row = next(rows)
    with pytest.warns(UserWarning, match="score='all' leaves out raw:"):
        sadp.loss(criterion, model(data.tensors[0][row]), data.tensors[1][row])
    rows.close()


def test_neurons_are_left_as_they_were(data):
    model = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Unflatten(0, (1, -1)), LIFNode(step_mode="m"))
    model = nn.Sequential(model, nn.Linear(16, CLASSES), nn.Flatten(0, 1))
    sadp = SADP(model, N, epochs=8, warmup_epochs=2)
    node = model[0][3]
    scales = []
    run = node._run
    node._run = lambda x, call: scales.append(call and call.channel_scale) or run(x, call)
    for _ in range(2):
        for row in sadp.batches(16):
            sadp.loss(criterion, model(data.tensors[0][row]), data.tensors[1][row]).backward()
            count = len(scales)
            model(data.tensors[0][row])
            assert scales.pop() is None and len(scales) == count and not node.collect_statistics  # not measured
            sadp_fast.reset(model)
    del node._run
    assert scales[-1].shape == (16,)  # the normalisation's scale is known in the batch's forward pass ...
    assert node.recorder is None and not node.collect_statistics and not node._forward_hooks  # ... and nothing is left


# ----------------------------------------------------------------------------------------------- the criterion's mean


def with_functions():
    F = nn.functional
    classes = torch.tensor([0.1, 0.2, 0.3, 0.4])
    soft = nn.KLDivLoss(reduction="batchmean")
    return {
        "cross entropy": (nn.CrossEntropyLoss(), False),
        "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), False),
        "class weights": (nn.CrossEntropyLoss(weight=classes), False),
        "class weights and label smoothing": (nn.CrossEntropyLoss(weight=classes, label_smoothing=0.1), False),
        "ignored class": (nn.CrossEntropyLoss(ignore_index=1), False),
        "summed": (nn.CrossEntropyLoss(reduction="sum"), False),
        "soft targets": (nn.CrossEntropyLoss(), True),
        "function": (F.cross_entropy, False),
        "MSE": (nn.MSELoss(), True),
        "MSE, summed": (nn.MSELoss(reduction="sum"), True),
        "BCE": (nn.BCEWithLogitsLoss(pos_weight=classes), True),
        "partial": (functools.partial(F.cross_entropy, weight=classes, ignore_index=2), False),
        "subclass with a mean of its own": (PlainMean(weight=classes), False),
        "KL, batchmean": (lambda output, target, reduction="batchmean": _kl(soft, output, target, reduction), True),
    }


class PlainMean(nn.CrossEntropyLoss):
    """Weighted losses, of which the mean is over the examples."""

    def forward(self, output, target):
        losses = nn.functional.cross_entropy(output, target, weight=self.weight, reduction="none")
        return losses if self.reduction == "none" else losses.mean()


def _kl(module, output, target, reduction):
    module = copy.copy(module)
    module.reduction = reduction
    return module(output.log_softmax(1), target)


def assert_own_loss_in_warm_up_and_pruned_epoch(data, loss_of, target_of):
    """With weights of 1 sadp.loss is the criterion's own number, in a pruned epoch as in the warm-up."""
    model = Net()
    sadp = SADP(model, N, epochs=4, prune_ratio=0.5, warmup_epochs=1, score="all")
    loader = sadp.loader(DataLoader(data, batch_size=16, drop_last=True))
    for _ in range(2):
        for x, y in loader:
            output, target = model(x), target_of(y)
            loss = sadp.loss(loss_of, output, target)
            torch.testing.assert_close(loss, loss_of(output, target), rtol=1e-6, atol=0)
            loss.backward()
            sadp_fast.reset(model)
    assert sadp.epoch == 2


@pytest.mark.parametrize("name", with_functions())
def test_the_loss_keeps_its_scale_where_pruning_begins(data, name):
    loss_of, soft = with_functions()[name]
    target_of = (lambda y: nn.functional.one_hot(y, CLASSES) * 0.8 + 0.05) if soft else (lambda y: y)
    assert_own_loss_in_warm_up_and_pruned_epoch(data, loss_of, target_of)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_targets_in_other_integers(dtype):
    """Bytes index as a mask, and -100 is one of their values; the factor is a float64's."""
    weights, target = torch.rand(200) + 0.5, torch.tensor([0, 3, 156, 7, 156], dtype=dtype)
    for criterion_ in (nn.CrossEntropyLoss(weights), nn.CrossEntropyLoss()):
        weight = torch.ones(200) if criterion_.weight is None else weights
        factor = sadp_fast.prune.criterion.mean_factor(criterion_, "mean", target, 5)
        torch.testing.assert_close(factor, 1 / weight[target.long()].sum().double(), rtol=1e-7, atol=0)


def test_a_tuple_as_target_is_the_criterions_own_business(data):
    """As in a loss for mixup."""

    class Mix(nn.CrossEntropyLoss):
        def forward(self, output, target):
            return 0.3 * super().forward(output, target[0]) + 0.7 * super().forward(output, target[1])

    assert_own_loss_in_warm_up_and_pruned_epoch(data, Mix(), lambda y: (y, y.flip(0)))


@pytest.mark.parametrize("name", ["class weights", "ignored class", "summed", "MSE, summed", "KL, batchmean"])
def test_scores_do_not_depend_on_the_batch_that_an_example_came_in(data, name):
    """Nor on whether its epoch was pruned: each is that of its own loss, not divided by a batch's class weights."""
    loss_of, soft = with_functions()[name]
    found = []
    for seed in (0, 1):
        model = Net()
        sadp = SADP(model, N, epochs=8, prune_ratio=0.5, warmup_epochs=2, seed=seed, weights="unbiased")
        loader = sadp.loader(DataLoader(data, batch_size=16))
        for _ in range(1 + seed * 3):  # the second one's last scores are of pruned epochs, with weights and padding
            for x, y in loader:
                y = nn.functional.one_hot(y, CLASSES) * 0.8 + 0.05 if soft else y
                sadp.loss(loss_of, model(x), y).backward()  # nothing is trained
                sadp_fast.reset(model)
        found.append(sadp.scores)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


# -------------------------------------------------------------------------------------------------- changes on the way


@pytest.mark.parametrize("first", ["frozen", "trained"])
def test_layers_that_are_frozen_or_unfrozen_between_epochs(data, first):
    """The dataflow is read anew: scores go on, over the layers that are trained then."""
    model = Net()
    layer = model.body[0].requires_grad_(first == "trained")
    sadp = SADP(model, N, epochs=8, prune_ratio=0.5)
    loader = sadp.loader(DataLoader(data, batch_size=16))
    for epoch in range(4):
        if epoch == 2:
            layer.requires_grad_(first == "frozen")
            before = sadp.scores.clone()
        train(sadp, model, loader, 1)
        assert ("body.0" in sadp.describe()) == layer.weight.requires_grad
    assert (sadp.scores != before).sum() > N / 4


class FusedNet(Net):
    """With neurons whose kernels write the energies themselves."""

    def __init__(self):
        super().__init__()
        for place, width in ((1, 16), (3, 16)):
            self.body[place] = sadp_fast.BatchNormLIF(width, v_threshold=0.5)
        self.eval()  # statistics that do not depend on the batch


@pytest.mark.parametrize("network", [Net, FusedNet])
def test_a_backward_pass_that_comes_late_writes_into_no_other_batch(data, network):
    """One backward pass for two batches: the first one is not scored, the second one as if it were alone."""
    scores = []
    for late in (False, True):
        model = network()
        sadp = SADP(model, N, epochs=8, prune_ratio=0.5, warmup_epochs=2)
        list(train_once(sadp, model, data))  # the first scored batch is measured in another way
        before = sadp.scores.clone()
        with torch.no_grad():
            model.body[0].weight.mul_(1.5)
        total = torch.zeros(())
        for k, row in enumerate(rows := sadp.batches(8)):
            sadp_fast.reset(model)
            loss = sadp.loss(criterion, model(data.tensors[0][row]), data.tensors[1][row])
            if late:
                total = total + loss
                if k % 2 == 1:
                    total.backward()
                    total = torch.zeros(())
            elif k % 2 == 1:
                loss.backward()
            if k == 3:
                break
        rows.close()
        scores.append(sadp.scores.clone())
    assert 8 < (scores[0] != before).sum() <= 8 + 16
    torch.testing.assert_close(*scores, rtol=0, atol=0, equal_nan=True)


def train_once(sadp, model, data):
    for row in sadp.batches(8):
        sadp.loss(criterion, model(data.tensors[0][row]), data.tensors[1][row]).backward()
        sadp_fast.reset(model)
        yield row


def test_training_goes_on_where_no_weight_layer_is_trained_any_more(data):
    """As for biases alone: examples keep their scores."""
    model = Net()
    sadp = SADP(model, N, epochs=6, prune_ratio=0.5)
    loader = sadp.loader(DataLoader(data, batch_size=16))
    train(sadp, model, loader, 2)
    for layer in model.body[::2]:
        layer.weight.requires_grad_(False)
    before = sadp.scores.clone()
    with pytest.warns(UserWarning, match="no weight layer is trained any more"):
        train(sadp, model, loader, 1)
    assert torch.equal(sadp.scores, before) and sadp.epoch == 3


@pytest.mark.parametrize("kind", ["pruned", "weight norm"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_made_of_others_stay_scored_after_an_evaluation(data, kind):
    """What the last forward pass made of them, without gradients, says nothing of what is trained."""
    model = Net()
    for layer in model.body[::2]:
        prune.random_unstructured(layer, "weight", 0.2) if kind == "pruned" else nn.utils.weight_norm(layer)
    sadp = SADP(model, N, epochs=6, prune_ratio=0.5)
    loader = sadp.loader(DataLoader(data, batch_size=16))
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="score='all' leaves out")
            train(sadp, model, loader, 1)
        layers = sadp.describe().count("\n") + 1
        with torch.no_grad():
            model(data.tensors[0])
        sadp_fast.reset(model)
        assert layers == 3


def test_unpruned_epochs_of_any_sampler(data):
    """More draws than examples, and a loop that was overtaken by another one."""
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=4 * 96)
    sadp = SADP(Net(), N, epochs=2, prune_ratio=0.0)
    loader = sadp.loader(DataLoader(data, batch_size=96, sampler=sampler))
    assert [sadp.progress for _ in loader] == [1 / 8, 2 / 8, 3 / 8, 4 / 8] and sadp.examples_trained == 4 * 96
    first = iter(loader)
    next(first)
    list(loader)
    first.close()
    assert sadp.epoch == 2 and sadp.progress == 1


def test_a_state_loaded_within_an_epoch_is_what_is_saved(data):
    model = Net()
    sadp = SADP(model, N, epochs=6, prune_ratio=0.5)
    loader = sadp.loader(DataLoader(data, batch_size=16))
    train(sadp, model, loader, 1)
    state = sadp.state_dict() | {"scores": torch.full((N,), 7.0)}
    for _ in loader:
        sadp.load_state_dict(state)
        assert (sadp.state_dict()["scores"] == 7).all()
        break


def test_a_state_saved_within_an_epoch_has_the_scores_before_it(data):
    model = Net()
    sadp = SADP(model, N, epochs=6, prune_ratio=0.5)
    loader = sadp.loader(DataLoader(data, batch_size=16))
    train(sadp, model, loader, 2)
    before = sadp.state_dict()["scores"]
    for k, (x, y) in enumerate(loader):
        sadp.loss(criterion, model(x), y).backward()
        sadp_fast.reset(model)
        if k == 1:
            break_state = sadp.state_dict()
    assert torch.equal(break_state["scores"], before) and break_state["epoch"] == 2
    after = sadp.state_dict()
    assert not torch.equal(after["scores"], before) and torch.equal(after["scores"], sadp.scores)


def test_numpys_integers(data, tmp_path):
    sadp = SADP(
        Net(),
        np.int64(N),
        epochs=np.int32(4),
        prune_ratio=0.5,
        seed=np.int64(7),
        warmup_epochs=np.int64(1),
        score="random",
    )
    for _ in range(4):
        list(sadp.batches(16))
    torch.save(sadp.state_dict(), tmp_path / "state.pt")
    SADP(Net(), N, epochs=4, seed=7, warmup_epochs=1, score="random").load_state_dict(torch.load(tmp_path / "state.pt"))


def test_inputs_passed_by_name(data):
    class ByName(Net):
        def forward(self, x):
            x = x.expand(T, *x.shape)
            for module in self.body:
                x = module(input=x) if isinstance(module, nn.Linear) else module(x)
            return x.mean(0)

    scores = []
    for model in (Net(), ByName()):
        sadp = SADP(model, N, epochs=8, prune_ratio=0.5, warmup_epochs=2)
        train(sadp, model, sadp.loader(DataLoader(data, batch_size=16)), 2)
        scores.append(sadp.scores)
    assert torch.equal(*scores)


def test_a_parametrised_weight_is_covered(data, recwarn):
    model = Net()
    nn.utils.parametrizations.weight_norm(model.body[2])
    sadp = SADP(model, N, epochs=4, prune_ratio=0.5)
    train(sadp, model, sadp.loader(DataLoader(data, batch_size=16)), 1)
    assert sadp.scores.isfinite().all() and "body.2" in sadp.describe()
    assert not [w for w in recwarn if "leaves out" in str(w.message)]


# ------------------------------------------------------------------------------------------------- what users mistake


def test_negative_scores_are_warned_of(data):
    sadp = SADP(Net(), N, epochs=4, prune_ratio=0.5, score="given")
    loader = sadp.loader(DataLoader(data, batch_size=16))
    for x, _ in loader:
        sadp.give(-torch.rand(len(x)) - 0.1)
    with pytest.warns(UserWarning, match=r"scores >= 0 \(negative ones count as none\)"):
        list(loader)


def test_an_object_with_a_reduction_is_a_criterion(data):
    """As the losses of snnTorch, which are no modules."""

    class Loss:
        reduction = "mean"

        def __call__(self, output, target):
            return nn.functional.cross_entropy(output, target, reduction=self.reduction)

    assert_own_loss_in_warm_up_and_pruned_epoch(data, Loss(), lambda y: y)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda output, y: (output, y, criterion), "criterion must be a loss module or function, got Tensor"),
        (lambda output, y: (nn.CrossEntropyLoss, output, y), "got the class CrossEntropyLoss.*an instance"),
    ],
    ids=["order", "class"],
)
def test_what_is_no_criterion(data, arguments, message):
    model = Net()
    sadp = SADP(model, N, epochs=4, prune_ratio=0.5)
    for x, y in sadp.loader(DataLoader(data, batch_size=16)):
        with pytest.raises(TypeError, match=message):
            sadp.loss(*arguments(model(x), y))
        break


def test_given_scores_must_be_a_tensor(data):
    sadp = SADP(Net(), N, epochs=4, prune_ratio=0.5, score="given")
    for _ in sadp.batches(16):
        with pytest.raises(TypeError, match=r"scores must be a tensor, got ndarray: pass torch.as_tensor"):
            sadp.give(np.ones(16))
        break


@pytest.mark.parametrize("score, text", [("loss", "measures no layer"), ("all", "read in the first scored batch")])
def test_what_describe_says_before_the_first_batch(score, text):
    assert text in SADP(Net(), N, epochs=4, score=score).describe()


@pytest.mark.parametrize("step_mode, remedy", [("m", r"reads as \[T, N, \*\].*put time first"), ("s", "step_mode='m'")])
def test_a_neuron_without_its_time_axis(data, step_mode, remedy):
    """A batch taken for time, or time for the batch: the message says how the neuron read it."""
    model = nn.Sequential(nn.Linear(FEATURES, 8), LIFNode(step_mode=step_mode), nn.Linear(8, CLASSES))
    sadp = SADP(model, N, epochs=4, prune_ratio=0.5)
    with pytest.raises(ValueError, match=remedy):
        for _ in range(2):
            for x, y in sadp.loader(DataLoader(data, batch_size=16)):
                output = model(x) if step_mode == "m" else model(x.expand(T, *x.shape)).mean(0)
                sadp.loss(criterion, output, y).backward()
                sadp_fast.reset(model)


@pytest.mark.parametrize(
    "output, target", [((8, 1), (8, 1)), ((8,), (8,)), ((8, 3, 5), (8, 5)), ((8, 3), (8, 2))], ids=str
)
def test_el2n_wants_two_classes(output, target):
    with pytest.raises(ValueError, match=r"EL2N needs logits \[B, classes\] of two classes or more"):
        sadp_fast.prune.baselines.el2n_score(torch.zeros(output), torch.zeros(target))
