"""What a study runs: decided by the options of a call and by what its folder remembers of earlier ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from .. import data
from ..methods import METHODS
from ..options import with_defaults
from ..settings import SETTINGS, TrainConfig, base_method, settings_of, write_variant
from .store import Store, StudyError, as_json, training_identity, write_json

# In the order in which tables and plots show them; a method that only `--methods` names comes last.
DEFAULT_METHODS = ("full", "random", "infobatch", "loss", "sadp")
_RUN = ("method", "prune_ratio", "seed", "device")  # what differs between runs
# What a folder's runs have in common; all calls on one folder agree on it.
_BASE = [field.name for field in fields(TrainConfig) if field.name not in _RUN]


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


# A whole study in minutes on two CPU cores: a smaller network, fewer epochs and seeds.
QUICK = Size(examples=128, thresholds=(0.5, 1.0, 2.0), sparsity_epochs=3, timed_steps=20)
QUICK_BASE = {"model": "mlp", "epochs": 8}


@dataclass(frozen=True)
class Plan:
    """A study's runs.

    Attributes:
        base: conditions that all runs share; their method, ratio and seed are set run by run.
        methods: and variants of them (see `settings.read_variant`), as tables and plots show them.
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

    def settings(self) -> dict[str, Any]:
        """What every result says of the plan."""
        return {
            "base": {key: getattr(self.base, key) for key in _BASE},
            **{key: list(getattr(self, key)) for key in ("methods", "ratios", "seeds")},
            "size": asdict(self.size),
        }


def planned(given: dict[str, Any]) -> Plan:
    """The plan of a new folder, or of one where a study was begun, with the options of this call."""
    folder, report_only = _folder(given), given.get("report_only", False)
    if folder and report_only and not (folder / "study.json").exists():
        option = "--resume" if "resume" in given else "--out"
        raise StudyError(f"{folder} holds no study to report: check {option}")
    known = remembered(folder) if folder else None
    if "resume" in given and known is None:
        raise StudyError(f"{folder} holds no study to resume: check the folder, or begin one with --out")
    if known is None and report_only:
        raise StudyError("--report-only needs the folder of a study: name it with --out or --resume")
    device = given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    asked = {key: given[key] for key in _BASE if key in given}
    quick, data_dir = given.get("quick", False), given.get("data_dir")
    if folder is None or known is None:
        options = with_defaults({**(QUICK_BASE if quick else {}), **asked, "device": device}, data_dir)
        if options["dataset"] in data.EVENTS:
            options.setdefault("time_steps", data.EVENT_STEPS)
        base, size = TrainConfig(**options), QUICK if quick else Size()
        began = {"methods": DEFAULT_METHODS, "ratios": (0.3, 0.5, 0.7), "seeds": (0, 1) if quick else (0, 1, 2)}
        folder = folder or Path("runs") / f"study-{base.dataset}-{base.model}-{datetime.now():%Y%m%d-%H%M%S}"
    else:
        base, size = replace(known["base"], device=device), known["size"]
        data_dir = given.get("data_dir", known["data_dir"])
        if quick and size != QUICK:
            raise StudyError(f"--quick is given, but the study in {folder} is not a quick one: leave it out")
        for key, value in asked.items():
            if getattr(base, key) != value:
                raise StudyError(
                    f"--{key.replace('_', '-')} is {value}, but the study in {folder} has {getattr(base, key)}: "
                    "leave the option out, or name a new folder"
                )
        began = with_finished(known, base, folder)
    methods, ratios, seeds = (tuple(given.get(key, began[key])) for key in ("methods", "ratios", "seeds"))
    return Plan(base, methods, tuple(sorted(ratios)), seeds, size, data_dir, folder, report_only)


def _folder(given: dict[str, Any]) -> Path | None:
    places = [given[key] for key in ("out", "resume") if key in given]
    if len(places) > 1:
        raise StudyError(f"{places[0]} and {places[1]} both name the study's folder: give one of them")
    return Path(places[0]).expanduser() if places else None


# --------------------------------------------------------------------------------------- what a folder remembers


def remembered(folder: Path) -> dict[str, Any] | None:
    """What is written in a folder of a study; None for a folder that is new or empty."""
    path = folder / "study.json"
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise StudyError(f"{folder} is a file: name a new folder with --out")
        holds = folder.exists() and any(not path.name.startswith(".study.json") for path in folder.iterdir())
        if not holds:
            return None
        if not path.exists():  # looked for again: another process may have written it before the folder was listed
            raise StudyError(f"{folder} is not empty and holds no study: name a new folder with --out")
    try:
        written = json.loads(path.read_text())
        size = Size(**{**written["size"], "thresholds": tuple(written["size"]["thresholds"])})
        asked = {key: written[key] for key in ("methods", "ratios", "seeds", "data_dir")}
        return {"base": TrainConfig(**written["base"]), "size": size, **asked}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} is damaged ({error}): restore it, or name a new folder with --out") from error


def remember(plan: Plan) -> None:
    """Write down what the folder's runs have in common, and what was asked for so far."""
    known = remembered(plan.folder) or {"methods": (), "ratios": (), "seeds": ()}
    content = {
        "base": asdict(plan.base),
        "size": asdict(plan.size),
        **_joined(known, plan.methods, plan.ratios, plan.seeds),
        "data_dir": plan.data_dir and str(Path(plan.data_dir).expanduser().absolute()),
    }
    try:
        write_json(content, plan.folder / "study.json", indent=1)
    except OSError as error:
        raise StudyError(f"the folder {plan.folder} cannot be made ({error}): name another with --out") from error


def with_finished(known: dict[str, Any], base: TrainConfig, folder: Path) -> dict[str, Any]:
    """The methods, ratios and seeds that were asked for, and those of finished runs, copied ones included."""
    runs = filter(None, (run_of(file["identity"], base) for file in Store(folder).files().values()))
    methods, ratios, seeds = list(zip(*runs, strict=True)) or [(), (), ()]
    return _joined(known, methods, filter(None, ratios), seeds)


def _joined(
    known: dict[str, Any], methods: Iterable[str], ratios: Iterable[float], seeds: Iterable[int]
) -> dict[str, Any]:
    """What was asked for before and now: a method's variants behind it, methods that no default names last."""
    order = [*DEFAULT_METHODS, *(method for method in METHODS if method not in DEFAULT_METHODS)]
    once = list(dict.fromkeys([*known["methods"], *methods]))
    return {
        "methods": sorted(once, key=lambda name: (order.index(base_method(name)), ":" in name, once.index(name))),
        "ratios": sorted({*known["ratios"], *ratios}),
        "seeds": sorted({*known["seeds"], *seeds}),
    }


def run_of(identity: dict[str, Any], base: TrainConfig) -> tuple[str, float, int] | None:
    """The variant, ratio and seed by which a run differs from the conditions of a study; None for another study's."""
    found = identity.get("config", {})
    if identity.get("kind") != "training" or found.get("method") not in METHODS:
        return None
    method, ratio, seed = found["method"], found["prune_ratio"], found["seed"]
    base = replace(base, prune_ratio=ratio, seed=seed)
    asked = base.of(method)
    # What the study leaves open follows from the run's own epochs and policy.
    run = replace(asked, **{key: found[key] for key in ("epochs", "policy") if key in found})
    own = asdict(run.settled(run.epochs))
    plain = {key: own[key] if value is None else value for key, value in asdict(asked).items()}
    changes = {
        key: found[key] for key in SETTINGS if key in settings_of(method) and key in found and found[key] != plain[key]
    }
    if None in changes.values():  # a default that only a whole study can have
        return None
    variant = write_variant(method, changes)
    return (variant, ratio, seed) if identity == as_json(training_identity(base.of(variant))) else None
