"""Accuracy at the end of training, for every method and ratio, against full data and random pruning.

Test accuracy after the last epoch (not the best epoch). As many epochs for every method whose name gives no other; r is
the mean share of examples left out over all epochs, full-data epochs included. Full data for fewer epochs stands at the
share of a full training's examples that it leaves out. Differences are between runs of the same seed, which share their
first weights; those to random are to dynamic random that trains as many examples. ± is the standard deviation over
seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ..figures import Row, Table, by_value, legend_below, mean, one_line_each, panels, ranges, spread
from ..methods import METHODS
from . import study
from .plan import Plan

QUESTION = "What accuracy is left at the end of training, for how much less time?"
FULL = METHODS["full"].colour
asks = study.training_asks


def parts(plan: Plan, found: study.Found) -> dict[str, Any]:
    """How every training run ended."""
    rows = []
    for row in study.training_rows(plan, found):
        last, best = row["history"][-1], max(entry["test_accuracy"] for entry in row["history"])
        end = {"test_accuracy": last["test_accuracy"], "best_test_accuracy": best, "examples": last["examples_trained"]}
        rows.append({**{key: row[key] for key in study.RUN}, **end})
    return {"accuracies": rows}


def tables(result: study.Result) -> list[Table]:
    """Accuracies, what they are beside full data's and random pruning's, examples and time."""
    rows = result["accuracies"]
    full = {r["seed"]: r for r in study.select(rows, method="full")}
    random = {(r["planned_share"], r["seed"]): r for r in study.select(rows, method="random")}

    def gap(cell: study.Cell, reference: str, of: Callable[[Row], Row | None]) -> str:
        pairs = [(row, of(row)) for row in cell.rows if cell.method != reference]
        return spread((a["test_accuracy"] - b["test_accuracy"] for a, b in pairs if b), 2, 100)

    columns: dict[str, Callable[[study.Cell], str]] = {
        "method": lambda cell: cell.label,
        "r": lambda cell: f"{cell.ratio:g}",
        "seeds": lambda cell: str(len(cell.rows)),
        "accuracy (%)": lambda cell: spread((r["test_accuracy"] for r in cell.rows), 2, 100),
        "to full data": lambda cell: gap(cell, "full", lambda r: full.get(r["seed"])),
        "to random": lambda cell: gap(cell, "random", lambda r: random.get((r["planned_share"], r["seed"]))),
        "examples / full data": lambda cell: f"{mean(r['examples_share'] for r in cell.rows):.3f}",
        "seconds": lambda cell: spread((r["seconds"] for r in cell.rows), 1),
        "time / full data": lambda cell: spread((r["time_ratio"] for r in cell.rows), 3),
    }
    note = (
        "Differences in points, between runs of the same seed; to random: to dynamic random with as many examples. ± "
        "is the standard deviation over the seeds."
    )
    return [Table.of("Test accuracy after the last epoch", study.by_cell(result, rows), columns, note)]


def draw(result: study.Result) -> study.Figures:
    """Of one ratio a line for each method, of several a curve over them."""
    return _one_ratio(result) if len(result["settings"]["ratios"]) == 1 else _by_ratio(result)


def _percent(rows: list[Row]) -> list[float]:
    return [100 * row["test_accuracy"] for row in rows]


def _one_ratio(result: study.Result) -> study.Figures:
    """Every method in a line of its own: each seed, their mean and range."""
    methods, looks = study.by_method(result, result["accuracies"]), study.looks(result)
    times = {m: mean(r["time_ratio"] for r in own) for m, own in methods.items() if m != "full"}
    beside = {m: f"  (time {time:.2f})" for m, time in times.items() if not math.isnan(time)}
    figure, panel = one_line_each(
        [(looks[m]["label"] + beside.get(m, ""), _percent(own), looks[m]["color"]) for m, own in methods.items()]
    )
    full = _percent(methods.get("full", []))
    if full:
        panel.axvspan(min(full), max(full), color=FULL, alpha=0.12, linewidth=0)
    panel.set_xlabel("Test accuracy after the last epoch (%)")
    base, (ratio,) = result["settings"]["base"], result["settings"]["ratios"]
    counts = study.seeds_text({len(own) for own in methods.values()})
    heading = f"Accuracy after {base['epochs']} epochs at r = {ratio:g} (marks: seeds; {counts})"
    note = ["time: over that of full data"] if beside else []
    figure.suptitle("\n".join([heading, study.title(result), *note]), fontsize=10)
    return [("", figure)]


def _by_ratio(result: study.Result) -> study.Figures:
    """Accuracy over the share of examples left out, and over time where full data says what that is measured by."""
    rows, ratios = result["accuracies"], result["settings"]["ratios"]
    timed = any(row["time_ratio"] is not None for row in rows)
    figure, (by_share, *by_time) = panels(1, 1 + timed, 6 + 6 * timed, 5.6)
    others, looks = study.by_method(result, rows), study.looks(result)
    full = _percent(others.pop("full", []))
    for panel in (by_share, *by_time) if full else ():
        panel.axhspan(min(full), max(full), color=FULL, alpha=0.12, linewidth=0)
        panel.axhline(mean(full), color=FULL, linewidth=1.6, label=looks["full"]["label"])
    for panel in by_time if full else ():
        panel.plot(1, mean(full), "o", color=FULL)
    counts = {len(full)} - {0}
    gaps = [b - a for a, b in pairwise(ratios)]
    step = 0.2 * min(gaps, default=0.2) / max(1, len(others) - 1)  # side by side, so that no bar hides another
    tops: dict[float, tuple[float, float]] = {}  # the highest bar of each ratio, which the ratio is written over
    for i, (method, own) in enumerate(others.items()):
        look, offset = looks[method], step * (i - (len(others) - 1) / 2)
        cells = by_value(own, "ratio").items()
        counts |= {len(at) for _, at in cells}
        ranges(by_share, [(1 - at[0]["planned_share"] + offset, _percent(at)) for _, at in cells], look)
        times = [(ratio, mean(r["time_ratio"] for r in at), _percent(at)) for ratio, at in cells]
        times = [point for point in times if not math.isnan(point[1])]
        for panel in by_time:
            ranges(panel, [(time, values) for _, time, values in times], look)
        for ratio, time, values in times:
            tops[ratio] = max(tops.get(ratio, (0.0, 0.0)), (max(values), time))
    accuracy = "Test accuracy after the last epoch (%)"
    by_share.set(xlabel="Share of full training's examples left out (r, for as many epochs)", ylabel=accuracy)
    by_share.set_xticks(ratios)
    for panel in by_time:
        panel.set(xlabel="Training time / that of full data (numbers: r)", ylabel=accuracy)
        for ratio, (top, time) in tops.items():
            if ratio > 0:
                panel.annotate(f"{ratio:g}", (time, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    legend_below(figure, by_share)
    epochs = result["settings"]["base"]["epochs"]
    figure.suptitle(f"Accuracy after {epochs} epochs (bars: {study.seeds_text(counts)})\n{study.title(result)}")
    return [("", figure)]
