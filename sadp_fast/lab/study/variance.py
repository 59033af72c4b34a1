"""The gradient estimator's variance for every score, policy and age of the scores, from exact gradient norms.

tr Var = (1/N^2) sum |g_i|^2 (1/p_i - 1) with exact gradient norms |g_i| (all parameters) of the measured examples as
the whole data set, over the same for uniform probabilities and as many examples kept: 1 is uniform pruning, lower is
better, and the exact norms' own probabilities without smoothing are the least possible (in the plots, the exact norm's
line in the first panel). A stale score was taken on the weights of earlier epochs of the same training: in use, an
example's score is as old as its last draw. ε-greedy trains without weights: this is its variance if it had them. Values
worse than any plot shows are in the JSON file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...prune.probabilities import inclusion_probabilities, relative_variance
from ..figures import GREY, Row, Table, by_value, epoch_scale, known, legend_below, mean, over, panels, spread
from ..methods import METHODS
from . import study
from .correlation import trajectory_ask
from .measure import AGES, EXACT, MEASURED, numbers, short, shown_epochs
from .plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUESTION = "How much less noisy is the gradient estimate than that of uniform pruning?"
OPTIMUM = "optimum"
POLICIES = {
    OPTIMUM: "not smoothed",
    "mix": "mix",
    "floor": "floor",
    "infobatch": "InfoBatch",
    "epsilon_greedy": "ε-greedy",
}
TOP = 30.0  # where the plots' scale ends: worse than uniform by more hardly matters


def estimator_variance(score: Tensor, norm: Tensor, ratio: float, policy: str, smoothing: float) -> float:
    """tr Var of the gradient estimate over that of uniform pruning, for p from `score` and exact norms `norm`, [N].

    tr Var = (1/N^2) sum |g_i|^2 (1/p_i - 1) [paper, Proposition 1]; uniform pruning draws as many examples.
    policy: one of `POLICIES`; "optimum" is Proposition 1's without smoothing, and "infobatch" and "epsilon_greedy"
    have their methods' own. (ε-greedy trains without weights: this is its variance if it had them.)
    """
    if policy == OPTIMUM:
        policy, smoothing = "mix", 0.0
    elif policy in METHODS:
        smoothing = METHODS[policy].settings["smoothing"]
    p = inclusion_probabilities(score, (1 - ratio) * len(score), smoothing=smoothing, policy=policy)
    return float(relative_variance(norm, p))


def asks(plan: Plan) -> list[study.Ask]:
    """Of each seed a network over its training."""
    return [trajectory_ask(seed) for seed in plan.seeds]


def parts(plan: Plan, found: study.Found) -> dict[str, Any]:
    """Variances after every epoch shown, for scores of every age that was measured."""
    rows = []
    for ask, file in found:
        values = {snapshot["epoch"]: numbers(snapshot) for snapshot in file["snapshots"]}
        rows += [
            {
                **{"seed": ask.where["seed"], "epoch": epoch, "age": age, "ratio": ratio},
                "variance": _variances(values[epoch - age], values[epoch][EXACT], ratio, plan.base.smoothing),
            }
            for epoch, age, ratio in product(shown_epochs(plan.base.epochs), AGES, plan.ratios)
            if epoch - age in values
        ]
    return {"variances": rows}


def _variances(scores: dict[str, Tensor], norm: Tensor, ratio: float, smoothing: float) -> Row:
    return {
        policy: {score: short(estimator_variance(scores[score], norm, ratio, policy, smoothing)) for score in MEASURED}
        for policy in POLICIES
    }


def draw(result: study.Result) -> study.Figures:
    """Over training for fresh and for older scores, by policy, and what a score costs beside exact norms."""
    base, ratio = result["settings"]["base"], _middle(result["settings"]["ratios"])
    rows = study.select(result["variances"], ratio=ratio)
    fresh, older = study.select(rows, age=0), study.select(rows, age=1)
    figure, axes = panels(2, 2, 12, 8.4)
    unsmoothed, smoothed, by_policy, excess = axes
    training = f"Over training, r = {ratio:g}"
    _over_training(unsmoothed, fresh, partial(_value, OPTIMUM), f"{training}: fresh scores, not smoothed")
    how = f"'{base['policy']}' with smoothing {base['smoothing']:g}"
    _over_training(smoothed, older, partial(_value, base["policy"]), f"{training}: scores one epoch old, {how}")
    _by_policy(by_policy, rows, base["smoothing"])
    _over_training(excess, fresh, _cost, f"What a score costs, r = {ratio:g}: fresh, not smoothed, over exact norms")
    excess.set(ylabel="Variance / least possible", ylim=(0.98, min(excess.get_ylim()[1], 3.0)))
    excess.axhline(1, color="black", linewidth=1)
    lines: list[Any] = [line.get_ydata() for panel in axes[:3] for line in panel.lines]
    shown = [y for line in lines for y in line if y > 0]
    for panel in axes[:3]:
        panel.axhline(1, color=GREY, linewidth=1, linestyle="--", label="uniform pruning")
        panel.set(yscale="log", ylabel="Variance / that of uniform pruning")
        panel.set_ylim(max(min(shown) / 1.5, 1e-6), min(TOP, max(1.0, *shown) * 1.5))
    legend_below(figure, unsmoothed)
    figure.suptitle(
        f"Variance of the pruned gradient, from exact norms of {study.measured_examples(result)} examples "
        f"({study.seeds_text({len(by_value(rows, 'seed'))})})\n{study.title(result)}"
    )
    return [("", figure)]


def _over_training(panel: Axes, rows: list[Row], value: Callable[[str, Row], float | None], heading: str) -> None:
    """A line for each score that has values."""
    for name, score in MEASURED.items():
        over(panel, rows, "epoch", partial(value, name), score.look)
    epoch_scale(panel, list(by_value(rows, "epoch")))
    panel.set_title(heading, fontsize=10)


def _value(policy: str, score: str, row: Row) -> float | None:
    return row["variance"][policy][score]


def _cost(score: str, row: Row) -> float | None:
    """A score's variance over that of exact norms, which themselves cost nothing."""
    value, least = _value(OPTIMUM, score, row), _value(OPTIMUM, EXACT, row)
    return None if score == EXACT or value is None or not least else value / least


def _by_policy(panel: Axes, rows: list[Row], smoothing: float) -> None:
    """Every score under every policy after the last epoch, fresh and one epoch old side by side."""
    last = max(row["epoch"] for row in rows)
    for i, (name, score) in enumerate(MEASURED.items()):
        for age, face in ((0, score.colour), (1, "white")):
            look = {**score.look, "linestyle": "none", "markerfacecolor": face}
            for place, policy in enumerate(POLICIES):
                values = known(row["variance"][policy][name] for row in study.select(rows, epoch=last, age=age))
                if values:
                    x = place + 0.12 * (i - (len(MEASURED) - 1) / 2) + 0.03 * (2 * age - 1)
                    y = [min(value, TOP) for value in values]
                    panel.plot([x, x], [min(y), max(y)], color=score.colour, linewidth=1)
                    panel.plot([x], [min(mean(values), TOP)], **look)
    panel.set_xticks(range(len(POLICIES)), [_policy_label(policy, smoothing) for policy in POLICIES])
    panel.set_xlabel("How small probabilities are raised")
    ratio = rows[0]["ratio"]
    panel.set_title(f"By policy, after epoch {last}, r = {ratio:g}: filled fresh, hollow one epoch old", fontsize=10)


def tables(result: study.Result) -> list[Table]:
    """Variances after the last epoch: by policy at the middle ratio, and by ratio with the study's policy."""
    settings, base = result["settings"], result["settings"]["base"]
    ratio, last = _middle(settings["ratios"]), max(row["epoch"] for row in result["variances"])
    rows = study.select(result["variances"], epoch=last)
    ages = [age for age in AGES if study.select(rows, age=age)]

    def table(heading: str, corner: str, lines: list[tuple[str, float, str, int]], note: str = "") -> Table:
        def cell(score: str, line: tuple[str, float, str, int]) -> str:
            _, ratio, policy, age = line
            return _text(known(row["variance"][policy][score] for row in study.select(rows, age=age, ratio=ratio)))

        columns = {score.label: partial(cell, name) for name, score in MEASURED.items()}
        return Table.of(heading, lines, {corner: lambda line: f"{line[0]}, {_age(line[3])}", **columns}, note)

    return [
        table(
            f"Variance over that of uniform pruning, after epoch {last}, r = {ratio:g} (± is the seeds' deviation)",
            "policy, age of scores",
            [(label, ratio, policy, age) for policy, label in POLICIES.items() for age in ages],
            f"Smoothing {base['smoothing']:g} where smoothed; uniform pruning is 1.",
        ),
        table(
            f"The same by ratio, {_policy_label(base['policy'], base['smoothing'])}",
            "ratio, age of scores",
            [(f"r = {each:g}", each, base["policy"], age) for each in settings["ratios"] for age in ages],
        ),
    ]


def _middle(ratios: list[float]) -> float:
    return sorted(ratios)[len(ratios) // 2]


def _policy_label(policy: str, smoothing: float) -> str:
    return f"{POLICIES[policy]}, {smoothing:g}" if policy in ("mix", "floor") else POLICIES[policy]


def _age(age: int) -> str:
    return "fresh" if age == 0 else f"{age} epoch{'s' if age > 1 else ''} old"


def _text(values: list[float]) -> str:
    return f"{mean(values):.1e}" if values and mean(values) > 1000 else spread(values, 3)
