"""The studies: what they measure against its definition, and the command that runs, resumes, merges and shows them."""

import ast
import json
import math
import os
import re
import shutil
import threading
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sadp_fast import SADP, BatchNormLIF, inclusion_probabilities, models, reset
from sadp_fast.lab import cli, data, train
from sadp_fast.lab.settings import TrainConfig
from sadp_fast.lab.sources import sources
from sadp_fast.lab.study import command, plan, runs, timing, variance
from sadp_fast.lab.study import measure as measuring
from sadp_fast.lab.study.measure import EXACT, SCORES, measure, pearson, sparsity, spearman
from sadp_fast.lab.study.progress import Deadline, Display, OutOfTime
from sadp_fast.lab.study.registry import STUDIES, write_report
from sadp_fast.lab.study.store import Store, StudyError, training_identity
from sadp_fast.lab.study.study import title
from sadp_fast.statistics.exact_norms import gradient_norms

for package in ("sklearn", "scipy", "rich", "matplotlib"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SADP_DATA", raising=False)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of the module, so that the study that many tests read is made with it too: sums are the same to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ what is measured


def small_network(name, device="cpu"):
    torch.manual_seed(0)
    model = models.build(name, (1, 8, 8), 10, 3).to(device)
    x, y = torch.randn(96, 1, 8, 8, device=device), torch.arange(96, device=device) % 10
    model.train()
    with torch.no_grad():
        model(x)
    reset(model)
    return model, x, y


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_scores_are_those_that_training_takes(name, device):
    model, x, y = small_network(name, device)
    # In float64: batches of other sizes are summed in another order, and no neuron may fire in one of them alone.
    model, x = model.double().eval(), x.double()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    measured = measure(model, x, y, criterion)
    for score in ("all", "last", "loss", "el2n"):
        sadp = SADP(model, len(x), epochs=2, warmup_epochs=1, tail_epochs=0, prune_ratio=0.4, score=score)
        for index in sadp.batches(32):
            sadp.loss(criterion, model(x[index]), y[index]).backward()
            reset(model)
        torch.testing.assert_close(measured[score], sadp.scores, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(measured[EXACT], gradient_norms(model, x, y, criterion).float())
    weights = gradient_norms(model, x, y, criterion, weights_only=True)
    assert (measured["all"] >= weights * (1 - 1e-4)).all()
    assert measured.keys() == {*SCORES, EXACT}


def test_measuring_leaves_the_network_alone():
    model, x, y = small_network("conv")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    measure(model, x, y, nn.CrossEntropyLoss())
    sparsity(model, x)
    assert model.training and all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_score_without_the_spike_factor_ignores_the_input():
    """Of a linear network of one layer: |delta| against |delta| |x|."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4, bias=False)

        def forward(self, x):
            return self.layer(x)

    model, x, y = Linear(), torch.randn(20, 6), torch.arange(20) % 4
    values = measure(model, x, y, nn.CrossEntropyLoss())
    delta = (model(x).softmax(1) - nn.functional.one_hot(y, 4)).norm(dim=1)
    torch.testing.assert_close(values["delta"], delta)
    torch.testing.assert_close(values["all"], delta * x.norm(dim=1))
    torch.testing.assert_close(values[EXACT], delta * x.norm(dim=1))


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy(ties):
    from scipy import stats

    a = torch.randn(200, dtype=torch.float64)
    b = a + torch.randn(200, dtype=torch.float64)
    if ties:
        a, b = a.round(), b.round()
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert pearson(a, torch.ones(200)) is None and spearman(a, torch.ones(200)) is None
    assert pearson(a, torch.full((200,), math.nan)) is None and spearman(a, torch.full((200,), math.nan)) is None


def test_sparsity_counts_spikes_without_the_residual():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = BatchNormLIF(3), BatchNormLIF(3)

        def forward(self, x):
            spikes = self.first(x.transpose(0, 1))
            return self.second(spikes, spikes)

    model, x = Residual(), 3 * torch.randn(70, 2, 3)
    model.eval()
    first = model.first(x.transpose(0, 1))
    total = model.second(first, first)
    reset(model)
    # The second output holds the first one's spikes beside its own.
    expected = 1 - (total.sum() / (2 * first.numel())).item()
    assert sparsity(model, x) == pytest.approx(expected) and 0 < expected < 1


@pytest.mark.parametrize("policy", list(variance.POLICIES))
def test_variance_is_that_of_its_formula(policy):
    generator = torch.Generator().manual_seed(0)
    norm = torch.rand(300, generator=generator, dtype=torch.float64) ** 3
    score = norm * (0.5 + torch.rand(300, generator=generator, dtype=torch.float64))
    own = {"optimum": 0.0, "infobatch": 0.5, "epsilon_greedy": 0.1}.get(policy, 0.3)
    p = inclusion_probabilities(score, 150.0, smoothing=own, policy="mix" if policy == "optimum" else policy).double()
    expected = float((norm**2 * (1 / p - 1)).sum() / (norm**2 * (300 / 150 - 1)).sum())
    assert variance.estimator_variance(score, norm, 0.5, policy, 0.3) == pytest.approx(expected, rel=1e-5)
    least = variance.estimator_variance(norm, norm, 0.5, "optimum", 0.3)
    assert least < 1 and least <= variance.estimator_variance(norm, norm, 0.5, policy, 0.3) * (1 + 1e-6)


def test_every_shown_epoch_has_its_stale_scores():
    for epochs in (1, 2, 8, 60, 100):
        measured, shown = measuring.measured_epochs(epochs), measuring.shown_epochs(epochs)
        assert shown[-1] == epochs and set(shown) <= set(measured) and measured[0] == 1
        for epoch in shown:
            assert all(epoch - age in measured for age in measuring.AGES if epoch - age >= 1)


def test_overheads_add_up_to_the_time_ratio():
    parts = {
        "full_step": 2.0,
        "weighted_step": 2.5,
        "scored_step": 3.0,
        "selection": 10.0,
        "drawing": 20.0,
        "steps": 100,
    }
    shares = timing.shares(parts, 0.7)
    pruned_epoch = 30 * 3.0 + 10.0 + 20.0
    assert 0.3 + sum(shares.values()) == pytest.approx(pruned_epoch / 200.0)
    assert shares.keys() == timing.PARTS.keys()


def test_overheads_of_fewer_epochs_are_shares_of_a_full_training():
    parts = {"full_step": 2.0, "weighted_step": 2.5, "scored_step": 3.0, "selection": 10.0, "drawing": 20.0}
    made = plan.Plan(TrainConfig(), ("sadp", "sadp:epochs=15"), (0.7,), (0,), plan.Size(), None, Path("here"))
    file = {"timing": {**parts, "steps": 100}, "device": "CPU", "versions": {}, "data_set": {}}
    found = SimpleNamespace(
        plan=made, display=Display(None, 0), training=lambda *run: None, timing=lambda method, run: file
    )
    whole, half = STUDIES["time"].collect(found)["overheads"]
    assert half["method"] == "sadp:epochs=15"
    for part in timing.PARTS:
        assert half[part] == pytest.approx(whole[part] / 2) and whole[part] > 0


def test_parts_of_the_time_are_measured(device):
    config = TrainConfig(model="mlp", time_steps=2, epochs=4, batch_size=100, device=device)
    parts = timing.measure_parts(config.of("sadp"), data.load("digits"), steps=3)
    assert parts["steps"] == pytest.approx(14.37)
    assert all(parts[key] > 0 for key in ("full_step", "weighted_step", "scored_step", "drawing"))
    parts = timing.measure_parts(config.of("random"), data.load("digits"), steps=3)
    assert parts["scored_step"] == parts["weighted_step"]


def test_parts_of_epochs_of_one_batch():
    config = TrainConfig(model="mlp", time_steps=2, epochs=4, batch_size=600)
    assert timing.measure_parts(config.of("sadp"), data.load("digits"), steps=3)["scored_step"] > 0


# --------------------------------------------------------------------------------------------------- finished runs


def test_a_figures_head_names_what_is_no_default():
    result = {
        "settings": {"base": asdict(TrainConfig(cutout=8, weight_decay=0.0, augment="crop"))},
        "data_set": {"name": "digits"},
        "environments": [{"device": "A"}, {"device": "B"}, {"device": "A"}],
    }
    assert title(result) == "digits, conv, T = 4, weight decay 0, augmentation crop, cutout 8 pixels (A, B)"
    del result["settings"]["base"]["cutout"], result["settings"]["base"]["augment"]  # of before there were these
    result["settings"]["base"]["weight_decay"] = None
    assert title(result) == "digits, conv, T = 4 (A, B)"


def test_conditions_are_what_decides_a_result():
    base = TrainConfig()
    other = replace(base, policy="floor", smoothing=0.1, device="cuda:1")
    assert base.of("full").conditions() == other.of("full").conditions()
    assert base.of("random").conditions() == other.of("random").conditions()
    for changed in (base.of("sadp:smoothing=0.1"), base.of("full:epochs=9"), replace(base, seed=1, prune_ratio=0.0)):
        assert changed.conditions() != base.of(changed.method).conditions()
    assert base.of("random").conditions() != replace(base, prune_ratio=0.3).of("random").conditions()
    assert base.of("full:epochs=9").conditions() == replace(base, epochs=9).of("full").conditions()
    written = base.of("sadp:weights=none:tail_epochs=0:warmup_epochs=2")  # as the defaults are for 30 epochs
    assert written.conditions() == base.of("sadp").conditions()
    assert written.conditions() != replace(base, epochs=100).of("sadp").conditions() | {"epochs": 30}
    assert (
        base.of("infobatch").conditions()["weights"] == "sum" and base.of("infobatch").conditions()["tail_epochs"] == 4
    )


def test_runs_are_found_by_what_decides_them():
    """Not by their names, nor by how a default is written."""
    config = TrainConfig(epochs=40, lr=0.5).of("sadp")
    store = Store(Path("here"))
    store.produce("name", training_identity(config), "cpu", lambda folder: {"history": [1]})
    for asked in (config, replace(config, weights="none"), replace(config, warmup_epochs=2, tail_epochs=0)):
        for name in ("name", "another"):
            assert store.read(name, training_identity(asked), ("history",))["history"] == [1]
    changes = {"score_momentum": 0.5, "weight_decay": 0.0, "cutout": 4, "augment": "none", "mixup": 0.5, "lr": 0.1}
    for name, value in {**changes, "weights": "unbiased"}.items():
        other = replace(config, **{name: value})
        assert store.read("name", training_identity(other), ("history",)) is None


def test_a_run_is_found_again_and_damage_is_reported():
    store = Store(Path("here"))
    identity = {"kind": "test", "config": {"ratio": 0.3, "sizes": (1, 2)}}
    assert store.read("name", identity, ("value",)) is None
    made = store.produce("name", identity, "cpu", lambda folder: {"value": [1.5, None]})
    assert store.read("name", identity, ("value",)) == made and made["value"] == [1.5, None]
    assert store.read("name", {**identity, "kind": "other"}, ("value",)) is None
    path = store.path("name", identity)
    text = path.read_text()
    with pytest.raises(StudyError, match=r"is damaged \(it lacks 'history'\): delete it"):
        store.read("name", identity, ("history",))
    for damage in (text[:-20], "", "[]", text.replace("0.3", "0.4")):
        path.write_text(damage)
        with pytest.raises(StudyError, match=f"the run file {path} is damaged .*: delete it"):
            store.read("name", identity, ("value",))


# -------------------------------------------------------------------------------------------------------- the command

TINY = plan.Size(examples=32, thresholds=(0.5, 1.5), sparsity_epochs=1, timed_steps=2)
FAST = ["--device", "cpu", "--quick", "--time-steps", "2", "--epochs", "3", "--batch-size", "100", "--quiet"]
CELLS = ["--seeds", "0,1", "--ratios", "0.3", "--methods", "full,random,sadp"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(plan, "QUICK", TINY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_thread):
    """A folder in which `study all` has run."""
    folder = tmp_path_factory.mktemp("studies") / "all"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plan, "QUICK", TINY)
        assert cli.main(["study", "all", *FAST, *CELLS, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def no_training(monkeypatch):
    """Neither a training nor the data set is needed."""

    def refuse(*arguments, **options):
        raise AssertionError("nothing is to be trained here")

    monkeypatch.setattr(train, "run", refuse)
    monkeypatch.setattr(train, "Trainer", refuse)
    monkeypatch.setattr(runs, "load", refuse)


def finite(value):
    """No NaN or infinity anywhere: JSON has none."""
    json.dumps(value, allow_nan=False)
    return value


def test_all_writes_every_result_and_one_report(finished):
    names = {path.name for path in finished.iterdir()}
    plots = {"correlation.png", "variance.png", "convergence-r0.3.png", "accuracy.png", "time.png"}
    assert names == {"runs", "unfinished", "study.json", "report.md", *plots, *(f"{name}.json" for name in STUDIES)}
    assert not list((finished / "unfinished").iterdir())
    for plot in plots:
        assert (finished / plot).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    results = {name: finite(json.loads((finished / f"{name}.json").read_text())) for name in STUDIES}
    for result in results.values():
        assert result["settings"]["seeds"] == [0, 1] and result["missing_runs"] == []
        assert result["environments"][0]["versions"]["torch"] == torch.__version__
        assert result["data_set"] == data.load("digits").identity

    rows = results["correlation"]["over_training"]
    assert [(r["seed"], r["epoch"]) for r in rows] == [(s, e) for s in (0, 1) for e in (1, 2, 3)]
    assert all(r["pearson"]["all"] > 0.95 for r in rows if r["epoch"] == 3)
    by_sparsity = results["correlation"]["by_sparsity"]
    low, high = ([r["sparsity"] for r in by_sparsity if r["threshold"] == t] for t in TINY.thresholds)
    assert max(low) < min(high)

    rows = results["variance"]["variances"]
    assert {r["age"] for r in rows} == {0, 1}
    for row in rows:
        assert row["variance"]["mix"].keys() == {*SCORES, EXACT} and row["variance"].keys() == variance.POLICIES.keys()
        if row["age"] == 0:
            least = row["variance"]["optimum"][EXACT]
            everything = [v for scores in row["variance"].values() for v in scores.values() if v is not None]
            assert least < 1 and all(least <= v * (1 + 1e-4) for v in everything)

    cells = {("full", 0.0), ("random", 0.3), ("sadp", 0.3)}
    for name, key in (("convergence", "curves"), ("accuracy", "accuracies"), ("time", "time_ratios")):
        assert {(r["method"], r["ratio"], r["seed"]) for r in results[name][key]} == {
            (*cell, seed) for cell in cells for seed in (0, 1)
        }
    curves = results["convergence"]["curves"]
    for end in results["accuracy"]["accuracies"]:
        curve = [r for r in curves if all(r[key] == end[key] for key in ("method", "ratio", "seed"))]
        assert [r["epoch"] for r in curve] == [1, 2, 3]
        assert curve[-1]["test_accuracy"] == end["test_accuracy"]
        assert curve[-1]["seconds"] == pytest.approx(end["seconds"]) and curve[-1]["examples"] == end["examples"]
    full = [r["seconds"] for r in results["accuracy"]["accuracies"] if r["method"] == "full"]
    for row in results["time"]["time_ratios"]:
        assert row["time_ratio"] == pytest.approx(row["seconds"] / (sum(full) / 2))
        assert row["examples_share"] == pytest.approx(1 - row["ratio"], abs=0.05)

    report = (finished / "report.md").read_text()
    for text in ("CPU, 1 thread; sadp_fast", torch.__version__, "Seeds: 0, 1", "## Not comparable with the paper"):
        assert text in report
    for study in STUDIES.values():
        assert f"({study.name}.png)" in report or study.name == "convergence"
        assert f"**{study.question}**" in report
        assert len(study.reading) > 200 and f"How to read it: {study.reading}" in report
    assert all(f"({plot})" in report for plot in plots)


def test_runs_hold_what_they_were_and_where(finished):
    path = next(path for path in (finished / "runs").iterdir() if "-sadp-r0.3-s1-" in path.name)
    run = json.loads(path.read_text())
    assert run["identity"]["config"]["method"] == "sadp" and run["identity"]["config"]["epochs"] == 3
    assert run["device"].startswith("CPU") and run["versions"]["torch"] == torch.__version__
    assert [entry["epoch"] for entry in run["history"]] == [1, 2, 3]
    assert {"test_accuracy", "loss", "seconds", "examples_trained"} <= run["history"][0].keys()


def test_finished_runs_are_not_run_again(finished, no_training, capsys):
    before = {path: path.read_bytes() for path in (finished / "runs").iterdir()}
    table = json.loads((finished / "accuracy.json").read_text())
    assert cli.main(["study", "accuracy", "--resume", str(finished), "--device", "cpu"]) == 0
    assert "Test accuracy after the last epoch" in capsys.readouterr().out
    assert cli.main(["study", "time", "--out", str(finished), "--device", "cpu", "--quiet", "--epochs", "3"]) == 0
    assert {path: path.read_bytes() for path in (finished / "runs").iterdir()} == before
    assert json.loads((finished / "accuracy.json").read_text()) == table


def test_folders_of_two_machines_are_merged_by_copying(finished, no_training, capsys):
    for name, seed in (("one", 0), ("two", 1)):
        shutil.copytree(finished, name)
        for path in Path(name, "runs").iterdir():
            if f"-s{seed}-" not in path.name:
                path.unlink()
        settings = json.loads(Path(name, "study.json").read_text())
        Path(name, "study.json").write_text(json.dumps({**settings, "seeds": [seed]}))
    show = ["study", "accuracy", "--out", "one", "--device", "cpu", "--quiet"]
    assert cli.main(show) == 0
    assert {r["seed"] for r in json.loads(Path("one/accuracy.json").read_text())["accuracies"]} == {0}
    for path in Path("two/runs").iterdir():
        shutil.copy(path, "one/runs")
    assert cli.main(show) == 0
    merged, whole = (json.loads(Path(folder, "accuracy.json").read_text()) for folder in ("one", finished))
    assert merged == whole


def test_report_of_what_is_there(finished, no_training, capsys):
    shutil.copytree(finished, "some")
    for path in Path("some/runs").glob("*-full-*"):
        path.unlink()
    assert cli.main(["study", "all", "--out", "some", "--report-only", "--quiet", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "missing runs: full, r = 0, seed 0; full, r = 0, seed 1" in output
    assert "**Not complete.** Missing runs: full, r = 0, seed 0" in Path("some/report.md").read_text()
    assert {r["time_ratio"] for r in json.loads(Path("some/time.json").read_text())["time_ratios"]} == {None}
    shutil.rmtree("some/runs")
    assert cli.main(["study", "variance", "--out", "some", "--report-only", "--device", "cpu"]) == 2
    assert "some holds no finished run for the study variance" in capsys.readouterr().err


def test_as_many_examples_are_named_as_were_measured(finished, monkeypatch):
    from matplotlib.figure import Figure

    shutil.copytree(finished, "few")
    titles = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *arguments, **options: titles.append(self.get_suptitle()))
    for name in ("correlation", "variance"):
        result = json.loads(Path("few", f"{name}.json").read_text())
        for examples, shown in ((1437, 32), (20, 20)):
            result["data_set"]["train_examples"] = examples
            STUDIES[name].plots(result, Path("few"))
            assert f" of {shown} examples (" in titles[-1]
    report = write_report({"variance": result}, {"variance": []}, Path("few")).read_text()
    assert "| examples (measurements) | 20 |" in report


def edited(path, change):
    """The run file with something changed in it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_runs_of_other_data_are_refused(finished, monkeypatch, capsys):
    """Before anything is trained on them, and where two finished runs are shown together."""
    shutil.copytree(finished, "mixed")
    full = next(Path("mixed/runs").glob("*-full-r0-s1-*"))
    show = ["study", "accuracy", "--out", "mixed", "--device", "cpu", "--quiet"]
    labels = data.load("digits").identity["labels"]
    edited(full, lambda file: file["data_set"].pop("labels"))  # of before they were known
    assert cli.main(show) == 0
    assert json.loads(Path("mixed/accuracy.json").read_text())["data_set"]["labels"] == labels
    for key, value in (("labels", "0123456789"), ("name", "letters"), ("train_examples", 1436)):
        edited(full, lambda file, key=key, value=value: file["data_set"].update({key: value}))
        capsys.readouterr()
        assert cli.main([*show, "--report-only"]) == 2
        message = capsys.readouterr().err
        assert f"{key.replace('_', ' ')} {value}" in message and f"labels {labels}" in message
        assert "'full, r = 0, seed 0' of one" in message and "'full, r = 0, seed 1' of another" in message
        assert "keep those of each in a folder of their own" in message and message.count("\n") == 1
        edited(full, lambda file: file["data_set"].update(name="digits", train_examples=1437, labels=labels))

    next(Path("mixed/runs").glob("*-full-r0-s0-*")).unlink()
    edited(full, lambda file: file["data_set"].update(labels="0123456789"))
    with monkeypatch.context() as context:
        context.setattr(train, "run", lambda *arguments, **options: pytest.fail("trained"))
        assert cli.main(show) == 2
    message = capsys.readouterr().err
    assert f"the run file {full} is of another data set" in message and f"labels {labels}): check --data-dir" in message
    edited(full, lambda file: file["identity"]["config"].update(dataset="mnist"))  # of another study
    plan_of = plan.Plan(TrainConfig(), ("full",), (0.5,), (0,), plan.Size(), None, Path("mixed"))
    assert runs.Runs(plan_of, Display(None, 0)).data.name == "digits"


def interrupted(arguments, monkeypatch):
    """The command's exit code where Ctrl-C comes behind the checkpoint of a run's second epoch."""
    saved = train.Trainer.save

    def save(self, path):
        saved(self, path)
        if len(self.history) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(train.Trainer, "save", save)
        return cli.main(arguments)


@pytest.mark.parametrize(("study", "method"), [("accuracy", "sadp"), ("variance", "scores")])
@pytest.mark.parametrize("begun_with", [["0123abcd", "89abcdef"], None])
def test_a_run_names_all_sources_that_trained_it(study, method, begun_with, monkeypatch):
    """None: by these sources alone."""
    arguments = [*FAST, "--seeds", "1", "--ratios", "0.3", "--methods", "sadp", "--out", "here"]
    assert interrupted(["study", study, *arguments], monkeypatch) == 130
    (checkpoint,) = Path("here/unfinished").glob("*/checkpoint.pt")
    state = torch.load(checkpoint, weights_only=True)
    if begun_with is None:
        assert state["sources"] == [sources()]
    else:
        torch.save({**state, "sources": begun_with}, checkpoint)
    monkeypatch.setattr(train, "prepare", lambda *arguments: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if begun_with else "error")
        assert cli.main(["study", study, *arguments]) == 0
    names = begun_with or []
    (path,) = (path for path in Path("here/runs").glob(f"*-{method}-*") if "threshold" not in path.name)
    run = json.loads(path.read_text())
    assert run["versions"]["sadp_fast"].split(", ", 1)[1] == f"sources {', then '.join([*names, sources()])}"
    assert "sources" not in run


def test_processes_share_the_work(finished, monkeypatch, capsys):
    """Another process is at full data of seed 0, and finishes it while this one has nothing else to do."""
    folder = Path("shared")
    shutil.copytree(finished, folder)
    one, two = sorted((folder / "runs").glob("*-full-r0-*"))
    text, order, waiting = one.read_text(), [], threading.Event()
    for path in (one, two):
        path.unlink()
    store, trained = Store(folder), train.run
    monkeypatch.setattr(
        train, "run", lambda config, *rest, **options: (order.append(config.seed), trained(config, *rest, **options))[1]
    )
    claim = Store.claim

    def watched(self, name, identity, wait):
        if wait:
            waiting.set()
        return claim(self, name, identity, wait)

    monkeypatch.setattr(Store, "claim", watched)

    def other():
        with claim(store, "digits-mlp-full-r0-s0", json.loads(text)["identity"], False) as mine:
            claimed.set()
            assert mine and waiting.wait(60)
            one.write_text(text)

    claimed, process = threading.Event(), threading.Thread(target=other)
    process.start()
    try:
        assert claimed.wait(60)
        assert cli.main(["study", "accuracy", "--out", str(folder), "--device", "cpu", "--quiet"]) == 0
    finally:
        waiting.set()
        process.join()
    assert order == [1] and one.read_text() == text
    assert "missing runs" not in capsys.readouterr().out
    rows, whole = (json.loads(Path(f, "accuracy.json").read_text())["accuracies"] for f in (folder, finished))
    assert [r["test_accuracy"] for r in rows] == [r["test_accuracy"] for r in whole]
    assert not list((folder / "unfinished").iterdir())


def test_a_claim_is_one_process_alone(tmp_path):
    """A holds it, B waits, A lets go without a result: C, that comes then, must not hold it beside B."""
    store, held, log = Store(tmp_path), threading.Event(), []

    def waits():
        with claim(store, "run", {}, True) as mine:
            log.append(mine)
            held.set()
            assert ended.wait(60)

    claim, ended, b = Store.claim, threading.Event(), threading.Thread(target=waits)
    lock = tmp_path / "unfinished" / f"{store.path('run', {}).stem}.lock"
    with claim(store, "run", {}, False) as a:
        assert a
        b.start()
        while len([fd for fd in Path("/proc/self/fd").iterdir() if _leads_to(fd, lock)]) < 2:
            time.sleep(0.01)
    assert held.wait(60) and log == [True]
    with claim(store, "run", {}, False) as c:
        assert not c
    ended.set()
    b.join()
    with claim(store, "run", {}, False) as d:
        assert d
    assert not list(lock.parent.iterdir())


def _leads_to(fd, path):
    try:
        return os.readlink(fd) == str(path)
    except OSError:
        return False


VARIED = ["--methods", "full,full:epochs=2,random,sadp,sadp:weights=unbiased:smoothing=0.1", "--ratios", "0.5"]


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """A folder with variants of methods; full data for half of the epochs."""
    folder = tmp_path_factory.mktemp("variants") / "here"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plan, "QUICK", TINY)
        arguments = [*FAST, "--epochs", "4"]  # the last one counts
        for study in ("accuracy", "convergence", "time"):
            assert cli.main(["study", study, *arguments, *VARIED, "--seeds", "0,1", "--out", str(folder)]) == 0
    return folder


def test_variants_stand_beside_the_methods(varied):
    results = {name: json.loads((varied / f"{name}.json").read_text()) for name in ("accuracy", "convergence", "time")}
    variant = "sadp:smoothing=0.1:weights=unbiased"
    assert results["accuracy"]["settings"]["methods"] == ["full", "full:epochs=2", "random", "sadp", variant]
    rows = results["accuracy"]["accuracies"]
    assert len(rows) == 10 and {(r["method"], r["ratio"]) for r in rows} >= {("full:epochs=2", 0.0), (variant, 0.5)}
    full = [r for r in rows if r["method"] == "full"]
    for row in rows:
        share = 1.0 if row["method"] == "full" else 0.5
        assert row["planned_share"] == share and row["examples_share"] == pytest.approx(share, abs=0.04)
        assert row["examples"] == pytest.approx(row["examples_share"] * 4 * 1437)
        assert row["time_ratio"] == pytest.approx(row["seconds"] / (sum(r["seconds"] for r in full) / 2))
    half = [r for r in rows if r["method"] == "full:epochs=2"]
    assert [r["examples_share"] for r in half] == [0.5, 0.5] and max(r["time_ratio"] for r in half) < 1
    times = {(r["method"], r["seed"]): r for r in results["time"]["time_ratios"]}
    assert all(times[r["method"], r["seed"]]["time_ratio"] == r["time_ratio"] for r in rows)
    assert {r["method"] for r in results["time"]["overheads"]} == {"random", "sadp", variant}
    curves = results["convergence"]["curves"]
    assert [r["epoch"] for r in curves if r["method"] == "full:epochs=2" and r["seed"] == 1] == [1, 2]
    assert all(0 < r["test_loss"] < 3 for r in curves)
    first = [next(r["test_loss"] for r in curves if r["method"] == m and r["seed"] == 0) for m in ("sadp", variant)]
    assert first[0] == pytest.approx(first[1])  # the first epoch is one of full data for both


def test_tables_and_plots_of_variants(varied, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *arguments, **options: figures.append(self))
    results = {name: json.loads((varied / f"{name}.json").read_text()) for name in ("accuracy", "convergence", "time")}
    names = [
        "full data",
        "full data, 2 epochs",
        "dynamic random",
        "SADP (all)",
        "SADP (all), smoothing 0.1, weights unbiased",
    ]
    for name, result in results.items():
        STUDIES[name].plots(result, varied)
        assert {row[0] for table in STUDIES[name].tables(result) for row in table.rows} == set(names)
        figure = figures[-1]
        texts = figure.legends[0].get_texts() if figure.legends else figure.axes[0].get_yticklabels()
        shown = [re.split(r":|  \(time", text.get_text())[0] for text in texts]
        assert [label for label in shown if not label.startswith("theoretical")] == names[name == "time" :]
    curves = [r for r in results["convergence"]["curves"] if r["method"] == "sadp"]
    losses = [sum(r["test_loss"] for r in curves if r["epoch"] == epoch) / 2 for epoch in (1, 2, 3, 4)]
    for panel in figures[1].axes[2:]:
        assert panel.get_ylabel() == "Test loss (log scale)"
        assert any(
            list(line.get_ydata()) == pytest.approx(losses) for line in panel.lines if len(line.get_ydata()) == 4
        )
    several = {**results["accuracy"], "settings": {**results["accuracy"]["settings"], "ratios": [0.5, 0.7]}}
    STUDIES["accuracy"].plots(several, varied)  # as if another ratio's runs were missing
    by_share, by_time = figures[-1].axes
    for panel, key in ((by_share, "planned_share"), (by_time, "time_ratio")):
        (line,) = [line for line in panel.lines if line.get_label() == names[1]]
        rows = [r for r in results["accuracy"]["accuracies"] if r["method"] == "full:epochs=2"]
        mean = sum(r[key] for r in rows) / 2
        assert line.get_xdata()[0] == pytest.approx(1 - mean if panel is by_share else mean, abs=0.03)
    untimed = [{**r, "time_ratio": None} for r in several["accuracies"] if r["method"] != "full"]
    STUDIES["accuracy"].plots({**several, "accuracies": untimed}, varied)  # without full data no panel over time
    (by_share,) = figures[-1].axes
    assert any(line.get_label() == names[2] for line in by_share.lines)
    (table,) = STUDIES["accuracy"].tables(results["accuracy"])
    row = dict(zip(table.headings, table.rows[[r[0] for r in table.rows].index(names[1])], strict=True))
    end = {(r["method"], r["seed"]): 100 * r["test_accuracy"] for r in results["accuracy"]["accuracies"]}
    gap = sum(end["full:epochs=2", s] - end["random", s] for s in (0, 1)) / 2  # as many examples
    assert float(row["to random"].split(" ")[0]) == pytest.approx(gap, abs=0.006)
    assert row["examples / full data"] == "0.500" and row["r"] == "0"


def test_copied_variants_are_found(varied, no_training, tmp_path):
    shutil.copytree(varied, "copy")
    settings = json.loads(Path("copy/study.json").read_text())
    Path("copy/study.json").write_text(json.dumps({**settings, "methods": ["full", "random"], "seeds": [0]}))
    assert cli.main(["study", "accuracy", "--out", "copy", "--device", "cpu", "--quiet"]) == 0
    found, whole = (json.loads(Path(folder, "accuracy.json").read_text()) for folder in ("copy", varied))
    assert found["settings"] == whole["settings"]
    key = lambda row: (row["method"], row["seed"])  # noqa: E731
    assert sorted(found["accuracies"], key=key) == sorted(whole["accuracies"], key=key)


@pytest.mark.parametrize(
    "variant",
    [
        *("full", "full:epochs=30", "sadp", "sadp:epochs=30", "sadp:policy=infobatch", "sadp:weights=unbiased"),
        *("infobatch:epochs=40", "random:epochs=30:tail_epochs=2", "sadp:epochs=30:warmup_epochs=3"),
    ],
)
def test_a_run_is_named_as_it_was_asked_for(variant):
    """What follows from other settings, as the warm-up from the epochs, is no setting of its own."""
    base = TrainConfig(epochs=60)
    ratio = 0.0 if variant.startswith("full") else 0.5
    assert plan.run_of(training_identity(base.of(variant)), base) == (variant, ratio, 0)


class Clock:
    """Time that passes only when told so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


def test_a_study_stops_in_time(monkeypatch, capsys):
    """Full data takes 10 s an epoch, so 30 s a run; random 21 s at r = 0.3."""
    clock, saved = Clock(monkeypatch), train.Trainer.save
    monkeypatch.setattr(train, "prepare", lambda *arguments: None)

    def save(self, path):
        if self.history:
            clock.now += 10 * (1 - self.history[-1]["ratio"])
        saved(self, path)

    monkeypatch.setattr(train.Trainer, "save", save)
    asked = ["--seeds", "0,1", "--ratios", "0.3", "--methods", "full,random", *FAST]

    def study(minutes):
        clock.now = 1.0
        code = cli.main(["study", "accuracy", *asked, "--out", "here", "--stop-after", str(minutes)])
        files = {
            folder: sorted("-".join(path.name.split("-")[2:-1]) for path in Path("here", folder).glob("*"))
            for folder in ("runs", "unfinished")
        }
        assert clock.now <= 1 + 60 * minutes
        return code, files["runs"], files["unfinished"]

    # After two epochs of full data 4 s are left: no time for a third, nor for one of another run.
    assert study(0.4) == (command.STOPPED, [], ["full-r0-s0"])
    output = capsys.readouterr()
    assert "accuracy: no finished run yet" in output.out
    assert output.err == (
        "sadp-fast: stopped by --stop-after, runs are missing; to go on: "
        "sadp-fast study accuracy --resume here --device cpu\n"
    )
    # The last epoch, then random with nothing to expect its time by; by it, full data would take longer than is left.
    assert study(0.7) == (command.STOPPED, ["full-r0-s0", "random-r0.3-s0"], [])
    # 50 s are enough for full data, but then not for random.
    assert study(50 / 60) == (command.STOPPED, ["full-r0-s0", "full-r0-s1", "random-r0.3-s0"], [])
    assert "missing runs: random, r = 0.3, seed 1\n" in capsys.readouterr().out
    # What was begun goes on even so, by an epoch of 10 s.
    base = TrainConfig(**json.loads(Path("here/study.json").read_text())["base"])
    identity = training_identity(replace(base, prune_ratio=0.3, seed=1).of("random"))
    Store(Path("here")).unfinished("digits-mlp-random-r0.3-s1", identity).mkdir(parents=True)
    assert study(15 / 60)[::2] == (command.STOPPED, ["random-r0.3-s1"]) and clock.now == 11.0
    assert study(0.36)[0] == 0 and clock.now == pytest.approx(12.0)
    lengths = {len(json.loads(path.read_text())["history"]) for path in Path("here/runs").iterdir()}
    assert lengths == {3} and study(0.01)[0] == 0


def test_a_deadline(monkeypatch):
    clock = Clock(monkeypatch)
    never, soon = Deadline(), Deadline(1.0)
    assert never.allows(1e9) and not never.reached
    assert soon.allows(60.0) and not soon.reached
    clock.now = 4.0
    watch = soon.watch(9)
    watch.step(1, 0.1, 0, None, 1.0)
    clock.now = 22.0
    watch.epoch({"epoch": 1})
    assert soon.longest_epoch == 18.0
    clock.now = 39.0
    watch.epoch({"epoch": 2})
    clock.now = 43.0
    watch.epoch({"epoch": 3})
    assert soon.longest_epoch == 18.0 and not soon.reached
    clock.now = 52.0
    with pytest.raises(OutOfTime):  # the last epoch took 9 s, and 8 are left
        watch.epoch({"epoch": 4})
    assert soon.reached and not soon.allows(9.0) and soon.allows(8.0)
    soon.watch(1).epoch({"epoch": 1})  # the last epoch: there is nothing to stop


def test_time_of_a_run_is_expected_from_those_like_it(monkeypatch):
    clock, store, base = Clock(monkeypatch), Store(Path("here")), TrainConfig(epochs=4)

    def identity(method, seed=0, ratio=0.5, epochs=4):
        return training_identity(replace(base, seed=seed, prune_ratio=ratio, epochs=epochs).of(method))

    def produce(which, seconds):
        def run(folder):
            clock.now += seconds
            return {}

        store.produce("name", which, "cpu", run)

    assert store.expected_seconds(identity("full"), "cpu") is None
    produce(identity("full"), 8.0)
    produce(identity("sadp"), 5.0)
    assert store.expected_seconds(identity("full", seed=1), "cpu") == 8.0
    assert store.expected_seconds(identity("sadp", seed=1), "cpu") == 5.0
    assert store.expected_seconds(identity("sadp:lr=1", ratio=0.75), "cpu") == 2.5  # by the slowest, of half the work
    assert store.expected_seconds(identity("full:epochs=8"), "cpu") == 20.0
    assert store.expected_seconds({**identity("full"), "kind": "timing"}, "cpu") is None
    store.unfinished("name", identity("loss")).mkdir(parents=True)
    produce(identity("loss"), 0.5)  # the rest of a run: its time says nothing
    assert store.expected_seconds(identity("loss", seed=1), "cpu") == 5.0


def without_seconds(history):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


@pytest.mark.parametrize(("study", "method"), [("accuracy", "sadp"), ("variance", "scores")])
def test_interrupted_study_goes_on_where_it_was(study, method, finished, monkeypatch, capsys):
    arguments = [*FAST[:-1], "--seeds", "1", "--ratios", "0.3", "--methods", "sadp", "--out", "cut short"]
    assert interrupted(["study", study, *arguments], monkeypatch) == 130
    assert capsys.readouterr().err == (
        f"sadp-fast: interrupted; to go on: sadp-fast study {study} --resume 'cut short' --device cpu\n"
    )
    assert len(list(Path("cut short/unfinished").iterdir())) == 1 and not Path("cut short/runs").exists()
    epochs = []
    taken = train.Trainer.step
    monkeypatch.setattr(train.Trainer, "step", lambda self, *a: (epochs.append(self.sadp.epoch), taken(self, *a))[1])
    monkeypatch.setattr(train, "prepare", lambda *arguments: None)
    assert cli.main(["study", study, "--resume", "cut short", "--device", "cpu"]) == 0
    assert set(epochs) == {2}  # of three epochs
    pattern = f"*-{method}*-s1-*.json"
    (again,), (whole,) = (
        [json.loads(path.read_text()) for path in Path(folder, "runs").glob(pattern) if "threshold" not in path.name]
        for folder in ("cut short", finished)
    )
    assert again["identity"] == whole["identity"]
    if study == "accuracy":
        assert without_seconds(again["history"]) == without_seconds(whole["history"])
    else:
        assert again["snapshots"] == whole["snapshots"]


def test_progress_names_every_run(capsys):
    assert cli.main(["study", "accuracy", *FAST[:-1], "--seeds", "3", "--ratios", "0.3", "--methods", "random"]) == 0
    output = capsys.readouterr().out
    assert "digits, mlp, T = 2, 3 epochs; methods random; ratios 0.3; seeds 3; CPU, 1 thread; runs/study-" in output
    assert re.search(r"digits-mlp-random-r0.3-s3: epoch 3/3, loss .*, accuracy .*%", output)
    assert re.search(r"1/1 digits-mlp-random-r0.3-s3: done, accuracy .*%", output)
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"study-digits-mlp-\d{8}-\d{6}", folder.name)


def test_bars_in_a_terminal(monkeypatch):
    """Every epoch is shown, also between two refreshes of the bars."""
    import io

    from rich.console import Console
    from rich.progress import Progress

    class Seldom(Progress):
        def __init__(self, *columns, **options):
            super().__init__(*columns, refresh_per_second=0.01, **options)

    monkeypatch.setattr("rich.progress.Progress", Seldom)
    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=screen, force_terminal=True, width=140))
    assert cli.main(["study", "accuracy", *FAST[:-1], "--seeds", "3", "--ratios", "0.3", "--methods", "random"]) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"all runs .*1/1", text) and re.search(
        r"random-r0.3-s3 .*loss +\d\.\d{3} accuracy +\d+\.\d%", text
    )


def test_ratios_are_checked_for_studies_that_train_them(capsys):
    asked = [*FAST, "--seeds", "0", "--ratios", "0.9", "--methods", "sadp", "--out", "here"]
    for study in ("correlation", "variance"):
        assert cli.main(["study", study, *asked]) == 0
    for study in ("convergence", "accuracy", "time", "all"):
        capsys.readouterr()
        assert cli.main(["study", study, *asked]) == 2
        assert "sadp: prune ratio 0.9 over 3 epochs needs" in capsys.readouterr().err


def test_a_study_that_another_process_begins_meanwhile_is_found(monkeypatch):
    """It writes study.json after this one has looked for it, and before this one lists the folder."""
    began, listed = plan.Plan(TrainConfig(), ("full",), (0.5,), (0,), plan.Size(), None, Path("here")), Path.iterdir
    Path("here").mkdir()

    def iterdir(self):
        monkeypatch.setattr(Path, "iterdir", listed)
        plan.remember(began)
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert plan.remembered(Path("here"))["methods"] == ["full"]


ERRORS = [
    (["nothing"], "invalid choice: 'nothing'"),
    (["all", "--ratios", "0.3,1"], "'1' is not above 0 and below 1"),
    (["all", "--ratios", "half"], "'half' is not above 0 and below 1"),
    (["all", "--seeds", "1,-2"], "'-2' is not a whole number of at least 0"),
    (["all", "--seeds", "1,1"], "'1,1' names something twice"),
    (["all", "--methods", "full,best"], "'best' is not one of full,"),
    (
        ["all", "--methods", "full,sadp:lr=high"],
        "'high' is not a number above 0, at most 1000, which lr in 'sadp:lr=high'",
    ),
    (["all", "--methods", "full:epochs=3,full:epochs=03"], "names something twice"),
    (["all", "--stop-after", "0"], "--stop-after: '0' is not a number above 0"),
    (["accuracy", "--methods", "sadp:epochs=2", "--out", "new"], "sadp:epochs=2: prune ratio 0.5 over 2 epochs needs"),
    (["all", "--methods", "full,random:batch_size=5000", "--out", "new"], "the batch size 5000 is above"),
    (
        ["all", "--methods", "full,sadp:cutout=4", "--out", "new"],
        "sadp:cutout=4: cutout is 4, but examples of digits",
    ),
    (["all", "--cutout", "4", "--out", "new"], "cutout is 4, but examples of digits"),
    (["all", "--out", "study", "--methods", "full:cutout=4"], "full:cutout=4: cutout is 4, but examples of digits"),
    (["all", "--report-only"], "--report-only needs the folder of a study"),
    (["all", "--report-only", "--out", "new"], "new holds no study to report: check --out"),
    (["all", "--report-only", "--out", "full_folder"], "full_folder holds no study to report: check --out"),
    (["all", "--report-only", "--resume", "new"], "new holds no study to report: check --resume"),
    (["all", "--resume", "nowhere"], "nowhere holds no study to resume"),
    (["all", "--out", "full_folder"], "full_folder is not empty and holds no study"),
    (["all", "--out", "a_file"], "a_file is a file"),
    (["all", "--out", "a", "--resume", "b"], "a and b both name the study's folder"),
    (["all", "--out", "damaged"], "damaged/study.json is damaged"),
    (["all", "--out", "study", "--lr", "0.5"], "--lr is 0.5, but the study in study has 0.002"),
    (["all", "--out", "study", "--quick"], "the study in study is not a quick one"),
    (["all", "--data-dir", "x"], "digits needs no files"),
    (["all", "--dataset", "mnist"], "give --data-dir or set SADP_DATA"),
    (["all", "--device", "tpu"], "--device 'tpu'"),
    (["accuracy", "--batch-size", "5000", "--out", "new"], "the batch size 5000 is above"),
    (["all", "--out", "study", "--policy", "floor"], "--policy is floor, but the study in study has mix"),
    (["all", "--split-by", "time"], "--split-by is for"),
    (["accuracy", "--ratios", "0.3,0.9", "--epochs", "5", "--out", "new"], "prune ratio 0.9 over 5 epochs needs"),
    (
        ["all", "--methods", "full,infobatch", "--ratios", "0.85", "--epochs", "16", "--out", "new"],
        "infobatch: prune ratio 0.85 over 16 epochs needs 1.046 in each of the 13 epochs",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(arguments) for arguments, _ in ERRORS])
def test_errors_are_one_line(arguments, message, capsys):
    Path("full_folder").mkdir()
    Path("full_folder/precious.txt").write_text("precious")
    Path("a_file").write_text("precious")
    Path("damaged").mkdir()
    Path("damaged/study.json").write_text('{"base": {')
    Path("study").mkdir()
    plan.remember(plan.Plan(TrainConfig(), ("full",), (0.5,), (0,), plan.Size(), None, Path("study")))
    begun = Path("study/study.json").read_text()
    given = arguments if "--device" in arguments else [*arguments, "--device", "cpu"]
    assert cli.main(["study", *given, "--quiet"]) == 2
    output = capsys.readouterr()
    assert re.fullmatch(r"sadp-fast: error: [^\n]+\n", output.err) and message in output.err and output.out == ""
    assert not Path("new").exists() and not Path("runs").exists() and Path("study/study.json").read_text() == begun


def test_the_documented_script_runs(capsys):
    text = (Path(__file__).parents[2] / "docs/studies.md").read_text()
    (script,) = re.findall(r"## In a script\n.*?```python\n(.*?)```", text, re.DOTALL)
    exec(compile(script, "docs/studies.md", "exec"), {})
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["method"], row["ratio"]) for row in printed] == [("full", 0.0), ("sadp", 0.5)]


def test_help_names_every_study_and_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["study", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in (*STUDIES, "all"):
        assert name in text
    for option in ("methods", "ratios", "seeds", "quick", "report-only", "dataset", "data-dir", "model", "epochs"):
        assert f"--{option}" in text
