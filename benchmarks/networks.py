"""SEW-ResNet18 (width 64, ADD, 3x3 stem) of SpikingJelly's modules: the peer of sadp_fast.models' network.

The same layers; neurons as its tutorials have them (the input divided by tau, ATan). Like ours, it computes the stem's
convolution and normalisation once, not at each of the equal time steps (its tutorials repeat the image in front of it,
which would cost it more).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def spikingjelly_sew_resnet18(num_classes: int, time_steps: int) -> nn.Module:
    """Images [N, 3, H, W] to logits [N, num_classes], in SpikingJelly's multi-step mode."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    def fire() -> nn.Module:
        return neuron.LIFNode(tau=2.0, decay_input=True, surrogate_function=surrogate.ATan(), detach_reset=True)

    def conv_norm(channels_in: int, channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        convolution = layer.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)
        return [convolution, layer.BatchNorm2d(channels)]

    class Block(nn.Module):
        def __init__(self, channels_in: int, channels: int, stride: int) -> None:
            super().__init__()
            self.branch = nn.Sequential(
                *conv_norm(channels_in, channels, 3, stride), fire(), *conv_norm(channels, channels, 3), fire()
            )
            self.shortcut = nn.Sequential()
            if stride != 1 or channels_in != channels:
                self.shortcut = nn.Sequential(*conv_norm(channels_in, channels, 1, stride), fire())

        def forward(self, x: Tensor) -> Tensor:
            return self.branch(x) + self.shortcut(x)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64))
            body: list[nn.Module] = [fire()]
            width = 64
            for stage in range(4):
                for block in range(2):
                    body.append(Block(width, 64 << stage, 2 if stage and not block else 1))
                    width = 64 << stage
            body += [layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(width, num_classes)]
            self.body = nn.Sequential(*body)
            functional.set_step_mode(self, "m")

        def forward(self, x: Tensor) -> Tensor:
            current = self.stem(x)
            return self.body(current.expand(time_steps, *current.shape)).mean(0)

    network = Network()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def convolutions(size: int) -> list[tuple[int, int, int, int, int, int]]:
    """The network's convolutions: (channels in, channels, kernel, stride, input size, how many), for images of `size`.

    The first one sees an image once; the others see spikes at every time step.
    """
    found = [(3, 64, 3, 1, size, 1)]
    width = 64
    for stage in range(4):
        channels, stride = 64 << stage, 2 if stage else 1
        if stride == 1:
            found.append((width, channels, 3, 1, size, 4))
        else:
            found += [(width, channels, 3, 2, size, 1), (width, channels, 1, 2, size, 1)]
            size //= 2
            found.append((channels, channels, 3, 1, size, 3))
        width = channels
    return found


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)
