"""The equations of one time step, shared by every fused kernel: the one file to change for another neuron.

A step takes the potential v and the input x, and gives the spike s and the next potential:

    h = charge(v, x)        s = 1 where h >= v_threshold        v = reset(h, s)

Its backward pass takes the gradients of s and v, and gives those of h, and through it of x and of the v before:

    dL/dh = dL/dv * dv/dh + dL/ds * ds/dh        dv/dh = kept + jump * ds/dh

ds/dh is the surrogate's. kept: 1, but 0 where a hard reset fired. jump, what a spike adds to the potential:
-v_threshold, or v_rest - h; it is left out where the reset is detached.

There are two forms. LIF kernels divide by tau, as the plain torch reference does. BatchNorm + LIF kernels fold leak,
normalisation and threshold into one multiply-add a step, with two numbers a channel.

State and arithmetic are float32. Divisions are exact and the kernels are compiled without floating-point contraction,
so that a spike is the same, bit for bit, as in the plain torch reference (lif/reference.py).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .surrogate import surrogate_gradient

NO_LEAK = tl.constexpr(0)
LEAK = tl.constexpr(1)
LEAK_WITH_INPUT_DECAY = tl.constexpr(2)

# What a kernel's `tau` is: the time constant; the same where it is a power of two; its reciprocal, which is learned.
TIME_CONSTANT = tl.constexpr(0)
POWER_OF_TWO = tl.constexpr(1)
LEARNED_RECIPROCAL = tl.constexpr(2)


class Membrane(NamedTuple):
    """A neuron's numbers in a kernel."""

    tau: tl.tensor  # see TIME_CONSTANT, ...
    v_threshold: tl.tensor
    v_rest: tl.tensor
    alpha: tl.tensor | None  # steepness of the surrogate; None in a forward pass


class Kind(NamedTuple):
    """What a kernel is compiled for of a neuron; a forward pass leaves out the last two."""

    dynamics: int  # NO_LEAK, ...
    tau: int  # TIME_CONSTANT, ...
    soft_reset: bool
    rest_at_zero: bool
    detach_reset: bool = False
    surrogate: int = 0


# ----------------------------------------------------------------------------------------------------- forward pass


@triton.jit
def reciprocal_tau(tau, HOW: tl.constexpr):
    """1 / tau."""
    return tau if HOW.kind.tau == LEARNED_RECIPROCAL else 1.0 / tau


@triton.jit
def decayed(a, tau, HOW: tl.constexpr):
    """a / tau, correctly rounded; where the reciprocal is exact or all there is, as a product with it."""
    if HOW.kind.tau == TIME_CONSTANT:
        return tl.div_rn(a, tl.zeros_like(a) + tau)
    else:
        return a * reciprocal_tau(tau, HOW)


@triton.jit
def charge(x, v, membrane, HOW: tl.constexpr):
    """h, the potential before the neuron may fire."""
    if HOW.kind.dynamics == NO_LEAK:
        return v + x
    elif HOW.kind.dynamics == LEAK_WITH_INPUT_DECAY:
        if HOW.kind.tau == POWER_OF_TWO:  # the product is exact, so the sum is rounded as it would be without the fma
            return tl.fma(x - (v - membrane.v_rest), tl.zeros_like(x) + reciprocal_tau(membrane.tau, HOW), v)
        else:
            return v + decayed(x - (v - membrane.v_rest), membrane.tau, HOW)
    else:
        return v - decayed(v - membrane.v_rest, membrane.tau, HOW) + x


@triton.jit
def fire(h, membrane):
    return h >= membrane.v_threshold


@triton.jit
def reset(h, excess, fired, membrane, HOW: tl.constexpr):
    """The potential after the step; excess is h - v_threshold."""
    return tl.where(fired, excess if HOW.kind.soft_reset else membrane.v_rest, h)


# ---------------------------------------------------------------------------------------------------- backward pass


@triton.jit
def step_derivatives(h, fired, membrane, HOW: tl.constexpr):
    """dv/dh and ds/dh of a step, for ``grad_charge``."""
    ds_dh = surrogate_gradient(h - membrane.v_threshold, membrane.alpha, HOW.kind.surrogate)
    dv_dh = tl.full(h.shape, 1.0, tl.float32) if HOW.kind.soft_reset else tl.where(fired, 0.0, 1.0)
    if not HOW.kind.detach_reset:
        jump = tl.zeros_like(h) - membrane.v_threshold if HOW.kind.soft_reset else membrane.v_rest - h
        dv_dh = tl.fma(ds_dh, jump, dv_dh)
    return dv_dh, ds_dh


@triton.jit
def grad_charge(grad_v, grad_spike, h, membrane, HOW: tl.constexpr):
    """dL/dh from dL/dv and dL/ds: the same at once, with the surrogate as a factor of all that it multiplies."""
    times_surrogate = grad_spike
    if HOW.kind.soft_reset:
        kept = grad_v
        if not HOW.kind.detach_reset:
            times_surrogate -= grad_v * membrane.v_threshold
    else:
        kept = tl.where(fire(h, membrane), 0.0, grad_v)
        if not HOW.kind.detach_reset:
            times_surrogate = tl.fma(grad_v, membrane.v_rest - h, times_surrogate)
    ds_dh = surrogate_gradient(h - membrane.v_threshold, membrane.alpha, HOW.kind.surrogate)
    return tl.fma(ds_dh, times_surrogate, kept)


@triton.jit
def grad_input(grad_h, membrane, HOW: tl.constexpr):
    """dL/dx."""
    return grad_h * reciprocal_tau(membrane.tau, HOW) if HOW.kind.dynamics == LEAK_WITH_INPUT_DECAY else grad_h


@triton.jit
def grad_potential(grad_h, membrane, HOW: tl.constexpr):
    """dL/dv, of the potential before the step."""
    return grad_h if HOW.kind.dynamics == NO_LEAK else grad_h * (1.0 - reciprocal_tau(membrane.tau, HOW))


@triton.jit
def charge_slope(x, v, membrane, HOW: tl.constexpr):
    """Derivative of the charge with respect to 1 / tau."""
    if HOW.kind.dynamics == LEAK_WITH_INPUT_DECAY:
        return x - (v - membrane.v_rest)
    else:
        return membrane.v_rest - v


# ------------------------------------------------------------------------ the same relative to the threshold, for tiles

# Every charge is linear, h = keep v + gain y + (1 - keep) v_rest, and so is the normalisation that gives y. So the
# excess of the charge over the threshold is
#     u = h - v_threshold = keep v + drive,    drive = (x - mean) scale + shift
# with two numbers a channel: the fewest instructions. gain is 1 / tau where the input decays, else 1.


class RelativeMembrane(NamedTuple):
    """A neuron's numbers in a kernel of this form."""

    keep: tl.tensor  # share of v that a step keeps
    v_threshold: tl.tensor
    v_rest: tl.tensor
    alpha: tl.tensor | None  # as a Membrane's


class RelativeKind(NamedTuple):
    """What a kernel of this form is compiled for of a neuron; a forward pass leaves out the last three."""

    soft_reset: bool
    learned_tau: bool  # keep comes from a learned 1 / tau,
    learned_gain: bool = False  # and so does gain
    detach_reset: bool = False
    surrogate: int = 0


# Of a gain, by which sums are divided again: 1 / tau becomes 0 where tau is infinite, or learned to be nearly so.
SMALLEST_GAIN = tl.constexpr(1e-30)


@triton.jit
def keep_and_gain(reciprocal_tau_ptr, keep, gain, HOW: tl.constexpr):
    """keep and gain, as they are now where they are learned."""
    if HOW.kind.learned_tau:
        reciprocal_tau = tl.load(reciprocal_tau_ptr)
        if HOW.kind.learned_gain:
            gain = tl.maximum(reciprocal_tau, SMALLEST_GAIN, propagate_nan=tl.PropagateNan.ALL)
        return 1.0 - reciprocal_tau, gain
    else:
        return keep, gain


@triton.jit
def drive_shift(bias, gain, membrane):
    """shift of the drive, where y = (x - mean) a + bias; its scale is gain a."""
    return gain * bias + ((1.0 - membrane.keep) * membrane.v_rest - membrane.v_threshold)


@triton.jit
def relative_charge(v, drive, membrane):
    """u, of which the neuron fires from 0 on."""
    return tl.fma(v, tl.zeros_like(v) + membrane.keep, drive)


@triton.jit
def grad_charge_relative(grad_v, grad_spike, u, fired, membrane, HOW: tl.constexpr):
    """dL/dh from dL/dv and dL/ds."""
    ds_dh = surrogate_gradient(u, membrane.alpha, HOW.kind.surrogate)
    if HOW.kind.soft_reset:
        grad_h = grad_v
        if not HOW.kind.detach_reset:
            grad_h -= grad_v * membrane.v_threshold * ds_dh
    else:
        grad_h = tl.where(fired, 0.0, grad_v)
        if not HOW.kind.detach_reset:
            grad_h += grad_v * (membrane.v_rest - membrane.v_threshold - u) * ds_dh
    return tl.fma(grad_spike, ds_dh, grad_h)
