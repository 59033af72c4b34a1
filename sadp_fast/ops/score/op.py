"""From a batch's energies to the scores' slots, in two small kernels, and the energy of a tensor in one.

The plain torch counterparts are ``score.spike_aware_score`` and ``reference.lif.squared_norm_per_example``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Launch
from ..common.layout import inner_is_dense

_LARGEST = 1 << 20  # elements of an example that one program sums; above, torch has the better reduction
_TILE = 1024  # layers times examples of a program

_launches: dict[tuple, Launch] = {}


@triton.jit
def _energy_kernel(t_ptr, out_ptr, stride_t, stride_n, T: tl.constexpr, SIZE: tl.constexpr, ADD: tl.constexpr):
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


def write_energy(t: Tensor, out: Tensor, add: bool) -> bool:
    """Write (or add) the squared norm of each example of t [T, N, *], summed over time, into out, float32 [N].

    Returns whether it was done: not for other dtypes than float32, float16 and bfloat16, nor for examples that are not
    one block of memory, or very large.
    """
    steps, examples = t.shape[:2]
    size = math.prod(t.shape[2:])
    if (
        t.dtype not in (torch.float32, torch.float16, torch.bfloat16)
        or not 0 < steps * size <= _LARGEST
        or examples == 0
        or out.device != t.device
        or not inner_is_dense(t)
    ):
        return False
    key = ("energy", t.dtype, t.shape, t.stride()[:2], t.device, add)
    launch = _launches.get(key)
    if launch is None:
        constants = {"T": steps, "SIZE": size, "ADD": add, "num_warps": 4, "enable_fp_fusion": False}
        launch = _launches[key] = Launch(_energy_kernel, t.device, examples, t.stride()[:2], constants)
    launch(t, out)
    return True


@triton.jit
def _score_kernel(
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
def _scatter_kernel(scores_ptr, indices_ptr, slot_bits_ptr, examples, BLOCK: tl.constexpr):
    """The largest score of each example into its slot; floats that are not negative are ordered as their bits."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores_ptr + n, mask=n < examples, other=float("nan"))
    usable = score == score
    index = tl.load(indices_ptr + n, mask=usable, other=0)
    tl.atomic_max(slot_bits_ptr + index, score.to(tl.int32, bitcast=True), mask=usable)


def update_scores(
    energies: Tensor,
    layer_rows: Tensor,
    multiplicity: Tensor,
    loss_gradient: Tensor,
    mean_factor: float,
    weights: Tensor | None,
    indices: Tensor,
    slots: Tensor,
    momentum: float = 0.0,
) -> None:
    """``spike_aware_score`` of a batch, divided by |loss_gradient| mean_factor weight, into the examples' slots.

    Where an example's weight is 0 or its score is not finite, its slot keeps its value; of an example that occurs twice
    the larger score is kept. The energies read are set to NaN. With ``momentum`` > 0, an example that was scored
    before gets momentum * old + (1 - momentum) * new.

    Args:
        energies: float32 [R, B], each row in one block.
        layer_rows: int64 [2, L], rows of each layer's input and delta energy.
        multiplicity: float32 [L].
        loss_gradient: one element, floating.
        weights: float32 [B], or None: all 1.
        indices: int64 [B].
        slots: float32 [N] or longer.
        momentum: in [0, 1).
    """
    examples, layers = indices.shape[0], layer_rows.shape[1]
    stride = energies.stride(0)
    key = (examples, layers, stride, mean_factor, momentum, weights is None, loss_gradient.dtype, energies.device)
    padded = triton.next_power_of_2(layers)
    block = min(triton.next_power_of_2(examples), max(16, _TILE // padded))
    programs = triton.cdiv(examples, block)
    score = _launches.get(("score", key))
    if score is None:
        options = {"num_warps": 4, "enable_fp_fusion": False}
        score = _launches["score", key] = Launch(
            _score_kernel,
            energies.device,
            programs,
            (examples, layers, stride, mean_factor, momentum),
            {"LAYERS": padded, "BLOCK": block, "WEIGHTED": weights is not None, "AVERAGED": momentum > 0, **options},
        )
        _launches["scatter", key] = Launch(
            _scatter_kernel, energies.device, programs, (examples,), {"BLOCK": block, **options}
        )
    scores = torch.empty_like(energies[0])
    indices, weights = indices.contiguous(), energies if weights is None else weights.contiguous()
    # Read before any slot is emptied: of an example that occurs twice, each of its rows needs the old score.
    old = slots.index_select(0, indices) if momentum > 0 else scores
    score(energies, layer_rows, multiplicity, loss_gradient, weights, indices, slots, scores, old)
    _launches["scatter", key](scores, indices, slots.view(torch.int32))
