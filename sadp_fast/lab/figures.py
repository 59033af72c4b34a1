"""How results are shown: tables for terminals and Markdown, and plots without global state, all in one style.

A study's own plots are ``draw`` in its module, ``study/NAME.py``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table as RichTable

Row = dict[str, Any]
GREY = "#555555"  # of what is no method: references and zero lines


@dataclass(frozen=True)
class Table:
    """Text for a terminal and for Markdown."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    @classmethod
    def of(cls, title: str, items: Iterable[Any], columns: Mapping[str, Callable[[Any], str]], note: str = "") -> Table:
        """A row for each item, and for each heading the text that its function makes of the item."""
        return cls(title, tuple(columns), [tuple(cell(item) for cell in columns.values()) for item in items], note)

    def markdown(self) -> str:
        """GitHub's form, the title above it and the note below."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return "\n\n".join(filter(None, (self.title and f"**{self.title}**", table, self.note))) + "\n"

    def rich(self) -> RichTable:
        """For a console."""
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, caption=self.note or None)
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def known(values: Iterable[float | None]) -> list[float]:
    """Those that there are."""
    return [value for value in values if value is not None]


def mean(values: Iterable[float | None]) -> float:
    """Mean of what is known; NaN of nothing."""
    there = known(values)
    return statistics.fmean(there) if there else math.nan


def spread(values: Iterable[float | None], digits: int, scale: float = 1.0) -> str:
    """Mean and, of several, their standard deviation (with n - 1): "98.1 ± 0.3"; "-" of nothing."""
    there = [scale * value for value in known(values)]
    if not there:
        return "-"
    deviation = f" ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else ""
    return f"{mean(there):.{digits}f}{deviation}"


def optional(value: float | None, digits: int, scale: float = 1.0) -> str:
    """The number, or "-" for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{scale * value:.{digits}f}"


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Write the PNG."""
    figure.savefig(path, metadata={"Software": None})
    return path


def by_value(rows: Iterable[Row], key: str) -> dict[Any, list[Row]]:
    """The rows by what they have at this key, sorted."""
    rows = sorted(rows, key=itemgetter(key))
    return {value: list(group) for value, group in groupby(rows, itemgetter(key))}


def over(
    panel: Axes,
    rows: Iterable[Row],
    axis: str,
    y: Callable[[Row], float | None],
    look: Mapping[str, Any],
    x: str = "",
    scale: float = 1.0,
) -> None:
    """Mean over seeds as a line, at every place of `axis` that the rows have, and the seeds' range as a band.

    The rows have a "seed" each. x: the key whose mean is where a place is drawn, times `scale`; "": the place itself.
    """
    groups = [
        (scale * mean(row[x or axis] for row in rows), known(map(y, rows))) for rows in by_value(rows, axis).values()
    ]
    points = sorted((at, values) for at, values in groups if values)
    if points:
        xs = [at for at, _ in points]
        panel.plot(xs, [mean(values) for _, values in points], **look)
        if max(len(values) for _, values in points) > 1:
            low, high = [min(values) for _, values in points], [max(values) for _, values in points]
            panel.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)


def ranges(panel: Axes, points: Sequence[tuple[float, Sequence[float]]], look: Mapping[str, Any]) -> None:
    """Means joined by a line, each with a bar over the range of its values; a point is x and the values there."""
    for x, values in points:
        panel.plot([x, x], [min(values), max(values)], color=look["color"], linewidth=2.5, alpha=0.5)
    if points:
        panel.plot([x for x, _ in points], [mean(values) for _, values in points], **look)


def one_line_each(lines: Sequence[tuple[str, Sequence[float], str]]) -> tuple[Figure, Axes]:
    """A figure with a line for each label, from the top: every value as a mark, their range and mean, in a colour."""
    figure, (axes,) = panels(1, 1, 9, 1.6 + 0.34 * len(lines))
    for place, (_, values, colour) in enumerate(lines):
        axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=2.5, alpha=0.5)
        axes.plot(values, [place] * len(values), "|", color=colour, markersize=8)
        axes.plot(mean(values), place, "o", color=colour)
    axes.set_yticks(range(len(lines)), [label for label, _, _ in lines])
    axes.invert_yaxis()
    return figure, axes


def learning_curve(
    axes: tuple[Axes, Axes], rows: Sequence[Row], y: Callable[[Row], float | None], look: Mapping[str, Any]
) -> None:
    """One method over its epochs, against examples in the first panel and seconds in the second, its end marked.

    A row holds "seed", "epoch", "examples" and "seconds", both since the start of training. The last mean stands in the
    legend, in percent.
    """
    *_, end = by_value(rows, "epoch").values()
    height = mean(map(y, end))
    line = {**look, "marker": None, "label": f"{look['label']}: {height:.1f} %"}
    for panel, x, text in zip(axes, ("examples", "seconds"), ("Examples trained", "Training time (s)"), strict=True):
        over(panel, rows, "epoch", y, line, x)
        panel.plot(mean(row[x] for row in end), height, look["marker"], color=look["color"], markersize=5)
        panel.set(xlabel=text, xlim=(0, None))
    axes[0].xaxis.set_major_formatter(
        lambda value, _: f"{value / 1e6:g}M" if abs(value) >= 1e6 else (f"{value / 1e3:g}k" if value else "0")
    )


def accuracy_scale(panel: Axes) -> None:
    """A scale in percent that the first eighth of training, where accuracy leaps, does not stretch."""
    lines = [known(line.get_ydata()) for line in panel.lines]  # type: ignore[arg-type]
    settled = [value for line in lines for value in line[len(line) // 8 :]]
    panel.set(ylabel="Test accuracy (%)", ylim=(max(0.0, min(settled) - 1.5), min(100.5, max(settled) + 1)))


def epoch_scale(panel: Axes, epochs: Sequence[int]) -> None:
    """A logarithmic scale of epochs that names these."""
    panel.set(xscale="log", xlabel="Epoch of training (log scale)")
    panel.set_xticks(epochs, [str(epoch) for epoch in epochs])
    panel.minorticks_off()


def legend_below(figure: Figure, axes: Axes, title: str | None = None) -> None:
    """The lines of these axes below all panels, in as many columns as fit, the figure growing by the rows."""
    handles, labels = axes.get_legend_handles_labels()
    width = figure.get_figwidth()
    columns = max(1, min(5, int(12.5 * width / (max(map(len, labels), default=0) + 8))))
    figure.set_figheight(figure.get_figheight() + 0.2 * max(0, -(-len(labels) // columns) - 2))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, title=title)
