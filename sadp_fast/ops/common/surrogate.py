"""The gradients of ``sadp_fast/nn/surrogate.py`` as kernels compute them: a branch for each of its ``FUSED``."""

from __future__ import annotations

import math
import os

import triton
import triton.language as tl

PI = tl.constexpr(math.pi)
SQRT_PI = tl.constexpr(math.sqrt(math.pi))
LOG2_E = tl.constexpr(math.log2(math.e))

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"))


@triton.jit
def reciprocal(x):
    """1 / x to the last bit or two, in one instruction; for gradients, x neither denormal nor beyond 2^126."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exp2(x):
    """2^x to the last bit or two, in one instruction; for gradients: below 2^-126 it is zero."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def surrogate_gradient(x, alpha, SURROGATE: tl.constexpr):
    """Gradients of surrogate.FUSED, in the order of that table."""
    if SURROGATE == 0:  # Sigmoid
        q = reciprocal(1 + exp2(x * (-LOG2_E * alpha)))
        return alpha * q * (1 - q)
    elif SURROGATE == 1:  # ATan
        y = x * (PI / 2 * alpha)
        return (alpha / 2) * reciprocal(tl.fma(y, y, 1.0))
    elif SURROGATE == 2:  # PiecewiseQuadratic
        return tl.maximum(alpha - alpha * alpha * tl.abs(x), 0.0)
    elif SURROGATE == 3:  # PiecewiseExp
        return (alpha / 2) * exp2(tl.abs(x) * (-LOG2_E * alpha))
    elif SURROGATE == 4:  # SoftSign
        y = 1 / alpha + tl.abs(x)
        return (0.5 / alpha) * reciprocal(y * y)
    elif SURROGATE == 5:  # SuperSpike
        y = 1 + tl.abs(x)
        return alpha * reciprocal(y * y)
    elif SURROGATE == 6:  # Erf
        return (alpha / SQRT_PI) * exp2(x * x * (-LOG2_E * alpha * alpha))
    else:  # Rect
        tl.static_assert(SURROGATE == 7, "unknown surrogate")
        return tl.where(tl.abs(x) < 0.5 / alpha, alpha, 0.0)
