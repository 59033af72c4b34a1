"""How SADP prunes: its settings, each with its default, its choices and one sentence of help."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

from ..errors import check_choice
from . import baselines as _baselines  # noqa: F401  (adds its scores and policies)
from .policies import POLICIES, Policy
from .probabilities import check_smoothing
from .schedule import SCHEDULES, prune_ratios
from .scores import SCORES, Score

WEIGHTS = ("unbiased", "sum", "none")
_WARMUP_FRACTION = 0.05  # of the epochs, on full data [ours]: scores need a first pass over the data


_BELOW_ONE = lambda value: 0 <= value < 1, "at least 0 and below 1"
_SHARE = lambda value: 0 <= value <= 1, "between 0 and 1"
_NATURAL = lambda value: 0 <= value < 2**63, "a whole number of at least 0"


def _help(text: str, **more: Any) -> dict[str, Any]:
    """A field's metadata: "help"; what it may be, "choices" or "range"; and how a command's help shows it."""
    return {"help": text, **more}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How SADP prunes. A field's metadata says what it is and what it may be: see ``_help``.

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

    prune_ratio: float = field(
        default=0.5,
        metadata=_help("mean share of examples left out, [0, 1); 0: full data only", range=_BELOW_ONE, metavar="R"),
    )
    score: str | Score = field(default="all", metadata=_help("importance of an example", choices=SCORES))
    policy: str | Policy = field(
        default="mix", metadata=_help("how scores become probabilities", choices=POLICIES, metavar="NAME")
    )
    smoothing: float = field(
        default=0.3,
        metadata=_help(
            "how far small probabilities are raised, 0 to 1; epsilon of epsilon_greedy", range=_SHARE, metavar="C"
        ),
    )
    weights: str | None = field(
        default=None,
        metadata=_help("weights of the losses", choices=WEIGHTS, shown="sum for the policy infobatch, else none"),
    )
    score_momentum: float = field(
        default=0.0, metadata=_help("how much of an old score is kept", range=_BELOW_ONE, metavar="M")
    )
    schedule: str = field(default="constant", metadata=_help("the ratio's course over the epochs", choices=SCHEDULES))
    warmup_epochs: int | None = field(
        default=None,
        metadata=_help("full-data epochs at the start", range=_NATURAL, metavar="N", shown="by --epochs"),
    )
    tail_epochs: int | None = field(
        default=None,
        metadata=_help(
            "full-data epochs at the end",
            range=_NATURAL,
            metavar="N",
            shown="an eighth of them for the policy infobatch, else 0",
        ),
    )
    seed: int = field(default=0, metadata=_help("of the draws and the order of the batches"))

    def __post_init__(self) -> None:
        if not isinstance(self.prune_ratio, Real) or not 0 <= self.prune_ratio < 1:
            raise ValueError(f"prune_ratio must be a number in [0, 1), got {self.prune_ratio!r}: 0.5 leaves out half")
        for name in ("warmup_epochs", "tail_epochs"):
            if not isinstance(getattr(self, name), (Integral, type(None))):
                value = getattr(self, name)
                raise TypeError(f"{name} must be an integer or None, got {value!r}: pass a number of epochs")
        if not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be an integer in [0, 2**64), got {self.seed!r}")
        SCORES.find(self.score)
        POLICIES.find(self.policy)
        check_smoothing(self.smoothing)
        check_choice("weights", self.weights, (*WEIGHTS, None))
        check_choice("schedule", self.schedule, SCHEDULES)
        if not 0 <= self.score_momentum < 1:
            raise ValueError(
                f"score_momentum must be in [0, 1), got {self.score_momentum}: 0 keeps the newest score alone"
            )
        # NumPy's numbers overflow where Python's do not, and cannot be loaded from a checkpoint.
        kinds: dict[str, type] = dict.fromkeys(("prune_ratio", "smoothing", "score_momentum"), float)
        kinds |= dict.fromkeys(("warmup_epochs", "tail_epochs", "seed"), int)
        for name, kind in kinds.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))

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
        settled = self.settled(epochs)
        return prune_ratios(
            self.prune_ratio,
            epochs,
            schedule=self.schedule,
            warmup_epochs=settled.warmup_epochs,  # type: ignore[arg-type]
            tail_epochs=settled.tail_epochs,  # type: ignore[arg-type]
        )

    def plain(self) -> dict[str, Any]:
        """The settings as words and numbers: an object of a user's own by its name."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(Settings)}
        return {**values, "score": SCORES.find(self.score).name, "policy": POLICIES.find(self.policy).name}
