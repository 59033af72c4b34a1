"""SEW-ResNet (Fang et al., arXiv 2102.04159)."""

from torch import Tensor, nn

from .layers import Layers, PerStep, classifier, convolution, lif


class SEWBlock(nn.Module):
    """Two 3x3 convolutions with neurons, added to the spikes that came in, so that values of 2 and more arise."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.neuron1 = PerStep(convolution(channels_in, channels, 3, stride)), lif(channels)
        self.conv2, self.neuron2 = PerStep(convolution(channels, channels, 3)), lif(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(PerStep(convolution(channels_in, channels, 1, stride)), lif(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron2(self.conv2(self.neuron1(self.conv1(x))), self.shortcut(x))


def sew_resnet18(channels: int, num_classes: int, *, imagenet: bool) -> Layers:
    """SEW-ResNet18 with ADD, width 64; the 7x7 stem and its pooling for ImageNet, else a 3x3 stem."""
    stem = convolution(channels, 64, 7, 2) if imagenet else convolution(channels, 64, 3)
    body: list[nn.Module] = [PerStep(nn.MaxPool2d(3, 2, padding=1))] if imagenet else []
    width = 64
    for stage in range(4):
        for block in range(2):
            body.append(SEWBlock(width, 64 << stage, 2 if stage and not block else 1))
            width = 64 << stage
    return [stem], lif(64), [*body, classifier(width, num_classes)]
