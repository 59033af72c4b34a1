"""What watches a study's runs: a display of all of them and of the one under way, and a deadline that stops in time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import train
from ..progress import Bar, Lines, bars

if TYPE_CHECKING:
    from rich.console import Console


class Display:
    """Bars in a terminal, a line after each epoch elsewhere, nothing without a console.

    Attributes:
        done: how many of the runs are there, found or run.
        viewers: of the running run, for `train.run`.
    """

    def __init__(self, console: Console | None, total: int) -> None:
        self.console, self.total, self.done = console, total, 0
        self.viewers: list[train.Progress] = []
        self._bars: Any = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Show bars while the study runs."""
        if self.console is not None and self.console.is_terminal:
            with bars(self.console) as self._bars:
                self._all = self._bars.add_task("all runs", total=self.total, status=f"0/{self.total}")
                yield
        else:
            yield

    def advance(self) -> None:
        """One more of the runs is there."""
        self.done += 1
        if self._bars:
            self._bars.update(self._all, completed=self.done, status=f"{self.done}/{self.total}")

    @contextmanager
    def run(self, name: str, epochs: int, *others: train.Progress) -> Iterator[None]:
        """A run of so many epochs is under way, with other viewers beside this one."""
        if self.console is None:
            self.viewers = [*others]
            yield
            return
        viewer = Bar(self._bars, name, epochs) if self._bars else Lines(self.console, name, epochs)
        self.viewers = [*others, viewer]
        try:
            yield
        finally:
            if isinstance(viewer, Bar):
                self._bars.remove_task(viewer.task)
        result = "" if math.isnan(viewer.accuracy) else f", accuracy {viewer.accuracy:.1%}"
        self.console.print(f"{self.done + 1}/{self.total} {name}: done{result}", soft_wrap=True)


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
