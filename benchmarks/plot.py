"""Draw a run's results: python benchmarks/plot.py RESULTS.json OUT.png

Left: every bandwidth-bound measure as the bandwidth that its floor's bytes were moved with, beside the copy bandwidth
of the same run: the roof, since no byte is read or written faster than by a copy. Right: time and memory of a step.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]

OURS = "#c1272d"
OURS_WITH_STATISTICS = ("#f28e2b", "D")
OURS_OTHERWISE = (("#e377c2", "P"), ("#9467bd", "H"))  # beside the first of a measure
PEERS = (  # colour and marker of the first, the second, ...
    ("#1f4e79", "s"),
    ("#4f8fc0", "v"),
    ("#6b8e23", "^"),
    ("#808080", "<"),
    ("#17a2a2", ">"),
    ("#9c7a3c", "p"),
    ("#000000", "X"),
    ("#6a3d9a", "*"),
    ("#5b8c5a", "d"),
    ("#c46a9a", "h"),
    ("#3d5a80", "8"),
)
STEP = "SEW-ResNet18 training step"
STEP_MEMORY = "its peak memory"
NORM = "its BatchNorm + LIF work"  # caches help it within the step, so that a share of copy speed says little
# Not drawn: recorded calls (the device's time is beside them) and sizes at which a launch, not memory, is the limit.
UNDRAWN = ("graph replay", "N = 50,000")
LABELS = (("LIF forward + backward", "LIF"), (", wall time", ", with the host"), (", device time", ", device alone"))


def bandwidth_rows(rows: list[Row]) -> list[Row]:
    """Rows of ours and of peers whose time and bytes are known, and which memory can limit."""
    return [
        row
        for row in rows
        if row["role"] in ("ours", "peer")
        and row.get("unit") == "s"
        and "moved_bytes" in row
        and not row.get("detail")
        and row["measure"] != NORM
        and not any(words in row["measure"] for words in UNDRAWN)
    ]


def step_rows(rows: list[Row], measure: str) -> list[Row]:
    """A step's rows: ours recorded and plainly eager; peers by time, so that both panels have one order."""
    found = [r for r in rows if r["measure"] == measure and "value" in r and r["role"] in ("ours", "peer")]
    shown = [r for r in found if "graph" in r["implementation"] or r["implementation"] == "eager"]
    ours = [r for r in shown if r["role"] == "ours"]
    times = {r["implementation"]: r["value"] for r in rows if r["measure"] == STEP and "value" in r}
    peers = sorted((r for r in found if r["role"] == "peer"), key=lambda r: times.get(r["implementation"], 0.0))
    return ours + peers


def bandwidth(row: Row) -> float:
    """GB/s at which the bytes of the floor were moved."""
    return row["moved_bytes"] / row["value"] / 1e9


def style(row: Row, rows: list[Row]) -> tuple[str, str, str]:
    """Label, colour and marker: ours by kind (the first of a measure, with statistics, other), peers by name."""
    if row["role"] == "ours":
        first = next(r for r in rows if r["measure"] == row["measure"] and r["role"] == "ours")
        if row["implementation"].endswith("with statistics"):
            return "sadp_fast with statistics", *OURS_WITH_STATISTICS
        if row is first:
            return "sadp_fast", OURS, "o"
        number = sorted({r["suite"] for r in rows}).index(row["suite"])
        return f"sadp_fast: {row['implementation']}", *OURS_OTHERWISE[number % len(OURS_OTHERWISE)]
    number = list(dict.fromkeys(r["implementation"] for r in rows if r["role"] == "peer")).index(row["implementation"])
    return row["implementation"], *PEERS[number % len(PEERS)]


def figure(report: dict[str, Any]) -> Figure:
    """The figure of a report as ``--results`` writes it. Raises ValueError if it holds nothing to draw."""
    rows = bandwidth_rows(report["rows"])
    steps, memory = step_rows(report["rows"], STEP), step_rows(report["rows"], STEP_MEMORY)
    bars = [panel for panel in ((steps, 1e3, "milliseconds a step"), (memory, 2**-20, "peak MiB")) if panel[0]]
    if not rows and not bars:
        raise ValueError("these results hold neither bandwidths nor training steps: run the benchmarks with --results")
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    size = (16 if rows and bars else 9, max(5.0, 0.27 * len(measures) + 2.5, 0.6 * len(steps) + 2.0))
    drawn = Figure(figsize=size, layout="constrained")
    parts = drawn.subfigures(1, 2, width_ratios=(5, 4)) if rows and bars else [drawn]
    if rows:
        draw_bandwidths(parts[0].subplots(), rows, measures, report["copy"]["bytes_per_second"] / 1e9)
    if bars:
        axes = parts[-1].subplots(len(bars), 1, squeeze=False)[:, 0]
        floor = next((row for row in report["rows"] if row["measure"] == STEP and row["role"] == "yardstick"), None)
        for ax, (panel, scale, label) in zip(axes, bars):
            draw_bars(ax, panel, scale, label, floor if panel is steps and floor and "value" in floor else None)
        axes[0].set_title(f"{STEP} (T = 4; red: sadp_fast, blue: peers)", fontsize=10, loc="left")
    facts = report["environment"]
    versions = [f"{name} {facts[name]}" for name in ("torch", "triton", "spikingjelly", "snntorch") if facts.get(name)]
    drawn.suptitle(f"{facts['device']}: {', '.join(versions)}; {facts['date'][:10]}", fontsize=11)
    return drawn


def draw_bandwidths(ax: Axes, rows: list[Row], measures: list[str], copy: float) -> None:
    suite = {row["measure"]: row["suite"] for row in rows}
    height, line = {}, 0.0
    for before, measure in zip([None, *measures], measures):
        line -= 1.0 if before is None or suite[before] == suite[measure] else 1.6  # a gap between suites
        height[measure] = line
    for row in sorted(rows, key=lambda row: row["role"] == "ours"):  # ours on top
        label, colour, marker = style(row, rows)
        at = bandwidth(row), height[row["measure"]]
        ax.scatter(*at, color=colour, marker=marker, s=42, label=label, zorder=3, clip_on=False)
    ax.axvline(copy, color="black", linewidth=1.2, label=f"copy, measured in this run: {copy:,.0f} GB/s")
    ax.set_yticks(list(height.values()), [named(measure) for measure in measures], fontsize=8)
    ax.set_ylim(line - 0.7, -0.4)
    ax.set_xlim(0, 1.05 * max(copy, *(bandwidth(row) for row in rows)))
    ax.set_xlabel("bytes that must be read and written / time, GB/s", fontsize=9)
    ax.secondary_xaxis("top", functions=(lambda x: 100 * x / copy, lambda x: x * copy / 100)).set_xlabel(
        "% of a copy's speed", fontsize=9
    )
    ax.grid(axis="both", color="0.9", zorder=0)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels())))
    ax.figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def named(measure: str) -> str:
    for words, shorter in LABELS:
        measure = measure.replace(words, shorter)
    return measure


def draw_bars(ax: Axes, rows: list[Row], scale: float, label: str, floor: Row | None) -> None:
    names = [textwrap.fill(row["implementation"], 34) for row in rows]
    values = [row["value"] * scale for row in rows]
    colour = {"ours": OURS, "peer": PEERS[0][0]}
    drawn = ax.barh(range(len(rows)), values, color=[colour[row["role"]] for row in rows], zorder=2)
    ax.set_yticks(range(len(rows)), names)
    texts = [f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in values]
    ax.bar_label(drawn, texts, padding=3, fontsize=8)
    if floor is not None:
        ax.axvline(floor["value"] * scale, color="black", linewidth=1.2)
        label += f" (line: convolutions as measured, the rest at copy speed: {floor['value'] * scale:.1f})"
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize=8)
    ax.set_xlim(0, 1.15 * max(values))
    ax.set_xlabel(label, fontsize=9)
    ax.grid(axis="x", color="0.9", zorder=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a file written by pytest benchmarks/ --benchmark-only --results")
    parser.add_argument("out", type=Path, help="the image to write")
    arguments = parser.parse_args()
    figure(json.loads(arguments.results.read_text())).savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()
