"""Random crop, horizontal flip, normalisation and cutout of uint8 images in plain torch, written to be read."""

from __future__ import annotations

import torch
from torch import Tensor


def mirrored(position: Tensor, size: int) -> Tensor:
    """Positions beyond [0, size) mirrored at the border pixel (which is not repeated), int64."""
    return (size - 1 - (size - 1 - position.abs()).abs()).clamp_(0, size - 1)


def crop_flip(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Shift each image [B, *, H, W] by up to ``padding`` pixels, mirrored at the border, and flip half of them.

    ``draws`` [3 or 5, B] in [0, 1): row 0 gives the vertical shift floor(u (2 padding + 1)) - padding, row 1 the
    horizontal one, and an image is flipped where row 2 is at least 1/2.
    """
    height, width = images.shape[-2:]
    device = images.device
    top, left = (draws[:2, :, None] * (2 * padding + 1)).long() - padding
    rows = mirrored(top + torch.arange(height, device=device), height)
    columns = mirrored(left + torch.arange(width, device=device), width)
    columns = torch.where(draws[2, :, None] < 0.5, columns, columns.flip(1))
    planes = images.flatten(1, -3) if images.ndim > 3 else images[:, None]
    example = torch.arange(len(images), device=device)[:, None, None, None]
    plane = torch.arange(planes.shape[1], device=device)[None, :, None, None]
    return planes[example, plane, rows[:, None, :, None], columns[:, None, None, :]].view(images.shape)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std in each channel, for uint8 [B, *, C, H, W]; the dtype of ``mean`` and ``std`` [C]."""
    return (images - mean[:, None, None]) / std[:, None, None]


def hide_square(x: Tensor, draws: Tensor, side: int) -> Tensor:
    """Set a square of ``side`` pixels to 0 in each image [B, *, H, W], the same one in all channels and frames.

    ``draws`` [5, B] in [0, 1): rows 3 and 4 give the square's centre, row floor(u H) and column floor(u W). It begins
    side // 2 before that, and what lies beyond the border is cut off. [paper] DeVries and Taylor, arXiv 1708.04552;
    [ours] a square of an odd side, which is one pixel smaller in their code.
    """

    def within(draws: Tensor, size: int) -> Tensor:
        first = (draws[:, None] * size).long() - side // 2
        position = torch.arange(size, device=draws.device)
        return (position >= first) & (position < first + side)

    height, width = x.shape[-2:]
    hidden = within(draws[3], height)[:, :, None] & within(draws[4], width)[:, None, :]
    return x.masked_fill(hidden.view(len(x), *[1] * (x.ndim - 3), height, width), 0)


def crop_flip_normalise(
    images: Tensor,
    index: Tensor | None,
    draws: Tensor | None,
    mean: Tensor,
    std: Tensor,
    padding: int,
    cutout: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """What ``sadp_fast.augmentation.crop_flip_normalise`` says; float64 ``mean`` and ``std`` compute in float64."""
    if index is not None:
        images = images.index_select(0, index)  # which refuses negative indices, as the kernel does
    if draws is not None:
        images = crop_flip(images, draws, padding)
    x = normalise(images, mean, std)
    if cutout > 0 and draws is not None:
        x = hide_square(x, draws, cutout)
    frames = x.flatten(0, -4)
    # Not `contiguous`, which leaves the strides of one channel as they are, ambiguous between the two formats.
    out = torch.empty_like(frames, dtype=dtype, memory_format=memory_format).copy_(frames)
    return out.unflatten(0, x.shape[:2]) if x.ndim == 5 else out
