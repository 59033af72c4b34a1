"""What is known of a tensor beside its values: the largest number that a neuron can have written into it.

Neurons promise it (``mark``), residual sums add it up (``max_count``), ``packed_spikes`` and the scores read it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Attributes of a marked tensor: its greatest possible value, and its version when that was promised.
_MAX_COUNT, _VERSION = "_sadp_max_count", "_sadp_version"


def mark(out: Tensor, max_count: int) -> Tensor:
    """Promise that every value of ``out`` is an integer in 0..max_count (1 for spikes); returns ``out``.

    The promise also holds for views of ``out`` and ends when ``out`` is changed in place; -0.0 counts as 0. If it was
    wrong, ``packed_spikes`` raises ValueError on the CPU and makes the gradients that need those values NaN on the GPU,
    where looking would wait. Does nothing under torch.compile and for inference tensors.
    """
    if torch.compiler.is_compiling() or out.is_inference():
        return out
    base = out._base
    marked = [out] if base is None or base.numel() != out.numel() else [out, base]
    for tensor in marked:
        setattr(tensor, _MAX_COUNT, max_count)
        setattr(tensor, _VERSION, tensor._version)
    return out


def max_count(tensor: Tensor) -> int | None:
    """What was promised with ``mark`` of ``tensor`` or of the tensor it is a view of; None where nothing holds."""
    owner = None if torch.compiler.is_compiling() else marked_owner(tensor)
    return None if owner is None else promised(owner)


def promised(owner: Tensor) -> int:
    """What was promised of a ``marked_owner``."""
    return getattr(owner, _MAX_COUNT)


def marked_owner(tensor: Tensor) -> Tensor | None:
    """The tensor whose promise holds for ``tensor``: its base, else itself."""
    base = tensor._base
    for owner in (base, tensor):
        if owner is not None and getattr(owner, _MAX_COUNT, None) is not None:
            return owner if owner._version == getattr(owner, _VERSION) else None
    return None
