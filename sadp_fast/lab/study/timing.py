"""How close the time of pruned training comes to 1 - r, and where the rest goes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ...prune.batching import Drawn, pack, shuffled
from ...prune.sampling import sample
from .. import data, report, train
from ..config import TrainConfig
from .figures import Table, legend_below, mean, panels, save, seeds_text, spread
from .plan import Plan
from .runs import Runs
from .study import Files, Study, title
from .training_runs import RUN, labels, training_runs

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
    own = train.Trainer(config, dataset)
    trainers = {
        "full_step": train.Trainer(config.of("full"), dataset),
        "weighted_step": train.Trainer(config.of("random"), dataset),
        "scored_step": own,
    }
    for trainer in trainers.values():
        trainer.throw_away_steps()
    count = len(dataset.train_labels)
    # As many distinct values as in training; the solver's time does not depend on what they are.
    own.sadp.scores.copy_(torch.rand(count, generator=torch.Generator().manual_seed(0)))
    times: dict[str, list[float]] = {name: [] for name in (*trainers, "begin", "drawing")}
    for _ in range(REPEATS):
        for name, trainer in trainers.items():  # in turn, so that a machine that slows down slows all alike
            begin, step = _epoch(trainer, config, steps)
            times[name].append(step)
            if trainer is own:
                times["begin"].append(begin)
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
    ratios = trainer.sadp.ratios
    trainer.sadp.skip_to(next((epoch for epoch, ratio in enumerate(ratios) if ratio > 0), 0))
    trainer.model.train()
    done, start = 0, trainer.clock()
    first = start
    with closing(trainer.sadp.batches(config.batch_size)) as batches:
        for index in batches:
            if done == 0:
                drawn = trainer.clock()
            if done == 1:  # the first step of an epoch sets hooks up and may record a graph
                first = trainer.clock()
            trainer.step(index, 0.0)
            done += 1
            if done > steps:
                break
        end = trainer.clock()
    return drawn - start, (end - first) / (done - 1) if done > 1 else end - drawn


class Time(Study):
    name = "time"
    paper = "Fig. 3"
    question = "How close does the time ratio come to 1 - r, and where does the rest go?"
    reading = (
        "Time ratio: training seconds over those of full-data training (mean over seeds, same device). The theoretical "
        "minimum is the share of examples kept. Parts are timed apart from training: single steps without weights, "
        "with weights and with scores, in turn, at one of the ratios, and what is done once an epoch; steps "
        "count by the number that a ratio keeps. What they do not explain of the measured ratio is what timings of "
        "whole trainings vary by, and work at the border between epochs. Parts are of pruned epochs; in full-data "
        "epochs only scoring is done."
    )

    def requests(self, plan: Plan) -> int:
        return len(plan.cells()) * len(plan.seeds) + len(plan.pruned())

    def collect(self, runs: Runs) -> dict[str, Any]:
        plan, files = runs.plan, Files()
        trained = training_runs(runs, files)
        ratios, parts = [{key: row[key] for key in RUN} for row in trained], []
        for method in plan.pruned():
            file = runs.timing(method, lambda config, data: measure_parts(config, data, plan.size.timed_steps))
            files.take(file, f"timing of {method}")
            runs.display.advance()
            for ratio in plan.ratios if file else ():
                where = {"method": method, "ratio": ratio, "device": file["device"]}  # type: ignore[index]
                epochs = plan.config(method, ratio, 0).epochs / plan.base.epochs
                shares = _shares(file["timing"], ratio)  # type: ignore[index]
                parts.append({**where, **{part: epochs * share for part, share in shares.items()}})
        return {**files.header(self.name, plan), "time_ratios": ratios, "overheads": parts}

    def plots(self, result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
        figure, (ratios, parts) = panels(1, 2, 13, 5.4)
        rows = [r for r in result["time_ratios"] if r["method"] != "full" and r["time_ratio"] is not None]
        ratios.plot([0, 1], [0, 1], "--", color="#555555", linewidth=1.2, label="theoretical minimum, 1 - r")
        counts = {0}
        names, looks = labels(result), report.styles(result["settings"]["methods"])
        for method in result["settings"]["methods"]:
            points = []
            for share in sorted({r["planned_share"] for r in rows if r["method"] == method}):
                values = [r["time_ratio"] for r in rows if r["method"] == method and r["planned_share"] == share]
                counts.add(len(values))
                points.append((share, mean(values)))
                colour = looks[method]["color"]
                ratios.plot([share] * 2, [min(values), max(values)], color=colour, linewidth=2.5, alpha=0.5)
            if points:
                ratios.plot(*zip(*points, strict=True), **looks[method], label=names[method])
        ratios.set(
            xlabel="1 - r (planned share of full training's examples)", ylabel="Training time / that of full data"
        )
        top = 1.08 * max([1.0, *(r["time_ratio"] for r in rows)])
        ratios.set(xlim=(0, 1.02), ylim=(0, top))
        legend_below(figure, ratios)
        ratios.set_title(f"Whole trainings: {seeds_text(max(counts))}", fontsize=10)
        self._bars(parts, result)
        figure.suptitle(f"Time of pruned training\n{title(result)}")
        return [(save(figure, folder / "time.png"), self.question)]

    @staticmethod
    def _bars(panel: Any, result: dict[str, Any]) -> None:
        rows, names, ticks = result["overheads"], labels(result), []
        for i, row in enumerate(rows):
            low, high = 0.0, 0.0  # what saves time by noise hangs below zero
            for part, (_, colour) in PARTS.items():
                share = 100 * row[part]
                panel.bar(i, share, 0.7, bottom=high if share >= 0 else low, color=colour)
                high, low = high + max(share, 0.0), low + min(share, 0.0)
            whole = [
                100 * (r["time_ratio"] - r["examples_share"])
                for r in result["time_ratios"]
                if (r["method"], r["ratio"]) == (row["method"], row["ratio"]) and r["time_ratio"] is not None
            ]
            if whole:
                panel.plot([i, i], [min(whole), max(whole)], color="black", linewidth=1)
                panel.plot(i, mean(whole), "D", color="black", markersize=4)
            ticks.append(f"{names[row['method']]}\nr = {row['ratio']:g}")
        panel.axhline(0, color="#555555", linewidth=0.8)
        for name, colour in PARTS.values():
            panel.bar([0], [0], color=colour, label=name)
        measured = "whole trainings (mean and range): time ratio - share of examples"
        panel.plot([], [], "D", color="black", markersize=4, label=measured)
        panel.set_xticks(range(len(rows)), ticks, fontsize=8, rotation=90 if len(rows) > 6 else 0)
        panel.set_ylabel("Overhead (% of a full-data training's time)")
        panel.legend(loc="upper right", frameon=False, fontsize=8)
        low, high = panel.get_ylim()
        panel.set_ylim(low, high + 0.35 * (high - low))
        panel.set_title("Overhead beyond the share of examples", fontsize=10)

    def tables(self, result: dict[str, Any]) -> list[Table]:
        overheads = {(r["method"], r["ratio"]): r for r in result["overheads"]}
        lines, names = [], labels(result)
        cells = {(r["method"], r["ratio"]): None for r in result["time_ratios"]}
        for method, ratio in cells:
            own = [r for r in result["time_ratios"] if (r["method"], r["ratio"]) == (method, ratio)]
            parts = overheads.get((method, ratio), {})
            lines.append(
                (
                    names[method],
                    f"{own[0]['planned_share']:g}",
                    f"{mean(r['examples_share'] for r in own):.3f}",
                    spread((r["time_ratio"] for r in own), 3),
                    *(f"{100 * parts[part]:.1f}" if part in parts else "-" for part in PARTS),
                )
            )
        parts_names = tuple(f"{name} (%)" for name, _ in PARTS.values())
        return [
            Table(
                "Training time over that of full data, and overheads in % of a full-data training",
                ("method", "1 - r", "share of examples", "time ratio", *parts_names),
                lines,
                "± is the standard deviation over the seeds. Overheads within a few tenths are noise of the timing.",
            )
        ]


def _shares(timing: dict[str, Any], ratio: float) -> dict[str, float]:
    """Every part's seconds in an epoch of (1 - ratio) of the steps, as shares of a full-data epoch's seconds."""
    epoch, kept = timing["full_step"] * timing["steps"], (1 - ratio) * timing["steps"]
    return {
        "weights": (timing["weighted_step"] - timing["full_step"]) * kept / epoch,
        "scoring": (timing["scored_step"] - timing["weighted_step"]) * kept / epoch,
        "selection": timing["selection"] / epoch,
        "drawing": timing["drawing"] / epoch,
    }
