"""`sadp-fast train`: its options, the folder of a run, and the order in which things happen."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import data, progress, report, train
from .loggers import open_loggers
from .methods import METHODS
from .options import CommandError, add_settings, check_device, list_of, variant, with_defaults
from .setting_fields import SettingError, add_options
from .settings import TrainConfig, base_method, device_kind, folder_name

if TYPE_CHECKING:
    from rich.console import Console


def add_parser(commands: Any) -> None:
    """Add `train` to the parsers of `sadp-fast`."""
    command = commands.add_parser(
        "train",
        help="train a spiking network with spike-aware data pruning, beside full-data training",
        description="Train a spiking network with spike-aware data pruning (SADP) and, under the same conditions, with "
        "full data or other ways of pruning; then compare accuracy and time in a table, a plot and a JSON file.",
        epilog="Without options: handwritten digits, no files needed, about a minute on two CPU cores. "
        "Ctrl-C is safe: the checkpoint of the last whole epoch stays, and --resume continues from it.",
        # Options that are not given stay out, so that --resume knows which were asked for.
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups = add_settings(command)
    add_options(groups["pruning"], TrainConfig, {"prune_ratio"})
    groups["pruning"].add_argument(
        "--compare",
        type=lambda text: [] if text.strip() == "none" else list_of(_compared)(text),
        metavar="LIST",
        help=f"also run none, or any of {', '.join(METHODS)}; with settings of their own where wanted: "
        "full,full:epochs=15,sadp:weights=unbiased (default: full)",
    )
    add_options(groups["training"], TrainConfig, {"seed"})
    option = command.add_argument_group("output").add_argument
    option("--out", metavar="DIR", help="folder of the run, new or empty (default: runs/NAME)")
    option("--name", help="name of the run under runs/ (default: data set, model, date and time)")
    option("--resume", nargs="?", const="", metavar="DIR", help="continue the run in DIR, or in --out, as it began")
    option("--quiet", action="store_true", help="no progress, only the table at the end")
    command.set_defaults(command=run)


def _compared(text: str) -> str:
    if variant(text) == "sadp":
        raise SettingError("'sadp' is always run: leave it out")
    return variant(text)


def run(given: dict[str, Any]) -> int:
    """The command; returns the exit code."""
    import matplotlib  # noqa: F401  (a missing package is found now, not after hours of training)
    from rich.console import Console

    quiet = given.pop("quiet", False)
    plan = _resumed(given) if "resume" in given else _planned(given)
    check_device(plan.config.device)
    config = plan.config
    steps = config.time_steps if plan.resume or "time_steps" in given else None
    dataset = data.load(
        config.dataset, plan.data_dir, image_size=config.image_size, time_steps=steps, split_by=config.split_by
    )
    if len(dataset.shape) == 4 and steps is None:
        plan = replace(plan, config=replace(plan.config, time_steps=dataset.shape[0]))
    dataset = dataset.to(plan.config.device)
    for method in plan.methods:
        try:
            train.prepare(plan.config.of(method), dataset)
        except ValueError as error:
            raise CommandError(f"{method}: {error}") from error
    if not plan.resume:
        plan = _begin(plan)

    console, config, folder = Console(highlight=False), plan.config, plan.folder
    if not quiet:
        if "sadp" not in plan.methods:
            console.print("--prune-ratio 0 prunes nothing: only full data is trained", soft_wrap=True)
        console.print(
            f"{dataset.name}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test examples; "
            f"{config.model}, T = {config.time_steps}, {config.epochs} epochs; {report.device_name(config.device)}",
            soft_wrap=True,
        )
    try:
        summary = report.summary(config, _run(plan, dataset, None if quiet else console), dataset)
        report.write_json(summary, folder / "results.json")
        report.write_plot(summary, folder / "results.png")
    except KeyboardInterrupt:
        # Without --device it goes on where it began.
        device = f" --device {config.device}" if plan.resume and "device" in given else ""
        again = f"sadp-fast train --resume {shlex.quote(str(folder))}{device}"
        print(f"sadp-fast: interrupted; to go on: {again}", file=sys.stderr)
        return 130
    console.print(report.table(summary))
    console.print(f"{folder / 'results.png'}\n{folder / 'results.json'}", soft_wrap=True)
    return 0


def _run(plan: Plan, dataset: data.Dataset, console: Console | None) -> dict[str, list[dict[str, Any]]]:
    """The histories of every method in turn, each run in a folder of its own."""
    histories = {}
    with ExitStack() as stack:
        bars = stack.enter_context(progress.bars(console)) if console and console.is_terminal else None
        for method in plan.methods:
            config, label = plan.config.of(method), report.label(method, plan.config.score)
            viewers: list[train.Progress] = []
            if bars:
                viewers.append(progress.Bar(bars, label, config.epochs))
            elif console:
                viewers.append(progress.Lines(console, label, config.epochs))
            name = folder_name(method)
            viewers += open_loggers(plan.folder, name)
            histories[method] = train.run(config, dataset, plan.folder / name, viewers, plan.resume).history
    return histories


# ------------------------------------------------------------------------------------------- what the options decide


@dataclass(frozen=True)
class Plan:
    """What is to be run, the methods in their order, and where."""

    config: TrainConfig
    methods: list[str]
    data_dir: str | None
    folder: Path
    resume: bool
    named: bool = True  # whether the folder is one that the user named


def _planned(given: dict[str, Any]) -> Plan:
    """A new run, in a folder where nothing lies yet."""
    options = dict(given)
    folder = _asked_folder(options)
    methods, data_dir = options.pop("compare", ["full"]), options.pop("data_dir", None)
    methods = _without_pruning(methods) if options.get("prune_ratio") == 0 else [*methods, "sadp"]
    options = with_defaults(options, data_dir)
    dataset = options["dataset"]
    named = folder is not None
    folder = folder or Path("runs") / f"{dataset}-{options['model']}-{datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder} is a file: name a new folder with --out")
    if named and folder.exists() and any(folder.iterdir()):
        raise CommandError(f"{folder} is not empty: name a new folder, or continue its run with --resume {folder}")
    return Plan(TrainConfig(**options), methods, data_dir, folder, resume=False, named=named)


def _without_pruning(compared: list[str]) -> list[str]:
    """The methods where nothing is to be pruned: each other than full data would be the same training again."""
    for method in compared:
        if base_method(method) != "full":
            raise CommandError(
                f"--prune-ratio 0 prunes nothing, so {method} would train on full data: leave it out of --compare, "
                "or raise the ratio"
            )
    return compared if "full" in compared else [*compared, "full"]


def _resumed(given: dict[str, Any]) -> Plan:
    """The run in a folder as it began; only --data-dir may have changed, and which device of its kind it runs on."""
    options = dict(given)
    folder = _asked_folder(options)
    if folder is None:
        raise CommandError("--resume needs the run's folder: sadp-fast train --resume DIR")
    try:
        began = json.loads((folder / "run.json").read_text())
        data_dir = options.get("data_dir", began["data_dir"])
        plan = Plan(TrainConfig(**began["config"]), began["methods"], data_dir, folder, resume=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{folder} holds no run to resume ({error}): check the folder") from error
    compared = [method for method in plan.methods if method != "sadp"]
    settings = {**asdict(plan.config), "compare": compared, "data_dir": plan.data_dir}
    device = options.get("device", plan.config.device)
    if device_kind(device) == device_kind(plan.config.device):
        settings["device"] = device
    for option, value in options.items():
        if option in settings and settings[option] != value:
            raise CommandError(
                f"--{option.replace('_', '-')} is {value}, but the run in {folder} began with {settings[option]}: "
                "leave the option out, or start a new run"
            )
    return replace(plan, config=replace(plan.config, device=device))


def _asked_folder(options: dict[str, Any]) -> Path | None:
    """Take the options that name the run's folder."""
    name, out, resume = (options.pop(option, None) for option in ("name", "out", "resume"))
    if name and (Path(name).name != name or name == ".."):
        raise CommandError(f"--name {name!r} is not a plain name: for a folder elsewhere use --out")
    places = [place for place in (out, name and f"runs/{name}", resume) if place]
    if len(places) > 1:
        raise CommandError(f"{places[0]} and {places[1]} both name the run's folder: give one of them")
    return Path(places[0]).expanduser() if places else None


def _begin(plan: Plan) -> Plan:
    """Make the run's folder and write down what is run there; the plan, in a folder that is no other run's."""
    run = {
        "config": asdict(plan.config),
        "methods": plan.methods,
        "data_dir": plan.data_dir and os.path.abspath(os.path.expanduser(plan.data_dir)),
    }
    others = (plan.folder.with_name(f"{plan.folder.name}-{number}") for number in itertools.count(2))
    for folder in itertools.chain([plan.folder], others):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with (folder / "run.json").open("x") as file:  # of runs that begin at the same time, one gets it
                    file.write(json.dumps(run) + "\n")
                break
            except FileExistsError as error:
                if plan.named:
                    raise CommandError(
                        f"another run has begun in {folder}: name a new folder, or continue it with --resume {folder}"
                    ) from error
        except OSError as error:
            raise CommandError(
                f"the run's folder {folder} cannot be made ({error}): name another with --out"
            ) from error
    return replace(plan, folder=folder)
