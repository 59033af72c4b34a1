"""Gather, crop, flip, normalise and cut out, in one launch."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..common.launch import Launch
from .kernels import crop_flip_normalise_kernel

BLOCK = 1024  # elements of a program: eight a thread of four warps


@lru_cache(maxsize=256)
def _launch(
    device: torch.device,
    shape: torch.Size,
    batch: int,
    dtypes: tuple[torch.dtype | None, ...],  # of index, draws and the result
    padding: int,
    cutout: int,
    channels_last: bool,
    widest_block: int,
) -> Launch:
    size = math.prod(shape[1:])
    block = min(widest_block, triton.next_power_of_2(size))
    constants = {
        "FRAMES": shape[1] if len(shape) == 5 else 1,
        "CHANNELS": shape[-3],
        "HEIGHT": shape[-2],
        "WIDTH": shape[-1],
        "PADDING": padding,
        "CUTOUT": min(cutout, 2 * max(shape[-2:])),  # hides all of any image; Triton wants 32 bits
        "CHANNELS_LAST": channels_last,
        "HAS_INDEX": dtypes[0] is not None,
        "HAS_DRAWS": dtypes[1] is not None,
        "BLOCK": block,
        "num_warps": max(1, block // 256),
        "enable_fp_fusion": False,
    }
    return Launch(crop_flip_normalise_kernel, device, batch * triton.cdiv(size, block), (shape[0], batch), constants)


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
    """Launch the kernel; arguments as ``sadp_fast.augmentation.crop_flip_normalise`` has checked them."""
    batch = (images if index is None else index).shape[0]
    frames = images.shape[1] if images.ndim == 5 else 1
    out = torch.empty(
        (batch * frames, *images.shape[-3:]), dtype=dtype, device=images.device, memory_format=memory_format
    )
    if images.ndim == 5:
        out = out.unflatten(0, (batch, frames))
    if out.numel() > 0:
        dtypes = (None if index is None else index.dtype, None if draws is None else draws.dtype, dtype)
        channels_last = memory_format == torch.channels_last
        launch = _launch(images.device, images.shape, batch, dtypes, padding, cutout, channels_last, BLOCK)
        launch(images, images if index is None else index, images if draws is None else draws, mean, std, out)
    return out
