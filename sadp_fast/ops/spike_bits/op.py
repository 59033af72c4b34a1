"""Spikes to bits and back, each in one launch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.launch import Launch
from .kernels import pack_kernel, unpack_kernel
from .reference import BLOCK, buffer_bytes, planes

WARPS = 4


@lru_cache(maxsize=1024)
def _launch(
    kernel: Any, device: torch.device, dtype: torch.dtype, count: int, max_count: int, block: int, warps: int
) -> Launch:
    blocks = triton.cdiv(count, block)
    constants = {"PLANES": planes(max_count), "BLOCK": block, "num_warps": warps}
    if kernel is pack_kernel:
        constants["MAX_COUNT"] = max_count
    return Launch(kernel, device, blocks, (count, blocks * block // 8), constants)


def pack(flat: Tensor, max_count: int) -> Tensor:
    """Values 0..max_count [n], contiguous float32, float16 or bfloat16, as uint8 [buffer_bytes(n, max_count)]."""
    count = flat.numel()
    buffer = flat.new_empty(buffer_bytes(count, max_count), dtype=torch.uint8)
    if count:
        _launch(pack_kernel, flat.device, flat.dtype, count, max_count, BLOCK, WARPS)(flat, buffer)
    return buffer


def unpack(buffer: Tensor, count: int, max_count: int, dtype: torch.dtype) -> Tensor:
    """The values [count] that ``pack`` was given; a block that was not as promised becomes NaN."""
    flat = buffer.new_empty(count, dtype=dtype)
    if count:
        _launch(unpack_kernel, buffer.device, dtype, count, max_count, BLOCK, WARPS)(buffer, flat)
    return flat
