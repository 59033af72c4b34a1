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
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.reached = False

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
        self.last, self.longest = time.monotonic(), 0.0

    def epoch(self, entry: dict[str, Any]) -> None:
        now = time.monotonic()
        # Of the epochs so far the longest: after pruned ones, some on all data may follow.
        self.longest, self.last = max(self.longest, now - self.last), now
        if entry["epoch"] < self.epochs and not self.deadline.allows(self.longest):
            raise OutOfTime
