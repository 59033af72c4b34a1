"""From uint8 images in memory to a network's input: random crops, flips and cutout in one kernel on the GPU; mixup."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Beta

from ..ops.augment import reference
from ..ops.common.dtypes import KERNEL_DTYPES

MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)


def draw_augmentation(count: int, generator: torch.Generator, cutout: bool = False) -> Tensor:
    """The random numbers that ``crop_flip_normalise`` needs for ``count`` images: float32 in [0, 1).

    [3, count], or with ``cutout`` [5, count]. They lie on the generator's device. A CUDA graph with this call draws
    anew in each replay if the generator is registered with it (``torch.cuda.CUDAGraph.register_generator_state``).
    """
    return torch.rand(5 if cutout else 3, count, device=generator.device, generator=generator)


def crop_flip_normalise(
    images: Tensor,
    index: Tensor | None,
    draws: Tensor | None,
    mean: Tensor,
    std: Tensor,
    *,
    padding: int = 4,
    cutout: int = 0,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Gather images by index, crop and flip them at random, and normalise: (x - mean) / std in each channel.

    A pure function: the same ``draws`` give the same result, the same bits on the CPU (plain torch) and on the GPU (one
    kernel; nothing waits for the host). The crop is the image shifted by up to ``padding`` pixels each way, mirrored at
    the border. Cutout (DeVries and Taylor, arXiv 1708.04552) then hides a square around a random pixel of each image,
    in all channels and frames: it is 0, the mean. Which draw does what is said in ``ops.augment.reference``.

    Args:
        images: uint8 [N, C, H, W], or event frames [N, T, C, H, W], contiguous; all tensors on one device.
        index: int64 or int32 [B], which images to take; None takes all N in order (an evaluation batch is a slice).
        draws: float32 [3, B] from ``draw_augmentation``, with cutout [5, B]; None leaves the images as they are.
        mean, std: float32 [C], in units of the raw uint8 values.
        padding: pixels, at least 0; unused without draws.
        cutout: side of the square in pixels, at least 0, which is none; it may reach over the border.
        dtype: of the result: float32, float16 or bfloat16, rounded from float32.
        memory_format: of the result: ``torch.contiguous_format`` or ``torch.channels_last`` (each frame of 5-D images).

    Returns:
        [B, C, H, W] or [B, T, C, H, W].

    Raises:
        ValueError: an argument has another dtype, shape, layout or device than said above.
        IndexError: an index is out of range. On the GPU, where finding out would wait, that image becomes NaN.
    """
    if images.dtype != torch.uint8 or images.ndim not in (4, 5) or not images.is_contiguous():
        raise ValueError(
            f"images must be contiguous uint8 [N, C, H, W] or [N, T, C, H, W], got {images.dtype} of shape "
            f"{tuple(images.shape)} and strides {images.stride()}"
        )
    if index is not None and (index.ndim != 1 or index.dtype not in (torch.int64, torch.int32)):
        raise ValueError(f"index must be int64 or int32 [B], got {index.dtype} of shape {tuple(index.shape)}")
    for name, pixels in (("padding", padding), ("cutout", cutout)):
        if pixels < 0:
            raise ValueError(f"{name} must be at least 0, got {pixels}")
    if cutout > 0 and (draws is None or len(draws) != 5):
        raise ValueError(
            f"cutout = {cutout} needs five rows of draws, got {None if draws is None else tuple(draws.shape)}: take "
            "them from draw_augmentation(count, generator, cutout=True)"
        )
    batch, channels = len(images) if index is None else len(index), images.shape[-3]
    drawn = (5 if cutout > 0 else 3, batch)
    for name, tensor, shape in (("draws", draws, drawn), ("mean", mean, (channels,)), ("std", std, (channels,))):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != shape):
            raise ValueError(f"{name} must be float32 {list(shape)}, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    for name, tensor in (("index", index), ("draws", draws), ("mean", mean), ("std", std)):
        if tensor is not None and tensor.device != images.device:
            raise ValueError(f"{name} is on {tensor.device} but images on {images.device}: move it there")
    if dtype not in KERNEL_DTYPES or memory_format not in MEMORY_FORMATS:
        raise ValueError(
            f"dtype must be one of {KERNEL_DTYPES} and memory_format of {MEMORY_FORMATS}, got {dtype}, {memory_format}"
        )
    if images.is_cuda:
        from ..ops.augment import op  # Triton is imported where it is used, so that CPU users need no Triton

        index, draws = (None if t is None else t.contiguous() for t in (index, draws))
        mean, std = mean.contiguous(), std.contiguous()
        return op.crop_flip_normalise(images, index, draws, mean, std, padding, cutout, dtype, memory_format)
    return reference.crop_flip_normalise(images, index, draws, mean, std, padding, cutout, dtype, memory_format)


def draw_mixup(count: int, alpha: float, device: torch.device) -> Tensor:
    """How much of each of ``count`` mixtures is the example itself: float32 [count] in [1/2, 1], for ``mixup``.

    Beta(alpha, alpha), or the rest of it where that is larger; ``alpha`` from 0.01 to 100. Drawn by torch's default
    generator of the device, which CUDA graphs draw from anew in each replay.
    """
    # In float32, a GPU would draw 0 for both of a share's gamma variables, often for a small alpha: a share of 1/2.
    concentration = torch.full((count,), alpha, dtype=torch.float64, device=device)
    share = Beta(concentration, concentration, validate_args=False).sample()  # validation would wait for the host
    return torch.maximum(share, 1 - share).float()


def mixup(x: Tensor, labels: Tensor, share: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mix each example of a batch with the one before it, the first with the last: inputs and labels alike.

    x_i becomes s_i x_i + (1 - s_i) x_{i-1}, and its target the same mixture of the two labels. [paper] mixup (Zhang et
    al., arXiv 1710.09412), with s from Beta(alpha, alpha) and, in its code, one s a batch. [ours] one for each example,
    and at least 1/2: in a shuffled batch the mixtures are the same in distribution, and a row's loss and score are
    mostly those of the example that was drawn for it.

    Args:
        x: floating point [B, *], the inputs.
        labels: int64 [B], classes.
        share: float32 [B], s, from ``draw_mixup``; rounded to x's dtype, for inputs and targets alike.
        num_classes: classes in all.

    Returns:
        inputs [B, *] in x's dtype and memory format, and float32 [B, num_classes]: targets, which sum to 1.
    """
    share = share.to(x.dtype)
    mixed = torch.lerp(x.roll(1, 0), x, share.view(-1, *[1] * (x.ndim - 1)))
    targets, share = nn.functional.one_hot(labels, num_classes).float(), share.float()[:, None]
    # Rolling may lose the memory format.
    return torch.empty_like(x).copy_(mixed), share * targets + (1 - share) * targets.roll(1, 0)
