"""What keeps each epoch's figures beside the run's own files. A new logger is a record here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .registry import by_name
from .train import Progress


@dataclass(frozen=True)
class Logger:
    """A way to log a run.

    Attributes:
        name: its own.
        folder: of its files, in the run's folder.
        open: a viewer that writes to a folder, or None where its package is not installed.
    """

    name: str
    folder: str
    open: Callable[[Path], Progress | None]


def tensorboard(folder: Path) -> Progress | None:
    """A viewer that writes each epoch's scalars to `folder`, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer = SummaryWriter(str(folder))

    class Scalars(Progress):
        def epoch(self, entry: dict[str, Any]) -> None:
            for name, value in entry.items():
                if name != "epoch" and value is not None:
                    writer.add_scalar(name, value, entry["epoch"])
            writer.flush()

    return Scalars()


LOGGERS = by_name(Logger("tensorboard", "tb", tensorboard))


def open_loggers(folder: Path, run: str) -> list[Progress]:
    """The viewers of all loggers that are installed, for a run of this name in the folder."""
    viewers = [logger.open(folder / logger.folder / run) for logger in LOGGERS.values()]
    return [viewer for viewer in viewers if viewer is not None]
