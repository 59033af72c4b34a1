"""What the data and the training settings allow: the same network with ReLUs in the place of its spiking neurons.

    python docs/experiments/analogue.py --data-dir DIR --out OUT              # CIFAR-10 on a GPU, 150 epochs
    python docs/experiments/analogue.py --dataset digits --model conv --epochs 4 --out OUT   # to see it work

One step in time, all data, every other setting that of `sadp-fast train`. Writes OUT/analogue-sSEED.json after each
seed, skips what is there, which has to be of the same settings, and prints the mean.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from selection import begin, kept, options_of, trained  # beside this file
from torch import Tensor, nn

from sadp_fast.lab import data
from sadp_fast.lab.figures import spread
from sadp_fast.lab.models import plain, sew_resnet, vgg
from sadp_fast.lab.settings import TrainConfig
from sadp_fast.lab.train import Trainer

# Whose neurons are made by their module's `lif`.
FAMILIES = {"conv": plain, "sew_resnet18": sew_resnet, "spiking_vgg": vgg, "vggsnn": vgg}


class NormReLU(nn.Module):
    """Stands in for BatchNormLIF: normalisation, the residual as in ResNet, ReLU; [T, N, C, H, W]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(features)

    def forward(self, x: Tensor, residual: Tensor | None = None, *, repeat: int | None = None) -> Tensor:
        if repeat is not None:
            x = x.expand(repeat, *x.shape)
        y = self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return torch.relu(y if residual is None else y + residual)


def train(config: TrainConfig, dataset: data.Dataset) -> dict[str, Any]:
    """One run of the network without spikes; the package's own neurons are put back."""
    family = FAMILIES[config.model]
    neuron, family.lif = family.lif, NormReLU  # type: ignore[attr-defined]
    try:
        trainer = Trainer(config, dataset)
    finally:
        family.lif = neuron  # type: ignore[attr-defined]
    return trained(trainer)


def main() -> None:
    given = options_of(__doc__, epochs=150).parse_args()
    if given.model not in FAMILIES:
        raise SystemExit(f"--model {given.model} has no network without spikes: choose one of {', '.join(FAMILIES)}")
    paths = {int(seed): given.out / f"analogue-s{int(seed)}.json" for seed in given.seeds.split(",")}
    there = {str(path): json.loads(path.read_text()) for path in paths.values() if path.exists()}
    base, dataset = begin(given, there, time_steps=1)
    for seed, path in paths.items():
        config = replace(base, seed=seed).of("full")
        kept(path, "analogue", config, partial(train, config, dataset))
    runs = [json.loads(path.read_text()) for path in paths.values()]
    accuracies = [100 * run["test_accuracy"] for run in runs]
    print(f"{len(runs)} seeds: {spread(accuracies, 2)} %, {spread((run['seconds'] for run in runs), 1)} s")


if __name__ == "__main__":
    main()
