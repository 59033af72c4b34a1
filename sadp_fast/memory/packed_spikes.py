"""Low-memory training: spikes that wait for the backward pass are kept as bits.

Convolutions and linear layers keep their input for the backward pass. Where that input is a neuron's output, it holds
integers 0..k (k = 1 for plain spikes), of which ``packed_spikes`` keeps the k.bit_length() bits of each value: 1/16 of
the bytes of bfloat16 spikes, 1/32 of float32. The dense tensor is freed when the forward pass is done with it and is
written anew, bit for bit, for the layer's backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ..ops.common.dtypes import KERNEL_DTYPES
from ..ops.common.layout import is_dense
from ..ops.common.spike_marks import marked_owner, promised
from ..ops.spike_bits import reference as reference

MAX_PLANES = 4  # values of more bits are kept as they are


def packed_spikes() -> saved_tensors_hooks:
    """Context manager for the forward pass: marked tensors that autograd saves are saved as bits.

    ``with packed_spikes(): loss = criterion(model(x), target)``, then ``loss.backward()`` inside or outside. Gradients
    are bit for bit those of dense spikes. A tensor saved by several layers (its views included) is packed once, and
    expanded once for those that need it at the same time. Kept dense are tensors of which nothing says that they are
    small whole numbers (``spike_marks.mark``; neurons mark their spikes, autocast's copies are not marked), values of
    more than four bits, and dtypes other than float32, float16 and bfloat16. Inside other ``saved_tensors_hooks`` the
    innermost ones act alone, as always in torch. Works while a CUDA graph is recorded; ``torch.compile``d parts keep
    what they keep.
    """
    return saved_tensors_hooks(partial(_pack, WeakTensorKeyDictionary()), unpack)


class _PackedBlock:
    """``count`` neighbouring elements of a marked tensor's storage as bits."""

    def __init__(self, owner: Tensor, offset: int, count: int) -> None:
        self.offset, self.count, self.dtype = offset, count, owner.dtype
        self.max_count: int = promised(owner)
        self.bits = _pack_bits(owner.detach().as_strided((count,), (1,), offset), self.max_count)
        self._owner = TensorWeakRef(owner)
        self._version, self._address = owner._version, owner.data_ptr()
        self._expanded: StorageWeakRef | None = None

    def view(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor:
        """Its elements as they were; ``offset`` in elements from the block's first."""
        owner: Tensor | None = self._owner()
        if owner is not None and owner._version == self._version and owner.data_ptr() == self._address:
            return owner.detach().as_strided(shape, strides, self.offset + offset)
        # By storage: autograd takes the tensor that it gets apart, but the memory is the same.
        storage = None if self._expanded is None else torch.UntypedStorage._new_with_weak_ptr(self._expanded.cdata)
        if storage is None:
            storage = _unpack_bits(self.bits, self.count, self.max_count, self.dtype).untyped_storage()
            self._expanded = StorageWeakRef(storage)
        return self.bits.new_empty(0, dtype=self.dtype).set_(storage, offset, shape, strides)


def _pack(blocks: WeakTensorKeyDictionary, tensor: Tensor) -> Callable[[], Tensor]:
    """What gives the tensor back."""
    owner = marked_owner(tensor)
    source = None if owner is None else _block_to_pack(tensor, owner)
    if owner is None or source is None:
        # Detached, since an output that its own node keeps would otherwise keep that node alive.
        return partial(_unchanged, tensor.detach(), tensor._version)
    offset, count = int(source.storage_offset()), source.numel()
    # Memory of one stream must not be used on another one without waiting: each has its own bits.
    stream = torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
    key = (offset, count, owner._version, stream)
    of_owner = blocks.setdefault(owner, {})
    if key not in of_owner:
        of_owner[key] = _PackedBlock(owner, offset, count)
    return partial(of_owner[key].view, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - offset)


def unpack(saved: Callable[[], Tensor]) -> Tensor:
    """What ``packed_spikes`` has saved."""
    return saved()


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    """A tensor kept as it is, with the version check that torch leaves to the hooks."""
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was changed in place (version "
            f"{tensor._version}, saved at {version}): clone it before the change"
        )
    return tensor


def _block_to_pack(tensor: Tensor, owner: Tensor) -> Tensor | None:
    """The tensor whose elements, neighbours in memory, are to be packed for ``tensor``; None to keep it dense."""
    packs = owner.dtype in KERNEL_DTYPES and 0 <= promised(owner) < 1 << MAX_PLANES and tensor.numel() > 0
    if not packs:
        return None
    # Repeated elements (stride 0) and gaps: the whole of the owner, which other views then share.
    return next((candidate for candidate in (tensor, owner) if is_dense(candidate)), None)


def _pack_bits(flat: Tensor, max_count: int) -> Tensor:
    if flat.is_cuda:
        from ..ops.spike_bits import op as ops  # Triton is imported where it is used, so that CPU users need no Triton

        return ops.pack(flat, max_count)
    bits = reference.pack(flat, max_count)
    if reference.broken(bits, flat.numel()).any():
        raise ValueError(
            f"a tensor marked as holding integers 0..{max_count} holds other values: give spike_marks.mark the "
            "greatest value, or do not mark it"
        )
    return bits


def _unpack_bits(bits: Tensor, count: int, max_count: int, dtype: torch.dtype) -> Tensor:
    if bits.is_cuda:
        from ..ops.spike_bits import op as ops

        return ops.unpack(bits, count, max_count, dtype)
    return reference.unpack(bits, count, max_count, dtype)
