"""What a run of the benchmarks leaves: rows of figures, a table that anyone can read, and a JSON file."""

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
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_timing import Device

import sadp_fast

Row = dict[str, Any]


class Bench:
    """The device and the rows measured so far."""

    def __init__(self) -> None:
        self.load_average = os.getloadavg()[0]
        self.device = Device()
        self.rows: list[Row] = []

    @contextmanager
    def row(self, suite: str, measure: str, implementation: str, role: str) -> Iterator[Row]:
        """One row. A peer that fails is recorded and its test skipped; what is ours fails the test."""
        row: Row = {"suite": suite, "measure": measure, "implementation": implementation, "role": role}
        try:
            yield row
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            self.rows.append(row)
            if self.device.is_cuda:
                torch.cuda.empty_cache()
            if role == "peer":
                pytest.skip(f"{implementation} failed: {row['failed']}")
            raise
        self.rows.append(row)

    def add_floor(self, row: Row, moved_bytes: float, name: str = "floor", of: str = "device_seconds") -> None:
        """The time that the copy bandwidth takes for these bytes, and its share of the time in ``row[of]``."""
        seconds = self.device.floor_seconds(moved_bytes)
        row[f"{name}_bytes"] = round(moved_bytes)
        row[f"{name}_seconds"] = seconds
        row[f"share_of_{name}"] = seconds / row[of]
        row["copy_bandwidth_bytes_per_second"] = self.device.copy_bandwidth

    def add_statistics_cost(self, row: Row) -> None:
        """What per-example statistics add to the time without them, as a share of it."""
        plain = find(self.rows, row["measure"], "ours")
        if plain and "device_seconds" in plain:
            row["statistics_cost"] = row["device_seconds"] / plain["device_seconds"] - 1

    def report(self) -> dict[str, Any]:
        return {
            "environment": {**environment(self.device), "load_average_at_start": self.load_average},
            "copy": {
                "bytes_per_second": self.device.copy_bandwidth,
                "bytes_read_and_written": self.device.copy_bytes,
            },
            "rows": self.rows,
        }


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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


# -------------------------------------------------------------------------------------------------------- the table


def find(rows: list[Row], measure: str, role: str) -> Row | None:
    return next((row for row in rows if row["measure"] == measure and row["role"] == role), None)


def table(bench: Bench) -> list[str]:
    """Lines of text, one table for each suite that ran."""
    facts = environment(bench.device)
    lines = [
        f"{facts['device']}, {facts['torch_threads']} CPU threads; driver {facts['driver'] or '-'}, "
        f"torch {facts['torch']}, triton {facts['triton']}, sadp_fast {facts['sadp_fast']}",
        f"Copy bandwidth measured in this run: {bench.device.copy_bandwidth / 1e9:,.1f} GB/s, read + written.",
        "Floor: the time in which that bandwidth moves the bytes that any implementation must move.",
    ]
    if bench.load_average > (os.cpu_count() or 1):
        lines.append(
            f"Other work was running (load average {bench.load_average:.1f} at the start on {os.cpu_count()} cores): "
            "times on the CPU are too long and unsteady."
        )
    for suite, heading, line in (
        ("lif", LIF_HEADING, _lif_line),
        ("sampling", SAMPLING_HEADING, _sampling_line),
        ("training", TRAINING_HEADING, _training_line),
    ):
        rows = [row for row in bench.rows if row["suite"] == suite]
        measures = dict.fromkeys(row["measure"] for row in rows)
        if measures:
            body = [line(rows, measure) for measure in measures]
            lines += ["", *_aligned([heading, *body])]
    if any("bound_by_host" in row for row in bench.rows):
        lines += ["", "* the device waited for the host, so this is an upper bound of the device time"]
    failed = [row for row in bench.rows if "failed" in row]
    if failed:
        lines += ["", "failed:"]
        lines += [f"  {row['measure']}, {row['implementation']}: {row['failed']}" for row in failed]
    return lines


LIF_HEADING = ("measure (device time)", "ours", "statistics", "best peer", "", "floor", "share of floor", "host time")
SAMPLING_HEADING = (
    "measure (wall time)",
    "ours",
    "no wait for host",
    "best peer",
    "",
    "floor",
    "share of floor",
    "copy 4N",
)
TRAINING_HEADING = (
    "measure (share of a full epoch's time)",
    "ours",
    "spread",
    "floor = 1 - r",
    "overhead",
    "examples trained",
    "share of floor",
)


def _lif_line(rows: list[Row], measure: str) -> tuple[str, ...]:
    ours = find(rows, measure, "ours") or {}
    with_statistics = find(rows, measure, "ours with statistics") or {}
    share = _percent(ours.get("share_of_floor"))
    if ours.get("floor_with_v_bytes", 0) > ours.get("floor_bytes", 0):
        share += f" ({_percent(ours['share_of_floor_with_v'])} with v)"
    return (
        measure,
        _time(ours.get("device_seconds")) + ("*" if ours.get("bound_by_host") else ""),
        _percent(with_statistics.get("statistics_cost"), sign=True),
        *_best_peer(rows, measure, ours, "device_seconds"),
        _time(ours.get("floor_seconds")),
        share,
        _host_times(rows, measure),
    )


def _host_times(rows: list[Row], measure: str) -> str:
    ours = find(rows, measure, "ours") or {}
    module = find(rows, measure, "our module") or {}
    peers = [
        row["host_seconds"]
        for row in rows
        if row["measure"] == measure and row["role"] == "peer" and "host_seconds" in row
    ]
    if "host_seconds" not in ours:
        return "-"
    others = [("LIFNode", module.get("host_seconds")), ("least of the peers", min(peers, default=None))]
    said = ", ".join(f"{name} {_time(seconds)}" for name, seconds in others if seconds is not None)
    return _time(ours["host_seconds"]) + (f" ({said})" if said else "")


def _sampling_line(rows: list[Row], measure: str) -> tuple[str, ...]:
    ours = find(rows, measure, "ours") or {}
    return (
        measure,
        _time(ours.get("wall_seconds")),
        _time((find(rows, measure, "ours with capacity") or {}).get("wall_seconds")),
        *_best_peer(rows, measure, ours, "wall_seconds"),
        _time(ours.get("floor_seconds")),
        _percent(ours.get("share_of_floor")),
        _time((find(rows, measure, "yardstick") or {}).get("wall_seconds")),
    )


def _training_line(rows: list[Row], measure: str) -> tuple[str, ...]:
    ours = find(rows, measure, "ours") or {}
    if "time_ratio" not in ours:
        return (measure, *["-"] * (len(TRAINING_HEADING) - 1))
    return (
        f"{measure} ({ours['model']}, {ours['examples']:,} examples)",
        f"{ours['time_ratio']:.3f}",
        f"{ours['time_ratio_smallest']:.3f} to {ours['time_ratio_largest']:.3f}",
        f"{ours['one_minus_r']:.3f}",
        f"{ours['overhead']:+.3f}",
        f"{ours['share_of_examples_trained']:.3f}",
        _percent(ours["share_of_floor"]),
    )


def _best_peer(rows: list[Row], measure: str, ours: Row, figure: str) -> tuple[str, str]:
    peers = [row for row in rows if row["measure"] == measure and row["role"] == "peer" and figure in row]
    if not peers:
        return "-", ""
    best = min(peers, key=lambda row: row[figure])
    factor = f"{best[figure] / ours[figure]:.2f}x ours" if figure in ours else ""
    late = "*" if figure == "device_seconds" and best.get("bound_by_host") else ""
    return f"{_time(best[figure])}{late} {best['implementation']}", factor


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    unit, factor = ("us", 1e6) if seconds < 1e-3 else ("ms", 1e3)
    return f"{seconds * factor:.{1 if seconds * factor < 100 else 0}f} {unit}"


def _percent(share: float | None, sign: bool = False) -> str:
    return "-" if share is None else f"{100 * share:{'+' if sign else ''}.1f} %"


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width under a rule; the first line is the heading. A column that says nothing is left out."""
    columns = [column for column in zip(*lines) if set(column[1:]) - {"-", ""}]
    widths = [max(map(len, column)) for column in columns]
    lines = list(zip(*columns))
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return [text[0], "-" * max(map(len, text)), *text[1:]]
