"""How well each score follows the exact gradient norm, over training and at different sparsity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .figures import Table, band, known, legend_below, mean, panels, save, score_style, seeds_text, spread
from .measure import EXACT, SCORES, pearson, spearman
from .plan import Plan
from .runs import Runs
from .study import Files, Study, measured_examples, title
from .trajectory import shown_epochs

KINDS = ("pearson", "spearman")
TICKS = (-0.9, -0.5, 0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999, 0.99999)


def correlations(snapshot: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Of every score in a snapshot with the exact norm: kind -> score -> value."""
    values = {name: _tensor(snapshot["values"][name]) for name in (*SCORES, EXACT)}
    return {
        kind: {score: function(values[score], values[EXACT]) for score in SCORES}
        for kind, function in zip(KINDS, (pearson, spearman), strict=True)
    }


def _tensor(values: list[float | None]) -> torch.Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


class Correlation(Study):
    name = "correlation"
    paper = "Fig. 1a and 4"
    question = "How well does each score follow an example's exact gradient norm?"
    reading = (
        "Scores and exact norms (of all parameters, by per-example autograd) are of the same training examples on the "
        "same weights, without augmentation and with frozen normalisation statistics, in float32. Over training: full-"
        "data training, measured after the epochs shown. Sparsity: further networks, trained from scratch for fewer "
        "epochs with firing thresholds other than the model's own (and with that one), each placed at the sparsity "
        "that it was measured to have: the share of neurons and time steps without a spike. How the paper controls "
        "sparsity is not public; this way is ours."
    )

    trains_cells = False

    def requests(self, plan: Plan) -> int:
        return len(plan.seeds) * (1 + len(plan.size.thresholds))

    def collect(self, runs: Runs) -> dict[str, Any]:
        plan, files = runs.plan, Files()
        shown = shown_epochs(plan.base.epochs)
        over_training, by_sparsity = [], []
        for seed in plan.seeds:
            file = files.take(runs.trajectory(seed), f"scores, seed {seed}")
            runs.display.advance()
            for snapshot in file["snapshots"] if file else ():
                if snapshot["epoch"] in shown:
                    over_training.append({"seed": seed, **_row(snapshot)})
            for threshold in plan.size.thresholds:
                file = files.take(runs.at_threshold(threshold, seed), f"scores at threshold {threshold:g}, seed {seed}")
                runs.display.advance()
                if file:
                    by_sparsity.append({"threshold": threshold, "seed": seed, **_row(file["snapshots"][-1])})
        return {**files.header(self.name, plan), "over_training": over_training, "by_sparsity": by_sparsity}

    def plots(self, result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
        figure, axes = panels(2, 2, 11, 7.6)
        rows, seeds = result["over_training"], _seeds(result["over_training"])
        for panel, kind in zip(axes[:2], KINDS, strict=True):
            epochs = sorted({row["epoch"] for row in rows})
            for score in SCORES:
                by_seed = [[_value(rows, kind, score, seed=seed, epoch=e) for e in epochs] for seed in seeds]
                band(panel, epochs, by_seed, score_style(score))
            panel.set(xscale="log", xlabel="Epoch of training (log scale)", ylabel=_ylabel(kind))
            panel.set_xticks(epochs, [str(epoch) for epoch in epochs])
            panel.minorticks_off()
            panel.set_title("Over training", fontsize=10)
        rows, seeds = result["by_sparsity"], _seeds(result["by_sparsity"])
        points = sorted(
            (mean(r["sparsity"] for r in rows if r["threshold"] == t), t) for t in {r["threshold"] for r in rows}
        )
        for panel, kind in zip(axes[2:], KINDS, strict=True):
            for score in SCORES:
                by_seed = [[_value(rows, kind, score, seed=seed, threshold=t) for _, t in points] for seed in seeds]
                band(panel, [100 * sparsity for sparsity, _ in points], by_seed, score_style(score))
            panel.set(xlabel="Sparsity: neurons and steps without a spike (%)", ylabel=_ylabel(kind))
            thresholds = ", ".join(f"{t:g}" for t in sorted(t for _, t in points))
            panel.set_title(f"By sparsity (networks with firing thresholds {thresholds})", fontsize=10)
        values = [row[kind][score] for row in (*result["over_training"], *rows) for kind in KINDS for score in SCORES]
        for panel in axes:
            _stretch(panel, known(values))
        legend_below(figure, axes[0])
        figure.suptitle(
            f"Correlation of scores with the exact gradient norm of {measured_examples(result)} examples "
            f"({seeds_text(len(seeds))})\n{title(result)}"
        )
        return [(save(figure, folder / "correlation.png"), self.question)]

    def tables(self, result: dict[str, Any]) -> list[Table]:
        rows = result["over_training"]
        epochs = sorted({row["epoch"] for row in rows})
        tables = [
            Table(
                f"{kind.capitalize()} correlation with the exact gradient norm, by epoch (± is the seeds' deviation)",
                ("score", *(str(epoch) for epoch in epochs)),
                [
                    (
                        label,
                        *(spread((r[kind][score] for r in rows if r["epoch"] == epoch), 3) for epoch in epochs),
                    )
                    for score, label in SCORES.items()
                ],
            )
            for kind in KINDS
        ]
        rows = result["by_sparsity"]
        thresholds = sorted({row["threshold"] for row in rows})
        by_threshold = [[row for row in rows if row["threshold"] == threshold] for threshold in thresholds]
        tables.append(
            Table(
                "Pearson correlation, by firing threshold",
                ("threshold", *(f"{threshold:g}" for threshold in thresholds)),
                [
                    ("sparsity (%)", *(spread((r["sparsity"] for r in group), 1, 100) for group in by_threshold)),
                    (
                        "test accuracy (%)",
                        *(spread((r["test_accuracy"] for r in group), 1, 100) for group in by_threshold),
                    ),
                    *(
                        (label, *(spread((r["pearson"][score] for r in group), 3) for group in by_threshold))
                        for score, label in SCORES.items()
                    ),
                ],
            )
        )
        return tables


def _row(snapshot: dict[str, Any]) -> dict[str, Any]:
    return {**{key: snapshot[key] for key in ("epoch", "test_accuracy", "sparsity")}, **correlations(snapshot)}


def _seeds(rows: list[dict[str, Any]]) -> list[int]:
    return sorted({row["seed"] for row in rows})


def _value(rows: list[dict[str, Any]], kind: str, score: str, **where: Any) -> float | None:
    found = [row[kind][score] for row in rows if all(row[key] == value for key, value in where.items())]
    return found[0] if found else None


def _ylabel(kind: str) -> str:
    return f"{kind.capitalize()} correlation (stretched near 1)"


def _stretch(panel: Any, values: list[float]) -> None:
    """An axis on which 0.9, 0.99 and 0.999 are equally far from each other: logarithmic in 1 - correlation."""
    panel.set_yscale("function", functions=(_distance, _correlation))
    low = max((tick for tick in TICKS if tick < min(values, default=0.0)), default=-1.05)
    high = 1 - (1 - min(max(values, default=0.99), 1 - 1e-6)) / 1.5
    panel.set_ylim(min(low, 0.9), high)
    ticks = [tick for tick in TICKS if min(low, 0.9) <= tick < high]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)


def _distance(correlation: Any) -> Any:
    return -np.log10(np.maximum(1 - np.asarray(correlation, dtype=float), 1e-7))


def _correlation(distance: Any) -> Any:
    return 1 - 10 ** -np.asarray(distance, dtype=float)
