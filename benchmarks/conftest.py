"""One bench for the whole session; at its end the table, and with ``--results FILE.json`` all figures."""

import os
import time
from pathlib import Path

# As sadp_fast.lab.train does, before cuBLAS is first used: no 64 MiB set aside for small products. Peers gain too.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "128")

import compile_ahead
import pytest
import torch
from bench_report import Bench, duration_lines, table, write_json

from sadp_fast import native

BENCH = pytest.StashKey[Bench]()
# What a run that is cut short should have; files that are not named come last.
ORDER = ("lif_speed", "training_step", "batch_norm", "sampling", "host_time", "long_sequences", "training_time")


def pytest_addoption(parser):
    parser.addoption(
        "--results", metavar="FILE.json", type=Path, help="write all figures and the environment to a file"
    )
    parser.addoption(
        "--compile-ahead",
        metavar="PROCESSES",
        type=int,
        help="processes that compile all kernels before the first measurement (default: on a GPU, one less than there "
        f"are cores, at most {compile_ahead.MOST_PROCESSES}, where all benchmarks run; 0: none)",
    )


def pytest_report_header():
    """Which copy of the package is measured."""
    return native.description()


def pytest_configure(config):
    path = config.getoption("--results")
    if path and (path.is_dir() or path.suffix != ".json"):
        raise pytest.UsageError(f"--results must name a .json file, got {path}")
    if (processes := config.getoption("--compile-ahead")) is not None and processes < 0:
        raise pytest.UsageError(f"--compile-ahead must be 0 or a number of processes, got {processes}")


def pytest_collection_modifyitems(items):
    """What goals are about first, what compiles for long last."""

    def rank(item) -> tuple[bool, int]:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        compiles = item.name.endswith("_compiled") or any(getattr(value, "compiles", False) for value in parameters)
        return compiles, next((i for i, name in enumerate(ORDER) if name in item.path.name), len(ORDER))

    items.sort(key=rank)


def processes_to_compile(config, items: int) -> int:
    asked = config.getoption("--compile-ahead")
    if asked is not None:
        return asked
    selected = config.getoption("keyword") or config.getoption("markexpr") or items < 40
    if not torch.cuda.is_available() or config.getoption("benchmark_disable") or selected:
        return 0
    return min((os.cpu_count() or 1) - 1, compile_ahead.MOST_PROCESSES)


@pytest.fixture(scope="session")
def bench(request, pytestconfig) -> Bench:
    compiled = None
    if processes := processes_to_compile(pytestconfig, len(request.session.items)):
        start = time.perf_counter()
        lines = compile_ahead.in_processes(processes)
        compiled = time.perf_counter() - start
        with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{len(lines)} kinds of layer and step compiled in {compiled:.0f} s; the longest and what failed:")
            print(*(line for i, line in enumerate(lines) if i < 5 or "fail" in line or "not fin" in line), sep="\n")
    bench = Bench(timing=not pytestconfig.getoption("benchmark_disable"))
    bench.compile_ahead_seconds = compiled
    pytestconfig.stash[BENCH] = bench
    return bench


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Results are written after every benchmark, so that a run that is cut short leaves what it has."""
    start = time.perf_counter()
    result = yield
    bench = item.config.stash.get(BENCH, None)
    if bench is None:
        return result
    taken = time.perf_counter() - start - (0.0 if bench.seconds else bench.compile_ahead_seconds or 0.0)
    bench.seconds[f"{item.path.name}::{item.name}"] = taken
    if (path := item.config.getoption("--results")) and not item.config.getoption("benchmark_disable"):
        write_json(bench.report(), path)
    return result


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    bench = config.stash.get(BENCH, None)
    if bench is None or config.getoption("benchmark_disable") or not bench.rows:
        return
    bench.finish()
    report = bench.report()
    terminalreporter.section("seconds that the benchmarks took")
    for line in duration_lines(report):
        terminalreporter.write_line(line)
    terminalreporter.section("sadp_fast against its floors and peers")
    for line in table(report):
        terminalreporter.write_line(line)
    if path := config.getoption("--results"):
        write_json(report, path)
        terminalreporter.write_line(f"\nAll figures: {path}")
