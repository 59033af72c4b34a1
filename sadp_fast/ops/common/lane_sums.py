"""Sums of 16 steps over a warp's elements, all at once.

To add one value over the 32 lanes of a warp takes five exchanges between them; to add two takes six, if the first
exchange leaves the sum of the one in half of the lanes and that of the other in the rest. So 16 steps take 16 exchanges
instead of 80, of which a multiprocessor does one a cycle: a step's value waits for that of the step in front of it, the
pair's for that of the pair in front, ... In the end a step's sum is in the lane whose bits, the other way round, are
the step.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Sums(NamedTuple):
    """The sums of a chunk's steps, and what waits to be added to those of the steps in front, so many steps apart."""

    one: tl.tensor
    two: tl.tensor
    four: tl.tensor
    eight: tl.tensor
    steps: tl.tensor


@triton.jit
def _over_lanes(value, partner, DISTANCE: tl.constexpr):
    """Of pairs of lanes DISTANCE apart the sums: in the one lane of value, in the other of partner."""
    lane = tl.arange(0, 32)
    upper = lane & DISTANCE != 0
    kept = tl.where(upper, partner, value)
    given = tl.where(upper, value, partner)
    return kept + tl.gather(given, lane ^ DISTANCE, 0)


@triton.jit
def add_step(value, sums, STEP: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """The sums when step STEP of 16 has come, as the steps behind it have; with step 0 they are complete.

    value is [block], of which a lane holds groups of NEIGHBOURS; all else is [32].
    """
    GROUPS: tl.constexpr = value.shape[0] // 32 // NEIGHBOURS
    if value.shape[0] > 32:
        value = tl.sum(tl.sum(tl.reshape(value, (GROUPS, 32, NEIGHBOURS)), axis=2), axis=0)
    if STEP % 2 == 1:
        return Sums(value, sums.two, sums.four, sums.eight, sums.steps)
    else:
        value = _over_lanes(value, sums.one, 16)
        if STEP // 2 % 2 == 1:
            return Sums(sums.one, value, sums.four, sums.eight, sums.steps)
        else:
            value = _over_lanes(value, sums.two, 8)
            if STEP // 4 % 2 == 1:
                return Sums(sums.one, sums.two, value, sums.eight, sums.steps)
            else:
                value = _over_lanes(value, sums.four, 4)
                if STEP == 8:
                    return Sums(sums.one, sums.two, sums.four, value, sums.steps)
                else:
                    value = _over_lanes(value, sums.eight, 2)
                    return Sums(sums.one, sums.two, sums.four, sums.eight, _over_lanes(value, value, 1))
