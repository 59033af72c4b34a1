"""Data sets as uint8 tensors in memory, ready to live on the training device."""

import codecs
import gzip
import hashlib
import io
import itertools
import os
import pickle
import struct
import tempfile
import warnings
import zipfile
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .event_frames import SPLITS, event_frames

NAMES = ("digits", "mnist", "cifar10", "cifar100", "nmnist", "dvs", "npz", "imagefolder")
EVENTS = ("nmnist", "dvs")  # of these, events become frames here
EVENT_STEPS = 10  # frames of a recording where nothing else is asked for
MAX_SENSOR = 4096  # pixels a side; a coordinate beyond is damage
CIFAR10_JPEG_NAME = "CIFAR-10 (JPEG q75 copy)"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"}
# What a data set's folder holds, as errors tell it.
LAYOUTS = {
    "MNIST": "mnist.npz, or train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte, gzipped or not, in the folder or in its MNIST/raw",
    "CIFAR-10": "cifar10_jpeg.npz, or data_batch_1 to data_batch_5 and test_batch, in the folder or in its "
    "cifar-10-batches-py",
    "CIFAR-100": "the files train and test, in the folder or in its cifar-100-python",
    "N-MNIST": "nmnist_small_events.npz, nmnist_small_frames_T10.npz, or recordings train/<class>/*.npz and "
    "test/<class>/*.npz, in the folder or in its events_np",
    "event": "recordings train/<class>/*.npz and test/<class>/*.npz, in the folder or in its events_np",
    "image": "images in train/<class>/ and in val/<class>/ or test/<class>/",
}
# What the readers of NumPy, gzip, pickle and Pillow raise on a file that is cut off, damaged or of another kind.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    IndexError,
    TypeError,
    SyntaxError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
)


class DataError(RuntimeError):
    """A data set cannot be read; the message is one sentence that says what, where and the remedy."""


@dataclass(frozen=True)
class Dataset:
    """A labelled data set in memory.

    Images are uint8 [N, C, H, W], or event frames uint8 [N, T, C, H, W]; labels are int64 [N]. `mean` and `std`
    (float32 [C], in units of the raw uint8 values) normalise an image: (x - mean) / std in each channel; event frames
    are only scaled, so that an empty pixel stays 0. `augmented` says whether training images are to be cropped and
    flipped at random.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: Tensor
    std: Tensor
    augmented: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example: (C, H, W), or (T, C, H, W) for event frames."""
        return tuple(self.train_images.shape[1:])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """By what runs of one data set know each other: "name", "train_examples", and "labels", a digest.

        Of an example's shape, the number of classes and all labels in their order, but of no pixels: decoders of JPEG
        files differ by a bit.
        """
        digest = hashlib.sha256(repr((self.shape, self.num_classes, len(self.train_labels))).encode())
        for labels in (self.train_labels, self.test_labels):
            digest.update(labels.cpu().numpy().astype("<i8").tobytes())
        return {"name": self.name, "train_examples": len(self.train_labels), "labels": digest.hexdigest()[:10]}

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set with every tensor on `device`."""
        tensors: dict[str, Any] = {k: value.to(device) for k, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities are of different data sets, by what both know: those of older runs lack the labels."""
    return any(one[key] != other[key] for key in one.keys() & other.keys())


def described(identity: dict[str, Any]) -> str:
    """An identity as errors name it."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in identity.items())


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int = 32,
    time_steps: int | None = None,
    split_by: str = "number",
) -> Dataset:
    """Read a data set by name into memory.

    name: "digits" (scikit-learn's embedded 8x8 digits, no files, a fixed stratified 80/20 split), "mnist" (mnist.npz
    or the four idx files as distributed, gzipped or not), "cifar10" (cifar10_jpeg.npz or the folder
    cifar-10-batches-py), "cifar100" (the folder cifar-100-python, fine labels), "nmnist" (N-MNIST in one of three
    forms: nmnist_small_events.npz with the events of all examples end to end in arrays t, x, y, p, offsets, labels and
    is_test; ready frames, nmnist_small_frames_T10.npz, with the arrays of "npz"; or folders as for "dvs"), "dvs"
    (folders train/<class>/ and test/<class>/ of .npz files, one for each recording, with arrays t, x, y, p as
    SpikingJelly stores its event sets; the frame is the smallest that holds all events), "npz" (arrays train_x,
    train_y, test_x, test_y; x is uint8 NHW, NHWC or, for event frames, NTCHW; y holds integer classes from 0),
    "imagefolder" (folders train/<class>/ and val/<class>/ or test/<class>/; images become RGB and are resized and
    centre-cropped to `image_size` pixels a side). data_dir: the folder or the file; where None, the environment
    variable SADP_DATA. time_steps: frames of each recording of "nmnist" and "dvs", 10 where None; `split_by` says
    whether these are of equal numbers of events or of equal time (see `event_frames`); ready frames stay as they are.
    Raises DataError.
    """
    if name == "digits":
        return _digits()
    if name not in NAMES:
        raise DataError(f"unknown data set {name!r}: choose one of {', '.join(NAMES)}")
    where = data_dir or os.environ.get("SADP_DATA")
    if not where:
        raise DataError(f"the data set {name!r} is read from files: give --data-dir or set SADP_DATA")
    path = Path(where).expanduser()
    if not path.exists():
        raise DataError(f"no file or folder {path} for the data set {name!r}: check --data-dir or SADP_DATA")
    if name == "mnist":
        return _mnist(path)
    if name == "cifar10":
        return _cifar10(path)
    if name == "cifar100":
        return _cifar100(path)
    if name in EVENTS:
        steps = EVENT_STEPS if time_steps is None else time_steps
        if steps < 1 or split_by not in SPLITS:
            raise DataError(f"{steps} frames split by {split_by!r}: ask for at least 1, split by {' or '.join(SPLITS)}")
        return _nmnist(path, steps, split_by) if name == "nmnist" else _event_folder(path.name, path, steps, split_by)
    if name == "npz":
        return _npz(path)
    return _image_folder(path, image_size)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.uint8)
    # One split for every seed of a run, so that seeds are compared on the same test set.
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return _dataset("digits", (train_x, train_y, test_x, test_y), 10, Path("scikit-learn's digits"))


def _mnist(path: Path) -> Dataset:
    archive = path / "mnist.npz" if path.is_dir() else path
    if archive.suffix == ".npz" and archive.exists():
        return _dataset("MNIST", _read_npz(archive, ("train_x", "train_y", "test_x", "test_y")), 10, archive)
    folder = path if path.is_dir() else path.parent
    parts = (("train", "images", 3), ("train", "labels", 1), ("t10k", "images", 3), ("t10k", "labels", 1))
    names = [
        [
            f"{inside}{split}-{kind}{dot}idx{rank}-ubyte{suffix}"
            for inside in ("", "MNIST/raw/")
            for dot in "-."
            for suffix in ("", ".gz")
        ]
        for split, kind, rank in parts
    ]
    files = _found(folder, names, "MNIST")
    arrays = [_read_idx(file, rank) for file, (_, _, rank) in zip(files, parts, strict=True)]
    return _dataset("MNIST", tuple(arrays), 10, folder)


def _cifar10(path: Path) -> Dataset:
    if path.is_file():
        archive = path
    else:
        (batches,) = _found(path, [["cifar10_jpeg.npz", "data_batch_1", "cifar-10-batches-py"]], "CIFAR-10")
        if batches.suffix != ".npz":
            return _cifar10_batches(batches if batches.is_dir() else path)
        archive = batches
    return _dataset(CIFAR10_JPEG_NAME, _cached(archive), 10, archive)


def _npz(path: Path) -> Dataset:
    if path.is_dir():
        archives = sorted(path.glob("*.npz"))
        if len(archives) != 1:
            raise DataError(f"{path} holds {len(archives)} .npz files: give the file itself as --data-dir")
        path = archives[0]
    arrays = _read_npz(path, ("train_x", "train_y", "test_x", "test_y"))
    labels = arrays[1]
    if labels.dtype.kind in "iu" and labels.size and labels.max() >= labels.size:
        raise DataError(
            f"{path}: train_y holds the label {labels.max()} in {labels.size} examples: number classes from 0"
        )
    return _dataset(path.stem, arrays, int(labels.max()) + 1 if labels.dtype.kind in "iu" and labels.size else 0, path)


def _image_folder(path: Path, size: int) -> Dataset:
    from PIL import Image, ImageOps

    train, test = _found(path, [["train"], ["val", "test"]], "image")
    classes, splits = _labelled_files(train, test, IMAGE_SUFFIXES, "images")
    arrays = []
    for files in splits:
        images = np.empty((len(files), size, size, 3), np.uint8)
        for row, (file, _) in enumerate(files):
            try:
                with Image.open(file) as image:
                    if image.mode[0] in "IF":  # whose values Pillow would cut off at 255
                        raise DataError(f"{file} has more than 8 bits a pixel (mode {image.mode}): convert it to 8")
                    images[row] = np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))
            except UNREADABLE as error:
                raise DataError(f"{file} cannot be read as an image ({error}): replace or remove it") from error
        arrays += [images, np.array([label for _, label in files])]
    return _dataset(path.name, tuple(arrays), len(classes), path)


def _classes(split: Path) -> list[str]:
    """The folders that are not hidden, sorted."""
    return sorted(folder.name for folder in split.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _labelled_files(
    train: Path, test: Path, suffixes: set[str], what: str
) -> tuple[list[str], list[list[tuple[Path, int]]]]:
    """The classes, and the files of both splits with their labels; every class has some to train on."""
    classes = _classes(train)
    if unknown := sorted(set(_classes(test)) - set(classes)):
        raise DataError(f"{test / unknown[0]} is a class that {train} lacks: the folders' names are the classes")
    splits = []
    for split in (train, test):
        files = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((split / name).rglob("*"))
            if file.suffix.lower() in suffixes
        ]
        if not files:
            raise DataError(f"no {what} in {split}: put them into {split}/<class>/ as {', '.join(sorted(suffixes))}")
        splits.append(files)
    if empty := sorted(set(range(len(classes))) - {label for _, label in splits[0]}):
        raise DataError(
            f"no {what} in {train / classes[empty[0]]}, and the folders' names are the classes: put "
            f"{', '.join(sorted(suffixes))} into it, or remove it"
        )
    return classes, splits


def _nmnist(path: Path, steps: int, split_by: str) -> Dataset:
    if path.is_dir():
        names = ["nmnist_small_events.npz", "nmnist_small_frames_T10.npz", "train", "events_np"]
        (path,) = _found(path, [names], "N-MNIST")
    if path.is_dir():
        root = path.parent if path.name == "train" else path
        return _event_folder("N-MNIST", root, steps, split_by, size=(34, 34), num_classes=10)
    if _holds(path, "offsets"):
        arrays = _packed_events(path, steps, split_by)
    elif split_by != SPLITS[0]:
        raise DataError(
            f"{path} holds ready frames, which cannot be split by {split_by} any more: leave --split-by out, or give "
            "N-MNIST's events"
        )
    else:
        arrays = _read_npz(path, ("train_x", "train_y", "test_x", "test_y"))
    count = len(arrays[0]) + len(arrays[2])
    name = "N-MNIST" if count == 70_000 else f"N-MNIST ({count:,} of 70,000 examples)"
    return _dataset(name, arrays, 10, path)


def _packed_events(archive: Path, steps: int, split_by: str) -> tuple[np.ndarray, ...]:
    """N-MNIST's events end to end: example i is events offsets[i] to offsets[i + 1]; 34x34 pixels."""
    *events, offsets, labels, is_test = _read_npz(archive, ("t", "x", "y", "p", "offsets", "labels", "is_test"))
    try:
        lengths = {len(labels), len(is_test), len(offsets) - 1}
        if len(lengths) > 1 or {len(values) for values in events} != {int(offsets[-1])} or offsets[0] != 0:
            raise ValueError("its offsets, labels and events do not fit together")
        frames = np.empty((len(labels), steps, 2, 34, 34), np.uint8)
        for row, (start, end) in enumerate(itertools.pairwise(offsets)):
            t, x, y, p = (values[start:end] for values in events)
            frames[row] = event_frames(t, x, y, p, steps=steps, height=34, width=34, split_by=split_by)
        test = is_test.astype(bool)
        return frames[~test], labels[~test], frames[test], labels[test]
    except UNREADABLE as error:
        raise _damaged(archive, error) from error


def _event_folder(
    name: str,
    path: Path,
    steps: int,
    split_by: str,
    *,
    size: tuple[int, int] | None = None,
    num_classes: int | None = None,
) -> Dataset:
    """Recordings in train/<class>/ and test/<class>/; `size`: (height, width) of the sensor, None to find it out."""
    path = path / "events_np" if (path / "events_np").is_dir() else path
    train, test = _found(path, [["train"], ["test"]], "event")
    classes, splits = _labelled_files(train, test, {".npz"}, "recordings")
    height, width = size or _sensor_size([file for files in splits for file, _ in files])
    arrays = []
    for files in splits:
        frames = np.empty((len(files), steps, 2, height, width), np.uint8)
        for row, (file, _) in enumerate(files):
            t, x, y, p = _read_npz(file, ("t", "x", "y", "p"))
            try:
                frames[row] = event_frames(t, x, y, p, steps=steps, height=height, width=width, split_by=split_by)
            except ValueError as error:
                raise _damaged(file, error) from error
        arrays += [frames, np.array([label for _, label in files])]
    return _dataset(name, tuple(arrays), num_classes or len(classes), path)


def _sensor_size(files: list[Path]) -> tuple[int, int]:
    """Height and width of the smallest frame that holds the events of all files, read one after the other."""
    height = width = 0
    for file in files:
        x, y = _read_npz(file, ("x", "y"))
        if x.dtype.kind not in "iuf" or y.dtype.kind not in "iuf" or not x.size or not y.size:
            raise _damaged(file, ValueError(f"x is {x.dtype} of shape {x.shape}, y {y.dtype} of shape {y.shape}"))
        if not (x.max() < MAX_SENSOR and y.max() < MAX_SENSOR):  # NaN, too
            raise _damaged(file, ValueError(f"a pixel at {x.max()}, {y.max()} is on no sensor"))
        width, height = max(width, int(x.max()) + 1), max(height, int(y.max()) + 1)
    return height, width


def _dataset(name: str, arrays: tuple[np.ndarray, ...], num_classes: int, where: Path) -> Dataset:
    """The checks that every source shares, then NHW, NHWC or NTCHW arrays as tensors, channels before pixels."""
    train_x, train_y, test_x, test_y = arrays
    for split, images, labels in (("train", train_x, train_y), ("test", test_x, test_y)):
        if images.dtype != np.uint8 or images.ndim not in (3, 4, 5):
            raise DataError(
                f"{where}: {split} images are {images.dtype} of shape {images.shape}: "
                "they must be uint8 of shape NHW, NHWC or NTCHW"
            )
        if images.ndim == 4 and images.shape[1] <= 4 < min(images.shape[2:]):
            raise DataError(
                f"{where}: {split} images of shape {images.shape} look like NCHW, but NHWC is expected: store "
                "x.transpose(0, 2, 3, 1)"
            )
        if not images.size or images.shape[1:] != train_x.shape[1:]:
            raise DataError(
                f"{where}: {split} images of shape {images.shape} beside train images of shape {train_x.shape}: "
                "both need examples of one common shape"
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise DataError(
                f"{where}: {split} labels are {labels.dtype} of shape {labels.shape} for {len(images)} images: "
                "they must be one integer an image"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise DataError(f"{where}: {split} labels hold {wrong}, out of range: classes are 0 to {num_classes - 1}")
    train_images, test_images = (_channels_first(images) for images in (train_x, test_x))
    # Drawn at random, since files are often ordered by class in a way that a stride would follow.
    count = min(10_000, 1 + 2**28 // train_images[0].numel())  # at most 2 GiB of float64
    drawn = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))[:count]
    sample = train_images[drawn].double()
    std, mean = torch.std_mean(sample, dim=[axis for axis in range(sample.ndim) if axis != sample.ndim - 3])
    return Dataset(
        name=name,
        train_images=train_images,
        train_labels=torch.from_numpy(train_y.astype(np.int64)),
        test_images=test_images,
        test_labels=torch.from_numpy(test_y.astype(np.int64)),
        num_classes=num_classes,
        mean=mean.float() if sample.ndim == 4 else torch.zeros(len(mean)),
        std=std.float().clamp_min(1e-3),
        augmented=sample.ndim == 4 and sample.shape[1] == 3,
    )


def _channels_first(images: np.ndarray) -> Tensor:
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4:
        images = images.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.require(images, requirements=["C", "W"]))


def _found(folder: Path, wanted: list[list[str]], what: str) -> list[Path]:
    """For each file or folder that is wanted the first of its names that is there; raises DataError."""
    paths: list[Path] = []
    missing = []
    for names in wanted:
        there = [folder / name for name in names if (folder / name).exists()]
        if there:
            paths.append(there[0])
        else:
            missing.append(names[0])
    if missing:
        problem = f"{folder} lacks {missing[0]}" if paths else f"no {what} data in {folder}"
        raise DataError(f"{problem}: {what} data are {LAYOUTS[what]}; check --data-dir or SADP_DATA")
    return paths


def _damaged(path: Path, error: BaseException) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path} is damaged or of another format ({reason}): get the file again")


def _read_npz(path: Path, keys: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    try:
        with np.load(path) as archive:
            missing = [key for key in keys if key not in archive.files]
            arrays = () if missing else tuple(archive[key] for key in keys)
    # An .npy file loads as an array, which is no context manager and has no `files`.
    except (*UNREADABLE, AttributeError) as error:
        raise _damaged(path, error) from error
    if missing:
        raise DataError(f"{path} has no array {missing[0]!r}: it must hold {', '.join(keys)}")
    return arrays


def _holds(path: Path, key: str) -> bool:
    """Whether an .npz file holds an array of this name."""
    try:
        with np.load(path) as archive:
            return key in archive.files
    except (*UNREADABLE, AttributeError) as error:
        raise _damaged(path, error) from error


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """The idx format as MNIST is distributed: magic number, `rank` sizes as big-endian int32, then uint8 values."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = struct.unpack_from(f">{1 + rank}I", raw)
        if magic != 0x0800 + rank:
            raise ValueError(f"magic number {magic:#010x} where {0x0800 + rank:#010x} belongs")
        return np.frombuffer(raw, np.uint8, offset=4 * (1 + rank)).reshape(shape)
    except UNREADABLE as error:
        raise _damaged(path, error) from error


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays, bytes and plain containers, and refuses anything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        match module.split(".")[0], name:
            case "numpy", "_reconstruct":
                return np.empty(0).__reduce__()[0]
            case "numpy", "ndarray" | "dtype":
                return getattr(np, name)
            case "_codecs", "encode":
                return codecs.encode
        raise pickle.UnpicklingError(f"{module}.{name} is no part of the CIFAR format")


def _cifar10_batches(folder: Path) -> Dataset:
    train = [f"data_batch_{index}" for index in range(1, 6)]
    return _pickled("CIFAR-10", folder, (train, ["test_batch"]), "labels", 10)


def _cifar100(path: Path) -> Dataset:
    if path.is_file():
        raise DataError(f"{path} is a file: give the folder cifar-100-python, which holds train, test and meta")
    folder = path / "cifar-100-python" if (path / "cifar-100-python").is_dir() else path
    return _pickled("CIFAR-100", folder, (["train"], ["test"]), "fine_labels", 100)


def _pickled(name: str, folder: Path, splits: tuple[list[str], list[str]], label_key: str, num_classes: int) -> Dataset:
    """CIFAR's pickled batches: a dictionary with rows of 3 * 32 * 32 bytes under "data", and a list of labels."""
    arrays: list[np.ndarray] = []
    _found(folder, [[file] for files in splits for file in files], name)
    for files in splits:
        images, labels = [], []
        for path in (folder / file for file in files):
            try:
                with path.open("rb") as stream:
                    batch = _ArrayUnpickler(stream, encoding="latin1").load()
                images.append(batch["data"].reshape(-1, 3, 32, 32))
                labels.append(np.asarray(batch[label_key]))
            except (*UNREADABLE, KeyError, AttributeError) as error:
                raise _damaged(path, error) from error
        arrays += [np.concatenate(images).transpose(0, 2, 3, 1), np.concatenate(labels)]
    return _dataset(name, tuple(arrays), num_classes, folder)


def _cached(archive: Path) -> tuple[np.ndarray, ...]:
    """The decoded images of a packed JPEG file, kept in the user's cache folder under the file's checksum."""
    keys = ("train_x", "train_y", "test_x", "test_y")
    try:
        checksum = hashlib.sha256(archive.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise _damaged(archive, error) from error
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sadp_fast"
    cache = folder / f"{archive.stem}-{checksum}.npz"
    if cache.exists():
        try:
            return _read_npz(cache, keys)
        except DataError:
            pass  # A damaged cache is made anew.
    arrays = _decode(archive)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
            train_x, train_y, test_x, test_y = arrays
            np.savez(file, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)
        os.replace(file.name, cache)
    except OSError as error:
        warnings.warn(f"the decoded images were not cached in {folder}: {error}", stacklevel=2)
    return arrays


def _decode(archive: Path) -> tuple[np.ndarray, ...]:
    """Packed JPEG file: image i is header + payload[offsets[i]:offsets[i + 1]]; all images are of one size."""
    from PIL import Image

    header, payload, offsets, labels, is_test = _read_npz(
        archive, ("header", "payload", "offsets", "labels", "is_test")
    )
    try:
        if len(offsets) != len(labels) + 1 or len(is_test) != len(labels) or offsets[-1] != len(payload):
            raise ValueError("its offsets, labels and payload do not fit together")
        head, body = header.tobytes(), payload.tobytes()
        streams = [head + body[start:end] for start, end in itertools.pairwise(offsets)]
        images = np.stack([np.asarray(Image.open(io.BytesIO(s), formats=("JPEG",)).convert("RGB")) for s in streams])
        train, test = ~is_test.astype(bool), is_test.astype(bool)
        return images[train], labels[train], images[test], labels[test]
    except UNREADABLE as error:
        raise _damaged(archive, error) from error
