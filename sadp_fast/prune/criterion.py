"""A loss module or function taken apart: each example's loss, and what its own reduction makes of them."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import name_of


def without_reduction(criterion: Callable[..., Tensor]) -> tuple[str, Callable[..., Tensor]]:
    """The criterion's own reduction, and the criterion without it."""
    if isinstance(criterion, type) or not callable(criterion):
        raise TypeError(
            f"criterion must be a loss module or function, got {name_of(criterion)}: sadp.loss(criterion, output, "
            "target), where criterion is nn.CrossEntropyLoss(), an instance"
        )
    if hasattr(criterion, "reduction"):  # a module of PyTorch's, or an object like it
        unreduced: Any = copy.copy(criterion)
        unreduced.reduction = "none"
        return str(criterion.reduction), unreduced
    if not isinstance(criterion, nn.Module):
        parameters = inspect.signature(criterion).parameters
        if "reduction" in parameters:
            return parameters["reduction"].default, lambda output, target: criterion(output, target, reduction="none")
    raise TypeError(
        f"criterion {criterion!r} has no `reduction`: SADP needs each example's loss; give it reduction= in the manner "
        "of torch.nn.functional.cross_entropy"
    )


def per_example(losses: Tensor, batch_size: int, reduction: str) -> Tensor:
    """Per-example losses [B]: over whatever else the criterion left the mean or, as its reduction does, the sum."""
    if losses.ndim == 0 or losses.shape[0] != batch_size:
        raise ValueError(f"criterion with reduction='none' must give [{batch_size}, *], got {tuple(losses.shape)}")
    if losses.ndim == 1:
        return losses
    return losses.flatten(1).sum(1) if reduction in ("sum", "batchmean") else losses.flatten(1).mean(1)


_CLASS_FORWARDS = (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)
_CLASS_FUNCTIONS = (nn.functional.cross_entropy, nn.functional.nll_loss)


def mean_factor(criterion: Callable[..., Tensor], reduction: str, target: Tensor, batch_size: int) -> float | Tensor:
    """What multiplies the sum of ``per_example`` losses in the criterion's own reduction; never waits for the host.

    1 / B of a mean, but for cross entropy and nll_loss (modules, functions and partials of these), which divide by the
    classes' weights where the target is not ignored: there, a 0-dim tensor.
    """
    if reduction == "sum":
        return 1.0
    named = _class_options(criterion)
    if reduction != "mean" or named is None or not isinstance(target, Tensor) or target.is_floating_point():
        return 1.0 / batch_size
    weight, classes = named.get("weight"), target.long()  # bytes would be a mask
    counts = classes != named.get("ignore_index", -100)
    total = counts.sum() if weight is None else (weight[torch.where(counts, classes, 0)] * counts).sum()
    factor: Tensor = target.numel() / batch_size / total.double()
    return factor


def _class_options(criterion: Callable[..., Tensor]) -> dict[str, Any] | None:
    """weight and ignore_index of cross entropy or nll_loss; None of another criterion."""
    named: dict[str, Any] = {}
    while isinstance(criterion, functools.partial):
        named, criterion = {**criterion.keywords, **named}, criterion.func
    criterion = getattr(criterion, "_orig_mod", criterion)  # torch.compile's wrapper
    if isinstance(criterion, nn.Module):
        known = type(criterion).forward in _CLASS_FORWARDS
        return {"weight": criterion.weight, "ignore_index": criterion.ignore_index} if known else None
    return named if criterion in _CLASS_FUNCTIONS else None
