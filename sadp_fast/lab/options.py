"""The options that `sadp-fast train` and `sadp-fast study` share, and what holds where none is given."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from . import data
from .data.data_sets import takers
from .models import MODELS
from .setting_fields import SettingError, add_options
from .settings import PRUNING, DataSettings, TrainConfig, TrainingSettings, implied_by, read_variant, write_variant


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
    group = groups["data and network"]
    add_options(group, DataSettings, {"dataset"})
    group.add_argument("--data-dir", metavar="PATH", help="the data set's folder or file (default: $SADP_DATA)")
    add_options(group, DataSettings, {each.name for each in fields(DataSettings)} - {"dataset"})
    add_options(groups["pruning"], TrainConfig, PRUNING)
    add_options(groups["training"], TrainingSettings)
    add_options(groups["training"], TrainConfig, {"device"})
    return groups


def with_defaults(options: dict[str, Any], data_dir: str | None) -> dict[str, Any]:
    """The options of a new run with what the data set and the network are trained with by default."""
    dataset = options.get("dataset", "digits")
    if data.DATASETS[dataset].layout is None and data_dir is not None:
        raise CommandError(
            f"--data-dir is given, but {dataset} needs no files: leave it out or choose another --dataset"
        )
    for option in ("image_size", "split_by"):
        those = takers(option)
        if option in options and dataset not in those:
            flag = f"--{option.replace('_', '-')}"
            raise CommandError(f"{flag} is for --dataset {' and '.join(those)} only: leave it out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = data.recipe(dataset, data_dir)
    options = {"dataset": dataset, **recipe, **implied_by(options), "device": device, **options}
    options.setdefault("lr", MODELS[options["model"]].lr)
    options.setdefault("amp", "bf16" if options["device"].startswith("cuda") else "off")
    return options


def check_device(name: str) -> None:
    """Raise CommandError for what is no device that torch sees here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device {name!r} is no device: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {name!r} is not supported: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA GPUs; use cpu")
