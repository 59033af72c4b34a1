"""Data sets as uint8 tensors in memory, ready to live on the training device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .data_sets import DATASETS, takers
from .dataset import DataError, Dataset, described, differ
from .events import EVENT_STEPS
from .files import read_note
from .images import the_archive

__all__ = ["DATASETS", "EVENTS", "EVENT_STEPS", "DataError", "Dataset", "described", "differ", "load", "recipe"]

EVENTS = takers("split_by")


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int = 32,
    time_steps: int | None = None,
    split_by: str = "number",
) -> Dataset:
    """Read a data set into memory.

    Args:
        name: one of DATASETS, where each one's files are told; the readers say what they take from them.
        data_dir: the folder or the file; None: the environment variable SADP_DATA. "digits" needs none.
        image_size: side in pixels of the images of "imagefolder".
        time_steps: frames of each recording of "nmnist" and "dvs"; None: 10.
        split_by: whether these are of equal numbers of events or of equal time; see `event_frames`.

    Raises:
        DataError: the files are not there or not as they should be.
    """
    given = {"image_size": image_size, "time_steps": time_steps, "split_by": split_by}
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    source = DATASETS[name]
    path = None if source.layout is None else _path(name, data_dir)
    return source.read(source, path, **{option: given[option] for option in source.options})


def recipe(name: str, data_dir: str | os.PathLike[str] | None = None) -> Mapping[str, Any]:
    """What a data set is trained with by default: its record's, or of the one that an npz names as its `recipe`."""
    if name != "npz":
        return DATASETS[name].recipe
    archive = the_archive(_path(name, data_dir))
    of = read_note(archive, "recipe") or name
    if of not in DATASETS:
        raise DataError(f"{archive} has the recipe {of!r}: store the name of one of {', '.join(DATASETS)}")
    return DATASETS[of].recipe


def _path(name: str, data_dir: str | os.PathLike[str] | None) -> Path:
    where = data_dir or os.environ.get("SADP_DATA")
    if not where:
        raise DataError(f"the data set {name!r} is read from files: give --data-dir or set SADP_DATA")
    path = Path(where).expanduser()
    if not path.exists():
        raise DataError(f"no file or folder {path} for the data set {name!r}: check --data-dir or SADP_DATA")
    return path
