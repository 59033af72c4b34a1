"""The benchmark suite's own arithmetic: floors, goals, the table and the plot; and that every part of it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

from bench_report import Bench, aligned, best_peer, set_value, shown, table  # noqa: E402
from bench_timing import Device  # noqa: E402
from goals import GOALS, judged  # noqa: E402

MEASURE = "LIF forward + backward 8x32x128x28x28 bf16"


@pytest.fixture
def bench() -> Bench:
    """A bench on a device that copies 2 TB/s."""
    bench = Bench(timing=False)
    bench.device.__dict__["copy_bandwidth"] = 2e12
    return bench


def add(
    bench: Bench, implementation: str, role: str, seconds: float, moved: float | None = None, goal: str = ""
) -> dict:
    with bench.row("LIF neurons", MEASURE, implementation, role) as row:
        set_value(row, seconds, "s", "device", goal)
        if moved is not None:
            bench.set_floor(row, moved)
    return row


def lif_report(bench: Bench) -> dict:
    add(bench, "LIFNode", "ours", 110e-6, 200e6)
    add(bench, "LIFNode with statistics", "ours", 125e-6, 200e6, goal="lif")
    add(bench, "slow peer", "peer", 900e-6, 200e6)
    add(bench, "fast peer", "peer", 250e-6, 200e6)
    return bench.report()


def test_floor_is_bytes_over_copy_bandwidth(bench):
    row = add(bench, "LIFNode", "ours", 125e-6, 200e6)
    assert row["floor"] == pytest.approx(100e-6)
    assert row["share"] == pytest.approx(0.8)


def test_a_row_without_a_time_has_bytes_and_no_share(bench):
    with bench.row("LIF neurons", MEASURE, "LIFNode", "ours") as row:
        set_value(row, None, "s", "device", "lif")
        bench.set_floor(row, 200e6)
    assert row["moved_bytes"] == 200_000_000
    assert "share" not in row and judged(bench.rows) == []


def test_copy_bandwidth_is_measured_and_plausible():
    device = Device()
    device.copy_bytes = 2**24
    assert 1e8 < device.copy_bandwidth < 1e14
    assert device.buffers(device.cache_bytes) >= 4 and device.buffers(2**40) == 2


def test_peer_that_fails_is_recorded_and_skipped(bench):
    with pytest.raises(pytest.skip.Exception), bench.row("LIF neurons", MEASURE, "broken", "peer"):
        raise RuntimeError("no such kernel")
    assert bench.rows[0]["failed"] == "RuntimeError: no such kernel"
    assert any("no such kernel" in line for line in table(bench.report()))


def test_ours_that_fails_fails(bench):
    with pytest.raises(RuntimeError, match="wrong spikes"), bench.row("LIF neurons", MEASURE, "LIFNode", "ours"):
        raise RuntimeError("wrong spikes")


def test_best_peer_is_the_fastest_one(bench):
    ours, *_ = lif_report(bench)["rows"]
    assert best_peer(bench.rows, ours)["implementation"] == "fast peer"


@pytest.mark.parametrize("name", GOALS)
def test_goals_are_decided_by_the_worst_row(name):
    goal = GOALS[name]
    good, bad = (1.1, 0.9) if goal.at_least else (0.9, 1.1)
    rows = [{"measure": str(f), "goal": goal.of or name, goal.figure: f * goal.limit} for f in (good, bad)]
    ((_, row, reached),) = judged(rows)
    assert row is rows[1] and not reached
    ((_, row, reached),) = judged(rows[:1])
    assert row is rows[0] and reached
    assert goal.met(goal.limit)


def test_table_says_what_was_measured(bench):
    lines = table(lif_report(bench))
    line = next(line for line in lines if line.startswith(MEASURE) and "statistics" in line)
    for said in ("125 us", "250 us fast peer", "2.00x", "100 us", "80.0 %"):
        assert said in line
    goal = next(line for line in lines if line.startswith(GOALS["lif"].title))
    assert "80.0 %" in goal and ">= 97.0 %" in goal and "not reached" in goal
    assert "40.0 % fast peer" in goal  # the peer's share of the same floor


def test_details_are_kept_but_not_shown(bench):
    add(bench, "LIFNode with a detail", "ours", 60e-6, 80e6)["detail"] = True
    report = lif_report(bench)
    assert any(row["implementation"] == "LIFNode with a detail" for row in report["rows"])
    assert not any("with a detail" in line for line in table(report))


def test_figures_for_people():
    assert [shown(v, "s") for v in (7.31e-6, 0.0021, 1.5)] == ["7.3 us", "2.1 ms", "1500 ms"]
    assert shown(1200 * 2**20, "B") == "1,200 MiB" and shown(0.975, "ratio") == "97.5 %"
    assert aligned([("a", "b", "c"), ("x", "-", "longer")])[0::2] == ["a  c", "x  longer"]


def test_plot_shows_each_bandwidth_beside_the_roof(bench, tmp_path):
    pytest.importorskip("matplotlib")
    import plot

    results = tmp_path / "results.json"
    results.write_text(json.dumps(lif_report(bench)))
    drawn = plot.figure(json.loads(results.read_text()))
    (axes,) = drawn.axes
    points = {round(float(x)) for collection in axes.collections for x, _ in collection.get_offsets()}
    assert points == {round(200e6 / seconds / 1e9) for seconds in (110e-6, 125e-6, 250e-6, 900e-6)}
    assert axes.lines[0].get_xdata()[0] == pytest.approx(2000)
    assert axes.get_xlim()[0] == 0 and axes.get_xlabel()
    subprocess.run([sys.executable, FOLDER / "plot.py", results, tmp_path / "out.png"], check=True)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_nothing_says_so(bench):
    pytest.importorskip("matplotlib")
    import plot

    with pytest.raises(ValueError, match="--results"):
        plot.figure(bench.report())


@pytest.mark.parametrize("build", ["spikingjelly", "ours"])
def test_layers_and_convolutions_are_the_networks(build):
    """The shapes that the floors are computed from, against the networks themselves."""
    import networks
    import test_batch_norm_lif_speed as layers

    from sadp_fast import models

    if build == "spikingjelly":
        pytest.importorskip("spikingjelly")
        network = networks.spikingjelly_sew_resnet18(10, layers.T)
    else:
        network = models.build("sew_resnet18", (3, layers.SIZE, layers.SIZE), 10, layers.T)
    neurons, convolutions = [], []

    def neuron(_module, _inputs, output):
        neurons.append(tuple(output.shape))

    def convolution(module, inputs, _output):
        frames = inputs[0].flatten(0, -4)
        convolutions.append((*frames.shape[-3:], module.out_channels, *module.kernel_size[:1], *module.stride[:1]))

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(convolution)
        elif callable(getattr(module, "reset", None)):
            module.register_forward_hook(neuron)
    batch = 2
    with torch.no_grad():
        network(torch.zeros(batch, 3, layers.SIZE, layers.SIZE))
    expected = [
        (layers.T, batch, kind.channels, kind.size, kind.size) for kind in layers.KINDS for _ in range(kind.count)
    ]
    assert sorted(neurons) == sorted(expected)
    listed = [
        (i, size, size, o, kernel, stride)
        for i, o, kernel, stride, size, count in networks.convolutions(layers.SIZE)
        for _ in range(count)
    ]
    assert sorted(convolutions) == sorted(listed)


def test_floor_of_the_step_at_the_published_size():
    """20 layers, 8 with a residual, summed by hand for T = 4, batch 128, 32x32: 8E a layer, 9E with the residual."""
    from test_batch_norm_lif_speed import LayerShape

    stage = 4 * 128 * 64 * 32 * 32  # elements of a layer of the first stage; each later stage has half
    per_stage = [stage >> s for s in range(4)]
    elements = sum((2 + (s > 0)) * 8 * n + 2 * 9 * n for s, n in enumerate(per_stage))
    elements += 3 * stage + 5 * stage // 4  # the stem: spikes once, their gradient twice; its current is a quarter
    kinds = [LayerShape(64, 32, 1, first=True)]
    for s in range(4):
        kinds += [LayerShape(64 << s, 32 >> s, 2 + (s > 0)), LayerShape(64 << s, 32 >> s, 2, residual=True)]
    assert sum(kind.count * sum(kind.moved_elements(128)) for kind in kinds) == elements


def test_a_wrong_layer_is_found(bench):
    """The benchmarks compare with the reference: a layer whose spikes or gradients are wrong does not get a figure."""
    import test_lif_speed as lif
    from lif_layers import from_rest, our_node

    case = lif.Case((4, 2, 8, 6, 6), torch.float32)
    bench.device.cache_bytes = 1  # two buffers are enough
    data = lif.inputs.__wrapped__(bench.device, case)
    right = from_rest(our_node())
    assert lif.check(case, right, data) == 0
    with pytest.raises(AssertionError, match="spikes differ"):
        lif.check(case, lambda x: 1 - right(x), data)
    with pytest.raises(AssertionError, match="gradient differs"):
        lif.check(case, lambda x: right(x * 1.0) + 0.01 * (x - x.detach()), data)


def run_suite(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # Neither the interpreter nor this run's workers, under which nothing is timed.
    environment = {k: v for k, v in environment.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER, timeout=600)


@pytest.mark.slow
def test_every_benchmark_runs_once_on_the_cpu():
    pytest.importorskip("pytest_benchmark")
    done = run_suite("--benchmark-disable")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "failed" not in done.stdout


def test_results_hold_device_versions_and_rows(tmp_path):
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "results.json"
    done = run_suite("--benchmark-only", "-k", "test_host_time", "--results", str(file))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "sadp_fast against its floors and peers" in done.stdout
    report = json.loads(file.read_text())
    assert report["environment"]["torch"] == torch.__version__ and report["copy"]["bytes_per_second"] > 0
    values = {row["implementation"]: row["value"] for row in report["rows"] if "value" in row}
    assert {"LIFNode", "torch loop"} <= set(values) and all(value > 0 for value in values.values())
