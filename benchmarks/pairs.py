"""Two versions of the package side by side: results of the benchmarks that ran in turn on one machine, as ratios.

    python benchmarks/pairs.py OUT.json BEFORE.json AFTER.json [BEFORE.json AFTER.json ...]

Each BEFORE and AFTER is a file of `pytest benchmarks/ --benchmark-only --results FILE.json`, in the order in which
they ran. For every figure of ours that all of them have: the lower of each version's values, and after over before. The
least of some runs is what the code takes; what is above it is what else the machine did.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Key = tuple[str, str, str]


def values(files: list[dict[str, Any]]) -> dict[Key, list[float]]:
    """Of every figure of ours, by measure, implementation and clock: its value in each file."""
    found: dict[Key, list[float]] = {}
    for file in files:
        for row in file["rows"]:
            if row["role"] == "ours" and row.get("value"):
                key = (row["measure"], row["implementation"], row.get("clock", ""))
                found.setdefault(key, []).append(row["value"])
    return {key: each for key, each in found.items() if len(each) == len(files)}


def compared(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every figure that both versions have, the largest ratio first."""
    old, new = values(before), values(after)
    goals = {
        (row["measure"], row["implementation"], row.get("clock", "")): row["goal"]
        for row in after[0]["rows"]
        if row.get("goal")
    }
    rows = [
        {
            **dict(zip(("measure", "implementation", "clock"), key, strict=True)),
            "goal": goals.get(key),
            "before": old[key],
            "after": new[key],
            "ratio": min(new[key]) / min(old[key]),
            # How far two runs of the same code are apart.
            "noise": max(max(each) / min(each) for each in (old[key], new[key])) - 1,
        }
        for key in old
        if key in new
    ]
    return sorted(rows, key=lambda row: -row["ratio"])


def main(out: str, *files: str) -> None:
    runs = [json.loads(Path(file).read_text()) for file in files]
    rows = compared(runs[::2], runs[1::2])
    result = {"environment": runs[-1]["environment"], "rounds": len(runs) // 2, "rows": rows}
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        mark = "goal" if row["goal"] else ""
        name = f"{row['measure']}; {row['implementation']}"
        print(f"{row['ratio']:.3f} (+-{row['noise']:.3f}) {row['clock']:7} {mark:4} {name}")


if __name__ == "__main__":
    if len(sys.argv) < 4 or len(sys.argv) % 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
