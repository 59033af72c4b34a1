"""What the kernels are once compiled for a GPU, asked once a session."""

import fcntl
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "compiled_report" in getattr(item, "fixturenames", ()):
            item.add_marker("compiled")


@pytest.fixture(scope="session")
def compiled_report(tmp_path_factory):
    """A function of a script among these tests and its arguments: what it prints, from JSON.

    The script runs in a process of its own, since Triton's interpreter, which the other tests use on a machine without
    a GPU, cannot be switched off once triton is imported. It runs once, whichever of xdist's workers asks first.
    """
    pytest.importorskip("triton")
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # which the workers share

    @functools.cache
    def printed(script: str, *arguments: str) -> tuple[int, str, str]:
        path = folder / ("-".join([Path(script).stem, *arguments]) + ".json")
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                path.write_text(json.dumps(_run(script, *arguments)))
        return tuple(json.loads(path.read_text()))

    def report(script: str, *arguments: object) -> dict:
        status, output, errors = printed(script, *map(str, arguments))
        assert status == 0, errors
        return json.loads(output)

    return report


def _run(script: str, *arguments: str) -> tuple[int, str, str]:
    import sadp_fast

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(Path(sadp_fast.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True, timeout=900
    )
    return done.returncode, done.stdout, done.stderr
