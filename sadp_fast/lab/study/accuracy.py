"""Accuracy at the end of training, for every method and ratio, against full data and random pruning."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import report
from .figures import Table, legend_below, mean, one_line_each, panels, save, spread
from .plan import Plan
from .runs import Runs
from .study import Files, Study, title
from .training_runs import RUN, by_ratio, counts_text, labels, training_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        ends = [
            {
                **{key: row[key] for key in RUN},
                "test_accuracy": row["history"][-1]["test_accuracy"],
                "best_test_accuracy": max(entry["test_accuracy"] for entry in row["history"]),
                "examples": row["history"][-1]["examples_trained"],
            }
            for row in rows
        ]
        return {**files.header(self.name, runs.plan), "accuracies": ends}

    def plots(self, result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
        one = len(result["settings"]["ratios"]) == 1
        figure = _one_ratio(result) if one else _by_ratio(result)
        return [(save(figure, folder / "accuracy.png"), self.question)]

    def tables(self, result: dict[str, Any]) -> list[Table]:
        rows, names = result["accuracies"], labels(result)
        full = {r["seed"]: r for r in rows if r["method"] == "full"}
        random = {(r["planned_share"], r["seed"]): r for r in rows if r["method"] == "random"}
        lines = []
        for method, ratio in sorted({(r["method"], r["ratio"]) for r in rows}, key=by_ratio(result)):
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


def _one_ratio(result: dict[str, Any]) -> Figure:
    """Every method in a line of its own: each seed, their mean and range."""
    rows, names = result["accuracies"], labels(result)
    methods = [m for m in result["settings"]["methods"] if any(r["method"] == m for r in rows)]
    looks, counts, lines, timed = report.styles(result["settings"]["methods"]), set(), [], False
    for method in methods:
        own = [r for r in rows if r["method"] == method]
        values, colour = [100 * r["test_accuracy"] for r in own], looks[method]["color"]
        time = mean(r["time_ratio"] for r in own)
        beside = "" if method == "full" or math.isnan(time) else f"  (time {time:.2f})"
        timed |= bool(beside)
        lines.append((names[method] + beside, values, colour))
        counts.add(len(own))
    figure, panel = one_line_each(lines)
    full = [100 * r["test_accuracy"] for r in rows if r["method"] == "full"]
    if full:
        panel.axvspan(min(full), max(full), color=report.COLOURS["full"], alpha=0.12, linewidth=0)
    panel.set_xlabel("Test accuracy after the last epoch (%)")
    base, (ratio,) = result["settings"]["base"], result["settings"]["ratios"]
    heading = f"Accuracy after {base['epochs']} epochs at r = {ratio:g} (marks: seeds; {counts_text(counts)})"
    figure.suptitle("\n".join([heading, title(result)] + ["time: over that of full data"] * timed), fontsize=10)
    return figure


def _by_ratio(result: dict[str, Any]) -> Figure:
    """Accuracy over the share of examples left out, and over time where full data says what that is measured by."""
    rows, ratios = result["accuracies"], result["settings"]["ratios"]
    timed = any(r["time_ratio"] is not None for r in rows)
    figure, (by_share, *by_time) = panels(1, 1 + timed, 6 + 6 * timed, 5.6)
    names, looks = labels(result), report.styles(result["settings"]["methods"])
    full = [100 * r["test_accuracy"] for r in rows if r["method"] == "full"]
    if full:
        for panel in (by_share, *by_time):
            panel.axhspan(min(full), max(full), color=report.COLOURS["full"], alpha=0.12, linewidth=0)
            panel.axhline(mean(full), color=report.COLOURS["full"], linewidth=1.6, label=names["full"])
        for panel in by_time:
            panel.plot(1, mean(full), "o", color=report.COLOURS["full"])
    others = [m for m in result["settings"]["methods"] if any(r["method"] == m for r in rows) and m != "full"]
    counts = {len(full)} - {0}
    gaps = [b - a for a, b in pairwise(ratios)]
    tops: dict[float, tuple[float, float]] = {}  # the highest bar of each ratio, which the ratio is written over
    step = 0.2 * min(gaps, default=0.2) / max(1, len(others) - 1)  # side by side, so that no bar hides another
    for i, method in enumerate(others):
        look, offset = looks[method], step * (i - (len(others) - 1) / 2)
        for panel in (by_share, *by_time):
            points = []
            for ratio in sorted({r["ratio"] for r in rows if r["method"] == method}):
                own = [r for r in rows if r["method"] == method and r["ratio"] == ratio]
                share = 1 - own[0]["planned_share"] + offset
                x = share if panel is by_share else mean(r["time_ratio"] for r in own)
                if math.isnan(x):
                    continue
                counts.add(len(own))
                values = [100 * r["test_accuracy"] for r in own]
                points.append((x, mean(values)))
                panel.plot([x, x], [min(values), max(values)], color=look["color"], linewidth=2.5, alpha=0.5)
                if panel is not by_share and ratio > 0:
                    tops[ratio] = max(tops.get(ratio, (0.0, 0.0)), (max(values), x))
            if points:
                panel.plot(*zip(*points, strict=True), **look, label=names[method])
    accuracy = "Test accuracy after the last epoch (%)"
    by_share.set(xlabel="Share of full training's examples left out (r, for as many epochs)", ylabel=accuracy)
    by_share.set_xticks(ratios)
    for panel in by_time:
        panel.set(xlabel="Training time / that of full data (numbers: r)", ylabel=accuracy)
        for ratio, (top, x) in tops.items():
            panel.annotate(f"{ratio:g}", (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    legend_below(figure, by_share)
    epochs = result["settings"]["base"]["epochs"]
    figure.suptitle(f"Accuracy after {epochs} epochs (bars: {counts_text(counts)})\n{title(result)}")
    return figure
