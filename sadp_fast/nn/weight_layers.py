"""The layers whose weights autocast copies and scores measure: which they are, and whether they are trained."""

from __future__ import annotations

from torch import nn

WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
WeightLayerModule = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def weight_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """A weight layer's weight, or what it is made of: pruning, weight norms, spectral norms."""
    weight = layer._parameters.get("weight")
    if weight is not None:
        return [weight]
    parts = ("weight_", "parametrizations.weight.")  # not layer.weight: what the last forward pass made, or made anew
    return [p for name, p in layer.named_parameters() if name.startswith(parts)]


def is_trained(layer: nn.Module) -> bool:
    """Whether a weight layer's weight is trained now."""
    return any(p.requires_grad for p in weight_parameters(layer))


def trainable_layers(model: nn.Module) -> list[str]:
    """Names of the weight layers that are trained now."""
    return [name for name, m in model.named_modules() if isinstance(m, WEIGHT_LAYERS) and is_trained(m)]
