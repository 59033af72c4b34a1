"""From the events of an event camera to frames of counts."""

from __future__ import annotations

import numpy as np

SPLITS = ("number", "time")


def event_frames(
    t: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    p: np.ndarray,
    *,
    steps: int,
    height: int,
    width: int,
    split_by: str = "number",
) -> np.ndarray:
    """Count the events of one recording in each of `steps` frames, by pixel and polarity.

    As SpikingJelly's `integrate_events_by_fixed_frames_number`: with "number", frame j takes the events from j n on,
    n = N // steps; with "time", those from t_0 + j d on, d = (t_last - t_0) // steps; the last frame takes the rest.
    Three things are ours: a frame of time without events stays empty (an error there), events that are not in the order
    of time are sorted first, and counts above 255 become 255.

    Args:
        t: times, whole numbers in any unit, [N].
        x, y: pixel columns and rows, [N].
        p: polarity, 0 or -1 for off and 1 for on, [N].

    Returns:
        uint8 [steps, 2, height, width]; channel 0 counts off events, channel 1 on events.

    Raises:
        ValueError: an array is not of the kind above, there are no events, or one lies outside of the frame.
    """
    if split_by not in SPLITS:
        raise ValueError(f"split_by must be one of {', '.join(SPLITS)}, got {split_by!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    t, x, y, p = (_whole(name, array) for name, array in (("t", t), ("x", x), ("y", y), ("p", p)))
    if not len(t) == len(x) == len(y) == len(p) > 0:
        raise ValueError(f"t, x, y, p hold {len(t)}, {len(x)}, {len(y)}, {len(p)} events, not one and the same number")
    for name, array, low, high in (("x", x, 0, width - 1), ("y", y, 0, height - 1), ("p", p, -1, 1)):
        if array.min() < low or array.max() > high:
            wrong = array.min() if array.min() < low else array.max()
            raise ValueError(f"{name} holds {wrong}, which is not in {low} to {high}")
    if (t[1:] < t[:-1]).any():
        order = np.argsort(t, kind="stable")
        t, x, y, p = t[order], x[order], y[order], p[order]
    position, extent = (np.arange(len(t)), len(t)) if split_by == "number" else (t - t[0], t[-1] - t[0])
    frame = np.minimum(position // max(extent // steps, 1), steps - 1)
    cell = ((frame * 2 + (p > 0)) * height + y) * width + x
    counts = np.bincount(cell, minlength=steps * 2 * height * width)
    return np.minimum(counts, 255).astype(np.uint8).reshape(steps, 2, height, width)


def _whole(name: str, array: np.ndarray) -> np.ndarray:
    """Whole numbers of any dtype as int64."""
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, not one number an event")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.rint(array)).all()):
        raise ValueError(f"{name} holds fractions, not whole numbers")
    return array.astype(np.int64)
