"""What the networks are built of: the frame around them, layers applied to every step, neurons, convolutions."""

import torch
from torch import Tensor, nn

from ...memory.packed_spikes import packed_spikes
from ...nn.batch_norm_lif import BatchNormLIF
from ...nn.surrogate import PiecewiseQuadratic

Layers = tuple[list[nn.Module], BatchNormLIF, list[nn.Module]]  # stem, first neurons, body


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


def lif(features: int) -> BatchNormLIF:
    """Normalisation and leaky neurons, whose input is not divided by tau, with a triangular surrogate [ours].

    Divided by tau, a normalised input hardly reaches the threshold in a few steps; docs/training-settings.md shows
    what either choice is worth.
    """
    return BatchNormLIF(
        features, tau=2.0, decay_input=False, surrogate_function=PiecewiseQuadratic(), detach_reset=True
    )


def convolution(channels_in: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size of the image, or divides it by the stride."""
    return nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)


def classifier(features: int, num_classes: int) -> PerStep:
    """The mean over all pixels, and one linear layer."""
    return PerStep(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, num_classes))
