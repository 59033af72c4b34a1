"""What a run of the benchmarks leaves: rows of figures, a table that anyone can read, and a JSON file.

A row: ``suite``, ``measure`` (what is compared), ``implementation``, ``role`` ("ours", "peer" or "yardstick"), and,
where something was timed, ``value`` in ``unit`` ("s", "B" or "ratio") on some ``clock``. A row with a floor also has
``floor`` in the value's unit and ``share`` = floor / value, and ``moved_bytes`` where it comes from bytes. ``goal``
names a goal that the row is held to; a row that is a ``detail`` is left out of the table.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_timing import Device
from goals import Goal, Row, judged, unmeasured

import sadp_fast


class Bench:
    """The device and the rows measured so far."""

    def __init__(self, timing: bool = True) -> None:
        self.load_average = os.getloadavg()[0]
        self.device = Device()
        self.rows: list[Row] = []
        self.copy_bandwidth_at_end: float | None = None
        self.compile_ahead_seconds: float | None = None
        self.seconds: dict[str, float] = {}  # of each test, set-up included
        if timing:
            _ = self.device.copy_bandwidth  # measured first, while the device is as it will be for what follows

    def finish(self) -> None:
        """Measure the copy bandwidth once more: whether the device is still as fast as the floors assume."""
        self.copy_bandwidth_at_end = self.device.copy_bytes / self.device.copy_seconds((self.device.copy_bytes,))

    @contextmanager
    def row(self, suite: str, measure: str, implementation: str, role: str) -> Iterator[Row]:
        """One row. A peer that fails is recorded and its test skipped; what is ours fails the test."""
        row: Row = {"suite": suite, "measure": measure, "implementation": implementation, "role": role}
        try:
            yield row
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            self.rows.append(row)
            self.device.release()
            if role != "ours":
                pytest.skip(f"{implementation} failed: {row['failed']}")
            raise
        self.rows.append(row)

    def add(self, row: Row, measure: str, value: float | None, unit: str, clock: str = "", goal: str = "") -> Row:
        """A further figure of the implementation that ``row`` is about."""
        further: Row = {"suite": row["suite"], "measure": measure}
        further.update({key: row[key] for key in ("implementation", "role")})
        set_value(further, value, unit, clock, goal)
        self.rows.append(further)
        return further

    def set_floor(self, row: Row, moved_bytes: float) -> None:
        """The time that the copy bandwidth takes for these bytes, and its share of the row's time."""
        row["moved_bytes"] = round(moved_bytes)
        if "value" in row:
            row["floor"] = self.device.floor_seconds(moved_bytes)
            row["share"] = row["floor"] / row["value"]

    def set_measured_floor(self, measure: str, floor: float, further: str) -> None:
        """A time that was measured as the floor of all rows of a measure so far."""
        for row in self.rows:
            if row["measure"] == measure and "value" in row:
                row.update(floor=floor, share=floor / row["value"], further=further)

    @cached_property
    def environment(self) -> dict[str, Any]:
        return {**environment(self.device), "load_average_at_start": self.load_average}

    def report(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "copy": {
                "bytes_per_second": self.device.copy_bandwidth,
                "bytes_per_second_at_end": self.copy_bandwidth_at_end,
                "bytes_read_and_written": self.device.copy_bytes,
            },
            "goals": [
                {**goal._asdict(), "worst": row["measure"], "measured": row[goal.figure], "reached": reached}
                for goal, row, reached in judged(self.rows)
            ],
            "goals_not_measured": unmeasured(self.rows),
            "rows": self.rows,
            "compile_ahead_seconds": self.compile_ahead_seconds,
            "test_seconds": self.seconds,
        }


def set_value(row: Row, value: float | None, unit: str, clock: str = "", goal: str = "") -> None:
    """The row's figure; None where nothing was timed."""
    if value is not None:
        row.update(value=value, unit=unit, clock=clock)
    if goal:
        row["goal"] = goal


def environment(device: Device) -> dict[str, Any]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device.is_cuda else _cpu_name(),
        "driver": _driver() if device.is_cuda else None,
        "cuda": torch.version.cuda,
        "last_level_cache_bytes": device.cache_bytes,
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "sadp_fast": sadp_fast.__version__,
        "spikingjelly": version("spikingjelly"),
        "snntorch": version("snntorch"),
    }


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def write_json(report: dict[str, Any], path: Path) -> None:
    """Replaces the file at once, so that a run that is killed leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    unfinished.replace(path)


# -------------------------------------------------------------------------------------------------------- the table

HEADING = ("measure", "ours", "", "best peer", "its / ours", "floor", "share of floor", "further")


def table(report: dict[str, Any]) -> list[str]:
    """Lines of text from a report: every figure of ours beside its best peer and its floor, then the goals."""
    facts, rows, at_end = report["environment"], report["rows"], report["copy"]["bytes_per_second_at_end"]
    lines = [
        f"{facts['device']}, {facts['torch_threads']} CPU threads; driver {facts['driver'] or '-'}, "
        f"torch {facts['torch']}, triton {facts['triton']}, sadp_fast {facts['sadp_fast']}",
        f"Copy bandwidth measured in this run: {report['copy']['bytes_per_second'] / 1e9:,.1f} GB/s, read + written"
        + (f" ({at_end / 1e9:,.1f} at its end)." if at_end else "."),
        "Floor: the time in which that bandwidth moves the bytes that any implementation must move; of host time, what "
        "x + 1 takes. Times are medians.",
    ]
    if facts["load_average_at_start"] > (facts["cpu_count"] or 1):
        lines.append(
            f"Other work was running (load average {facts['load_average_at_start']:.1f} at the start on "
            f"{facts['cpu_count']} cores): times on the CPU are too long and unsteady."
        )
    for suite in dict.fromkeys(row["suite"] for row in rows):
        ours = [row for row in rows if row["suite"] == suite and row["role"] == "ours" and "value" in row]
        ours = [row for row in ours if not row.get("detail")]
        if ours:
            lines += ["", suite, *aligned([HEADING, *(_line(rows, row) for row in ours)])]
    if any(row.get("bound_by_host") for row in rows):
        lines += ["", "* the device waited for the host, so this is an upper bound of the device time"]
    failed = [row for row in rows if "failed" in row]
    if failed:
        lines += ["", "failed:"]
        lines += [f"  {row['measure']}, {row['implementation']}: {row['failed']}" for row in failed]
    return lines + goal_table(rows)


def _line(rows: list[Row], row: Row) -> tuple[str, ...]:
    peer = best_peer(rows, row)
    unit = row["unit"]
    return (
        row["measure"],
        shown(row["value"], unit) + ("*" if row.get("bound_by_host") else ""),
        row["implementation"],
        "-" if peer is None else f"{shown(peer['value'], unit)}{'*' * ('bound_by_host' in peer)} {_name(peer)}",
        "-" if peer is None else f"{peer['value'] / row['value']:.2f}x",
        "-" if "floor" not in row else shown(row["floor"], unit),
        "-" if "share" not in row else percent(row["share"]),
        row.get("further", "-"),
    )


def _name(row: Row) -> str:
    return row["implementation"]


def best_peer(rows: list[Row], row: Row) -> Row | None:
    """The peer with the least value of the same measure."""
    peers = [r for r in rows if r["measure"] == row["measure"] and r["role"] == "peer" and "value" in r]
    return min(peers, key=lambda peer: peer["value"], default=None)


GOAL_HEADING = ("goal on one H100", "ours", "best peer", "floor", "share of floor", "goal", "", "worst case")


def goal_table(rows: list[Row]) -> list[str]:
    """The goals that this run has figures for, each with its worst case."""
    lines = [_goal_line(rows, *verdict) for verdict in judged(rows)]
    missing = ", ".join(unmeasured(rows))
    table = ["", *aligned([GOAL_HEADING, *lines])] if lines else []
    return [*table, "", f"Goals that this run has no figure for: {missing}"] if missing else table


SLOWEST = 12  # tests shown


def duration_lines(report: dict[str, Any]) -> list[str]:
    """Where the run's time went: each file's tests, and the slowest ones."""
    seconds = report["test_seconds"]
    files: dict[str, list[float]] = {}
    for name, taken in seconds.items():
        files.setdefault(name.partition("::")[0], []).append(taken)
    ahead = report["compile_ahead_seconds"]
    lines = [f"{sum(seconds.values()):6.1f} s  all tests" + (f", after {ahead:.0f} s of compiling" if ahead else "")]
    lines += [f"{sum(taken):6.1f} s  {name} ({len(taken)})" for name, taken in files.items()]
    slowest = sorted(seconds.items(), key=lambda item: -item[1])[:SLOWEST]
    return [*lines, "", *(f"{taken:6.1f} s  {name.partition('::')[2]}" for name, taken in slowest)]


def _goal_line(rows: list[Row], goal: Goal, row: Row, reached: bool) -> tuple[str, ...]:
    peer = best_peer(rows, row)
    unit = row["unit"] if goal.figure == "value" else "ratio"
    return (
        goal.title,
        shown(row[goal.figure], unit),
        "-" if peer is None else _peer_figure(goal, row, peer),
        "-" if "floor" not in row else shown(row["floor"], row["unit"]),
        "-" if "share" not in row else percent(row["share"]),
        f"{'>=' if goal.at_least else '<='} {shown(goal.limit, unit)}",
        "reached" if reached else "not reached",
        f"{row['measure']}, {row['implementation']}",
    )


def _peer_figure(goal: Goal, row: Row, peer: Row) -> str:
    if goal.figure.startswith("share"):
        return f"{percent(row['floor'] / peer['value'])} {_name(peer)}"
    return f"{shown(peer['value'], row['unit'])} {_name(peer)}"


def shown(value: float, unit: str) -> str:
    """A figure for people: seconds as us or ms, bytes as MiB, ratios as percentages."""
    if unit == "ratio":
        return percent(value)
    if unit == "B":
        return f"{value / 2**20:,.0f} MiB"
    name, factor = ("us", 1e6) if abs(value) < 1e-3 else ("ms", 1e3)
    return f"{value * factor:.{1 if abs(value) * factor < 100 else 0}f} {name}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def aligned(lines: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width under a rule; the first line is the heading. A column that says nothing is left out."""
    columns = [column for column in zip(*lines) if set(column[1:]) - {"-", ""}]
    widths = [max(map(len, column)) for column in columns]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in zip(*columns)]
    return [text[0], "-" * max(map(len, text)), *text[1:]]
