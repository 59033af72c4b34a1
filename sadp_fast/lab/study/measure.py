"""What the examples of one network have: scores, exact gradient norms and sparsity, also over a training.

Scores and norms are of the same examples, on the same weights, with frozen normalisation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ...nn.node import BaseNode, reset
from ...prune.baselines import el2n_score
from ...statistics.exact_norms import gradient_norms
from ...statistics.meter import ScoreMeter
from ...statistics.record import record
from ...statistics.score import spike_aware_score
from .. import models, train
from ..augmentation import crop_flip_normalise
from ..data import Dataset
from ..methods import METHODS
from ..registry import by_name
from ..settings import TrainConfig

AGES = (0, 1, 5)  # epochs that lie between a score and the gradient norm that it is used for
_BATCH = 64


@dataclass(frozen=True)
class Score:
    """What is measured of every example.

    Attributes:
        name: in files.
        label: as a reader knows it.
        colour, marker: of its lines, Okabe and Ito's colours; a score that is a method has the method's colour.
    """

    name: str
    label: str
    colour: str
    marker: str

    @property
    def look(self) -> dict[str, Any]:
        """A line's style."""
        return {"color": self.colour, "marker": self.marker, "label": self.label, "markersize": 5, "linewidth": 1.6}


EXACT = "exact"
MEASURED = by_name(
    Score("all", "SADP, all layers", METHODS["sadp"].colour, "o"),
    Score("last", "SADP, last layer only", "#D55E00", "s"),
    Score("delta", "all layers without the spike factor", "#E69F00", "^"),
    Score("el2n", "EL2N", METHODS["el2n"].colour, "D"),
    Score("loss", "loss", METHODS["loss"].colour, "v"),
    Score(EXACT, "exact gradient norm", METHODS["grad_norm"].colour, "*"),
)
SCORES = {name: score for name, score in MEASURED.items() if name != EXACT}  # those that are compared with it


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
    with _evaluating(model):
        parts = [_scores(model, *part, criterion) for part in zip(x.split(_BATCH), y.split(_BATCH), strict=True)]
        values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {**values, EXACT: gradient_norms(model, x, y, criterion).float()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """With frozen normalisation; in the end the neurons' state is reset, and the mode is what it was."""
    training = model.training
    model.eval()
    try:
        yield
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
    with _evaluating(model), record(model) as statistics:
        for part in x.split(_BATCH):
            reset(model)
            model(part)
            spikes += sum(layer.spikes for layer in statistics.values())
            places += sum(layer.places for layer in statistics.values())
    return 1 - spikes / places


def pearson(a: ArrayLike, b: ArrayLike) -> float | None:
    """Pearson correlation of two [N]; None where one of them is constant or not finite."""
    pair = np.stack([np.asarray(a, dtype=float), np.asarray(b, dtype=float)])
    if not np.isfinite(pair).all() or (np.ptp(pair, axis=1) == 0).any():
        return None
    return float(np.corrcoef(pair)[0, 1])


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Spearman correlation: Pearson's of the ranks, equal values sharing their mean rank."""
    from scipy.stats import rankdata

    return None if pearson(a, b) is None else pearson(rankdata(a), rankdata(b))


def short(value: float) -> float | None:
    """Six significant digits of it for a JSON file; None where it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def numbers(snapshot: dict[str, Any]) -> dict[str, Tensor]:
    """A snapshot's values, float64 [N] each; NaN where the file has none."""
    return {name: torch.from_numpy(np.array(values, dtype=float)) for name, values in snapshot["values"].items()}


# ------------------------------------------------------------------------------------------------- over a training


def shown_epochs(epochs: int) -> list[int]:
    """After which epochs a training is looked at: the powers of two, and the last."""
    return sorted({1 << i for i in range(epochs.bit_length())} | {epochs})


def measured_epochs(epochs: int) -> list[int]:
    """Those that are shown, and those that are older by one of `AGES`."""
    return sorted({shown - age for shown in shown_epochs(epochs) for age in AGES if shown - age >= 1})


@dataclass(frozen=True)
class Trajectory:
    """A training on all data, and what its examples have after some of the epochs.

    Attributes:
        config: of method "full".
        threshold: firing threshold of every neuron, from the first step on; None leaves the model's own.
        measured_epochs: after which is measured.
        examples: training examples that are measured, the same for every seed.
    """

    config: TrainConfig
    threshold: float | None
    measured_epochs: list[int]
    examples: int

    def identity(self) -> dict[str, Any]:
        """What decides the result."""
        return {"kind": "trajectory", **vars(self), "config": self.config.conditions()}

    def run(self, data: Dataset, folder: Path, viewers: list[train.Progress]) -> dict[str, Any]:
        """Train and measure, going on from the checkpoint in the folder where there is one.

        Measured without augmentation, in float32, in evaluation mode: with the running statistics an example's gradient
        is its own, while with those of its batch it would depend on the others.

        Returns:
            "data_set", "sources" (that trained it, in order), and "snapshots": for each epoch measured its "epoch",
            "test_accuracy", "sparsity" and "values", which holds a list of N numbers for each of `MEASURED`.
        """
        trainer = train.Trainer(self.config, data)
        _set_threshold(trainer.model, self.threshold)
        checkpoint = folder / "checkpoint.pt"
        if checkpoint.exists():
            trainer.load(checkpoint)
        order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
        index = order[: self.examples].to(trainer.device)
        for epoch in range(trainer.sadp.epoch, self.config.epochs):
            start = trainer.clock()
            loss = train.train_epoch(trainer, viewers)
            entry: dict[str, Any] = {"epoch": epoch + 1, "ratio": 0.0, "steps": loss.steps, "loss": loss.read()}
            entry["seconds"] = trainer.clock() - start
            entry["test_accuracy"] = trainer.evaluate()[0]
            if epoch + 1 in self.measured_epochs:
                entry |= _snapshot(trainer, self.threshold, index)
            train.finish_epoch(trainer, entry, checkpoint, viewers)
        kept = ("epoch", "test_accuracy", "sparsity", "values")
        return {
            "data_set": trainer.data_set,
            "sources": trainer.sources,
            "snapshots": [{key: entry[key] for key in kept} for entry in trainer.history if "values" in entry],
        }


def _set_threshold(model: nn.Module, threshold: float | None) -> None:
    for node in model.modules():
        if threshold is not None and isinstance(node, BaseNode):
            node.v_threshold = threshold


def _snapshot(trainer: train.Trainer, threshold: float | None, index: Tensor) -> dict[str, Any]:
    """Scores and norms of the examples `index`, by a copy of the network that knows nothing of training steps."""
    config, data = trainer.config, trainer.data
    with torch.random.fork_rng(devices=[]):  # its first weights come from the generator that training goes on with
        model = models.build(config.model, data.shape, data.num_classes, config.time_steps)
    model.load_state_dict(trainer.model.state_dict())
    _set_threshold(model, threshold)
    model.to(device=trainer.device, memory_format=trainer.layout)  # type: ignore[call-overload]
    x = crop_flip_normalise(
        data.train_images[index], None, None, data.mean, data.std, dtype=torch.float32, memory_format=trainer.layout
    )
    values = measure(model, x, data.train_labels[index], trainer.criterion)
    return {
        "sparsity": sparsity(model, x),
        "values": {name: [short(v) for v in values[name].tolist()] for name in MEASURED},
    }
