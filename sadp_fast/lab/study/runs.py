"""The runs of a study: taken from the folder where they are finished, else run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import train
from ..data import Dataset, described, differ, load
from ..settings import TrainConfig, folder_name
from .measure import Trajectory, measured_epochs
from .plan import Plan
from .progress import Deadline, Display, OutOfTime
from .store import Store, StudyError, refusing, training_identity

# By which a folder's runs are of the data at hand; those of other studies may lie among them.
_DATA = ("dataset", "image_size", "split_by", "time_steps")


class Runs:
    """The runs of a plan, by what they are asked to do.

    One that is not there is None under `report_only`, where the deadline leaves no time for it, or while another
    process is at it.

    Attributes:
        wait: for what other processes are at, rather than leave it to them.
    """

    def __init__(self, plan: Plan, display: Display, deadline: Deadline | None = None) -> None:
        self.plan, self.display, self.store = plan, display, Store(plan.folder)
        self.deadline = deadline or Deadline()
        self.wait = False
        self._warm: set[TrainConfig] = set()

    @cached_property
    def data(self) -> Dataset:
        """The data set on the study's device; raises StudyError where the folder's runs are of another one."""
        base = self.plan.base
        how = {key: getattr(base, key) for key in _DATA}
        loaded = load(how.pop("dataset"), self.plan.data_dir, **how)
        for path, file in self.store.files().items():
            config, found = file["identity"].get("config", {}), file.get("data_set", {})
            if all(config.get(key) == getattr(base, key) for key in _DATA) and differ(found, loaded.identity):
                raise StudyError(
                    f"the run file {path} is of another data set ({described(found)}) than the one at hand "
                    f"({described(loaded.identity)}): check --data-dir, or name a new folder with --out"
                )
        return loaded.to(base.device)

    def training(self, method: str, ratio: float, seed: int) -> dict[str, Any] | None:
        """A training run's file: "data_set" and "history", an entry an epoch as of `train.run`."""
        config = self.plan.config(method, ratio, seed)
        name = f"{config.dataset}-{config.model}-{folder_name(method)}-r{config.prune_ratio:g}-s{seed}"

        def run(folder: Path) -> dict[str, Any]:
            self._prepare(config)
            result = train.run(config, self.data, folder, self.display.viewers, resume=True)
            return {"data_set": self.data.identity, "sources": result.sources, "history": result.history}

        return self._get(name, training_identity(config), ("data_set", "history"), config.epochs, run)

    def trajectory(self, seed: int, threshold: float | None = None) -> dict[str, Any] | None:
        """Scores and exact norms over a full-data training; see `measure.Trajectory`.

        threshold: after a shorter training of a network with this firing threshold.
        """
        epochs, kind = self.plan.base.epochs, "scores"
        measured = measured_epochs(epochs)
        if threshold is not None:
            epochs, kind = min(self.plan.size.sparsity_epochs, epochs), f"scores-threshold{threshold:g}"
            measured = [epochs]
        config = replace(self.plan.config("full", 0.0, seed), epochs=epochs)
        asked = Trajectory(config, threshold, measured, self.plan.size.examples)

        def run(folder: Path) -> dict[str, Any]:
            return asked.run(self.data, folder, self.display.viewers)

        name = f"{config.dataset}-{config.model}-{kind}-s{seed}"
        return self._get(name, asked.identity(), ("data_set", "snapshots"), epochs, run)

    def timing(self, method: str, measure: Callable[[TrainConfig, Dataset], dict[str, Any]]) -> dict[str, Any] | None:
        """Where the time of one method goes, on this device, as "timing".

        At the plan's ratio nearest to 0.5: parts hardly depend on it.
        """
        config = self.plan.config(method, min(self.plan.ratios, key=lambda ratio: (abs(ratio - 0.5), ratio)), 0)
        identity = {"kind": "timing", "config": config.conditions(), "steps": self.plan.size.timed_steps}

        def run(_folder: Path) -> dict[str, Any]:
            self._prepare(config)
            return {"data_set": self.data.identity, "timing": measure(config, self.data)}

        name = f"{config.dataset}-{config.model}-timing-{folder_name(method)}-r{config.prune_ratio:g}"
        return self._get(name, identity, ("timing",), 1, run)

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
        device = self.plan.base.device
        # One that was begun, or of which nothing is known, may stop after every epoch.
        begun = self.store.unfinished(name, identity).exists()
        expected = None if begun else self.store.expected_seconds(identity, device)
        if not self.deadline.allows(self.deadline.longest_epoch if expected is None else expected):
            return None
        with self.store.claim(name, identity, self.wait) as mine:
            found = self.store.read(name, identity, content)  # another process may just have finished it
            if found is not None or not mine:
                return found
            try:
                with self.display.run(name, epochs, self.deadline.watch(epochs)):
                    return self.store.produce(name, identity, device, run)
            except OutOfTime:
                return None

    def _prepare(self, config: TrainConfig) -> None:
        """Compile a method's kernels before its clock starts; once a process."""
        alike = replace(config, prune_ratio=0.0, seed=0)
        if alike not in self._warm:
            with refusing():
                train.prepare(config, self.data)
            self._warm.add(alike)
