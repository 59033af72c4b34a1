"""From the examples drawn for an epoch to batches of one constant size: pure functions, no host synchronisation.

cuDNN, compilers and CUDA graphs all prepare anew for each new shape, so an epoch's remainder is not trained as a
smaller batch: it is carried over to the next epoch, or filled up with examples of weight 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Drawn(NamedTuple):
    """Drawn examples: indices int64 [K] and their weights float32 [K]."""

    indices: Tensor
    weights: Tensor

    @classmethod
    def nothing(cls, device: torch.device) -> Drawn:
        """No example."""
        return cls(*(torch.empty(0, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32)))


class EpochBatches(NamedTuple):
    """Batches of one epoch: indices int64 [batches, B], weights float32 [batches, B], and how many rows are padding.

    The padding, if any, stands at the end of the last batch: real examples again, with weight 0.
    """

    indices: Tensor
    weights: Tensor
    padding: int


def shuffled(drawn: Drawn, *, seed: int, epoch: int) -> Drawn:
    """The same examples in an order that depends on (seed, epoch) alone, whatever the device."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + epoch) % 2**63)
    order = torch.randperm(drawn.indices.shape[0], generator=generator, device="cpu").to(drawn.indices.device)
    return Drawn(drawn.indices[order], drawn.weights[order])


def pack(drawn: Drawn, carried: Drawn, batch_size: int, *, pad: bool) -> tuple[EpochBatches, Drawn]:
    """Cut carried-over examples followed by drawn ones into batches.

    Args:
        drawn: this epoch's examples, shuffled.
        carried: what the last epoch left over (at most batch_size - 1); trained first.
        batch_size: B.
        pad: fill the last batch up with weight 0, instead of carrying the remainder over. An epoch that would have no
            batch at all is padded in any case.

    Returns:
        the batches, and the remainder to carry over.
    """
    if carried.indices.shape[0]:
        # An example that is both carried over and drawn again must not meet itself in the first batch.
        last = torch.isin(drawn.indices, carried.indices).to(torch.int8)
        order = torch.argsort(last, stable=True)
        indices = torch.cat((carried.indices, drawn.indices[order]))
        weights = torch.cat((carried.weights, drawn.weights[order]))
    else:
        indices, weights = drawn
    total = indices.shape[0]
    padding = -total % batch_size if pad or total < batch_size else 0
    if padding:
        repeat = torch.arange(padding, device=indices.device) % total
        indices = torch.cat((indices, indices[repeat]))
        weights = torch.cat((weights, weights.new_zeros(padding)))
    full = indices.shape[0] // batch_size * batch_size
    batches = EpochBatches(indices[:full].view(-1, batch_size), weights[:full].view(-1, batch_size), padding)
    return batches, Drawn(indices[full:], weights[full:])


def rank_and_world() -> tuple[int, int]:
    """This process's rank under torch.distributed, and how many there are; (0, 1) without."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
