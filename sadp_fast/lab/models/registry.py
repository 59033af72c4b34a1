"""The networks that `--model` names. A new one is a record here, with its layers in the file of its family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..registry import by_name
from .layers import Layers, SpikingNetwork
from .plain import conv, mlp
from .sew_resnet import sew_resnet18
from .spikformer import size_for, spikformer
from .vgg import VGG11, VGGSNN, spiking_vgg

WEIGHT_DECAY = {"SGD": 5e-4, "AdamW": 1e-2}  # the optimizers, and what they are given where nothing is asked for


class Frame(NamedTuple):
    """What a network sees at one time step."""

    channels: int
    height: int
    width: int
    events: bool  # whether it is another one at every step

    @property
    def side(self) -> int:
        return min(self.height, self.width)


@dataclass(frozen=True)
class Model:
    """A network and how it is trained by default.

    Attributes:
        name: of the option --model.
        layers: of a network for such frames and so many classes.
        optimizer: one of WEIGHT_DECAY.
        lr: its peak learning rate.
        smallest: pixels a side that it needs.
    """

    name: str
    layers: Callable[[Frame, int], Layers]
    optimizer: str
    lr: float
    smallest: int = 4


MODELS = by_name(
    Model("mlp", lambda x, n: mlp(x.channels * x.height * x.width, n), "AdamW", 2e-3, smallest=1),
    Model("conv", lambda x, n: conv(x.channels, x.height, x.width, n), "AdamW", 2e-3),
    Model("sew_resnet18", lambda x, n: sew_resnet18(x.channels, n, imagenet=x.side >= 96), "SGD", 0.1),
    Model("spiking_vgg", lambda x, n: spiking_vgg(x.channels, x.height, x.width, n, VGG11), "SGD", 0.1),
    Model("vggsnn", lambda x, n: spiking_vgg(x.channels, x.height, x.width, n, VGGSNN), "SGD", 0.1),
    # The rate is three times that of its paper: docs/training-settings.md.
    Model("spikformer", lambda x, n: spikformer(x.channels, n, size_for(x.side, x.events)), "AdamW", 1.5e-3),
)
NAMES = tuple(MODELS)


def trained_by(optimizer: str) -> list[str]:
    """The networks that this optimizer trains."""
    return [model.name for model in MODELS.values() if model.optimizer == optimizer]


def build(name: str, in_shape: tuple[int, ...], num_classes: int, time_steps: int) -> SpikingNetwork:
    """A network by name for examples of shape `in_shape`: (C, H, W), or (T, C, H, W) for event frames.

    name: "mlp" (two hidden layers of 256), "conv" (three 3x3 convolutions), "sew_resnet18" (SEW-ResNet18 with ADD,
    width 64; Fang et al., arXiv 2102.04159), "spiking_vgg" (VGG-11), "vggsnn" (Deng et al., arXiv 2202.11946) or
    "spikformer" (Zhou et al., arXiv 2209.15425; depth 4 and width 384 for CIFAR, other sizes for other images: see
    `spikformer.size_for`). Weights come from torch's global generator. Raises ValueError.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    if time_steps < 1:
        raise ValueError(f"time_steps is {time_steps}: it must be at least 1")
    events = len(in_shape) == 4
    if events and in_shape[0] != time_steps:
        raise ValueError(f"time_steps is {time_steps} but the event frames have {in_shape[0]} steps: use that number")
    channels, height, width = in_shape[-3:]
    model, frame = MODELS[name], Frame(channels, height, width, events)
    if frame.side < model.smallest:
        least = f"{model.smallest}x{model.smallest}"
        raise ValueError(f"model {name!r} needs images of at least {least} pixels, not {height}x{width}: use 'mlp'")
    return SpikingNetwork(*model.layers(frame, num_classes), time_steps, events=events)
