"""The surrogate gradients under their public name, ``sadp_fast.surrogate``; they live in ``nn/surrogate.py``."""

from .nn.surrogate import (
    FUSED,
    ATan,
    Erf,
    PiecewiseExp,
    PiecewiseQuadratic,
    Rect,
    Sigmoid,
    SoftSign,
    SuperSpike,
    Surrogate,
    fused_index,
)

__all__ = [
    "FUSED",
    "ATan",
    "Erf",
    "PiecewiseExp",
    "PiecewiseQuadratic",
    "Rect",
    "Sigmoid",
    "SoftSign",
    "SuperSpike",
    "Surrogate",
    "fused_index",
]
