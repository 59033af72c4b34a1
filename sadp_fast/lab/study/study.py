"""What every study is: runs in, a result for JSON out, and that result as plots and tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..data import described, differ
from .figures import Table
from .plan import Plan
from .runs import Runs
from .store import StudyError


class NothingFinished(StudyError):
    """There is no finished run to show."""


@dataclass
class Files:
    """The run files that a result is made of, each behind its name, and the names of those that are not there."""

    found: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def take(self, file: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
        """Remember the file, or that it is missing."""
        if file is None:
            self.missing.append(name)
        else:
            self.found.append((name, file))
        return file

    def header(self, study: str, plan: Plan) -> dict[str, Any]:
        """What every result begins with; raises NothingFinished, and StudyError for files of different data sets."""
        if not self.found:
            raise NothingFinished(f"{plan.folder} holds no finished run for the study {study}: leave --report-only out")
        where = [{key: file[key] for key in ("device", "versions")} for _, file in self.found]
        return {
            "study": study,
            "data_set": self._data_set(),
            "settings": {
                "base": {
                    key: value
                    for key, value in asdict(plan.base).items()
                    if key not in ("method", "prune_ratio", "seed", "device")
                },
                "methods": list(plan.methods),
                "ratios": list(plan.ratios),
                "seeds": list(plan.seeds),
                "size": asdict(plan.size),
            },
            "environments": each_once(where),
            "missing_runs": self.missing,
        }

    def _data_set(self) -> dict[str, Any]:
        """What the files know of their data set, all together."""
        runs: list[tuple[str, dict[str, Any]]] = []  # one of each
        for name, file in self.found:
            if not any(file["data_set"] == known for _, known in runs):
                runs.append((name, file["data_set"]))
        for (name, one), (other_name, other) in combinations(runs, 2):
            if differ(one, other):
                raise StudyError(
                    f"the runs are of different data sets, '{name}' of one ({described(one)}) and '{other_name}' of "
                    f"another ({described(other)}): keep those of each in a folder of their own"
                )
        return {key: value for _, known in runs for key, value in known.items()}


def each_once(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries in their order, equal ones once."""
    return [entry for i, entry in enumerate(entries) if entry not in entries[:i]]


class Study:
    """One result of the paper."""

    name: str
    paper: str  # the figure that it reproduces
    question: str
    reading: str  # how to read plots and tables, and what they cannot say
    trains_cells = True  # whether it trains every method at every ratio of the plan

    def requests(self, plan: Plan) -> int:
        """How many runs it asks for."""
        raise NotImplementedError

    def collect(self, runs: Runs) -> dict[str, Any]:
        """Run what is not there yet; the result, ready for JSON."""
        raise NotImplementedError

    def plots(self, result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
        """Write PNGs; each with a caption."""
        raise NotImplementedError

    def tables(self, result: dict[str, Any]) -> list[Table]:
        """The figures behind the plots."""
        raise NotImplementedError


# How a figure's head names a regularisation of all its runs; one that is the default goes without saying.
REGULARISATION = {
    "weight_decay": "weight decay {:g}",
    "label_smoothing": "label smoothing {:g}",
    "augment": "augmentation {}",
    "cutout": "cutout {:g} pixels",
    "mixup": "mixup {:g}",
}


def measured_examples(result: dict[str, Any]) -> int:
    """Of how many training examples gradient norms were taken: the data set may have fewer than were asked for."""
    return min(result["settings"]["size"]["examples"], result["data_set"]["train_examples"])


def title(result: dict[str, Any]) -> str:
    """Data set, network, T, regularisation and device, for a figure's head."""
    base = result["settings"]["base"]
    plain = asdict(TrainConfig())
    said = [
        text.format(base[name]) for name, text in REGULARISATION.items() if base.get(name, plain[name]) != plain[name]
    ]
    devices = sorted({entry["device"] for entry in result["environments"]})
    what = [result["data_set"]["name"], base["model"], f"T = {base['time_steps']}", *said]
    return f"{', '.join(what)} ({', '.join(devices)})"
