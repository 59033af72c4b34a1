"""Spikes to bits and back, each one pass over memory.

The format is that of ``reference.py``. A program owns one block; a thread reads (or writes) sixteen bytes of
neighbouring values at a time and writes (reads) the byte, or half a byte, of bits that belongs to them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_kernel(
    dense_ptr,
    bits_ptr,
    count,
    plane_bytes,
    MAX_COUNT: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK  # a tensor can have more than 2^31 elements
    group = tl.arange(0, BLOCK // 8)
    lane = tl.arange(0, 8)
    offsets = group[:, None] * 8 + lane[None, :]
    value = tl.load(dense_ptr + first + offsets, mask=offsets < count - first, other=0.0).to(tl.float32)
    if MAX_COUNT == 1:
        code = (value == 1.0).to(tl.int32)
        legal = (value == 0.0) | (value == 1.0)
    else:
        inside = (value >= 0.0) & (value <= MAX_COUNT)
        code = tl.where(inside, value, 0.0).to(tl.int32)
        legal = inside & (code.to(tl.float32) == value)
    # The illegal values' lanes travel in bits 8 to 15 of the first plane's sum: one reduction serves both.
    illegal = tl.where(legal, 0, 256)
    for plane in tl.static_range(PLANES):
        bit = (code >> plane) & 1
        if plane == 0:
            bit += illegal
        word = tl.sum(bit << lane[None, :], axis=1)
        tl.store(bits_ptr + first // 8 + group, word.to(tl.uint8))
        if plane == 0:
            broken = tl.max(word, axis=0) >= 256
        bits_ptr += plane_bytes
    tl.store(bits_ptr + program, broken.to(tl.uint8))  # bits_ptr has walked past the planes


@triton.jit
def unpack_kernel(
    bits_ptr,
    dense_ptr,
    count,
    plane_bytes,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK
    group = tl.arange(0, BLOCK // 8)
    lane = tl.arange(0, 8)
    offsets = group[:, None] * 8 + lane[None, :]
    code = tl.zeros((BLOCK // 8, 8), tl.int32)
    for plane in tl.static_range(PLANES):
        byte = tl.load(bits_ptr + first // 8 + group).to(tl.int32)
        code |= ((byte[:, None] >> lane[None, :]) & 1) << plane
        bits_ptr += plane_bytes
    broken = tl.load(bits_ptr + program) != 0
    value = tl.where(broken, float("nan"), code.to(tl.float32))
    tl.store(dense_ptr + first + offsets, value.to(dense_ptr.dtype.element_ty), mask=offsets < count - first)
