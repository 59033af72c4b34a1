"""Forward hooks that stay with the module that they were made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class OwnHook:
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
