"""One study's accuracies from the results of several folders, where their run files are no longer at hand.

    python docs/experiments/joined.py OUT FOLDER FOLDER...     # each holds an accuracy.json; OUT gets one, and its plot

The studies have to agree in their settings; a method, ratio and seed that several have is refused. Where the run files
are there, copy them into one folder instead: `sadp-fast study` finds them (docs/studies.md).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sadp_fast.lab.data import described, differ
from sadp_fast.lab.report import write_json
from sadp_fast.lab.study.registry import STUDIES
from sadp_fast.lab.study.study import each_once, run_name, set_time_ratios

KEYS = ("settings", "data_set", "accuracies", "environments", "missing_runs")  # what is read of a study
LISTS = ("methods", "ratios", "seeds")  # of the settings: what the studies may differ in


def read(folder: Path, keys: Sequence[str] = KEYS) -> dict[str, Any]:
    """A study's accuracy.json, which has these keys; raises ValueError for another file."""
    path = folder / "accuracy.json"
    result = json.loads(path.read_text())
    if lacking := [key for key in keys if key not in result]:
        raise ValueError(f"{path} lacks {lacking[0]!r}, which the study accuracy writes: check the folder")
    return result


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of all their runs, with the missing ones named; raises ValueError where they do not fit together."""
    data_set: dict[str, Any] = {}
    for other in (result["data_set"] for result in results):
        if differ(data_set, other):
            raise ValueError(f"the studies are of different data sets ({described(data_set)}; {described(other)})")
        data_set |= other
    first = results[0]
    for other in results[1:]:
        alike = [{key: value for key, value in r["settings"].items() if key not in LISTS} for r in (first, other)]
        if alike[0] != alike[1]:
            raise ValueError("the studies differ in more than methods, ratios and seeds, and cannot be joined")
    rows = {}
    for row in (row for result in results for row in result["accuracies"]):
        cell = (row["method"], row["ratio"], row["seed"])
        if cell in rows:
            raise ValueError(f"{cell[0]} at r = {cell[1]:g} with seed {cell[2]} is in more than one of the studies")
        rows[cell] = row
    set_time_ratios(list(rows.values()))  # full-data runs of one folder serve the others
    settings = dict(first["settings"])
    for key in LISTS:
        values = dict.fromkeys(value for result in results for value in result["settings"][key])
        settings[key] = list(values) if key == "methods" else sorted(values)
    missing = dict.fromkeys(name for result in results for name in result["missing_runs"])
    found = {run_name(*cell) for cell in rows}
    return {
        **first,
        "data_set": data_set,
        "settings": settings,
        "environments": each_once(entry for result in results for entry in result["environments"]),
        "missing_runs": [name for name in missing if name not in found],
        "accuracies": [rows[cell] for cell in sorted(rows, key=lambda cell: cell[2])],
    }


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out, *folders = map(Path, sys.argv[1:])
    if (out / "accuracy.json").exists():
        sys.exit(f"{out}/accuracy.json is there already: name a new folder")
    try:
        result = joined([read(folder) for folder in folders])
    except (OSError, ValueError) as error:
        sys.exit(f"nothing was joined: {error}")
    study = STUDIES["accuracy"]
    write_json(result, out / "accuracy.json", indent=1)
    study.plots(result, out)
    console = Console(highlight=False, width=140)
    for table in study.tables(result):
        console.print(table.rich())
    print("missing runs:", "; ".join(result["missing_runs"]) or "none")


if __name__ == "__main__":
    main()
