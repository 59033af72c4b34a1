"""The equations of one time step, shared by every fused kernel.

State and arithmetic are float32. Divisions are exact and the kernels are compiled without floating-point contraction,
so that a spike is the same, bit for bit, as in the plain torch reference (reference/lif.py).
"""

from __future__ import annotations

import math
import os

import triton
import triton.language as tl

NO_LEAK = tl.constexpr(0)
LEAK = tl.constexpr(1)
LEAK_WITH_INPUT_DECAY = tl.constexpr(2)

# What a kernel's `tau` is: the time constant; the same where it is a power of two; its reciprocal, which is learned.
TIME_CONSTANT = tl.constexpr(0)
POWER_OF_TWO = tl.constexpr(1)
LEARNED_RECIPROCAL = tl.constexpr(2)

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


@triton.jit
def reciprocal_tau(tau, TAU: tl.constexpr):
    """1 / tau."""
    return tau if TAU == LEARNED_RECIPROCAL else 1.0 / tau


@triton.jit
def decayed(a, tau, TAU: tl.constexpr):
    """a / tau, correctly rounded; where the reciprocal is exact or all there is, as a product with it."""
    if TAU == TIME_CONSTANT:
        return tl.div_rn(a, tl.zeros_like(a) + tau)
    else:
        return a * reciprocal_tau(tau, TAU)


@triton.jit
def charge(x, v, tau, v_rest, DYNAMICS: tl.constexpr, TAU: tl.constexpr):
    if DYNAMICS == NO_LEAK:
        return v + x
    elif DYNAMICS == LEAK_WITH_INPUT_DECAY:
        if TAU == POWER_OF_TWO:  # the product is exact, so the sum is rounded as it would be without the fma
            return tl.fma(x - (v - v_rest), tl.zeros_like(x) + reciprocal_tau(tau, TAU), v)
        else:
            return v + decayed(x - (v - v_rest), tau, TAU)
    else:
        return v - decayed(v - v_rest, tau, TAU) + x


@triton.jit
def charge_slope(x, v, v_rest, DYNAMICS: tl.constexpr):
    """Derivative of the charge with respect to 1 / tau."""
    if DYNAMICS == LEAK_WITH_INPUT_DECAY:
        return x - (v - v_rest)
    else:
        return v_rest - v


@triton.jit
def reset(h, fired, v_threshold, v_rest, SOFT_RESET: tl.constexpr):
    if SOFT_RESET:
        return tl.where(fired, h - v_threshold, h)
    else:
        return tl.where(fired, v_rest, h)
