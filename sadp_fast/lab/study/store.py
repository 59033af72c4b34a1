"""What a study leaves behind: one JSON file for every finished run, found again by what the run was asked to do.

A file's name ends in a digest of its identity (all that decides the result, not where it ran), so that folders filled
by several processes or machines are merged by copying their `runs` into one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import report
from ..report import write_json
from ..settings import TrainConfig
from ..sources import sources


class StudyError(RuntimeError):
    """A study cannot be run or shown; the message is one sentence that says why and the remedy."""


@contextmanager
def refusing(what: str = "") -> Iterator[None]:
    """Settings that are refused in this block are a StudyError, which begins with what they are of."""
    try:
        yield
    except ValueError as error:
        raise StudyError(f"{what}{error}") from error


def environment(device: str, trained_by: list[str] | None = None) -> dict[str, Any]:
    """Where something ran: the device's name and the versions of what it ran with.

    trained_by: the sources of this package, in order; None: those that run now.
    """
    versions = report.versions()
    versions["sadp_fast"] = f"{versions['sadp_fast']}, sources {', then '.join(trained_by or [sources()])}"
    return {"device": report.device_name(device), "versions": versions}


def training_identity(config: TrainConfig) -> dict[str, Any]:
    """What decides a training run."""
    return {"kind": "training", "config": config.conditions()}


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

    def unfinished(self, name: str, identity: dict[str, Any]) -> Path:
        """The folder of this run's checkpoint while it is under way."""
        return self.folder / "unfinished" / self.path(name, identity).stem

    def read(self, name: str, identity: dict[str, Any], content: tuple[str, ...]) -> dict[str, Any] | None:
        """The finished run, under whatever name, or None where there is none; raises StudyError for a damaged file.

        content: keys that such a file holds, beside identity, device and versions.
        """
        digest = self.path(name, identity).stem.rpartition("-")[2]
        path = next((self.folder / "runs").glob(f"*-{digest}.json"), None)
        if path is None:
            return None
        value = read_file(path, content)
        if value["identity"] != as_json(identity):
            raise damaged(path, "it is of another configuration than its name says")
        return value

    def produce(
        self, name: str, identity: dict[str, Any], device: str, run: Callable[[Path], dict[str, Any]]
    ) -> dict[str, Any]:
        """Run it, in a folder of its own that may hold an earlier attempt's checkpoint, and keep what it returns.

        Of that, "sources" are those that trained it, where these may be others than today's: see `environment`.
        """
        path, unfinished = self.path(name, identity), self.unfinished(name, identity)
        whole, start = not unfinished.exists(), time.monotonic()
        content = run(unfinished)
        value = {"identity": identity, **environment(device, content.pop("sources", None)), **content}
        value["wall_seconds"] = time.monotonic() - start if whole else None
        write_json(value, path, indent=None)
        shutil.rmtree(unfinished, ignore_errors=True)
        return as_json(value)

    @contextmanager
    def claim(self, name: str, identity: dict[str, Any], wait: bool) -> Iterator[bool]:
        """Whether the run is this process's to make: False while another one of this machine is at it.

        With `wait`, it is once the other has ended, having finished the run or not. A process that dies lets go.
        """
        path = Path(f"{self.unfinished(name, identity)}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with path.open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield False
                    return
                if not os.fstat(lock.fileno()).st_nlink:  # deleted by who let go: a third one may hold a new file
                    continue
                try:
                    yield True
                finally:
                    path.unlink(missing_ok=True)
                return

    def expected_seconds(self, identity: dict[str, Any], device: str) -> float | None:
        """How long such a run will take, all in all, by the runs on the same kind of device; None where there are none.

        As long as those that differ in the seed alone; else by the slowest of the same kind and its planned examples.
        """

        def seedless(identity: dict[str, Any]) -> Any:
            return as_json({**identity, "config": {**identity["config"], "seed": 0}})

        def work(identity: dict[str, Any]) -> float:
            return identity["config"]["epochs"] * (1 - identity["config"]["prune_ratio"])

        here = (identity["kind"], report.device_name(device))
        files = [file for file in self.files().values() if (file["identity"]["kind"], file["device"]) == here]
        seconds = [(file["identity"], file["wall_seconds"]) for file in files if file.get("wall_seconds")]
        alike = [took for other, took in seconds if seedless(other) == seedless(identity)]
        return max(alike or [took * work(identity) / work(other) for other, took in seconds], default=None)

    def files(self) -> dict[Path, dict[str, Any]]:
        """Every finished run by its path; raises StudyError for a damaged file."""
        return {path: read_file(path) for path in sorted((self.folder / "runs").glob("*.json"))}


def as_json(value: dict[str, Any]) -> Any:
    """What a JSON file gives back of it."""
    return json.loads(json.dumps(value))


def read_file(path: Path, content: tuple[str, ...] = ()) -> dict[str, Any]:
    """One run file, which has to hold these keys beside identity, device and versions; raises StudyError."""
    try:
        value = json.loads(path.read_text())
        lacking = [key for key in ("identity", "device", "versions", *content) if key not in value]
    except (OSError, ValueError, TypeError) as error:
        raise damaged(path, error) from error
    if lacking:
        raise damaged(path, f"it lacks {lacking[0]!r}")
    return value


def damaged(path: Path, why: object) -> StudyError:
    """The error for a run file that cannot be used."""
    return StudyError(f"the run file {path} is damaged ({why}): delete it, and the same command runs it again")
