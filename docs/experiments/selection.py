"""Ways to select that did not earn a setting: each is a patch of the training that `sadp-fast train` runs.

    python docs/experiments/selection.py --data-dir DIR --out OUT                  # CIFAR-10 on a GPU: 20 s a run
    python docs/experiments/selection.py --dataset digits --model conv --out OUT   # to see it work

Runs every way, or those that `--ways` names with semicolons between them, with every seed, writes OUT/NAME-sSEED.json
after each, skips what is there, and draws OUT/selection.png and OUT/selection.json of all that is there: one setting's
runs. Processes may share OUT if each takes its own --seeds.
docs/findings.md says what was seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sadp_fast.lab import data, options, report
from sadp_fast.lab.figures import one_line_each, save, spread
from sadp_fast.lab.methods import METHODS
from sadp_fast.lab.settings import TrainConfig
from sadp_fast.lab.study.store import environment
from sadp_fast.lab.train import EVALUATION_BATCH, Trainer, train_epoch
from sadp_fast.nn.node import reset
from sadp_fast.prune import epoch as drawing
from sadp_fast.prune.baselines import el2n_score
from sadp_fast.prune.policies import POLICIES, Policy
from sadp_fast.prune.scores import AllLayers


def before_each_draw(trainer: Trainer, action: Callable[[int], None]) -> None:
    """Call `action` with the epoch, counted from 0, before its subset is drawn."""
    sadp, open_epoch = trainer.sadp, trainer.sadp.open_epoch

    def opened(*arguments: Any, **options: Any) -> Any:
        action(sadp.epoch)
        return open_epoch(*arguments, **options)

    sadp.open_epoch = opened  # type: ignore[method-assign]


def with_settings(trainer: Trainer, epochs: range, **changes: Any) -> None:
    """Change settings in these epochs alone."""
    own = trainer.sadp.settings
    changed = replace(own, **changes)

    def choose(epoch: int) -> None:
        trainer.sadp.settings = changed if epoch in epochs else own

    before_each_draw(trainer, choose)


def uniform(trainer: Trainer, epochs: range) -> None:
    """Draw uniformly in these epochs, by the scores in the others."""
    with_settings(trainer, epochs, smoothing=1.0)


def weighted(trainer: Trainer, epochs: range) -> None:
    """Unbiased weights in these epochs, none in the others."""
    with_settings(trainer, epochs, weights="unbiased")


def refreshed(trainer: Trainer) -> None:
    """EL2N of all examples from a forward pass, not augmented and in evaluation mode, before every draw."""

    @torch.no_grad()
    def refresh(epoch: int) -> None:
        trainer.model.eval()
        images, labels = trainer.data.train_images, trainer.data.train_labels
        for start in range(0, len(labels), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            trainer.sadp.scores[part] = el2n_score(trainer.forward(images[part]), labels[part])
            reset(trainer.model)
        trainer.model.train()

    before_each_draw(trainer, refresh)


def evenly_spaced(trainer: Trainer) -> None:
    """Systematic sampling over the epochs: an example drawn with p returns after 1 / p of them, not at random times.

    The example's phase, uniform at first, rises by p in every epoch, and the example is drawn when it passes 1: with
    probability p in each epoch, as in independent draws, but the number of its draws never strays by more than one.
    """
    count, device = trainer.sadp.num_examples, trainer.device
    phase = torch.rand(count, generator=torch.Generator().manual_seed(trainer.config.seed)).to(device)

    def sample(p: Tensor, *, seed: int, epoch: int) -> tuple[Tensor, Tensor, int]:
        phase.add_(p)
        indices = (phase >= 1).nonzero().squeeze(1)
        phase[indices] -= 1
        return indices, torch.ones(len(indices), device=device), len(indices)  # for weights "none"

    drawing.sample = sample  # type: ignore[assignment]


class LayersAlike(AllLayers):
    """Each layer's part of the bound is divided by its mean over the batch, so that no layer outweighs another."""

    name = "layers alike"

    def of_energies(self, inputs: Tensor, deltas: Tensor, multiplicity: Tensor) -> Tensor:
        bound = inputs.float().sqrt() * deltas.float().sqrt()
        return torch.linalg.vector_norm(bound / bound.nan_to_num(0, 0, 0).mean(1, keepdim=True), dim=0)


def layers_alike(trainer: Trainer) -> None:
    """Score by `LayersAlike`."""
    trainer.sadp.scoring.score = LayersAlike()


class Changed(Policy):
    """Draw by scores that are changed before they become probabilities; those that are kept stay as they were."""

    name = "changed"

    def __init__(self, policy: Policy, change: Callable[[Tensor], Tensor]) -> None:
        self.policy, self.change = policy, change

    def probabilities(self, scores: Tensor, keep: float, smoothing: float) -> Tensor:
        return self.policy.probabilities(self.change(scores), keep, smoothing)


def with_scores(trainer: Trainer, change: Callable[[Tensor], Tensor]) -> None:
    """Draw by changed scores."""
    settings = trainer.sadp.settings
    trainer.sadp.settings = replace(settings, policy=Changed(POLICIES.find(settings.policy), change))


def hardest_as_easiest(scores: Tensor, share: float) -> Tensor:
    """The highest share of the scores becomes the lowest one: what is too hard, or wrongly labelled, is left out."""
    limit = scores.nanquantile(1 - share)
    return torch.where(scores > limit, scores.nan_to_num(torch.inf).amin(), scores)


def ways(epochs: int) -> dict[str, tuple[str, Callable[[Trainer], None]]]:
    """By name: the variant of a method, and the patch."""
    half, last = epochs // 2, max(1, round(0.2 * epochs))
    return {
        "full data": ("full", lambda trainer: None),
        "SADP": ("sadp", lambda trainer: None),
        "SADP, evenly spaced in time": ("sadp", evenly_spaced),
        "random": ("random", lambda trainer: None),
        "random, evenly spaced in time": ("random", evenly_spaced),
        "SADP, uniform in the first half": ("sadp", lambda trainer: uniform(trainer, range(half))),
        "SADP, uniform in the second half": ("sadp", lambda trainer: uniform(trainer, range(half, epochs))),
        f"SADP, weighted in the last {last} epochs": (
            "sadp",
            lambda trainer: weighted(trainer, range(epochs - last, epochs)),
        ),
        "SADP, layers alike": ("sadp", layers_alike),
        **{
            f"SADP, without the hardest {share:.0%}": (
                "sadp",
                lambda trainer, share=share: with_scores(trainer, lambda scores: hardest_as_easiest(scores, share)),
            )
            for share in (0.05, 0.2)
        },
        "SADP, easy ones preferred": (
            "sadp",
            lambda trainer: with_scores(trainer, lambda scores: 1 / scores.clamp(min=1e-12)),
        ),
        "EL2N": ("el2n", lambda trainer: None),
        "EL2N, all refreshed every epoch": ("el2n", refreshed),
    }


def train(config: TrainConfig, dataset: data.Dataset, patch: Callable[[Trainer], None]) -> dict[str, Any]:
    """One run; what was put in a module's place is taken back."""
    kept = drawing.sample
    try:
        trainer = Trainer(config, dataset)
        patch(trainer)
        return trained(trainer)
    finally:
        drawing.sample = kept


def trained(trainer: Trainer) -> dict[str, Any]:
    """What comes of all epochs."""
    start = trainer.clock()
    losses = [train_epoch(trainer, ()).read() for _ in range(trainer.config.epochs)]
    seconds = trainer.clock() - start
    accuracy, loss = trainer.evaluate()
    return {"test_accuracy": accuracy, "test_loss": loss, "losses": losses, "seconds": seconds}


def one_setting(configs: dict[str, dict[str, Any]]) -> None:
    """Exit where configurations, by where they stand, differ in more than seed, device and what methods change."""
    known: dict[str, tuple[str, Any]] = {}
    for where, config in configs.items():
        own = {"seed", "device", "method", *METHODS[config["method"]].settings}
        for key, value in config.items():
            first, other = (where, value) if key in own else known.setdefault(key, (where, value))
            if value != other:
                sys.exit(f"{key} is {value!r} in {where}, but {other!r} in {first}: name another folder with --out")


def runs_in(out: Path) -> dict[str, dict[str, Any]]:
    """All runs that are there, by their files."""
    return {str(path): json.loads(path.read_text()) for path in sorted(out.glob("*-s*.json"))}


def show(out: Path, data_set: str) -> None:
    """Table, plot and JSON of all runs that are there."""
    found = runs_in(out)
    one_setting({path: run["config"] for path, run in found.items()})
    runs = list(found.values())
    names = [name for name in ways(runs[0]["config"]["epochs"]) if any(run["name"] == name for run in runs)]
    report.write_json({"runs": runs}, out / "selection.json", indent=1)
    lines = []
    for name in names:
        own = [run for run in runs if run["name"] == name]
        lines.append((name, [100 * run["test_accuracy"] for run in own], "#0072B2"))
        seconds = spread((run["seconds"] for run in own), 1)
        print(f"{name:36} {len(own)} seeds  {spread(lines[-1][1], 2)} %  {seconds} s")
    figure, panel = one_line_each(lines)
    panel.set_xlabel("Test accuracy after the last epoch (%)")
    config, device = runs[0]["config"], runs[0]["device"]
    panel.set_title(
        f"Ways to select half of the data: each seed, mean and range\n{data_set}, {config['model']}, "
        f"{config['epochs']} epochs ({device})",
        fontsize=10,
    )
    print(save(figure, out / "selection.png"))


def options_of(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """What this script and others ask for, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir")
    parser.add_argument("--model", default="sew_resnet18")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(**defaults)
    return parser


def begin(given: argparse.Namespace, runs: dict[str, Any], **settings: Any) -> tuple[TrainConfig, data.Dataset]:
    """What is asked for, with these settings, and its data; exits where runs, by their files, are of other settings."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = {**{key: vars(given)[key] for key in ("dataset", "model", "epochs")}, "device": device, **settings}
    base = TrainConfig(**options.with_defaults(asked, given.data_dir))
    one_setting({"what is asked for": vars(base), **{path: run["config"] for path, run in runs.items()}})
    return base, data.load(given.dataset, given.data_dir)


def kept(path: Path, name: str, config: TrainConfig, train: Callable[[], dict[str, Any]]) -> bool:
    """Whether the run had to be made; its file is there in any case."""
    if path.exists():
        return False
    run = {"name": name, "config": vars(config), **environment(config.device), **train()}
    report.write_json(run, path, indent=1)
    return True


def main() -> None:
    parser = options_of(__doc__, epochs=16)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--ways", help="names, with semicolons between them (default: all)")
    given = parser.parse_args()
    chosen = ways(given.epochs)
    if given.ways is not None:
        if unknown := set(given.ways.split(";")) - set(chosen):
            parser.error(f"--ways: there is no {', '.join(sorted(unknown))}; there are {'; '.join(chosen)}")
        chosen = {name: chosen[name] for name in given.ways.split(";")}
    batch_size = {} if given.batch_size is None else {"batch_size": given.batch_size}
    # Without cutout, as the runs of the findings: it became CIFAR's default after them.
    base, dataset = begin(given, runs_in(given.out), cutout=0, **batch_size)
    for seed in map(int, given.seeds.split(",")):
        for name, (variant, patch) in chosen.items():
            path = given.out / f"{name.replace(' ', '_').replace(',', '')}-s{seed}.json"
            config, start = replace(base, seed=seed).of(variant), time.monotonic()
            if kept(path, name, config, partial(train, config, dataset, patch)):
                accuracy = json.loads(path.read_text())["test_accuracy"]
                print(f"{name}, seed {seed}: {100 * accuracy:.2f} %, {time.monotonic() - start:.0f} s")
    show(given.out, dataset.name)


if __name__ == "__main__":
    main()
