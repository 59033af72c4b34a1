"""How close the time of pruned training comes to 1 - r, and where the rest goes.

Time ratio: training seconds over those of full-data training (mean over seeds, same device). The theoretical minimum is
the share of examples kept. Parts are timed apart from training: single steps without weights, with weights and with
scores, in turn, at one of the ratios, and what is done once an epoch; steps count by the number that a ratio keeps.
What they do not explain of the measured ratio is what timings of whole trainings vary by, and work at the border
between epochs. Parts are of pruned epochs; in full-data epochs only scoring is done.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import torch

from ...prune.batching import Drawn, pack, shuffled
from ...prune.sampling import sample
from .. import data, train
from ..figures import GREY, Row, Table, by_value, legend_below, mean, optional, panels, ranges, spread
from ..settings import TrainConfig
from . import study
from .plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUESTION = "How close does the time ratio come to 1 - r, and where does the rest go?"
REPEATS = 5
# Parts of an epoch beyond its share of a full-data epoch, with colours; from below.
PARTS = {
    "weights": ("weighting the losses", "#56B4E9"),
    "scoring": ("scoring", "#0072B2"),
    "selection": ("probabilities from scores", "#E69F00"),
    "drawing": ("drawing and cutting batches", "#CC79A7"),
}


def measure_parts(config: TrainConfig, dataset: data.Dataset, steps: int) -> dict[str, Any]:
    """Seconds of one method's parts on this device, the least of `REPEATS` timings each: other work only adds.

    Returns:
        "full_step", "weighted_step" and "scored_step" (one training step on all data, on drawn examples without, and
        with scores), "selection" and "drawing" (of one epoch), "steps" (of a full epoch).
    """
    dataset = dataset.to(config.device)
    configs = {"full_step": config.of("full"), "weighted_step": config.of("random"), "scored_step": config}
    trainers = {name: train.Trainer(each, dataset) for name, each in configs.items()}
    for trainer in trainers.values():
        trainer.throw_away_steps()
    own = trainers["scored_step"]
    count = len(dataset.train_labels)
    # As many distinct values as in training; the solver's time does not depend on what they are.
    own.sadp.scores.copy_(torch.rand(count, generator=torch.Generator().manual_seed(0)))
    times: dict[str, list[float]] = {name: [] for name in (*trainers, "begin", "drawing")}
    for _ in range(REPEATS):
        for name, trainer in trainers.items():  # in turn, so that a machine that slows down slows all alike
            begin, step = _epoch(trainer, config, steps)
            times[name].append(step)
        times["begin"].append(begin)  # the last one's, which is the method's own
        start = own.clock()
        drawn = Drawn(*sample(own.sadp.probabilities, seed=0, epoch=0)[:2])
        nothing = Drawn(drawn.indices[:0], drawn.weights[:0])
        pack(shuffled(drawn, seed=0, epoch=0), nothing, config.batch_size, pad=False)
        times["drawing"].append(own.clock() - start)
    least = {name: min(values) for name, values in times.items()}
    if own.sadp.scoring.score.source == "none":
        least["scored_step"] = least["weighted_step"]  # the same step: what differs is the timing's noise
    selection = max(0.0, least.pop("begin") - least["drawing"])
    return {**least, "selection": selection, "steps": count / config.batch_size}


def _epoch(trainer: train.Trainer, config: TrainConfig, steps: int) -> tuple[float, float]:
    """Seconds until the first pruned epoch's first batch is there, and of one of `steps` training steps."""
    trainer.sadp.skip_to(next((epoch for epoch, ratio in enumerate(trainer.sadp.ratios) if ratio > 0), 0))
    trainer.model.train()
    clocks = [trainer.clock()]  # at the start, with the first batch, and behind its step
    with closing(trainer.sadp.batches(config.batch_size)) as batches:
        for done, index in zip(range(steps + 1), batches, strict=False):
            if done < 2:
                clocks.append(trainer.clock())
            trainer.step(index, 0.0)
        end = trainer.clock()
    # An epoch's first step sets hooks up and may record a graph: it counts only where there is no other.
    return clocks[1] - clocks[0], (end - clocks[-1]) / max(1, done)


def asks(plan: Plan) -> list[study.Ask]:
    """The training runs, and of each method that prunes a timing of its parts."""
    measure = partial(measure_parts, steps=plan.size.timed_steps)
    timings = [study.Ask(f"timing of {m}", methodcaller("timing", m, measure), {"method": m}) for m in plan.pruned()]
    return [*study.training_asks(plan), *timings]


def parts(plan: Plan, found: study.Found) -> dict[str, Any]:
    """Time ratios of the trainings, and what the parts of each method come to at every ratio."""
    trained = study.training_rows(plan, [(ask, file) for ask, file in found if "ratio" in ask.where])
    overheads = []
    for ask, file in found:
        for ratio in plan.ratios if "ratio" not in ask.where else ():
            epochs = plan.config(ask.where["method"], ratio, 0).epochs / plan.base.epochs
            of_parts = {part: epochs * share for part, share in shares(file["timing"], ratio).items()}
            overheads.append({**ask.where, "ratio": ratio, "device": file["device"], **of_parts})
    return {"time_ratios": [{key: row[key] for key in study.RUN} for row in trained], "overheads": overheads}


def shares(timing: dict[str, Any], ratio: float) -> dict[str, float]:
    """Every part's seconds in an epoch of (1 - ratio) of the steps, as shares of a full-data epoch's seconds."""
    epoch, kept = timing["full_step"] * timing["steps"], (1 - ratio) * timing["steps"]
    return {
        "weights": (timing["weighted_step"] - timing["full_step"]) * kept / epoch,
        "scoring": (timing["scored_step"] - timing["weighted_step"]) * kept / epoch,
        "selection": timing["selection"] / epoch,
        "drawing": timing["drawing"] / epoch,
    }


def draw(result: study.Result) -> study.Figures:
    """Time ratios beside their minimum, and what the rest of the time goes to."""
    figure, (ratios, overheads) = panels(1, 2, 13, 5.4)
    rows = [row for row in result["time_ratios"] if row["time_ratio"] is not None]
    looks = study.looks(result)
    ratios.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1.2, label="theoretical minimum, 1 - r")
    most = 0  # seeds
    for method, own in study.by_method(result, rows).items():
        if method != "full":
            points = [(share, [r["time_ratio"] for r in at]) for share, at in by_value(own, "planned_share").items()]
            ranges(ratios, points, looks[method])
            most = max(most, *(len(values) for _, values in points))
    ratios.set(xlabel="1 - r (planned share of full training's examples)", ylabel="Training time / that of full data")
    highest = max([1.0, *(row["time_ratio"] for row in rows if row["method"] != "full")])
    ratios.set(xlim=(0, 1.02), ylim=(0, 1.08 * highest))
    ratios.set_title(f"Whole trainings: {study.seeds_text({most})}", fontsize=10)
    legend_below(figure, ratios)
    _bars(overheads, result["overheads"], rows, looks)
    figure.suptitle(f"Time of pruned training\n{study.title(result)}")
    return [("", figure)]


def _bars(panel: Axes, overheads: list[Row], trained: list[Row], looks: dict[str, dict[str, Any]]) -> None:
    """A bar for each method and ratio of what its parts take, and beside it what whole trainings took."""
    for i, row in enumerate(overheads):
        low, high = 0.0, 0.0  # what saves time by noise hangs below zero
        for part, (_, colour) in PARTS.items():
            share = 100 * row[part]
            panel.bar(i, share, 0.7, bottom=high if share >= 0 else low, color=colour)
            high, low = high + max(share, 0.0), low + min(share, 0.0)
        own = study.select(trained, method=row["method"], ratio=row["ratio"])
        whole = [100 * (r["time_ratio"] - r["examples_share"]) for r in own]
        if whole:
            panel.plot([i, i], [min(whole), max(whole)], color="black", linewidth=1)
            panel.plot(i, mean(whole), "D", color="black", markersize=4)
    panel.axhline(0, color=GREY, linewidth=0.8)
    for name, colour in PARTS.values():
        panel.bar([0], [0], color=colour, label=name)
    measured = "whole trainings (mean and range): time ratio - share of examples"
    panel.plot([], [], "D", color="black", markersize=4, label=measured)
    ticks = [f"{looks[row['method']]['label']}\nr = {row['ratio']:g}" for row in overheads]
    panel.set_xticks(range(len(ticks)), ticks, fontsize=8, rotation=90 if len(ticks) > 6 else 0)
    panel.set_ylabel("Overhead (% of a full-data training's time)")
    panel.legend(loc="upper right", frameon=False, fontsize=8)
    low, high = panel.get_ylim()
    panel.set_ylim(low, high + 0.35 * (high - low))
    panel.set_title("Overhead beyond the share of examples", fontsize=10)


def tables(result: study.Result) -> list[Table]:
    """Time ratios, and what their parts take."""

    def part(name: str, cell: study.Cell) -> str:
        found = study.select(result["overheads"], method=cell.method, ratio=cell.ratio)
        return optional(found[0][name] if found else None, 1, 100)

    rows, order = result["time_ratios"], result["settings"]["methods"]
    cells = sorted(study.by_cell(result, rows), key=lambda cell: (cell.ratio > 0, order.index(cell.method)))
    columns: dict[str, Callable[[study.Cell], str]] = {
        "method": lambda cell: cell.label,
        "1 - r": lambda cell: f"{cell.rows[0]['planned_share']:g}",
        "share of examples": lambda cell: f"{mean(r['examples_share'] for r in cell.rows):.3f}",
        "time ratio": lambda cell: spread((r["time_ratio"] for r in cell.rows), 3),
        **{f"{name} (%)": partial(part, key) for key, (name, _) in PARTS.items()},
    }
    heading = "Training time over that of full data, and overheads in % of a full-data training"
    note = "± is the standard deviation over the seeds. Overheads within a few tenths are noise of the timing."
    return [Table.of(heading, cells, columns, note)]
