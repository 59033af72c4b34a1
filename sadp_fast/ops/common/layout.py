"""Memory layout of what the fused kernels read and write.

Every tensor that the kernels write is dense, time first, then example, then x's own order of inner dimensions
(so a channels_last input gives channels_last spikes).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def v_strides(x: Tensor) -> tuple[int, ...]:
    return (math.prod(x.shape[2:]), *x.stride()[2:])


def sequence_strides(x: Tensor) -> tuple[int, ...]:
    size = math.prod(x.shape[2:])
    return (x.shape[1] * size, size, *x.stride()[2:])


class Sequence:
    """Makes tensors of one shape and layout: that of x [T, N, *], but dense, in x's inner order.

    Attributes:
        shape, strides: of these tensors.
    """

    def __init__(self, x: Tensor) -> None:
        self.shape, self.strides = x.shape, sequence_strides(x)
        self._alike = x.stride() == self.strides

    def empty(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """One on x's device; x has the shape and strides that this was made for."""
        if self._alike:
            return torch.empty_like(x, dtype=dtype)
        return torch.empty_strided(self.shape, self.strides, dtype=dtype, device=x.device)


def v_like(x: Tensor) -> Tensor:
    return x.new_empty_strided(x.shape[1:], v_strides(x), dtype=torch.float32)


def sequence_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty_strided(x.shape, sequence_strides(x), dtype=dtype)


def is_dense(t: Tensor, first: int = 0) -> bool:
    """Whether the elements fill one block of memory, in any order of dimensions; from dimension ``first`` on, those of
    each index in front of it."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride()[first:], t.shape[first:], strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def inner_is_dense(x: Tensor) -> bool:
    """Whether the elements of each x[t, n] fill one block of memory, in any order of dimensions."""
    return is_dense(x, 2)


def with_dense_inner(x: Tensor) -> Tensor:
    return x if inner_is_dense(x) else x.contiguous()


def has_strides(t: Tensor, strides: tuple[int, ...], first: int = 0) -> bool:
    """Whether these are t's strides from dimension ``first`` on, where they matter."""
    return all(
        a == b or size == 1 for a, b, size in zip(t.stride()[first:], strides[first:], t.shape[first:], strict=True)
    )


def with_inner_order_of(x: Tensor, grad: Tensor) -> Tensor:
    """grad with x's inner strides; its first two strides stay free (an expanded gradient is read as it is)."""
    return grad if has_strides(grad, x.stride(), 2) else sequence_like(x, grad.dtype).copy_(grad)


def laid_out(t: Tensor | None, strides: tuple[int, ...]) -> Tensor | None:
    """t as float32 with these strides, which the kernels assume for states and their gradients."""
    if t is None or (t.dtype == torch.float32 and has_strides(t, strides)):
        return t
    return t.new_empty_strided(t.shape, strides, dtype=torch.float32).copy_(t)
