"""The options that `sadp-fast train` and `sadp-fast study` share, and what holds where none is given."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from ..prune.policies import POLICIES
from ..prune.sadp import WEIGHTS
from ..prune.schedule import SCHEDULES
from . import data, models
from .config import (
    AMP,
    AT_LEAST_ZERO,
    AUGMENT,
    BELOW_ONE,
    LEARNING_RATE,
    MIXUP,
    NATURAL,
    POSITIVE,
    SCORES,
    SHARE,
    TIME_STEPS,
    TRAINED_BY_SGD,
    SettingError,
    implied_by,
    read_variant,
    write_variant,
)
from .event_frames import SPLITS

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
# Spikformer's is three times that of its paper: docs/training-settings.md.
LEARNING_RATES = {"mlp": 2e-3, "conv": 2e-3, "spikformer": 1.5e-3, **dict.fromkeys(TRAINED_BY_SGD, 0.1)}


class CommandError(RuntimeError):
    """A wrong command; the message is one sentence that says why and the remedy."""


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
    option("--time-steps", type=TIME_STEPS, metavar="T", help="time steps (default: 4; event frames 10, or their own)")

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
    option("--lr", type=LEARNING_RATE, metavar="RATE", help="peak learning rate (default: by --model)")
    option(
        "--weight-decay",
        type=AT_LEAST_ZERO,
        metavar="RATE",
        help=f"weight decay (default: 5e-4 with SGD, which trains {', '.join(TRAINED_BY_SGD)}; else AdamW's 0.01)",
    )
    option("--label-smoothing", type=SHARE, metavar="S", help="label smoothing, 0 to 1 (default: 0)")
    option(
        "--augment",
        choices=AUGMENT,
        help="crop training images at random by up to four pixels, and mirror half of them (default: auto, crop-flip "
        "for images of three colours, else none)",
    )
    option(
        "--cutout",
        type=NATURAL,
        metavar="PIXELS",
        help="side of a square hidden at random in every augmented training image (default: cifar 8; else none)",
    )
    option(
        "--mixup",
        type=MIXUP,
        metavar="ALPHA",
        help="mix each training example with another one, by shares from Beta(ALPHA, ALPHA) (default: 0, not at all)",
    )
    option("--amp", choices=tuple(AMP), help="mixed precision (default: bf16 on a GPU, off on the CPU)")
    option("--low-memory", action="store_true", help="keep spikes as bits for the backward pass: a third less memory")
    option("--device", help="cpu, cuda or cuda:N (default: cuda where there is a GPU)")
    return groups


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
    options = {"dataset": dataset, **RECIPES[dataset], **implied_by(options), "device": device, **options}
    options.setdefault("lr", LEARNING_RATES[options["model"]])
    options.setdefault("amp", "bf16" if options["device"].startswith("cuda") else "off")
    return options


def check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device {name!r} is no device: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {name!r} is not supported: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA GPUs; use cpu")
