"""One network trained on all data, and what its examples' scores and gradient norms were after some of its epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...nn.node import BaseNode
from .. import models, train
from ..augmentation import crop_flip_normalise
from ..config import TrainConfig
from ..data import Dataset
from .measure import EXACT, SCORES, measure, sparsity
from .store import short

AGES = (0, 1, 5)  # epochs that lie between a score and the gradient norm that it is used for
CONTENT = ("data_set", "snapshots")


def shown_epochs(epochs: int) -> list[int]:
    """After which epochs a training is looked at: the powers of two, and the last."""
    return sorted({1 << i for i in range(epochs.bit_length())} | {epochs})


def measured_epochs(epochs: int) -> list[int]:
    """Those that are shown, and those that are older by one of `AGES`."""
    return sorted({shown - age for shown in shown_epochs(epochs) for age in AGES if shown - age >= 1})


def subset(data: Dataset, examples: int) -> torch.Tensor:
    """Which training examples are measured: the same for every seed, int64 [examples]."""
    count = len(data.train_labels)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:examples]


def identity(config: TrainConfig, threshold: float | None, epochs: list[int], examples: int) -> dict[str, Any]:
    """What decides a trajectory; see `trajectory`."""
    return {
        "kind": "trajectory",
        "config": config.conditions(),
        "threshold": threshold,
        "measured_epochs": epochs,
        "examples": examples,
    }


def trajectory(
    config: TrainConfig,
    data: Dataset,
    threshold: float | None,
    epochs: list[int],
    examples: int,
    folder: Path,
    viewers: list[train.Progress],
) -> dict[str, Any]:
    """Train on all data and measure `examples` training examples after each of `epochs`.

    Measured without augmentation, in float32, in evaluation mode: with the running statistics an example's gradient is
    its own, while with those of its batch it would depend on the others.

    Args:
        config: of method "full".
        threshold: firing threshold of every neuron, from the first step on; None leaves the model's own.
        folder: holds the checkpoint, which is continued where there is one.

    Returns:
        "data_set", "sources" (that trained it, in order), and "snapshots": for each epoch measured its "epoch",
        "test_accuracy", "sparsity" and "values", which holds a list of N numbers for each of `SCORES` and for the exact
        norm.
    """
    trainer = train.Trainer(config, data)
    _set_threshold(trainer.model, threshold)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    index = subset(data, examples).to(trainer.device)
    for epoch in range(trainer.sadp.epoch, config.epochs):
        loss = train.train_epoch(trainer, viewers)
        entry: dict[str, Any] = {"epoch": epoch + 1, "loss": loss.read(), "test_accuracy": trainer.evaluate()[0]}
        if epoch + 1 in epochs:
            entry |= _snapshot(trainer, threshold, index)
        train.finish_epoch(trainer, entry, checkpoint, viewers)
    kept = ("epoch", "test_accuracy", "sparsity", "values")
    return {
        "data_set": trainer.data_set,
        "sources": trainer.sources,
        "snapshots": [{key: entry[key] for key in kept} for entry in trainer.history if "values" in entry],
    }


def _set_threshold(model: torch.nn.Module, threshold: float | None) -> None:
    for node in model.modules():
        if threshold is not None and isinstance(node, BaseNode):
            node.v_threshold = threshold


def _snapshot(trainer: train.Trainer, threshold: float | None, index: torch.Tensor) -> dict[str, Any]:
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
        "values": {name: [short(v) for v in values[name].tolist()] for name in (*SCORES, EXACT)},
    }
