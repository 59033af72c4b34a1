"""Accuracy and loss over training, against examples and against seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import report
from .figures import Table, band, known, legend_below, mean, panels, save, thousands
from .plan import Plan
from .runs import Runs
from .study import Files, Study, title
from .training_runs import by_ratio, counts_text, labels, training_runs


class Convergence(Study):
    name = "convergence"
    paper = "Fig. 1c"
    question = "How fast do accuracy and loss improve, per example seen and per second?"
    reading = (
        "Every method trains for the same number of epochs with the same batch size; a pruned epoch is shorter, and "
        "the learning rate follows the share of a run's own examples that is done. Seconds hold everything that "
        "training and pruning do, but not evaluation. The loss is the mean cross-entropy of the test examples, without "
        "label smoothing: the training loss, which each method weighs in its own way, does not compare. Full data for "
        "fewer epochs is shown beside every ratio."
    )

    def requests(self, plan: Plan) -> int:
        return len(plan.cells()) * len(plan.seeds)

    def collect(self, runs: Runs) -> dict[str, Any]:
        files = Files()
        rows = training_runs(runs, files)
        curves = []
        for row in rows:
            seconds = 0.0
            for entry in row["history"]:
                seconds += entry["seconds"]
                curves.append(
                    {
                        **{key: row[key] for key in ("method", "ratio", "seed")},
                        **{key: entry.get(key) for key in ("epoch", "test_accuracy", "test_loss")},
                        "examples": entry["examples_trained"],
                        "seconds": seconds,
                    }
                )
        return {**files.header(self.name, runs.plan), "curves": curves}

    def plots(self, result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
        written, names, looks = [], labels(result), report.styles(result["settings"]["methods"])
        for ratio in result["settings"]["ratios"]:
            figure, axes = panels(2, 2, 11, 7.6)
            counts = set()
            for method in result["settings"]["methods"]:
                rows = [r for r in result["curves"] if r["method"] == method and r["ratio"] in (ratio, 0.0)]
                if not rows:
                    continue
                seeds, epochs = sorted({r["seed"] for r in rows}), sorted({r["epoch"] for r in rows})
                counts.add(len(seeds))
                table = {(r["seed"], r["epoch"]): r for r in rows}
                look = {**looks[method], "marker": None}
                for row, key, scale in ((0, "test_accuracy", 100), (1, "test_loss", 1)):
                    by_seed = [[_scaled(table[seed, epoch][key], scale) for epoch in epochs] for seed in seeds]
                    end = mean(values[-1] for values in by_seed)
                    name = f"{names[method]}: {end:.1f} %" if row == 0 else None
                    for panel, x in zip(axes[2 * row :], ("examples", "seconds"), strict=False):
                        at = [mean(table[seed, epoch][x] for seed in seeds) for epoch in epochs]
                        band(panel, at, by_seed, {**look, "label": name})
                        panel.plot(at[-1], end, looks[method]["marker"], color=look["color"], markersize=5)
            if not counts:
                continue
            _limits(axes)
            legend_below(figure, axes[0], "Final test accuracy")
            figure.suptitle(f"Convergence at r = {ratio:g} ({counts_text(counts)})\n{title(result)}")
            path = save(figure, folder / f"convergence-r{ratio:g}.png")
            written.append((path, f"Convergence with a share of {ratio:g} of the examples left out."))
        return written

    def tables(self, result: dict[str, Any]) -> list[Table]:
        rows = result["curves"]
        ends = {r["seed"]: r["test_accuracy"] for r in rows if r["method"] == "full"}  # of each seed the last epoch
        if not ends:
            return []
        goal = min(ends.values()) - 0.01
        lines, names = [], labels(result)
        for method, ratio in sorted({(r["method"], r["ratio"]) for r in rows}, key=by_ratio(result)):
            own = [r for r in rows if (r["method"], r["ratio"]) == (method, ratio)]
            seeds = sorted({r["seed"] for r in own})
            first = [next((r for r in own if r["seed"] == s and r["test_accuracy"] >= goal), None) for s in seeds]
            reached = [row for row in first if row]
            lines.append(
                (
                    names[method],
                    f"{ratio:g}",
                    f"{len(reached)} of {len(seeds)}",
                    f"{mean(r['examples'] for r in reached):,.0f}" if reached else "-",
                    f"{mean(r['seconds'] for r in reached):.1f}" if reached else "-",
                )
            )
        return [
            Table(
                f"What it takes to reach {100 * goal:.1f} % test accuracy for the first time",
                ("method", "r", "seeds that did", "examples seen", "seconds"),
                lines,
                "The goal: one point below the worst seed of full-data training. Means over the seeds that reached it.",
            )
        ]


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value


def _limits(axes: list[Any]) -> None:
    """Labels, and a scale of accuracy that the first eighth of training does not stretch."""
    for i, panel in enumerate(axes):
        panel.set(ylabel="Test accuracy (%)", xlim=(0, None))
        panel.set_xlabel("Training time (s)" if i % 2 else "Examples seen")
        if not i % 2:
            thousands(panel)
        if i < 2:
            settled = [y for line in panel.lines for y in known(line.get_ydata())[len(line.get_ydata()) // 8 :]]
            panel.set_ylim(max(0.0, min(settled) - 1.5), min(100.5, max(settled) + 1))
        else:
            panel.set(yscale="log", ylabel="Test loss (log scale)")
