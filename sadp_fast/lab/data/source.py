"""A data set as the command knows it: one record, which `registry` lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .dataset import DataError, Dataset


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        name: of the option --dataset.
        label: in errors, and in results unless the files have a name of their own.
        layout: what its files are, as errors tell it; None: it needs none.
        recipe: what it is trained with where no option says otherwise, by the names of TrainConfig's fields.
        read: called with this record, the path and `options`.
        options: those of `load` that `read` takes.
    """

    name: str
    label: str
    layout: str | None
    recipe: Mapping[str, Any]
    read: Callable[..., Dataset]
    options: tuple[str, ...] = ()

    def find(self, folder: Path, wanted: Sequence[Sequence[str]]) -> list[Path]:
        """For each file or folder that is wanted the first of its names that is there; raises DataError."""
        there = [[folder / name for name in names if (folder / name).exists()] for names in wanted]
        if missing := [names[0] for names, paths in zip(wanted, there, strict=True) if not paths]:
            problem = f"{folder} lacks {missing[0]}" if any(there) else f"no {self.label} data in {folder}"
            raise DataError(f"{problem}: {self.label} data are {self.layout}; check --data-dir or SADP_DATA")
        return [paths[0] for paths in there]
