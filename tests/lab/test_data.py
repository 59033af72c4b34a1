"""Readers of data sets on small files made here, every way in which a file can be wrong, and augmentation."""

import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sadp_fast.lab import data, options
from sadp_fast.lab.augmentation import crop_flip_normalise
from sadp_fast.lab.data import images as readers
from sadp_fast.lab.data.dataset import from_arrays
from sadp_fast.lab.event_frames import event_frames
from sadp_fast.lab.settings import TrainConfig

PIL_Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


def arrays(shape=(28, 28), train=20, test=10, classes=10):
    return {
        "train_x": RNG.integers(0, 256, (train, *shape), dtype=np.uint8),
        "train_y": np.arange(train, dtype=np.uint8) % classes,
        "test_x": RNG.integers(0, 256, (test, *shape), dtype=np.uint8),
        "test_y": np.arange(test, dtype=np.uint8) % classes,
    }


def test_digits_are_embedded_and_split_evenly():
    pytest.importorskip("sklearn")
    digits = data.load("digits")
    assert digits.shape == (1, 8, 8) and len(digits.train_labels) == 1437 and len(digits.test_labels) == 360
    assert digits.train_images.dtype == torch.uint8 and digits.train_labels.dtype == torch.int64
    assert digits.train_images.max() == 16 and not digits.augmented
    assert digits.test_labels.bincount().min() >= 34 and digits.num_classes == 10
    assert torch.equal(digits.train_images, data.load("digits").train_images)
    normalised = crop_flip_normalise(digits.train_images, None, None, digits.mean, digits.std)
    assert abs(normalised.mean()) < 1e-4 and abs(normalised.std() - 1) < 1e-4


def test_a_data_set_knows_itself_by_its_labels_and_shape():
    def identity(dtype=np.uint8, name="some", classes=10, shape=(28, 28), **changes):
        source = {**arrays(shape), **changes}
        parts = [source["train_x"], source["train_y"].astype(dtype), source["test_x"], source["test_y"]]
        return from_arrays(name, tuple(parts), classes, Path("here")).identity

    own = identity()  # of pixels that are drawn anew for each
    assert own == identity(np.int64) and own.keys() == {"name", "train_examples", "labels"}
    assert own["name"] == "some" and own["train_examples"] == 20 and len(own["labels"]) == 10
    assert identity(name="other")["labels"] == own["labels"]
    labels = arrays()["train_y"]
    others = [
        *(identity(classes=11), identity(shape=(28, 27)), identity(train_y=labels[::-1]), identity(**arrays(test=9))),
        identity(test_y=arrays()["test_y"][::-1]),
    ]
    assert len({other["labels"] for other in [own, *others]}) == 6
    assert data.differ(own, others[0]) and not data.differ({"name": "some"}, others[0])
    assert data.differ({"name": "any"}, own) and not data.differ({}, own)


@pytest.mark.parametrize("as_file", [True, False])
def test_mnist_npz(tmp_path, as_file):
    source = arrays()
    np.savez(tmp_path / "mnist.npz", **source)
    mnist = data.load("mnist", tmp_path / "mnist.npz" if as_file else tmp_path)
    assert mnist.name == "MNIST" and mnist.shape == (1, 28, 28) and mnist.num_classes == 10
    assert torch.equal(mnist.test_images[:, 0], torch.from_numpy(source["test_x"]))
    assert mnist.train_labels.tolist() == source["train_y"].tolist()


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "npz"])
def test_arrays_may_have_a_name_of_their_own(tmp_path, name):
    source, file = arrays((32, 32, 3), train=100, classes=10), tmp_path / f"{name}.npz"
    np.savez(file, **source, name="CIFAR-10 (JPEG q75 copy)")
    for where in (tmp_path, file):
        found = data.load(name, where)
        assert found.name == "CIFAR-10 (JPEG q75 copy)" and found.shape == (3, 32, 32)
        assert found.num_classes == (100 if name == "cifar100" else 10)
        assert np.array_equal(found.train_images.numpy().transpose(0, 2, 3, 1), source["train_x"])
    np.savez(file, **source)
    assert data.load(name, file).name == (name if name == "npz" else data.DATASETS[name].label)


def test_arrays_may_name_the_recipe_that_they_are_trained_with(tmp_path):
    def recipe(**notes):
        np.savez(tmp_path / "some.npz", **arrays(), **notes)
        return options.with_defaults({"dataset": "npz", "lr": 0.5, "device": "cpu"}, str(tmp_path))

    assert recipe() == {"dataset": "npz", **data.DATASETS["npz"].recipe, "lr": 0.5, "device": "cpu", "amp": "off"}
    for name in ("cifar10", "mnist"):
        named = recipe(recipe=name)
        assert named == {"dataset": "npz", **data.DATASETS[name].recipe, "lr": 0.5, "device": "cpu", "amp": "off"}
    with pytest.raises(
        data.DataError, match=r"some\.npz has the recipe 'best': store the name of one of digits, mnist,"
    ):
        recipe(recipe="best")
    for wrong in (3, ["cifar10"], "two\nlines"):
        with pytest.raises(data.DataError, match=r"some\.npz: 'recipe' is .*: store one line of text"):
            recipe(recipe=wrong)


def test_every_data_set_has_a_whole_recipe():
    for source in data.DATASETS.values():
        assert source.recipe.keys() >= {"model", "epochs", "batch_size"}
        TrainConfig(dataset=source.name, **source.recipe)


def write_idx(folder: Path, source: dict, compress: bool) -> None:
    for split, key in (("train", "train"), ("t10k", "test")):
        for kind, name in (("images-idx3", "x"), ("labels-idx1", "y")):
            array = source[f"{key}_{name}"]
            raw = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()
            file = folder / f"{split}-{kind}-ubyte"
            if compress:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(raw))
            else:
                file.write_bytes(raw)


@pytest.mark.parametrize("compress", [True, False])
def test_mnist_idx(tmp_path, compress):
    source = arrays()
    write_idx(tmp_path, source, compress)
    mnist = data.load("mnist", tmp_path)
    assert torch.equal(mnist.train_images[:, 0], torch.from_numpy(source["train_x"]))
    assert mnist.test_labels.tolist() == source["test_y"].tolist()


def write_batches(folder: Path) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    images = RNG.integers(0, 256, (6, 2, 3, 32, 32), dtype=np.uint8)
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        batch = {"data": images[index].reshape(2, -1), "labels": [index, 9]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return images


@pytest.mark.parametrize("inside", [True, False])
def test_cifar10_batches(tmp_path, inside):
    folder = tmp_path / "cifar-10-batches-py"
    images = write_batches(folder)
    cifar = data.load("cifar10", folder if inside else tmp_path)
    assert cifar.name == "CIFAR-10"
    assert np.array_equal(cifar.train_images.numpy(), images[:5].reshape(-1, 3, 32, 32))
    assert cifar.test_labels.tolist() == [5, 9]


def test_a_missing_cifar10_batch_is_named(tmp_path):
    write_batches(tmp_path)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(data.DataError, match=r"lacks data_batch_3: CIFAR-10 data are cifar10\.npz, or"):
        data.load("cifar10", tmp_path)


def test_cifar10_batches_run_no_code(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_batches(folder)

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": Harmful(), "labels": []}))
    with pytest.raises(data.DataError, match="data_batch_3"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("stored", "shape"),
    [((9, 7), (1, 9, 7)), ((9, 7, 3), (3, 9, 7)), ((9, 7, 1), (1, 9, 7)), ((5, 2, 9, 7), (5, 2, 9, 7))],
)
def test_npz_shapes(tmp_path, stored, shape):
    source = arrays(stored, classes=3)
    np.savez(tmp_path / "some.npz", **source)
    some = data.load("npz", tmp_path)
    assert some.name == "some" and some.shape == shape and some.num_classes == 3
    assert some.augmented == (shape[0] == 3 and len(shape) == 3)
    if len(shape) == 4:
        assert some.mean.tolist() == [0, 0]  # an empty pixel of an event frame stays 0
    assert crop_flip_normalise(some.train_images, None, None, some.mean, some.std).shape == some.train_images.shape


def test_image_folder(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for name, colour in (("cat", 200), ("dog", 40)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                PIL_Image.new("RGB", (30 + index, 20), (colour, 0, 0)).save(folder / f"{index}.png")
            (folder / "notes.txt").write_text("not an image")
    images = data.load("imagefolder", tmp_path, image_size=16)
    assert images.shape == (3, 16, 16) and images.num_classes == 2
    assert images.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.test_images[:, 0].amax((1, 2)).tolist() == [200, 40]

    (tmp_path / "train/dog/0.png").write_bytes((tmp_path / "train/dog/0.png").read_bytes()[:40])
    with pytest.raises(data.DataError, match=r"dog/0\.png"):
        data.load("imagefolder", tmp_path)
    (tmp_path / "val/fox").mkdir()
    with pytest.raises(data.DataError, match="fox"):
        data.load("imagefolder", tmp_path)


def write_images(folder: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            PIL_Image.new("L", (20, 20), 100).save(folder / split / name / "0.png")


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("I", "tiff"), ("F", "tiff")])
def test_images_of_more_than_eight_bits_are_refused(tmp_path, monkeypatch, mode, suffix):
    """Pillow would make them white."""
    monkeypatch.setattr(readers, "IMAGE_SUFFIXES", {*readers.IMAGE_SUFFIXES, ".tiff"})
    write_images(tmp_path)
    values = np.full((20, 20), 1000, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    PIL_Image.fromarray(values).save(tmp_path / f"train/dog/1.{suffix}")
    with pytest.raises(data.DataError, match=rf"dog/1\.{suffix} has more than 8 bits a pixel \(mode [IF].*convert it"):
        data.load("imagefolder", tmp_path)


def test_hidden_folders_are_no_classes(tmp_path):
    write_images(tmp_path / "images")
    write_recordings(tmp_path / "events")
    for folder in (tmp_path / "images", tmp_path / "events"):
        for split in ("train", "test"):
            (folder / split / ".ipynb_checkpoints").mkdir()
    for name, folder in (("imagefolder", "images"), ("dvs", "events")):
        found = data.load(name, tmp_path / folder)
        assert found.num_classes == 2 and found.train_labels.unique().tolist() == [0, 1]


def test_a_class_without_training_examples_is_named(tmp_path):
    write_images(tmp_path / "images")
    write_recordings(tmp_path / "events")
    for name, folder, what in (("imagefolder", "images", "images"), ("dvs", "events", "recordings")):
        empty = tmp_path / folder / "train" / "cow"
        empty.mkdir()
        with pytest.raises(data.DataError, match=f"no {what} in {empty}, and .* are the classes: put .*, or remove it"):
            data.load(name, tmp_path / folder)


def spoil(**changes):
    """Arrays of which some are replaced (by a function of the old one) or left out."""

    def make(path: Path) -> None:
        source = arrays()
        for key, change in changes.items():
            source[key] = change(source[key]) if change else None
        np.savez(path, **{key: value for key, value in source.items() if value is not None})

    return make


def truncate(path: Path) -> None:
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:3000])


def flip_bytes(path: Path) -> None:
    np.savez_compressed(path, **arrays())
    raw = bytearray(path.read_bytes())
    raw[300:400] = bytes(100)
    path.write_bytes(raw)


WRONG_FILES = {
    "missing": (lambda path: None, "no file or folder"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "text": (lambda path: path.write_text("hello"), "damaged"),
    "an array alone": (lambda path: np.save(path.open("wb"), np.zeros(3)), "damaged"),
    "pickled objects": (spoil(train_y=lambda y: np.array([None] * len(y))), "damaged"),
    "truncated": (truncate, "damaged"),
    "bytes flipped": (flip_bytes, "damaged"),
    "key missing": (spoil(test_y=None), "no array 'test_y'"),
    "float images": (spoil(train_x=lambda x: x / 255), "float64"),
    "images of two sizes": (spoil(test_x=lambda x: x[:, 1:]), "one common shape"),
    "channels first": (
        spoil(train_x=lambda x: x[:, None], test_x=lambda x: x[:, None]),
        r"\(20, 1, .* look like NCHW, but NHWC is expected: store x.transpose\(0, 2, 3, 1\)",
    ),
    "channels first, not square": (
        spoil(train_x=lambda x: x[:, None, :20], test_x=lambda x: x[:, None, :20]),
        r"\(20, 1, 20, 28\) look like NCHW, but NHWC is expected: store x.transpose\(0, 2, 3, 1\)",
    ),
    "no test images": (spoil(test_x=lambda x: x[:0], test_y=lambda y: y[:0]), "one common shape"),
    "too few labels": (spoil(train_y=lambda y: y[1:]), r"\(19,\) for 20 images"),
    "float labels": (spoil(train_y=lambda y: y / 2), "float64"),
    "label too large": (spoil(test_y=lambda y: y + 1), "hold 10, out of range: classes are 0 to 9"),
    "label negative": (spoil(train_y=lambda y: y.astype(np.int8) - 1), "hold -1, out of range"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
@pytest.mark.parametrize("name", ["mnist", "npz"])
def test_wrong_file_is_one_clear_error(tmp_path, name, case):
    make, message = WRONG_FILES[case]
    path = tmp_path / "mnist.npz"
    make(path)
    with pytest.raises(data.DataError, match=message) as caught:
        data.load(name, path)
    assert "\n" not in str(caught.value) and "mnist.npz" in str(caught.value)


def test_label_beyond_every_count_is_an_error(tmp_path):
    spoil(train_y=lambda y: y.astype(np.int64) * 1_000_000)(tmp_path / "a.npz")
    with pytest.raises(data.DataError, match="9000000"):
        data.load("npz", tmp_path)


@pytest.mark.parametrize("damage", ["cut", "magic", "size", "missing"])
def test_wrong_idx_is_one_clear_error(tmp_path, damage):
    write_idx(tmp_path, arrays(), compress=False)
    file = tmp_path / "t10k-images-idx3-ubyte"
    raw = bytearray(file.read_bytes())
    message = "t10k-images-idx3-ubyte is damaged"
    if damage == "missing":
        file.unlink()
        message = "lacks t10k-images-idx3-ubyte: MNIST data are mnist.npz, or train-images"
    else:
        raw[3 if damage == "magic" else 7] += 1
        file.write_bytes(raw[:9] if damage == "cut" else raw)
    with pytest.raises(data.DataError, match=message):
        data.load("mnist", tmp_path)


def test_data_folder_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("SADP_DATA", raising=False)
    with pytest.raises(data.DataError, match="--data-dir or set SADP_DATA"):
        data.load("mnist")
    with pytest.raises(data.DataError, match="no CIFAR-10 data"):
        data.load("cifar10", tmp_path)
    with pytest.raises(data.DataError, match=r"0 \.npz files"):
        data.load("npz", tmp_path)
    with pytest.raises(data.DataError, match="unknown data set"):
        data.load("imagenet", tmp_path)


@pytest.mark.parametrize(
    ("name", "what", "names"),
    [
        ("mnist", "MNIST", ("mnist.npz", "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "gzipped", "MNIST/raw")),
        ("cifar10", "CIFAR-10", ("cifar10.npz", "data_batch_1", "test_batch", "cifar-10-batches-py")),
        ("cifar100", "CIFAR-100", ("cifar100.npz", "the files train and test", "cifar-100-python")),
        ("nmnist", "N-MNIST", ("train/<class>/", "test/<class>/", "events_np")),
        ("dvs", "event", ("train/<class>/", "test/<class>/", "events_np")),
        ("imagefolder", "image", ("train/<class>/", "val/<class>/", "test/<class>/")),
    ],
)
def test_a_folder_without_data_is_told_what_belongs_there(tmp_path, name, what, names):
    with pytest.raises(data.DataError) as caught:
        data.load(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"no {what} data in {tmp_path}: ")
    assert message.endswith("; check --data-dir or SADP_DATA") and "\n" not in message
    assert [part for part in names if part not in message] == []


def write_cifar100(folder: Path) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    images = RNG.integers(0, 256, (2, 3, 3, 32, 32), dtype=np.uint8)
    for index, name in enumerate(("train", "test")):
        batch = {
            "data": images[index].reshape(3, -1),
            "fine_labels": [index, 99, 50],
            "coarse_labels": [0, 19, 10],
            "filenames": ["a.png", "b.png", "c.png"],
            "batch_label": "training batch 1 of 1",
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple"]}, protocol=2))
    return images


@pytest.mark.parametrize("inside", [True, False])
def test_cifar100_has_its_fine_labels(tmp_path, inside):
    folder = tmp_path / "cifar-100-python"
    images = write_cifar100(folder)
    cifar = data.load("cifar100", folder if inside else tmp_path)
    assert cifar.name == "CIFAR-100" and cifar.num_classes == 100 and cifar.augmented
    assert np.array_equal(cifar.train_images.numpy(), images[0])
    assert cifar.train_labels.tolist() == [0, 99, 50] and cifar.test_labels.tolist() == [1, 99, 50]


@pytest.mark.parametrize("damage", ["missing", "cut", "keys", "label", "code"])
def test_wrong_cifar100_is_one_clear_error(tmp_path, damage):
    folder = tmp_path / "cifar-100-python"
    write_cifar100(folder)
    file, message = folder / "test", r"python.test is damaged"
    batch = pickle.loads(file.read_bytes())
    if damage == "missing":
        file.unlink()
        message = "cifar-100-python lacks test: CIFAR-100 data are"
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    else:
        if damage == "keys":
            del batch["fine_labels"]
        elif damage == "label":
            batch["fine_labels"][0], message = 100, "hold 100, out of range: classes are 0 to 99"
        else:
            batch["data"] = Path("code")
        file.write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(data.DataError, match=message):
        data.load("cifar100", tmp_path)
    with pytest.raises(data.DataError, match="is a file: give the folder"):
        data.load("cifar100", folder / "train")


def recordings(count: int, side: int = 34) -> list[dict[str, np.ndarray]]:
    events = []
    for _ in range(count):
        size = int(RNG.integers(50, 300))
        x, y = RNG.integers(0, side, (2, size), dtype=np.uint8)
        x[0] = y[-1] = side - 1
        times = np.sort(RNG.integers(0, 300_000, size)).astype(np.uint32)
        events.append({"t": times, "x": x, "y": y, "p": RNG.integers(0, 2, size, dtype=np.uint8)})
    return events


def write_recordings(folder: Path, classes: tuple[str, ...] = ("clap", "wave"), side: int = 12) -> dict:
    written = {}
    for split, count in (("train", 3), ("test", 1)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            written[split, name] = recordings(count, side)
            for index, event in enumerate(written[split, name]):
                np.savez(folder / split / name / f"{index}.npz", **event)
    return written


@pytest.mark.parametrize("inside", ["", "events_np"])
def test_event_folders(tmp_path, inside):
    written = write_recordings(tmp_path / inside)
    dvs = data.load("dvs", tmp_path, time_steps=5, split_by="time")
    assert dvs.name == tmp_path.name and dvs.shape == (5, 2, 12, 12) and dvs.num_classes == 2
    assert dvs.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and dvs.test_labels.tolist() == [0, 1]
    expected = [event_frames(**e, steps=5, height=12, width=12, split_by="time") for e in written["test", "wave"]]
    assert np.array_equal(dvs.test_images[1:], np.stack(expected))
    assert data.load("dvs", tmp_path).shape[0] == data.EVENT_STEPS


@pytest.mark.parametrize("wrong", [{"time_steps": 0}, {"split_by": "space"}])
@pytest.mark.parametrize("name", data.EVENTS)
def test_frames_that_cannot_be_are_refused(tmp_path, name, wrong):
    write_recordings(tmp_path)
    with pytest.raises(data.DataError, match="ask for at least 1, split by number or time"):
        data.load(name, tmp_path, **wrong)


def test_nmnist_from_event_folders_has_its_size(tmp_path):
    write_recordings(tmp_path, classes=("0", "7"))
    nmnist = data.load("nmnist", tmp_path)
    assert nmnist.shape == (10, 2, 34, 34) and nmnist.num_classes == 10
    assert nmnist.name == "N-MNIST (8 of 70,000 examples)"


@pytest.mark.parametrize("damage", ["cut", "key", "empty", "far", "nan", "negative", "class", "no test", "no files"])
def test_wrong_event_folder_is_one_clear_error(tmp_path, damage):
    write_recordings(tmp_path)
    file, message = tmp_path / "train/wave/1.npz", r"wave/1\.npz is damaged"
    event = dict(np.load(file))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:400])
    elif damage == "class":
        (tmp_path / "test/fly").mkdir()
        message = "fly is a class that .*train lacks"
    elif damage == "no test":
        (tmp_path / "test").rename(tmp_path / "val")
        message = "lacks test: event data are recordings"
    elif damage == "no files":
        for path in (tmp_path / "test").rglob("*.npz"):
            path.unlink()
        message = "no recordings in .*test"
    else:
        if damage == "key":
            del event["p"]
            message = r"1\.npz has no array 'p'"
        elif damage == "empty":
            event = {key: values[:0] for key, values in event.items()}
        else:
            event["x"] = event["x"] + {"far": 100_000.0, "nan": np.nan, "negative": -100.0}[damage]
        np.savez(file, **event)
    with pytest.raises(data.DataError, match=message) as caught:
        data.load("dvs", tmp_path)
    assert "\n" not in str(caught.value)
