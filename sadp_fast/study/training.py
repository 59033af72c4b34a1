"""What pruning does to accuracy: over training, and at its end for every ratio."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import report
from .plan import Plan, Runs
from .present import Table, band, known, mean, method_style, panels, save, seeds_text, spread, thousands
from .study import Files, Study, title


def method_label(result: dict[str, Any], method: str) -> str:
    """A method's name as tables and plots show it."""
    return report.LABELS.get(method, f"SADP ({result['settings']['base']['score']})")


def training_runs(runs: Runs, files: Files) -> list[dict[str, Any]]:
    """Every training run of the plan that there is: its "method", "ratio", "seed", "device" and "history"."""
    rows = []
    for seed in runs.plan.seeds:  # a whole table for one seed first, and methods side by side in time
        for method, ratio in runs.plan.cells():
            name = f"{method}, r = {ratio:g}, seed {seed}"
            file = files.take(runs.training(method, ratio, seed), name)
            runs.display.advance()
            if file:
                row = {"method": method, "ratio": ratio, "seed": seed, "device": file["device"]}
                rows.append({**row, "history": file["history"]})
    return rows


class Convergence(Study):
    name = "convergence"
    paper = "Fig. 1c"
    question = "How fast do accuracy and loss improve, per example seen and per second?"
    reading = (
        "Every method trains for the same number of epochs with the same batch size; a pruned epoch is shorter, and "
        "the learning rate follows the share of a run's own examples that is done. Seconds hold everything that "
        "training and pruning do, but not evaluation. The training loss is the mean over an epoch of what was trained "
        "on, with augmentation and with each method's own weights: for methods without weights (ε-greedy), or whose "
        "weights have another mean (InfoBatch), it is not the loss of the data set, and does not compare."
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
                point = {key: entry[key] for key in ("epoch", "test_accuracy", "loss")}
                curves.append(
                    {
                        **{key: row[key] for key in ("method", "ratio", "seed")},
                        **point,
                        "examples": entry["examples_trained"],
                        "seconds": seconds,
                    }
                )
        return {**files.header(self.name, runs.plan), "curves": curves}

    def plots(self, result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
        written = []
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
                style = {**method_style(method), "marker": None}
                for row, key, scale in ((0, "test_accuracy", 100), (1, "loss", 1)):
                    by_seed = [[scale * table[seed, epoch][key] for epoch in epochs] for seed in seeds]
                    end = mean(values[-1] for values in by_seed)
                    name = f"{method_label(result, method)}: {end:.1f} %" if row == 0 else None
                    for column, x in ((0, "examples"), (1, "seconds")):
                        at = [mean(table[seed, epoch][x] for seed in seeds) for epoch in epochs]
                        band(axes[2 * row + column], at, by_seed, {**style, "label": name})
                        axes[2 * row + column].plot(at[-1], end, style_marker(method), color=style["color"], ms=5)
            if not counts:
                continue
            _limits(axes)
            handles = axes[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False, title="Final test accuracy")
            figure.suptitle(f"Convergence at r = {ratio:g} ({_counts(counts)})\n{title(result)}")
            path = save(figure, folder / f"convergence-r{ratio:g}.png")
            written.append((path, f"Convergence with a share of {ratio:g} of the examples left out."))
        return written

    def tables(self, result: dict[str, Any]) -> list[Table]:
        rows = result["curves"]
        full = {r["seed"]: r for r in rows if r["method"] == "full" and r["epoch"] == max(x["epoch"] for x in rows)}
        if not full:
            return []
        goal = min(r["test_accuracy"] for r in full.values()) - 0.01
        lines = []
        for method, ratio in sorted({(r["method"], r["ratio"]) for r in rows}, key=_order(result)):
            own = [r for r in rows if (r["method"], r["ratio"]) == (method, ratio)]
            seeds = sorted({r["seed"] for r in own})
            first = [next((r for r in own if r["seed"] == s and r["test_accuracy"] >= goal), None) for s in seeds]
            reached = known_rows(first)
            lines.append(
                (
                    method_label(result, method),
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
        "Test accuracy after the last epoch (not the best epoch). The same number of epochs for every method; r is the "
        "mean share of examples left out over all epochs, full-data epochs included. Differences are between runs of "
        "the same seed, which share their first weights; ± is the standard deviation over seeds."
    )

    def requests(self, plan: Plan) -> int:
        return len(plan.cells()) * len(plan.seeds)

    def collect(self, runs: Runs) -> dict[str, Any]:
        files = Files()
        rows = training_runs(runs, files)
        ends = [
            {
                **{key: row[key] for key in ("method", "ratio", "seed", "device")},
                "test_accuracy": row["history"][-1]["test_accuracy"],
                "best_test_accuracy": max(entry["test_accuracy"] for entry in row["history"]),
                "examples": row["history"][-1]["examples_trained"],
                "seconds": sum(entry["seconds"] for entry in row["history"]),
            }
            for row in rows
        ]
        return {**files.header(self.name, runs.plan), "accuracies": ends}

    def plots(self, result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
        figure, (by_ratio, by_time) = panels(1, 2, 12, 5.2)
        rows, ratios = result["accuracies"], result["settings"]["ratios"]
        full = [100 * r["test_accuracy"] for r in rows if r["method"] == "full"]
        full_seconds = mean(r["seconds"] for r in rows if r["method"] == "full")
        if full:
            for panel in (by_ratio, by_time):
                panel.axhspan(min(full), max(full), color=report.COLOURS["full"], alpha=0.12, linewidth=0)
                panel.axhline(mean(full), color=report.COLOURS["full"], linewidth=1.6, label="full data")
        pruned = [m for m in result["settings"]["methods"] if any(r["method"] == m for r in rows) and m != "full"]
        counts = {len({r["seed"] for r in rows if r["method"] == "full"})} - {0}
        gaps = [b - a for a, b in pairwise(ratios)]
        step = 0.2 * min(gaps, default=0.2) / max(1, len(pruned) - 1)  # side by side, so that no bar hides another
        for i, method in enumerate(pruned):
            style, offset = method_style(method), step * (i - (len(pruned) - 1) / 2)
            for panel in (by_ratio, by_time):
                places, heights = [], []
                for ratio in ratios:
                    own = [r for r in rows if r["method"] == method and r["ratio"] == ratio]
                    if not own or (panel is by_time and not full):
                        continue
                    counts.add(len(own))
                    values = [100 * r["test_accuracy"] for r in own]
                    x = ratio + offset if panel is by_ratio else mean(r["seconds"] for r in own) / full_seconds
                    places.append(x)
                    heights.append(mean(values))
                    panel.plot([x, x], [min(values), max(values)], color=style["color"], linewidth=2.5, alpha=0.5)
                    if panel is by_time:
                        panel.annotate(f"{ratio:g}", (x, mean(values)), (4, 4), textcoords="offset points", fontsize=7)
                if places:
                    panel.plot(places, heights, **style, label=method_label(result, method))
        by_ratio.set(xlabel="Pruning ratio r (share left out)", ylabel="Test accuracy after the last epoch (%)")
        by_ratio.set_xticks(ratios)
        if full:
            by_time.plot(1, mean(full), "o", color=report.COLOURS["full"])
        by_time.set(
            xlabel="Training time / that of full data (numbers: r)", ylabel="Test accuracy after the last epoch (%)"
        )
        by_ratio.legend(loc="lower left", frameon=False, fontsize=9)
        figure.suptitle(
            f"Accuracy after {result['settings']['base']['epochs']} epochs (bars: {_counts(counts)})\n{title(result)}"
        )
        return [(save(figure, folder / "accuracy.png"), self.question)]

    def tables(self, result: dict[str, Any]) -> list[Table]:
        rows = result["accuracies"]
        full = {r["seed"]: r for r in rows if r["method"] == "full"}
        random = {(r["ratio"], r["seed"]): r for r in rows if r["method"] == "random"}
        lines = []
        for method, ratio in sorted({(r["method"], r["ratio"]) for r in rows}, key=_order(result)):
            own = [r for r in rows if (r["method"], r["ratio"]) == (method, ratio)]
            accuracy = [r["test_accuracy"] for r in own]
            to_full = [r["test_accuracy"] - full[r["seed"]]["test_accuracy"] for r in own if r["seed"] in full]
            to_random = [
                r["test_accuracy"] - random[ratio, r["seed"]]["test_accuracy"]
                for r in own
                if (ratio, r["seed"]) in random
            ]
            lines.append(
                (
                    method_label(result, method),
                    f"{ratio:g}",
                    str(len(own)),
                    spread(accuracy, 2, 100),
                    spread(to_full, 2, 100) if method != "full" else "-",
                    spread(to_random, 2, 100) if method not in ("full", "random") else "-",
                    f"{mean(r['examples'] for r in own):,.0f}",
                    spread((r["seconds"] for r in own), 1),
                )
            )
        return [
            Table(
                "Test accuracy after the last epoch",
                ("method", "r", "seeds", "accuracy (%)", "to full data", "to random", "examples seen", "seconds"),
                lines,
                "Differences in points, between runs of the same seed. ± is the standard deviation over the seeds.",
            )
        ]


def style_marker(method: str) -> str:
    """The marker of a method's style."""
    return str(method_style(method)["marker"])


def known_rows(rows: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Those that there are."""
    return [row for row in rows if row is not None]


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
            panel.set(yscale="log", ylabel="Training loss (log scale)")
