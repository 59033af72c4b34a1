"""The benchmark suite's own arithmetic: floors, goals, the table and the plot; and that every part of it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))

from bench_report import Bench, aligned, best_peer, duration_lines, set_value, shown, table, write_json  # noqa: E402
from bench_timing import Device  # noqa: E402
from goals import GOALS, judged, unmeasured  # noqa: E402

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
    measures = [f"{f}, {goal.clock or 'device'} time" for f in (good, bad)]
    rows = [
        {"measure": m, "implementation": "ours", goal.figure: f * goal.limit} for m, f in zip(measures, (good, bad))
    ]
    tagged = [dict(row) for row in rows] if goal.clock else rows
    for row in tagged:
        row["goal"] = goal.of or name
        row["measure"] = row["measure"].replace(f"{goal.clock or 'device'} time", "device time")
    every = tagged if tagged is rows else [*tagged, *rows]

    def verdict(rows):
        return next((row, reached) for judged_goal, row, reached in judged(rows) if judged_goal is goal)

    assert verdict(every) == (rows[1], False)
    assert verdict([row for row in every if row["measure"].startswith(str(good))]) == (rows[0], True)
    assert goal.met(goal.limit)
    assert name in unmeasured([]) and name not in unmeasured(every)


def test_wall_time_is_judged_on_a_gpu_only(bench):
    """A goal for the wall time of a draw is about the draw whose device time is measured too."""
    with bench.row("Sampling", "sample N = 1,281,167, wall time", "sample, with capacity", "ours") as row:
        set_value(row, 40e-6, "s", "wall")
    assert judged(bench.rows) == []
    bench.add(row, "sample N = 1,281,167, device time", 13e-6, "s", "device", "sample 1.3M")
    verdicts = {goal.title: (row["value"], reached) for goal, row, reached in judged(bench.rows)}
    assert verdicts[GOALS["sample 1.3M"].title] == (13e-6, True)
    assert verdicts["the same, wall time"] == (40e-6, False)


def test_table_says_what_was_measured(bench):
    lines = table(lif_report(bench))
    line = next(line for line in lines if line.startswith(MEASURE) and "statistics" in line)
    for said in ("125 us", "250 us fast peer", "2.00x", "100 us", "80.0 %"):
        assert said in line
    missing = lines[-1].split(": ")[1].split(", ")
    assert "lif" not in missing and {"step", "sample 20M wall"} <= set(missing)
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


def test_durations_name_the_slowest(bench):
    bench.seconds = {"test_a.py::test_one": 1.0, "test_a.py::test_two": 9.0, "test_b.py::test_three": 4.0}
    lines = [line.strip() for line in duration_lines(bench.report())]
    assert lines[:3] == ["14.0 s  all tests", "10.0 s  test_a.py (2)", "4.0 s  test_b.py (1)"]
    assert lines[4:] == ["9.0 s  test_two", "4.0 s  test_three", "1.0 s  test_one"]


def test_results_are_replaced_as_a_whole(bench, tmp_path):
    """What cannot be written must not leave half a file in the place of the last good one."""
    file = tmp_path / "results.json"
    write_json(lif_report(bench), file)
    before = file.read_text()
    with pytest.raises(TypeError):
        write_json({"rows": [object()]}, file)
    assert file.read_text() == before


def test_jobs_are_shared_and_a_failed_one_is_told(tmp_path, monkeypatch):
    import compile_ahead

    done = []

    def fail():
        raise ValueError("no such layer")

    monkeypatch.setattr(compile_ahead, "jobs", lambda: {"a": lambda: done.append("a"), "b": fail, "c/d": done.clear})
    (tmp_path / "002 c-d").touch()  # taken by another process, which has not finished
    compile_ahead.work(tmp_path)
    compile_ahead.work(tmp_path)
    assert done == ["a"]
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts["000 a"].endswith("s  a") and "failed: ValueError: no such layer" in texts["001 b"]
    assert texts["002 c-d"] == ""


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


def test_plot_of_steps_has_each_once_in_one_order(bench):
    pytest.importorskip("matplotlib")
    import plot

    times = {"CUDA graph": 6e-3, "eager": 9e-3, "eager, with scores": 9.5e-3, "slow peer": 60e-3, "fast peer": 10e-3}
    for name, seconds in times.items():
        with bench.row("Training step", plot.STEP, name, "peer" if "peer" in name else "ours") as row:
            set_value(row, seconds, "s", "wall")
        bench.add(row, plot.STEP_MEMORY, 2**30, "B")
    time, memory = plot.figure(bench.report()).axes
    assert [bar.get_width() for bar in time.patches] == pytest.approx([6, 9, 10, 60])
    assert [label.get_text() for label in time.get_yticklabels()] == ["CUDA graph", "eager", "fast peer", "slow peer"]
    assert [bar.get_width() for bar in memory.patches] == [1024] * 4
    assert time.get_xlim()[0] == memory.get_xlim()[0] == 0


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
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
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
    assert set(report["test_seconds"]) >= {"test_host_time.py::test_host_time[LIFNode-False]"}
    values = {row["implementation"]: row["value"] for row in report["rows"] if "value" in row}
    assert {"LIFNode", "torch loop", "x + 1"} <= set(values) and all(value > 0 for value in values.values())
    assert all(row["floor"] == values["x + 1"] for row in report["rows"] if row["suite"] == "Host time")


def test_what_ncu_prints_is_read_with_its_units():
    import ncu

    metrics = list(ncu.METRICS.values())
    lines = [
        "==PROF== Connected",
        ",".join(f'"{name}"' for name in ("ID", *metrics)),
        ",".join(['""'] * (len(metrics) + 1)),
    ]
    lines[2] = ",".join(['""', '"ns"', *['"%"'] * (len(metrics) - 1)])
    lines += [",".join(f'"{value}"' for value in (i, f"1,{i:03d}", *range(len(metrics) - 1))) for i in range(22)]
    rows = ncu.read("\n".join(lines))
    assert len(rows) == 22 and rows[3]["kernel"] == "LIFNode with statistics, 16x128x512 bfloat16: backward"
    assert rows[3]["time [ns]"] == 1003 and rows[0]["DRAM throughput [%]"] == 0
    with pytest.raises(SystemExit, match="counted 21 launches, but 22"):
        ncu.read("\n".join(lines[:-1]))


def test_layers_to_tune_run_and_choices_are_shown(monkeypatch):
    import tune

    from sadp_fast.ops.common.autotune import Choice

    monkeypatch.setattr(tune.lif, "CASES", [tune.lif.Case((4, 2, 8), torch.float32)])
    monkeypatch.setattr(tune.long, "ELEMENTS", 2**9)
    layers = tune.layers()
    kinds = len(tune.norm.KINDS)
    assert len(layers) == 2 * (2 * (1 + len(tune.long.STEPS)) + kinds)
    for number in (0, len(layers) - kinds - 1, len(layers) - 1):
        assert torch.cuda.is_available() or tune.tuned(number) == []  # nothing is measured on a CPU
    choice = Choice("LIF forward", (4, 2, 8), torch.bfloat16, "some", 2e-6, 3e-6)
    text = " ".join(tune.line(tune.row(choice)).split())
    assert text == "LIF forward 4x2x8 bfloat16 curated 3.0 us, 1.50 times that of some"
    assert tune.line(tune.row(choice._replace(seconds=3e-6))).endswith("3.0 us")


def test_tuning_wants_a_gpu(monkeypatch):
    import tune

    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune.py", "FILE.json"])
    with pytest.raises(SystemExit, match="there is no CUDA GPU"):
        tune.main()
