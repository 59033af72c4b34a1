"""The data sets that `--dataset` names. A new one is a record here, with a reader where its files are of a new kind."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..registry import by_name
from . import events, images
from .files import Source

_RECORDINGS = "recordings train/<class>/*.npz and test/<class>/*.npz, in the folder or in its events_np"
_FRAMES = ("time_steps", "split_by")
_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


def _cifar(classes: int, folder: str, files: str, splits: tuple[list[str], list[str]], labels_in: str) -> Source:
    """CIFAR-10 or CIFAR-100, which differ in their files alone."""
    return Source(
        f"cifar{classes}",
        f"CIFAR-{classes}",
        f"cifar{classes}.npz, or {files}, in the folder or in its {folder}",
        dict(model="sew_resnet18", epochs=60, batch_size=128, cutout=8),
        partial(images.cifar, folder=folder, splits=splits, labels_in=labels_in, classes=classes),
    )


DATASETS = by_name(
    Source("digits", "digits", None, dict(model="conv", epochs=30, batch_size=32), images.digits),
    Source(
        "mnist",
        "MNIST",
        "mnist.npz, or train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
        "t10k-labels-idx1-ubyte, gzipped or not, in the folder or in its MNIST/raw",
        dict(model="conv", epochs=10, batch_size=128),
        images.mnist,
    ),
    _cifar(
        10, "cifar-10-batches-py", "data_batch_1 to data_batch_5 and test_batch", (_BATCHES, ["test_batch"]), "labels"
    ),
    _cifar(100, "cifar-100-python", "the files train and test", (["train"], ["test"]), "fine_labels"),
    Source("nmnist", "N-MNIST", _RECORDINGS, dict(model="conv", epochs=30, batch_size=32), events.nmnist, _FRAMES),
    Source("dvs", "event", _RECORDINGS, dict(model="sew_resnet18", epochs=60, batch_size=16), events.dvs, _FRAMES),
    Source(
        "npz",
        "npz",
        "an .npz file with train_x, train_y, test_x and test_y",
        dict(model="conv", epochs=30, batch_size=32),
        images.npz,
    ),
    Source(
        "imagefolder",
        "image",
        "images in train/<class>/ and in val/<class>/ or test/<class>/",
        dict(model="sew_resnet18", epochs=60, batch_size=32),
        images.image_folder,
        ("image_size",),
    ),
)


def takers(option: str) -> list[str]:
    """The data sets that take one of load's options."""
    return [source.name for source in DATASETS.values() if option in source.options]


def by_recipe(setting: str, usual: Any, form: str = "{names} {value}") -> str:
    """For the help: a setting's usual value, then its others in the recipes; the data sets of CIFAR are one name."""
    names: dict[Any, dict[str, None]] = {}
    for source in DATASETS.values():
        names.setdefault(source.recipe.get(setting, usual), {})[source.name.rstrip("0123456789")] = None
    others = [form.format(value=value, names=", ".join(those)) for value, those in names.items() if value != usual]
    return "; ".join([str(usual), *others])
