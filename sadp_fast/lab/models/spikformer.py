"""Spikformer: a vision transformer of spikes (Zhou et al., arXiv 2209.15425).

[paper] Patches by four convolutions with pooling, a convolution as relative position embedding, blocks of spiking
self-attention and a two-layer perceptron, each added to what came in, and the mean over the tokens to a linear layer.
Queries, keys and values are spikes, so Q K^T V needs no softmax; it is scaled and fed to neurons of threshold 0.5.
[reference code] The widths of the four convolutions and the 3x3 pooling; the perceptron four times as wide.
[ours] The neurons of the other networks (see `layers.lif`), but for those behind the attention's products, which are
the reference code's: docs/training-settings.md shows what that is worth. Tokens stay a map [T, N, D, H, W] whose linear
layers are 1x1 convolutions; queries, keys and values come out of one of them, and have one normalisation each channel
either way; sums are made by the neurons that end a branch.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ...nn.lif import LIFNode
from ...nn.surrogate import ATan
from .layers import Layers, PerStep, classifier, convolution, lif


@dataclass(frozen=True)
class Size:
    """width: channels D of a token; poolings: of the four convolutions' outputs, counted from the last."""

    depth: int
    width: int
    heads: int
    poolings: int


def size_for(side: int, events: bool) -> Size:
    """The size for images of this many pixels a side.

    [paper] Spikformer-4-384 for CIFAR, Spikformer-8-512 for ImageNet, Spikformer-2-256 for event cameras of 128x128
    pixels; the heads are those of the reference code. [ours] the smallest, and where one size ends.
    """
    if side < 16:
        return Size(depth=2, width=64, heads=4, poolings=1)
    if side < 96:
        return Size(depth=4, width=384, heads=12, poolings=2)
    return Size(depth=2, width=256, heads=16, poolings=4) if events else Size(depth=8, width=512, heads=8, poolings=4)


class SpikingSelfAttention(nn.Module):
    """x + LIF(BN(W LIF(s Q K^T V))) with Q, K, V = LIF(BN(W x)), for x [T, N, D, H, W] and H * W tokens.

    The scale s is the reference code's 1/8 for CIFAR, of 64 tokens and 32 channels a head. With other numbers of them
    it keeps the mean of s Q K^T V for spikes of the same rate [ours]: a small network would be silent with 1/8.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.qkv_neuron = PerStep(convolution(width, 3 * width, 1)), lif(3 * width)
        self.attention_neuron = LIFNode(
            tau=2.0, decay_input=True, v_threshold=0.5, surrogate_function=ATan(), detach_reset=True, step_mode="m"
        )
        self.projection, self.neuron = PerStep(convolution(width, width, 1)), lif(width)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.qkv_neuron(self.qkv(x))
        q, k, v = spikes.flatten(3).unflatten(2, (3, self.heads, -1)).unbind(2)  # each [T, N, heads, D / heads, H * W]
        # Without a softmax the products associate: V K^T first, which is linear in the number of tokens and whose
        # counts, at most that number, are exact up to 256 in bfloat16, too.
        scale = 256 / (q.shape[-2] * q.shape[-1])
        attention = self.attention_neuron((v @ k.transpose(-2, -1)) @ q * scale)
        return self.neuron(self.projection(attention.reshape(x.shape)), x)


class SpikingMLP(nn.Module):
    """x + LIF(BN(W2 LIF(BN(W1 x)))) on each token of x [T, N, D, H, W]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layer1, self.neuron1 = PerStep(convolution(width, hidden, 1)), lif(hidden)
        self.layer2, self.neuron2 = PerStep(convolution(hidden, width, 1)), lif(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron2(self.layer2(self.neuron1(self.layer1(x))), x)


class PositionEmbedding(nn.Module):
    """x + LIF(BN(conv(x))): the relative position embedding, a 3x3 convolution over the map of patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.neuron = PerStep(convolution(width, width, 3)), lif(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.conv(x), x)


def spikformer(channels: int, num_classes: int, size: Size) -> Layers:
    """Spiking patch splitting, `size.depth` blocks, classifier."""
    widths = [size.width // 8, size.width // 4, size.width // 2, size.width]
    body: list[nn.Module] = []
    for i in range(1, 4):
        pooling = [nn.MaxPool2d(3, 2, padding=1)] if i > 4 - size.poolings else []
        body += [PerStep(*pooling, convolution(widths[i - 1], widths[i], 3)), lif(widths[i])]
    body += [PerStep(nn.MaxPool2d(3, 2, padding=1)), PositionEmbedding(size.width)]
    for _ in range(size.depth):
        body += [SpikingSelfAttention(size.width, size.heads), SpikingMLP(size.width, 4 * size.width)]
    return [convolution(channels, widths[0], 3)], lif(widths[0]), [*body, classifier(size.width, num_classes)]
