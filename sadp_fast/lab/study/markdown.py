"""One Markdown file that shows all studies of a folder, with what a reader has to know about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .registry import STUDIES
from .study import measured_examples

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


def write_report(results: dict[str, dict[str, Any]], plots: dict[str, list[tuple[Path, str]]], folder: Path) -> Path:
    """Write report.md, which refers to the plots beside it."""
    first = next(iter(results.values()))
    settings = first["settings"]
    environments = [entry for result in results.values() for entry in result["environments"]]
    environments = [entry for i, entry in enumerate(environments) if entry not in environments[:i]]
    missing = sorted({name for result in results.values() for name in result["missing_runs"]})
    data_set = first["data_set"]
    lines = [
        "# Studies of spike-aware data pruning",
        "",
        f"{data_set['name']} ({data_set['train_examples']:,} training examples), {settings['base']['model']}, "
        f"T = {settings['base']['time_steps']}, {settings['base']['epochs']} epochs. "
        f"Methods: {', '.join(settings['methods'])}. Ratios: {', '.join(f'{r:g}' for r in settings['ratios'])}. "
        f"Seeds: {', '.join(str(seed) for seed in settings['seeds'])}.",
        "",
        "Ran on:",
        "",
    ]
    for entry in environments:
        versions = ", ".join(f"{name} {version or '-'}" for name, version in entry["versions"].items())
        lines.append(f"- {entry['device']}; {versions}")
    if len({entry["device"] for entry in environments}) > 1:
        lines += ["", "The runs come from more than one kind of device: seconds compare within one of them only."]
    if len({entry["versions"]["sadp_fast"] for entry in environments}) > 1:
        lines += ["", "The runs come from different sources of this package: they may differ by more than the methods."]
    if missing:
        lines += ["", f"**Not complete.** Missing runs: {'; '.join(missing)}."]
    for name, result in results.items():
        study = STUDIES[name]
        lines += ["", f"## {name.capitalize()} (the paper's {study.paper})", "", f"**{study.question}**", ""]
        for path, caption in plots[name]:
            lines += [f"![{caption}]({path.name})", ""]
        for table in study.tables(result):
            lines += [table.markdown()]
        lines += [f"How to read it: {study.reading}", "", f"All figures: `{name}.json`."]
    lines += ["", "## Not comparable with the paper", ""]
    lines += [f"- {sentence}" for sentence in NOT_COMPARABLE]
    if "JPEG" in data_set["name"]:
        lines.append(
            f"- The data set is {data_set['name']}, a lossy copy: accuracies are not strictly comparable with "
            "published ones."
        )
    lines += ["", "## Settings", "", "| setting | value |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in settings["base"].items()]
    size = {**settings["size"], "examples": measured_examples(first)}
    lines += [f"| {key.replace('_', ' ')} (measurements) | {value} |" for key, value in size.items()]
    path = folder / "report.md"
    path.write_text("\n".join([*lines, ""]))
    return path
