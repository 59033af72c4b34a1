"""README.md and docs/: short, their links lead somewhere, their commands exist, and their code runs."""

import argparse
import ast
import pkgutil
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sadp_fast
from sadp_fast.lab import cli

pytest.importorskip("markdown_it", reason="reads Markdown")
import count_words

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
LONG = {"docs/findings.md", "docs/studies.md", "docs/training-settings.md", "benchmarks/README.md"}  # sentences
EXTRAS = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2], re.M)

each = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def read(name):
    return count_words.read((ROOT / name).read_text())


def python(document):
    return [code for language, code in document.code if language == "python"]


def test_words_and_sentences_are_counted():
    document = count_words.read(
        "# A heading\n\nOne `sadp-fast` word. Two words, [here](there.md)? `Code` ends it.\n\n- an item\n\n"
        "| a | table |\n| --- | --- |\n| of | ![no](words.png) |\n\n    and code\n"
    )
    assert document.words == 2 + 3 + 3 + 3 + 2 and document.lengths == [3, 3, 3, 2]
    assert document.links == ["there.md", "words.png"] and document.code == [("", "and code\n")]


def test_the_readme_fits_on_the_first_screens():
    assert read("README.md").words <= 1500


@each
def test_sentences_are_short(path):
    document = read(path)
    if path.relative_to(ROOT).as_posix() not in LONG and document.sentences:
        assert statistics.median(document.lengths) <= 16
        assert max(document.lengths) <= 35, max(document.sentences, key=count_words.count)


@each
def test_links_lead_somewhere(path):
    gone = [
        link
        for link in read(path).links
        if not link.startswith(("http://", "https://")) and not (path.parent / link.partition("#")[0]).exists()
    ]
    assert not gone


def commands(document):
    """The lines of code blocks that are no Python, without comments; a line's commands apart."""
    blocks = [code for language, code in document.code if language != "python"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.partition("#")[0].split("&&") if part.strip()]


@each
def test_commands_exist(path):
    document = read(path)
    for command in commands(document):
        words = shlex.split(command.rstrip("& "))
        if words[0] == "sadp-fast":
            _check_options(words[1:])
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file() or (path.parent / words[1]).is_file(), command
        elif words[:2] == ["pip", "install"]:
            assert all(extra in EXTRAS for word in words for extra in re.findall(r"^\.\[(\w+)]$", word)), command
        else:
            assert words[0] == "pytest", command
            assert all((ROOT / word).exists() for word in words[1:] if word.endswith("/")), command


@each
def test_named_files_exist(path):
    names = re.findall(r"`((?:docs|benchmarks|tests|sadp_fast|csrc|\.ci)/[\w./]+)", path.read_text())
    assert [name for name in names if "NAME" not in name and not (ROOT / name).exists()] == []


@each
def test_named_modules_exist(path):
    for name in re.findall(r"`(sadp_fast(?:\.\w+)+)[`(]", path.read_text()):
        assert pkgutil.resolve_name(name) is not None


def _check_options(words):
    parser = cli._parser()
    for word in words:
        if word in _subcommands(parser):
            parser = _subcommands(parser)[word]
    known = parser._option_string_actions
    assert all(word.partition("=")[0] in known for word in words if word.startswith("--")), words


def _subcommands(parser):
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return actions[0].choices if actions else {}


@each
def test_python_parses(path):
    for code in python(read(path)):
        ast.parse(code)


class Rates(nn.Module):
    """The mean output over four time steps of a small network."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Identity(), sadp_fast.LIFNode(step_mode="m"), nn.Linear(16, 3))

    def forward(self, x):
        return self.layers(x.expand(4, *x.shape)).mean(0)


@pytest.fixture
def names():
    """What the examples take for granted."""
    torch.manual_seed(0)
    model, data = Rates(), TensorDataset(torch.randn(48, 8), torch.arange(48) % 3)
    return {
        "DataLoader": lambda data, **options: DataLoader(data, **{**options, "batch_size": 16, "num_workers": 0}),
        "SADP": sadp_fast.SADP,
        "criterion": nn.CrossEntropyLoss(),
        "e": 4,
        "model": model,
        "n": 48,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "reset_net": sadp_fast.reset,
        "sadp_fast": sadp_fast,
        "train_set": data,
    }


@pytest.mark.parametrize("name", ["README.md", "docs/loops.md"])
def test_the_four_lines_run(name, names):
    (code,) = [code for code in python(read(name)) if "# 4" in code]
    exec(code.replace("100", "4"), names)
    sadp = names["sadp"]
    assert sadp.epoch == 4 and sadp.progress == 1 and sadp.scores.isfinite().all() and names["loss"].isfinite()
    assert len([line for line in code.splitlines() if re.search(r"# \d", line)]) == 4


def test_before_and_after_differ_in_the_four_lines_and_imports():
    before, after = (code.splitlines() for code in python(read("README.md"))[:2])
    new = [line for line in after if line not in before]
    assert [line[-1] for line in new if re.search(r"  # \d$", line)] == ["1", "2", "3"]
    assert len([line for line in new if line and "import" not in line]) == 4


def test_scores_and_policies_of_ones_own(names):
    (code,) = [code for code in python(read("docs/method.md")) if "class Doubt" in code]
    exec(code, names)
    sadp = names["sadp"]
    assert sadp.settings.score.name == "doubt" and sadp.settings.policy.name == "cubed"
    for other in (code for code in python(read("docs/method.md")) if code.startswith("SADP(")):
        exec(other, names)


def test_recording(names, capsys):
    (code,) = [code for code in python(read("docs/neurons.md")) if "record(" in code]
    inner = names["model"].layers
    exec(code, {**names, "model": inner, "x": torch.randn(4, 5, 8), "y": torch.arange(5) % 3})
    assert "firing rate" in capsys.readouterr().out and not hasattr(inner[2].recorder, "begin")


def test_public_names_are_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [name for name in sadp_fast.__all__ if not re.search(rf"`{name}\b", text)] == []
