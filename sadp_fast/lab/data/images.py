"""Readers of images: scikit-learn's digits, arrays in .npz files, MNIST's and CIFAR's own files, folders of images."""

from __future__ import annotations

import codecs
import gzip
import pickle
import struct
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import DataError, Dataset, from_arrays
from .files import UNREADABLE, Source, damaged, inside, labelled_files, read_examples, read_note, read_npz

ARRAYS = ("train_x", "train_y", "test_x", "test_y")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"}


def digits(source: Source, path: None) -> Dataset:
    """scikit-learn's embedded 8x8 digits with one stratified 80/20 split, so that seeds share a test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.uint8)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return from_arrays(source.label, (train_x, train_y, test_x, test_y), 10, Path("scikit-learn's digits"))


def the_archive(path: Path) -> Path:
    """The .npz file, or the only one in a folder."""
    if not path.is_dir():
        return path
    archives = sorted(path.glob("*.npz"))
    if len(archives) != 1:
        raise DataError(f"{path} holds {len(archives)} .npz files: give the file itself as --data-dir")
    return archives[0]


def npz(source: Source, path: Path) -> Dataset:
    """Any arrays train_x, train_y, test_x, test_y; the text `name` beside them, or else the file's name, is theirs."""
    path = the_archive(path)
    arrays = read_npz(path, ARRAYS)
    labels = arrays[1]
    whole = labels.dtype.kind in "iu" and labels.size > 0
    if whole and labels.max() >= labels.size:
        raise DataError(
            f"{path}: train_y holds the label {labels.max()} in {labels.size} examples: number classes from 0"
        )
    return from_arrays(read_note(path, "name") or path.stem, arrays, int(labels.max()) + 1 if whole else 0, path)


def _named_archive(source: Source, path: Path, classes: int) -> Dataset | None:
    """A known data set as the arrays of `npz`: the file itself, or NAME.npz in a folder; None where it is not there."""
    archive = path / f"{source.name}.npz" if path.is_dir() else path
    if not archive.exists() or (path.is_file() and path.suffix != ".npz"):
        return None
    return from_arrays(read_note(archive, "name") or source.label, read_npz(archive, ARRAYS), classes, archive)


def mnist(source: Source, path: Path) -> Dataset:
    """mnist.npz, or the four idx files as they are distributed."""
    if found := _named_archive(source, path, 10):
        return found
    folder = path if path.is_dir() else path.parent
    parts = (("train", "images", 3), ("train", "labels", 1), ("t10k", "images", 3), ("t10k", "labels", 1))
    forms = list(product(("", "MNIST/raw/"), "-.", ("", ".gz")))
    names = [
        [f"{where}{split}-{kind}{dot}idx{rank}-ubyte{suffix}" for where, dot, suffix in forms]
        for split, kind, rank in parts
    ]
    files = source.find(folder, names)
    arrays = [_read_idx(file, rank) for file, (_, _, rank) in zip(files, parts, strict=True)]
    return from_arrays(source.label, arrays, 10, folder)


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """The idx format as MNIST is distributed: magic number, `rank` sizes as big-endian int32, then uint8 values."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = struct.unpack_from(f">{1 + rank}I", raw)
        if magic != 0x0800 + rank:
            raise ValueError(f"magic number {magic:#010x} where {0x0800 + rank:#010x} belongs")
        return np.frombuffer(raw, np.uint8, offset=4 * (1 + rank)).reshape(shape)
    except UNREADABLE as error:
        raise damaged(path, error) from error


def cifar(
    source: Source, path: Path, *, folder: str, splits: Sequence[Sequence[str]], labels_in: str, classes: int
) -> Dataset:
    """NAME.npz, or pickled batches: dictionaries with rows of 3 * 32 * 32 bytes under "data", and a list of labels."""
    if found := _named_archive(source, path, classes):
        return found
    path = inside(path, folder)
    source.find(path, [[file] for files in splits for file in files])
    arrays: list[np.ndarray] = []
    for files in splits:
        images, labels = [], []
        for file in (path / name for name in files):
            try:
                with file.open("rb") as stream:
                    batch = _ArrayUnpickler(stream, encoding="latin1").load()
                images.append(batch["data"].reshape(-1, 3, 32, 32))
                labels.append(np.asarray(batch[labels_in]))
            except UNREADABLE as error:
                raise damaged(file, error) from error
        arrays += [np.concatenate(images).transpose(0, 2, 3, 1), np.concatenate(labels)]
    return from_arrays(source.label, arrays, classes, path)


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


def image_folder(source: Source, path: Path, *, image_size: int) -> Dataset:
    """train/<class>/ and val/<class>/ or test/<class>/; images become RGB, resized and centre-cropped to the size."""
    from PIL import Image, ImageOps

    train, test = source.find(path, [["train"], ["val", "test"]])
    classes, splits = labelled_files(train, test, IMAGE_SUFFIXES, "images")

    def read(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                if image.mode[0] in "IF":  # whose values Pillow would cut off at 255
                    raise DataError(f"{file} has more than 8 bits a pixel (mode {image.mode}): convert it to 8")
                return np.asarray(ImageOps.fit(image.convert("RGB"), (image_size, image_size)))
        except UNREADABLE as error:
            raise DataError(f"{file} cannot be read as an image ({error}): replace or remove it") from error

    return from_arrays(path.name, read_examples(splits, (image_size, image_size, 3), read), len(classes), path)
