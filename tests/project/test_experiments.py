"""The experiments that docs/findings.md tells of still run."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from sadp_fast.lab import data
from sadp_fast.prune import epoch as drawing

SCRIPTS = Path(__file__).parents[2] / "docs" / "experiments"


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_experiment", SCRIPTS / f"{name}.py")
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    return experiment


def test_every_way_to_select_trains_and_is_shown(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the digits data set is scikit-learn's")
    experiment = load("selection")
    monkeypatch.setattr(experiment.torch.cuda, "is_available", lambda: False)
    sample = drawing.sample
    arguments = ["--dataset", "digits", "--model", "mlp", "--epochs", "4", "--seeds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["selection.py", *arguments])
    experiment.main()
    assert drawing.sample is sample
    runs = json.loads((tmp_path / "selection.json").read_text())["runs"]
    assert {run["name"] for run in runs} == set(experiment.ways(4)) and (tmp_path / "selection.png").exists()
    # The same first epoch, on all data, for all that score: after it, what is drawn differs, and so do the losses.
    pruned = [run["losses"] for run in runs if run["config"]["method"] == "sadp"]
    assert len({losses[0] for losses in pruned}) == 1 and len({losses[-1] for losses in pruned}) == len(pruned)

    capsys.readouterr()
    experiment.main()  # everything is there
    assert "seed 0:" not in capsys.readouterr().out

    monkeypatch.setattr(experiment, "train", lambda *arguments: pytest.fail("trained"))
    other = ["--dataset", "digits", "--model", "mlp", "--epochs", "5", "--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["selection.py", *other])
    with pytest.raises(SystemExit, match=r"epochs is 4 in .*-s0\.json, but 5 in what is asked for: name another"):
        experiment.main()
    run = json.loads((tmp_path / "EL2N-s0.json").read_text())
    older = {key: value for key, value in run["config"].items() if key != "mixup"}  # of before there was this

    def show(**changes):
        config = {**older, "seed": 7, "device": "cuda", **changes}
        (tmp_path / "EL2N-s7.json").write_text(json.dumps({**run, "config": config}))
        experiment.show(tmp_path, "digits")

    show()
    shown = (tmp_path / "selection.json").read_bytes()
    for key, value in (("lr", 0.5), ("prune_ratio", 0.3), ("mixup", 0.2)):
        with pytest.raises(SystemExit, match=rf"{key} is {value} in .*EL2N-s7\.json, but [0-9.]+ in .*-s0\.json"):
            show(**{key: value})
    assert (tmp_path / "selection.json").read_bytes() == shown


def test_the_network_without_spikes_trains(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the digits data set is scikit-learn's")
    monkeypatch.syspath_prepend(SCRIPTS)
    experiment = load("analogue")
    monkeypatch.setattr(experiment.torch.cuda, "is_available", lambda: False)
    neuron = experiment.plain.lif
    arguments = ["--dataset", "digits", "--model", "conv", "--epochs", "3", "--seeds", "0,1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["analogue.py", *arguments])
    experiment.main()
    assert experiment.plain.lif is neuron
    run = json.loads((tmp_path / "analogue-s1.json").read_text())
    assert run["config"]["time_steps"] == 1 and run["config"]["prune_ratio"] == 0
    assert run["losses"][-1] < run["losses"][0] and run["test_accuracy"] > 0.9
    assert "2 seeds: " in capsys.readouterr().out

    monkeypatch.setattr(experiment, "train", lambda *arguments: pytest.fail("trained"))
    run["config"]["device"] = "cuda"
    del run["config"]["mixup"]  # of before there was this
    (tmp_path / "analogue-s1.json").write_text(json.dumps(run))
    experiment.main()
    monkeypatch.setattr("sys.argv", ["analogue.py", *arguments, "--epochs", "4", "--seeds", "2,1"])
    with pytest.raises(SystemExit, match=r"epochs is 3 in .*analogue-s1\.json, but 4 in what is asked for"):
        experiment.main()


def test_cifar_becomes_small_enough_for_a_cpu(tmp_path, monkeypatch):
    experiment = load("small_cifar")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels, channels = torch.arange(6), torch.ones(3)
    cifar = data.Dataset("CIFAR-10", images, labels, images[:4], labels[:4], 10, channels, channels, True)
    monkeypatch.setattr(experiment, "load", lambda name, folder: cifar)
    file = tmp_path / "small.npz"
    arguments = ["small_cifar.py", "--data-dir", "anywhere", "--out", str(file), "--examples", "5"]
    monkeypatch.setattr("sys.argv", arguments)
    experiment.main()
    small = data.load("npz", file)
    assert small.train_images.shape == (5, 3, 16, 16) and small.test_images.shape == (4, 3, 16, 16)
    assert small.train_labels.tolist() == list(range(5))
    mean = images[0, 1, 2:4, 6:8].float().mean()
    assert abs(small.train_images[0, 1, 1, 3] - mean) <= 0.5
    with pytest.raises(SystemExit):
        experiment.main()  # nothing is overwritten
    before, bare = file.read_bytes(), tmp_path / "small"
    monkeypatch.setattr("sys.argv", [*arguments[:4], str(bare), "--examples", "4"])
    experiment.main()
    assert file.read_bytes() == before and data.load("npz", bare).train_images.shape == (4, 3, 16, 16)


def test_results_of_several_folders_are_joined(tmp_path, monkeypatch, capsys):
    experiment = load("joined")
    whole = json.loads((SCRIPTS.parent / "results" / "2026-11-28-h200-cifar10-150" / "accuracy.json").read_text())
    ratios = sorted(row["time_ratio"] for row in whole["accuracies"])
    parts = []
    for part in ("random", "rest"):
        rows = [row for row in whole["accuracies"] if (row["method"] == "random") == (part == "random")]
        lists = {key: list(dict.fromkeys(row[key[:-1]] for row in rows)) for key in ("methods", "ratios", "seeds")}
        lists["ratios"] = [ratio for ratio in lists["ratios"] if ratio > 0]
        result = {**whole, "settings": {**whole["settings"], **lists}, "accuracies": rows}
        for row in rows if part == "random" else []:  # without full data there is nothing to compare its time with
            row["time_ratio"] = None
        result["missing_runs"] = [f"{row['method']}, r = {row['ratio']:g}, seed {row['seed']}" for row in rows[:1]]
        parts.append(tmp_path / part)
        parts[-1].mkdir()
        (parts[-1] / "accuracy.json").write_text(json.dumps(result))

    monkeypatch.setattr("sys.argv", ["joined.py", str(tmp_path / "out"), *map(str, parts[::-1])])
    experiment.main()
    joined = json.loads((tmp_path / "out" / "accuracy.json").read_text())

    def cells(result):
        return sorted((row["method"], row["ratio"], row["seed"], row["test_accuracy"]) for row in result["accuracies"])

    assert sorted(row["time_ratio"] for row in joined["accuracies"]) == pytest.approx(ratios)
    assert cells(joined) == cells(whole) and (tmp_path / "out" / "accuracy.png").exists()
    assert joined["settings"]["base"] == whole["settings"]["base"]
    assert joined["missing_runs"] == [] and joined["environments"] == whole["environments"]
    assert sorted(joined["settings"]["methods"]) == sorted(whole["settings"]["methods"])
    assert joined["settings"]["ratios"] == whole["settings"]["ratios"] and "91.34 ± 0.18" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="is there already"):
        experiment.main()
    monkeypatch.setattr("sys.argv", ["joined.py", str(tmp_path / "twice"), str(parts[0]), str(parts[0])])
    with pytest.raises(SystemExit, match="seed 0 is in more than one of the studies"):
        experiment.main()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "accuracy.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["joined.py", str(tmp_path / "none"), str(parts[0]), str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match=r"nothing was joined: .*empty/accuracy\.json lacks 'settings'.*: check"):
        experiment.main()
    other = SCRIPTS.parent / "results" / "2026-11-22-h200-cifar10"
    monkeypatch.setattr("sys.argv", ["joined.py", str(tmp_path / "unlike"), str(parts[0]), str(other)])
    with pytest.raises(SystemExit, match="differ in more than methods"):
        experiment.main()
    assert not (tmp_path / "unlike").exists()
    mixed = json.loads((parts[0] / "accuracy.json").read_text())
    for known in ({"labels": "0123456789"}, {"labels": "0123456789", "train_examples": 1}):  # the first: newer
        (parts[0] / "accuracy.json").write_text(json.dumps({**mixed, "data_set": {**mixed["data_set"], **known}}))
        monkeypatch.setattr("sys.argv", ["joined.py", str(tmp_path / str(len(known))), *map(str, parts)])
        if "train_examples" in known:
            with pytest.raises(SystemExit, match=r"different data sets \(name .*, train examples 1, labels 01.*; name"):
                experiment.main()
        else:
            experiment.main()
            joined = json.loads((tmp_path / "1" / "accuracy.json").read_text())
            assert joined["data_set"] == {**mixed["data_set"], **known}
    mixed["settings"]["base"]["mixup"] = 0.2
    (parts[0] / "accuracy.json").write_text(json.dumps(mixed))
    monkeypatch.setattr("sys.argv", ["joined.py", str(tmp_path / "mixed"), *map(str, parts)])
    with pytest.raises(SystemExit, match="differ in more than methods"):
        experiment.main()


def test_methods_are_compared_by_pairs_of_all_studies(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    experiment = load("paired")
    rows = [
        {"method": method, "ratio": ratio, "seed": seed, "test_accuracy": accuracy}
        for method, ratio, seed, accuracy in (
            *(("sadp", 0.5, 0, 0.91), ("random", 0.5, 0, 0.90), ("sadp", 0.5, 1, 0.92), ("random", 0.5, 1, 0.89)),
            *(("sadp", 0.7, 0, 0.80), ("random", 0.7, 0, 0.81), ("sadp", 0.7, 1, 0.99), ("full", 0.0, 0, 0.95)),
        )
    ]
    folders = []
    for name, part in (("first", rows[:2]), ("second", rows[2:])):  # seed 1 of another study
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "accuracy.json").write_text(json.dumps({"accuracies": part}))
    monkeypatch.setattr("sys.argv", ["paired.py", "sadp", "random", *map(str, folders)])
    experiment.main()
    assert capsys.readouterr().out.splitlines() == [
        "sadp minus random, points",
        "r = 0.5: +2.00 ± 1.00 (standard error), better in 2 of 2 pairs",
        "r = 0.7: -1.00 ± nan (standard error), better in 0 of 1 pairs",
        "all: +1.00 ± 1.15 (standard error), better in 2 of 3 pairs",
    ]
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "accuracy.json").write_text(json.dumps({"accuracies": rows[2:4]}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "accuracy.json").write_text("{}")
    for folder, message in (
        ("copy", r"sadp at r = 0\.5 with seed 1 is the same run in .*second and in .*copy: leave one of them out"),
        ("empty", r"empty/accuracy\.json lacks 'accuracies', which the study accuracy writes: check the folder"),
    ):
        monkeypatch.setattr("sys.argv", ["paired.py", "sadp", "random", *map(str, folders), str(tmp_path / folder)])
        with pytest.raises(SystemExit, match=message):
            experiment.main()
    for row in rows[2:4]:
        row["test_accuracy"] += 0.001  # made again: another run
    (tmp_path / "copy" / "accuracy.json").write_text(
        json.dumps({"accuracies": [*rows[2:4], rows[5]]})
    )  # one of no pair
    monkeypatch.setattr("sys.argv", ["paired.py", "sadp", "random", *map(str, folders), str(tmp_path / "copy")])
    experiment.main()
    capsys.readouterr()
    for wrong, message in (("loss", "no folder has runs of loss and of random"), ("sadp", "No such file")):
        where = folders if wrong == "loss" else [tmp_path]
        monkeypatch.setattr("sys.argv", ["paired.py", wrong, "random", *map(str, where)])
        with pytest.raises(SystemExit, match=message):
            experiment.main()
