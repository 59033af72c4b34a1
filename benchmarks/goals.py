"""What was aimed at on one H100, and whether a run got there: computed from what it measured, never stored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

Row = dict[str, Any]


class Goal(NamedTuple):
    """A limit for one figure of a row: its ``value`` or its ``share`` of the floor; the worst row decides."""

    title: str
    figure: str
    at_least: bool
    limit: float
    of: str = ""  # name of the goal in whose rows the figure is, if that is another one
    clock: str = ""  # the figure is that of the same rows' twins on this clock ("wall": measure "..., wall time")

    def met(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit

    def worst(self, rows: Iterable[Row]) -> Row:
        return (min if self.at_least else max)(rows, key=lambda row: row[self.figure])


GOALS = {
    "lif": Goal("LIF forward + backward with statistics, >= 32 MiB", "share", True, 0.97),
    "lif copies": Goal("the same, against copies of as many bytes", "share_of_equal_copies", True, 0.97, of="lif"),
    "lif small": Goal("LIF forward + backward with statistics, 16x128x512", "share", True, 0.85),
    "lif small copies": Goal(
        "the same, against copies of as many bytes", "share_of_equal_copies", True, 0.85, of="lif small"
    ),
    "statistics": Goal("what the statistics add", "value", False, 0.02),
    "host": Goal("host time of an eager LIF forward + backward", "value", False, 60e-6),
    "long time": Goal("long sequences: time per element-step over that at T = 16", "value", False, 1.10),
    "long state": Goal("long sequences: kept for the backward, share of the input", "value", False, 1 / 16),
    "norm in step": Goal("all BatchNorm + LIF work within a SEW-ResNet18 step", "value", False, 1.9e-3),
    "norm": Goal("the same, each layer alone and cold", "value", False, 1.9e-3),
    "step": Goal("SEW-ResNet18 training step", "value", False, 6.5e-3),
    "step memory": Goal("SEW-ResNet18 training step, peak memory", "value", False, 1200 * 2**20),
    "low-memory step": Goal("the step with packed spikes", "value", False, 7e-3),
    "low-memory memory": Goal("the step with packed spikes, peak memory", "value", False, 800 * 2**20),
    "sample 1.3M": Goal("sample(), N = 1,281,167, device time", "value", False, 15e-6),
    "sample 1.3M wall": Goal("the same, wall time", "value", False, 15e-6, of="sample 1.3M", clock="wall"),
    "sample 20M": Goal("sample(), N = 20,000,000, device time", "value", False, 80e-6),
    "sample 20M wall": Goal("the same, wall time", "value", False, 80e-6, of="sample 20M", clock="wall"),
    "sample CPU": Goal("sample() on the CPU, N = 1,281,167", "value", False, 3e-3),
    "scores": Goal("scores to drawn subset, N = 1,281,167, wall time", "value", False, 0.5e-3),
    "epoch": Goal("SADP's epoch time over a full epoch's, less 1 - r", "overhead", False, 0.01),
}


def rows_of(name: str, rows: list[Row]) -> list[Row]:
    """The measured rows that decide the goal of this name."""
    goal = GOALS[name]
    tagged = [row for row in rows if row.get("goal") == (goal.of or name)]
    if goal.clock:
        twins = {(row["measure"].rpartition(", ")[0] + f", {goal.clock} time", row["implementation"]) for row in tagged}
        tagged = [row for row in rows if (row["measure"], row.get("implementation")) in twins]
    return [row for row in tagged if row.get(goal.figure) is not None]


def judged(rows: list[Row]) -> list[tuple[Goal, Row, bool]]:
    """Every goal that has a measured row: the goal, its worst row, and whether that row meets it."""
    result = []
    for name, goal in GOALS.items():
        if measured := rows_of(name, rows):
            worst = goal.worst(measured)
            result.append((goal, worst, goal.met(worst[goal.figure])))
    return result


def unmeasured(rows: list[Row]) -> list[str]:
    """Names of the goals that have no measured row, as where a run was cut short or has no GPU."""
    return [name for name in GOALS if not rows_of(name, rows)]
