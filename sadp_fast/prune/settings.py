"""How SADP prunes: its settings, each with its default, its choices and one sentence of help."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

from ..errors import check_choice
from . import baselines as _baselines  # noqa: F401  (adds its scores and policies)
from .policies import POLICIES, Policy
from .schedule import SCHEDULES, prune_ratios
from .scores import SCORES, Score

WEIGHTS = ("unbiased", "sum", "none")
_WARMUP_FRACTION = 0.05  # of the epochs, on full data [ours]: scores need a first pass over the data


_BELOW_ONE = lambda value: 0 <= value < 1, "a number in [0, 1)"
_SHARE = lambda value: 0 <= value <= 1, "between 0 and 1"
_NATURAL = lambda value: 0 <= value < 2**63, "a whole number of at least 0"
_SEED = lambda value: 0 <= value < 2**64, "an integer in [0, 2**64)"


def setting(default: Any, help: str, **more: Any) -> Any:
    """A field with a default and, as metadata, what checks it and what an option of a command needs.

    Args:
        help: what it is; "" where its choices say all.
        read: what reads it from text.
        range: in its place, for a number: a condition, and what it requires in words.
        choices: the words that it may be.
        metavar: what its value is called; with choices, these are listed in the help.
        shown: the default in the help's words; "" says nothing of it.
    """
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How SADP prunes. A field's metadata says what it is and what it may be: see ``setting``.

    Attributes:
        prune_ratio: r in [0, 1), the mean share of examples left out per epoch, full-data epochs included. 0 is
            ordinary training: batches, losses and model are left exactly as they are.
        score: "all": the spike-aware bound over all weight layers [form ours]; "last": over the last weight layer
            alone; "loss"; "el2n"; "given": by the loop, see ``SADP.give``; "random": every example alike, another
            subset each epoch (dynamic random pruning); "static_random": one such subset for all pruned epochs, smaller
            ones being part of larger ones. Or an object of your own, see ``Score``.
        policy: see ``inclusion_probabilities``; a name, or an object of your own, see ``Policy``.
        smoothing: see ``inclusion_probabilities``.
        weights: of the losses. "none": 1; "unbiased": m / (N p_i), mean 1 [mean: ours]; "sum": 1 / p_i, mean N / m, so
            that the gradients of an epoch sum up to those of the whole data set, as if the learning rate rose where an
            epoch is shorter. None is the policy's own: "sum" for "infobatch", else "none".
        score_momentum: in [0, 1). An example's score becomes score_momentum * old + (1 - score_momentum) * new where
            it was scored before.
        schedule: see ``prune_ratios``.
        warmup_epochs: full-data epochs at the start; None means 5 % of the epochs, at least one [ours].
        tail_epochs: full-data epochs at the end; None is the policy's own: 12.5 % for "infobatch" [its paper], else
            none.
        seed: of the draws and the order of the batches; the same on every device.

    Raises:
        TypeError: a number of epochs that is none; a score or a policy that is none.
        ValueError: a value that is out of its range.
    """

    prune_ratio: float = setting(
        0.5, "mean share of examples left out, [0, 1); 0: full data only", range=_BELOW_ONE, metavar="R"
    )
    score: str | Score = setting("all", "importance of an example", choices=SCORES)  # noqa: RUF009
    policy: str | Policy = setting("mix", "how scores become probabilities", choices=POLICIES, metavar="NAME")  # noqa: RUF009
    smoothing: float = setting(
        0.3, "how far small probabilities are raised, 0 to 1; epsilon of epsilon_greedy", range=_SHARE, metavar="C"
    )
    weights: str | None = setting(
        None, "weights of the losses", choices=WEIGHTS, shown="sum for the policy infobatch, else none"
    )
    score_momentum: float = setting(0.0, "how much of an old score is kept", range=_BELOW_ONE, metavar="M")
    schedule: str = setting("constant", "the ratio's course over the epochs", choices=SCHEDULES)
    warmup_epochs: int | None = setting(
        None, "full-data epochs at the start", range=_NATURAL, metavar="N", shown="by --epochs"
    )
    tail_epochs: int | None = setting(
        None,
        "full-data epochs at the end",
        range=_NATURAL,
        metavar="N",
        shown="an eighth of them for the policy infobatch, else 0",
    )
    seed: int = setting(0, "of the draws and the order of the batches", range=_SEED)

    def __post_init__(self) -> None:
        for each in fields(Settings):
            value = getattr(self, each.name)
            if "range" not in each.metadata or (value is None and each.default is None):
                continue
            kind: Any = float if "float" in str(each.type) else int
            kinds = {float: Real, int: Integral}[kind]
            if each.default is None and not isinstance(value, kinds):
                raise TypeError(f"{each.name} must be an integer or None, got {value!r}: pass a number of epochs")
            allowed, requirement = each.metadata["range"]
            if not isinstance(value, kinds) or not allowed(value):
                told = each.metadata["help"]
                raise ValueError(f"{each.name} must be {requirement}, got {value!r} ({told}): pass such a value")
            # NumPy's numbers overflow where Python's do not, and cannot be loaded from a checkpoint.
            object.__setattr__(self, each.name, kind(value))
        SCORES.find(self.score)
        POLICIES.find(self.policy)
        check_choice("weights", self.weights, (*WEIGHTS, None))
        check_choice("schedule", self.schedule, SCHEDULES)

    def settled(self, epochs: int) -> Settings:
        """The same settings for a training of so many epochs: nothing is None any more."""
        policy = POLICIES.find(self.policy)
        defaults: dict[str, Any] = {
            "weights": policy.weights,
            "warmup_epochs": max(1, round(_WARMUP_FRACTION * epochs)),
            "tail_epochs": round(policy.tail * epochs),
        }
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def ratios(self, epochs: int) -> list[float]:
        """The prune ratio of each epoch, see ``prune_ratios``."""
        settled: Any = self.settled(epochs)
        full_data = {"warmup_epochs": settled.warmup_epochs, "tail_epochs": settled.tail_epochs}
        return prune_ratios(self.prune_ratio, epochs, schedule=self.schedule, **full_data)

    def plain(self) -> dict[str, Any]:
        """The settings as words and numbers: an object of a user's own by its name."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(Settings)}
        return {**values, "score": SCORES.find(self.score).name, "policy": POLICIES.find(self.policy).name}
