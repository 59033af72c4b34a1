"""Spiking networks for images and event frames: layers of torch.nn and sadp_fast.BatchNormLIF, nothing else."""

import torch
from torch import Tensor, nn

from .batch_norm_lif import BatchNormLIF
from .spike_storage import packed_spikes
from .surrogate import ATan

NAMES = ("mlp", "conv", "sew_resnet18")


def build(name: str, in_shape: tuple[int, ...], num_classes: int, time_steps: int) -> "SpikingNetwork":
    """A network by name for examples of shape `in_shape`: (C, H, W), or (T, C, H, W) for event frames.

    name: "mlp" (two hidden layers of 256), "conv" (three 3x3 convolutions) or "sew_resnet18" (SEW-ResNet18 with ADD,
    width 64; Fang et al., arXiv 2102.04159). Weights come from torch's global generator. Raises ValueError.
    """
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(NAMES)}")
    if time_steps < 1:
        raise ValueError(f"time_steps is {time_steps}: it must be at least 1")
    if len(in_shape) == 4 and in_shape[0] != time_steps:
        raise ValueError(f"time_steps is {time_steps} but the event frames have {in_shape[0]} steps: use that number")
    channels, height, width = in_shape[-3:]
    if name != "mlp" and min(height, width) < 4:
        raise ValueError(f"model {name!r} needs images of at least 4x4 pixels, not {height}x{width}: use 'mlp'")
    if name == "mlp":
        layers = _mlp(channels * height * width, num_classes)
    elif name == "conv":
        layers = _conv(channels, (height // 4) * (width // 4), num_classes)
    else:
        layers = _sew_resnet18(channels, num_classes, imagenet=min(height, width) >= 96)
    return SpikingNetwork(*layers, time_steps, events=len(in_shape) == 4)


class SpikingNetwork(nn.Module):
    """Stem (the first weights), first neurons, spiking body, and the mean of its output over time.

    Images [N, C, H, W] are coded directly: every time step sees the same frame, so the stem runs once and the neurons
    take its output T times. Event frames [N, T, C, H, W] bring their own time axis. Output: logits [N, num_classes],
    float32 at least, also under autocast: the loss of half-precision logits has two or three digits.
    """

    def __init__(
        self, stem: list[nn.Module], neuron: BatchNormLIF, body: list[nn.Module], time_steps: int, events: bool
    ) -> None:
        super().__init__()
        self.stem = PerStep(*stem) if events else nn.Sequential(*stem)
        self.neuron, self.body, self.time_steps = neuron, nn.Sequential(*body), time_steps
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.stem, PerStep):
            spikes = self.neuron(self.stem(x.transpose(0, 1)))
        else:
            spikes = self.neuron(self.stem(x), repeat=self.time_steps)
        # T copies of an image's size are kept for the first layers' backward pass: a bit a spike, a tenth of a
        # SEW-ResNet18 step's memory for a hundredth of its time.
        first, *others = self.body
        with packed_spikes():
            output = first(spikes)
        for module in others:
            output = module(output)
        return output.mean(0, dtype=torch.promote_types(output.dtype, torch.float32))


class PerStep(nn.Sequential):
    """Layers without a time axis, applied to every step at once: [T, N, *] goes through them as [T * N, *]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class SEWBlock(nn.Module):
    """Two 3x3 convolutions with neurons, added to the spikes that came in, so that values of 2 and more arise."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.neuron1 = PerStep(_convolution(channels_in, channels, 3, stride)), _lif(channels)
        self.conv2, self.neuron2 = PerStep(_convolution(channels, channels, 3)), _lif(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(PerStep(_convolution(channels_in, channels, 1, stride)), _lif(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron2(self.conv2(self.neuron1(self.conv1(x))), self.shortcut(x))


def _lif(features: int) -> BatchNormLIF:
    """Normalisation and neurons, the latter set as the reference code of SEW-ResNet sets its leaky ones."""
    return BatchNormLIF(features, tau=2.0, decay_input=True, surrogate_function=ATan(), detach_reset=True)


def _convolution(channels_in: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)


Layers = tuple[list[nn.Module], BatchNormLIF, list[nn.Module]]  # stem, first neurons, body


def _mlp(features: int, num_classes: int, width: int = 256) -> Layers:
    stem = [nn.Flatten(), nn.Linear(features, width, bias=False)]
    hidden = [PerStep(nn.Linear(width, width, bias=False)), _lif(width)]
    return stem, _lif(width), [*hidden, PerStep(nn.Linear(width, num_classes))]


def _conv(channels: int, pixels: int, num_classes: int, width: int = 32) -> Layers:
    body = [
        PerStep(_convolution(width, 2 * width, 3)),
        _lif(2 * width),
        PerStep(nn.MaxPool2d(2), _convolution(2 * width, 2 * width, 3)),
        _lif(2 * width),
        PerStep(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * width * pixels, num_classes)),
    ]
    return [_convolution(channels, width, 3)], _lif(width), body


def _sew_resnet18(channels: int, num_classes: int, imagenet: bool) -> Layers:
    stem = _convolution(channels, 64, 7, 2) if imagenet else _convolution(channels, 64, 3)
    body: list[nn.Module] = [PerStep(nn.MaxPool2d(3, 2, padding=1))] if imagenet else []
    width = 64
    for stage in range(4):
        for block in range(2):
            body.append(SEWBlock(width, 64 << stage, 2 if stage and not block else 1))
            width = 64 << stage
    body.append(PerStep(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)))
    return [stem], _lif(64), body
