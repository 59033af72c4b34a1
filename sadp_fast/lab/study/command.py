"""`sadp-fast study`: its options, the folder of a study, and the order in which things happen."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import models, report, train
from ..methods import METHODS
from ..options import add_settings, check_device, list_of, variant
from ..settings import ABOVE_ZERO, NATURAL, number
from .plan import DEFAULT_METHODS, Plan, planned, remember, remembered, with_finished
from .progress import Deadline, Display
from .registry import STUDIES, write_report
from .runs import Runs
from .store import refusing, write_json
from .study import NothingFinished, Result, Study

RATIO = number(float, lambda value: 0 < value < 1, "above 0 and below 1")
STOPPED = 3  # the exit code where --stop-after left runs out


def add_parser(commands: Any) -> None:
    """Add `study` to the parsers of `sadp-fast`."""
    questions = (f"{s.name} ({s.paper}): {s.question[0].lower()}{s.question[1:-1]}" for s in STUDIES.values())
    parser = commands.add_parser(
        "study",
        help="reproduce one of the paper's results, or all of them with a report",
        description=f"Reproduce a result of the paper: {'; '.join(questions)}; all: every study and one report.",
        epilog="Every finished run is a file under DIR/runs: the same command goes on where it was stopped, processes "
        "and machines may share the work (--seeds, --ratios, --methods) and the files of several folders may be "
        "copied into one. Without --methods, --ratios and --seeds a folder's own are used.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("study", choices=(*STUDIES, "all"), metavar="NAME", help=", ".join((*STUDIES, "all")))
    option = parser.add_argument_group("what is run").add_argument
    option(
        "--methods",
        type=list_of(variant),
        metavar="LIST",
        help=f"of {', '.join(METHODS)}; with settings of their own where wanted: full,full:epochs=30,"
        f"sadp:weights=unbiased (default: {', '.join(DEFAULT_METHODS)})",
    )
    option("--ratios", type=list_of(RATIO), metavar="LIST", help="pruning ratios (default: 0.3,0.5,0.7)")
    option("--seeds", type=list_of(NATURAL), metavar="LIST", help="seeds (default: 0,1,2)")
    option("--quick", action="store_true", help="mlp, 8 epochs, seeds 0,1, fewer examples: minutes on two CPU cores")
    option(
        "--stop-after",
        type=ABOVE_ZERO,
        metavar="MINUTES",
        help="begin no run that would take longer than that from now on, stop the one under way after a whole epoch, "
        f"show what is there and end with exit code {STOPPED}",
    )
    option("--report-only", action="store_true", help="run nothing: tables and plots of the runs that are there")
    add_settings(parser)
    option = parser.add_argument_group("output").add_argument
    option("--out", metavar="DIR", help="folder of the study, new or of the same study (default: runs/study-...)")
    option("--resume", metavar="DIR", help="go on with the study in DIR")
    option("--quiet", action="store_true", help="no progress, only the tables at the end")
    parser.set_defaults(command=run)


def run(given: dict[str, Any]) -> int:
    """The command; returns the exit code."""
    import matplotlib  # noqa: F401  (a missing package is found now, not after hours of training)
    from rich.console import Console

    deadline, quiet = Deadline(given.pop("stop_after", None)), given.pop("quiet", False)
    plan = planned(given)
    check_device(plan.base.device)
    studies = list(STUDIES.values()) if given["study"] == "all" else [STUDIES[given["study"]]]
    # Wide enough for the tables where no terminal says how wide it is.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    display = Display(None if quiet else console, sum(len(study.module.asks(plan)) for study in studies))
    runs = Runs(plan, display, deadline)
    if not plan.report_only:
        runs.plan = plan = _begun(runs, studies, "time_steps" in given)
        if not quiet:
            _introduce(plan, console)
    device = f" --device {plan.base.device}" if "device" in given else ""  # what was begun goes on on its kind alone
    again = f"sadp-fast study {given['study']} --resume {shlex.quote(str(plan.folder))}{device}"
    results: dict[str, Result] = {}
    plots = {}
    try:
        with display.open():
            for study in studies:
                try:
                    results[study.name] = study.collect(runs)
                except NothingFinished:
                    if not deadline.reached:
                        raise
                    console.print(f"{study.name}: no finished run yet")
                    continue
                plots[study.name] = _show(study, results[study.name], plan.folder, console)
        if given["study"] == "all" and results:
            console.print(str(write_report(results, plots, plan.folder)), soft_wrap=True)
    except KeyboardInterrupt:
        print(f"sadp-fast: interrupted; to go on: {again}", file=sys.stderr)
        return 130
    if deadline.reached and (len(results) < len(studies) or any(r["missing_runs"] for r in results.values())):
        print(f"sadp-fast: stopped by --stop-after, runs are missing; to go on: {again}", file=sys.stderr)
        return STOPPED
    return 0


def _begun(runs: Runs, studies: list[Study], asked_steps: bool) -> Plan:
    """The plan, written down in its folder once every run of it is known to be possible; raises StudyError.

    A new one gets the time steps of event frames that bring their own.
    """
    plan, known = runs.plan, remembered(runs.plan.folder)
    ratios = any("ratio" in ask.where for study in studies for ask in study.module.asks(plan))
    new = known is None or not set(plan.methods) <= set(with_finished(known, plan.base, plan.folder)["methods"])
    dataset = runs.data if new else None
    for method, ratio in (("full", 0.0), *plan.cells()):  # full data, with which other things are measured, always
        run = plan.config(method, ratio, 0)
        with refusing(f"{method}: "):
            if ratios:
                run.ratios(run.epochs)
            if dataset:
                train.check(run, dataset)
    if dataset and known is None:
        base = plan.base
        if len(dataset.shape) == 4 and not asked_steps:
            base = replace(base, time_steps=dataset.shape[0])
        with refusing():
            models.build(base.model, dataset.shape, dataset.num_classes, base.time_steps)
        plan = replace(plan, base=base)
    remember(plan)
    return plan


def _show(study: Study, result: Result, folder: Path, console: Any) -> list[tuple[Path, str]]:
    """Tables to the console, JSON and plots to the folder."""
    write_json(result, folder / f"{study.name}.json", indent=1)
    plots = study.plots(result, folder)
    for table in study.tables(result):
        console.print(table.rich())
    if result["missing_runs"]:
        console.print(f"missing runs: {'; '.join(result['missing_runs'])}", soft_wrap=True)
    for path in (folder / f"{study.name}.json", *(path for path, _ in plots)):
        console.print(str(path), soft_wrap=True)
    return plots


def _introduce(plan: Plan, console: Any) -> None:
    base, ratios, seeds = plan.base, ",".join(f"{r:g}" for r in plan.ratios), ",".join(str(s) for s in plan.seeds)
    console.print(
        f"{base.dataset}, {base.model}, T = {base.time_steps}, {base.epochs} epochs; methods {','.join(plan.methods)}; "
        f"ratios {ratios}; seeds {seeds}; {report.device_name(base.device)}; {plan.folder}",
        soft_wrap=True,
    )
