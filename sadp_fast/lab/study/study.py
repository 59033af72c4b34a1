"""What every study is: the runs that it asks for, a result for JSON made of them, and that result as tables and plots.

Behind it, what several studies share: rows of figures grouped by what they are of, and the training runs of a plan.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .. import report
from ..data import described, differ
from ..figures import Row, Table, by_value, mean, save
from ..settings import TrainConfig
from .plan import Plan
from .runs import Runs, StudyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
Figures = list[tuple[str, "Figure"]]  # each behind what its file's name ends in


class NothingFinished(StudyError):
    """There is no finished run to show."""


@dataclass(frozen=True)
class Ask:
    """One run that a study shows.

    Attributes:
        name: by which a result says that it is missing.
        take: gets the run's file from the runs of a plan; None where there is none.
        where: what the study knows it by.
    """

    name: str
    take: Callable[[Runs], dict[str, Any] | None]
    where: dict[str, Any]


Found = list[tuple[Ask, dict[str, Any]]]  # the runs that are there, each with its file


class Module(Protocol):
    """What a study's module has; its docstring says, behind the first line, how to read plots and tables."""

    QUESTION: str
    __doc__: str | None

    def asks(self, plan: Plan, /) -> list[Ask]:
        """The runs of a plan that it shows."""

    def parts(self, plan: Plan, found: Found, /) -> dict[str, Any]:
        """What its result says of those that are there, by the keys of the result."""

    def draw(self, result: Result, /) -> Figures:
        """The plots of a result."""

    def tables(self, result: Result, /) -> list[Table]:
        """The figures behind the plots."""


@dataclass(frozen=True)
class Study:
    """One result of the paper.

    Attributes:
        name: in commands and files.
        paper: the figure that it reproduces.
        module: what it asks and answers.
    """

    name: str
    paper: str
    module: Module

    @property
    def question(self) -> str:
        """That it answers."""
        return self.module.QUESTION

    @property
    def reading(self) -> str:
        """How to read plots and tables, and what they cannot say."""
        return " ".join((self.module.__doc__ or "").partition("\n")[2].split())

    def collect(self, runs: Runs) -> Result:
        """Run what is not there yet; the result, ready for JSON. Raises NothingFinished, and StudyError."""
        asks, files = self.module.asks(runs.plan), dict[str, dict[str, Any]]()
        for runs.wait in (False, True):  # first what no other process is at, then what others have not finished
            for ask in asks:
                if ask.name not in files and (file := ask.take(runs)):
                    files[ask.name] = file
                    runs.display.advance()
        found = [(ask, files[ask.name]) for ask in asks if ask.name in files]
        if not found:
            where = runs.plan.folder
            raise NothingFinished(f"{where} holds no finished run for the study {self.name}: leave --report-only out")
        return {
            "study": self.name,
            "data_set": _data_set(found),
            "settings": runs.plan.settings(),
            "environments": each_once({key: file[key] for key in ("device", "versions")} for _, file in found),
            "missing_runs": [ask.name for ask in asks if ask.name not in files],
            **self.module.parts(runs.plan, found),
        }

    def tables(self, result: Result) -> list[Table]:
        """The figures behind the plots."""
        return self.module.tables(result)

    def plots(self, result: Result, folder: Path) -> list[tuple[Path, str]]:
        """Write PNGs; each with a caption, the first line of its title."""
        return [
            (save(figure, folder / f"{self.name}{suffix}.png"), figure.get_suptitle().partition("\n")[0])
            for suffix, figure in self.module.draw(result)
        ]


def _data_set(found: Found) -> dict[str, Any]:
    """What the files know of their data set, all together; raises StudyError where they are of different ones."""
    told: dict[str, Any] = {}
    for ask, file in found:
        if differ(told, file["data_set"]):
            raise StudyError(
                f"the runs are of different data sets, '{found[0][0].name}' of one ({described(told)}) and "
                f"'{ask.name}' of another ({described(file['data_set'])}): keep those of each in a folder of their own"
            )
        told |= file["data_set"]
    return told


def each_once(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries in their order, equal ones once."""
    return list({json.dumps(entry, sort_keys=True): entry for entry in entries}.values())


# How a figure's head names a regularisation of all its runs; one that is the default goes without saying.
REGULARISATION = {
    "weight_decay": "weight decay {:g}",
    "label_smoothing": "label smoothing {:g}",
    "augment": "augmentation {}",
    "cutout": "cutout {:g} pixels",
    "mixup": "mixup {:g}",
}


def title(result: Result) -> str:
    """Data set, network, T, regularisation and device, for a figure's head."""
    base, plain = result["settings"]["base"], asdict(TrainConfig())
    said = [text.format(base[key]) for key, text in REGULARISATION.items() if base.get(key, plain[key]) != plain[key]]
    devices = sorted({entry["device"] for entry in result["environments"]})
    what = [result["data_set"]["name"], base["model"], f"T = {base['time_steps']}", *said]
    return f"{', '.join(what)} ({', '.join(devices)})"


def measured_examples(result: Result) -> int:
    """Of how many training examples gradient norms were taken: the data set may have fewer than were asked for."""
    return min(result["settings"]["size"]["examples"], result["data_set"]["train_examples"])


def seeds_text(counts: Iterable[int]) -> str:
    """What bands and bars are: "mean and range of 3 seeds", or "one seed"; methods may have run with different ones."""
    low, high = min(counts), max(counts)
    if low != high:
        return f"mean and range of {low} to {high} seeds"
    return "one seed" if high == 1 else f"mean and range of {high} seeds"


# ------------------------------------------------------------------------------------------------- rows of figures


def select(rows: Iterable[Row], **where: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def looks(result: Result) -> dict[str, dict[str, Any]]:
    """Of each method of a result a line's style, and as "label" its name for tables and plots."""
    score, styles = result["settings"]["base"]["score"], report.styles(result["settings"]["methods"])
    return {method: {**style, "label": report.label(method, score)} for method, style in styles.items()}


def by_method(result: Result, rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each method that has some, in the result's order."""
    found = {method: select(rows, method=method) for method in result["settings"]["methods"]}
    return {method: own for method, own in found.items() if own}


class Cell(NamedTuple):
    """The rows of one method at one ratio."""

    method: str
    label: str
    ratio: float
    rows: list[Row]


def by_cell(result: Result, rows: list[Row]) -> list[Cell]:
    """Ratio by ratio, the methods in the result's order."""
    names = looks(result)
    return [
        Cell(method, names[method]["label"], ratio, own)
        for ratio, at_ratio in by_value(rows, "ratio").items()
        for method, own in by_method(result, at_ratio).items()
    ]


# --------------------------------------------------------------------------------------------------- training runs

# What every study's JSON says of a training run; see `training_rows`.
RUN = ("method", "ratio", "seed", "device", "planned_share", "examples_share", "seconds", "time_ratio")


def training_asks(plan: Plan) -> list[Ask]:
    """Every method at every ratio: a whole table for one seed first, and methods side by side in time."""
    runs = [(method, ratio, seed) for seed in plan.seeds for method, ratio in plan.cells()]
    return [
        Ask(run_name(*run), methodcaller("training", *run), dict(zip(("method", "ratio", "seed"), run, strict=True)))
        for run in runs
    ]


def run_name(method: str, ratio: float, seed: int) -> str:
    """By which a result says that a run is missing."""
    return f"{method}, r = {ratio:g}, seed {seed}"


def training_rows(plan: Plan, found: Found) -> list[Row]:
    """Every training run that is there.

    Each has its "method", "ratio", "seed", "device" and "history", and beside full-data training for the plan's epochs:
    "planned_share" and "examples_share" of its examples, and "time_ratio" to it on the same kind of device (None
    without one).
    """
    rows, epochs = [], plan.base.epochs
    for ask, file in found:
        row = {**ask.where, "device": file["device"], "history": (history := file["history"])}
        row["planned_share"] = round((1 - row["ratio"]) * len(history) / epochs, 6)
        row["examples_share"] = history[-1]["examples_trained"] / (file["data_set"]["train_examples"] * epochs)
        row["seconds"] = sum(entry["seconds"] for entry in history)
        rows.append(row)
    set_time_ratios(rows)
    return rows


def set_time_ratios(rows: list[Row]) -> None:
    """Set each run's "time_ratio" to full-data training on the same kind of device; None where there is none."""
    by_device = by_value(select(rows, method="full"), "device")
    full = {device: mean(r["seconds"] for r in own) for device, own in by_device.items()}
    for row in rows:
        row["time_ratio"] = row["seconds"] / full[row["device"]] if row["device"] in full else None
