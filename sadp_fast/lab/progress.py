"""What a person sees while runs train: live bars in a terminal, a plain line after each epoch elsewhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from . import train

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars


def bars(console: Console) -> Bars:
    """Bars over the whole width, one for each task, which has a "status" among its fields."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )


class Bar(train.Progress):
    """A live line for one run."""

    def __init__(self, bars: Bars, label: str, epochs: int) -> None:
        self.bars, self.epochs = bars, epochs
        self.loss = self.accuracy = math.nan
        self.task = bars.add_task(label, total=epochs, status="")

    def step(self, epoch: int, share: float, step: int, loss: float | None, kept: float) -> None:
        self.loss = self.loss if loss is None else loss
        self._show(epoch - 1 + share, epoch, step, kept)

    def epoch(self, entry: dict[str, Any]) -> None:
        self.loss, self.accuracy = entry["loss"], entry["test_accuracy"]
        self._show(entry["epoch"], entry["epoch"], entry["steps"], 1 - entry["ratio"], refresh=True)  # however short

    def _show(self, done: float, epoch: int, step: int, kept: float, refresh: bool = False) -> None:
        # Of constant width, or the bar would jump about.
        where = f"epoch {epoch:>{len(str(self.epochs))}}/{self.epochs} step {step:4}"
        status = f"{where} kept {kept:4.0%} loss {self.loss:6.3f} accuracy {self.accuracy:6.1%}".replace("nan", "  -")
        self.bars.update(self.task, completed=done, status=status, refresh=refresh)


class Lines(train.Progress):
    """A plain line after each epoch, where the output is no terminal."""

    def __init__(self, console: Console, label: str, epochs: int) -> None:
        self.console, self.label, self.epochs = console, label, epochs
        self.accuracy = math.nan

    def epoch(self, entry: dict[str, Any]) -> None:
        self.accuracy = entry["test_accuracy"]
        self.console.print(
            f"{self.label}: epoch {entry['epoch']}/{self.epochs}, loss {entry['loss']:.3f}, "
            f"accuracy {entry['test_accuracy']:.1%}, kept {1 - entry['ratio']:.0%}, {entry['seconds']:.2f} s",
            soft_wrap=True,
        )
