"""The gradient estimator's variance for every score, policy and age of the scores, from exact gradient norms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ...prune.probabilities import inclusion_probabilities, relative_variance
from ..config import METHODS
from .figures import SCORE_LABELS, Table, band, known, legend_below, mean, panels, save, score_style, seeds_text, spread
from .measure import EXACT, SCORES
from .plan import Plan
from .runs import Runs
from .store import short
from .study import Files, Study, measured_examples, title
from .trajectory import AGES, shown_epochs

OPTIMUM = "optimum"
POLICIES = {
    OPTIMUM: "not smoothed",
    "mix": "mix",
    "floor": "floor",
    "infobatch": "InfoBatch",
    "epsilon_greedy": "ε-greedy",
}
TOP = 30.0  # where the plots' scale ends: worse than uniform by more hardly matters


def estimator_variance(score: torch.Tensor, norm: torch.Tensor, ratio: float, policy: str, smoothing: float) -> float:
    """tr Var of the gradient estimate over that of uniform pruning, for p from `score` and exact norms `norm`, [N].

    tr Var = (1/N^2) sum |g_i|^2 (1/p_i - 1) [paper, Proposition 1]; uniform pruning draws as many examples.
    policy: one of `POLICIES`; "optimum" is Proposition 1's without smoothing, and "infobatch" and "epsilon_greedy"
    have their methods' own. (ε-greedy trains without weights: this is its variance if it had them.)
    """
    keep = (1 - ratio) * len(score)
    if policy == OPTIMUM:
        p = inclusion_probabilities(score, keep, smoothing=0.0)
    else:
        own = METHODS[policy].settings.get("smoothing", smoothing) if policy in METHODS else smoothing
        p = inclusion_probabilities(score, keep, smoothing=own, policy=policy)
    return float(relative_variance(norm, p))


class Variance(Study):
    name = "variance"
    paper = "Fig. 1b and 5"
    question = "How much less noisy is the gradient estimate than that of uniform pruning?"
    reading = (
        "tr Var = (1/N^2) sum |g_i|^2 (1/p_i - 1) with exact gradient norms |g_i| (all parameters) of the measured "
        "examples as the whole data set, over the same for uniform probabilities and as many examples kept: 1 is "
        "uniform pruning, lower is better, and the exact norms' own probabilities without smoothing are the least "
        "possible (in the plots, the exact norm's line in the first panel). A stale score was taken on the weights of "
        "earlier epochs of the same training: in use, an example's score is as old as its last draw. ε-greedy trains "
        "without weights: this is its variance if it had them. Values worse than any plot shows are in the JSON file."
    )

    trains_cells = False

    def requests(self, plan: Plan) -> int:
        return len(plan.seeds)

    def collect(self, runs: Runs) -> dict[str, Any]:
        plan, files, rows = runs.plan, Files(), []
        for seed in plan.seeds:
            file = files.take(runs.trajectory(seed), f"scores, seed {seed}")
            runs.display.advance()
            if file:
                rows += [
                    {"seed": seed, **row}
                    for row in _rows(
                        file["snapshots"], shown_epochs(plan.base.epochs), plan.ratios, plan.base.smoothing
                    )
                ]
        return {**files.header(self.name, plan), "variances": rows}

    def plots(self, result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
        rows, settings = result["variances"], result["settings"]
        base, seeds = settings["base"], sorted({row["seed"] for row in rows})
        ratio, last, policy = _middle(settings["ratios"]), max(row["epoch"] for row in rows), base["policy"]
        smoothed = f"'{policy}' with smoothing {base['smoothing']:g}"
        figure, axes = panels(2, 2, 12, 8.4)

        def over(panel: Any, key: str, places: list[Any], x: list[float], scores: list[str], **where: Any) -> None:
            for score in scores:
                by_seed = [
                    [_value(rows, **{**where, key: at}, score=score, seed=seed) for at in places] for seed in seeds
                ]
                band(panel, x, by_seed, score_style(score))

        every = [*SCORES, EXACT]
        first = ((0, OPTIMUM, "fresh scores, not smoothed"), (1, policy, f"scores one epoch old, {smoothed}"))
        for panel, (age, name, what) in zip(axes[:2], first, strict=True):
            epochs = sorted({row["epoch"] for row in rows if row["age"] == age})
            over(panel, "epoch", epochs, epochs, every, age=age, ratio=ratio, policy=name)
            panel.set(xscale="log", xlabel="Epoch of training (log scale)")
            panel.set_xticks(epochs, [str(epoch) for epoch in epochs])
            panel.minorticks_off()
            panel.set_title(f"Over training, r = {ratio:g}: {what}", fontsize=10)
        by_policy, excess = axes[2:]
        offsets = {score: 0.12 * (i - (len(every) - 1) / 2) for i, score in enumerate(every)}
        for score in every:
            style = {**score_style(score), "linestyle": "none"}
            for age, face in ((0, style["color"]), (1, "white")):
                for i, name in enumerate(POLICIES):
                    values = _values(rows, epoch=last, age=age, ratio=ratio, policy=name, score=score)
                    if values:
                        x, y = i + offsets[score] + 0.03 * (2 * age - 1), [min(v, TOP) for v in values]
                        by_policy.plot([x, x], [min(y), max(y)], color=style["color"], linewidth=1)
                        by_policy.plot([x], [min(mean(values), TOP)], **{**style, "markerfacecolor": face})
        by_policy.set_xticks(range(len(POLICIES)), [_policy_label(name, base["smoothing"]) for name in POLICIES])
        by_policy.set_xlabel("How small probabilities are raised")
        by_policy.set_title(
            f"By policy, after epoch {last}, r = {ratio:g}: filled fresh, hollow one epoch old", fontsize=10
        )
        epochs = sorted({row["epoch"] for row in rows})
        for score in SCORES:
            where = {"age": 0, "ratio": ratio, "policy": OPTIMUM}
            by_seed = [
                [
                    _quotient(
                        _value(rows, epoch=e, seed=seed, score=score, **where),
                        _value(rows, epoch=e, seed=seed, score=EXACT, **where),
                    )
                    for e in epochs
                ]
                for seed in seeds
            ]
            band(excess, epochs, by_seed, score_style(score))
        excess.set(xscale="log", xlabel="Epoch of training (log scale)", ylabel="Variance / least possible")
        excess.set_xticks(epochs, [str(epoch) for epoch in epochs])
        excess.minorticks_off()
        excess.axhline(1, color="black", linewidth=1)
        excess.set_ylim(0.98, min(excess.get_ylim()[1], 3.0))
        excess.set_title(f"What a score costs, r = {ratio:g}: fresh, not smoothed, over exact norms", fontsize=10)
        shown = [y for panel in axes[:3] for line in panel.lines for y in line.get_ydata() if y > 0]
        for panel in axes[:3]:
            panel.axhline(1, color="#555555", linewidth=1, linestyle="--", label="uniform pruning")
            panel.set(yscale="log", ylabel="Variance / that of uniform pruning")
            panel.set_ylim(max(min(shown) / 1.5, 1e-6), min(TOP, max(1.0, *shown) * 1.5))
        legend_below(figure, axes[0])
        figure.suptitle(
            f"Variance of the pruned gradient, from exact norms of {measured_examples(result)} examples "
            f"({seeds_text(len(seeds))})\n{title(result)}"
        )
        return [(save(figure, folder / "variance.png"), self.question)]

    def tables(self, result: dict[str, Any]) -> list[Table]:
        rows, settings = result["variances"], result["settings"]
        base = settings["base"]
        ratio, last = _middle(settings["ratios"]), max(row["epoch"] for row in rows)
        ages = [age for age in AGES if any(row["age"] == age and row["epoch"] == last for row in rows)]
        return [
            Table(
                f"Variance over that of uniform pruning, after epoch {last}, r = {ratio:g} (± is the seeds' deviation)",
                ("policy, age of scores", *(SCORE_LABELS[score] for score in (*SCORES, EXACT))),
                [
                    (
                        f"{POLICIES[policy]}, {_age(age)}",
                        *(
                            _text(_values(rows, epoch=last, age=age, ratio=ratio, policy=policy, score=score))
                            for score in (*SCORES, EXACT)
                        ),
                    )
                    for policy in POLICIES
                    for age in ages
                ],
                f"Smoothing {settings['base']['smoothing']:g} where smoothed; uniform pruning is 1.",
            ),
            Table(
                f"The same by ratio, {_policy_label(base['policy'], base['smoothing'])}",
                ("ratio, age of scores", *(SCORE_LABELS[score] for score in (*SCORES, EXACT))),
                [
                    (
                        f"r = {each:g}, {_age(age)}",
                        *(
                            _text(_values(rows, epoch=last, age=age, ratio=each, policy=base["policy"], score=score))
                            for score in (*SCORES, EXACT)
                        ),
                    )
                    for each in settings["ratios"]
                    for age in ages
                ],
            ),
        ]


def _rows(
    snapshots: list[dict[str, Any]], shown: list[int], ratios: tuple[float, ...], smoothing: float
) -> list[dict[str, Any]]:
    values = {
        snapshot["epoch"]: {
            name: torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
            for name, values in snapshot["values"].items()
        }
        for snapshot in snapshots
    }
    return [
        {
            "epoch": epoch,
            "age": age,
            "ratio": ratio,
            "variance": {
                policy: {
                    score: short(estimator_variance(old[score], values[epoch][EXACT], ratio, policy, smoothing))
                    for score in (*SCORES, EXACT)
                }
                for policy in POLICIES
            },
        }
        for epoch in shown
        for age in AGES
        if (old := values.get(epoch - age))
        for ratio in ratios
    ]


def _values(rows: list[dict[str, Any]], policy: str, score: str, **where: Any) -> list[float]:
    found = [row["variance"][policy][score] for row in rows if all(row[key] == value for key, value in where.items())]
    return known(found)


def _value(rows: list[dict[str, Any]], **where: Any) -> float | None:
    found = _values(rows, **where)
    return found[0] if found else None


def _quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _middle(ratios: list[float]) -> float:
    return sorted(ratios)[len(ratios) // 2]


def _policy_label(policy: str, smoothing: float) -> str:
    return f"{POLICIES[policy]}, {smoothing:g}" if policy in ("mix", "floor") else POLICIES[policy]


def _age(age: int) -> str:
    return "fresh" if age == 0 else f"{age} epoch{'s' if age > 1 else ''} old"


def _text(values: list[float]) -> str:
    return f"{mean(values):.1e}" if values and mean(values) > 1000 else spread(values, 3)
