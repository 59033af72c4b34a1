"""Draws a random subset: one Bernoulli draw for each example, and the weights that keep sums unbiased."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..native import library as _native


def current_stream(device: int) -> int:
    """Handle of the current stream of a CUDA device."""
    return torch._C._cuda_getCurrentRawStream(device)  # what Triton asks; a tenth of torch.cuda.current_stream's time


def has_memory(t: Tensor) -> bool:
    """Whether t's elements can be read and written; not in FakeTensorMode, functionalize and other transforms."""
    if type(t) is not Tensor and isinstance(t, FakeTensor):  # the abstract class is slow to ask
        return False
    try:
        return t.data_ptr() != 0 or t.numel() == 0
    except RuntimeError:
        return False


def _address(name: str, t: Tensor) -> int:
    if not has_memory(t):
        raise RuntimeError(
            f"{name} has no memory, which sample() works on: it is of FakeTensorMode, functionalize or another "
            "transform of torch; call sample() outside of it, on plain tensors."
        )
    return t.data_ptr()


class Sample(NamedTuple):
    """A drawn subset, on p's device: `indices` int64 [M], ascending; `weights` float32 [M]; `count` int64, 0-dim."""

    indices: Tensor
    weights: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which has no use here


def sample(p: Tensor, *, seed: int, epoch: int | Tensor = 0, capacity: int | None = None) -> Sample:
    """Keeps each example i with probability p[i], independently, and returns the kept indices and their loss weights.

    Poisson sampling with Horvitz-Thompson weights w_i = m / (N p_i), m = sum(p) (paper arXiv 2510.04098, Proposition 1,
    scaled by m so that weights are about 1 and the learning rate stays [ours]): E[sum of w_i x_i over the kept] =
    (m / N) sum of x_i. The random numbers are Philox4x32-10 words that depend on (seed, epoch, i) alone [ours], so the
    same arguments give the same indices and the same weights, to the bit, on the CPU, on every GPU, and for any number
    of threads. The probability in use is p[i] rounded up to a multiple of 2**-32, in m and in the weight too: p = 0 is
    never kept, p = 1 always, and a tiny p neither vanishes nor has an infinite weight.

    Args:
        p: probabilities in [0, 1], float32 or float64 [N], N <= 2**31, on the CPU or a CUDA device.
        seed: integer in [0, 2**64).
        epoch: integer in [-2**63, 2**63), or a 0-dim int64 tensor on p's device. Each epoch is an independent draw. A
            CUDA tensor is read on the device, so a captured CUDA graph draws a new subset at each replay.
        capacity: None, or the length of the outputs. With None they are as long as the draw, which on CUDA waits once
            for the host. With a capacity, nothing waits and nothing but torch's allocator allocates, so the call can
            be captured in a CUDA graph (after one call outside of it, which loads the kernels).

    Returns:
        Sample(indices, weights, count). With a capacity, both outputs have that length and are padded with index -1 and
        weight 0; `count` is the number drawn, and where it exceeds the capacity only the first `capacity` of them are
        kept: compare the two wherever an overflow matters.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument out of range; an entry of p that is NaN or outside [0, 1]. With a capacity on CUDA that
            last one cannot be raised without waiting: then `count` is -1 and the outputs are all padding.
        RuntimeError: p is on a CUDA device and sadp_fast was built without CUDA; a CUDA error; FakeTensorMode,
            functionalize or another transform of torch is on, whose tensors have no memory.
    """
    _check_p(p)
    seed = _integer("seed", seed, "an integer")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}; pass seed % 2**64.")
    _check_epoch(epoch, p)
    if capacity is not None:
        capacity = _integer("capacity", capacity, "an integer or None")
        if capacity < 0:
            raise ValueError(
                f"capacity must not be negative, got {capacity}; pass 0 or more, or None for an exact size."
            )
    if not p.is_contiguous():
        p = p.detach().contiguous()
    if not p.is_cuda:
        return _sample_cpu(p, seed, epoch, capacity)
    index = p.device.index
    with nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index):
        return _sample_cuda(p, seed, epoch, capacity)


def _integer(name: str, value: Any, kinds: str) -> int:
    if type(value) is not int and not isinstance(value, Integral):  # the abstract class is slow to ask
        raise TypeError(f"{name} must be {kinds}, got {type(value).__name__}; pass int({name}).")
    return int(value)


def _check_p(p: Tensor) -> None:
    if not isinstance(p, Tensor):
        raise TypeError(f"p must be a tensor, got {type(p).__name__}; pass torch.as_tensor(p).")
    if p.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"p must be float32 or float64, got {p.dtype}; pass p.float().")
    if p.dim() != 1:
        raise ValueError(f"p must have one dimension, got shape {tuple(p.shape)}; pass p.flatten().")
    if p.numel() > _native.MAX_ITEMS:
        raise ValueError(f"p must have at most 2**31 entries, got {p.numel()}; draw from parts of it.")
    if p.device.type not in ("cpu", "cuda"):
        raise ValueError(f"p must be on the CPU or a CUDA device, got {p.device}; pass p.cpu().")
    if p.is_cuda and not _native.has_cuda:
        raise RuntimeError(
            f"p is on {p.device}, but this sadp_fast was built without CUDA; reinstall it with SADP_CUDA=ON in the "
            "environment and nvcc on the PATH, or pass p.cpu()."
        )


def _check_epoch(epoch: int | Tensor, p: Tensor) -> None:
    if isinstance(epoch, Tensor):
        if epoch.dtype != torch.int64 or epoch.dim() != 0:
            raise TypeError(
                f"epoch must be an integer or a 0-dim int64 tensor, got {epoch.dtype} of shape {tuple(epoch.shape)}; "
                "pass torch.tensor(epoch) of an int."
            )
        if epoch.device != p.device:
            raise ValueError(f"epoch must be on p's device {p.device}, got {epoch.device}; pass epoch.to(p.device).")
        _address("epoch", epoch)
    elif not -(2**63) <= _integer("epoch", epoch, "an integer or a 0-dim int64 tensor") < 2**63:
        raise ValueError(f"epoch must be in [-2**63, 2**63), got {epoch}; count epochs from 0.")


def _invalid(p: Tensor, index: int) -> ValueError:
    return ValueError(
        f"p[{index}] is {p[index].item()}, not a probability; every entry of p must be in [0, 1] (sanitise it with "
        "torch.nan_to_num and clamp)."
    )


def _outputs(p: Tensor, length: int) -> tuple[Tensor, Tensor]:
    indices = torch.empty(length, dtype=torch.int64, device=p.device)
    return indices, torch.empty(length, dtype=torch.float32, device=p.device)


def _sample_cpu(p: Tensor, seed: int, epoch: int | Tensor, capacity: int | None) -> Sample:
    source = (_address("p", p), p.dtype == torch.float64, p.numel())
    threads = torch.get_num_threads()
    workspace = torch.empty(_native.cpu_workspace(p.numel()), dtype=torch.int64, device="cpu")
    base = _address("a new tensor", workspace)
    selection = _native.cpu_select(*source, seed, int(epoch), threads, base)
    if selection.invalid != _native.NO_INVALID:
        raise _invalid(p, selection.invalid)
    length = selection.count if capacity is None else capacity
    indices, weights = _outputs(p, length)
    _native.cpu_write(*source, selection, threads, base, indices.data_ptr(), weights.data_ptr(), length)
    del workspace  # alive until here: torch.compile's pieces drop what is not named again, and this has an address
    return Sample(indices, weights, torch.tensor(selection.count, device=p.device))


@lru_cache(maxsize=256)
def _launch_shape(n: int, device: int) -> tuple[Any, int]:
    """How n items are drawn on a device, and the 8-byte words of the workspace."""
    shape = _native.cuda_shape(n, device)
    return shape, _native.cuda_workspace(n, shape.blocks)


def _sample_cuda(p: Tensor, seed: int, epoch: int | Tensor, capacity: int | None) -> Sample:
    """On p's device, which is the current one. Short on the host: that is what a draw of a million items waits for."""
    source, n, device = _address("p", p), p.numel(), p.device
    shape, words = _launch_shape(n, device.index)
    workspace = torch.empty(words + 1, dtype=torch.int64, device=device)
    base, count = _address("a new tensor", workspace), workspace[words]
    number, pointer = (0, epoch.data_ptr()) if isinstance(epoch, Tensor) else (int(epoch), 0)
    draw = (source, p.dtype == torch.float64, n, seed, number, pointer, device.index, base)
    stream = current_stream(device.index)
    if capacity is None:
        _native.cuda_select(*draw, stream, shape)
        found = workspace[: 3 * shape.blocks].cpu()  # the one wait for the host
        capacity, invalid = _native.cuda_totals(found.data_ptr(), shape.blocks)
        if invalid != _native.NO_INVALID:
            raise _invalid(p, invalid)
        write = _native.cuda_write
    else:
        write = _native.cuda_draw
    indices, weights = _outputs(p, capacity)
    write(*draw, stream, shape, indices.data_ptr(), weights.data_ptr(), capacity, base + 8 * words)
    del p, workspace  # as on the CPU
    return Sample(indices, weights, count)
