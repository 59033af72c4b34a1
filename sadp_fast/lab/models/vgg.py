"""Spiking VGGs: eight 3x3 convolutions with neurons, pooled as in VGG-11 or as in VGGSNN.

[paper] VGG-11 is configuration A of Simonyan and Zisserman, arXiv 1409.1556; VGGSNN (Deng et al., arXiv 2202.11946) has
the same convolutions, but keeps the resolution behind the first one.
"""

from torch import nn

from .layers import Layers, PerStep, classifier, convolution, lif

WIDTHS = (64, 128, 256, 256, 512, 512, 512, 512)
VGG11, VGGSNN = (0, 1, 3, 5, 7), (1, 3, 5, 7)  # the convolutions whose spikes are pooled


def spiking_vgg(channels: int, height: int, width: int, num_classes: int, pooled: tuple[int, ...]) -> Layers:
    """The convolutions with batch normalisation and neurons behind each; those of `pooled` with 2x2 pooling as well.

    [paper] Their widths and where they are pooled. [ours] The maximum of spikes for VGGSNN too, which takes the mean,
    so that spikes stay spikes. No pooling below 2x2 pixels, so that images smaller than 32x32 do; one linear layer
    behind the mean over all pixels in place of VGG-11's three wide ones, which hold nine tenths of its weights.
    """
    body: list[nn.Module] = []
    pooling: list[nn.Module] = []
    side = min(height, width)
    for i, features in enumerate(WIDTHS):
        if i:
            body += [PerStep(*pooling, convolution(WIDTHS[i - 1], features, 3)), lif(features)]
        pooling = []
        if i in pooled and side >= 2:
            pooling, side = [nn.MaxPool2d(2)], side // 2
    body += [PerStep(*pooling)] if pooling else []
    return [convolution(channels, WIDTHS[0], 3)], lif(WIDTHS[0]), [*body, classifier(WIDTHS[-1], num_classes)]
