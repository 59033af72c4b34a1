"""Other papers' methods around a training loop: draws, weights, scores, and the faults of InfoBatch's public code."""

import copy
import itertools
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_sadp import CLASSES, FEATURES, N, Net, criterion, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

import sadp_fast
from sadp_fast import SADP
from sadp_fast.lab import train as training
from sadp_fast.lab.data import load
from sadp_fast.lab.methods import METHODS
from sadp_fast.prune.policies import POLICIES
from sadp_fast.prune.scores import Given
from sadp_fast.prune.scoring import Scoring
from sadp_fast.prune.settings import WEIGHTS

INFOBATCH = {"score": "loss", "policy": "infobatch"}


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, FEATURES, generator=generator) * 2
    return TensorDataset(x, torch.randint(CLASSES, (N,), generator=generator))


# ------------------------------------------------------------------------------------------------ weights of the losses


def test_a_policy_brings_its_papers_weights_and_tail():
    built = {policy: SADP(Net(), N, epochs=16, policy=policy) for policy in POLICIES}
    weights = {policy: sadp.settings.weights for policy, sadp in built.items()}
    assert weights == {"mix": "none", "floor": "none", "infobatch": "sum", "epsilon_greedy": "none"}
    tails = {policy: sadp.settings.tail_epochs for policy, sadp in built.items()}
    assert tails == {"mix": 0, "floor": 0, "infobatch": 2, "epsilon_greedy": 0}
    own = SADP(Net(), N, epochs=16, policy="infobatch", weights="unbiased", tail_epochs=1)
    assert (own.settings.weights, own.settings.tail_epochs) == ("unbiased", 1)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_weighted_sums_are_what_the_weights_promise(policy, weights):
    """Mean over 120 draws of sum_i w_i x_i: (m / N) sum_i x_i, sum_i x_i, and sum_i p_i x_i.

    Each of 10 coordinates is held to 6 of its own standard errors: a right program fails with probability 2e-8.
    """
    draws, ratio = 120, 0.5
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 10, generator=generator).double()
    sadp = SADP(
        Net(), N, epochs=draws, prune_ratio=ratio, policy=policy, weights=weights, warmup_epochs=0, tail_epochs=0
    )
    sadp.scores.copy_(torch.rand(N, generator=generator) ** 3)
    sums = []
    for number in range(draws):
        sadp.skip_to(number)
        batches = sadp.open_epoch(16, pad=True)
        sums.append((batches.weights.double().unsqueeze(2) * x[batches.indices]).sum((0, 1)))
    share = {"unbiased": torch.full((N,), 1 - ratio), "sum": torch.ones(N), "none": sadp.probabilities}[weights]
    sums = torch.stack(sums)
    error = sums.mean(0) - share.double() @ x
    assert (error.abs() < 6 * sums.std(0) / draws**0.5).all()
    assert sums.std(0).min() > 0.1


@pytest.mark.parametrize("method", [method for method in METHODS if method != "grad_norm"])
def test_ratio_zero_is_ordinary_training_to_the_bit(data, method):
    changes = METHODS[method].settings
    settings = {name: changes[name] for name in ("score", "policy", "weights", "score_momentum") if name in changes}

    def run(pruned):
        model = Net()
        torch.manual_seed(9)
        loader = DataLoader(data, batch_size=16, shuffle=True)
        sadp = SADP(model, N, epochs=2, prune_ratio=0.0, **settings) if pruned else None
        losses = train(sadp, model, sadp.loader(loader) if pruned else loader, 2)
        return losses, [p.detach().clone() for p in model.parameters()]

    losses, weights = run(False)
    same, same_weights = run(True)
    assert losses == same and all(map(torch.equal, weights, same_weights))


# -------------------------------------------------------------------------------------------------------------- draws


def drawn(sadp):
    """What each epoch trains on."""
    return [set(torch.cat([*sadp.batches(1)]).tolist()) for _ in sadp.ratios]


def test_static_random_is_one_subset_in_another_order():
    sadp = SADP(Net(), N, epochs=6, prune_ratio=0.4, score="static_random", warmup_epochs=0, tail_epochs=0, seed=3)
    orders = [torch.cat([*sadp.batches(1)]).tolist() for _ in range(6)]
    assert all(set(order) == set(orders[0]) for order in orders) and len({tuple(order) for order in orders}) == 6
    # Bernoulli draws: 61.8 expected, standard deviation 4.97.
    assert len(set(orders[0])) == len(orders[0]) and 32 <= len(orders[0]) <= 92
    others = [drawn(SADP(Net(), N, epochs=1, score="static_random", warmup_epochs=0, seed=s)) for s in (4, 5)]
    assert others[0] != others[1]


def test_static_random_with_a_schedule_shrinks_one_subset():
    sadp = SADP(Net(), N, epochs=8, score="static_random", schedule="linear", warmup_epochs=1, tail_epochs=1)
    subsets = drawn(sadp)
    assert subsets[0] == subsets[-1] == set(range(N))
    assert all(later <= earlier for earlier, later in itertools.pairwise(subsets[:-1]))
    assert len(subsets[-2]) < len(subsets[1])


def test_random_draws_anew():
    sadp = SADP(Net(), N, epochs=2, score="random", warmup_epochs=0, tail_epochs=0)
    first, second = drawn(sadp)
    assert first != second


def test_epsilon_greedy_trains_on_the_highest_scores(data):
    sadp = SADP(Net(), N, epochs=2, policy="epsilon_greedy", score="loss", smoothing=0.1, warmup_epochs=0)
    sadp.scores.copy_(torch.arange(N))
    first = drawn(sadp)[0]
    highest = int(0.9 * 0.5 * N)
    assert set(range(N - highest, N)) <= first


# ------------------------------------------------------------------------------------------------------ given scores


def test_given_scores_are_kept_where_they_belong(data, device):
    sadp = SADP(Net().to(device), N, epochs=8, score="given", tail_epochs=1)
    wanted = []
    for epoch in range(8):
        for row in sadp.batches(N if epoch == 0 else 16):
            wanted.append(sadp.wants_scores)
            sadp.loss(criterion, torch.zeros(len(row), CLASSES, device=device), row % CLASSES)
            sadp.give(torch.where(row == 7, torch.nan, row + 0.5 * epoch))
        if epoch == 0:
            expected = torch.arange(N, device=device).float()
            expected[7] = torch.nan
            assert torch.equal(sadp.scores.nan_to_num(-1), expected.nan_to_num(-1))
    assert wanted[0] and not wanted[-1]  # from the last pruned epoch on, nothing is drawn by them any more
    newer = (sadp.scores - expected)[expected.isfinite()]
    assert newer.min() >= 0 and newer.max() == 2.5 and sadp.scores[7].isnan() and not sadp.wants_scores


def test_giving_in_the_wrong_place():
    with pytest.raises(ValueError, match=r"score='given', but this SADP was built with score='all'"):
        SADP(Net(), N, epochs=4).give(torch.zeros(16))
    sadp = SADP(Net(), N, epochs=4, score="given")
    with pytest.raises(RuntimeError, match="inside a loop"):
        sadp.give(torch.zeros(16))
    rows = sadp.batches(16)
    next(rows)
    with pytest.raises(ValueError, match=r"shape \[16\], one per example, got \[16, 1\]"):
        sadp.give(torch.zeros(16, 1))
    rows.close()


@pytest.mark.parametrize("options", [{"weights": "mean"}, {"score_momentum": 1.0}, {"score_momentum": -0.1}])
def test_bad_settings(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SADP(Net(), N, epochs=10, **options)


@pytest.mark.gpu
def test_given_scores_in_a_recorded_step():
    model = nn.Linear(3, CLASSES).cuda()
    x = torch.randn(N, 3, device="cuda")
    sadp = SADP(model, N, epochs=6, score="given", policy="infobatch", score_momentum=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.0, device="cuda"), fused=True)

    def step(index):
        optimizer.zero_grad(set_to_none=True)
        loss = sadp.loss(criterion, model(x[index]), index % CLASSES)
        loss.backward()
        if sadp.wants_scores:
            sadp.give(x[index].abs().sum(1))
        optimizer.step()
        return loss.detach()

    graphed = sadp_fast.GraphedStep(step, sadp)
    for _ in range(6):
        for index in sadp.batches(16):
            graphed(index)
    assert len(graphed._recorded) == 2  # scored, and the tail's
    torch.testing.assert_close(sadp.scores, x.abs().sum(1))


# --------------------------------------------------------------------------------------------- averages of the scores


@pytest.mark.parametrize("score", ["all", "loss"])
def test_scores_are_averaged_over_epochs(data, score, device):
    """Full-data epochs of one batch: the same training with and without averages, which are those of its scores."""

    def scores(momentum):
        model = Net().to(device)
        sadp = SADP(model, N, epochs=20, score=score, score_momentum=momentum, warmup_epochs=4, prune_ratio=0.2)
        per_epoch = []
        optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
        for _ in range(4):
            for row in sadp.batches(N):
                x, y = (t.to(device)[row] for t in data.tensors)
                optimizer.zero_grad()
                sadp.loss(criterion, model(x), y).backward()
                optimizer.step()
                sadp_fast.reset(model)
            per_epoch.append(sadp.scores.clone())
        return per_epoch

    newest, averaged = scores(0.0), scores(0.75)
    assert (newest[3] / newest[2] - 1).abs().median() > 0.003
    expected = newest[0]
    torch.testing.assert_close(averaged[0], expected, rtol=0, atol=0)
    for new, average in zip(newest[1:], averaged[1:], strict=True):
        expected = 0.75 * expected + 0.25 * new
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)


def test_average_of_an_example_that_occurs_twice_has_no_order():
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        scoring = Scoring(Given(), Net(), 4, 0.5, torch.device("cpu"))
        scoring.values.copy_(torch.tensor([4.0, torch.nan, 8.0, 1.0]))
        indices = torch.tensor([0, 0, 1, 2])[order]
        scores = torch.tensor([2.0, 6.0, 3.0, torch.inf])[order]
        scoring.keep(indices, None, scores)
        assert scoring.values.tolist() == [5.0, 3.0, 8.0, 1.0]


# --------------------------------------------------------------------------------------------- settings in checkpoints


def test_states_know_the_settings():
    sadp = SADP(Net(), N, epochs=6, **INFOBATCH, score_momentum=0.5)
    state = sadp.state_dict()
    SADP(Net(), N, epochs=6, **INFOBATCH, score_momentum=0.5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"saved with score_momentum=0\.5, but SADP was built with 0\.0"):
        SADP(Net(), N, epochs=6, **INFOBATCH).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with weights='sum', but SADP was built with 'none'"):
        SADP(Net(), N, epochs=6, **INFOBATCH, weights="none", score_momentum=0.5).load_state_dict(state)


# -------------------------------------------------------------------------------- faults of InfoBatch's public code


@pytest.mark.parametrize("drop_last", [False, True])
def test_infobatch_prunes_and_every_epoch_ends(data, drop_last):
    """There: drop_last=True never prunes, drop_last=False never ends."""
    model = Net()
    sadp = SADP(model, N, epochs=12, **INFOBATCH)
    loader = sadp.loader(DataLoader(data, batch_size=8, drop_last=drop_last))
    for ratio in sadp.ratios:
        batches = list(itertools.islice(loader, 20)) if ratio == 0 else [None for _ in itertools.islice(loader, 20)]
        assert len(batches) < 20
        if ratio > 0:
            assert len(batches) < N // 8
    assert sadp.epoch == 12


def test_infobatch_weighs_the_last_epochs_by_one(data):
    """There: weights of pruned epochs stay where epochs * delta is not an integer (9 * 0.875)."""
    model, seen = Net(), []
    sadp = SADP(model, N, epochs=9, **INFOBATCH)
    loader = sadp.loader(DataLoader(data, batch_size=8, drop_last=False))
    train(sadp, model, loader, 9, step_hook=lambda x, y: seen.append((sadp.epoch, sadp.batch.weights)))
    assert sadp.ratios[8] == 0 < sadp.ratios[7]
    weights = [torch.ones(8) if w is None else w for epoch, w in seen if epoch == 8]
    real = torch.cat(weights)[:N]
    assert torch.equal(real, torch.ones(N)) and torch.cat(weights)[N:].sum() == 0
    pruned = torch.cat([w for epoch, w in seen if epoch == 7])
    # p is 1 or 1 - s, so a weight 1 / p is 1 (0: padding) or one other number.
    values = pruned[pruned > 0].unique()
    assert len(values) == 2 and values[0] == pytest.approx(1, rel=1e-6) and values[1] > 1.5


def test_indices_survive_half_precision():
    """There: they travel with the losses, and 2049 is 2048 in half precision."""
    count = 5000
    sadp = SADP(Net(), count, epochs=8, **INFOBATCH)

    def error(output, target, reduction="mean"):
        losses = (output - target).abs()
        return losses if reduction == "none" else losses.mean()

    for row in sadp.batches(50):
        sadp.loss(error, torch.zeros(50).half(), (row % 17).half())
    assert torch.equal(sadp.scores, (torch.arange(count) % 17).float())


def test_global_random_numbers_and_dataloaders_are_left_alone(data):
    """There: np.random.seed(epoch), and another __next__ for every DataLoader of the process."""
    states = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    model = Net()
    torch.set_rng_state(states[2])
    sadp = SADP(model, N, epochs=6, **INFOBATCH)
    for _ in range(6):
        for row in sadp.batches(8):
            sadp.loss(criterion, model(data.tensors[0][row]), data.tensors[1][row]).backward()
            sadp_fast.reset(model)
    assert np.array_equal(np.random.get_state()[1], states[0]) and random.getstate() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert _BaseDataLoaderIter.__next__.__module__ == "torch.utils.data.dataloader"


def test_infobatch_resumes_and_is_copied(data):
    """There: no state_dict, and unpickling recurses for ever."""

    def run(interrupt):
        model = Net()
        sadp = SADP(model, N, epochs=6, seed=8, **INFOBATCH)
        losses = []
        for epoch in range(6):
            losses += train(sadp, model, sadp.loader(DataLoader(data, batch_size=16)), 1)
            if interrupt and epoch == 2:
                sadp = interrupt(sadp, model)
        return losses, sadp.scores

    def resumed(sadp, model):
        fresh = SADP(model, N, epochs=6, seed=8, **INFOBATCH)
        fresh.load_state_dict(copy.deepcopy(sadp.state_dict()))
        return fresh

    def pickled(sadp, model):
        copied = pickle.loads(pickle.dumps(sadp))
        copied.model = model
        return copied

    losses, scores = run(None)
    for interrupt in (resumed, pickled):
        again, same = run(interrupt)
        assert again == losses and torch.equal(same, scores)


# ----------------------------------------------------------------------------------------------------- whole training


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_digits(method, tmp_path):
    pytest.importorskip("sklearn")
    digits = load("digits")
    config = training.TrainConfig(model="mlp", time_steps=2, epochs=5, batch_size=64, lr=4e-3).of(method)
    history = training.run(replace(config, epochs=5), digits, tmp_path).history
    count = len(digits.train_labels)
    assert history[-1]["test_accuracy"] > 0.8
    expected = (1 - config.prune_ratio) * 5 * count
    assert abs(history[-1]["examples_trained"] - expected) < 6 * (5 * count / 4) ** 0.5
    scores = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["sadp"]["scores"]
    scored = method not in ("full", "random", "static_random")
    assert scores.isfinite().any() == scored


def test_the_gradient_norms_of_training_are_those_of_the_weights_before_the_step():
    digits = load("digits")
    config = training.TrainConfig(model="conv", time_steps=2, epochs=5, batch_size=8).of("grad_norm")
    trainer = training.Trainer(config, digits)
    before = copy.deepcopy(trainer.model)
    rows = trainer.sadp.batches(8)
    row = next(rows)
    trainer.step(row, 1e-2)
    next(rows)
    x = trainer.inputs(digits.train_images, row)
    expected = sadp_fast.statistics.exact_norms.gradient_norms(before, x, digits.train_labels[row], trainer.criterion)
    assert torch.equal(trainer.sadp.scores[row], expected) and expected.min() > 0
    rows.close()
