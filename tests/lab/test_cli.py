"""The command: every error is one line and leaves nothing behind; what a run writes; Ctrl-C and --resume."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from sadp_fast.lab import cli, data, loggers, models, options, progress, report, train_command
from sadp_fast.lab.methods import METHODS
from sadp_fast.lab.setting_fields import SettingError
from sadp_fast.lab.settings import SCORES, TrainConfig
from sadp_fast.prune.policies import POLICIES

for package in ("sklearn", "rich", "matplotlib", "PIL"):
    pytest.importorskip(package)

FAST = ["train", "--device", "cpu", "--model", "mlp", "--time-steps", "2", "--epochs", "4", "--batch-size", "100"]


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path, monkeypatch):
    """Every test in an empty folder, and with one thread: networks this small lose by more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SADP_DATA", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def listing(folder: Path = Path(".")) -> dict[str, bytes]:
    """Every file below, with its content."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_npz(path: Path, labels: int = 3, count: int = 40, shape: tuple[int, ...] = (8, 8)) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    np.savez(path, train_x=images, train_y=np.arange(count) % labels, test_x=images[:6], test_y=np.arange(6) % labels)


def wrong_files() -> None:
    """The files that the error table reads."""
    write_npz(Path("good.npz"))
    write_npz(Path("tiny.npz"), count=6)
    write_npz(Path("events.npz"), shape=(5, 2, 8, 8))
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:900])
    with np.load("good.npz") as good:
        content = dict(good)
    np.savez("range.npz", **{**content, "test_y": content["test_y"] + 3})
    np.savez("negative.npz", **{**content, "train_y": content["train_y"] - 1})
    np.savez("keyless.npz", **{key: value for key, value in content.items() if key != "test_x"})
    Path("full/inside").mkdir(parents=True)
    Path("full/inside/precious.txt").write_text("precious")
    Path("a_file").write_text("precious")
    Path("empty").mkdir()


NPZ = ["train", "--device", "cpu", "--dataset", "npz", "--data-dir"]
ERRORS = [
    ([], "required: train"),
    (["fit"], "invalid choice: 'fit'"),
    (["train", "--epoch", "3"], "unrecognized arguments: --epoch 3"),
    (["train", "--dataset", "imagenet"], "--dataset: invalid choice: 'imagenet'"),
    (["train", "--model", "vgg"], "--model: invalid choice: 'vgg'"),
    (["train", "--prune-ratio", "1"], "--prune-ratio: '1' is not a number in [0, 1)"),
    (["train", "--prune-ratio", "-0.1"], "--prune-ratio: '-0.1' is not"),
    (["train", "--prune-ratio", "half"], "--prune-ratio: 'half' is not"),
    (["train", "--prune-ratio", "nan"], "--prune-ratio: 'nan' is not"),
    (["train", "--smoothing", "1.5"], "--smoothing: '1.5' is not between 0 and 1"),
    (["train", "--score", "best"], "--score: invalid choice: 'best'"),
    (["train", "--policy", "cap"], "--policy: invalid choice"),
    (["train", "--weights", "equal"], "--weights: invalid choice: 'equal'"),
    (["train", "--score", "given"], "--score: invalid choice: 'given'"),
    (["train", "--score-momentum", "1"], "--score-momentum: '1' is not a number in [0, 1)"),
    (["train", "--compare", "sadp"], "--compare: 'sadp' is always run: leave it out"),
    (
        ["train", "--compare", "full:epochs=x"],
        "'x' is not a whole number of at least 1, which epochs in 'full:",
    ),
    (["train", "--compare", "full:smoothing=0.1"], "sets smoothing, which full does not have"),
    (["train", "--compare", "sadp:lr=1,sadp:lr=1.0"], "names something twice"),
    (["train", "--compare", "random:epochs=2"], "random:epochs=2: prune ratio 0.5 over 2 epochs"),
    (["train", "--schedule", "step"], "--schedule: invalid choice"),
    (["train", "--epochs", "0"], "--epochs: '0' is not a whole number of at least 1"),
    (["train", "--epochs", "2.5"], "--epochs: '2.5' is not"),
    (["train", "--batch-size", "0"], "--batch-size: '0' is not"),
    (["train", "--batch-size", "5000"], "the batch size 5000 is above the number of training examples, 1437"),
    (["train", "--lr", "inf"], "--lr: 'inf' is not a number above 0"),
    (["train", "--weight-decay", "-0.1"], "--weight-decay: '-0.1' is not a number of at least 0"),
    (["train", "--cutout", "2.5"], "--cutout: '2.5' is not a whole number of at least 0"),
    (["train", "--mixup", "-1"], "--mixup: '-1' is not 0, or from 0.01 to 100"),
    (["train", "--mixup", "0.009"], "--mixup: '0.009' is not 0, or from 0.01 to 100"),
    (["train", "--lr", "1e39"], "--lr: '1e39' is not a number above 0, at most 1000"),
    (["train", "--time-steps", "999999999999"], "is not a whole number of at least 1, at most 100000"),
    (["train", "--cutout", "4"], "cutout is 4, but examples of digits"),
    (["train", "--compare", "full,full:cutout=4"], "full:cutout=4: cutout is 4, but examples of digits"),
    (["train", "--seed", "-1"], "--seed: '-1' is not"),
    (["train", "--seed", str(2**63)], "is not a whole number"),
    (["train", "--amp", "int8"], "--amp: invalid choice"),
    (["train", "--compare", "full,half"], "'half' is not one of full,static_random,random,"),
    (["train", "--compare", "full,full"], "'full,full' names something twice"),
    (["train", "--device", "gpu"], "--device 'gpu' is no device"),
    (["train", "--device", "meta"], "--device 'meta' is not supported"),
    (["train", "--device", "cuda:99"], "--device 'cuda:99' is not there"),
    (["train", "--warmup-epochs", "20", "--tail-epochs", "20"], "leave none of 30 epochs to prune: lower"),
    (["train", "--prune-ratio", "0", "--compare", "full,random"], "prunes nothing, so random would train on full data"),
    (["train", "--prune-ratio", "0", "--compare", "sadp:score=last"], "leave it out of --compare, or raise the ratio"),
    (["train", "--epochs", "2"], "lower one of the three or train more epochs"),
    (["train", "--data-dir", "."], "digits needs no files"),
    (["train", "--image-size", "8"], "--image-size is for --dataset imagefolder only"),
    (["train", "--split-by", "time"], "--split-by is for --dataset nmnist and dvs only"),
    (["train", "--split-by", "space"], "--split-by: invalid choice"),
    (["train", "--dataset", "cifar100", "--data-dir", "a_file"], "a_file is a file: give the folder cifar-100-python"),
    (["train", "--dataset", "nmnist", "--data-dir", "a_file"], "a_file is a file: give the folder events_np"),
    (["train", "--dataset", "dvs", "--data-dir", "empty"], "no event data in empty: "),
    (["train", "--dataset", "mnist"], "give --data-dir or set SADP_DATA"),
    (["train", "--dataset", "mnist", "--data-dir", "nowhere"], "no file or folder nowhere"),
    (
        ["train", "--dataset", "cifar10", "--data-dir", "empty"],
        "no CIFAR-10 data in empty: CIFAR-10 data are cifar10.npz, or",
    ),
    (
        ["train", "--dataset", "cifar10", "--data-dir", "a_file"],
        "a_file is a file: give the folder cifar-10-batches-py",
    ),
    (["train", "--dataset", "imagefolder", "--data-dir", "empty"], "no image data in empty: "),
    ([*NPZ, "cut.npz"], "cut.npz is damaged or of another format"),
    ([*NPZ, "range.npz"], "test labels hold 5, out of range: classes are 0 to 2"),
    ([*NPZ, "negative.npz"], "train labels hold -1, out of range"),
    ([*NPZ, "keyless.npz"], "keyless.npz has no array 'test_x'"),
    ([*NPZ, "tiny.npz"], "the batch size 32 is above the number of training examples, 6"),
    ([*NPZ, "events.npz", "--time-steps", "4"], "time_steps is 4 but the event frames have 5 steps"),
    (["train", "--out", "full"], "full is not empty: name a new folder"),
    (["train", "--out", "a_file"], "a_file is a file"),
    (["train", "--out", "a_file/below"], "cannot be made"),
    (["train", "--name", "../up"], "--name '../up' is not a plain name"),
    (["train", "--name", "a", "--out", "b"], "both name the run's folder"),
    (["train", "--resume"], "--resume needs the run's folder"),
    (["train", "--resume", "full"], "full holds no run to resume"),
    (["train", "--resume", "nowhere"], "nowhere holds no run to resume"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(arguments) for arguments, _ in ERRORS])
def test_error_is_one_line_and_changes_nothing(arguments, message, capsys):
    wrong_files()
    before, folders = listing(), sorted(Path(".").rglob("*"))
    if arguments[:1] == ["train"] and "--device" not in arguments:
        arguments = [*arguments, "--device", "cpu"]
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"sadp-fast: error: [^\n]+\n", output.err) and message in output.err
    assert listing() == before and sorted(Path(".").rglob("*")) == folders


def test_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(FAST) == 2
    assert re.fullmatch(r"sadp-fast: error: the package 'rich.console' is missing: [^\n]+\n", capsys.readouterr().err)


ENTRY = {
    "epoch": int,
    "ratio": float,
    "steps": int,
    "examples_trained": int,
    "lr": float,
    "loss": float,
    "test_accuracy": float,
    "test_loss": float,
    "seconds": float,
    "relative_variance": (float, type(None)),
}
FIGURES = {
    "label": str,
    "test_accuracy": float,
    "best_test_accuracy": float,
    "examples_trained": int,
    "training_seconds": float,
    "first_epoch_seconds": float,
    "time_ratio": float,
    "theoretical_ratio": float,
    "relative_variance": (float, type(None)),
    "epochs": list,
}


def assert_schema(value: dict, schema: dict) -> None:
    assert value.keys() == schema.keys()
    for key, kind in schema.items():
        assert isinstance(value[key], kind), key


def test_a_run_writes_table_json_and_plot(capsys):
    assert cli.main([*FAST, "--compare", "full,random", "--out", "here", "--prune-ratio", "0.3"]) == 0
    written = capsys.readouterr()
    assert written.err == ""
    lines = written.out.splitlines()
    assert lines[0].startswith("digits: 1,437 training and 360 test examples; mlp, T = 2, 4 epochs; CPU, 1 thread")
    assert sum(bool(re.match(r".*: epoch \d/4, loss .*, accuracy .*%, kept .*%, .* s", line)) for line in lines) == 12
    for word in ("full data", "dynamic random", "SADP (all)", "5,748", "0.70"):
        assert word in written.out
    assert {path.name for path in Path("here").iterdir()} - {"tb"} == {
        *("run.json", "results.json", "results.png", "full", "random", "sadp")
    }

    results = json.loads(Path("here/results.json").read_text())
    assert results.keys() == {"data_set", "versions", "device", "config", "notes", "methods"}
    assert results["versions"]["torch"] == torch.__version__ and results["config"]["prune_ratio"] == 0.3
    assert list(results["methods"]) == ["full", "random", "sadp"]
    for method, figures in results["methods"].items():
        assert_schema(figures, FIGURES)
        assert len(figures["epochs"]) == 4
        for entry in figures["epochs"]:
            assert_schema(entry, ENTRY)
        seconds = [entry["seconds"] for entry in figures["epochs"]]
        assert figures["training_seconds"] == pytest.approx(sum(seconds))
        assert figures["first_epoch_seconds"] == seconds[0]
        full = results["methods"]["full"]["training_seconds"]
        assert figures["time_ratio"] == pytest.approx(figures["training_seconds"] / full)
        assert figures["theoretical_ratio"] == pytest.approx(1.0 if method == "full" else 0.7)
        assert figures["test_accuracy"] == figures["epochs"][-1]["test_accuracy"]
    assert results["methods"]["full"]["examples_trained"] == 4 * 1437
    assert results["methods"]["random"]["relative_variance"] == pytest.approx(1.0)

    image = Path("here/results.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert image[16:24] == bytes([0, 0, 1500 >> 8, 1500 & 255, 0, 0, 630 >> 8, 630 & 255])  # 10 x 4.2 inches, 150 dpi


def test_baselines_are_compared_and_resumed(capsys):
    compared = ["static_random", "infobatch", "epsilon_greedy"]
    settings = ["--weights", "sum", "--score-momentum", "0.25", "--out", "here", "--prune-ratio", "0.3", "--quiet"]
    assert cli.main([*FAST, "--compare", ",".join(compared), *settings]) == 0
    output = capsys.readouterr().out
    for word in ("static random", "InfoBatch", "ε-greedy"):
        assert word in output
    results = json.loads(Path("here/results.json").read_text())
    assert list(results["methods"]) == [*compared, "sadp"]
    assert [entry["ratio"] for entry in results["methods"]["static_random"]["epochs"]] == [pytest.approx(0.3)] * 4
    assert results["config"]["weights"] == "sum" and results["config"]["score_momentum"] == 0.25
    assert cli.main(["train", "--resume", "here", "--quiet", "--weights", "sum"]) == 0
    assert json.loads(Path("here/results.json").read_text())["methods"] == results["methods"]
    assert cli.main(["train", "--resume", "here", "--score-momentum", "0.5"]) == 2
    assert "--score-momentum is 0.5, but the run in here began with 0.25" in capsys.readouterr().err


def test_cifar_is_trained_with_cutout_unless_told_otherwise():
    for dataset, pixels in (("cifar10", 8), ("cifar100", 8), ("imagefolder", 0), ("digits", 0)):
        given = {"dataset": dataset}
        data_dir = None if dataset == "digits" else "data"
        assert TrainConfig(**options.with_defaults(given, data_dir)).cutout == pixels
        assert TrainConfig(**options.with_defaults({**given, "cutout": 3}, data_dir)).cutout == 3
        assert TrainConfig(**options.with_defaults({**given, "augment": "none"}, data_dir)).cutout == 0


def test_every_method_has_a_label_and_a_colour():
    labels = [report.label(method, "all") for method in METHODS]
    assert len(set(labels)) == len(labels)
    assert len({method.colour for method in METHODS.values()}) == len(labels)


def test_variants_have_labels_and_looks_of_their_own():
    text = "sadp:score=last:weights=none:score_momentum=0.5:low_memory=true"
    assert report.label(text, "all") == "SADP (last), low memory true, weights none, momentum 0.5"
    assert report.label("full:epochs=30", "all") == "full data, 30 epochs"
    variants = [f"{method}:lr={rate}" for method in ("full", "sadp") for rate in range(1, 9)]
    looks = report.styles([*METHODS, *variants])
    assert looks["sadp"] == report.styles(["sadp"])["sadp"] and looks["sadp"]["linestyle"] == "-"
    assert len({(look["color"], look["linestyle"]) for look in looks.values()}) == len(METHODS) + len(variants)
    assert len({(look["linestyle"], look["marker"]) for look in looks.values()}) >= 9


def test_variants_are_trained_beside_the_method(capsys):
    """Full data for half of the epochs, and the method with other weights."""
    variants = ["full:epochs=2", "sadp:weights=none"]
    compared = ["--compare", ",".join(["full", *variants]), "--prune-ratio", "0.3"]
    assert cli.main([*FAST, *compared, "--out", "here", "--quiet"]) == 0
    assert "2,874" in capsys.readouterr().out
    methods = json.loads(Path("here/results.json").read_text())["methods"]
    assert list(methods) == ["full", *variants, "sadp"]
    assert methods["full:epochs=2"]["label"] == "full data, 2 epochs"
    half = methods["full:epochs=2"]
    assert half["examples_trained"] == 2 * 1437 and len(half["epochs"]) == 2
    assert half["theoretical_ratio"] == 0.5 and half["epochs"][-1]["lr"] < methods["full"]["epochs"][1]["lr"]
    full = methods["full"]["training_seconds"]
    assert half["time_ratio"] == pytest.approx(half["training_seconds"] / full)
    own = torch.load("here/sadp-weights=none/checkpoint.pt", weights_only=True)["config"]
    assert own["weights"] == "none" and own["method"] == "sadp"
    assert cli.main(["train", "--resume", "here", "--quiet"]) == 0
    assert json.loads(Path("here/results.json").read_text())["methods"] == methods


LONG = (
    "sadp:epochs=3:batch_size=100:lr=0.00212345678912345:weight_decay=0.01123456789123456:label_smoothing=0.1:"
    "augment=none:cutout=0:mixup=0.2:amp=off:low_memory=false:score=last:policy=floor:smoothing=0.2512345678912345:"
    "weights=unbiased:score_momentum=0.2512345678912345:schedule=constant:warmup_epochs=1:tail_epochs=0"
)


@pytest.mark.filterwarnings("ignore:constrained_layout")  # its name fills the plot
def test_a_variant_may_be_longer_than_a_files_name(capsys):
    assert len(LONG) > 255
    assert cli.main([*FAST, "--compare", LONG, "--prune-ratio", "0.3", "--out", "here", "--quiet"]) == 0
    assert list(json.loads(Path("here/results.json").read_text())["methods"]) == [LONG, "sadp"]
    study = ["study", "time", *FAST[1:], "--methods", LONG, "--ratios", "0.3", "--seeds", "0", "--quiet"]
    assert cli.main([*study, "--out", "study"]) == 0
    assert len(list(Path("study/runs").iterdir())) == 2


@pytest.mark.parametrize("allocate", [lambda: torch.empty(10**15), lambda: np.empty((10**9, 10**6))])
def test_too_little_memory_is_one_line(allocate, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda *arguments, **options: allocate())
    assert cli.main(FAST) == 2
    assert re.fullmatch(r"sadp-fast: error: the computer's memory is too small .*\n", capsys.readouterr().err)
    monkeypatch.setattr(data, "load", lambda *arguments, **options: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):  # a mistake is none of memory
        cli.main(FAST)


def test_an_infinite_variance_can_be_written():
    entry = {"test_accuracy": 0.5, "examples_trained": 9, "seconds": 1.0, "ratio": 0.5}
    figures = report._figures([{**entry, "relative_variance": value} for value in (2.0, None)], 2, None)
    assert figures["relative_variance"] is None and figures["theoretical_ratio"] == 0.5
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_json({"variance": float("inf")}, Path("here.json"))
    assert not Path("here.json").exists()


def test_plot_shows_every_method_with_units(monkeypatch):
    """The figure's texts and lines, taken when it is saved."""
    from matplotlib.figure import Figure

    assert cli.main([*FAST, "--out", "here", "--quiet", "--prune-ratio", "0.3"]) == 0
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *arguments, **options: figures.append(self))
    results = json.loads(Path("here/results.json").read_text())
    report.write_plot(results, Path("here/again.png"))
    by_time, by_examples = figures[0].axes
    assert by_time.get_xlabel() == "Training time (s)" and by_time.get_ylabel() == "Test accuracy (%)"
    assert by_examples.get_xlabel() == "Examples trained"
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert [label.split(":")[0] for label in labels] == ["full data", "SADP (all)"]
    assert figures[0].get_suptitle() == "digits, mlp, T = 2, r = 0.3 (CPU, 1 thread)"
    seconds = by_time.lines[0].get_xdata()
    assert seconds[-1] == pytest.approx(results["methods"]["full"]["training_seconds"])


def test_quiet_run_without_comparison_in_the_default_folder(capsys):
    assert cli.main([*FAST, "--quiet", "--compare", "none", "--prune-ratio", "0.3"]) == 0
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"digits-mlp-\d{8}-\d{6}", folder.name)
    output = capsys.readouterr().out
    assert "epoch" not in output and "SADP (all)" in output
    figures = json.loads((folder / "results.json").read_text())["methods"]
    assert list(figures) == ["sadp"] and figures["sadp"]["time_ratio"] is None


def test_runs_that_begin_at_the_same_time_have_folders_of_their_own(monkeypatch):
    class Noon:
        @staticmethod
        def now():
            return datetime(2026, 11, 27, 12)

    monkeypatch.setattr(train_command, "datetime", Noon)
    plans = [train_command._begin(train_command._planned({"epochs": 4, "seed": seed})) for seed in range(3)]
    assert [plan.folder.name.removeprefix("digits-conv-20261127-120000") for plan in plans] == ["", "-2", "-3"]
    assert [json.loads((plan.folder / "run.json").read_text())["config"]["seed"] for plan in plans] == [0, 1, 2]

    both = [train_command._planned({"epochs": 4, "seed": seed, "out": "mine"}) for seed in range(2)]
    train_command._begin(both[0])
    with pytest.raises(options.CommandError, match=r"another run has begun in mine: name a new folder, or .*--resume"):
        train_command._begin(both[1])
    assert json.loads(Path("mine/run.json").read_text())["config"]["seed"] == 0
    shutil.rmtree("runs")
    Path("runs").symlink_to("nowhere")
    with pytest.raises(options.CommandError, match=r"the run's folder runs/.* cannot be made"):
        train_command._begin(train_command._planned({"epochs": 4}))


@pytest.mark.parametrize("compared", ["full", "none", "full:epochs=2"])
def test_without_pruning_full_data_is_trained_once(compared, capsys):
    assert cli.main([*FAST, "--prune-ratio", "0", "--compare", compared, "--out", "here"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("--prune-ratio 0 prunes nothing: only full data is trained\n") and "SADP" not in output
    methods = json.loads(Path("here/results.json").read_text())["methods"]
    assert list(methods) == (["full:epochs=2", "full"] if compared == "full:epochs=2" else ["full"])
    assert methods["full"]["examples_trained"] == 4 * 1437 and methods["full"]["time_ratio"] == 1.0
    assert cli.main(["train", "--resume", "here", "--quiet"]) == 0
    assert json.loads(Path("here/results.json").read_text())["methods"] == methods


def test_lists_may_have_spaces_after_commas():
    read = options.list_of(options.variant)
    assert read("full, full:epochs=15,  sadp:weights=none ") == ["full", "full:epochs=15", "sadp:weights=none"]
    with pytest.raises(SettingError, match="'full, full' names something twice"):
        read("full, full")


@pytest.mark.parametrize("command", ["train", "study"])
def test_help_breaks_no_name(command, monkeypatch, capsys):
    """In a terminal of 80 columns, lines break only between methods, scores, policies, networks and data sets."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for names in (METHODS, SCORES, POLICIES, data.DATASETS, models.NAMES):
        assert ", ".join(names) in text


def test_low_memory_is_kept_and_changes_no_result():
    for folder, option in (("dense", []), ("bits", ["--low-memory"])):
        assert cli.main([*FAST, "--compare", "none", "--quiet", "--out", folder, *option]) == 0
    dense, bits = (json.loads(Path(folder, "results.json").read_text()) for folder in ("dense", "bits"))
    assert bits["config"].pop("low_memory") is True and dense["config"].pop("low_memory") is False
    assert bits["config"] == dense["config"]
    for entry, other in zip(bits["methods"]["sadp"]["epochs"], dense["methods"]["sadp"]["epochs"], strict=True):
        assert entry["loss"] == other["loss"]
    assert cli.main(["train", "--resume", "bits", "--low-memory", "--quiet"]) == 0


def test_event_frames_bring_their_time_steps():
    write_npz(Path("events.npz"), shape=(5, 2, 8, 8))
    arguments = [*NPZ, "events.npz", "--epochs", "4", "--batch-size", "8", "--compare", "none", "--out", "here"]
    assert cli.main(arguments) == 0
    config = json.loads(Path("here/results.json").read_text())["config"]
    assert (config["time_steps"], config["model"], config["lr"], config["amp"]) == (5, "conv", 0.002, "off")


@pytest.mark.parametrize("model", ["spiking_vgg", "spikformer"])
def test_events_become_as_many_frames_as_time_steps(model):
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for name in ("left", "right"):
            folder = Path("events", split, name)
            folder.mkdir(parents=True)
            for i in range(count):
                x, y = random.integers(0, 8, (2, 200))
                x[0] = y[0] = 7  # the sensor's corner
                np.savez(folder / f"{i}.npz", t=np.arange(200), x=x, y=y, p=random.integers(0, 2, 200))
    arguments = ["train", "--device", "cpu", "--dataset", "dvs", "--data-dir", "events", "--model", model]
    arguments += ["--time-steps", "3", "--split-by", "time", "--epochs", "3", "--batch-size", "4", "--compare", "none"]
    assert cli.main([*arguments, "--out", "here"]) == 0
    result = json.loads(Path("here/results.json").read_text())
    assert (result["config"]["time_steps"], result["config"]["split_by"]) == (3, "time")
    assert cli.main(["train", "--resume", "here", "--quiet"]) == 0


def stop(monkeypatch, when) -> None:
    """Ctrl-C as soon as `when` holds of a line's label and history entry."""
    shown = progress.Lines.epoch

    def epoch(self, entry):
        shown(self, entry)
        if when(self.label, entry["epoch"]):
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.Lines, "epoch", epoch)


@pytest.mark.parametrize("place", [("full data", 2), ("SADP (all)", 3)])
def test_interrupted_run_resumes_to_the_same_result(place, capsys, monkeypatch):
    arguments = [*FAST, "--prune-ratio", "0.3", "--seed", "5"]
    assert cli.main([*arguments, "--out", "whole"]) == 0
    with monkeypatch.context() as context:
        stop(context, lambda *reached: reached == place)
        capsys.readouterr()
        assert cli.main([*arguments, "--out", "cut run"]) == 130
    stopped = capsys.readouterr()
    assert stopped.err == "sadp-fast: interrupted; to go on: sadp-fast train --resume 'cut run'\n"
    assert not Path("cut run/results.json").exists()

    before = listing()
    for option, message in (
        ("--lr", "--lr is 0.5, but the run in cut run began with 0.002"),
        ("--seed", "--seed is 0"),
    ):
        value = "0.5" if option == "--lr" else "0"
        assert cli.main(["train", "--resume", "cut run", option, value]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*arguments, "--out", "cut run"]) == 2
    assert listing() == before

    assert cli.main(["train", "--out", "cut run", "--resume", "--seed", "5"]) == 0
    results = [json.loads(Path(folder, "results.json").read_text()) for folder in ("whole", "cut run")]
    for method in ("full", "sadp"):
        a, b = (
            [
                {key: value for key, value in entry.items() if key != "seconds"}
                for entry in result["methods"][method]["epochs"]
            ]
            for result in results
        )
        assert a == b
    assert cli.main(["train", "--resume", "cut run", "--quiet"]) == 0  # a finished run shows its table again


def test_resume_may_choose_another_device_of_the_same_kind(monkeypatch, capsys):
    arguments = [*FAST, "--prune-ratio", "0.3", "--compare", "none", "--out", "here"]
    with monkeypatch.context() as context:
        stop(context, lambda label, epoch: epoch == 1)
        assert cli.main(arguments) == 130
        stop(context, lambda label, epoch: epoch == 2)
        capsys.readouterr()
        assert cli.main(["train", "--resume", "here", "--device", "cpu:0"]) == 130
    again = "train --resume here --device cpu:0"
    assert capsys.readouterr().err == f"sadp-fast: interrupted; to go on: sadp-fast {again}\n"
    assert cli.main([*again.split(), "--quiet"]) == 0
    assert cli.main(["train", "--resume", "here", "--device", "cuda"]) == 2
    assert "--device is cuda, but the run in here began with cpu" in capsys.readouterr().err


def test_resume_may_move_the_data():
    write_npz(Path("data.npz"))
    assert cli.main([*NPZ, "data.npz", "--epochs", "4", "--compare", "none", "--batch-size", "8", "--out", "here"]) == 0
    Path("data.npz").rename("moved.npz")
    assert cli.main(["train", "--resume", "here"]) == 2
    assert cli.main(["train", "--resume", "here", "--data-dir", "moved.npz"]) == 0


def test_interrupt_of_the_real_process_leaves_a_resumable_run():
    command = [
        sys.executable,
        "-m",
        "sadp_fast.lab.cli",
        *FAST,
        "--epochs",
        "400",
        "--prune-ratio",
        "0.3",
        "--out",
        "here",
    ]
    folders = [str(Path(cli.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(folders),
        "PYTHONUNBUFFERED": "1",
    }
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "epoch 3/400" in line:
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "sadp-fast: interrupted; to go on: sadp-fast train --resume here\n"
    state = torch.load("here/full/checkpoint.pt", weights_only=True)
    assert 3 <= len(state["history"]) < 400


def test_tensorboard_gets_every_scalar(monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    viewer = loggers.tensorboard(Path("tb"))
    viewer.epoch({"epoch": 1, "loss": 0.5, "relative_variance": None})
    viewer.epoch({"epoch": 2, "loss": 0.25, "relative_variance": 0.75})
    events = accumulator.EventAccumulator("tb").Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("relative_variance")] == [(2, 0.75)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert loggers.tensorboard(Path("other")) is None and not Path("other").exists()


def test_live_progress_in_a_terminal(monkeypatch):
    """In a terminal there are bars with epoch, step, loss, accuracy, kept share and the time left."""
    from rich.console import Console

    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **options: Console(file=screen, force_terminal=True, width=140))
    assert cli.main([*FAST, "--out", "here", "--prune-ratio", "0.3"]) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"SADP \(all\).*epoch 4/4 step +\d+ kept +\d+% loss +\d\.\d{3} accuracy +\d+\.\d% .*left", text)
    assert re.search(r"full data .*epoch 4/4 step +\d+ kept 100% loss .* accuracy .*left", text)


def test_bar_keeps_its_width():
    from rich.console import Console

    with progress.bars(Console(file=io.StringIO())) as bars:
        bar = progress.Bar(bars, "SADP", 20)
        entry = {"epoch": 10, "steps": 45, "ratio": 0.625, "loss": 0.25, "test_accuracy": 0.975}
        shown = []
        for call in (
            lambda: bar.step(1, 0.01, 0, None, 1.0),
            lambda: bar.step(10, 1.0, 20, 1.5, 0.375),
            lambda: bar.epoch(entry),
            lambda: bar.step(11, 0.01, 0, None, 0.375),
        ):
            call()
            shown.append(bars.tasks[0].fields["status"])
    assert shown == [
        "epoch  1/20 step    0 kept 100% loss      - accuracy     -%",
        "epoch 10/20 step   20 kept  38% loss  1.500 accuracy     -%",
        "epoch 10/20 step   45 kept  38% loss  0.250 accuracy  97.5%",
        "epoch 11/20 step    0 kept  38% loss  0.250 accuracy  97.5%",
    ]


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in (
        *("dataset", "data-dir", "model", "prune-ratio", "score", "policy", "smoothing", "schedule", "warmup-epochs"),
        *("tail-epochs", "epochs", "time-steps", "batch-size", "lr", "amp", "compare", "seed", "device", "resume"),
        *("out", "name", "quiet", "image-size", "split-by", "label-smoothing", "low-memory"),
        *("weights", "score-momentum", "weight-decay", "augment", "cutout", "mixup"),
    ):
        assert f"--{option} " in text
