"""All studies, in the order in which a report shows them, and that report: one Markdown file for a folder."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from ..figures import Table
from ..registry import by_name
from . import accuracy, convergence, correlation, timing, variance
from .study import Result, Study, each_once, measured_examples

STUDIES = by_name(
    Study("correlation", "Fig. 1a and 4", correlation),
    Study("variance", "Fig. 1b and 5", variance),
    Study("convergence", "Fig. 1c", convergence),
    Study("accuracy", "Fig. 1d", accuracy),
    Study("time", "Fig. 3", timing),
)

NOT_COMPARABLE = (
    "The paper's code was not published. The score's exact form, the schedule of ratios, how small probabilities are "
    "raised and how scores age are this project's own; only the estimator, its optimal probabilities, the idea of the "
    "score and the smoothing constant 0.3 are the paper's.",
    "The paper weights losses so that the gradient stays unbiased; by default this project does not (see weights among "
    "the settings; None: none but for InfoBatch). Its estimator is the method sadp:weights=unbiased.",
    "Networks, training settings, time steps and data preparation are this project's (see the settings below), so "
    "accuracies compare with each other here, not with the paper's tables.",
    "Times are of this project's kernels on the devices named here; only ratios of times of one device are meaningful "
    "beside the paper's.",
    "Exact gradient norms are of a subset of the training examples, without augmentation and with frozen normalisation "
    "statistics; which statistics, how many examples and which parameters the paper's figures use is not public.",
    "How the paper varies sparsity is not public; here networks are trained with different firing thresholds.",
)


def write_report(results: dict[str, Result], plots: dict[str, list[tuple[Path, str]]], folder: Path) -> Path:
    """Write report.md, which refers to the plots beside it."""
    first = next(iter(results.values()))
    parts = [
        "# Studies of spike-aware data pruning",
        _conditions(first),
        *_environments(results),
        *chain.from_iterable(_shown(name, result, plots[name]) for name, result in results.items()),
        "## Not comparable with the paper",
        _list([*NOT_COMPARABLE, *_lossy(first["data_set"]["name"])]),
        "## Settings",
        _settings(first),
    ]
    path = folder / "report.md"
    path.write_text("\n\n".join(part.rstrip("\n") for part in parts) + "\n")
    return path


def _conditions(result: Result) -> str:
    settings, data_set = result["settings"], result["data_set"]
    return (
        f"{data_set['name']} ({data_set['train_examples']:,} training examples), {settings['base']['model']}, "
        f"T = {settings['base']['time_steps']}, {settings['base']['epochs']} epochs. "
        f"Methods: {', '.join(settings['methods'])}. Ratios: {', '.join(f'{r:g}' for r in settings['ratios'])}. "
        f"Seeds: {', '.join(map(str, settings['seeds']))}."
    )


def _environments(results: dict[str, Result]) -> list[str]:
    """Where the runs were made, what does not compare for it, and which ones are missing."""
    where = each_once(entry for result in results.values() for entry in result["environments"])
    versions = [", ".join(f"{name} {version or '-'}" for name, version in entry["versions"].items()) for entry in where]
    said = ["Ran on:", _list(f"{entry['device']}; {text}" for entry, text in zip(where, versions, strict=True))]
    if len({entry["device"] for entry in where}) > 1:
        said.append("The runs come from more than one kind of device: seconds compare within one of them only.")
    if len({entry["versions"]["sadp_fast"] for entry in where}) > 1:
        said.append("The runs come from different sources of this package: they may differ by more than the methods.")
    if missing := sorted({name for result in results.values() for name in result["missing_runs"]}):
        said.append(f"**Not complete.** Missing runs: {'; '.join(missing)}.")
    return said


def _shown(name: str, result: Result, plots: list[tuple[Path, str]]) -> list[str]:
    study = STUDIES[name]
    return [
        f"## {name.capitalize()} (the paper's {study.paper})",
        f"**{study.question}**",
        *(f"![{caption}]({path.name})" for path, caption in plots),
        *(table.markdown() for table in study.tables(result)),
        f"How to read it: {study.reading}",
        f"All figures: `{name}.json`.",
    ]


def _list(items: Any) -> str:
    return "\n".join(f"- {item}" for item in items)


def _lossy(data_set: str) -> list[str]:
    said = f"The data set is {data_set}, a lossy copy: accuracies are not strictly comparable with published ones."
    return [said] if "JPEG" in data_set else []


def _settings(result: Result) -> str:
    size = {**result["settings"]["size"], "examples": measured_examples(result)}
    measured = {f"{key.replace('_', ' ')} (measurements)": value for key, value in size.items()}
    settings = {**result["settings"]["base"], **measured}
    return Table("", ("setting", "value"), [(key, str(value)) for key, value in settings.items()]).markdown()
