"""How results are shown: figures without global state, colours that colour-blind readers tell apart, tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import report
from .measure import EXACT, SCORES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table as RichTable

# Of the colours that report.COLOURS takes from Okabe and Ito; a score that is a method has the method's.
_SCORE_STYLES = {
    "all": (report.COLOURS["sadp"], "o"),
    "last": ("#D55E00", "s"),
    "delta": ("#E69F00", "^"),
    "el2n": (report.COLOURS["el2n"], "D"),
    "loss": (report.COLOURS["loss"], "v"),
    EXACT: (report.COLOURS["grad_norm"], "*"),
}
SCORE_LABELS = {**SCORES, EXACT: "exact gradient norm"}


@dataclass(frozen=True)
class Table:
    """Text for a terminal and for Markdown."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def markdown(self) -> str:
        """GitHub's form, the title above it and the note below."""
        lines = [f"**{self.title}**", "", _line(self.headings), _line(["---"] * len(self.headings))]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])

    def rich(self) -> RichTable:
        """For a console."""
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, caption=self.note or None)
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def known(values: Iterable[float | None]) -> list[float]:
    """Those that there are."""
    return [value for value in values if value is not None]


def mean(values: Iterable[float | None]) -> float:
    """Mean of what is known; NaN of nothing."""
    there = known(values)
    return sum(there) / len(there) if there else math.nan


def spread(values: Iterable[float | None], digits: int, scale: float = 1.0) -> str:
    """Mean and, of several, their standard deviation (with n - 1): "98.1 ± 0.3"; "-" of nothing."""
    there = [scale * value for value in known(values)]
    if not there:
        return "-"
    centre = mean(there)
    if len(there) == 1:
        return f"{centre:.{digits}f}"
    deviation = math.sqrt(sum((value - centre) ** 2 for value in there) / (len(there) - 1))
    return f"{centre:.{digits}f} ± {deviation:.{digits}f}"


def seeds_text(count: int) -> str:
    """What a band is: "mean and range of 3 seeds", or "one seed"."""
    return "one seed" if count == 1 else f"mean and range of {count} seeds"


def score_style(score: str) -> dict[str, Any]:
    """A line's style for a score."""
    colour, marker = _SCORE_STYLES[score]
    return {"color": colour, "marker": marker, "label": SCORE_LABELS[score], "markersize": 5, "linewidth": 1.6}


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Any]]:
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


def band(axes: Axes, x: Sequence[float], by_seed: Sequence[Sequence[float | None]], style: dict[str, Any]) -> None:
    """Mean over seeds as a line and their range as a band; `by_seed` holds one row a seed."""
    columns = [known(column) for column in zip(*by_seed, strict=True)]
    places = [i for i, column in enumerate(columns) if column]
    if not places:
        return
    at = [x[i] for i in places]
    axes.plot(at, [mean(columns[i]) for i in places], **style)
    if len(by_seed) > 1:
        low, high = [min(columns[i]) for i in places], [max(columns[i]) for i in places]
        axes.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)


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


def legend_below(figure: Figure, axes: Axes, title: str = "") -> None:
    """The lines of these axes below all panels, in as many columns as fit, the figure growing by the rows."""
    handles, labels = axes.get_legend_handles_labels()
    width = figure.get_figwidth()
    columns = max(1, min(5, int(12.5 * width / (max(map(len, labels), default=0) + 8))))
    figure.set_figheight(figure.get_figheight() + 0.2 * max(0, -(-len(labels) // columns) - 2))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, title=title or None
    )


def thousands(axes: Axes) -> None:
    """Numbers of examples as people write them."""
    axes.xaxis.set_major_formatter(
        lambda value, _: f"{value / 1e6:g}M" if abs(value) >= 1e6 else (f"{value / 1e3:g}k" if value else "0")
    )


def save(figure: Figure, path: Path) -> Path:
    """Write the PNG."""
    figure.savefig(path, metadata={"Software": None})
    return path
