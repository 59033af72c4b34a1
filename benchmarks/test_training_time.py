"""Time of a pruned epoch over that of a full one, beside 1 - r, which no overhead at all would give.

The training loop is that of `sadp-fast train` (sadp_fast.train.Trainer). Full and pruned epochs take turns, so that a
device that slows down slows both. Evaluation and checkpoints are not timed.
"""

from __future__ import annotations

import statistics
from functools import lru_cache

import pytest
import torch

from sadp_fast.data import Dataset, load
from sadp_fast.train import TrainConfig, Trainer

CUDA = torch.cuda.is_available()
RATIOS = (0.3, 0.5, 0.7)
ROUNDS = 3 if CUDA else 5
IMAGES = 10_240  # of CIFAR-10's size: 80 batches a full epoch
LEARNING_RATE = 1e-3


def synthetic() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (IMAGES,), generator=generator)
    spread = torch.full((3,), 64.0)
    return Dataset("synthetic", images, labels, images[:500], labels[:500], 10, 2 * spread, spread, True)


def trainer(**options) -> Trainer:
    if CUDA:
        config = TrainConfig(
            dataset="synthetic", model="sew_resnet18", batch_size=128, amp="bf16", device="cuda", **options
        )
        return Trainer(config, synthetic())
    pytest.importorskip("sklearn", reason="the digits data set is scikit-learn's")
    return Trainer(TrainConfig(**options), load("digits"))


def epoch(of: Trainer) -> tuple[float, int]:
    """Train one epoch; seconds and examples."""
    of.model.train()
    before, start = int(of.sadp.examples_trained), of.clock()
    for index in of.sadp.batches(of.config.batch_size):
        loss = of.step(index, LEARNING_RATE)
    seconds = of.clock() - start
    assert torch.isfinite(loss), "the loss is not finite"
    return seconds, int(of.sadp.examples_trained) - before


@lru_cache(maxsize=1)
def full_data() -> Trainer:
    """Ordinary training, past its first epoch (compilation, tuning)."""
    full = trainer(epochs=1 + ROUNDS * len(RATIOS), prune_ratio=0.0)
    epoch(full)
    return full


@pytest.mark.parametrize("r", RATIOS)
def test_epoch_time(benchmark, bench, r: float) -> None:
    measure = f"training epoch r = {r}"
    benchmark.group = "training epoch"
    with bench.row("training", measure, "SADP, score 'all'", "ours") as row:
        full = full_data()
        # One full epoch first, which scores need, and one that is planned but not run, so that all that are timed
        # take scores; those between have exactly the ratio r.
        pruned_epochs = ROUNDS + 1
        pruned = trainer(
            epochs=1 + pruned_epochs,
            prune_ratio=r * pruned_epochs / (1 + pruned_epochs),
            score="all",
            warmup_epochs=1,
            tail_epochs=0,
        )
        assert pruned.sadp.ratios[1:] == pytest.approx([r] * pruned_epochs)
        epoch(pruned)
        full_epochs: list[tuple[float, int]] = []
        pruned_runs: list[tuple[float, int]] = []

        def setup():
            full_epochs.append(epoch(full))

        benchmark.pedantic(lambda: pruned_runs.append(epoch(pruned)), setup=setup, rounds=ROUNDS)
        ratios = [p[0] / f[0] for p, f in zip(pruned_runs, full_epochs)]
        ratio = statistics.median(ratios)
        row.update(
            model=full.config.model,
            batch_size=full.config.batch_size,
            examples=full_epochs[0][1],
            full_epoch_seconds=statistics.median(seconds for seconds, _ in full_epochs),
            pruned_epoch_seconds=statistics.median(seconds for seconds, _ in pruned_runs),
            time_ratio=ratio,
            time_ratio_smallest=min(ratios),
            time_ratio_largest=max(ratios),
            one_minus_r=1 - r,
            share_of_examples_trained=sum(n for _, n in pruned_runs) / sum(n for _, n in full_epochs),
            overhead=ratio - (1 - r),
            share_of_floor=(1 - r) / ratio,
        )
        benchmark.extra_info.update(row)
