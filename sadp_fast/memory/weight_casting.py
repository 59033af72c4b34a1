"""Mixed precision without a cast for every weight: autocast's copies of a network's weights made all at once.

Autocast casts the weights of convolutions and linear layers one by one in the forward pass, and their gradients one by
one in the backward pass: two launches for each of them, most of which take longer than the copy itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.weight_layers import WEIGHT_LAYERS


def cast_weights_at_once(model: nn.Module) -> None:
    """From now on, let forward passes of ``model`` under autocast cast its weights together.

    Outputs and gradients are bit for bit those of autocast. It concerns the trained float32 weights and biases of
    Linear and Conv modules; outside of autocast nothing changes. Their gradients all arrive at the end of the backward
    pass, so DistributedDataParallel cannot send them while it runs.

    Args:
        model: the whole network, whose forward hooks do it; its modules stay as they are.
    """
    caster = _Caster(model)
    model.register_forward_pre_hook(caster.swap)
    model.register_forward_hook(caster.restore, always_call=True)


class _Caster:
    """Puts the copies in the modules' places of their weights while a forward pass runs."""

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, WEIGHT_LAYERS)]
        self._swapped: list[tuple[nn.Module, str, nn.Parameter]] = []

    def swap(self, _model: nn.Module, _inputs: Any) -> None:
        if self._swapped:  # a model that calls itself
            return
        places = [
            (layer, name, parameter)
            for layer in self._layers
            for name, parameter in layer.named_parameters(recurse=False)
            if parameter.requires_grad and parameter.dtype == torch.float32
        ]
        if not places:
            return
        device = places[0][2].device
        if not torch.is_autocast_enabled(device.type) or any(p.device != device for _, _, p in places):
            return
        # One copy of a weight that several layers share.
        parameters = list({id(parameter): parameter for _, _, parameter in places}.values())
        copies = _Cast.apply(torch.get_autocast_dtype(device.type), *parameters)
        by_id = {id(parameter): copy for parameter, copy in zip(parameters, copies, strict=True)}
        for layer, name, parameter in places:
            layer._parameters[name] = by_id[id(parameter)]
        self._swapped = places

    def restore(self, _model: nn.Module, _inputs: Any, _output: Any) -> None:
        for layer, name, parameter in self._swapped:
            layer._parameters[name] = parameter
        self._swapped = []


class _Cast(torch.autograd.Function):
    """Copies of float32 tensors in another dtype, and their gradients back, in few launches each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _cast(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_cast([grad for grad in grads if grad is not None], torch.float32))
        return (None, *(None if grad is None else next(cast) for grad in grads))


def _cast(tensors: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)
