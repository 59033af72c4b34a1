"""Stopping a study in time: no run is begun that would come too late, and one under way stops after a whole epoch."""

from __future__ import annotations

import math
import time
from typing import Any

from .. import train


class OutOfTime(Exception):
    """A run stopped after a whole epoch, which its checkpoint holds, because the next one would end too late."""


class Deadline:
    """When to stop; without `minutes` never.

    Attributes:
        reached: whether a run was left out or stopped for it.
        longest_epoch: seconds of the longest epoch watched so far, evaluation and checkpoint included.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.reached, self.longest_epoch = False, 0.0

    def allows(self, seconds: float) -> bool:
        """Whether what takes so long would end in time; if not, the deadline counts as reached."""
        in_time = time.monotonic() + seconds <= self._end
        self.reached |= not in_time
        return in_time

    def watch(self, epochs: int) -> train.Progress:
        """A viewer of a run of so many epochs, from now on, that raises OutOfTime between two of them."""
        return _Watch(self, epochs)


class _Watch(train.Progress):
    def __init__(self, deadline: Deadline, epochs: int) -> None:
        self.deadline, self.epochs = deadline, epochs
        self.last: float | None = None

    def step(self, epoch: int, share: float, step: int, loss: float | None, kept: float) -> None:
        self.last = self.last or time.monotonic()  # from the first step on: what is compiled before is no epoch

    def epoch(self, entry: dict[str, Any]) -> None:
        now = time.monotonic()
        took, self.last = now - (self.last or now), now
        self.deadline.longest_epoch = max(self.deadline.longest_epoch, took)
        # By the last one: where epochs on all data follow pruned ones, the first of them may end a little too late.
        if entry["epoch"] < self.epochs and not self.deadline.allows(took):
            raise OutOfTime
