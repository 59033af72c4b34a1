"""Compile what the benchmarks will run, in several processes at once: Triton and inductor keep it on disk.

One process compiles one kernel after the other, which took most of a run's time. Here processes run every kind of
layer and step once, untimed, before the first measurement; the measuring process then finds the kernels on disk.

python benchmarks/compile_ahead.py FOLDER    (one such process; they share the jobs through files in FOLDER)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

LONGEST = 100.0  # seconds; what is not done by then is compiled when it is measured
MOST_PROCESSES = 15  # each has a context of its own on the GPU

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Job = Callable[[], object]


def in_processes(processes: int, seconds: float = LONGEST) -> list[str]:
    """Run all jobs in so many processes, for at most so many seconds; a line for each, the longest first."""
    # Said outright, to this process too: inductor moves the folder of a process that has compiled with it.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, folder]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running = [subprocess.Popen(command, env=environment, **silent) for _ in range(processes)]
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        results = (path.read_text() or f"not finished: {path.name}" for path in Path(folder).iterdir())
        return sorted(results, reverse=True)


def work(folder: Path) -> None:
    """Take jobs that no other process has taken, until there are none."""
    for number, (name, job) in enumerate(jobs().items()):
        claim = folder / f"{number:03d} {name.replace('/', '-')}"
        try:
            claim.open("x").close()
        except FileExistsError:
            continue
        start = time.perf_counter()
        try:
            job()
            result = ""
        except Exception as error:
            result = f", failed: {type(error).__name__}: {error}".splitlines()[0][:200]
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the processes share the GPU's memory
        claim.write_text(f"{time.perf_counter() - start:6.1f} s  {name}{result}")


# -------------------------------------------------------------------------------------------------------- the jobs


def jobs() -> dict[str, Job]:
    """What the benchmarks run, the longest first: a name for each, and what to call."""
    import test_batch_norm_lif_speed as norm
    import test_host_time as host
    import test_lif_speed as lif
    import test_long_sequences as long
    import test_training_step as step
    import test_training_time as epochs
    from lif_layers import from_rest, learners, our_node, peers

    found: dict[str, Job] = {}
    steps = [s for s in step.subjects() if torch.cuda.is_available() or not s.gpu]
    found.update({f"step: {s.name}": partial(one_step, s.build) for s in steps if s.compiles})
    if norm.COMPILED:
        found["norm: compiled peer"] = norm.AllLayers.compile_once
    cases = [parameter.values for parameter in lif.peer_cases()]
    for case, peer in sorted(cases, key=lambda values: not values[1].compiles):
        if not peer.slow:
            found[f"{case}: {peer.name}"] = partial(build_and_run, peer.build, case.shape, case.dtype)
    for statistics in (False, True):
        build = norm.fused_with_statistics if statistics else norm.fused
        for kind in norm.KINDS:
            found[f"norm: {kind}, statistics {statistics}"] = partial(norm.run_once, build, kind)
        for case in lif.CASES:
            run = partial(lif_once, from_rest(our_node(statistics)), case.shape, case.dtype)
            found[f"{case}, statistics {statistics}"] = run
        found[f"host: statistics {statistics}"] = partial(
            lif_once, from_rest(our_node(statistics)), host.SHAPE, host.DTYPE
        )
    for name, build in learners().items():
        for dtype in (lif.DTYPES[0], lif.DTYPES[-1]):
            found[f"tau learned: {name} {dtype}"] = partial(learner_once, build, lif.SHAPES[0], dtype)
    for length in long.STEPS:
        for dtype in long.DTYPES:
            found[f"long: {length} {dtype}"] = partial(lif_once, from_rest(our_node()), long.shape_of(length), dtype)
    for peer in peers(host.DTYPE):
        found[f"host: {peer.name}"] = partial(build_and_run, peer.build, host.SHAPE, host.DTYPE)
    for name, build, *_ in (*norm.OURS, *norm.PEERS):
        found[f"norm: small and all kinds, {name}"] = partial(norm_layers, norm, build)
    for subject in steps:
        if subject.role == "ours":
            found[f"step: {subject.name}"] = partial(one_step, subject.build)
    found["epoch"] = partial(epochs.smoke, 0.5)
    return found


def lif_once(
    layer: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype, *parameters: Tensor
) -> None:
    x = torch.zeros(shape, dtype=dtype, device=DEVICE, requires_grad=True)
    torch.autograd.grad(layer(x), (x, *parameters), torch.zeros_like(x))


def learner_once(build: Callable[[], torch.nn.Module], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    node = build().to(DEVICE)
    lif_once(node, shape, dtype, *node.parameters())


def build_and_run(build: Callable, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    lif_once(build(dtype), shape, dtype)


def norm_layers(norm, build: Callable) -> None:
    for kind in (*norm.CHECKED_KINDS, *norm.KINDS):
        norm.run_once(build, kind)


def one_step(build: Callable[[], Callable[[], Tensor]]) -> None:
    build()()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
