"""`sadp-fast study`: its options, the folder of a study, and the order in which things happen."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...prune.sadp import SADP
from .. import config, data, models, report, train
from ..config import METHODS, TrainConfig
from ..options import add_settings, check_device, list_of, variant, with_defaults
from .deadline import Deadline
from .markdown import write_report
from .plan import DEFAULT_METHODS, QUICK, Plan, Size
from .progress import Display
from .registry import STUDIES
from .runs import Runs
from .store import Store, StudyError, conditions_of, same, training_identity, write_json
from .study import NothingFinished, Study

RATIO = config.number(float, lambda value: 0 < value < 1, "above 0 and below 1")
RATIOS, SEEDS = (0.3, 0.5, 0.7), (0, 1, 2)
STOPPED = 3  # the exit code where --stop-after left runs out
# A whole study in minutes on two CPU cores: a smaller network, fewer epochs and seeds.
QUICK_BASE = {"model": "mlp", "epochs": 8}
QUICK_SEEDS = (0, 1)
# What decides the ratio of each epoch; InfoBatch's policy brings full-data epochs of its own.
_SCHEDULE = ("prune_ratio", "epochs", "schedule", "warmup_epochs", "tail_epochs", "policy")
_RUN = ("method", "prune_ratio", "seed", "device")  # what differs between runs
# What a folder's runs have in common; all calls on one folder agree on it.
_BASE = [field.name for field in fields(TrainConfig) if field.name not in _RUN]


def add_parser(commands: Any) -> None:
    """Add `study` to the parsers of `sadp-fast`."""
    parser = commands.add_parser(
        "study",
        help="reproduce one of the paper's results, or all of them with a report",
        description="Reproduce a result of the paper: "
        + "; ".join(
            f"{study.name} ({study.paper}): {study.question[0].lower()}{study.question[1:-1]}"
            for study in STUDIES.values()
        )
        + "; all: every study and one report.",
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
    option("--seeds", type=list_of(config.NATURAL), metavar="LIST", help="seeds (default: 0,1,2)")
    option("--quick", action="store_true", help="mlp, 8 epochs, seeds 0,1, fewer examples: minutes on two CPU cores")
    option(
        "--stop-after",
        type=config.ABOVE_ZERO,
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
    names = list(STUDIES) if given["study"] == "all" else [given["study"]]
    plan = _planned(given)
    check_device(plan.base.device)
    studies = [STUDIES[name] for name in names]
    # Wide enough for the tables where no terminal says how wide it is.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    display = Display(None if quiet else console, sum(study.requests(plan) for study in studies))
    runs = Runs(plan, display, deadline)
    if not plan.report_only:
        if any(study.trains_cells for study in studies):
            _check_ratios(plan)
        known = _remembered(plan.folder)
        if known is None or set(plan.methods) - set(_with_finished(known, plan.base, plan.folder)["methods"]):
            _check_runs(plan, runs.data)
        if known is None:
            plan = runs.plan = _with_data(plan, runs.data, "time_steps" in given)
        _remember(plan)
        if not quiet:
            _introduce(plan, console)
    device = f" --device {plan.base.device}" if "device" in given else ""  # what was begun goes on on its kind alone
    again = f"sadp-fast study {given['study']} --resume {shlex.quote(str(plan.folder))}{device}"
    try:
        with display.open():
            results, plots = {}, {}
            for study in studies:
                try:
                    results[study.name] = _collect(study, runs)
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


def _collect(study: Study, runs: Runs) -> dict[str, Any]:
    """The study's result: first what no other process is at, then, having waited for them, all."""
    done = runs.display.done
    for runs.wait in (False, True):
        runs.display.done, runs.elsewhere = done, False
        try:
            result = study.collect(runs)
        except NothingFinished:
            if not runs.elsewhere:
                raise
        if not runs.elsewhere:
            break
    return result


def _show(study: Study, result: dict[str, Any], folder: Path, console: Any) -> list[tuple[Path, str]]:
    """Tables to the console, JSON and plots to the folder."""
    write_json(result, folder / f"{study.name}.json", indent=1)
    plots = study.plots(result, folder)
    for table in study.tables(result):
        console.print(table.rich())
    if result["missing_runs"]:
        console.print(f"missing runs: {'; '.join(result['missing_runs'])}", soft_wrap=True)
    console.print(
        "\n".join(str(path) for path in (folder / f"{study.name}.json", *(p for p, _ in plots))), soft_wrap=True
    )
    return plots


def _introduce(plan: Plan, console: Any) -> None:
    base, ratios, seeds = plan.base, ",".join(f"{r:g}" for r in plan.ratios), ",".join(str(s) for s in plan.seeds)
    console.print(
        f"{base.dataset}, {base.model}, T = {base.time_steps}, {base.epochs} epochs; methods {','.join(plan.methods)}; "
        f"ratios {ratios}; seeds {seeds}; {report.device_name(base.device)}; {plan.folder}",
        soft_wrap=True,
    )


# ------------------------------------------------------------------------------------------- what the options decide


def _planned(given: dict[str, Any]) -> Plan:
    """The plan of a new folder, or of one where a study was begun, with the options of this call."""
    folder = _folder(given)
    if folder and given.get("report_only") and not (folder / "study.json").exists():
        option = "--resume" if "resume" in given else "--out"
        raise StudyError(f"{folder} holds no study to report: check {option}")
    known = _remembered(folder) if folder else None
    if "resume" in given and known is None:
        raise StudyError(f"{folder} holds no study to resume: check the folder, or begin one with --out")
    device = given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    asked = {key: given[key] for key in _BASE if key in given}
    if known is None:
        if given.get("report_only"):
            raise StudyError("--report-only needs the folder of a study: name it with --out or --resume")
        quick, data_dir = given.get("quick", False), given.get("data_dir")
        options = with_defaults({**(QUICK_BASE if quick else {}), **asked, "device": device}, data_dir)
        if options["dataset"] in data.EVENTS:
            options.setdefault("time_steps", data.EVENT_STEPS)
        base, size = TrainConfig(**options), QUICK if quick else Size()
        began: dict[str, Any] = {
            "methods": DEFAULT_METHODS,
            "ratios": RATIOS,
            "seeds": QUICK_SEEDS if quick else SEEDS,
        }
        folder = folder or Path("runs") / f"study-{base.dataset}-{base.model}-{datetime.now():%Y%m%d-%H%M%S}"
    else:
        assert folder is not None
        base, size, data_dir = known["base"], known["size"], given.get("data_dir", known["data_dir"])
        if given.get("quick") and size != QUICK:
            raise StudyError(f"--quick is given, but the study in {folder} is not a quick one: leave it out")
        for key, value in asked.items():
            if getattr(base, key) != value:
                raise StudyError(
                    f"--{key.replace('_', '-')} is {value}, but the study in {folder} has {getattr(base, key)}: "
                    "leave the option out, or name a new folder"
                )
        base = replace(base, device=device)
        began = _with_finished(known, base, folder)
    methods, ratios, seeds = (tuple(given.get(key, began[key])) for key in ("methods", "ratios", "seeds"))
    return Plan(base, methods, tuple(sorted(ratios)), seeds, size, data_dir, folder, given.get("report_only", False))


def _folder(given: dict[str, Any]) -> Path | None:
    places = [given[key] for key in ("out", "resume") if key in given]
    if len(places) > 1:
        raise StudyError(f"{places[0]} and {places[1]} both name the study's folder: give one of them")
    return Path(places[0]).expanduser() if places else None


def _remembered(folder: Path) -> dict[str, Any] | None:
    """What is written in a folder of a study; None for a folder that is new or empty."""
    path = folder / "study.json"
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise StudyError(f"{folder} is a file: name a new folder with --out")
        holds = folder.exists() and any(not path.name.startswith(".study.json") for path in folder.iterdir())
        if not holds:
            return None
        if not path.exists():  # looked for again: another process may have written it before the folder was listed
            raise StudyError(f"{folder} is not empty and holds no study: name a new folder with --out")
    try:
        written = json.loads(path.read_text())
        size: dict[str, Any] = written["size"]
        size["thresholds"] = tuple(size["thresholds"])
        return {
            "base": TrainConfig(**written["base"]),
            "size": Size(**size),
            **{key: written[key] for key in ("methods", "ratios", "seeds", "data_dir")},
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} is damaged ({error}): restore it, or name a new folder with --out") from error


def _with_finished(known: dict[str, Any], base: TrainConfig, folder: Path) -> dict[str, Any]:
    """The methods, ratios and seeds that were asked for, and those of finished runs, copied ones included."""
    methods, ratios, seeds = list(known["methods"]), set(known["ratios"]), set(known["seeds"])
    for file in Store(folder).files():
        found = _run_of(file["identity"], base)
        if found:
            method, ratio, seed = found
            methods.append(method)
            seeds.add(seed)
            ratios |= {ratio} - {0.0}
    return {"methods": _ordered(methods), "ratios": sorted(ratios), "seeds": sorted(seeds)}


def _run_of(identity: dict[str, Any], base: TrainConfig) -> tuple[str, float, int] | None:
    """The variant, ratio and seed by which a run differs from the conditions of a study; None for another study's."""
    found = conditions_of(identity.get("config", {}))
    if identity.get("kind") != "training" or found.get("method") not in METHODS:
        return None
    method, ratio, seed = found["method"], found["prune_ratio"], found["seed"]
    base = replace(base, prune_ratio=ratio, seed=seed)
    asked = base.of(method)
    # What the study leaves open follows from the run's own epochs and policy.
    own = asdict(replace(asked, **{key: found[key] for key in ("epochs", "policy") if key in found}).settled())
    plain = {key: own[key] if value is None else value for key, value in asdict(asked).items()}
    changes = {
        key: found[key]
        for key in config.SETTINGS
        if key in config.settings_of(method) and key in found and found[key] != plain[key]
    }
    if None in changes.values():  # a default that only a whole study can have
        return None
    variant = config.write_variant(method, changes)
    return (variant, ratio, seed) if same(identity, training_identity(base.of(variant))) else None


def _ordered(methods: list[str]) -> list[str]:
    """Each once: a method's variants behind it, the methods as `DEFAULT_METHODS` has them, and others last."""
    order = [*DEFAULT_METHODS, *(method for method in METHODS if method not in DEFAULT_METHODS)]
    once = list(dict.fromkeys(methods))
    return sorted(once, key=lambda method: (order.index(config.base_method(method)), ":" in method, once.index(method)))


def _with_data(plan: Plan, dataset: data.Dataset, asked_steps: bool) -> Plan:
    """The plan of a new study, with the time steps of event frames that bring their own; raises StudyError."""
    base = plan.base
    if len(dataset.shape) == 4 and not asked_steps:
        base = replace(base, time_steps=dataset.shape[0])
    try:
        models.build(base.model, dataset.shape, dataset.num_classes, base.time_steps)
    except ValueError as error:
        raise StudyError(str(error)) from error
    return replace(plan, base=base)


def _check_ratios(plan: Plan) -> None:
    """Find a ratio that the epochs cannot have before any is run; raises StudyError."""
    for method, ratio in plan.cells():
        run = plan.config(method, ratio, 0)
        settings = {key: getattr(run, key) for key in _SCHEDULE}
        try:
            SADP(nn.Identity(), 1, score="random", **settings)
        except ValueError as error:
            raise StudyError(f"{method}: {error}") from error


def _check_runs(plan: Plan, dataset: data.Dataset) -> None:
    """Find a run that cannot be trained on the data set before any is run; raises StudyError."""
    for method, ratio in (("full", 0.0), *plan.cells()):  # full data, with which other things are measured, always
        try:
            train.check(plan.config(method, ratio, 0), dataset)
        except ValueError as error:
            raise StudyError(f"{method}: {error}") from error


def _remember(plan: Plan) -> None:
    """Write down what the folder's runs have in common, and what was asked for so far."""
    known = _remembered(plan.folder) or {"methods": (), "ratios": (), "seeds": ()}
    content = {
        "base": asdict(plan.base),
        "size": asdict(plan.size),
        "methods": _ordered([*known["methods"], *plan.methods]),
        "ratios": sorted({*known["ratios"], *plan.ratios}),
        "seeds": sorted({*known["seeds"], *plan.seeds}),
        "data_dir": plan.data_dir and str(Path(plan.data_dir).expanduser().absolute()),
    }
    try:
        write_json(content, plan.folder / "study.json", indent=1)
    except OSError as error:
        raise StudyError(f"the folder {plan.folder} cannot be made ({error}): name another with --out") from error
