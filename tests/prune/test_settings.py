"""Settings as a typed object, scores and policies of one's own, and the public ways into an epoch."""

import copy
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch
from test_sadp import CLASSES, FEATURES, N, Net, criterion, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sadp_fast
from sadp_fast import SADP, Policy, Score, Settings, inclusion_probabilities
from sadp_fast.prune.loader import PrunedLoader
from sadp_fast.prune.policies import POLICIES
from sadp_fast.prune.scores import SCORES, AllLayers


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, FEATURES, generator=generator) * 2
    return TensorDataset(x, torch.randint(CLASSES, (N,), generator=generator))


class Doubt(Score):
    name = "doubt"

    def of_batch(self, output, target, losses):
        return 1 - output.softmax(1).amax(1)


class OfLosses(Score):
    name = "of losses"

    def of_batch(self, output, target, losses):
        return losses()


class SquaredBound(AllLayers):
    name = "squared bound"

    def of_energies(self, inputs, deltas, multiplicity):
        return super().of_energies(inputs, deltas, multiplicity) ** 2


class Thirds(Policy):
    """Whoever is in the upper third is certain."""

    name = "thirds"
    weights = "sum"
    tail = 0.25

    def probabilities(self, scores, keep, smoothing):
        first = scores >= scores.quantile(2 / 3)
        return torch.where(first, 1.0, (keep - first.sum()) / (~first).sum())


# ----------------------------------------------------------------------------------------------------------- settings


def test_settings_are_the_keyword_arguments():
    changes = {"prune_ratio": 0.4, "score": "loss", "policy": "infobatch", "smoothing": 0.5, "seed": 3}
    by_name, by_object = SADP(Net(), N, epochs=16, **changes), SADP(Net(), N, epochs=16, settings=Settings(**changes))
    assert by_name.settings == by_object.settings
    assert by_name.settings == Settings(**changes, weights="sum", warmup_epochs=1, tail_epochs=2)
    assert SADP(Net(), N, epochs=16, settings=Settings(seed=3), prune_ratio=0.4).settings.seed == 3
    with pytest.raises(TypeError, match="prune_ration"):
        SADP(Net(), N, epochs=16, prune_ration=0.4)
    with pytest.raises(FrozenInstanceError):
        by_name.settings.seed = 4
    with pytest.raises(AttributeError):
        _ = by_name.sead


def test_every_setting_has_a_sentence_of_help_and_its_choices():
    for setting in fields(Settings):
        assert setting.metadata["help"] and "%" not in setting.metadata["help"]  # argparse formats it
        for choice in setting.metadata.get("choices", ()):
            assert getattr(replace(Settings(), **{setting.name: choice}), setting.name) == choice
    assert {setting.name for setting in fields(Settings) if "choices" in setting.metadata} == {
        *("score", "policy", "weights", "schedule")
    }


def test_numpys_numbers_become_pythons():
    settings = Settings(prune_ratio=np.float32(0.5), seed=np.int64(3), tail_epochs=np.int64(1), smoothing=0)
    assert [type(getattr(settings, name)) for name in ("prune_ratio", "seed", "tail_epochs", "smoothing")] == [
        *(float, int, int, float)
    ]
    assert settings.plain() == {**Settings().plain(), "seed": 3, "tail_epochs": 1, "smoothing": 0.0}


@pytest.mark.parametrize("kind, registry", [("score", SCORES), ("policy", POLICIES)])
def test_what_is_neither_a_name_nor_an_object(kind, registry):
    assert all(thing.name == name and registry.find(thing) is thing for name, thing in registry.items())
    for wrong in (3, object(), registry.base, registry.base()):  # the last one has no name
        with pytest.raises(TypeError, match=f"{kind} must be a name or a {registry.base.__name__} with a `name`"):
            Settings(**{kind: wrong})


# --------------------------------------------------------------------------------------------------------- one's own


def test_a_score_of_ones_own(data):
    model = Net()
    sadp = SADP(model, N, epochs=4, score=Doubt())
    expected = 1 - model(data.tensors[0]).softmax(1).amax(1)
    sadp_fast.reset(model)
    train(sadp, model, sadp.loader(DataLoader(data, batch_size=16)), 1, lr=0.0)
    torch.testing.assert_close(sadp.scores, expected.detach())
    train(sadp, model, sadp.loader(DataLoader(data, batch_size=16)), 3)
    assert sadp.epoch == 4 and sadp.probabilities.unique().numel() > N / 2


@pytest.mark.parametrize("weights", ["none", "unbiased"])
def test_a_score_of_the_losses_is_the_loss(data, weights):
    runs = []
    for score in ("loss", OfLosses()):
        model = Net()
        sadp = SADP(model, N, epochs=4, score=score, weights=weights)
        runs.append((train(sadp, model, sadp.loader(DataLoader(data, batch_size=16)), 4), sadp.scores))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])


def test_a_score_of_the_energies(data, device):
    """Squared, the loss's factor 1/B and the scaler's go out once, so the other one stays."""
    x, y = (t.to(device) for t in data.tensors)
    scores = []
    for score in ("all", SquaredBound()):
        model = Net().to(device)
        sadp = SADP(model, N, epochs=8, score=score, prune_ratio=0.2, warmup_epochs=4)
        for _ in range(2):
            for row in sadp.batches(N):
                sadp.loss(criterion, model(x[row]), y[row]).backward()
                sadp_fast.reset(model)
        scores.append(sadp.scores)
    torch.testing.assert_close(scores[1], scores[0] ** 2 / N, rtol=1e-4, atol=1e-9)


def test_a_score_must_be_one_for_each_example(data):
    class Wrong(Doubt):
        def of_batch(self, output, target, losses):
            return output

    sadp = SADP(Net(), N, epochs=4, score=Wrong())
    rows = sadp.batches(16)
    row = next(rows)
    with pytest.raises(ValueError, match=r"scores must have shape \[16\], one per example, got \[16, 4\]"):
        sadp.loss(criterion, torch.zeros(16, CLASSES), data.tensors[1][row])
    rows.close()


def test_a_policy_of_ones_own(data):
    model = Net()
    sadp = SADP(model, N, epochs=8, score="loss", policy=Thirds(), prune_ratio=0.25)
    assert sadp.settings.weights == "sum" and sadp.settings.tail_epochs == 2
    train(sadp, model, sadp.loader(DataLoader(data, batch_size=16)), 2)
    certain = sadp.probabilities == 1
    assert certain.sum() == (N + 2) // 3 and sadp.probabilities.unique().numel() == 2
    scores = torch.rand(N)
    p = inclusion_probabilities(scores, 60.0, policy=Thirds())
    assert p.dtype == torch.float32 and p.sum().item() == pytest.approx(60.0) and (p == 1).sum() == (N + 2) // 3
    assert torch.equal(inclusion_probabilities(scores, float(N), policy=Thirds()), torch.ones(N))

    class Wrong(Thirds):
        def probabilities(self, scores, keep, smoothing):
            return scores[1:]

    with pytest.raises(ValueError, match=r"the policy 'thirds' must give \[103\] probabilities.*got \[102\]"):
        inclusion_probabilities(scores, 60.0, policy=Wrong())


def test_ones_own_are_known_by_name_in_a_state_and_once_added(data):
    own = {"score": Doubt(), "policy": Thirds()}
    state = SADP(Net(), N, epochs=8, **own, prune_ratio=0.25).state_dict()
    assert (state["config"]["score"], state["config"]["policy"]) == ("doubt", "thirds")
    SADP(Net(), N, epochs=8, score=Doubt(), policy=Thirds(), prune_ratio=0.25).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with score='doubt', but SADP was built with 'loss'"):
        SADP(Net(), N, epochs=8, score="loss", policy=Thirds(), prune_ratio=0.25).load_state_dict(state)
    with pytest.raises(ValueError, match=r"score must be one of .*, got 'doubt'"):
        Settings(score="doubt")
    SCORES.add(Doubt())
    try:
        assert SADP(Net(), N, epochs=8, score="doubt").score == "doubt"
    finally:
        del SCORES["doubt"]


# ---------------------------------------------------------------------------------------------------- public ways in


def test_a_batch_is_a_handle(data):
    model = Net()
    sadp = SADP(model, N, epochs=4, weights="unbiased", warmup_epochs=1, score="loss")
    assert sadp.batch is None
    for epoch in range(2):
        for batch in sadp.train(sadp.open_epoch(16)):
            assert sadp.batch is batch and batch.size == 16 and batch.scored == sadp.wants_scores
            assert batch.kind == (epoch > 0, True, 16) and (batch.weights is None) == (epoch == 0)
            batch.loss(criterion, model(data.tensors[0][batch.indices]), data.tensors[1][batch.indices]).backward()
            sadp_fast.reset(model)
    assert sadp.batch is None and sadp.epoch == 2 and sadp.scores.isfinite().sum() >= N - 16


def test_an_epoch_says_what_was_drawn(data):
    sadp = SADP(Net(), N, epochs=4, score="random")
    sadp.skip_to(2)
    epoch = sadp.open_epoch(16)
    again = sadp.open_epoch(16)  # drawing changes nothing
    assert torch.equal(epoch.indices, again.indices) and epoch.indices.shape == (len(epoch), 16)
    rows = [batch.indices for batch in sadp.train(epoch)]
    assert torch.equal(torch.stack(rows), epoch.indices) and sadp.epoch == 3
    left_over = set(epoch.left_over.indices.tolist())
    assert left_over <= set(sadp.open_epoch(16).indices[0].tolist())


def test_skipping_to_an_epoch():
    sadp = SADP(Net(), N, epochs=4, score="random")
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"epoch must be from 0 to 3, got {wrong}"):
            sadp.skip_to(wrong)
    rows = sadp.batches(16)
    next(rows)
    with pytest.raises(RuntimeError, match="still running"):
        sadp.skip_to(2)
    assert sadp.epoch == 0
    rows.close()
    sadp.skip_to(3)
    list(sadp.batches(16))
    assert sadp.epoch == 4 and sadp.progress == 1


def test_weights_of_one_are_multiplied_where_all_are(data):
    sadp = SADP(Net(), N, epochs=4, score="random")
    sadp.weigh_all()
    assert all(batch.weights.tolist() == [1.0] * 16 for batch in sadp.train(sadp.open_epoch(16)))
    passive = SADP(Net(), N, epochs=4, prune_ratio=0.0)
    passive.weigh_all()
    assert all(batch.weights is None for batch in passive.train(passive.open_epoch(16)))


def test_a_loader_takes_any_source_of_epochs(data):
    """All that it asks of one is in ``EpochSource``."""

    class Source:
        def __init__(self, sadp):
            self.num_examples, self.passive = sadp.num_examples, sadp.passive
            self.open_epoch, self.train, self.follow = sadp.open_epoch, sadp.train, sadp.follow
            self.expected_batches = sadp.expected_batches

    sadp = SADP(nn.Linear(FEATURES, CLASSES), N, epochs=4, score="random")
    loader = PrunedLoader(Source(sadp), DataLoader(data, batch_size=16))
    for _ in range(4):
        assert len(list(loader)) == len(loader.rows)
    assert sadp.epoch == 4


def test_a_loader_keeps_every_option_that_does_not_choose_batches(data, monkeypatch):
    ordinary = DataLoader(data, batch_size=16, num_workers=2, timeout=30, prefetch_factor=3, in_order=False)
    sadp = SADP(Net(), N, epochs=4, score="random")
    built, options = DataLoader.__init__, {}
    monkeypatch.setattr(DataLoader, "__init__", lambda self, *a, **o: options.update(o) or built(self, *a, **o))
    sadp.loader(ordinary)
    for name in ("num_workers", "timeout", "prefetch_factor", "in_order", "collate_fn", "pin_memory"):
        assert options[name] == getattr(ordinary, name)


def test_copies_train_alike(data):
    """The scores stay in one piece of memory, where a copy and a pickle are concerned too."""
    model = Net()
    sadp = SADP(model, N, epochs=4, score="loss")
    train(sadp, model, sadp.loader(DataLoader(data, batch_size=16)), 1)
    for other in (copy.deepcopy(sadp), pickle.loads(pickle.dumps(sadp))):
        list(train_rows(other, other.model, data))
        assert not torch.equal(other.scores, sadp.scores) and other.scores.isfinite().sum() >= N - 16


def train_rows(sadp, model, data):
    for row in sadp.batches(16):
        sadp.loss(criterion, 3 * model(data.tensors[0][row]), data.tensors[1][row]).backward()
        sadp_fast.reset(model)
        yield row


def test_an_epoch_of_the_loaders_own_does_not_overtake_a_drawn_one(data):
    sadp = SADP(Net(), N, epochs=4, prune_ratio=0.0)
    rows, loader = sadp.batches(16), sadp.loader(DataLoader(data, batch_size=16))
    next(rows)
    with pytest.raises(RuntimeError, match="still running"):
        next(iter(loader))


def test_a_policy_of_ones_own_may_change_the_scores_that_it_gets():
    class Filling(Policy):
        name = "filling"

        def probabilities(self, scores, keep, smoothing):
            scores.nan_to_num_(0.0)
            return torch.full_like(scores, keep / len(scores))

    scores = torch.tensor([1.0, torch.nan, 2.0, 3.0])
    inclusion_probabilities(scores, 2, policy=Filling())
    assert scores.isnan().tolist() == [False, True, False, False]


def test_a_policy_must_give_a_tensor():
    class Listing(Policy):
        name = "listing"

        def probabilities(self, scores, keep, smoothing):
            return [0.5] * len(scores)

    with pytest.raises(TypeError, match="the policy 'listing' must give a tensor of probabilities, got list: let its"):
        inclusion_probabilities(torch.ones(4), 2, policy=Listing())


@pytest.mark.parametrize("attribute, value", [("source", "bogus"), ("layers", "first")])
def test_a_score_with_an_unknown_source_is_refused_where_it_is_written(attribute, value):
    with pytest.raises(ValueError, match=f"{attribute} must be one of .*, got '{value}'"):
        type("Wrong", (Score,), {"name": "wrong", attribute: value})


def test_ones_own_must_not_have_the_name_of_another():
    loss = type("MyLoss", (Score,), {"name": "loss"})()
    with pytest.raises(ValueError, match="score has the name of another one, 'loss': give it a name of its own"):
        Settings(score=loss)


@pytest.mark.parametrize("changed", [{"epoch": 99}, {"epoch": -1}, {"scores": torch.zeros(3)}])
def test_a_state_of_another_training_changes_nothing(changed):
    sadp = SADP(Net(), N, epochs=3, score="loss")
    for _ in sadp.batches(16):
        pass
    state = sadp.state_dict()
    with pytest.raises(ValueError, match=rf"this state has \d+ scores and -?\d+ epochs, but SADP was built for {N}"):
        sadp.load_state_dict({**state, **changed})
    with pytest.raises(ValueError, match=r"state must be what SADP\.state_dict\(\) returned, got a dict with"):
        sadp.load_state_dict({name: value for name, value in state.items() if name != "examples_trained"})
    config = state.pop("config")
    assert sadp.state_dict().pop("config") == config
    for name in state:
        value = sadp.state_dict()[name]
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)
