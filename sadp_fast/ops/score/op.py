"""From a batch's energies to the scores' slots, in two small kernels, and the energy of a tensor in one.

The plain torch counterparts are ``score.spike_aware_score`` and ``reference.lif.squared_norm_per_example``.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ..common.dtypes import KERNEL_DTYPES
from ..common.launch import Launch
from ..common.layout import inner_is_dense
from ..common.prepared import keep
from .kernels import energy_kernel, scatter_kernel, score_kernel

_LARGEST = 1 << 20  # elements of an example that one program sums; above, torch has the better reduction
_TILE = 1024  # layers times examples of a program

_energy: dict[tuple, Launch] = {}
_score_and_scatter: dict[tuple, tuple[Launch, Launch]] = {}


def write_energy(t: Tensor, out: Tensor, add: bool) -> bool:
    """Write (or add) the squared norm of each example of t [T, N, *], summed over time, into out, float32 [N].

    Returns whether it was done: not for other dtypes than float32, float16 and bfloat16, nor for examples that are not
    one block of memory, or very large.
    """
    steps, examples = t.shape[:2]
    size = math.prod(t.shape[2:])
    if (
        t.dtype not in KERNEL_DTYPES
        or not 0 < steps * size <= _LARGEST
        or examples == 0
        or out.device != t.device
        or not inner_is_dense(t)
    ):
        return False
    key = (t.dtype, t.shape, t.stride()[:2], t.device, add)
    launch = _energy.get(key)
    if launch is None:
        constants = {"T": steps, "SIZE": size, "ADD": add, "num_warps": 4, "enable_fp_fusion": False}
        launch = keep(_energy, key, Launch(energy_kernel, t.device, examples, t.stride()[:2], constants))
    launch(t, out)
    return True


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
    launches = _score_and_scatter.get(key)
    if launches is None:
        padded = triton.next_power_of_2(layers)
        block = min(triton.next_power_of_2(examples), max(16, _TILE // padded))
        options = {"BLOCK": block, "num_warps": 4, "enable_fp_fusion": False}
        constants = {"LAYERS": padded, "WEIGHTED": weights is not None, "AVERAGED": momentum > 0, **options}
        where = (energies.device, triton.cdiv(examples, block))
        numbers = (examples, layers, stride, mean_factor, momentum)
        launches = (
            Launch(score_kernel, *where, numbers, constants),
            Launch(scatter_kernel, *where, (examples,), options),
        )
        keep(_score_and_scatter, key, launches)
    score, scatter = launches
    scores = torch.empty_like(energies[0])
    indices, weights = indices.contiguous(), energies if weights is None else weights.contiguous()
    # Read before any slot is emptied: of an example that occurs twice, each of its rows needs the old score.
    old = slots.index_select(0, indices) if momentum > 0 else scores
    score(energies, layer_rows, multiplicity, loss_gradient, weights, indices, slots, scores, old)
    scatter(scores, indices, slots.view(torch.int32))
