"""How well each score follows the exact gradient norm, over training and at different sparsity.

Scores and exact norms (of all parameters, by per-example autograd) are of the same training examples on the same
weights, without augmentation and with frozen normalisation statistics, in float32. Over training: full-data training,
measured after the epochs shown. Sparsity: further networks, trained from scratch for fewer epochs with firing
thresholds other than the model's own (and with that one), each placed at the sparsity that it was measured to have: the
share of neurons and time steps without a spike. How the paper controls sparsity is not public; this way is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter, methodcaller
from typing import TYPE_CHECKING, Any

import numpy as np

from ..figures import Row, Table, by_value, epoch_scale, known, legend_below, over, panels, spread
from . import study
from .measure import EXACT, SCORES, numbers, pearson, shown_epochs, spearman
from .plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUESTION = "How well does each score follow an example's exact gradient norm?"
KINDS = {"pearson": pearson, "spearman": spearman}
Line = Callable[[list[Row]], str]  # a table's text for the rows of a column
TICKS = (-0.9, -0.5, 0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999, 0.99999)


def asks(plan: Plan) -> list[study.Ask]:
    """Of each seed a network over its training, and one for each threshold."""
    return [trajectory_ask(seed, threshold) for seed in plan.seeds for threshold in (None, *plan.size.thresholds)]


def trajectory_ask(seed: int, threshold: float | None = None) -> study.Ask:
    """The full-data training of this seed, measured over its epochs, or a shorter one with another threshold."""
    what = "scores" if threshold is None else f"scores at threshold {threshold:g}"
    where = {"threshold": threshold, "seed": seed}
    return study.Ask(f"{what}, seed {seed}", methodcaller("trajectory", seed, threshold), where)


def parts(plan: Plan, found: study.Found) -> dict[str, Any]:
    """Correlations of every score with the exact norm, after the epochs shown, and at each threshold."""
    shown = shown_epochs(plan.base.epochs)
    over_training, by_sparsity = [], []
    for ask, file in found:
        if ask.where["threshold"] is None:
            snapshots = [snapshot for snapshot in file["snapshots"] if snapshot["epoch"] in shown]
            over_training += [{"seed": ask.where["seed"], **_correlations(snapshot)} for snapshot in snapshots]
        else:
            by_sparsity.append({**ask.where, **_correlations(file["snapshots"][-1])})
    return {"over_training": over_training, "by_sparsity": by_sparsity}


def _correlations(snapshot: dict[str, Any]) -> Row:
    values, row = numbers(snapshot), {key: snapshot[key] for key in ("epoch", "test_accuracy", "sparsity")}
    for kind, function in KINDS.items():
        row[kind] = {score: function(values[score], values[EXACT]) for score in SCORES}
    return row


def _value(kind: str, score: str, row: Row) -> float | None:
    return row[kind][score]


def draw(result: study.Result) -> study.Figures:
    """Both kinds of correlation, over training above and by sparsity below."""
    figure, axes = panels(2, 2, 11, 7.6)
    training, sparse = result["over_training"], result["by_sparsity"]
    thresholds = ", ".join(f"{threshold:g}" for threshold in by_value(sparse, "threshold"))
    for above, below, kind in zip(axes[:2], axes[2:], KINDS, strict=True):
        for name, score in SCORES.items():
            over(above, training, "epoch", partial(_value, kind, name), score.look)
            over(below, sparse, "threshold", partial(_value, kind, name), score.look, x="sparsity", scale=100)
        epoch_scale(above, list(by_value(training, "epoch")))
        above.set_title("Over training", fontsize=10)
        below.set_xlabel("Sparsity: neurons and steps without a spike (%)")
        below.set_title(f"By sparsity (networks with firing thresholds {thresholds})", fontsize=10)
        for panel in (above, below):
            panel.set_ylabel(f"{kind.capitalize()} correlation (stretched near 1)")
    values = known(row[kind][score] for row in (*training, *sparse) for kind in KINDS for score in SCORES)
    for panel in axes:
        _stretch(panel, values)
    legend_below(figure, axes[0])
    seeds = {len(by_value(rows, "seed")) for rows in (training, sparse) if rows}
    figure.suptitle(
        f"Correlation of scores with the exact gradient norm of {study.measured_examples(result)} examples "
        f"({study.seeds_text(seeds)})\n{study.title(result)}"
    )
    return [("", figure)]


def _stretch(panel: Axes, values: list[float]) -> None:
    """An axis on which 0.9, 0.99 and 0.999 are equally far from each other: logarithmic in 1 - correlation."""

    def distance(correlation: Any) -> Any:
        return -np.log10(np.maximum(1 - np.asarray(correlation, dtype=float), 1e-7))

    def correlation(distance: Any) -> Any:
        return 1 - 10 ** -np.asarray(distance, dtype=float)

    panel.set_yscale("function", functions=(distance, correlation))
    low = max((tick for tick in TICKS if tick < min(values, default=0.0)), default=-1.05)
    high = 1 - (1 - min(max(values, default=0.99), 1 - 1e-6)) / 1.5
    panel.set_ylim(min(low, 0.9), high)
    ticks = [tick for tick in TICKS if min(low, 0.9) <= tick < high]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)


def tables(result: study.Result) -> list[Table]:
    """Correlations by epoch, one table for each kind, and by threshold."""

    def line(value: Callable[[Row], Any], digits: int = 3, scale: float = 1.0) -> Line:
        return lambda rows: spread(map(value, rows), digits, scale)

    def table(heading: str, corner: str, groups: dict[Any, list[Row]], lines: dict[str, Line]) -> Table:
        columns = {f"{at:g}": partial(lambda rows, item: item[1](rows), rows) for at, rows in groups.items()}
        return Table.of(heading, lines.items(), {corner: lambda item: item[0], **columns})

    lines = {kind: {score.label: line(partial(_value, kind, name)) for name, score in SCORES.items()} for kind in KINDS}
    by_epoch, by_threshold = by_value(result["over_training"], "epoch"), by_value(result["by_sparsity"], "threshold")
    measured = {
        "sparsity (%)": line(itemgetter("sparsity"), 1, 100),
        "test accuracy (%)": line(itemgetter("test_accuracy"), 1, 100),
    }
    heading = "{} correlation with the exact gradient norm, by epoch (± is the seeds' deviation)"
    return [
        *(table(heading.format(kind.capitalize()), "score", by_epoch, lines[kind]) for kind in KINDS),
        table("Pearson correlation, by firing threshold", "threshold", by_threshold, {**measured, **lines["pearson"]}),
    ]
