"""Settings as fields that carry their options, and registries whose records are whole."""

import argparse
from dataclasses import MISSING, dataclass, fields

import pytest

from sadp_fast.lab import data, loggers, models
from sadp_fast.lab.methods import METHODS, Method
from sadp_fast.lab.registry import by_name
from sadp_fast.lab.setting_fields import SettingError, add_options, number, reader, setting
from sadp_fast.lab.settings import SETTINGS, TrainConfig
from sadp_fast.prune.settings import Settings


@dataclass(frozen=True)
class Example:
    share: float = setting(0.5, "how much", range=(lambda value: 0 <= value <= 1, "between 0 and 1"), metavar="S")
    many: int | None = setting(None, "how many", read=number(int, lambda value: value > 0, "above 0"), shown="all")
    kind: str = setting("a", "which", choices=("a", "b"), metavar="KIND")
    fast: bool = setting(False, "soon")
    silent: int = 3  # no option's


def test_options_are_made_of_fields(capsys):
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_options(parser, Example)
    assert vars(parser.parse_args([])) == {}  # what is not given stays out
    given = parser.parse_args(["--share", "0.25", "--many", "2", "--kind", "b", "--fast"])
    assert Example(**vars(given)) == Example(0.25, 2, "b", True)
    with pytest.raises(SystemExit):
        parser.parse_args(["--share", "2"])
    assert "argument --share: '2' is not between 0 and 1" in capsys.readouterr().err
    text = " ".join(parser.format_help().split())
    for part in ("how much (default: 0.5)", "how many (default: all)", "which: a, b (default: a)", "--fast soon"):
        assert part in text
    assert "silent" not in text


def test_readers_are_made_of_fields():
    read = {each.name: reader(each) for each in fields(Example)}
    assert (read["share"]("1"), read["many"]("7"), read["kind"]("b"), read["fast"]("true")) == (1.0, 7, "b", True)
    for name, text in (("share", "-1"), ("many", "0"), ("kind", "c"), ("fast", "1")):
        with pytest.raises(SettingError, match=f"'{text}' is not"):
            read[name](text)


def test_pruning_is_spelt_once():
    """The command's settings have all of SADP's, with the same defaults."""
    config, pruning = TrainConfig(), Settings()
    assert config.pruning() == pruning
    for each in fields(Settings):
        assert getattr(config, each.name) == getattr(pruning, each.name)
        assert each.name in SETTINGS or each.name in ("prune_ratio", "seed")
    assert TrainConfig(score="grad_norm").pruning().score == "given"
    with pytest.raises(ValueError, match="score_momentum"):
        TrainConfig(score_momentum=1.0).pruning()


def test_every_setting_but_the_method_has_an_option():
    assert [each.name for each in fields(TrainConfig) if "help" not in each.metadata] == ["method"]
    assert all(each.default is not MISSING for each in fields(TrainConfig))


def test_records_are_whole_and_have_names_of_their_own():
    with pytest.raises(TypeError, match="colour"):
        Method(name="new", label="new", marker="o", settings={})
    with pytest.raises(ValueError, match="two records have one name among sadp, sadp"):
        by_name(METHODS["sadp"], METHODS["sadp"])
    for registry in (METHODS, data.DATASETS, models.MODELS, loggers.LOGGERS):
        assert all(record.name == name for name, record in registry.items())
    assert tuple(models.MODELS) == models.NAMES
    for method in METHODS.values():  # what it changes are settings
        TrainConfig().of(method.name).pruning()


def test_loggers_that_are_not_installed_are_left_out(tmp_path, monkeypatch):
    opened = []

    def present(folder):
        opened.append(folder)
        return loggers.Progress()

    records = by_name(loggers.Logger("here", "a", present), loggers.Logger("missing", "b", lambda folder: None))
    monkeypatch.setattr(loggers, "LOGGERS", records)
    assert len(loggers.open_loggers(tmp_path, "sadp")) == 1 and opened == [tmp_path / "a" / "sadp"]
