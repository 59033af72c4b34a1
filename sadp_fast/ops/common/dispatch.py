"""What the operators ask about torch's dispatcher, and refuse."""

from __future__ import annotations

import torch
from torch import Tensor


def runs_directly() -> bool:
    """Whether calls may bypass the registered operators: not under torch.compile or a dispatch mode."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


def nothing(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without elements on x's device: what a registered operator returns where nothing is wanted."""
    return x.new_empty(0, dtype=dtype)


def refuse_second_derivative() -> None:
    """Raises RuntimeError in a backward pass that shall have a graph of its own."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused neuron has no second derivative: call backward() without create_graph=True, or set the "
            "node's backend='torch'"
        )
