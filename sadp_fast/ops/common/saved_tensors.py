"""Who keeps, now, what autograd saves for a backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch


def hooks_of_saved_tensors() -> tuple[Callable, Callable] | None:
    """The hooks, (pack, unpack), of what autograd saves now: of checkpoints, offloading, ``packed_spikes``; or None.

    PyTorch has no public name for them.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
