"""The experiments that docs/findings.md tells of still run."""

import importlib.util
import json
from pathlib import Path

import pytest

from sadp_fast import pruner

SCRIPTS = Path(__file__).parents[1] / "docs" / "experiments"


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_experiment", SCRIPTS / f"{name}.py")
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    return experiment


def test_every_way_to_select_trains_and_is_shown(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the digits data set is scikit-learn's")
    experiment = load("selection")
    monkeypatch.setattr(experiment.torch.cuda, "is_available", lambda: False)
    score = pruner.spike_aware_score
    arguments = ["--dataset", "digits", "--model", "mlp", "--epochs", "4", "--seeds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["selection.py", *arguments])
    experiment.main()
    assert pruner.spike_aware_score is score
    runs = json.loads((tmp_path / "selection.json").read_text())["runs"]
    assert {run["name"] for run in runs} == set(experiment.ways(4)) and (tmp_path / "selection.png").exists()
    # The same first epoch, on all data, for all that score: after it, what is drawn differs, and so do the losses.
    pruned = [run["losses"] for run in runs if run["config"]["method"] == "sadp"]
    assert len({losses[0] for losses in pruned}) == 1 and len({losses[-1] for losses in pruned}) == len(pruned)

    capsys.readouterr()
    experiment.main()  # everything is there
    assert "seed 0:" not in capsys.readouterr().out


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
