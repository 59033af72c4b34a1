"""Accuracy and loss over training, against examples and against seconds.

Every method trains for the same number of epochs with the same batch size; a pruned epoch is shorter, and the learning
rate follows the share of a run's own examples that is done. Seconds hold everything that training and pruning do, but
not evaluation. The loss is the mean cross-entropy of the test examples, without label smoothing: the training loss,
which each method weighs in its own way, does not compare. Full data for fewer epochs is shown beside every ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

from ..figures import Row, Table, accuracy_scale, learning_curve, legend_below, mean, optional, panels
from . import study
from .plan import Plan

QUESTION = "How fast do accuracy and loss improve, per example seen and per second?"
asks = study.training_asks


def parts(plan: Plan, found: study.Found) -> dict[str, Any]:
    """Every epoch of every training run."""
    curves = []
    for row in study.training_rows(plan, found):
        run, seconds = {key: row[key] for key in ("method", "ratio", "seed")}, 0.0
        for entry in row["history"]:
            seconds += entry["seconds"]
            shown = {key: entry.get(key) for key in ("epoch", "test_accuracy", "test_loss")}
            curves.append({**run, **shown, "examples": entry["examples_trained"], "seconds": seconds})
    return {"curves": curves}


def draw(result: study.Result) -> study.Figures:
    """A figure for each ratio, full data in all of them."""
    figures, looks = [], study.looks(result)
    for ratio in result["settings"]["ratios"]:
        methods = study.by_method(result, [row for row in result["curves"] if row["ratio"] in (ratio, 0.0)])
        if not methods:
            continue
        figure, axes = panels(2, 2, 11, 7.6)
        for method, rows in methods.items():
            learning_curve((axes[0], axes[1]), rows, _percent, looks[method])
            learning_curve((axes[2], axes[3]), rows, itemgetter("test_loss"), looks[method])
        for above, below in zip(axes[:2], axes[2:], strict=True):
            accuracy_scale(above)
            below.set(yscale="log", ylabel="Test loss (log scale)")
        legend_below(figure, axes[0], "Final test accuracy")
        counts = study.seeds_text({len({row["seed"] for row in rows}) for rows in methods.values()})
        figure.suptitle(f"Convergence at r = {ratio:g} ({counts})\n{study.title(result)}")
        figures.append((f"-r{ratio:g}", figure))
    return figures


def _percent(row: Row) -> float:
    return 100 * row["test_accuracy"]


def tables(result: study.Result) -> list[Table]:
    """What each method takes to come within a point of full data."""
    rows = result["curves"]
    ends = {r["seed"]: r["test_accuracy"] for r in study.select(rows, method="full")}  # of each seed the last epoch
    if not ends:
        return []
    goal = min(ends.values()) - 0.01

    def seeds(cell: study.Cell) -> set[int]:
        return {row["seed"] for row in cell.rows}

    def reached(cell: study.Cell) -> list[Row]:
        """Of each seed the first epoch that did."""
        first = {r["seed"]: r for r in reversed(cell.rows) if r["test_accuracy"] >= goal}
        return list(first.values())

    columns: dict[str, Callable[[study.Cell], str]] = {
        "method": lambda cell: cell.label,
        "r": lambda cell: f"{cell.ratio:g}",
        "seeds that did": lambda cell: f"{len(reached(cell))} of {len(seeds(cell))}",
        "examples seen": lambda cell: f"{mean(r['examples'] for r in reached(cell)):,.0f}".replace("nan", "-"),
        "seconds": lambda cell: optional(mean(r["seconds"] for r in reached(cell)), 1),
    }
    heading = f"What it takes to reach {100 * goal:.1f} % test accuracy for the first time"
    note = "The goal: one point below the worst seed of full-data training. Means over the seeds that reached it."
    return [Table.of(heading, study.by_cell(result, rows), columns, note)]
