"""Spiking networks for images and event frames: layers of torch.nn and this package's neurons, nothing else.

One file for each family; `layers` has what they share.
"""

from .layers import Layers, PerStep, SpikingNetwork
from .plain import conv, mlp
from .sew_resnet import SEWBlock, sew_resnet18
from .spikformer import size_for, spikformer
from .vgg import VGG11, VGGSNN, spiking_vgg

__all__ = ["NAMES", "PerStep", "SEWBlock", "SpikingNetwork", "build"]

NAMES = ("mlp", "conv", "sew_resnet18", "spiking_vgg", "vggsnn", "spikformer")


def build(name: str, in_shape: tuple[int, ...], num_classes: int, time_steps: int) -> SpikingNetwork:
    """A network by name for examples of shape `in_shape`: (C, H, W), or (T, C, H, W) for event frames.

    name: "mlp" (two hidden layers of 256), "conv" (three 3x3 convolutions), "sew_resnet18" (SEW-ResNet18 with ADD,
    width 64; Fang et al., arXiv 2102.04159), "spiking_vgg" (VGG-11), "vggsnn" (Deng et al., arXiv 2202.11946) or
    "spikformer" (Zhou et al., arXiv 2209.15425; depth 4 and width 384 for CIFAR, other sizes for other images: see
    `spikformer.size_for`). Weights come from torch's global generator. Raises ValueError.
    """
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(NAMES)}")
    if time_steps < 1:
        raise ValueError(f"time_steps is {time_steps}: it must be at least 1")
    events = len(in_shape) == 4
    if events and in_shape[0] != time_steps:
        raise ValueError(f"time_steps is {time_steps} but the event frames have {in_shape[0]} steps: use that number")
    channels, height, width = in_shape[-3:]
    side = min(height, width)
    if name != "mlp" and side < 4:
        raise ValueError(f"model {name!r} needs images of at least 4x4 pixels, not {height}x{width}: use 'mlp'")
    layers: Layers
    if name == "mlp":
        layers = mlp(channels * height * width, num_classes)
    elif name == "conv":
        layers = conv(channels, height, width, num_classes)
    elif name == "sew_resnet18":
        layers = sew_resnet18(channels, num_classes, imagenet=side >= 96)
    elif name == "spiking_vgg":
        layers = spiking_vgg(channels, height, width, num_classes, VGG11)
    elif name == "vggsnn":
        layers = spiking_vgg(channels, height, width, num_classes, VGGSNN)
    else:
        layers = spikformer(channels, num_classes, size_for(side, events))
    return SpikingNetwork(*layers, time_steps, events=events)
