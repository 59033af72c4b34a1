"""The training runs that several studies show, and how these name and order them."""

from __future__ import annotations

from typing import Any

from .. import report
from .figures import mean, seeds_text
from .runs import Runs
from .study import Files

# What every study's JSON says of a training run; see `training_runs`.
RUN = ("method", "ratio", "seed", "device", "planned_share", "examples_share", "seconds", "time_ratio")


def training_runs(runs: Runs, files: Files) -> list[dict[str, Any]]:
    """Every training run of the plan that there is.

    Each has its "method", "ratio", "seed", "device" and "history", and beside full-data training for the plan's epochs:
    "planned_share" and "examples_share" of its examples, and "time_ratio" to it on the same kind of device (None
    without one).
    """
    plan, rows = runs.plan, []
    for seed in plan.seeds:  # a whole table for one seed first, and methods side by side in time
        for method, ratio in plan.cells():
            file = files.take(runs.training(method, ratio, seed), run_name(method, ratio, seed))
            runs.display.advance()
            if file:
                history, count = file["history"], file["data_set"]["train_examples"]
                rows.append(
                    {
                        **{"method": method, "ratio": ratio, "seed": seed, "device": file["device"]},
                        "planned_share": round((1 - ratio) * len(history) / plan.base.epochs, 6),
                        "examples_share": history[-1]["examples_trained"] / (count * plan.base.epochs),
                        "seconds": sum(entry["seconds"] for entry in history),
                        "history": history,
                    }
                )
    set_time_ratios(rows)
    return rows


def run_name(method: str, ratio: float, seed: int) -> str:
    """By which a result says that a run is missing."""
    return f"{method}, r = {ratio:g}, seed {seed}"


def set_time_ratios(rows: list[dict[str, Any]]) -> None:
    """Set each run's "time_ratio" to full-data training on the same kind of device; None where there is none."""
    full: dict[str, list[float]] = {}
    for row in rows:
        if row["method"] == "full":
            full.setdefault(row["device"], []).append(row["seconds"])
    for row in rows:
        row["time_ratio"] = row["seconds"] / mean(full[row["device"]]) if row["device"] in full else None


def labels(result: dict[str, Any]) -> dict[str, str]:
    """The methods of a result by their names for tables and plots."""
    settings = result["settings"]
    return {method: report.label(method, settings["base"]["score"]) for method in settings["methods"]}


def by_ratio(result: dict[str, Any]) -> Any:
    """Sorts cells of method and ratio: ratio by ratio, the methods in the result's order."""
    methods = result["settings"]["methods"]
    return lambda cell: (cell[1], methods.index(cell[0]))


def counts_text(counts: set[int]) -> str:
    """What the bands are, where methods may have run with different numbers of seeds."""
    if len(counts) == 1:
        return seeds_text(next(iter(counts)))
    return f"mean and range of {min(counts)} to {max(counts)} seeds"
