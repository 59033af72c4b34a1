"""Gather, crop, flip, normalise and cut out in one kernel: from uint8 images on the GPU to a network's input.

A program writes BLOCK consecutive elements of one example's output, in the order in which they lie in memory, so that
stores coalesce in either memory format; the bytes it gathers come through the caches, and those that cutout hides are
not read. The shape of an image is a compile-time constant, so that positions come from divisions by constants.
Arithmetic is float32 with an exact division: the same bits as the plain torch reference.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mirrored(position, SIZE: tl.constexpr):
    """A position up to any distance beyond [0, SIZE), mirrored once at the border pixel, then clamped."""
    position = SIZE - 1 - tl.abs(SIZE - 1 - tl.abs(position))
    return tl.minimum(tl.maximum(position, 0), SIZE - 1)


@triton.jit
def crop_flip_normalise_kernel(
    images_ptr,
    index_ptr,
    draws_ptr,
    mean_ptr,
    std_ptr,
    out_ptr,
    examples,  # images in the data set
    batch,
    FRAMES: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDING: tl.constexpr,
    CUTOUT: tl.constexpr,  # side of the hidden square; 0: none
    CHANNELS_LAST: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_DRAWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SIZE: tl.constexpr = FRAMES * CHANNELS * HEIGHT * WIDTH
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    n = program // BLOCKS
    offsets = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < SIZE
    if HAS_INDEX:
        example = tl.load(index_ptr + n).to(tl.int64)
    else:
        example = n.to(tl.int64)
    exists = (example >= 0) & (example < examples)

    # Where an element of the output lies in its example: frame, channel, row y, column x.
    if CHANNELS_LAST:
        channel = offsets % CHANNELS
        x = offsets // CHANNELS % WIDTH
        y = offsets // (CHANNELS * WIDTH) % HEIGHT
    else:
        x = offsets % WIDTH
        y = offsets // WIDTH % HEIGHT
        channel = offsets // (WIDTH * HEIGHT) % CHANNELS
    frame = offsets // (CHANNELS * HEIGHT * WIDTH)
    needed = tl.where(exists, mask, False)
    if CUTOUT > 0:
        first_y = (tl.load(draws_ptr + 3 * batch + n) * HEIGHT).to(tl.int32) - CUTOUT // 2
        first_x = (tl.load(draws_ptr + 4 * batch + n) * WIDTH).to(tl.int32) - CUTOUT // 2
        hidden = (y >= first_y) & (y < first_y + CUTOUT) & (x >= first_x) & (x < first_x + CUTOUT)
        needed = tl.where(hidden, False, needed)
    if HAS_DRAWS:
        top = (tl.load(draws_ptr + n) * (2 * PADDING + 1)).to(tl.int32) - PADDING
        left = (tl.load(draws_ptr + batch + n) * (2 * PADDING + 1)).to(tl.int32) - PADDING
        x = tl.where(tl.load(draws_ptr + 2 * batch + n) < 0.5, x, WIDTH - 1 - x)
        x = _mirrored(left + x, WIDTH)
        y = _mirrored(top + y, HEIGHT)

    source = ((frame * CHANNELS + channel) * HEIGHT + y) * WIDTH + x
    value = tl.load(images_ptr + example * SIZE + source, mask=needed, other=0).to(tl.float32)
    mean = tl.load(mean_ptr + channel, mask=mask, other=0.0)
    std = tl.load(std_ptr + channel, mask=mask, other=1.0)
    value = tl.div_rn(value - mean, std)
    if CUTOUT > 0:
        value = tl.where(hidden, 0.0, value)
    value = tl.where(exists, value, float("nan"))
    tl.store(out_ptr + n.to(tl.int64) * SIZE + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)
