"""Live progress of a study: all its runs, and the one that is under way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import train

if TYPE_CHECKING:
    from rich.console import Console


class Display:
    """Bars in a terminal, a line after each epoch elsewhere, nothing without a console.

    Attributes:
        viewers: of the running run, for `train.run`.
    """

    def __init__(self, console: Console | None, total: int) -> None:
        self.console, self.total, self.done = console, total, 0
        self.viewers: list[train.Progress] = []
        self._bars: Any = None

    @contextmanager
    def open(self) -> Iterator[Display]:
        """Show bars while the study runs."""
        if self.console is None or not self.console.is_terminal:
            yield self
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[status]}"))
        with Progress(*columns, MofNCompleteColumn(), TimeElapsedColumn(), console=self.console) as bars:
            self._bars = bars
            self._all = bars.add_task("all runs", total=self.total, status="")
            yield self

    def advance(self) -> None:
        """One more of the runs is there, found or run."""
        self.done += 1
        if self._bars:
            self._bars.update(self._all, completed=self.done)

    @contextmanager
    def run(self, name: str, epochs: int, *others: train.Progress) -> Iterator[None]:
        """A run of so many epochs is under way, with other viewers beside this one."""
        viewer = _Viewer(self, name, epochs) if self.console else None
        self.viewers = [*others, *([viewer] if viewer else [])]
        try:
            yield
        finally:
            self.viewers = []
            if self._bars and viewer:
                self._bars.remove_task(viewer.task)
        if self.console and viewer:
            self.console.print(viewer.summary(), soft_wrap=True)


class _Viewer(train.Progress):
    def __init__(self, display: Display, name: str, epochs: int) -> None:
        self.display, self.name, self.epochs = display, name, epochs
        self.loss = self.accuracy = math.nan
        self.bars = display._bars
        self.task = self.bars.add_task(name, total=epochs, status="") if self.bars else None

    def step(self, epoch: int, share: float, step: int, loss: float | None, kept: float) -> None:
        self.loss = self.loss if loss is None else loss
        self._show(epoch - 1 + share)

    def epoch(self, entry: dict[str, Any]) -> None:
        self.loss, self.accuracy = entry["loss"], entry["test_accuracy"]
        self._show(entry["epoch"], refresh=True)  # however short the epoch was
        if not self.bars and self.display.console:
            self.display.console.print(
                f"{self.name}: epoch {entry['epoch']}/{self.epochs}, loss {self.loss:.3f}, accuracy "
                f"{self.accuracy:.1%}",
                soft_wrap=True,
            )

    def _show(self, done: float, refresh: bool = False) -> None:
        if self.bars:
            status = f"loss {self.loss:6.3f} accuracy {self.accuracy:6.1%}".replace("nan", "  -")
            self.bars.update(self.task, completed=round(done, 2), status=status, refresh=refresh)

    def summary(self) -> str:
        """A line that stays."""
        where = f"{self.display.done + 1}/{self.display.total}"
        result = "" if math.isnan(self.accuracy) else f", accuracy {self.accuracy:.1%}"
        return f"{where} {self.name}: done{result}"
