"""What measures a model for a while: hooks on its modules and recorders in its neurons, and how all of it comes off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..nn.node import BaseNode
from ..nn.recorder import Recorder, hand_in, take_back


class Attachment:
    """Forward hooks and recorders on modules, until ``remove``."""

    def __init__(self) -> None:
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._recorders: list[tuple[BaseNode, Recorder]] = []

    def hook(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """Call ``hook(module, inputs, named inputs, output)`` after the module's forward pass."""
        self._handles.append(module.register_forward_hook(_OwnHook(module, hook), with_kwargs=True))

    def record(self, node: BaseNode, recorder: Recorder) -> None:
        """Let the recorder measure the neuron."""
        hand_in(node, recorder)
        self._recorders.append((node, recorder))

    def remove(self) -> None:
        """Leave the modules as they were, but for what others have attached since."""
        for handle in self._handles:
            handle.remove()
        for node, recorder in self._recorders:
            take_back(node, recorder)
        self._handles, self._recorders = [], []


class _OwnHook:
    """A forward hook of one module that its copies do not have.

    PyTorch copies a module's hooks with it, so that a snapshot or a teacher made in the middle of an epoch would be
    measured in the model's place, and could not be saved. In a copy, also one through pickle, this hook does nothing.
    """

    def __init__(self, module: nn.Module, hook: Callable[..., None]) -> None:
        self._module, self._hook = module, hook

    def __call__(self, module: nn.Module, *arguments: Any) -> None:
        if module is self._module:
            self._hook(module, *arguments)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*_arguments: Any) -> None:
    pass
