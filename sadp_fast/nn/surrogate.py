"""Surrogate gradients: what stands in for the derivative of the Heaviside step in the backward pass.

Each class gives the same values as the class of the same name in SpikingJelly 2.0 (same default ``alpha``). The
``gradient`` functions here are the specification; the fused kernels repeat them, and a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


class _Spike(torch.autograd.Function):
    """Heaviside step forward, ``gradient(x, alpha)`` backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float, gradient: Callable[[Tensor, float], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha, ctx.gradient = alpha, gradient
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grad_output * ctx.gradient(x, ctx.alpha), None, None


class Surrogate(nn.Module):
    """Base of the surrogate functions: maps ``h - v_threshold`` (any shape, floating) to spikes of the same shape.

    Args:
        alpha: steepness; larger is closer to the true step.
        spiking: ``True`` gives spikes in {0, 1}, ``False`` the smooth ``primitive``, whose derivative is ``gradient``.
    """

    def __init__(self, alpha: float, spiking: bool = True) -> None:
        super().__init__()
        if not alpha > 0:
            raise ValueError(f"alpha must be > 0, got {alpha!r}; larger values make the surrogate steeper")
        self.alpha = float(alpha)
        self.spiking = spiking

    @staticmethod
    def gradient(x: Tensor, alpha: float) -> Tensor:
        """Derivative used in the backward pass, elementwise."""
        raise NotImplementedError

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        """Smooth function whose derivative is ``gradient``, elementwise."""
        raise NotImplementedError("this surrogate has no primitive; use spiking=True")

    def set_spiking_mode(self, spiking: bool) -> None:
        """Switch between spikes (``True``) and the smooth primitive (``False``)."""
        self.spiking = spiking

    def forward(self, x: Tensor) -> Tensor:
        if self.spiking:
            spikes: Tensor = _Spike.apply(x, self.alpha, self.gradient)
            return spikes
        return self.primitive(x, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, spiking={self.spiking}"


class Sigmoid(Surrogate):
    """``alpha q (1 - q)`` with ``q = sigmoid(alpha x)``."""

    def __init__(self, alpha: float = 4.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    @staticmethod
    def gradient(x: Tensor, alpha: float) -> Tensor:
        q = torch.sigmoid(alpha * x)
        return alpha * q * (1 - q)

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        return torch.sigmoid(alpha * x)


class ATan(Surrogate):
    """``(alpha / 2) / (1 + (pi alpha x / 2)^2)``."""

    def __init__(self, alpha: float = 2.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    @staticmethod
    def gradient(x: Tensor, alpha: float) -> Tensor:
        return (alpha / 2) / (1 + (math.pi / 2 * alpha * x).square())

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        return torch.atan(math.pi / 2 * alpha * x) / math.pi + 0.5


class PiecewiseQuadratic(Surrogate):
    """``max(0, alpha - alpha^2 |x|)``."""

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    @staticmethod
    def gradient(x: Tensor, alpha: float) -> Tensor:
        return (alpha - alpha * alpha * x.abs()).clamp(min=0)

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        ramp = x.clamp(-1 / alpha, 1 / alpha)
        return alpha * ramp - alpha * alpha / 2 * ramp * ramp.abs() + 0.5


class PiecewiseExp(Surrogate):
    """``(alpha / 2) exp(-alpha |x|)``."""

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    @staticmethod
    def gradient(x: Tensor, alpha: float) -> Tensor:
        return alpha / 2 * torch.exp(-alpha * x.abs())

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        tail = torch.exp(-alpha * x.abs()) / 2
        return torch.where(x >= 0, 1 - tail, tail)


class SoftSign(Surrogate):
    """``1 / (2 alpha (1 / alpha + |x|)^2)``."""

    def __init__(self, alpha: float = 2.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    @staticmethod
    def gradient(x: Tensor, alpha: float) -> Tensor:
        return 1 / (2 * alpha * (1 / alpha + x.abs()).square())

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        return (nn.functional.softsign(alpha * x) + 1) / 2


class SuperSpike(Surrogate):
    """``alpha / (1 + |x|)^2``; it has no primitive."""

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    @staticmethod
    def gradient(x: Tensor, alpha: float) -> Tensor:
        return alpha / (1 + x.abs()).square()


class Erf(Surrogate):
    """``(alpha / sqrt(pi)) exp(-alpha^2 x^2)``."""

    def __init__(self, alpha: float = 2.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    @staticmethod
    def gradient(x: Tensor, alpha: float) -> Tensor:
        return alpha / math.sqrt(math.pi) * torch.exp(-(alpha * x).square())

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        return torch.erfc(-alpha * x) / 2


class Rect(Surrogate):
    """``alpha`` where ``|x| < 1 / (2 alpha)``, else 0."""

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    @staticmethod
    def gradient(x: Tensor, alpha: float) -> Tensor:
        return alpha * (x.abs() < 0.5 / alpha).to(x.dtype)

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        return (alpha * x + 0.5).clamp(0, 1)


# The position in this table is the kernels' SURROGATE constant (sadp_fast/ops/common/surrogate.py).
FUSED = (Sigmoid, ATan, PiecewiseQuadratic, PiecewiseExp, SoftSign, SuperSpike, Erf, Rect)
_FUSED_INDEX: dict[type, int] = {cls: i for i, cls in enumerate(FUSED)}
_FUSED_BY_NAME = {cls.__name__: i for i, cls in enumerate(FUSED)}
_SPIKINGJELLY = "spikingjelly.activation_based.surrogate"


def fused_index(surrogate: Callable[[Tensor], Tensor]) -> int | None:
    """Position in ``FUSED`` of a surrogate the kernels know (ours, or SpikingJelly's of the same name), else None."""
    cls = type(surrogate)
    index = _FUSED_INDEX.get(cls)
    if index is None and cls.__module__ == _SPIKINGJELLY:
        index = _FUSED_BY_NAME.get(cls.__name__)
    return index if index is not None and surrogate.spiking else None  # type: ignore[attr-defined]
