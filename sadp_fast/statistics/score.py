"""Per-example importance scores: pure functions of tensors.

The aim is the paper's [arXiv 2510.04098]: an upper bound of each example's gradient norm from quantities that the
forward and backward passes already have. The exact form below is ours. For a weight layer with input s[t] and gradient
delta[t] at its output,

    |grad_W loss_i| = |sum_t delta[t] s[t]^T| <= sum_t |delta[t]| |s[t]|
                   <= sqrt(sum_t |delta[t]|^2) sqrt(sum_t |s[t]|^2)

by the triangle inequality and Cauchy-Schwarz; for binary spikes |s[t]|^2 is the spike count. A convolution multiplies
patches of s, in which each element appears at most ``patch_multiplicity`` times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..nn.weight_layers import WeightLayerModule


def patch_multiplicity(layer: WeightLayerModule) -> float:
    """In how many patches one input element of this layer appears at most; 1 if linear.

    Along one axis of kernel K, stride s and dilation d these are the k < K with k d = const (mod s): every
    (s / gcd(s, d))-th, so ceil(K / (s / gcd(s, d))). Padding that repeats elements adds the patches of their copies
    (along axes longer than one element).
    """
    if isinstance(layer, nn.Linear):
        return 1.0
    pads = layer._reversed_padding_repeated_twice  # last axis first, both its ends
    ends = [(pads[i], pads[i + 1]) for i in reversed(range(0, len(pads), 2))]
    axes = zip(layer.kernel_size, layer.stride, layer.dilation, ends, strict=True)
    return float(math.prod(_on_axis(k, s, d, pad, layer.padding_mode) for k, s, d, pad in axes))


def _on_axis(kernel: int, stride: int, dilation: int, pad: tuple[int, int], mode: str) -> int:
    """``patch_multiplicity`` along one axis. The element i steps from the padded end is in i + 1 patches at most."""
    inside = math.ceil(kernel / (stride // math.gcd(stride, dilation)))
    if mode == "replicate":  # the first element has copies 0 to pad - 1 steps from the end, and is the next
        return max(inside, *(sum(min(i + 1, inside) for i in range(p + 1)) for p in pad))
    if mode == "reflect":  # each mirror image is less than pad steps from its end
        return inside + sum(min(p, inside) for p in pad)
    if mode == "circular" and (stride > 1 or sum(pad) > dilation * (kernel - 1)):
        return inside * (1 + sum(p > 0 for p in pad))  # else there are no more patches than elements: each has K places
    return inside


def spike_aware_score(input_energy: Tensor, delta_energy: Tensor, multiplicity: Tensor) -> Tensor:
    """Upper bound of each example's gradient norm over L weight layers, sqrt(sum_l K_l A_li D_li) [ours].

    Args:
        input_energy: A, sum over time of the squared norm of the layer's input (spike counts), [L, B].
        delta_energy: D, sum over time of the squared norm of the gradient at the layer's output, float [L, B].
        multiplicity: K, ``patch_multiplicity`` of each layer, float [L].

    Returns:
        float32 [B].
    """
    # The product of two square roots, not the root of a product: two large energies would overflow float32.
    bound = input_energy.float().sqrt() * delta_energy.float().sqrt() * multiplicity.sqrt().unsqueeze(1)
    score: Tensor = torch.linalg.vector_norm(bound, dim=0)
    return score
