"""Time of a pruned epoch over that of a full one, beside 1 - r, which no overhead at all would give.

The training loop is that of `sadp-fast train` (sadp_fast.lab.train.Trainer). Full and pruned epochs take turns, so that
a device that slows down slows both. Evaluation and checkpoints are not timed.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from functools import lru_cache

import pytest
import torch
from bench_report import set_value, shown

from sadp_fast.lab.data import Dataset, load
from sadp_fast.lab.train import TrainConfig, Trainer

CUDA = torch.cuda.is_available()
RATIOS = (0.3, 0.5, 0.7)
ROUNDS = 2 if CUDA else 3
IMAGES = 50_000  # random ones of CIFAR-10's shape: 390 batches a full epoch
SUITE = "Training time"
WARMUP_STEPS = 8
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


def epoch(of: Trainer, most_steps: int | None = None) -> tuple[float, int]:
    """Train one epoch, or its first steps; seconds and examples."""
    of.model.train()
    before, start = int(of.sadp.examples_trained), of.clock()
    with contextlib.closing(of.sadp.batches(of.config.batch_size)) as batches:
        for index in itertools.islice(batches, most_steps):
            loss = of.step(index, LEARNING_RATE)
    seconds = of.clock() - start
    assert torch.isfinite(loss), "the loss is not finite"
    return seconds, int(of.sadp.examples_trained) - before


@pytest.fixture(scope="module", autouse=True)
def _free_trainer():
    yield
    full_data.cache_clear()


@lru_cache(maxsize=1)
def full_data() -> Trainer:
    """Ordinary training, past its first epoch (compilation, tuning)."""
    full = trainer(epochs=1 + ROUNDS * len(RATIOS), prune_ratio=0.0)
    epoch(full)
    return full


@pytest.mark.parametrize("r", RATIOS)
def test_epoch_time(benchmark, bench, r: float) -> None:
    measure = f"SADP epoch over full epoch, r = {r}"
    with bench.row(SUITE, measure, "SADP, score 'all'", "ours") as row:
        if benchmark.disabled:
            benchmark.pedantic(smoke, args=(r,))
            return
        full = full_data()
        # One full epoch first, which scores need; the start of a pruned one, in which its kind of step is compiled and
        # recorded; and one at the end that is planned but not run, so that all that are timed take scores.
        pruned_epochs = ROUNDS + 2
        pruned = trainer(
            epochs=1 + pruned_epochs,
            prune_ratio=r * pruned_epochs / (1 + pruned_epochs),
            score="all",
            warmup_epochs=1,
            tail_epochs=0,
        )
        assert pruned.sadp.ratios[1:] == pytest.approx([r] * pruned_epochs)
        epoch(pruned)
        epoch(pruned, most_steps=WARMUP_STEPS)
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
            time_ratios=ratios,
            share_of_examples_trained=sum(n for _, n in pruned_runs) / sum(n for _, n in full_epochs),
            floor=1 - r,  # pruning without any cost
            share=(1 - r) / ratio,
            overhead=ratio - (1 - r),
        )
        row["further"] = (
            f"overhead {row['overhead']:+.3f}; trained on {row['share_of_examples_trained']:.3f} of the examples; "
            f"a full epoch took {shown(row['full_epoch_seconds'], 's')}"
        )
        set_value(row, ratio, "ratio", "wall", "epoch" if CUDA else "")
        benchmark.extra_info.update(row)


def smoke(r: float) -> None:
    """A few steps of a full epoch, as ordinary training and with scores."""
    for ratio in (0.0, r):
        epoch(trainer(epochs=3, prune_ratio=ratio / 2, warmup_epochs=1, tail_epochs=0), most_steps=3)
