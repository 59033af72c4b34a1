"""Scores and exact gradient norms of the same examples, on the same weights, with frozen normalisation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ...nn.neuron import BaseNode, reset
from ...prune.baselines import el2n_score
from ...statistics.dataflow import Probe
from ...statistics.energies import EnergyTaps, keeps_energies
from ...statistics.exact import gradient_norms
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
    probe = Probe(model)
    handles = probe.hooks()
    energetic = [node for node in model.modules() if keeps_energies(node)]
    unreduced = copy.copy(criterion)
    unreduced.reduction = "none"
    try:
        for node in energetic:
            node.collect_statistics = True  # type: ignore[assignment]
        output = model(x)
        losses = unreduced(output, y)
        loss = losses.sum()  # of a sum, an example's gradient is that of its own loss
        layers = probe.resolve(loss)
        steps = max((c.output_shape[0] for c in probe.neurons if _multi_step(model, c.name)), default=1)
        taps = EnergyTaps.of_first_batch(model, layers, probe, steps=steps, batch_size=len(x))
        # Not backward(), which would write into the parameters' gradients.
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        taps.finish()
    finally:
        for node in energetic:
            node.collect_statistics = False  # type: ignore[assignment]
        for handle in handles:
            handle.remove()
    inputs, deltas = taps.energies[taps.layer_rows]
    return {
        "all": spike_aware_score(inputs, deltas, taps.multiplicity),
        "last": spike_aware_score(inputs[-1:], deltas[-1:], taps.multiplicity[-1:]),
        "delta": spike_aware_score(torch.ones_like(inputs), deltas, taps.multiplicity),
        "el2n": el2n_score(output, y),
        "loss": losses.detach().float(),
    }


def _multi_step(model: nn.Module, name: str) -> bool:
    return model.get_submodule(name).step_mode == "m"


@torch.no_grad()
def sparsity(model: nn.Module, x: Tensor) -> float:
    """Share of all neurons and time steps without a spike, for inputs x, with frozen normalisation."""
    spikes, places = [], []

    def count(_node: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        fired = output if len(inputs) < 2 else output - inputs[1]  # without the residual that was added
        spikes.append(fired.sum(dtype=torch.float64))
        places.append(fired.numel())

    handles = [node.register_forward_hook(count) for node in model.modules() if isinstance(node, BaseNode)]
    training = model.training
    model.eval()
    try:
        reset(model)
        for part in x.split(_BATCH):
            model(part)
            reset(model)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return 1 - float(torch.stack(spikes).sum()) / sum(places)


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
