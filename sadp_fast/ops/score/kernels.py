"""The energies of a batch, and from them to the scores' slots."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def energy_kernel(t_ptr, out_ptr, stride_t, stride_n, T: tl.constexpr, SIZE: tl.constexpr, ADD: tl.constexpr):
    """Sum of squares of example n = program, over T steps of SIZE neighbouring elements."""
    BLOCK: tl.constexpr = 1024
    n = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    start = t_ptr + n.to(tl.int64) * stride_n
    for _ in range(T):
        for first in range(0, SIZE, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            value = tl.load(start + offsets, mask=offsets < SIZE, other=0.0).to(tl.float32)
            total += value * value
        start += stride_t
    energy = tl.sum(total, 0)
    if ADD:
        energy += tl.load(out_ptr + n)
    tl.store(out_ptr + n, energy)


@triton.jit
def score_kernel(
    energies_ptr,
    rows_ptr,
    multiplicity_ptr,
    gradient_ptr,
    weights_ptr,
    indices_ptr,
    slots_ptr,
    scores_ptr,
    old_ptr,
    examples,
    layers,
    stride,  # of the energies' rows
    mean_factor,
    momentum,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    AVERAGED: tl.constexpr,
):
    """The scores of BLOCK examples; their slots are emptied, and the energies set to NaN for the next batch."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    layer = tl.arange(0, LAYERS)
    is_layer, is_example = layer < layers, n < examples
    mask = is_layer[:, None] & is_example[None, :]
    input_row = tl.load(rows_ptr + layer, mask=is_layer, other=0)
    delta_row = tl.load(rows_ptr + layers + layer, mask=is_layer, other=0)
    inputs = energies_ptr + input_row[:, None] * stride + n[None, :]
    deltas = energies_ptr + delta_row[:, None] * stride + n[None, :]
    multiplicity = tl.load(multiplicity_ptr + layer, mask=is_layer, other=0.0)
    bound = tl.sqrt_rn(tl.load(inputs, mask=mask, other=0.0)) * tl.sqrt_rn(tl.load(deltas, mask=mask, other=0.0))
    bound *= tl.sqrt_rn(multiplicity)[:, None]
    # Scaled by the largest, so that its square does not overflow.
    largest = tl.max(bound, 0)
    unit = tl.where(largest > 0, largest, 1.0)
    relative = bound / unit[None, :]
    score = tl.sqrt_rn(tl.sum(relative * relative, 0)) * unit

    # Back to the unweighted loss: out go the scaler's factor, 1/B and the example's weight.
    factor = tl.abs(tl.load(gradient_ptr).to(tl.float32)) * mean_factor + tl.zeros([BLOCK], tl.float32)
    if WEIGHTED:
        factor *= tl.load(weights_ptr + n, mask=is_example, other=0.0)
    score = score / factor
    usable = is_example & (factor > 0) & (score < float("inf"))  # NaN is not below
    if AVERAGED:
        old = tl.load(old_ptr + n, mask=is_example, other=0.0)
        score = tl.where(old >= 0, momentum * old + (1 - momentum) * score, score)  # NaN: never scored
    slot = tl.load(indices_ptr + n, mask=usable, other=0)
    tl.store(scores_ptr + n, tl.where(usable, score, float("nan")), mask=is_example)
    tl.store(slots_ptr + slot, tl.zeros([BLOCK], tl.float32), mask=usable)
    # Rows are shared between layers: all are read before any is written.
    tl.debug_barrier()
    nothing = tl.full([LAYERS, BLOCK], float("nan"), tl.float32)
    tl.store(inputs, nothing, mask=mask)
    tl.store(deltas, nothing, mask=mask)


@triton.jit
def scatter_kernel(scores_ptr, indices_ptr, slot_bits_ptr, examples, BLOCK: tl.constexpr):
    """The largest score of each example into its slot; floats that are not negative are ordered as their bits."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores_ptr + n, mask=n < examples, other=float("nan"))
    usable = score == score
    index = tl.load(indices_ptr + n, mask=usable, other=0)
    tl.atomic_max(slot_bits_ptr + index, score.to(tl.int32, bitcast=True), mask=usable)
