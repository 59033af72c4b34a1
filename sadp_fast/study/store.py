"""What a study leaves behind: one JSON file for every finished run, found again by what the run was asked to do.

A file's name ends in a digest of its identity (all that decides the result, not where it ran), so that folders filled
by several processes or machines are merged by copying their `runs` into one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import report, train


class StudyError(RuntimeError):
    """A study cannot be run or shown; the message is one sentence that says why and the remedy."""


def environment(device: str) -> dict[str, Any]:
    """Where something ran: the device's name and the versions of what it ran with."""
    return {
        "device": report.device_name(device),
        "versions": {
            "sadp_fast": f"{report.package_version('sadp_fast')}, sources {_sources()}",
            "torch": torch.__version__,
            "triton": report.package_version("triton"),
            "python": platform.python_version(),
        },
    }


@cache
def _sources() -> str:
    """Digest of the package's Python sources but for the studies: runs of different ones do not quite compare."""
    package = Path(report.__file__).parent
    files = [path for path in sorted(package.rglob("*.py")) if "study" not in path.relative_to(package).parts]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


# What a configuration says about pruning, which decides nothing where nothing is pruned ...
_PRUNING = {"score", "policy", "smoothing", "weights", "score_momentum", "schedule", "warmup_epochs", "tail_epochs"}
_SCORING = {"policy", "smoothing", "score_momentum"}  # ... and about scores, where all are alike


def conditions(config: train.TrainConfig) -> dict[str, Any]:
    """What decides the result of a training run: not the device, nor what the method does not use.

    So a full-data run is one and the same run beside all settings of pruning.
    """
    unused = {"device"}
    if config.prune_ratio == 0:
        unused |= _PRUNING
    elif config.score in ("random", "static_random"):
        unused |= _SCORING
    return {key: value for key, value in asdict(config).items() if key not in unused}


def training_identity(config: train.TrainConfig) -> dict[str, Any]:
    """What decides a training run."""
    return {"kind": "training", "config": conditions(config)}


class Store:
    """The finished runs in a study's folder: `runs/NAME.json`, and `unfinished/NAME/` while one is under way.

    Attributes:
        folder: of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, identity: dict[str, Any]) -> Path:
        """The file of the run with this identity; `name` is for people."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
        return self.folder / "runs" / f"{name}-{digest}.json"

    def read(self, name: str, identity: dict[str, Any], content: tuple[str, ...]) -> dict[str, Any] | None:
        """The finished run, or None where there is none; raises StudyError for a damaged file.

        content: keys that such a file holds, beside identity, device and versions.
        """
        path = self.path(name, identity)
        if not path.exists():
            older = sorted(path.parent.glob(f"{name}-*.json"))
            path = next((p for p in older if same(read_file(p)["identity"], identity)), path)
        if not path.exists():
            return None
        value = read_file(path)
        lacking = [key for key in content if key not in value]
        if lacking or not same(value["identity"], identity):
            why = f"it lacks {lacking[0]!r}" if lacking else "it is of another configuration than its name says"
            raise StudyError(f"the run file {path} is damaged ({why}): delete it, and the same command runs it again")
        return value

    def produce(
        self, name: str, identity: dict[str, Any], device: str, run: Callable[[Path], dict[str, Any]]
    ) -> dict[str, Any]:
        """Run it, in a folder of its own that may hold an earlier attempt's checkpoint, and keep what it returns."""
        path = self.path(name, identity)
        unfinished = self.folder / "unfinished" / path.stem
        value = {"identity": identity, **environment(device), **run(unfinished)}
        write_json(value, path)
        shutil.rmtree(unfinished, ignore_errors=True)
        return json.loads(json.dumps(value))

    def files(self) -> list[dict[str, Any]]:
        """Every finished run; raises StudyError for a damaged file."""
        return [read_file(path) for path in sorted((self.folder / "runs").glob("*.json"))]


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a file's identity is the one wanted; settings newer than the file count as their defaults."""
    wanted = json.loads(json.dumps(wanted))
    defaults = asdict(train.TrainConfig())
    config = {key: defaults[key] for key in wanted.get("config", {}) if key in defaults} | found.get("config", {})
    return {**found, "config": config} == {"config": {}, **wanted}


def read_file(path: Path) -> dict[str, Any]:
    """One run file's content; raises StudyError."""
    try:
        value = json.loads(path.read_text())
        if not all(key in value for key in ("identity", "device", "versions")):
            raise ValueError("identity, device and versions are not all there")
    except (OSError, ValueError, TypeError) as error:
        raise StudyError(
            f"the run file {path} is damaged ({error}): delete it, and the same command runs it again"
        ) from error
    return value


def write_json(value: dict[str, Any], path: Path, indent: int | None = None) -> None:
    """Write the file whole or not at all, for every process that may look."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n")
    os.replace(partial, path)
