"""Events to frames: by hand, as SpikingJelly counts them, and every way in which events can be wrong."""

import ast
import importlib.util
from pathlib import Path
from typing import Optional

import numpy as np
import pytest

from sadp_fast.lab.event_frames import SPLITS, event_frames

RNG = np.random.default_rng(0)


def recording(count=1000, height=9, width=7):
    return {
        "t": np.sort(RNG.integers(0, 50_000, count)).astype(np.uint32),
        "x": RNG.integers(0, width, count, dtype=np.uint8),
        "y": RNG.integers(0, height, count, dtype=np.uint8),
        "p": RNG.integers(0, 2, count, dtype=np.uint8),
    }


def spikingjellys_integration():
    """Its function out of its source: the module imports torchvision and more, the functions need NumPy alone."""
    package = importlib.util.find_spec("spikingjelly")
    source = package and Path(package.origin).parent / "datasets" / "utils.py"
    if not source or not source.is_file():
        pytest.skip("SpikingJelly is not installed")
    names = {"integrate_events_segment_to_frame", "cal_fixed_frames_number_segment_index"}
    wanted = "integrate_events_by_fixed_frames_number"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names | {wanted}]
    scope = {"np": np, "Optional": Optional}
    exec(compile(tree, str(source), "exec"), scope)
    return scope[wanted]


def test_events_are_counted_by_pixel_polarity_and_frame():
    events = {"t": [10, 11, 30, 31, 32, 39, 40], "x": [0, 0, 2, 2, 2, 1, 0], "y": [1, 1, 0, 0, 0, 0, 0]}
    events = {key: np.array(values) for key, values in events.items()} | {"p": np.array([0, 0, 1, 1, 0, 1, 1])}
    by_number = event_frames(**events, steps=3, height=2, width=3)
    assert by_number.dtype == np.uint8 and by_number.shape == (3, 2, 2, 3)
    expected = np.zeros((3, 2, 2, 3), int)
    expected[0, 0, 1, 0] = 2  # frames of two events, the rest in the last one
    expected[1, 1, 0, 2] = 2
    expected[2, 0, 0, 2] = expected[2, 1, 0, 1] = expected[2, 1, 0, 0] = 1
    assert np.array_equal(by_number, expected)
    by_time = event_frames(**events, steps=3, height=2, width=3, split_by="time")
    expected[1] = 0  # from 10, 20 and 30 on: no events in the second frame
    expected[2, 1, 0, 2] = 2
    assert np.array_equal(by_time, expected)


@pytest.mark.parametrize("steps", [1, 4, 7, 10])
@pytest.mark.parametrize("split_by", SPLITS)
def test_frames_are_spikingjellys(split_by, steps):
    integrate = spikingjellys_integration()
    for _ in range(5):
        events = recording(int(RNG.integers(500, 1500)))
        signed = {key: values.astype(np.int64) for key, values in events.items()}
        theirs = integrate(signed, split_by, steps, 9, 7)
        assert np.array_equal(event_frames(**events, steps=steps, height=9, width=7, split_by=split_by), theirs)


@pytest.mark.parametrize("split_by", SPLITS)
def test_order_and_signs_and_types_of_events_do_not_matter(split_by):
    events = recording()
    events["t"] = np.arange(1000) * 3 + 2**31  # times apart, beyond int32
    options = {"steps": 4, "height": 9, "width": 7, "split_by": split_by}
    frames = event_frames(**events, **options)
    order = RNG.permutation(1000)
    shuffled = {key: values[order] for key, values in events.items()}
    assert np.array_equal(event_frames(**shuffled, **options), frames)
    assert np.array_equal(event_frames(**{**events, "p": events["p"] * 2.0 - 1}, **options), frames)
    assert np.array_equal(event_frames(**{**events, "p": events["p"] > 0}, **options), frames)


@pytest.mark.parametrize("split_by", SPLITS)
def test_few_events_at_one_time_and_many_at_one_pixel(split_by):
    one = np.zeros(2, np.int64)
    assert event_frames(one, one, one, one, steps=5, height=1, width=1, split_by=split_by).sum() == 2
    many = np.zeros(3000, np.uint8)
    frames = event_frames(np.arange(3000), many, many, many, steps=2, height=1, width=2, split_by=split_by)
    assert frames[:, 0, 0, 0].tolist() == [255, 255] and frames.sum() == 510  # clipped, not wrapped


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.full(1000, 7)}, "x holds 7, which is not in 0 to 6"),
        ({"y": np.full(1000, -1)}, "y holds -1, which is not in 0 to 8"),
        ({"p": np.full(1000, 2)}, "p holds 2, which is not in -1 to 1"),
        ({"x": np.zeros(999, int)}, "hold 1000, 999, 1000, 1000 events"),
        ({key: np.zeros(0) for key in "txyp"}, "hold 0, 0, 0, 0 events"),
        ({"t": np.linspace(0, 1, 1000)}, "t holds fractions"),
        ({"t": np.full(1000, np.nan)}, "t holds fractions"),
        ({"p": np.array(["on"] * 1000)}, "p is <U2 of shape"),
        ({"x": np.zeros((1000, 1))}, "x is float64 of shape"),
        ({"split_by": "space"}, "split_by must be one of number, time"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_wrong_events(changes, message):
    with pytest.raises(ValueError, match=message):
        event_frames(**{**recording(), "steps": 4, "height": 9, "width": 7, **changes})
