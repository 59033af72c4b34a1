"""How far the curated launch configurations are from the fastest that `sadp_fast.autotune` finds, on this GPU.

python benchmarks/tune.py FILE.json [--processes N]

At the shapes of the benchmark suite. N processes (default: as many as there are cores, less one) tune everything at
once, which compiles the kernels, before one tunes it alone, which measures.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import test_batch_norm_lif_speed as norm
import test_lif_speed as lif
import test_long_sequences as long
import torch
from bench_report import environment, write_json
from bench_timing import Device
from compile_ahead import MOST_PROCESSES, lif_once
from lif_layers import from_rest, our_node

import sadp_fast
from sadp_fast.ops.common.autotune import Choice

DTYPES = (torch.float32, torch.bfloat16)  # float16 is launched as bfloat16 is


def layers() -> list[Callable[[], None]]:
    """Each runs the forward and the backward pass of a layer once."""
    shapes = [case.shape for case in lif.CASES if case.dtype == torch.float32]
    shapes += [long.shape_of(steps) for steps in long.STEPS]
    found: list[Callable[[], None]] = []
    for statistics, build in ((False, norm.fused), (True, norm.fused_with_statistics)):
        layer = from_rest(our_node(statistics))
        found += [partial(lif_once, layer, shape, dtype) for shape in shapes for dtype in DTYPES]
        found += [partial(norm.run_once, build, kind) for kind in norm.KINDS]
    return found


def tuned(number: int) -> list[Choice]:
    """The choices for a layer."""
    with sadp_fast.autotune() as choices:
        layers()[number]()
    torch.cuda.empty_cache()  # processes share the GPU's memory
    return choices


def row(choice: Choice) -> dict[str, Any]:
    """A choice as it is written to a file."""
    return {
        "kernel": choice.kernel,
        "shape": list(choice.shape),
        "dtype": str(choice.dtype).removeprefix("torch."),
        "configuration": str(choice.configuration),
        "seconds": choice.seconds,
        "curated_seconds": choice.curated_seconds,
    }


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    shape, gain = "x".join(map(str, row["shape"])), row["curated_seconds"] / row["seconds"]
    text = f"{row['kernel']:28} {shape:18} {row['dtype']:9} curated {1e6 * row['curated_seconds']:8.1f} us"
    if gain == 1:
        return text
    return f"{text}, {gain:.2f} times that of {row['configuration']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE.json", type=Path)
    parser.add_argument("--processes", type=int, metavar="N", default=min(MOST_PROCESSES, (os.cpu_count() or 2) - 1))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU, and nothing else is tuned: run this where there is one")
    count = len(layers())
    if options.processes > 0:
        start = time.perf_counter()
        with get_context("spawn").Pool(options.processes) as pool:
            for _ in pool.imap_unordered(tuned, range(count), chunksize=1):
                pass
        print(f"compiled in {time.perf_counter() - start:.0f} s")
    about, start, rows = environment(Device()), time.perf_counter(), []
    for number in range(count):
        for choice in tuned(number):
            rows.append(row(choice))
            print(line(rows[-1]), flush=True)
        write_json({"environment": about, "seconds": time.perf_counter() - start, "choices": rows}, options.file)


if __name__ == "__main__":
    main()
