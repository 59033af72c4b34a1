"""What measures a model for a while: hooks on its modules and recorders in its neurons, and how all of it comes off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.node import BaseNode
from ..nn.recorder import Recorder, hand_in, take_back

Hook = Callable[[Any, Tensor, Any], None]


class Attachment(ExitStack):
    """Forward hooks and recorders on modules, until ``close``, which leaves what others have attached since."""

    def hook(self, module: nn.Module, hook: Hook) -> None:
        """Call ``hook(module, its input, its output)`` after the module's forward passes with gradients."""
        self.callback(module.register_forward_hook(_OwnHook(module, hook), with_kwargs=True).remove)

    def record(self, node: BaseNode, recorder: Recorder) -> None:
        """Let the recorder measure the neuron."""
        hand_in(node, recorder)
        self.callback(take_back, node, recorder)


class _OwnHook:
    """A forward hook of one module that its copies do not have.

    PyTorch copies a module's hooks with it, so that a snapshot or a teacher made in the middle of an epoch would be
    measured in the model's place, and could not be saved. In a copy, also one through pickle, this hook does nothing.
    """

    def __init__(self, module: nn.Module | None = None, hook: Hook | None = None) -> None:
        self._module, self._hook = module, hook

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Any) -> None:
        if self._hook is not None and module is self._module and torch.is_grad_enabled():
            self._hook(module, inputs[0] if inputs else next(iter(named.values())), output)

    def __reduce__(self) -> tuple[type[_OwnHook], tuple[()]]:
        return _OwnHook, ()
