"""One bench for the whole session; at its end the table, and with ``--results FILE.json`` all figures."""

import os
from pathlib import Path

# As sadp_fast.train does, before cuBLAS is first used: no 64 MiB set aside for products that are small. Peers gain too.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "128")

import pytest
from bench_report import Bench, table, write_json

BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser):
    parser.addoption(
        "--results", metavar="FILE.json", type=Path, help="write all figures and the environment to a file"
    )


def pytest_configure(config):
    path = config.getoption("--results")
    if path and (path.is_dir() or path.suffix != ".json"):
        raise pytest.UsageError(f"--results must name a .json file, got {path}")


@pytest.fixture(scope="session")
def bench(pytestconfig) -> Bench:
    bench = Bench(timing=not pytestconfig.getoption("benchmark_disable"))
    pytestconfig.stash[BENCH] = bench
    return bench


@pytest.fixture(autouse=True)
def _keep_results(request, bench):
    """Results are written after every benchmark, so that a run that is cut short leaves what it has."""
    yield
    if (path := request.config.getoption("--results")) and not request.config.getoption("benchmark_disable"):
        write_json(bench.report(), path)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    bench = config.stash.get(BENCH, None)
    if bench is None or config.getoption("benchmark_disable") or not bench.rows:
        return
    bench.finish()
    report = bench.report()
    terminalreporter.section("sadp_fast against its floors and peers")
    for line in table(report):
        terminalreporter.write_line(line)
    if path := config.getoption("--results"):
        write_json(report, path)
        terminalreporter.write_line(f"\nAll figures: {path}")
