"""Integers 0..k of a floating tensor as bit planes, in plain torch: what ``ops/spike_bits.py`` computes, for the CPU.

Format, uint8, for n values: the values are cut into blocks of ``BLOCK``; plane p holds bit p of each value, eight
values a byte, the first in the lowest bit, padded with zeros to whole blocks. k.bit_length() planes follow one another,
then one byte a block: 1 if the block holds a value that is no integer in 0..k, else 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 4096


def planes(max_count: int) -> int:
    """Bits of a value in 0..max_count."""
    return max(1, max_count.bit_length())


def buffer_bytes(count: int, max_count: int) -> int:
    """Bytes that ``count`` values take."""
    blocks = -(-count // BLOCK)
    return blocks * (planes(max_count) * BLOCK // 8 + 1)


def broken(buffer: Tensor, count: int) -> Tensor:
    """The bytes that tell which blocks hold a value that is no integer in 0..k."""
    return buffer[len(buffer) + -count // BLOCK :]


def pack(flat: Tensor, max_count: int) -> Tensor:
    """Values 0..max_count [n] as bits, uint8 [buffer_bytes(n, max_count)]."""
    code = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    legal = (code >= 0) & (code <= max_count) & (code == code.floor())
    code = torch.where(legal, code, 0).to(torch.uint8)
    lane = torch.arange(8, dtype=torch.uint8, device=flat.device)
    bits = [
        ((code.view(-1, 8) >> plane & 1) << lane).sum(1, dtype=torch.uint8).flatten()
        for plane in range(planes(max_count))
    ]
    return torch.cat([*bits, (~legal).any(1).to(torch.uint8)])


def unpack(buffer: Tensor, count: int, max_count: int, dtype: torch.dtype) -> Tensor:
    """The values [count] that ``pack`` was given; a block that was not as promised becomes NaN."""
    blocks = -(-count // BLOCK)
    *bits, broken = buffer.split([blocks * BLOCK // 8] * planes(max_count) + [blocks])
    lane = torch.arange(8, dtype=torch.uint8, device=buffer.device)
    code = torch.zeros(blocks * BLOCK // 8, 8, dtype=torch.uint8, device=buffer.device)
    for plane, byte in enumerate(bits):
        code += (byte[:, None] >> lane & 1) << plane
    values = code.view(blocks, BLOCK).to(dtype)
    return values.masked_fill_(broken[:, None] != 0, torch.nan).flatten()[:count]
