"""Scores in loops and models that others write: against exact gradient norms, or against loops without the oddity."""

import copy
import io

import pytest
import torch
from conftest import INTERPRETED
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import sadp_fast
from sadp_fast import SADP, BatchNormLIF, LIFNode, surrogate
from sadp_fast.nn.recorder import CallRecorder

N, FEATURES, CLASSES, T, BATCH = 40, 12, 5, 3, 8
criterion = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def everything_on(device):
    with torch.device(device):
        yield


@pytest.fixture
def data(device):
    torch.manual_seed(1)
    return TensorDataset(3 * torch.rand(N, FEATURES), torch.randint(CLASSES, (N,)))


def pruner(model, **changes):
    return SADP(model, N, **{"epochs": 3, "prune_ratio": 0.3, **changes})


def rows(sadp):
    """The first epoch's batches."""
    return enumerate(sadp.batches(BATCH))


def exact(model, forward, data, parameters):
    """Norm of each example's gradient with respect to these parameters."""
    norms = []
    for x, y in data:
        sadp_fast.reset(model)
        loss = criterion(forward(model, x[None]), y[None])
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norms.append(sum(g.square().sum() for g in gradients if g is not None).sqrt())
    sadp_fast.reset(model)
    return torch.stack(norms)


class TwoHeads(nn.Module):
    """Of which the loss may see one, and whose middle layer may be left out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.lif = nn.Linear(FEATURES, 16), LIFNode(step_mode="m")
        self.middle, self.head, self.other = nn.Linear(16, 16), nn.Linear(16, CLASSES), nn.Linear(16, 3)

    def forward(self, x, middle=True):
        s = self.lif(self.stem(x.expand(T, *x.shape)))
        s = s + self.middle(s) if middle else s
        return self.head(s), self.other(s)


@pytest.mark.parametrize("score", ["all", "last"])
def test_a_layer_that_the_loss_does_not_see_is_none(data, score):
    """An auxiliary head that is not trained: it has no gradient, and leaves the others' score alone."""
    model, scores = TwoHeads(), []
    for head in (model.other, nn.Identity()):
        model.other = head
        sadp = pruner(model, score=score)
        for _, index in rows(sadp):
            x, y = data[index]
            sadp.loss(criterion, model(x)[0].mean(0), y).backward()
            sadp_fast.reset(model)
        scores.append(sadp.scores.clone())
    assert scores[0].isfinite().all() and torch.equal(*scores) and "other" not in sadp.describe()


def test_layers_without_a_gradient_in_some_batches(data):
    """A loss that sees a prefix of the steps, and a layer that is dropped: the rest of the bound is the score."""
    model = TwoHeads()
    weights = [model.stem.weight, model.middle.weight, model.head.weight]
    sadp, prefix, dropped = pruner(model), [], []
    for k, index in rows(sadp):
        x, y = data[index]
        (prefix if k % 2 else dropped).append(index)
        output = model(x, middle=k == 0 or k % 2 == 1)[0]
        sadp.loss(criterion, output[: 1 if k % 2 else T].mean(0), y).backward()
        sadp_fast.reset(model)
    prefix, dropped = torch.cat(prefix), torch.cat(dropped[1:])  # the first batch had both
    first_step = exact(model, lambda m, x: m(x)[0][:1].mean(0), data, weights)
    without = exact(model, lambda m, x: m(x, middle=False)[0].mean(0), data, weights)
    assert (sadp.scores[prefix] >= 0.999 * first_step[prefix]).all()
    assert (sadp.scores[dropped] >= 0.999 * without[dropped]).all()


class Normalised(nn.Module):
    def __init__(self, neuron):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.n, self.b = nn.Linear(FEATURES, 16), neuron(), nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.b(self.n(self.a(x).expand(T, -1, -1))).mean(0)


@pytest.mark.parametrize("neuron", [lambda: BatchNormLIF(16), lambda: LIFNode(step_mode="m")])
@pytest.mark.parametrize("oddity", ["forward only", "own loss", "no backward"])
def test_a_batch_that_is_not_trained_leaves_the_others_alone(data, neuron, oddity):
    def scores(odd):
        model = Normalised(neuron).eval()
        sadp, batches = pruner(model), []
        for k, index in rows(sadp):
            x, y = data[index]
            batches.append(index)
            output = model(x)
            if k != odd or oddity == "no backward":
                loss = sadp.loss(criterion, output, y)
            if k != odd:
                loss.backward()
            elif oddity == "own loss":
                criterion(output, y).backward()
            sadp_fast.reset(model)
        return sadp.scores.clone(), batches

    expected, batches = scores(None)
    found, _ = scores(2)
    assert found[batches[2]].isnan().all()
    found[batches[2]] = expected[batches[2]]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("neuron", [lambda: BatchNormLIF(16), lambda: LIFNode(step_mode="m")])
def test_statistics_that_the_user_collects_stay_on(data, neuron):
    model = Normalised(neuron)
    model.n.collect_statistics = True
    sadp = pruner(model)
    for _, index in rows(sadp):
        x, y = data[index]
        sadp.loss(criterion, model(x), y).backward()
        assert model.n.collect_statistics
        sadp_fast.reset(model)
    assert model.n.collect_statistics and isinstance(model.n.recorder, CallRecorder)


class ThreeTimes(surrogate.ATan):
    def __call__(self, x):
        return 3 * super().__call__(x)


@pytest.mark.parametrize("function", [ThreeTimes(), torch.sigmoid])
def test_what_is_no_spike_is_not_counted_as_one(data, function):
    """One step and one layer: the bound is the exact norm, in the first batch and in the others."""
    model = nn.Sequential(nn.Linear(FEATURES, 16), LIFNode(surrogate_function=function), nn.Linear(16, CLASSES))
    norms = exact(model, lambda m, x: m(x), data, [model[2].weight])
    sadp = pruner(model, score="last")
    for _, index in rows(sadp):
        x, y = data[index]
        sadp.loss(criterion, model(x), y).backward()
        sadp_fast.reset(model)
    torch.testing.assert_close(sadp.scores, norms, rtol=1e-4, atol=0)


class ThresholdDependent(nn.BatchNorm1d):
    """A normalisation with a factor of its own, as in published code of tdBN (arXiv 2011.05280)."""

    def forward(self, x):
        return 0.5 * super().forward(x)


class Written(nn.BatchNorm1d):
    """The same, written out."""

    def forward(self, x):
        return 0.5 * ((x - self.running_mean) / torch.sqrt(self.running_var + self.eps) * self.weight + self.bias)


@pytest.mark.parametrize("norm", [ThresholdDependent, Written])
def test_a_normalisation_that_does_more_is_not_taken_for_a_plain_one(data, norm):
    model = nn.Sequential(nn.Linear(FEATURES, 16), norm(16), LIFNode(), nn.Linear(16, CLASSES)).eval()
    model[3].weight.requires_grad_(False)
    norms = exact(model, lambda m, x: m(x), data, [model[0].weight])
    sadp = pruner(model)
    for _, index in rows(sadp):
        x, y = data[index]
        sadp.loss(criterion, model(x), y).backward()
        sadp_fast.reset(model)
    torch.testing.assert_close(sadp.scores, norms, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("neuron", [lambda: BatchNormLIF(16), lambda: LIFNode(step_mode="m")])
def test_a_copy_made_within_an_epoch_is_no_part_of_the_model(data, neuron):
    """Neither is it measured, nor does it keep hooks, which could not be saved."""

    def scores(copied):
        model, other = Normalised(neuron).eval(), None
        sadp = pruner(model)
        for k, index in rows(sadp):
            x, y = data[index]
            if copied and k == 1:
                other = copy.deepcopy(model)
                torch.save(model, io.BytesIO())
            if other is not None:
                other(x[:5] + 1).square().sum().backward()
                sadp_fast.reset(other)
            sadp.loss(criterion, model(x), y).backward()
            sadp_fast.reset(model)
        return sadp.scores, other

    expected, _ = scores(False)
    found, other = scores(True)
    assert torch.equal(found, expected)
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    x = data[:BATCH][0]
    assert torch.equal(torch.load(file, weights_only=False)(x), other(x))


def test_a_loader_with_an_iteration_of_its_own_is_refused(data):
    class Shifted(DataLoader):
        def __iter__(self):
            return ((x + 1, y) for x, y in super().__iter__())

    model = Normalised(lambda: LIFNode(step_mode="m"))
    with pytest.raises(ValueError, match=r"Shifted with an __iter__ of its own.* pass a plain DataLoader"):
        pruner(model).loader(Shifted(data, batch_size=BATCH))
    x, _ = next(iter(pruner(model, prune_ratio=0.0).loader(Shifted(data, batch_size=BATCH))))
    assert torch.equal(x, data[:BATCH][0] + 1)  # as it was, where nothing is pruned


@pytest.mark.parametrize("prune_ratio", [0.0, 0.3])
def test_a_rollback_within_an_epoch(data, prune_ratio):
    """The epoch that was running is not trained: it begins anew, with what was carried into it."""
    model = Normalised(lambda: LIFNode(step_mode="m"))
    sadp = pruner(model, prune_ratio=prune_ratio, score="loss")
    loader = sadp.loader(DataLoader(data, batch_size=9, drop_last=True))

    def step(x, y):
        sadp.loss(criterion, model(x), y).backward()
        sadp_fast.reset(model)

    for x, y in loader:
        step(x, y)
    state, before = sadp.state_dict(), (sadp.epoch, sadp.examples_trained, sadp.progress)
    for k, (x, y) in enumerate(loader):
        step(x, y)
        if k == 1:
            sadp.load_state_dict(state)
            break
    assert (sadp.epoch, sadp.examples_trained, sadp.progress) == before
    again = sadp.state_dict()
    assert all(
        torch.equal(again[key].nan_to_num(-1), state[key].nan_to_num(-1)) for key in ("scores", "carried_indices")
    )
    for x, y in loader:
        step(x, y)
    assert sadp.epoch == before[0] + 1


def test_a_rollback_leaves_the_loop(data):
    model = Normalised(lambda: LIFNode(step_mode="m"))
    sadp = pruner(model)
    state = sadp.state_dict()
    with pytest.raises(RuntimeError, match="a state was loaded within this epoch"):
        for _, index in rows(sadp):
            sadp.loss(criterion, model(data[index][0]), data[index][1]).backward()
            sadp_fast.reset(model)
            sadp.load_state_dict(state)
    assert sadp.epoch == 0 and not any(module._forward_hooks for module in model.modules())


def test_gradients_of_gradients(data):
    """A gradient penalty: what is written for the score has no graph."""
    model = Normalised(lambda: BatchNormLIF(16, backend="torch"))
    sadp = pruner(model)
    for _, index in rows(sadp):
        x, y = data[index]
        loss = sadp.loss(criterion, model(x), y)
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
        sadp_fast.reset(model)
    assert sadp.scores.isfinite().all() and not sadp.scores.requires_grad


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused_norm", [True, False])
@pytest.mark.parametrize("kernels", [True, False])
def test_activation_checkpoints_are_not_run_for_the_score(data, device, kernels, fused_norm, training):
    """Reading what batch normalisation saved would run the block again, and update its running statistics once more.

    And the block, run again without being measured, has to save as many tensors.
    """
    if kernels and device == "cpu" and not INTERPRETED:
        pytest.skip("the kernels run on the GPU here")
    backend = "triton" if kernels else "torch"

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            norm, lif = nn.BatchNorm1d(16), LIFNode(step_mode="m", backend=backend)
            self.a, self.norm, self.lif = nn.Linear(FEATURES, 16), norm, lif
            if fused_norm:
                self.norm, self.lif = nn.Identity(), BatchNormLIF(16, backend=backend)
            self.head, self.checkpoints, self.runs = nn.Linear(16, CLASSES), False, 0

        def block(self, x):
            self.runs += 1
            self.lif.reset()
            return self.lif(self.norm(self.a(x.flatten(0, 1))).unflatten(0, x.shape[:2]))

        def forward(self, x):
            x = x.expand(T, *x.shape)
            s = checkpoint(self.block, x, use_reentrant=False) if self.checkpoints else self.block(x)
            return self.head(s).mean(0)

    def scores(checkpoints):
        model = Block().train(training)
        model.checkpoints = checkpoints
        sadp = pruner(model)
        for index, _ in zip(sadp.batches(BATCH), range(3), strict=False):
            sadp.loss(criterion, model(data[index][0]), data[index][1]).backward()
            sadp_fast.reset(model)
        return sadp.scores, model.runs

    plain, runs = scores(False)
    recomputed, runs_again = scores(True)
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=0, equal_nan=True)
    assert recomputed.isfinite().sum() == 3 * BATCH and runs_again == 2 * runs


@pytest.mark.parametrize("score", ["all", "loss", "el2n"])
def test_scores_are_those_of_the_first_pass(data, score):
    """A second pass over a batch, as of sharpness-aware minimisation, is of perturbed weights."""

    def scores(twice):
        model = Normalised(lambda: LIFNode(step_mode="m"))
        sadp = pruner(model, score=score)
        for _, index in rows(sadp):
            x, y = data[index]
            sadp.loss(criterion, model(x), y).backward()
            sadp_fast.reset(model)
            if twice:
                sadp.loss(criterion, 3 * model(x), y).backward()
                sadp_fast.reset(model)
        return sadp.scores

    assert torch.equal(scores(True), scores(False))


def test_ranks_without_a_sampler_of_theirs_are_warned_of(data, monkeypatch):
    """Where nothing is pruned, a rank trains on what its loader yields."""
    monkeypatch.setattr("sadp_fast.prune.loader.rank_and_world", lambda: (0, 2))
    loader = pruner(nn.Linear(FEATURES, CLASSES), prune_ratio=0.0).loader(DataLoader(data, batch_size=BATCH))
    with pytest.warns(UserWarning, match="give it a DistributedSampler"):
        next(iter(loader))


@pytest.mark.parametrize("score", ["all", "loss", "el2n", "random"])
def test_another_default_device_changes_nothing(data, score):
    """What SADP makes lies where the model and the data lie, whatever torch.set_default_device says."""

    def scores(elsewhere):
        model = Normalised(lambda: LIFNode(step_mode="m"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.device("meta" if elsewhere else model.a.weight.device):
            sadp = pruner(model, score=score)
            for _ in range(3):
                for _, index in rows(sadp):
                    sadp.loss(criterion, model(data[index][0]), data[index][1]).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    sadp_fast.reset(model)
        return sadp.scores, sadp.probabilities

    for found, expected in zip(scores(True), scores(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
