"""What a study runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..config import TrainConfig, base_method

# In the order in which tables and plots show them; a method that only `--methods` names comes last.
DEFAULT_METHODS = ("full", "random", "infobatch", "loss", "sadp")


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        examples: training examples whose exact gradient norm is taken.
        thresholds: of the networks that differ in sparsity [ours].
        sparsity_epochs: epochs that these are trained for.
        timed_steps: training steps of one timing.
    """

    examples: int = 256
    thresholds: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0)
    sparsity_epochs: int = 10
    timed_steps: int = 40


QUICK = Size(examples=128, thresholds=(0.5, 1.0, 2.0), sparsity_epochs=3, timed_steps=20)


@dataclass(frozen=True)
class Plan:
    """A study's runs.

    Attributes:
        base: conditions that all runs share; their method, ratio and seed are set run by run.
        methods: and variants of them (see `config.read_variant`), as tables and plots show them.
        ratios, seeds: every combination with the methods is a run; "full" and its variants are one run a seed.
        size: of what is measured beside the training runs.
        data_dir: of the data set.
        folder: of the study.
        report_only: use the finished runs alone.
    """

    base: TrainConfig
    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    size: Size
    data_dir: str | None
    folder: Path
    report_only: bool = False

    def config(self, method: str, ratio: float, seed: int) -> TrainConfig:
        """The training run of one method, ratio and seed."""
        return replace(self.base, prune_ratio=ratio, seed=seed).of(method)

    def cells(self) -> list[tuple[str, float]]:
        """Every method with every ratio that it is run at; "full" prunes nothing."""
        whole = [(method, 0.0) for method in self.methods if base_method(method) == "full"]
        return whole + [(method, ratio) for method in self.pruned() for ratio in self.ratios]

    def pruned(self) -> list[str]:
        """The methods that prune."""
        return [method for method in self.methods if base_method(method) != "full"]
