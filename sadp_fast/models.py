"""Spiking networks for images and event frames: layers of torch.nn and sadp_fast.LIFNode, nothing else."""

from torch import Tensor, nn

from .neuron import LIFNode
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
        stem, body = _mlp(channels * height * width, num_classes)
    elif name == "conv":
        stem, body = _conv(channels, (height // 4) * (width // 4), num_classes)
    else:
        stem, body = _sew_resnet18(channels, num_classes, imagenet=min(height, width) >= 96)
    return SpikingNetwork(
        PerStep(*stem) if len(in_shape) == 4 else nn.Sequential(*stem), nn.Sequential(*body), time_steps
    )


class SpikingNetwork(nn.Module):
    """Stem (weights and normalisation before the first neuron), spiking body, and the mean of its output over time.

    Images [N, C, H, W] are coded directly: every time step sees the same frame, so the stem runs once and its output
    is repeated. Event frames [N, T, C, H, W] bring their own time axis. Output: logits [N, num_classes].
    """

    def __init__(self, stem: nn.Sequential, body: nn.Sequential, time_steps: int) -> None:
        super().__init__()
        self.stem, self.body, self.time_steps = stem, body, time_steps
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.stem, PerStep):
            current = self.stem(x.transpose(0, 1))
        else:
            current = self.stem(x)
            current = current.expand(self.time_steps, *current.shape)
        return self.body(current).mean(0)


class PerStep(nn.Sequential):
    """Layers without a time axis, applied to every step at once: [T, N, *] goes through them as [T * N, *]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class SEWBlock(nn.Module):
    """Two 3x3 convolutions with neurons, added to the spikes that came in, so that values of 2 and more arise."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            PerStep(*_conv_norm(channels_in, channels, 3, stride)),
            _lif(),
            PerStep(*_conv_norm(channels, channels, 3)),
            _lif(),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(PerStep(*_conv_norm(channels_in, channels, 1, stride)), _lif())

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


def _lif() -> LIFNode:
    # As the reference code of SEW-ResNet sets its leaky neurons.
    return LIFNode(tau=2.0, decay_input=True, surrogate_function=ATan(), detach_reset=True, step_mode="m")


def _conv_norm(channels_in: int, channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(channels)]


def _linear_norm(features_in: int, features: int) -> list[nn.Module]:
    return [nn.Linear(features_in, features, bias=False), nn.BatchNorm1d(features)]


def _mlp(features: int, num_classes: int, width: int = 256) -> tuple[list[nn.Module], list[nn.Module]]:
    stem = [nn.Flatten(), *_linear_norm(features, width)]
    return stem, [_lif(), PerStep(*_linear_norm(width, width)), _lif(), PerStep(nn.Linear(width, num_classes))]


def _conv(channels: int, pixels: int, num_classes: int, width: int = 32) -> tuple[list[nn.Module], list[nn.Module]]:
    body = [
        _lif(),
        PerStep(*_conv_norm(width, 2 * width, 3)),
        _lif(),
        PerStep(nn.MaxPool2d(2), *_conv_norm(2 * width, 2 * width, 3)),
        _lif(),
        PerStep(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * width * pixels, num_classes)),
    ]
    return _conv_norm(channels, width, 3), body


def _sew_resnet18(channels: int, num_classes: int, imagenet: bool) -> tuple[list[nn.Module], list[nn.Module]]:
    stem = _conv_norm(channels, 64, 7, 2) if imagenet else _conv_norm(channels, 64, 3)
    body: list[nn.Module] = [_lif()]
    if imagenet:
        body.append(PerStep(nn.MaxPool2d(3, 2, padding=1)))
    width = 64
    for stage in range(4):
        for block in range(2):
            body.append(SEWBlock(width, 64 << stage, 2 if stage and not block else 1))
            width = 64 << stage
    body.append(PerStep(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)))
    return stem, body
