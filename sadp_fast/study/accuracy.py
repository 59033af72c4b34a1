"""What pruning does to accuracy: over training, and at its end for every ratio."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import report
from .figures import Table, band, known, legend_below, mean, panels, save, seeds_text, spread, thousands
from .plan import Plan
from .runs import Runs
from .study import Files, Study, title


def training_runs(runs: Runs, files: Files) -> list[dict[str, Any]]:
    """Every training run of the plan that there is.

    Each has its "method", "ratio", "seed", "device" and "history", and beside full-data training for the plan's epochs:
    "planned_share" and "examples_share" of its examples, and "time_ratio" to it on the same kind of device (None
    without one).
    """
    plan, rows = runs.plan, []
    for seed in plan.seeds:  # a whole table for one seed first, and methods side by side in time
        for method, ratio in plan.cells():
            name = f"{method}, r = {ratio:g}, seed {seed}"
            file = files.take(runs.training(method, ratio, seed), name)
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
    full: dict[str, list[float]] = {}
    for row in rows:
        if row["method"] == "full":
            full.setdefault(row["device"], []).append(row["seconds"])
    for row in rows:
        row["time_ratio"] = row["seconds"] / mean(full[row["device"]]) if row["device"] in full else None
    return rows


def labels(result: dict[str, Any]) -> dict[str, str]:
    """The methods of a result by their names for tables and plots."""
    settings = result["settings"]
    return {method: report.label(method, settings["base"]["score"]) for method in settings["methods"]}


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
            figure.suptitle(f"Convergence at r = {ratio:g} ({_counts(counts)})\n{title(result)}")
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
        for method, ratio in sorted({(r["method"], r["ratio"]) for r in rows}, key=_order(result)):
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


class Accuracy(Study):
    name = "accuracy"
    paper = "Fig. 1d"
    question = "What accuracy is left at the end of training, for how much less time?"
    reading = (
        "Test accuracy after the last epoch (not the best epoch). As many epochs for every method whose name "
        "gives no other; r is the mean share of examples left out over all epochs, full-data epochs included. Full "
        "data for fewer epochs stands at the share of a full training's examples that it leaves out. Differences are "
        "between runs of the same seed, which share their first weights; those to random are to dynamic random that "
        "trains as many examples. ± is the standard deviation over seeds."
    )

    def requests(self, plan: Plan) -> int:
        return len(plan.cells()) * len(plan.seeds)

    def collect(self, runs: Runs) -> dict[str, Any]:
        files = Files()
        rows = training_runs(runs, files)
        kept = ("method", "ratio", "seed", "device", "planned_share", "examples_share", "seconds", "time_ratio")
        ends = [
            {
                **{key: row[key] for key in kept},
                "test_accuracy": row["history"][-1]["test_accuracy"],
                "best_test_accuracy": max(entry["test_accuracy"] for entry in row["history"]),
                "examples": row["history"][-1]["examples_trained"],
            }
            for row in rows
        ]
        return {**files.header(self.name, runs.plan), "accuracies": ends}

    def plots(self, result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
        figure, (by_share, by_time) = panels(1, 2, 12, 5.6)
        rows, ratios = result["accuracies"], result["settings"]["ratios"]
        names, looks = labels(result), report.styles(result["settings"]["methods"])
        full = [100 * r["test_accuracy"] for r in rows if r["method"] == "full"]
        if full:
            for panel in (by_share, by_time):
                panel.axhspan(min(full), max(full), color=report.COLOURS["full"], alpha=0.12, linewidth=0)
                panel.axhline(mean(full), color=report.COLOURS["full"], linewidth=1.6, label=names["full"])
            by_time.plot(1, mean(full), "o", color=report.COLOURS["full"])
        others = [m for m in result["settings"]["methods"] if any(r["method"] == m for r in rows) and m != "full"]
        counts = {len(full)} - {0}
        gaps = [b - a for a, b in pairwise(ratios)]
        step = 0.2 * min(gaps, default=0.2) / max(1, len(others) - 1)  # side by side, so that no bar hides another
        for i, method in enumerate(others):
            look, offset = looks[method], step * (i - (len(others) - 1) / 2)
            for panel in (by_share, by_time):
                points = []
                for ratio in sorted({r["ratio"] for r in rows if r["method"] == method}):
                    own = [r for r in rows if r["method"] == method and r["ratio"] == ratio]
                    if panel is by_share:
                        x = 1 - own[0]["planned_share"] + offset
                    else:
                        x = mean(r["time_ratio"] for r in own)
                    if math.isnan(x):
                        continue
                    counts.add(len(own))
                    values = [100 * r["test_accuracy"] for r in own]
                    points.append((x, mean(values)))
                    panel.plot([x, x], [min(values), max(values)], color=look["color"], linewidth=2.5, alpha=0.5)
                    if panel is by_time and ratio > 0:
                        panel.annotate(f"{ratio:g}", points[-1], (4, 4), textcoords="offset points", fontsize=7)
                if points:
                    panel.plot(*zip(*points, strict=True), **look, label=names[method])
        accuracy = "Test accuracy after the last epoch (%)"
        by_share.set(xlabel="Share of full training's examples left out (r, for as many epochs)", ylabel=accuracy)
        by_share.set_xticks(ratios)
        by_time.set(xlabel="Training time / that of full data (numbers: r)", ylabel=accuracy)
        legend_below(figure, by_share)
        figure.suptitle(
            f"Accuracy after {result['settings']['base']['epochs']} epochs (bars: {_counts(counts)})\n{title(result)}"
        )
        return [(save(figure, folder / "accuracy.png"), self.question)]

    def tables(self, result: dict[str, Any]) -> list[Table]:
        rows, names = result["accuracies"], labels(result)
        full = {r["seed"]: r for r in rows if r["method"] == "full"}
        random = {(r["planned_share"], r["seed"]): r for r in rows if r["method"] == "random"}
        lines = []
        for method, ratio in sorted({(r["method"], r["ratio"]) for r in rows}, key=_order(result)):
            own = [r for r in rows if (r["method"], r["ratio"]) == (method, ratio)]

            def gap(references: list[dict[str, Any] | None], own: list[dict[str, Any]] = own) -> str:
                pairs = zip(own, references, strict=True)
                return spread((a["test_accuracy"] - b["test_accuracy"] for a, b in pairs if b), 2, 100)

            to_random = [random.get((r["planned_share"], r["seed"])) for r in own]
            lines.append(
                (
                    names[method],
                    f"{ratio:g}",
                    str(len(own)),
                    spread((r["test_accuracy"] for r in own), 2, 100),
                    gap([full.get(r["seed"]) for r in own]) if method != "full" else "-",
                    gap(to_random) if method != "random" else "-",
                    f"{mean(r['examples_share'] for r in own):.3f}",
                    spread((r["seconds"] for r in own), 1),
                    spread((r["time_ratio"] for r in own), 3),
                )
            )
        return [
            Table(
                "Test accuracy after the last epoch",
                (
                    *("method", "r", "seeds", "accuracy (%)", "to full data", "to random"),
                    *("examples / full data", "seconds", "time / full data"),
                ),
                lines,
                "Differences in points, between runs of the same seed; to random: to dynamic random with as many "
                "examples. ± is the standard deviation over the seeds.",
            )
        ]


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value


def _order(result: dict[str, Any]) -> Any:
    methods = result["settings"]["methods"]
    return lambda cell: (cell[1], methods.index(cell[0]))


def _counts(counts: set[int]) -> str:
    """What the bands are, where methods may have run with different numbers of seeds."""
    if len(counts) == 1:
        return seeds_text(next(iter(counts)))
    return f"mean and range of {min(counts)} to {max(counts)} seeds"


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
