"""The command `sadp-fast`: options, one line for every error, live progress, and the order in which things happen."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import data, models, report, train
from .config import (
    ABOVE_ZERO,
    AMP,
    AT_LEAST_ZERO,
    BELOW_ONE,
    METHODS,
    NATURAL,
    POSITIVE,
    SCORES,
    SHARE,
    SettingError,
    TrainConfig,
    base_method,
    folder_name,
    read_variant,
    write_variant,
)
from .event_frames import SPLITS
from .pruner import WEIGHTS
from .selection import POLICIES, SCHEDULES
from .study.store import StudyError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

# What a data set is trained with where no option says otherwise.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"model": "conv", "epochs": 30, "batch_size": 32},
    "mnist": {"model": "conv", "epochs": 10, "batch_size": 128},
    "cifar10": {"model": "sew_resnet18", "epochs": 60, "batch_size": 128, "cutout": 8},
    "cifar100": {"model": "sew_resnet18", "epochs": 60, "batch_size": 128, "cutout": 8},
    "nmnist": {"model": "conv", "epochs": 30, "batch_size": 32},
    "dvs": {"model": "sew_resnet18", "epochs": 60, "batch_size": 16},
    "npz": {"model": "conv", "epochs": 30, "batch_size": 32},
    "imagefolder": {"model": "sew_resnet18", "epochs": 60, "batch_size": 32},
}
# Spikformer's is that of its paper for CIFAR.
LEARNING_RATES = {"mlp": 2e-3, "conv": 2e-3, "sew_resnet18": 0.1, "spiking_vgg": 0.1, "spikformer": 5e-4}


class CommandError(RuntimeError):
    """A wrong command; the message is one sentence that says why and the remedy."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for an error (one line on standard error), 130 after Ctrl-C."""
    try:
        given = vars(_parser().parse_args(arguments))
        return given.pop("command")(given)
    except (CommandError, StudyError, data.DataError, train.TrainError) as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "the GPU's memory is too small for this: lower --batch-size"
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sadp_fast"):
            raise
        message = f"the package {error.name!r} is missing: pip install '.[train]' brings all that training needs"
    except KeyboardInterrupt:
        print("sadp-fast: interrupted before training began; nothing was written", file=sys.stderr)
        return 130
    print(f"sadp-fast: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def list_of(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An option's type: a list with commas, and spaces where wanted, of what `read` reads, none of it twice."""

    def parse(text: str) -> list[Any]:
        values = [read(part.strip()) for part in text.split(",")]
        if len(set(values)) != len(values):
            raise SettingError(f"{text!r} names something twice")
        return values

    return parse


def variant(text: str) -> str:
    """A method or a variant of one, in the form in which equal ones are equal; raises SettingError."""
    return write_variant(*read_variant(text))


def _compared(text: str) -> str:
    if variant(text) == "sadp":
        raise SettingError("'sadp' is always run: leave it out")
    return variant(text)


def _parser() -> argparse.ArgumentParser:
    from .study.command import add_parser as add_study  # which reads options as this module does

    parser = _Parser(prog="sadp-fast", description="Train spiking networks on the examples that matter.")
    version = report.package_version("sadp_fast") or "(not installed)"
    parser.add_argument("--version", action="version", version=f"sadp-fast {version}")
    commands = parser.add_subparsers(required=True, metavar="train|study")
    add_study(commands)
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
    option = groups["pruning"].add_argument
    option(
        "--prune-ratio",
        type=BELOW_ONE,
        metavar="R",
        help="mean share of examples left out, [0, 1); 0: full data only (default: 0.5)",
    )
    option(
        "--compare",
        type=lambda text: [] if text.strip() == "none" else list_of(_compared)(text),
        metavar="LIST",
        help=f"also run none, or any of {', '.join(METHODS)}; with settings of their own where wanted: "
        "full,full:epochs=15,sadp:weights=unbiased (default: full)",
    )
    option = groups["training"].add_argument
    option("--seed", type=NATURAL, metavar="N", help="seed of weights, draws and augmentation (default: 0)")

    option = command.add_argument_group("output").add_argument
    option("--out", metavar="DIR", help="folder of the run, new or empty (default: runs/NAME)")
    option("--name", help="name of the run under runs/ (default: data set, model, date and time)")
    option("--resume", nargs="?", const="", metavar="DIR", help="continue the run in DIR, or in --out, as it began")
    option("--quiet", action="store_true", help="no progress, only the table at the end")
    command.set_defaults(command=_train)
    return parser


def add_settings(command: argparse.ArgumentParser) -> dict[str, Any]:
    """Add the options that `train` and `study` share; returns the groups that they are in, by name."""
    groups = {name: command.add_argument_group(name) for name in ("data and network", "pruning", "training")}
    option = groups["data and network"].add_argument
    # Long lists of names stand in the help, where lines break between them.
    option(
        "--dataset",
        choices=data.NAMES,
        metavar="NAME",
        help=f"{', '.join(data.NAMES)} (default: digits, no files needed)",
    )
    option("--data-dir", metavar="PATH", help="the data set's folder or file (default: $SADP_DATA)")
    option("--image-size", type=POSITIVE, metavar="PIXELS", help="side of an imagefolder's images (default: 32)")
    option(
        "--split-by", choices=SPLITS, help="frames of equal numbers of events (default) or of equal time: nmnist, dvs"
    )
    option(
        "--model",
        choices=models.NAMES,
        metavar="NAME",
        help=f"network: {', '.join(models.NAMES)} (default: conv; sew_resnet18 for cifar, dvs, imagefolder)",
    )
    option("--time-steps", type=POSITIVE, metavar="T", help="time steps (default: 4; event frames 10, or their own)")

    option = groups["pruning"].add_argument
    option(
        "--score",
        choices=SCORES,
        metavar="NAME",
        help=f"importance of an example: {', '.join(SCORES)} (default: all, the spike-aware bound over all weight "
        "layers; last: over the last one; grad_norm: exact, slow)",
    )
    option(
        "--policy",
        choices=POLICIES,
        metavar="NAME",
        help=f"how scores become probabilities: {', '.join(POLICIES)} (default: mix)",
    )
    option(
        "--smoothing",
        type=SHARE,
        metavar="C",
        help="how far small probabilities are raised, 0 to 1; epsilon of epsilon_greedy (default: 0.3)",
    )
    option(
        "--weights",
        choices=WEIGHTS,
        help="weights of the losses (default: sum for the policy infobatch, else none)",
    )
    option("--score-momentum", type=BELOW_ONE, metavar="M", help="how much of an old score is kept (default: 0)")
    option("--schedule", choices=SCHEDULES, help="the ratio's course over the epochs (default: constant)")
    option("--warmup-epochs", type=NATURAL, metavar="N", help="full-data epochs at the start (default: by --epochs)")
    option(
        "--tail-epochs",
        type=NATURAL,
        metavar="N",
        help="full-data epochs at the end (default: an eighth of them for the policy infobatch, else 0)",
    )

    option = groups["training"].add_argument
    option("--epochs", type=POSITIVE, metavar="N", help="epochs (default: 30; mnist 10; cifar, dvs, imagefolder 60)")
    option("--batch-size", type=POSITIVE, metavar="B", help="examples a step (default: 32; mnist, cifar 128; dvs 16)")
    option("--lr", type=ABOVE_ZERO, metavar="RATE", help="peak learning rate (default: by --model)")
    option(
        "--weight-decay",
        type=AT_LEAST_ZERO,
        metavar="RATE",
        help="weight decay (default: 5e-4 with SGD, which trains sew_resnet18 and spiking_vgg; else AdamW's 0.01)",
    )
    option("--label-smoothing", type=SHARE, metavar="S", help="label smoothing, 0 to 1 (default: 0)")
    option(
        "--cutout",
        type=NATURAL,
        metavar="PIXELS",
        help="side of a square hidden at random in every training image of three colours (default: cifar 8; else none)",
    )
    option("--amp", choices=tuple(AMP), help="mixed precision (default: bf16 on a GPU, off on the CPU)")
    option("--low-memory", action="store_true", help="keep spikes as bits for the backward pass: a third less memory")
    option("--device", help="cpu, cuda or cuda:N (default: cuda where there is a GPU)")
    return groups


def _train(given: dict[str, Any]) -> int:
    import matplotlib  # noqa: F401  (a missing package is found now, not after hours of training)
    from rich.console import Console

    quiet = given.pop("quiet", False)
    plan = _resumed(given) if "resume" in given else _planned(given)
    check_device(plan.config.device)
    config = plan.config
    dataset = data.load(
        config.dataset,
        plan.data_dir,
        image_size=config.image_size,
        time_steps=config.time_steps if plan.resume or "time_steps" in given else None,
        split_by=config.split_by,
    )
    if len(dataset.shape) == 4 and not plan.resume and "time_steps" not in given:
        plan = replace(plan, config=replace(plan.config, time_steps=dataset.shape[0]))
    dataset = dataset.to(plan.config.device)
    for method in plan.methods:
        try:
            train.prepare(plan.config.of(method), dataset)
        except ValueError as error:
            raise CommandError(f"{method}: {error}") from error
    if not plan.resume:
        _begin(plan)

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
        print(f"sadp-fast: interrupted; to go on: sadp-fast train --resume {shlex.quote(str(folder))}", file=sys.stderr)
        return 130
    console.print(report.table(summary))
    console.print(f"{folder / 'results.png'}\n{folder / 'results.json'}", soft_wrap=True)
    return 0


def _run(plan: Plan, dataset: data.Dataset, console: Console | None) -> dict[str, list[dict[str, Any]]]:
    """The histories of every method in turn, each run in a folder of its own."""
    histories = {}
    with ExitStack() as stack:
        bars = stack.enter_context(_bars(console)) if console and console.is_terminal else None
        for method in plan.methods:
            config, label = plan.config.of(method), report.label(method, plan.config.score)
            viewers: list[train.Progress] = []
            if bars:
                viewers.append(_Bar(bars, label, config.epochs))
            elif console:
                viewers.append(_Lines(console, label, config.epochs))
            name = folder_name(method)
            if board := report.tensorboard(plan.folder / "tb" / name):
                viewers.append(board)
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


def _planned(given: dict[str, Any]) -> Plan:
    """A new run, in a folder where nothing lies yet."""
    options = dict(given)
    folder = _asked_folder(options)
    methods, data_dir = options.pop("compare", ["full"]), options.pop("data_dir", None)
    methods = _without_pruning(methods) if options.get("prune_ratio") == 0 else [*methods, "sadp"]
    options = with_defaults(options, data_dir)
    dataset = options["dataset"]
    folder = folder or Path("runs") / f"{dataset}-{options['model']}-{datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder} is a file: name a new folder with --out")
    if folder.exists() and any(folder.iterdir()):
        raise CommandError(f"{folder} is not empty: name a new folder, or continue its run with --resume {folder}")
    return Plan(TrainConfig(**options), methods, data_dir, folder, resume=False)


def _without_pruning(compared: list[str]) -> list[str]:
    """The methods where nothing is to be pruned: each other than full data would be the same training again."""
    for method in compared:
        if base_method(method) != "full":
            raise CommandError(
                f"--prune-ratio 0 prunes nothing, so {method} would train on full data: leave it out of --compare, "
                "or raise the ratio"
            )
    return compared if "full" in compared else [*compared, "full"]


def with_defaults(options: dict[str, Any], data_dir: str | None) -> dict[str, Any]:
    """The options of a new run with what the data set and the network are trained with by default."""
    dataset = options.get("dataset", "digits")
    if dataset == "digits" and data_dir is not None:
        raise CommandError("--data-dir is given, but digits needs no files: leave it out or choose another --dataset")
    if dataset != "imagefolder" and "image_size" in options:
        raise CommandError("--image-size is for --dataset imagefolder only: leave it out")
    if dataset not in data.EVENTS and "split_by" in options:
        raise CommandError("--split-by is for --dataset nmnist and dvs only: leave it out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"dataset": dataset, **RECIPES[dataset], "device": device, **options}
    options.setdefault("lr", LEARNING_RATES[options["model"]])
    options.setdefault("amp", "bf16" if options["device"].startswith("cuda") else "off")
    return options


def _resumed(given: dict[str, Any]) -> Plan:
    """The run in a folder as it began; only --data-dir may have changed."""
    options = dict(given)
    folder = _asked_folder(options)
    if folder is None:
        raise CommandError("--resume needs the run's folder: sadp-fast train --resume DIR")
    try:
        began = json.loads((folder / "run.json").read_text())
        plan = Plan(
            TrainConfig(**began["config"]),
            began["methods"],
            options.get("data_dir", began["data_dir"]),
            folder,
            resume=True,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{folder} holds no run to resume ({error}): check the folder") from error
    settings = {
        **asdict(plan.config),
        "compare": [method for method in plan.methods if method != "sadp"],
        "data_dir": plan.data_dir,
    }
    for option, value in options.items():
        if option in settings and settings[option] != value:
            raise CommandError(
                f"--{option.replace('_', '-')} is {value}, but the run in {folder} began with {settings[option]}: "
                "leave the option out, or start a new run"
            )
    return plan


def _asked_folder(options: dict[str, Any]) -> Path | None:
    """Take the options that name the run's folder."""
    name, out, resume = (options.pop(option, None) for option in ("name", "out", "resume"))
    if name and (Path(name).name != name or name == ".."):
        raise CommandError(f"--name {name!r} is not a plain name: for a folder elsewhere use --out")
    places = [place for place in (out, name and f"runs/{name}", resume) if place]
    if len(places) > 1:
        raise CommandError(f"{places[0]} and {places[1]} both name the run's folder: give one of them")
    return Path(places[0]).expanduser() if places else None


def _begin(plan: Plan) -> None:
    """Make the run's folder and write down what is run there."""
    run = {
        "config": asdict(plan.config),
        "methods": plan.methods,
        "data_dir": plan.data_dir and os.path.abspath(os.path.expanduser(plan.data_dir)),
    }
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        (plan.folder / "run.json").write_text(json.dumps(run) + "\n")
    except OSError as error:
        raise CommandError(
            f"the run's folder {plan.folder} cannot be made ({error}): name another with --out"
        ) from error


def check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device {name!r} is no device: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {name!r} is not supported: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA GPUs; use cpu")


# -------------------------------------------------------------------------------------------------------- progress


def _bars(console: Console) -> Bars:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )


class _Bar(train.Progress):
    """A live line for one method."""

    def __init__(self, bars: Bars, label: str, epochs: int) -> None:
        self.bars, self.epochs = bars, epochs
        self.loss = self.accuracy = math.nan
        self.task = bars.add_task(label, total=epochs, status="")

    def step(self, epoch: int, share: float, step: int, loss: float | None, kept: float) -> None:
        self.loss = self.loss if loss is None else loss
        self._show(epoch - 1 + share, epoch, step, kept)

    def epoch(self, entry: dict[str, Any]) -> None:
        self.loss, self.accuracy = entry["loss"], entry["test_accuracy"]
        self._show(entry["epoch"], entry["epoch"], entry["steps"], 1 - entry["ratio"])

    def _show(self, done: float, epoch: int, step: int, kept: float) -> None:
        # Of constant width, or the bar would jump about.
        where = f"epoch {epoch:>{len(str(self.epochs))}}/{self.epochs} step {step:4}"
        status = f"{where} kept {kept:4.0%} loss {self.loss:6.3f} accuracy {self.accuracy:6.1%}"
        self.bars.update(self.task, completed=done, status=status.replace("nan", "  -"))


class _Lines(train.Progress):
    """A plain line after each epoch, where the output is no terminal."""

    def __init__(self, console: Console, label: str, epochs: int) -> None:
        self.console, self.label, self.epochs = console, label, epochs

    def epoch(self, entry: dict[str, Any]) -> None:
        self.console.print(
            f"{self.label}: epoch {entry['epoch']}/{self.epochs}, loss {entry['loss']:.3f}, "
            f"accuracy {entry['test_accuracy']:.1%}, kept {1 - entry['ratio']:.0%}, {entry['seconds']:.2f} s",
            soft_wrap=True,
        )


if __name__ == "__main__":
    # As the module that others import from, or there would be two of every class.
    from sadp_fast import cli

    sys.exit(cli.main())
