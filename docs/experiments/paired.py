"""Two methods compared pair by pair, over all the studies in which both were run with the same ratio and seed.

    python docs/experiments/paired.py sadp random FOLDER FOLDER...     # each holds an accuracy.json

Prints, for each ratio and for all, how many pairs there are, the mean of the first method's accuracy minus the second's
in points, its standard error, and how many pairs the first one wins. A run that lies in two of the folders is refused.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

from joined import read  # beside this file


def differences(method: str, other: str, folders: list[Path]) -> dict[float, list[float]]:
    """By ratio, the differences in points of all pairs of runs; raises ValueError where there are none."""
    found: dict[float, list[float]] = {}
    seen: dict[tuple[Any, ...], Path] = {}
    for folder in folders:
        rows = {(row["method"], row["ratio"], row["seed"]): row for row in read(folder, ["accuracies"])["accuracies"]}
        for name, ratio, seed in rows:
            if name != method or (other, ratio, seed) not in rows:
                continue
            pair = [rows[each, ratio, seed] for each in (method, other)]
            for row in pair:  # one of two folders would count twice
                run = (row["method"], ratio, seed, row["test_accuracy"], row.get("seconds"))
                if run in seen:
                    raise ValueError(
                        f"{row['method']} at r = {ratio:g} with seed {seed} is the same run in {seen[run]} and in "
                        f"{folder}: leave one of them out"
                    )
                seen[run] = folder
            found.setdefault(ratio, []).append(100 * pair[0]["test_accuracy"] - 100 * pair[1]["test_accuracy"])
    if not found:
        raise ValueError(f"no folder has runs of {method} and of {other} with the same ratio and seed")
    return dict(sorted(found.items()))


def line(name: str, values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    mean, wins = statistics.mean(values), sum(value > 0 for value in values)
    return f"{name}: {mean:+.2f} ± {error:.2f} (standard error), better in {wins} of {len(values)} pairs"


def main() -> None:
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    method, other, *folders = sys.argv[1:]
    try:
        found = differences(method, other, [Path(folder) for folder in folders])
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(f"{method} minus {other}, points")
    for ratio, values in found.items():
        print(line(f"r = {ratio:g}", values))
    print(line("all", [value for values in found.values() for value in values]))


if __name__ == "__main__":
    main()
