"""What the readers of data sets share: the record of one, finding its files, reading NumPy's, errors with a remedy."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import DataError, Dataset

Reader = Callable[[Path], np.ndarray]  # of one example's file
# What the readers of NumPy, gzip, pickle and Pillow raise on a file that is cut off, damaged or of another kind.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    SyntaxError,
    AttributeError,  # an .npy file loads as an array, which has no `files`
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        name: of the option --dataset.
        label: in errors, and in results unless the files have a name of their own.
        layout: what its files are, as errors tell it; None: it needs none.
        recipe: what it is trained with where no option says otherwise, by the names of TrainConfig's fields.
        read: called with this record, the path and `options`.
        options: those of `load` that `read` takes.
    """

    name: str
    label: str
    layout: str | None
    recipe: Mapping[str, Any]
    read: Callable[..., Dataset]
    options: tuple[str, ...] = ()

    def find(self, folder: Path, wanted: Sequence[Sequence[str]]) -> list[Path]:
        """For each file or folder that is wanted the first of its names that is there; raises DataError."""
        there = [[folder / name for name in names if (folder / name).exists()] for names in wanted]
        if missing := [names[0] for names, paths in zip(wanted, there, strict=True) if not paths]:
            problem = f"{folder} lacks {missing[0]}" if any(there) else f"no {self.label} data in {folder}"
            raise DataError(f"{problem}: {self.label} data are {self.layout}; check --data-dir or SADP_DATA")
        return [paths[0] for paths in there]


def damaged(path: Path, error: BaseException) -> DataError:
    """The error for a file that no reader of its format can read."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path} is damaged or of another format ({reason}): get the file again")


def _stored(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of these arrays that an .npz file holds; raises DataError."""
    try:
        with np.load(path) as archive:
            return {key: archive[key] for key in keys if key in archive.files}
    except UNREADABLE as error:
        raise damaged(path, error) from error


def read_npz(path: Path, keys: Sequence[str]) -> list[np.ndarray]:
    """The arrays of these names in an .npz file; raises DataError."""
    found = _stored(path, keys)
    for key in keys:
        if key not in found:
            raise DataError(f"{path} has no array {key!r}: it must hold {', '.join(keys)}")
    return list(found.values())


def read_note(path: Path, key: str) -> str | None:
    """A line of text that an .npz file holds beside its arrays; None where it holds none of this name."""
    note = _stored(path, [key]).get(key)
    if note is None:
        return None
    if note.dtype.kind != "U" or note.ndim > 0 or not str(note).isprintable():
        raise DataError(f"{path}: {key!r} is {note.dtype} of shape {note.shape}: store one line of text")
    return str(note)


def inside(path: Path, name: str) -> Path:
    """The folder of this name in a folder, or the folder itself where there is none."""
    if path.is_file():
        raise DataError(f"{path} is a file: give the folder {name}, or the one that it is in")
    return path / name if (path / name).is_dir() else path


def labelled_files(
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


def read_examples(splits: list[list[tuple[Path, int]]], shape: tuple[int, ...], read: Reader) -> list[np.ndarray]:
    """The uint8 examples of this shape that the files of both splits hold, with their labels behind each split's."""
    arrays = []
    for files in splits:
        examples = np.empty((len(files), *shape), np.uint8)
        for row, (file, _) in enumerate(files):
            examples[row] = read(file)
        arrays += [examples, np.array([label for _, label in files])]
    return arrays


def _classes(split: Path) -> list[str]:
    """The folders that are not hidden, sorted."""
    return sorted(folder.name for folder in split.iterdir() if folder.is_dir() and not folder.name.startswith("."))
