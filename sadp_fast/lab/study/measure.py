"""Scores and exact gradient norms of the same examples, on the same weights, with frozen normalisation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ...nn.node import reset
from ...prune.baselines import el2n_score
from ...statistics.exact_norms import gradient_norms
from ...statistics.meter import ScoreMeter
from ...statistics.record import record
from ...statistics.score import spike_aware_score

# The scores that are compared with the exact norm, as a reader knows them.
SCORES = {
    "all": "SADP, all layers",
    "last": "SADP, last layer only",
    "delta": "all layers without the spike factor",
    "el2n": "EL2N",
    "loss": "loss",
}
EXACT = "exact"
_BATCH = 64


def measure(model: nn.Module, x: Tensor, y: Tensor, criterion: nn.CrossEntropyLoss) -> dict[str, Tensor]:
    """Every score of `SCORES`, and the exact norm of each example's gradient (over all parameters) as `EXACT`.

    The model is left as it was, but for its neurons' state, which is reset.

    Args:
        model: a network with this package's neurons, float32.
        x: [N, *], normalised inputs.
        y: int64 [N].
        criterion: of the training.

    Returns:
        float32 [N] each, on x's device, all of the weights and running statistics as they are.
    """
    training = model.training
    model.eval()
    try:
        parts = [_scores(model, *part, criterion) for part in zip(x.split(_BATCH), y.split(_BATCH), strict=True)]
        values = {name: torch.cat([part[name] for part in parts]) for name in SCORES}
        return {**values, EXACT: gradient_norms(model, x, y, criterion).float()}
    finally:
        reset(model)
        model.train(training)


def _scores(model: nn.Module, x: Tensor, y: Tensor, criterion: nn.CrossEntropyLoss) -> dict[str, Tensor]:
    """One forward and one backward pass, measured as SADP measures its first batch."""
    reset(model)
    meter = ScoreMeter(model, "all")
    unreduced = copy.copy(criterion)
    unreduced.reduction = "none"
    meter.attach(len(x))
    try:
        meter.begin()
        output = model(x)
        losses = unreduced(output, y)
        loss = losses.sum()  # of a sum, an example's gradient is that of its own loss
        taps = meter.read(loss, len(x))
        # Not backward(), which would write into the parameters' gradients.
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        taps.finish()
    finally:
        meter.detach()
    inputs, deltas = taps.energies[taps.layer_rows]
    return {
        "all": spike_aware_score(inputs, deltas, taps.multiplicity),
        "last": spike_aware_score(inputs[-1:], deltas[-1:], taps.multiplicity[-1:]),
        "delta": spike_aware_score(torch.ones_like(inputs), deltas, taps.multiplicity),
        "el2n": el2n_score(output, y),
        "loss": losses.detach().float(),
    }


@torch.no_grad()
def sparsity(model: nn.Module, x: Tensor) -> float:
    """Share of all neurons and time steps without a spike, for inputs x, with frozen normalisation."""
    spikes, places = 0, 0
    training = model.training
    model.eval()
    try:
        with record(model) as statistics:
            for part in x.split(_BATCH):
                reset(model)
                model(part)
                spikes += sum(layer.spikes for layer in statistics.values())
                places += sum(layer.places for layer in statistics.values())
    finally:
        reset(model)
        model.train(training)
    return 1 - spikes / places


def pearson(a: Tensor, b: Tensor) -> float | None:
    """Pearson correlation of two [N]; None where one of them is constant or not finite."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if 0 < scale < float("inf") else None


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Spearman correlation: Pearson's of the ranks, equal values sharing their mean rank."""
    if not (a.isfinite().all() and b.isfinite().all()):
        return None
    return pearson(_ranks(a), _ranks(b))


def _ranks(t: Tensor) -> Tensor:
    _, place, count = t.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place]
