"""The smallest networks: a multilayer perceptron and three convolutions [ours]."""

from torch import nn

from .layers import Layers, PerStep, convolution, lif


def mlp(features: int, num_classes: int, width: int = 256) -> Layers:
    """Two hidden layers."""
    stem = [nn.Flatten(), nn.Linear(features, width, bias=False)]
    hidden = [PerStep(nn.Linear(width, width, bias=False)), lif(width)]
    return stem, lif(width), [*hidden, PerStep(nn.Linear(width, num_classes))]


def conv(channels: int, height: int, width: int, num_classes: int, features: int = 32) -> Layers:
    """Three 3x3 convolutions, the second and the third pooled; images of at least 4x4 pixels."""
    body = [
        PerStep(convolution(features, 2 * features, 3)),
        lif(2 * features),
        PerStep(nn.MaxPool2d(2), convolution(2 * features, 2 * features, 3)),
        lif(2 * features),
        PerStep(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * features * (height // 4) * (width // 4), num_classes)),
    ]
    return [convolution(channels, features, 3)], lif(features), body
