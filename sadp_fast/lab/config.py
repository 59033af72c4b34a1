"""What decides a training run: its settings, the methods that are compared, and variants of them written as text."""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..prune import sadp as pruner
from ..prune.probabilities import POLICIES, SCHEDULES
from .methods import METHODS

SCORES = tuple("grad_norm" if score == "given" else score for score in pruner.SCORES)
AUGMENT = ("auto", "crop-flip", "crop", "none")
TRAINED_BY_SGD = ("sew_resnet18", "spiking_vgg", "vggsnn")  # the other networks by AdamW
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What decides nothing where nothing is pruned ...
PRUNING = {"score", "policy", "smoothing", "weights", "score_momentum", "schedule", "warmup_epochs", "tail_epochs"}
SCORING = {"policy", "smoothing", "score_momentum"}  # ... and where all scores are alike
_UNIFORM = ("random", "static_random")


class SettingError(argparse.ArgumentTypeError, ValueError):  # the first, so that readers can be types of options
    """Text that names no method, setting or value; the message says why."""


def number(kind: type, condition: Callable[[Any], bool], requirement: str) -> Callable[[str], Any]:
    """Reader of a number from text, which raises SettingError where it is not as required."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not condition(value):
            raise SettingError(f"{text!r} is not {requirement}")
        return value

    return read


def one_of(*choices: str) -> Callable[[str], str]:
    """Reader of one of these words, which raises SettingError for any other."""

    def read(text: str) -> str:
        if text not in choices:
            raise SettingError(f"{text!r} is not one of {','.join(choices)}")
        return text

    return read


POSITIVE = number(int, lambda value: value >= 1, "a whole number of at least 1")
NATURAL = number(int, lambda value: 0 <= value < 2**63, "a whole number of at least 0")
SHARE = number(float, lambda value: 0 <= value <= 1, "between 0 and 1")
TIME_STEPS = number(int, lambda value: 1 <= value <= 100_000, "a whole number of at least 1, at most 100000")
BELOW_ONE = number(float, lambda value: 0 <= value < 1, "at least 0 and below 1")
ABOVE_ZERO = number(float, lambda value: 0 < value < math.inf, "a number above 0")
LEARNING_RATE = number(float, lambda value: 0 < value <= 1000, "a number above 0, at most 1000")
MIXUP = number(float, lambda value: value == 0 or 0.01 <= value <= 100, "0, or from 0.01 to 100")
AT_LEAST_ZERO = number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")

# How the settings that a variant of a method may change are read from text. The others belong to a whole comparison:
# data, network, ratio, seed and device.
SETTINGS: dict[str, Callable[[str], Any]] = {
    "epochs": POSITIVE,
    "batch_size": POSITIVE,
    "lr": LEARNING_RATE,
    "weight_decay": AT_LEAST_ZERO,
    "label_smoothing": SHARE,
    "augment": one_of(*AUGMENT),
    "cutout": NATURAL,
    "mixup": MIXUP,
    "amp": one_of(*AMP),
    "low_memory": lambda text: one_of("true", "false")(text) == "true",
    "score": one_of(*SCORES),
    "policy": one_of(*POLICIES),
    "smoothing": SHARE,
    "weights": one_of(*pruner.WEIGHTS),
    "score_momentum": BELOW_ONE,
    "schedule": one_of(*SCHEDULES),
    "warmup_epochs": NATURAL,
    "tail_epochs": NATURAL,
}


def implied_by(settings: dict[str, Any]) -> dict[str, Any]:
    """What goes with these settings, unless they say otherwise: where images stay as they are, nothing is cut out."""
    return {"cutout": 0} if settings.get("augment") == "none" else {}


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run's result, named as the options of `sadp-fast train`.

    `method` is one of METHODS, whose changes `of` makes. `score` is one of SADP's, or "grad_norm": the exact norm of
    each example's gradient, at a cost that only small networks can bear. `weight_decay` is the optimizer's; None: 5e-4
    for the networks that are TRAINED_BY_SGD, torch's default for AdamW. `augment` is how training images are
    changed at random, "auto" being "crop-flip" for images of three colours and else "none"; `cutout` is the side in
    pixels of the square that is then hidden in each (see `augmentation.crop_flip_normalise`), and `mixup` the alpha by
    which examples of a batch are mixed (see `augmentation.mixup`), 0 being not at all. `low_memory` keeps as bits the
    spikes that wait for the backward pass, with the same results.
    """

    dataset: str = "digits"
    image_size: int = 32
    split_by: str = "number"
    model: str = "conv"
    time_steps: int = 4
    epochs: int = 30
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float | None = None
    label_smoothing: float = 0.0
    augment: str = "auto"
    cutout: int = 0
    mixup: float = 0.0
    amp: str = "off"
    low_memory: bool = False
    method: str = "sadp"
    prune_ratio: float = 0.5
    score: str = "all"
    policy: str = "mix"
    smoothing: float = 0.3
    weights: str | None = None
    score_momentum: float = 0.0
    schedule: str = "constant"
    warmup_epochs: int | None = None
    tail_epochs: int | None = None
    seed: int = 0
    device: str = "cpu"

    def of(self, variant: str) -> TrainConfig:
        """The same conditions for a method or a variant of one (see `read_variant`)."""
        method, changes = read_variant(variant)
        return replace(self, method=method, **{**METHODS[method].settings, **implied_by(changes), **changes})

    def settled(self) -> TrainConfig:
        """The same run, with what `SADP` takes for weights, warm-up and tail written out where they are None."""
        weights, warmup, tail = pruner.settle(
            self.policy, self.epochs, self.weights, self.warmup_epochs, self.tail_epochs
        )
        return replace(self, weights=weights, warmup_epochs=warmup, tail_epochs=tail)

    def conditions(self) -> dict[str, Any]:
        """What decides the result: not the device, nor what the method does not use, nor how a default is written.

        So a full-data run is one and the same run beside all settings of pruning.
        """
        unused = {"device"} | (PRUNING if self.prune_ratio == 0 else SCORING if self.score in _UNIFORM else set())
        return {key: value for key, value in asdict(self.settled()).items() if key not in unused}


def read_variant(text: str) -> tuple[str, dict[str, Any]]:
    """A method and the settings that are changed for it: "full:epochs=30", "sadp:weights=unbiased:tail-epochs=4".

    Returns:
        the method, one of METHODS, and the values by the names of TrainConfig's fields, in their order.

    Raises:
        SettingError: an unknown method or setting, a setting that the method does not have, or a bad value.
    """
    method, *parts = text.split(":")
    if method not in METHODS:
        raise SettingError(f"{method!r} is not one of {','.join(METHODS)}")
    changes: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        key = name.replace("-", "_")
        if not equals:
            raise SettingError(f"{part!r} in {text!r} is not SETTING=VALUE")
        if key not in SETTINGS:
            raise SettingError(f"{name!r} in {text!r} is not one of {','.join(SETTINGS)}")
        if key not in settings_of(method):
            raise SettingError(f"{text!r} sets {key}, which {method} does not have or which makes it {method}")
        if key in changes:
            raise SettingError(f"{text!r} sets {key} twice")
        try:
            changes[key] = SETTINGS[key](value)
        except SettingError as error:
            raise SettingError(f"{error}, which {key} in {text!r} has to be") from None
    return method, {field.name: changes[field.name] for field in fields(TrainConfig) if field.name in changes}


def write_variant(method: str, changes: dict[str, Any]) -> str:
    """The text that `read_variant` reads: the same for the same variant."""
    words = {True: "true", False: "false"}
    return ":".join([method, *(f"{key}={words.get(v, v) if isinstance(v, bool) else v}" for key, v in changes.items())])


def base_method(variant: str) -> str:
    """The method that a variant is one of."""
    return variant.partition(":")[0]


def settings_of(method: str) -> set[str]:
    """The settings that a variant of this method may change: those that it uses, but what makes it this method."""
    unused: Iterable[str] = ()
    if method == "full":
        unused = PRUNING
    elif METHODS[method].settings.get("score") in _UNIFORM:
        unused = SCORING
    return set(SETTINGS) - set(unused) - ({"score", "policy"} & METHODS[method].settings.keys())


def device_kind(device: str) -> str:
    """ "cuda" of "cuda:1": a run that was begun on one device may go on on any of its kind."""
    return device.partition(":")[0]


def folder_name(variant: str) -> str:
    """A variant as part of a file's name, which a file system would refuse if it were too long."""
    name = whole_folder_name(variant)
    return name if len(name) <= 100 else f"{name[:89]}-{hashlib.sha256(variant.encode()).hexdigest()[:10]}"


def whole_folder_name(variant: str) -> str:
    """The same, however long: runs that were begun before names were cut have it."""
    return variant.replace(":", "-")
