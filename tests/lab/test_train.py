"""Training: what it computes, what an interruption leaves, and that a resumed run is the uninterrupted one."""

import json
import math
import warnings
from dataclasses import asdict, replace

import pytest
import torch

from sadp_fast.lab import train
from sadp_fast.lab.augmentation import crop_flip_normalise
from sadp_fast.lab.data import Dataset
from sadp_fast.lab.methods import METHODS
from sadp_fast.lab.setting_fields import SettingError
from sadp_fast.lab.settings import SETTINGS, TrainConfig, folder_name, read_variant, write_variant
from sadp_fast.lab.sources import sources
from sadp_fast.lab.train import Trainer, TrainError
from sadp_fast.memory import packed_spikes as spike_storage

CONFIG = TrainConfig(model="mlp", epochs=4, batch_size=16, time_steps=2)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small gain nothing from threads, and lose a lot on a machine that others use as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def colour_data(count: int = 90, seed: int = 0) -> Dataset:
    """Small colour images of three classes that a network can tell apart; they are augmented in training."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, 8, 8), generator=generator)
    images[torch.arange(count), labels] += 100
    images = images.to(torch.uint8)
    return Dataset(
        name="colours",
        train_images=images[:70],
        train_labels=labels[:70],
        test_images=images[70:],
        test_labels=labels[70:],
        num_classes=3,
        mean=torch.full((3,), 90.0),
        std=torch.full((3,), 50.0),
        augmented=True,
    )


class StopAfter(train.Progress):
    """Ctrl-C in the middle of the epoch that follows `epochs` whole ones."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def step(self, epoch: int, share: float, step: int, loss: float | None, kept: float) -> None:
        if epoch > self.epochs:
            raise KeyboardInterrupt


def without_seconds(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


def checkpoint(folder) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(a, b, where="") -> None:
    """Bit-identical nested containers of tensors and numbers."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key != "seconds":
                assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{index}")
    else:
        assert a == b or (a != a and b != b), where


def test_a_run_learns_and_tells_what_it_did(tmp_path):
    data = colour_data()
    entries = []

    class Viewer(train.Progress):
        def epoch(self, entry):
            entries.append(entry)

    config = replace(CONFIG, epochs=12, prune_ratio=0.4, lr=5e-3)
    result = train.run(config, data, tmp_path / "run", [Viewer()])
    assert result.config == config and entries == result.history and len(entries) == 12
    assert [entry["epoch"] for entry in entries] == list(range(1, 13))
    assert entries[-1]["test_accuracy"] > 0.8 > 0.5 > entries[-1]["loss"]
    assert entries[0]["test_loss"] > entries[-1]["test_loss"] > 0
    assert sum(entry["ratio"] for entry in entries) / 12 == pytest.approx(0.4)
    for entry in entries:
        assert entry["seconds"] > 0 and (entry["relative_variance"] is None) == (entry["ratio"] == 0)
    # 12 x 70 x 0.6 = 504 expected; the draws' standard deviation is below sqrt(9 x 70 / 4) = 12.6: 6 of them.
    assert abs(entries[-1]["examples_trained"] - 504) < 76
    assert json.loads(json.dumps(entries)) == entries


def test_full_data_trains_every_example_once_an_epoch(tmp_path):
    result = train.run(CONFIG.of("full"), colour_data(), tmp_path)
    assert result.history[-1]["examples_trained"] == 4 * 70
    assert all(entry["ratio"] == 0 for entry in result.history)


def test_methods_differ_only_in_what_they_prune():
    changed = {
        method: {key for key, value in asdict(CONFIG.of(method)).items() if value != asdict(CONFIG)[key]}
        for method in METHODS
    }
    assert changed["sadp"] == set() and changed["full"] == {"method", "prune_ratio"}
    for method in ("random", "loss", "el2n", "grad_norm"):
        assert changed[method] == {"method", "score"}
    assert changed["static_random"] == {"method", "score", "warmup_epochs", "tail_epochs"}
    paper = {"method", "score", "policy", "smoothing", "weights"}
    assert changed["infobatch"] == paper and changed["epsilon_greedy"] == paper | {"score_momentum"}


VARIANTS = {
    "full": {},
    "full:epochs=9": {"epochs": 9},
    "sadp:tail-epochs=0:weights=none:smoothing=.1": {"smoothing": 0.1, "weights": "none", "tail_epochs": 0},
    "loss:policy=floor:lr=1e-3:low_memory=true": {"lr": 0.001, "low_memory": True, "policy": "floor"},
    "infobatch:tail_epochs=0:low_memory=false:amp=bf16": {"amp": "bf16", "low_memory": False, "tail_epochs": 0},
    "random:schedule=linear:warmup-epochs=2:label-smoothing=1": {
        **{"label_smoothing": 1.0, "schedule": "linear", "warmup_epochs": 2}
    },
    "full:cutout=16:weight-decay=0.001": {"weight_decay": 0.001, "cutout": 16},
    "loss:mixup=.5": {"mixup": 0.5},
    "sadp:score=last:score_momentum=0.5:batch_size=8": {"batch_size": 8, "score": "last", "score_momentum": 0.5},
}


@pytest.mark.parametrize("text", VARIANTS)
def test_variants_of_methods_are_read(text):
    method, changes = read_variant(text)
    assert method == text.split(":")[0] and list(changes.items()) == list(VARIANTS[text].items())
    assert all(type(value) is type(VARIANTS[text][key]) for key, value in changes.items())
    assert read_variant(write_variant(method, changes)) == (method, changes)
    plain, own = asdict(CONFIG.of(method)), asdict(CONFIG.of(text))
    assert own == {**plain, **VARIANTS[text]}


def test_a_variants_folder_has_a_name_that_every_file_system_takes():
    variant = "sadp:epochs=4:lr=0.0012"
    assert folder_name(variant) == "sadp-epochs=4-lr=0.0012"
    variant += ":weight_decay=0."
    longest = variant + "1" * (100 - len(variant))
    assert folder_name(longest) == longest.replace(":", "-")
    names = {folder_name(longest + digits) for digits in ("1", "2", "1" * 300, "1" * 301)}
    assert len(names) == 4 and {len(name) for name in names} == {100}
    assert all(name.startswith(longest[:89].replace(":", "-") + "-") for name in names)


def test_equal_variants_are_written_alike():
    texts = "sadp:lr=0.10:weights=none", "sadp:weights=none:lr=1e-1"
    assert {write_variant(*read_variant(text)) for text in texts} == {"sadp:lr=0.1:weights=none"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "'best' is not one of full,"),
        ("", "'' is not one of full,"),
        ("sadp:speed=3", "'speed' in 'sadp:speed=3' is not one of epochs,"),
        ("sadp:seed=3", "'seed' in 'sadp:seed=3' is not one of epochs,"),
        ("sadp:epochs", "'epochs' in 'sadp:epochs' is not SETTING=VALUE"),
        ("sadp:", "'' in 'sadp:' is not SETTING=VALUE"),
        ("sadp:epochs=0", "'0' is not a whole number of at least 1, which epochs in 'sadp:epochs=0' has to be"),
        ("sadp:epochs=", "'' is not a whole number"),
        ("sadp:lr=nan", "'nan' is not a number above 0, at most 1000, which lr"),
        ("sadp:lr=1e39", "'1e39' is not a number above 0, at most 1000, which lr"),
        ("full:weight-decay=-1", "'-1' is not a number of at least 0, which weight_decay"),
        ("full:weight-decay=inf", "'inf' is not a number of at least 0, which weight_decay"),
        ("full:mixup=-0.1", "'-0.1' is not 0, or from 0.01 to 100, which mixup"),
        ("full:mixup=0.001", "'0.001' is not 0, or from 0.01 to 100, which mixup"),
        ("full:mixup=101", "'101' is not 0, or from 0.01 to 100, which mixup"),
        ("full:cutout=-1", "'-1' is not a whole number of at least 0, which cutout"),
        ("sadp:smoothing=2", "'2' is not between 0 and 1, which smoothing"),
        ("sadp:weights=all", "'all' is not one of unbiased,sum,none, which weights"),
        ("sadp:low_memory=1", "'1' is not one of true,false, which low_memory"),
        ("sadp:lr=1:lr=2", "sets lr twice"),
        ("full:weights=none", "sets weights, which full does not have or which makes it full"),
        ("random:smoothing=0.5", "sets smoothing, which random does not have"),
        ("loss:score=all", "sets score, which loss does not have or which makes it loss"),
        ("infobatch:policy=mix", "sets policy, which infobatch"),
    ],
)
def test_bad_variants_are_one_clear_error(text, message):
    with pytest.raises(SettingError) as error:
        CONFIG.of(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_setting_of_a_run_can_be_a_variants_or_is_shared():
    shared = {"dataset", "image_size", "split_by", "model", "time_steps", "method", "prune_ratio", "seed", "device"}
    assert {*SETTINGS, *shared} == asdict(CONFIG).keys() and not shared & SETTINGS.keys()


def test_an_infinite_variance_is_null(tmp_path):
    """Where half of the examples is a whole number, epsilon-greedy without smoothing never draws the others again."""
    config = CONFIG.of("epsilon_greedy:smoothing=0:warmup-epochs=0:tail-epochs=0")
    history = train.run(config, colour_data(), tmp_path).history
    json.dumps(history, allow_nan=False)
    assert {entry["ratio"] for entry in history} == {0.5} and history[-1]["relative_variance"] is None
    assert history[0]["relative_variance"] > 0  # before anything was scored, all alike
    smoothed = train.run(CONFIG.of("epsilon_greedy"), colour_data(), tmp_path / "smoothed").history
    assert any(entry["relative_variance"] for entry in smoothed)


def test_one_evaluation_an_epoch(tmp_path, monkeypatch):
    calls, evaluate = [], Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda self: calls.append(self.sadp.epoch) or evaluate(self))
    train.run(CONFIG, colour_data(), tmp_path)
    assert calls == [1, 2, 3, 4]


def test_learning_rate_follows_the_share_of_training_done(tmp_path):
    assert train.learning_rate(2.0, 0.0) == 0 and train.learning_rate(2.0, train.RISE) == 2.0
    assert train.learning_rate(2.0, train.RISE / 2) == pytest.approx(1.0)
    assert train.learning_rate(2.0, 1.0) == pytest.approx(0.0)
    full = train.run(CONFIG.of("full"), colour_data(), tmp_path / "full").history
    pruned = train.run(CONFIG, colour_data(), tmp_path / "sadp").history
    assert sum(entry["steps"] for entry in pruned) < sum(entry["steps"] for entry in full)
    for a, b in zip(full, pruned, strict=True):
        # The last step of an epoch lies at most one and a half steps, of 2 or more an epoch, before its end.
        assert abs(a["lr"] - b["lr"]) < CONFIG.lr * math.pi / 2 * 0.75 / CONFIG.epochs


def test_two_runs_are_bit_identical(tmp_path):
    for name in ("a", "b"):
        torch.rand(3)  # the state of the global generator makes no difference
        train.run(CONFIG, colour_data(), tmp_path / name)
    assert_same(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))
    train.run(replace(CONFIG, seed=1), colour_data(), tmp_path / "c")
    weight = "stem.1.weight"
    assert not torch.equal(checkpoint(tmp_path / "a")["model"][weight], checkpoint(tmp_path / "c")["model"][weight])


@pytest.mark.parametrize("epochs_done", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["sadp", "full:weight-decay=0.1:cutout=3"])
def test_resumed_run_is_bit_identical(tmp_path, method, epochs_done):
    data, config = colour_data(), CONFIG.of(method)
    whole = train.run(config, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train.run(config, data, tmp_path / "cut", [StopAfter(epochs_done)])
    assert len(checkpoint(tmp_path / "cut")["history"]) == epochs_done
    resumed = train.run(config, data, tmp_path / "cut", resume=True)
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut"))
    assert [file.name for file in (tmp_path / "cut").iterdir()] == ["checkpoint.pt"]


def test_resuming_a_finished_run_returns_it(tmp_path):
    first = train.run(CONFIG, colour_data(), tmp_path)
    written = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    assert train.run(CONFIG, colour_data(), tmp_path, resume=True) == first
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == written


def test_resuming_another_configuration_names_the_field(tmp_path):
    train.run(CONFIG, colour_data(), tmp_path)
    with pytest.raises(TrainError, match=r"lr is 0\.1, but the run in .* has 0\.002"):
        train.run(replace(CONFIG, lr=0.1), colour_data(), tmp_path, resume=True)


def test_a_run_goes_on_on_another_device_of_its_kind(tmp_path):
    whole = train.run(CONFIG, colour_data(), tmp_path / "whole").history
    with pytest.raises(KeyboardInterrupt):
        train.run(CONFIG, colour_data(), tmp_path / "cut", [StopAfter(2)])
    resumed = train.run(replace(CONFIG, device="cpu:0"), colour_data(), tmp_path / "cut", resume=True).history
    assert without_seconds(resumed) == without_seconds(whole)
    state = checkpoint(tmp_path / "cut")
    state["config"]["device"] = "cuda:1"
    torch.save(state, tmp_path / "cut" / "checkpoint.pt")
    with pytest.raises(TrainError, match=r"device is 'cpu', but the run in .* has 'cuda': resume with that value"):
        train.run(CONFIG, colour_data(), tmp_path / "cut", resume=True)


def test_going_on_with_other_sources_is_said(tmp_path):
    """Each time: a run of two versions stays one."""
    with pytest.raises(KeyboardInterrupt):
        train.run(CONFIG, colour_data(), tmp_path, [StopAfter(1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyboardInterrupt):
            train.run(CONFIG, colour_data(), tmp_path, [StopAfter(2)], resume=True)
    state = checkpoint(tmp_path)
    state["sources"] = ["0123abcd"]
    torch.save(state, tmp_path / "checkpoint.pt")
    said = r"begun with other sources of sadp_fast \(0123abcd, now [0-9a-f]{8}\)"
    with pytest.warns(UserWarning, match=said), pytest.raises(KeyboardInterrupt):
        train.run(CONFIG, colour_data(), tmp_path, [StopAfter(3)], resume=True)
    with pytest.warns(UserWarning, match=said):
        result = train.run(CONFIG, colour_data(), tmp_path, resume=True)
    assert result.sources == checkpoint(tmp_path)["sources"] == ["0123abcd", sources()]


def test_sources_that_train_nothing_are_not_a_runs(tmp_path):
    assert train.run(CONFIG, colour_data(), tmp_path).sources == [sources()]
    torch.save({**checkpoint(tmp_path), "sources": ["0123abcd"]}, tmp_path / "checkpoint.pt")
    with pytest.warns(UserWarning, match="begun with other sources"):
        assert train.run(CONFIG, colour_data(), tmp_path, resume=True).sources == ["0123abcd"]


def test_resuming_on_other_data_names_both(tmp_path):
    data = colour_data()
    train.run(CONFIG, data, tmp_path)
    assert checkpoint(tmp_path)["data_set"] == data.identity
    swapped = replace(data, train_labels=data.train_labels.flip(0))
    for other in (swapped, replace(data, train_images=data.train_images[:64], train_labels=data.train_labels[:64])):
        with pytest.raises(
            TrainError, match=r"train examples \d+, labels [0-9a-f]{10}, but the run in .* began with "
        ) as error:
            train.run(CONFIG, other, tmp_path, resume=True)
        assert all(identity["labels"] in str(error.value) for identity in (data.identity, other.identity))
    train.run(CONFIG, replace(data, name="moved"), tmp_path, resume=True)


def test_a_data_set_is_told_apart_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Dataset, "identity", property(lambda self: asked.append(self) or {"name": self.name}))
    train.run(CONFIG, colour_data(), tmp_path)
    assert len(asked) == 1


def test_damaged_checkpoint_is_one_clear_error(tmp_path):
    train.run(CONFIG, colour_data(), tmp_path)
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(TrainError, match="is damaged"):
        train.run(CONFIG, colour_data(), tmp_path, resume=True)


def test_interrupted_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    trainer = Trainer(CONFIG, colour_data())
    trainer.save(tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def fail(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.save(tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_diverged_training_stops_with_a_clear_error(tmp_path):
    with pytest.raises(TrainError, match=r"the loss became (nan|inf) in epoch 1: lower --lr"):
        train.run(replace(CONFIG, model="conv", lr=1e36), colour_data(), tmp_path)
    assert checkpoint(tmp_path)["history"] == []


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_scores_and_learns(tmp_path, amp):
    config = replace(CONFIG, model="conv", amp=amp, label_smoothing=0.1, epochs=3, prune_ratio=0.3)
    result = train.run(config, colour_data(), tmp_path)
    assert all(math.isfinite(entry["loss"]) for entry in result.history)
    scores = checkpoint(tmp_path)["sadp"]
    assert any(isinstance(value, torch.Tensor) and value.nan_to_num().max() > 0 for value in scores.values())


@pytest.mark.parametrize("method", ["sadp", "full"])
def test_low_memory_trains_alike_with_spikes_as_bits(tmp_path, monkeypatch, method):
    packed = []
    pack = spike_storage._pack_bits
    monkeypatch.setattr(spike_storage, "_pack_bits", lambda *args: packed.append(args) or pack(*args))
    config = replace(CONFIG.of(method), model="sew_resnet18", epochs=3, prune_ratio=0.4 if method == "sadp" else 0.0)
    histories = []
    numbers = []
    for low_memory in (False, True):
        packed.clear()
        history = train.run(replace(config, low_memory=low_memory), colour_data(), tmp_path / str(low_memory)).history
        histories.append(without_seconds(history))
        numbers.append(len(packed))
    assert histories[0] == histories[1]
    assert_same(checkpoint(tmp_path / "False")["model"], checkpoint(tmp_path / "True")["model"])
    # Always those of the first block; with low memory all inputs of convolutions that are outputs of neurons: all but
    # the image's, blocks of two sharing one with the shortcut's.
    steps = sum(entry["steps"] for entry in histories[1])
    assert numbers == [2 * steps, 16 * steps]


@pytest.mark.parametrize(("method", "rows", "side"), [("full", 3, 0), ("full:cutout=5", 5, 5)])
def test_training_images_are_augmented_and_test_images_are_not(monkeypatch, method, rows, side):
    seen, sides = [], []

    def record(*args, **options):
        seen.append(args)
        sides.append(options["cutout"])
        return crop_flip_normalise(*args, **options)

    monkeypatch.setattr(train, "crop_flip_normalise", record)
    trainer = Trainer(CONFIG.of(method), colour_data())
    trainer.throw_away_steps()
    assert len(seen) == 2 and all(args[0] is trainer.data.train_images and args[2].shape == (rows, 16) for args in seen)
    assert not torch.equal(seen[0][2], seen[1][2])
    trainer.evaluate()
    assert seen[2][1] is None and seen[2][2] is None and torch.equal(seen[2][0], trainer.data.test_images)
    assert sides == [side, side, 0]


@pytest.mark.parametrize("augment", ["auto", "crop-flip", "crop", "none"])
@pytest.mark.parametrize("augmented", [True, False])
def test_how_images_are_augmented(monkeypatch, augment, augmented):
    draws = []

    def record(images, index, drawn, *args, **options):
        if index is not None:  # training
            draws.append(drawn)
        return crop_flip_normalise(images, index, drawn, *args, **options)

    monkeypatch.setattr(train, "crop_flip_normalise", record)
    data = replace(colour_data(), augmented=augmented)
    trainer = Trainer(replace(CONFIG, augment=augment), data)
    trainer.throw_away_steps()
    crops = augment in ("crop-flip", "crop") or (augment == "auto" and augmented)
    assert draws and all((drawn is not None) == crops for drawn in draws)
    if crops:
        flipped = torch.stack(draws)[:, 2] >= 0.5
        assert 0 < flipped.sum() < flipped.numel() if augment != "crop" else not flipped.any()
        shifted = torch.stack(draws)[:, :2]
        assert shifted.min() < 0.2 and shifted.max() > 0.8
        train.prepare(replace(CONFIG, augment=augment, cutout=3), data)
    train.prepare(replace(CONFIG, cutout=3).of("full:augment=none"), data)  # nothing is left to be hidden


@pytest.mark.parametrize(
    ("model", "optimizer", "default"),
    [("sew_resnet18", torch.optim.SGD, 5e-4), ("mlp", torch.optim.AdamW, 1e-2)],
)
def test_weight_decay_is_the_optimizers(model, optimizer, default):
    for given, expected in ((None, default), (0.0, 0.0), (0.125, 0.125)):
        trainer = Trainer(replace(CONFIG, model=model, weight_decay=given), colour_data())
        assert type(trainer.optimizer) is optimizer
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [expected]


@pytest.mark.parametrize(
    ("variant", "epochs"),
    [("full", [0]), ("random", [0, 1]), ("sadp", [0, 1, 4]), ("sadp:tail-epochs=1", [0, 1, 3, 4])],
)
def test_throw_away_steps_are_of_all_kinds_of_epochs(monkeypatch, variant, epochs):
    """Of full and of pruned ones, with scores and without: what training runs has run before."""
    trainer, kept, kinds = Trainer(replace(CONFIG, epochs=5).of(variant), colour_data()), [], []
    sadp, step = trainer.sadp, trainer.run_step

    def record(index):
        kinds.append((sadp.ratios[sadp.epoch] > 0, sadp.wants_scores))
        return step(index)

    original = sadp.batches
    monkeypatch.setattr(sadp, "batches", lambda size: kept.append(sadp.epoch) or original(size))
    trainer.run_step = record
    trainer.throw_away_steps()
    assert kept == epochs and sadp.batch is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())
    sadp.skip_to(0)
    known = set(kinds)
    kinds.clear()
    for _ in range(5):
        train.train_epoch(trainer, ())
    assert set(kinds) == known


def test_prepare_checks_the_batch_size_and_leaves_nothing():
    state = torch.get_rng_state()
    train.prepare(CONFIG, colour_data())
    with pytest.raises(ValueError, match="the batch size 71 is above the number of training examples, 70"):
        train.prepare(replace(CONFIG, batch_size=71), colour_data())
    with pytest.raises(ValueError, match="2 epochs"):
        train.prepare(replace(CONFIG, epochs=2, prune_ratio=0.9), colour_data())
    torch.set_rng_state(state)


def test_cutout_is_for_data_that_are_augmented():
    config, grey = replace(CONFIG, cutout=3), replace(colour_data(), augmented=False)
    Trainer(config, colour_data())
    Trainer(CONFIG, grey)
    message = r"cutout is 3, but examples of colours are not augmented \(by default .* are\): set cutout to 0, or"
    for start in (Trainer, train.prepare):
        with pytest.raises(ValueError, match=message):
            start(config, grey)


@pytest.mark.parametrize("size", [1, 7, 10, 20, 500])
def test_evaluation_counts_every_test_example_once(monkeypatch, size):
    monkeypatch.setattr(train, "EVALUATION_BATCH", size)
    trainer = Trainer(replace(CONFIG, label_smoothing=0.2), colour_data())
    trainer.model.train()
    scores = trainer.sadp.scores.clone()
    accuracy, loss = trainer.evaluate()
    with torch.no_grad():
        trainer.model.eval()
        output = trainer.forward(trainer.data.test_images)
    expected = (output.argmax(1) == trainer.data.test_labels).double().mean()
    assert accuracy == pytest.approx(expected.item())
    own = -output.double().log_softmax(1)[torch.arange(20), trainer.data.test_labels]
    assert loss == pytest.approx(own.mean().item(), rel=1e-5) and own.std() > 0.01
    assert torch.equal(trainer.sadp.scores.nan_to_num(), scores.nan_to_num())


def test_running_mean():
    mean = train.RunningMean(torch.device("cpu"))
    assert mean.read() == 0
    for value in (1.0, 2.0, 6.0):
        mean.add(torch.tensor(value))
    assert mean.read() == 3.0 and mean.peek() is None and mean.peek() == 3.0
    mean.add(torch.tensor(0.75), 0.25)  # a quarter of a batch, of examples whose mean is 3, and padding
    assert mean.read() == 3.0 and mean.steps == 4 and mean.peek() == 3.0 and mean.peek() == 3.0


@pytest.mark.parametrize(("batch_size", "steps"), [(16, 5), (70, 1), (64, 2), (35, 2)])
def test_an_epochs_loss_is_the_mean_over_its_examples(monkeypatch, batch_size, steps):
    """However much of the last batch is padding: here every example's loss is 2."""
    trainer = Trainer(replace(CONFIG.of("full"), epochs=1, batch_size=batch_size), colour_data())
    shown = []

    class Viewer(train.Progress):
        def step(self, epoch, share, step, loss, kept):
            shown.append(loss)

    def two(output, target, reduction="mean"):
        losses = 0 * output.sum(1) + 2
        return losses.mean() if reduction == "mean" else losses

    trainer.criterion = two
    monkeypatch.setattr(train, "REPORT_EVERY", 1)
    loss = train.train_epoch(trainer, [Viewer()])
    assert loss.steps == steps and loss.read() == pytest.approx(2.0)
    assert shown[1:] == pytest.approx([2.0] * (steps - 1)) and loss.peek() == pytest.approx(2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("mixup", [0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_host_inside_an_epoch(method, mixup, amp):
    config = replace(CONFIG, device="cuda", model="conv", amp=amp, mixup=mixup, epochs=6, batch_size=4)
    trainer = Trainer(config.of(method), colour_data())
    loss = train.RunningMean(trainer.device)
    for _ in range(3):
        batches = trainer.sadp.batches(4)
        for _ in range(2):  # the first steps read the model's dataflow and compile
            loss.add(trainer.step(next(batches), 1e-3))
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss.add(trainer.step(next(batches), 1e-3))
            loss.peek()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        batches.close()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("amp", "cutout", "mixup"),
    [("off", 0, 0), ("bf16", 0, 0), ("fp16", 0, 0), ("bf16", 2, 0), ("bf16", 0, 0.5), ("fp16", 0, 0.5)],
)
def test_a_run_on_the_gpu_learns_and_resumes(tmp_path, amp, cutout, mixup):
    config = replace(CONFIG, device="cuda", model="conv", amp=amp, cutout=cutout, mixup=mixup, epochs=12, lr=5e-3)
    with pytest.raises(KeyboardInterrupt):
        train.run(config, colour_data(), tmp_path, [StopAfter(4)])
    history = train.run(config, colour_data(), tmp_path, resume=True).history
    assert len(history) == 12 and history[-1]["test_accuracy"] > 0.8
