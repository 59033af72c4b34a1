"""What a run leaves behind: a table, a JSON file and a plot that compare the methods."""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data import Dataset
from .figures import Table, accuracy_scale, learning_curve, legend_below, optional, panels, save
from .methods import METHODS
from .settings import TrainConfig, read_variant

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NOTES = (
    "seconds: everything that training and pruning do, measured at epoch borders with the device synchronised; "
    "neither evaluation nor checkpoints. Before the first clock started, every method took two throw-away training "
    "steps of each kind of epoch and an evaluation, so that no method pays for compilation.",
    "time_ratio: training seconds over those of the method 'full'; theoretical_ratio: planned examples over those of "
    "full-data training of this configuration (1 - r, for as many epochs).",
    "relative_variance: an estimate, from the scores in place of the gradient norms, of the variance of the pruned "
    "epoch's gradient over that of uniform random pruning; mean over the pruned epochs, null where it is infinite.",
)
# Variants of methods take Tol's muted colours in turn and are never solid; a second round has other dashes.
_VARIANT_COLOURS = "#CC6677", "#332288", "#117733", "#882255", "#44AA99", "#999933", "#AA4499", "#88CCEE", "#DDCC77"
_VARIANT_LINES = "--", "-.", ":"
_VARIANT_MARKERS = "osD^vP*Xh<>pd8"
# Names of settings where a reader would not know the field's, or a shorter one will do.
_SHORT = {"batch_size": "batch", "score_momentum": "momentum", "warmup_epochs": "warm-up", "tail_epochs": "tail"}


def label(variant: str, score: str) -> str:
    """A method's name, or that of a variant of one, as the progress, tables and plots show it.

    score: of the configuration that the methods share, which "sadp" has.
    """
    method, changes = read_variant(variant)
    name = METHODS[method].label.format(score=changes.pop("score", score))
    return ", ".join([name, *(_detail(key, value) for key, value in changes.items())])


def _detail(key: str, value: Any) -> str:
    if key == "epochs":
        return f"{value} epochs"
    return f"{_SHORT.get(key, key.replace('_', ' '))} {str(value).lower() if isinstance(value, bool) else value}"


def styles(variants: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A line's colour, dashes and marker for each method or variant; a method's own are the same in every plot."""
    looks = itertools.cycle(itertools.product(_VARIANT_LINES, _VARIANT_COLOURS))
    turns = zip(looks, itertools.cycle(_VARIANT_MARKERS))
    found = {}
    for variant in variants:
        own = METHODS.get(variant)
        (line, colour), marker = (("-", own.colour), own.marker) if own else next(turns)
        found[variant] = {"color": colour, "linestyle": line, "marker": marker, "markersize": 5, "linewidth": 1.6}
    return found


def summary(config: TrainConfig, histories: dict[str, list[dict[str, Any]]], data: Dataset) -> dict[str, Any]:
    """Everything about a comparison, ready for JSON: where it ran, what was asked for, and each method's figures.

    config: what the methods share. histories: of each method or variant, as `train.run` gives it.
    """
    full = sum(entry["seconds"] for entry in histories["full"]) if "full" in histories else None
    return {
        "data_set": {
            "name": data.name,
            "train_examples": len(data.train_labels),
            "test_examples": len(data.test_labels),
            "shape": data.shape,
            "classes": data.num_classes,
        },
        "versions": versions(),
        "device": device_name(config.device),
        "config": asdict(config),
        "notes": NOTES,
        "methods": {
            variant: {"label": label(variant, config.score), **_figures(history, config.epochs, full)}
            for variant, history in histories.items()
        },
    }


def _figures(history: list[dict[str, Any]], epochs: int, full_seconds: float | None) -> dict[str, Any]:
    seconds = sum(entry["seconds"] for entry in history)
    variances = [entry["relative_variance"] for entry in history if entry["ratio"] > 0]
    return {
        "test_accuracy": history[-1]["test_accuracy"],
        "best_test_accuracy": max(entry["test_accuracy"] for entry in history),
        "examples_trained": history[-1]["examples_trained"],
        "training_seconds": seconds,
        "first_epoch_seconds": history[0]["seconds"],
        "time_ratio": seconds / full_seconds if full_seconds else None,
        "theoretical_ratio": sum(1 - entry["ratio"] for entry in history) / epochs,
        "relative_variance": sum(variances) / len(variances) if variances and None not in variances else None,
        "epochs": history,
    }


def title(report: dict[str, Any]) -> str:
    """What was compared: data set, model, T, r and device."""
    config = report["config"]
    run = f"{report['data_set']['name']}, {config['model']}, T = {config['time_steps']}, r = {config['prune_ratio']:g}"
    return f"{run} ({report['device']})"


def table(report: dict[str, Any]) -> RichTable:
    """The methods side by side, for a terminal."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "Method": lambda figures: figures["label"],
        "Test\naccuracy": lambda figures: f"{100 * figures['test_accuracy']:.2f} %",
        "Examples\ntrained": lambda figures: f"{figures['examples_trained']:,}",
        "Training\nseconds": lambda figures: f"{figures['training_seconds']:.1f}",
        "Time\nratio": lambda figures: optional(figures["time_ratio"], 2),
        "Theory\n1 - r": lambda figures: optional(figures["theoretical_ratio"], 2),
        "Gradient\nvariance": lambda figures: optional(figures["relative_variance"], 2),
    }
    note = "Gradient variance: estimated from the scores; uniform pruning = 1."
    return Table.of(title(report), report["methods"].values(), columns, note).rich()


def write_json(value: dict[str, Any], path: Path, indent: int | None = 2) -> None:
    """Write the file whole or not at all, for every process that may look; raises ValueError for NaN and infinity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n")
    os.replace(partial, path)


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Test accuracy against training seconds and against examples trained, as a PNG."""
    methods = report["methods"]
    figure, (by_time, by_examples) = panels(1, 2, 11.54, 4.85)
    looks = styles(methods)
    for method, figures in methods.items():
        epochs = figures["epochs"]
        seconds = itertools.accumulate(entry["seconds"] for entry in epochs)
        rows = [
            {**entry, "seed": 0, "examples": entry["examples_trained"], "seconds": time}
            for entry, time in zip(epochs, seconds, strict=True)
        ]
        look = {**looks[method], "label": figures["label"]}
        learning_curve((by_examples, by_time), rows, lambda row: 100 * row["test_accuracy"], look)
    for panel in (by_time, by_examples):
        accuracy_scale(panel)
    legend_below(figure, by_examples, "Final test accuracy")
    figure.suptitle(title(report))
    save(figure, path)


def device_name(device: str) -> str:
    """The device as a reader would name it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} {'thread' if threads == 1 else 'threads'}"


def versions() -> dict[str, str | None]:
    """Of what a run depends on."""
    return {
        "sadp_fast": package_version("sadp_fast"),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "python": platform.python_version(),
    }


def package_version(package: str) -> str | None:
    """The installed version, or None for what runs from its source folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
