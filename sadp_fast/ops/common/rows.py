"""The steps of a tensor, in a kernel."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A tensor [T, N, *] from one example and step on."""

    ptr: tl.tensor
    stride: tl.tensor  # from step to step


@triton.jit
def step_before(rows):
    return Rows(rows.ptr - rows.stride, rows.stride)


@triton.jit
def step_behind(rows):
    return Rows(rows.ptr + rows.stride, rows.stride)
