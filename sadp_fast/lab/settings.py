"""What decides a training run: its settings, and variants of the methods that are compared, written as text."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..prune.scores import SCORES as PRUNING_SCORES
from ..prune.settings import Settings
from .data.data_sets import DATASETS, by_recipe, takers
from .event_frames import SPLITS
from .methods import METHODS
from .models.registry import MODELS, trained_by
from .setting_fields import SettingError, number, reader, setting

EXACT = "grad_norm"  # the score that training gives to SADP
SCORES = tuple(EXACT if score == "given" else score for score in PRUNING_SCORES)
POSITIVE = number(int, lambda value: value >= 1, "a whole number of at least 1")
NATURAL = number(int, lambda value: 0 <= value < 2**63, "a whole number of at least 0")
TIME_STEPS = number(int, lambda value: 1 <= value <= 100_000, "a whole number of at least 1, at most 100000")
SHARE = number(float, lambda value: 0 <= value <= 1, "between 0 and 1")
ABOVE_ZERO = number(float, lambda value: 0 < value < math.inf, "a number above 0")
AT_LEAST_ZERO = number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
LEARNING_RATE = number(float, lambda value: 0 < value <= 1000, "a number above 0, at most 1000")
MIXUP = number(float, lambda value: value == 0 or 0.01 <= value <= 100, "0, or from 0.01 to 100")
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The data set and the network."""

    dataset: str = setting("digits", "", choices=DATASETS, metavar="NAME", shown="digits, no files needed")
    image_size: int = setting(32, "side of an imagefolder's images", read=POSITIVE, metavar="PIXELS")
    split_by: str = setting(
        "number",
        f"frames of equal numbers of events (default) or of equal time: {', '.join(takers('split_by'))}",
        choices=SPLITS,
        shown="",
    )
    model: str = setting(
        "conv", "network", choices=MODELS, metavar="NAME", shown=by_recipe("model", "conv", "{value} for {names}")
    )
    time_steps: int = setting(4, "time steps", read=TIME_STEPS, metavar="T", shown="4; event frames 10, or their own")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How long, and with what optimizer, augmentation and precision.

    `weight_decay` is the optimizer's; None: 5e-4 for SGD, torch's default for AdamW. `augment` is how training images
    are changed at random, "auto" being "crop-flip" for images of three colours and else "none"; `cutout` is the side
    in pixels of the square that is then hidden in each (see `augmentation.crop_flip_normalise`), and `mixup` the alpha
    by which examples of a batch are mixed (see `augmentation.mixup`), 0 being not at all. `low_memory` keeps as bits
    the spikes that wait for the backward pass, with the same results. `method` is one of METHODS, whose changes
    `TrainConfig.of` makes.
    """

    epochs: int = setting(30, "epochs", read=POSITIVE, metavar="N", shown=by_recipe("epochs", 30))
    batch_size: int = setting(32, "examples a step", read=POSITIVE, metavar="B", shown=by_recipe("batch_size", 32))
    lr: float = setting(2e-3, "peak learning rate", read=LEARNING_RATE, metavar="RATE", shown="by --model")
    weight_decay: float | None = setting(
        None,
        "weight decay",
        read=AT_LEAST_ZERO,
        metavar="RATE",
        shown=f"5e-4 with SGD, which trains {', '.join(trained_by('SGD'))}; else AdamW's 0.01",
    )
    label_smoothing: float = setting(0.0, "label smoothing, 0 to 1", read=SHARE, metavar="S")
    augment: str = setting(
        "auto",
        "crop training images at random by up to four pixels, and mirror half of them",
        choices=("auto", "crop-flip", "crop", "none"),
        shown="auto, crop-flip for images of three colours, else none",
    )
    cutout: int = setting(
        0,
        "side of a square hidden at random in every augmented training image",
        read=NATURAL,
        metavar="PIXELS",
        shown=by_recipe("cutout", 0).removeprefix("0; ") + "; else none",
    )
    mixup: float = setting(
        0.0,
        "mix each training example with another one, by shares from Beta(ALPHA, ALPHA)",
        read=MIXUP,
        metavar="ALPHA",
        shown="0, not at all",
    )
    amp: str = setting("off", "mixed precision", choices=AMP, shown="bf16 on a GPU, off on the CPU")
    low_memory: bool = setting(False, "keep spikes as bits for the backward pass: a third less memory")
    method: str = "sadp"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings, TrainingSettings, DataSettings):
    """All that decides a run's result, named as the options of `sadp-fast train`; the fields are in their bases' order.

    `score` is one of SADP's, or "grad_norm": the exact norm of each example's gradient, at a cost that only small
    networks can bear.
    """

    score: str = setting(
        "all",
        "importance of an example",
        choices=SCORES,
        metavar="NAME",
        shown="all, the spike-aware bound over all weight layers; last: over the last one; grad_norm: exact, slow",
    )
    seed: int = setting(0, "seed of weights, draws and augmentation", read=NATURAL, metavar="N")
    device: str = setting("cpu", "cpu, cuda or cuda:N", shown="cuda where there is a GPU")

    def __post_init__(self) -> None:
        """What is of pruning is checked by `pruning`, where the data and the network are known."""

    def pruning(self) -> Settings:
        """SADP's part; raises ValueError for a value that is out of its range."""
        values = {each.name: getattr(self, each.name) for each in fields(Settings)}
        return Settings(**values | ({"score": "given"} if self.score == EXACT else {}))

    def of(self, variant: str) -> TrainConfig:
        """The same conditions for a method or a variant of one (see `read_variant`)."""
        method, changes = read_variant(variant)
        return replace(self, method=method, **{**METHODS[method].settings, **implied_by(changes), **changes})

    def conditions(self) -> dict[str, Any]:
        """What decides the result: not the device, nor what the method does not use, nor how a default is written.

        So a full-data run is one and the same run beside all settings of pruning.
        """
        unused = PRUNING if self.prune_ratio == 0 else SCORING if _uniform(self.score) else set()
        settled = asdict(self.settled(self.epochs))
        return {key: value for key, value in settled.items() if key not in {"device", *unused}}


# What decides nothing where nothing is pruned ...
PRUNING = {each.name for each in fields(Settings)} - {"prune_ratio", "seed"}
SCORING = {"policy", "smoothing", "score_momentum"}  # ... and where all scores are alike
# How the settings that a variant of a method may change are read from text. The others belong to a whole comparison:
# data, network, ratio, seed and device.
SETTINGS = {
    each.name: reader(each)
    for each in fields(TrainConfig)
    if each.name in PRUNING | {own.name for own in fields(TrainingSettings)} - {"method"}
}


def _uniform(score: str) -> bool:
    """Whether all examples have the same score."""
    return score != EXACT and PRUNING_SCORES[score].source == "none"


def implied_by(settings: dict[str, Any]) -> dict[str, Any]:
    """What goes with these settings, unless they say otherwise: where images stay as they are, nothing is cut out."""
    return {"cutout": 0} if settings.get("augment") == "none" else {}


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
    return method, {key: changes[key] for key in SETTINGS if key in changes}


def write_variant(method: str, changes: dict[str, Any]) -> str:
    """The text that `read_variant` reads: the same for the same variant."""
    return ":".join([method, *(f"{key}={str(v).lower() if isinstance(v, bool) else v}" for key, v in changes.items())])


def base_method(variant: str) -> str:
    """The method that a variant is one of."""
    return variant.partition(":")[0]


def settings_of(method: str) -> set[str]:
    """The settings that a variant of this method may change: those that it uses, but what makes it this method."""
    own = METHODS[method].settings
    unused = PRUNING if method == "full" else SCORING if _uniform(own.get("score", "all")) else set()
    return set(SETTINGS) - unused - ({"score", "policy"} & own.keys())


def device_kind(device: str) -> str:
    """ "cuda" of "cuda:1": a run that was begun on one device may go on on any of its kind."""
    return device.partition(":")[0]


def folder_name(variant: str) -> str:
    """A variant as part of a file's name, which a file system would refuse if it were too long."""
    name = variant.replace(":", "-")
    return name if len(name) <= 100 else f"{name[:89]}-{hashlib.sha256(variant.encode()).hexdigest()[:10]}"
