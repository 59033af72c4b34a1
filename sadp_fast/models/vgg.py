"""Spiking VGG-11: the convolutions of VGG (Simonyan and Zisserman, arXiv 1409.1556, configuration A) with neurons."""

from torch import nn

from .layers import Layers, PerStep, classifier, convolution, lif

WIDTHS = (64, 128, 256, 256, 512, 512, 512, 512)
POOLED = (0, 1, 3, 5, 7)  # the convolutions whose spikes are pooled


def spiking_vgg(channels: int, height: int, width: int, num_classes: int) -> Layers:
    """VGG-11 with batch normalisation and neurons behind every convolution.

    [paper] Eight 3x3 convolutions and where they are pooled: 2x2, the maximum of spikes, so that spikes stay spikes.
    [ours] No pooling below 2x2 pixels, so that images smaller than 32x32 do; one linear layer behind the mean over all
    pixels in place of three wide ones, which hold nine tenths of the original's weights.
    """
    body: list[nn.Module] = []
    pooling: list[nn.Module] = []
    side = min(height, width)
    for i, features in enumerate(WIDTHS):
        if i:
            body += [PerStep(*pooling, convolution(WIDTHS[i - 1], features, 3)), lif(features)]
        pooling = []
        if i in POOLED and side >= 2:
            pooling, side = [nn.MaxPool2d(2)], side // 2
    body += [PerStep(*pooling)] if pooling else []
    return [convolution(channels, WIDTHS[0], 3)], lif(WIDTHS[0]), [*body, classifier(WIDTHS[-1], num_classes)]
