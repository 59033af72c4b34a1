"""Draw a run's results: python benchmarks/plot.py RESULTS.json OUT.png

Left: every bandwidth-bound measure as the bandwidth that its floor's bytes were moved with, beside the copy bandwidth
of the same run: the roof, since no byte is read or written faster than by a copy. Right: time and memory of a step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]

OURS = {
    "sadp_fast": ("#c1272d", "o"),
    "sadp_fast with statistics": ("#f28e2b", "D"),
    "sadp_fast, other": ("#e377c2", "o"),
}
PEERS = ("#1f4e79", "#4f8fc0", "#6b8e23", "#808080", "#17a2a2", "#9c7a3c", "#000000")
MARKERS = "sv^<>pX"
STEP = "SEW-ResNet18 training step"
STEP_MEMORY = "its peak memory"


def bandwidth_rows(rows: list[Row]) -> list[Row]:
    """Rows of ours and of peers whose time and bytes are known, but for single directions of a layer."""
    single = ("LIF forward ", "LIF backward ")
    return [
        row
        for row in rows
        if row["role"] in ("ours", "peer")
        and row.get("unit") == "s"
        and "moved_bytes" in row
        and (not row["measure"].startswith(single) or row["measure"].startswith("LIF forward + backward"))
    ]


def bandwidth(row: Row) -> float:
    """GB/s at which the bytes of the floor were moved."""
    return row["moved_bytes"] / row["value"] / 1e9


def style(row: Row, rows: list[Row]) -> tuple[str, str, str]:
    """Label, colour and marker: ours by kind (the first of a measure, with statistics, other), peers by name."""
    if row["role"] == "ours":
        first = next(r for r in rows if r["measure"] == row["measure"] and r["role"] == "ours")
        kind = "sadp_fast" if row is first else "sadp_fast, other"
        if row["implementation"].endswith("with statistics"):
            kind = "sadp_fast with statistics"
        return kind, *OURS[kind]
    number = list(dict.fromkeys(r["implementation"] for r in rows if r["role"] == "peer")).index(row["implementation"])
    return row["implementation"], PEERS[number % len(PEERS)], MARKERS[number % len(MARKERS)]


def figure(report: dict[str, Any]) -> Figure:
    """The figure of a report as ``--results`` writes it. Raises ValueError if it holds nothing to draw."""
    rows = bandwidth_rows(report["rows"])
    steps = [row for row in report["rows"] if row["measure"] == STEP and "value" in row and row["role"] != "yardstick"]
    memory = [row for row in report["rows"] if row["measure"] == STEP_MEMORY and "value" in row]
    bars = [panel for panel in ((steps, 1e3, "ms per step"), (memory, 2**-20, "peak MiB")) if panel[0]]
    if not rows and not bars:
        raise ValueError("these results hold neither bandwidths nor training steps: run the benchmarks with --results")
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    drawn = Figure(figsize=(15, max(4.5, 0.27 * len(measures) + 2.5)), layout="constrained")
    parts = drawn.subfigures(1, 2, width_ratios=(3, 2)) if rows and bars else [drawn]
    if rows:
        draw_bandwidths(parts[0].subplots(), rows, measures, report["copy"]["bytes_per_second"] / 1e9)
    if bars:
        axes = parts[-1].subplots(len(bars), 1, squeeze=False)[:, 0]
        floor = next((row for row in report["rows"] if row["measure"] == STEP and row["role"] == "yardstick"), None)
        for ax, (panel, scale, label) in zip(axes, bars):
            draw_bars(ax, panel, scale, label, floor if panel is steps and floor and "value" in floor else None)
    facts = report["environment"]
    versions = [f"{name} {facts[name]}" for name in ("torch", "triton", "spikingjelly", "snntorch") if facts.get(name)]
    drawn.suptitle(f"{facts['device']}: {', '.join(versions)}; {facts['date'][:10]}", fontsize=11)
    return drawn


def draw_bandwidths(ax: Axes, rows: list[Row], measures: list[str], copy: float) -> None:
    height = {measure: -line for line, measure in enumerate(measures)}
    for row in sorted(rows, key=lambda row: row["role"] == "ours"):  # ours on top
        label, colour, marker = style(row, rows)
        ax.scatter(
            bandwidth(row),
            height[row["measure"]],
            color=colour,
            marker=marker,
            s=42,
            label=label,
            zorder=3,
            clip_on=False,
        )
    ax.axvline(copy, color="black", linewidth=1.2, label=f"copy, measured in this run: {copy:,.0f} GB/s")
    ax.set_yticks(list(height.values()), measures, fontsize=8)
    ax.set_ylim(-len(measures) + 0.4, 0.6)
    ax.set_xlim(0, 1.05 * max(copy, *(bandwidth(row) for row in rows)))
    ax.set_xlabel("bytes of the floor / time, GB/s (read + written)")
    ax.grid(axis="both", color="0.9", zorder=0)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels())))
    ax.legend(
        handles.values(),
        handles.keys(),
        loc="upper center",
        bbox_to_anchor=(0.4, -0.07 - 0.6 / len(measures)),
        ncols=2,
        fontsize=8,
        frameon=False,
    )


def draw_bars(ax: Axes, rows: list[Row], scale: float, label: str, floor: Row | None) -> None:
    names = [row["implementation"] for row in rows]
    values = [row["value"] * scale for row in rows]
    colour = {"ours": OURS["sadp_fast"][0], "peer": PEERS[0]}
    drawn = ax.barh(names, values, color=[colour[row["role"]] for row in rows], zorder=2)
    ax.bar_label(
        drawn, [f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in values], padding=3, fontsize=8
    )
    if floor is not None:
        ax.axvline(floor["value"] * scale, color="black", linewidth=1.2)
        ax.set_title(f"black line: {floor['implementation']}, {floor['value'] * scale:.1f} ms", fontsize=8)
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize=8)
    ax.set_xlim(0, 1.15 * max(values))
    ax.set_xlabel(f"{label} (red: sadp_fast)")
    ax.grid(axis="x", color="0.9", zorder=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a file written by pytest benchmarks/ --benchmark-only --results")
    parser.add_argument("out", type=Path, help="the image to write")
    arguments = parser.parse_args()
    figure(json.loads(arguments.results.read_text())).savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()
