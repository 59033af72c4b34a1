"""The methods that are compared: what each is called, how it is drawn, and what it changes. A new one is a record here.

Their papers say what they select and how they weigh it. The smoothing (for InfoBatch its s = 0.5 at the mean, for
epsilon-greedy epsilon) and the momentum are our constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .registry import by_name


@dataclass(frozen=True)
class Method:
    """A way to choose what is trained on.

    Attributes:
        name: in commands and files.
        label: in tables and plots; "{score}" becomes the name of the score at hand.
        colour: of its lines. Okabe and Ito's colours, which colour-blind readers can tell apart, and two greys.
        marker: of its lines, as matplotlib names it.
        settings: by the names of TrainConfig's fields, what it changes of the settings at hand.
    """

    name: str
    label: str
    colour: str
    marker: str
    settings: Mapping[str, Any]


METHODS = by_name(
    Method("full", "full data", "#555555", "o", dict(prune_ratio=0.0)),
    Method(
        "static_random", "static random", "#AAAAAA", "s", dict(score="static_random", warmup_epochs=0, tail_epochs=0)
    ),
    Method("random", "dynamic random", "#E69F00", "D", dict(score="random")),
    Method("loss", "loss", "#009E73", "^", dict(score="loss")),
    Method("el2n", "EL2N", "#56B4E9", "v", dict(score="el2n")),  # Paul et al., arXiv 2107.07075
    Method("grad_norm", "gradient norm", "#000000", "P", dict(score="grad_norm")),
    # Qin et al., arXiv 2303.04947; the last eighth of the epochs on all data is theirs.
    Method(
        "infobatch",
        "InfoBatch",
        "#D55E00",
        "*",
        dict(score="loss", policy="infobatch", smoothing=0.5, weights="sum", score_momentum=0.0, tail_epochs=None),
    ),
    # Raju, Daruwalla and Lipasti, arXiv 2111.12621
    Method(
        "epsilon_greedy",
        "ε-greedy",
        "#CC79A7",
        "X",
        dict(score="loss", policy="epsilon_greedy", smoothing=0.1, weights="none", score_momentum=0.5),
    ),
    Method("sadp", "SADP ({score})", "#0072B2", "h", dict()),
)
