"""What a study runs, and how its runs are had: from the folder where they are finished, else by running them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import train
from ..data import Dataset, load
from . import trajectory
from .display import Display
from .store import Store, StudyError, conditions, training_identity

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
        methods, ratios, seeds: every combination of them is a run; "full" is one run a seed.
        size: of what is measured beside the training runs.
        data_dir: of the data set.
        folder: of the study.
        report_only: use the finished runs alone.
    """

    base: train.TrainConfig
    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    size: Size
    data_dir: str | None
    folder: Path
    report_only: bool = False

    def config(self, method: str, ratio: float, seed: int) -> train.TrainConfig:
        """The training run of one method, ratio and seed."""
        return replace(self.base, prune_ratio=ratio, seed=seed).of(method)

    def cells(self) -> list[tuple[str, float]]:
        """Every method with every ratio that it is run at; "full" prunes nothing."""
        pruned = [(method, ratio) for method in self.methods if method != "full" for ratio in self.ratios]
        return [("full", 0.0)] * ("full" in self.methods) + pruned


class Runs:
    """The runs of a plan, by what they are asked to do. Under `report_only` a run that is not there is None."""

    def __init__(self, plan: Plan, display: Display) -> None:
        self.plan, self.display, self.store = plan, display, Store(plan.folder)
        self._warm: set[str] = set()

    @cached_property
    def data(self) -> Dataset:
        """The data set on the study's device."""
        base = self.plan.base
        loaded = load(
            base.dataset,
            self.plan.data_dir,
            image_size=base.image_size,
            time_steps=base.time_steps,
            split_by=base.split_by,
        )
        return loaded.to(base.device)

    def training(self, method: str, ratio: float, seed: int) -> dict[str, Any] | None:
        """A training run's file: "data_set" and "history", an entry an epoch as of `train.run`."""
        config = self.plan.config(method, ratio, seed)
        name = f"{config.dataset}-{config.model}-{method}-r{config.prune_ratio:g}-s{seed}"

        def run(folder: Path) -> dict[str, Any]:
            self._prepare(config)
            result = train.run(config, self.data, folder, self.display.viewers, resume=True)
            return {**self._data_set(), "history": result.history}

        found = self._get(name, training_identity(config), ("data_set", "history"), config.epochs, run)
        if found is not None and len(found["history"]) != config.epochs:
            raise StudyError(
                f"the run file {self.store.path(name, found['identity'])} is damaged (it has {len(found['history'])} "
                f"of {config.epochs} epochs): delete it, and the same command runs it again"
            )
        return found

    def trajectory(self, seed: int) -> dict[str, Any] | None:
        """Scores and exact norms over a full-data training; see `trajectory.trajectory`."""
        epochs = self.plan.base.epochs
        return self._trajectory(seed, None, epochs, trajectory.measured_epochs(epochs))

    def at_threshold(self, threshold: float, seed: int) -> dict[str, Any] | None:
        """The same after a shorter training of a network with another firing threshold."""
        epochs = min(self.plan.size.sparsity_epochs, self.plan.base.epochs)
        return self._trajectory(seed, threshold, epochs, [epochs])

    def _trajectory(
        self, seed: int, threshold: float | None, epochs: int, measured: list[int]
    ) -> dict[str, Any] | None:
        config = replace(self.plan.config("full", 0.0, seed), epochs=epochs)
        examples = self.plan.size.examples
        identity = trajectory.identity(config, threshold, measured, examples)
        kind = "scores" if threshold is None else f"scores-threshold{threshold:g}"
        return self._get(
            f"{config.dataset}-{config.model}-{kind}-s{seed}",
            identity,
            trajectory.CONTENT,
            epochs,
            lambda folder: trajectory.trajectory(
                config, self.data, threshold, measured, examples, folder, self.display.viewers
            ),
        )

    def timing(self, method: str, run: Callable[[train.TrainConfig, Dataset], dict[str, Any]]) -> dict[str, Any] | None:
        """Where the time of one method goes, on this device; `run` measures it.

        At the plan's ratio nearest to 0.5, if no other has been measured: parts hardly depend on it.
        """
        ratios = sorted(self.plan.ratios, key=lambda ratio: (abs(ratio - 0.5), ratio))
        for ratio in ratios:
            found = self._timing(method, ratio, None)
            if found is not None:
                return found
        return self._timing(method, ratios[0], run)

    def _timing(
        self, method: str, ratio: float, run: Callable[[train.TrainConfig, Dataset], dict[str, Any]] | None
    ) -> dict[str, Any] | None:
        config = self.plan.config(method, ratio, 0)
        name = f"{config.dataset}-{config.model}-timing-{method}-r{config.prune_ratio:g}"
        identity = {"kind": "timing", "config": conditions(config), "steps": self.plan.size.timed_steps}
        if run is None:
            return self.store.read(name, identity, ("timing",))

        def measured(_folder: Path) -> dict[str, Any]:
            self._prepare(config)
            return {**self._data_set(), "timing": run(config, self.data)}

        return self._get(name, identity, ("timing",), 1, measured)

    def _get(
        self,
        name: str,
        identity: dict[str, Any],
        content: tuple[str, ...],
        epochs: int,
        run: Callable[[Path], dict[str, Any]],
    ) -> dict[str, Any] | None:
        found = self.store.read(name, identity, content)
        if found is not None or self.plan.report_only:
            return found
        with self.display.run(name, epochs):
            return self.store.produce(name, identity, self.plan.base.device, run)

    def _prepare(self, config: train.TrainConfig) -> None:
        """Compile a method's kernels before its clock starts; once a process."""
        if config.method not in self._warm:
            try:
                train.prepare(config, self.data)
            except ValueError as error:
                raise StudyError(str(error)) from error
            self._warm.add(config.method)

    def _data_set(self) -> dict[str, Any]:
        return {"data_set": {"name": self.data.name, "train_examples": len(self.data.train_labels)}}
