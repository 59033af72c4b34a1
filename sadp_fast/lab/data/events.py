"""Readers of event cameras' recordings, which become frames of counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..event_frames import SPLITS, event_frames
from .dataset import DataError, Dataset, from_arrays
from .files import Source, damaged, inside, labelled_files, read_examples, read_npz

EVENT_STEPS = 10  # frames of a recording where nothing else is asked for
MAX_SENSOR = 4096  # pixels a side; a coordinate beyond is damage
NMNIST_EXAMPLES = 70_000


def nmnist(source: Source, path: Path, *, time_steps: int | None, split_by: str) -> Dataset:
    """N-MNIST's recordings, of 34x34 pixels; a part of them says how large it is."""
    arrays, _, path = _recordings(source, path, time_steps, split_by, (34, 34))
    count = len(arrays[1]) + len(arrays[3])
    part = "" if count == NMNIST_EXAMPLES else f" ({count:,} of {NMNIST_EXAMPLES:,} examples)"
    return from_arrays(source.label + part, arrays, 10, path)


def dvs(source: Source, path: Path, *, time_steps: int | None, split_by: str) -> Dataset:
    """Any recordings, named by their folder; the frame is the smallest that holds all events."""
    arrays, classes, where = _recordings(source, path, time_steps, split_by, None)
    return from_arrays(path.name, arrays, classes, where)


def _recordings(
    source: Source, path: Path, time_steps: int | None, split_by: str, size: tuple[int, int] | None
) -> tuple[list[np.ndarray], int, Path]:
    """Frames and labels of train/<class>/*.npz and test/<class>/*.npz, the number of classes, and their folder.

    size: (height, width) of the sensor, None to find it out.
    """
    steps = EVENT_STEPS if time_steps is None else time_steps
    if steps < 1 or split_by not in SPLITS:
        raise DataError(f"{steps} frames split by {split_by!r}: ask for at least 1, split by {' or '.join(SPLITS)}")
    path = inside(path, "events_np")
    train, test = source.find(path, [["train"], ["test"]])
    classes, splits = labelled_files(train, test, {".npz"}, "recordings")
    height, width = size or _sensor_size([file for files in splits for file, _ in files])

    def read(file: Path) -> np.ndarray:
        t, x, y, p = read_npz(file, ("t", "x", "y", "p"))
        try:
            return event_frames(t, x, y, p, steps=steps, height=height, width=width, split_by=split_by)
        except ValueError as error:
            raise damaged(file, error) from error

    return read_examples(splits, (steps, 2, height, width), read), len(classes), path


def _sensor_size(files: list[Path]) -> tuple[int, int]:
    """Height and width of the smallest frame that holds the events of all files, read one after the other."""
    height = width = 0
    for file in files:
        x, y = read_npz(file, ("x", "y"))
        if x.dtype.kind not in "iuf" or y.dtype.kind not in "iuf" or not x.size or not y.size:
            raise damaged(file, ValueError(f"x is {x.dtype} of shape {x.shape}, y {y.dtype} of shape {y.shape}"))
        if not (x.max() < MAX_SENSOR and y.max() < MAX_SENSOR):  # NaN, too
            raise damaged(file, ValueError(f"a pixel at {x.max()}, {y.max()} is on no sensor"))
        width, height = max(width, int(x.max()) + 1), max(height, int(y.max()) + 1)
    return height, width
