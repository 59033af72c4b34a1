"""A prune ratio to one per epoch: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import check_choice

# How far each one is from its mean at x, the share of the pruned epochs that is over: symmetric, flat or rising.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 0.0,
    "linear": lambda x: 2 * x - 1,
    "cosine": lambda x: -math.cos(math.pi * x),
}
MAX_RATIO = 0.95  # the largest prune ratio of one epoch [ours]


def prune_ratios(
    ratio: float, epochs: int, *, schedule: str = "constant", warmup_epochs: int = 1, tail_epochs: int = 0
) -> list[float]:
    """Prune ratio of each epoch, with mean `ratio` over all of them.

    That a dynamic schedule stabilises training is [paper]; its shape is [ours]. The first `warmup_epochs` and the last
    `tail_epochs` train on all data (0.0). Between them "constant" is flat, and "linear" and "cosine" rise from near 0,
    symmetrically about the mean needed there; where an epoch would exceed MAX_RATIO = 0.95, the ramp is flatter.

    Args:
        ratio: mean share of the examples left out, in [0, 1).
        epochs: number of epochs, >= 1.
        schedule: "constant", "linear" or "cosine".
        warmup_epochs: full-data epochs at the start, >= 0.
        tail_epochs: full-data epochs at the end, >= 0.

    Returns:
        One ratio in [0, MAX_RATIO] per epoch.

    Raises:
        ValueError: an argument outside the above, or a mean that epochs of at most MAX_RATIO cannot reach.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}: 0 prunes nothing, 0.5 half of the examples")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}: pass the number of epochs to train")
    if warmup_epochs < 0 or tail_epochs < 0:
        raise ValueError(
            f"warmup_epochs and tail_epochs must not be negative, got {warmup_epochs} and {tail_epochs}: 0 means none"
        )
    check_choice("schedule", schedule, SCHEDULES)
    if ratio == 0:
        return [0.0] * epochs

    pruned = epochs - warmup_epochs - tail_epochs
    if pruned <= 0:
        raise ValueError(
            f"warmup_epochs = {warmup_epochs} and tail_epochs = {tail_epochs} leave none of {epochs} epochs to prune: "
            "lower them or train more epochs"
        )
    mean = ratio * epochs / pruned
    if mean > MAX_RATIO + 1e-12:
        raise ValueError(
            f"prune ratio {ratio} over {epochs} epochs needs {mean:.4g} in each of the {pruned} epochs that "
            f"warmup_epochs = {warmup_epochs} and tail_epochs = {tail_epochs} leave, above {MAX_RATIO}: "
            "lower one of the three or train more epochs"
        )
    mean = min(mean, MAX_RATIO)
    shape = [SCHEDULES[schedule]((epoch + 0.5) / pruned) for epoch in range(pruned)]
    rise = min(mean, (MAX_RATIO - mean) / shape[-1]) if shape[-1] > 0 else 0.0
    return [0.0] * warmup_epochs + [mean + rise * s for s in shape] + [0.0] * tail_epochs
