"""Launching the LIF kernels (lif_kernels.py).

Reading order: what was tuned, what a pass is told, plans (a pass prepared for one shape, layout and neuron, and kept),
``run_forward`` and ``run_backward`` (a pass by its plan).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..common.autotune import Choices, at_the_start
from ..common.dynamics import Dynamics
from ..common.equations import LEAK, LEAK_WITH_INPUT_DECAY, LEARNED_RECIPROCAL, NO_LEAK, POWER_OF_TWO, TIME_CONSTANT
from ..common.launch import Launch, early_launch, keep, multiprocessors
from ..common.layout import (
    Sequence,
    has_strides,
    inner_is_dense,
    laid_out,
    v_like,
    v_strides,
    with_dense_inner,
    with_inner_order_of,
)
from .kernels import _lif_backward_kernel, _lif_forward_kernel

# ------------------------------------------------------------------------------------------------------- the tuning

# By bytes of an element of x: the most steps of a chunk. One float32 potential a chunk is 1/16 of the input's bytes.
LONGEST_CHUNK = {4: 16, 2: 32}


class Tuning(NamedTuple):
    """How a kernel is launched, as a rule for grids of any size.

    elements: of a step that a thread holds; fewer where there would be less than ``warps_per_multiprocessor``, the
    warps of the whole grid for each of the GPU's multiprocessors. warps: of a program; with one, its reductions are
    shuffles, without barriers. tile: whether a chunk is walked over a tile of its steps' values, loaded before the walk
    (of several chunks, while the one in front is worked on), or by a recursion that loads on its way in. call_ahead: of
    several chunks, where the warps are fewer than that, how many chunks before its time a program's input is called
    into the L2 cache (0: never); with enough warps it only costs instructions.
    """

    elements: int
    warps: int = 1
    warps_per_multiprocessor: int = 8
    tile: bool = False
    call_ahead: int = 0


# Several chunks: two elements share a step's instructions (at T = 64 8 % less time in float32, 22 % in bfloat16), which
# is worth more than warps until there are only four a multiprocessor (at T = 256 8 and 10 % less).
_SEVERAL = Tuning(2, warps_per_multiprocessor=4, tile=True)

# By direction and bytes of an element: (T up to, launch), ... of one chunk; the last is for more. Chosen on an H100.
# One chunk: the forward kernel wants wide accesses and few reductions, and prefers them to more than three or four
# warps a multiprocessor (at T = 4 and 65,536 neurons 30 % less time in float32, 37 % in bfloat16); the backward kernel,
# which holds a float32 for each element and step, wants registers for many warps before 16-byte accesses.
TUNING: dict[tuple[str, int], tuple[tuple[float, Tuning], ...]] = {
    ("forward", 4): (
        (8, Tuning(8, warps_per_multiprocessor=4)),
        (16, Tuning(4, warps_per_multiprocessor=4)),
        (math.inf, _SEVERAL._replace(call_ahead=3)),
    ),
    ("forward", 2): (
        (8, Tuning(8, warps_per_multiprocessor=3)),
        (32, Tuning(4, warps_per_multiprocessor=4)),
        (math.inf, _SEVERAL._replace(call_ahead=3)),
    ),
    ("backward", 4): ((4, Tuning(4)), (16, Tuning(2)), (math.inf, _SEVERAL._replace(call_ahead=2))),
    ("backward", 2): (
        (4, Tuning(8, warps_per_multiprocessor=4)),
        (8, Tuning(4)),
        (16, Tuning(2)),
        (32, Tuning(1)),  # at T = 32 14 to 19 % less time than with two
        (math.inf, _SEVERAL._replace(call_ahead=2)),
    ),
}


class Configuration(NamedTuple):
    """How a kernel is launched for one shape: a ``Tuning`` applied to it, or another."""

    elements: int
    warps: int
    tile: bool
    call_ahead: int


def chunk_steps(steps: int, element_size: int) -> int:
    """Steps of a chunk: as few chunks as LONGEST_CHUNK allows, of one length."""
    return triton.cdiv(steps, triton.cdiv(steps, LONGEST_CHUNK[element_size]))


def takes_several_chunks(x: Tensor) -> bool:
    """Whether x [T, N, *] has more steps than one chunk, so that a backward pass needs the potentials in between."""
    return x.shape[0] > LONGEST_CHUNK[x.element_size()]


# -------------------------------------------------------------------------------------------------- launch plans


class Constants(NamedTuple):
    """A neuron's numbers in the order of the operators' schema; tau is 1 where it is learned."""

    v_init: float
    tau: float
    leak: bool
    decay_input: bool
    v_threshold: float
    v_rest: float
    soft_reset: bool


@functools.lru_cache
def constants_of(dynamics: Dynamics, v_init: float) -> Constants:
    d = dynamics
    tau = 1.0 if d.constant_tau is None else d.constant_tau
    return Constants(v_init, tau, d.tau is not None, d.decay_input, d.v_threshold, d.v_rest, d.v_reset is None)


class Stores(NamedTuple):
    """What a forward pass writes."""

    spikes: bool = True
    v: bool = True
    v_seq: bool = False
    checkpoints: bool = False
    counts: bool = False


class Wanted(NamedTuple):
    """What a backward pass writes beside the gradient of x."""

    grad_v_init: bool
    norms: bool
    grad_tau: bool


def _candidates(x: Tensor, direction: str) -> list[Configuration]:
    """What TUNING says of x [T, N, *], and other configurations that an ``autotune`` measures."""
    steps, neurons = x.shape[0], math.prod(x.shape[1:])
    several = takes_several_chunks(x)
    launches = TUNING[direction, x.element_size()]
    tuning = launches[-1][1] if several else next(how for most, how in launches if steps <= most)
    elements, needed = tuning.elements, 32 * tuning.warps_per_multiprocessor * multiprocessors(x.device)
    few = neurons < elements * needed
    while elements > 1 and neurons < elements * needed:
        elements //= 2
    curated = Configuration(elements, tuning.warps, tuning.tile, tuning.call_ahead if several and few else 0)
    if several:
        others = [curated._replace(elements=e, call_ahead=a) for e in (1, 2, 4) for a in (0, tuning.call_ahead)]
    else:
        others = [curated._replace(elements=e, warps=w) for e in (2, 4, 8) for w in (1, 4)]
    return list(dict.fromkeys([curated, *others]))


class _Grid:
    """How one tensor [T, N, *] with dense inner dimensions is cut into programs."""

    def __init__(self, x: Tensor, configuration: Configuration) -> None:
        self.configuration = configuration
        self.steps, self.examples = x.shape[:2]
        self.size = math.prod(x.shape[2:])
        self.chunk = chunk_steps(self.steps, x.element_size())
        lanes = 32 * configuration.warps
        self.block = max(lanes, min(lanes * configuration.elements, triton.next_power_of_2(self.size)))
        self.blocks = triton.cdiv(self.size, self.block)
        self.programs = self.examples * self.blocks
        self.partials = (self.examples, self.blocks, self.steps)
        self.early = early_launch(x.device)
        # Elements of an access: 16 bytes of them, or one where Triton does not know that all rows begin at a multiple.
        aligned = all(n % 16 == 0 for n in (self.size, *x.stride()[:2]))
        self.widest = 16 // x.element_size() if aligned else 1

    @property
    def elements(self) -> int:
        """Of a step that a thread holds."""
        return self.block // (32 * self.configuration.warps)

    @property
    def neighbours(self) -> int:
        """Where a program sums up its chunk's steps at once, elements that lie side by side in a thread; else 0.

        That is where it pays: one warp, and 16 steps. Fewer have few exchanges to save, and 32 too many sums to keep in
        registers meanwhile (on an H100, bfloat16 and T = 32, 9 % more time than one by one). Older versions of Triton
        have no exchange to do it with.
        """
        how = self.configuration
        if how.warps > 1 or how.tile or not 8 < self.chunk <= 16 or not hasattr(triton.language, "gather"):
            return 0
        return min(self.elements, self.widest)

    def constants(self, neuron: Constants, learned_tau: bool) -> dict[str, Any]:
        if not neuron.leak:
            dynamics = NO_LEAK
        else:
            dynamics = LEAK_WITH_INPUT_DECAY if neuron.decay_input else LEAK
        power_of_two = math.frexp(neuron.tau)[0] == 0.5
        return {
            "T": self.steps,
            "CHUNK": self.chunk,
            "LANES": triton.next_power_of_2(max(self.chunk, 2 if self.configuration.tile else 1)),
            "BLOCK": self.block,
            "ELEMENTS": self.elements,
            "DYNAMICS": dynamics,
            "TAU": LEARNED_RECIPROCAL if learned_tau else POWER_OF_TWO if power_of_two else TIME_CONSTANT,
            "SOFT_RESET": neuron.soft_reset,
            "REST_AT_ZERO": neuron.v_rest == 0.0,
            "EVEN": self.size % self.block == 0,  # no thread is beyond an example's end
            "TILE": self.configuration.tile,
            "CALL_AHEAD": self.configuration.call_ahead,
            "num_warps": self.configuration.warps,
            "enable_fp_fusion": False,
            **self.early,
        }


class _ForwardPlan:
    """A forward pass prepared for one shape, layout, dtype and neuron."""

    def __init__(
        self,
        configuration: Configuration,
        x: Tensor,
        neuron: Constants,
        has_v_init: bool,
        learned_tau: bool,
        stores: Stores,
    ) -> None:
        grid = _Grid(x, configuration)
        self.stores, self.sequence, self.v_strides = stores, Sequence(x), v_strides(x)
        self.checkpoints = (triton.cdiv(grid.steps, grid.chunk) - 1, *x.shape[1:]) if stores.checkpoints else None
        self.partials = grid.partials
        self.launch = None
        if x.numel() > 0:
            constants = grid.constants(neuron, learned_tau) | {
                "HAS_V_INIT": has_v_init,
                "STORE_SPIKES": stores.spikes,
                "STORE_V": stores.v,
                "STORE_V_SEQ": stores.v_seq,
                "STORE_CHECKPOINTS": stores.checkpoints,
                "COUNT_SPIKES": stores.counts,
            }
            numbers = (grid.size, grid.blocks, grid.examples, *x.stride()[:2])
            numbers += (neuron.v_init, neuron.tau, neuron.v_threshold, neuron.v_rest)
            self.launch = Launch(_lif_forward_kernel, x.device, grid.programs, numbers, constants)

    def run(self, x: Tensor, v_init: Tensor | None, reciprocal_tau: Tensor | None) -> tuple[Tensor | None, ...]:
        stores, sequence = self.stores, self.sequence
        if v_init is not None:
            v_init = laid_out(v_init, self.v_strides)
        spikes = sequence.empty(x, x.dtype) if stores.spikes else None
        v = v_like(x) if stores.v else None
        v_seq = sequence.empty(x, torch.float32) if stores.v_seq else None
        checkpoints = None
        if self.checkpoints is not None:
            checkpoints = x.new_empty_strided(self.checkpoints, sequence.strides, dtype=torch.float32)
        count = x.new_empty(self.partials, dtype=torch.int32) if stores.counts else None
        if self.launch is not None:
            tensors = (v_init, reciprocal_tau, spikes, v, v_seq, checkpoints, count)
            self.launch(x, *[x if t is None else t for t in tensors])
        return spikes, v, v_seq, checkpoints, count


class _BackwardPlan:
    """A backward pass prepared for one shape, layout, dtype, neuron and flow of gradients."""

    def __init__(
        self,
        configuration: Configuration,
        x: Tensor,
        grad_spikes: Tensor,
        neuron: Constants,
        options: tuple[bool, int, float],
        has: tuple[bool, bool, bool, bool, bool],
        wanted: Wanted,
    ) -> None:
        grid = _Grid(x, configuration)
        detach_reset, surrogate, alpha = options
        has_v_init, learned_tau, has_grad_v, has_grad_v_seq, has_channel_scale = has
        self.sequence, self.v_strides = Sequence(x), v_strides(x)
        self.wants_grad_v_init = wanted.grad_v_init
        self.partials = grid.partials if wanted.norms else None
        self.programs = grid.programs if wanted.grad_tau else None
        self.launch = None
        if x.numel() > 0:
            constants = grid.constants(neuron, learned_tau) | {
                "DETACH_RESET": detach_reset,
                "HAS_V_INIT": has_v_init,
                "HAS_GRAD_V_FINAL": has_grad_v,
                "HAS_GRAD_V_SEQ": has_grad_v_seq,
                "STORE_GRAD_V_INIT": wanted.grad_v_init,
                "HAS_CHANNEL_SCALE": has_channel_scale,
                "GRAD_NORM": wanted.norms,
                "NEIGHBOURS": grid.neighbours if wanted.norms else 0,
                "GRAD_TAU": wanted.grad_tau,
                "SURROGATE": surrogate,
            }
            channels = (x.shape[2], x.stride(2)) if has_channel_scale else (1, 1)
            numbers = (grid.size, grid.blocks, grid.examples, *channels, *x.stride()[:2], *grad_spikes.stride()[:2])
            numbers += (neuron.v_init, neuron.tau, neuron.v_threshold, neuron.v_rest, alpha)
            self.launch = Launch(_lif_backward_kernel, x.device, grid.programs, numbers, constants)

    def run(
        self,
        x: Tensor,
        v_init: Tensor | None,
        reciprocal_tau: Tensor | None,
        checkpoints: Tensor | None,
        grad_spikes: Tensor,
        grad_v: Tensor | None,
        grad_v_seq: Tensor | None,
        channel_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        v_init, grad_v = laid_out(v_init, self.v_strides), laid_out(grad_v, self.v_strides)
        channel_scale = laid_out(channel_scale, (1,))
        # What was saved with x fits its layout, unless a hook gave x back in another one.
        checkpoints, grad_v_seq = (laid_out(t, self.sequence.strides) for t in (checkpoints, grad_v_seq))
        grad_x = self.sequence.empty(x, x.dtype)
        grad_v_init = v_like(x) if self.wants_grad_v_init else None
        norms = None if self.partials is None else x.new_empty(self.partials, dtype=torch.float32)
        grad_tau = None if self.programs is None else x.new_empty(self.programs, dtype=torch.float32)
        if self.launch is not None:
            given = (v_init, reciprocal_tau, checkpoints, grad_spikes, grad_v, grad_v_seq, channel_scale)
            tensors = (*given, grad_x, grad_v_init, norms, grad_tau)
            self.launch(x, *[x if t is None else t for t in tensors])
        return grad_x, grad_v_init, norms, grad_tau


# By what they are prepared for; None where the input has to be rearranged first. Emptied when there are very many, and
# when an ``autotune`` begins.
_forward_plans: dict[tuple, _ForwardPlan | None] = {}
_backward_plans: dict[tuple, _BackwardPlan | None] = {}

_CHOICES: dict[str, Choices[Configuration]] = {name: Choices(f"LIF {name}") for name in ("forward", "backward")}


@at_the_start
def _forget_plans() -> None:
    _forward_plans.clear()
    _backward_plans.clear()


def _planned(
    direction: str,
    key: tuple,
    x: Tensor,
    make: Callable[[Configuration], Any],
    tensors: tuple[Tensor | None, ...],
) -> Any:
    """The plan of the configuration that is curated, or fastest with these tensors."""
    plan = functools.cache(make)
    return plan(_CHOICES[direction](key, x, lambda: _candidates(x, direction), lambda c: plan(c).run(*tensors)))


def run_forward(
    x: Tensor, v_init: Tensor | None, reciprocal_tau: Tensor | None, neuron: Constants, stores: Stores
) -> tuple[Tensor | None, ...]:
    """spikes, final v, v_seq, checkpoints and partial spike counts [N, blocks, T]; None for what is not stored."""
    has = (v_init is not None, reciprocal_tau is not None)
    key = (x.shape, x.stride(), x.dtype, x.device, neuron, has, stores)
    try:
        plan = _forward_plans[key]
    except KeyError:
        plan = None
        if inner_is_dense(x):
            plan = _planned(
                "forward",
                key,
                x,
                lambda configuration: _ForwardPlan(configuration, x, neuron, *has, stores),
                (x, v_init, reciprocal_tau),
            )
        keep(_forward_plans, key, plan)
    if plan is None:
        return run_forward(x.contiguous(), v_init, reciprocal_tau, neuron, stores)
    return plan.run(x, v_init, reciprocal_tau)


def run_backward(
    x: Tensor,
    v_init: Tensor | None,
    reciprocal_tau: Tensor | None,
    checkpoints: Tensor | None,
    grad_spikes: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    channel_scale: Tensor | None,
    neuron: Constants,
    options: tuple[bool, int, float],
    wanted: Wanted,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """grad_x, and what is wanted: grad_v_init, partial sums of grad_x's squares [N, blocks, T], and those of the
    gradient with respect to 1 / tau, [programs]."""
    gs = x.new_zeros((1,) * x.ndim).expand(x.shape) if grad_spikes is None else grad_spikes
    has = (
        v_init is not None,
        reciprocal_tau is not None,
        grad_v is not None,
        grad_v_seq is not None,
        channel_scale is not None,
    )
    layouts = (x.shape, x.stride(), x.dtype, gs.stride(), gs.dtype, x.device)
    key = (layouts, neuron, options, has, wanted)
    others = (grad_v, grad_v_seq, channel_scale)
    try:
        plan = _backward_plans[key]
    except KeyError:
        plan = None
        if inner_is_dense(x) and has_strides(gs, x.stride(), 2):
            plan = _planned(
                "backward",
                key,
                x,
                lambda configuration: _BackwardPlan(configuration, x, gs, neuron, options, has, wanted),
                (x, v_init, reciprocal_tau, checkpoints, gs, *others),
            )
        keep(_backward_plans, key, plan)
    if plan is None:
        x = with_dense_inner(x)
        gs = with_inner_order_of(x, gs)
        return run_backward(x, v_init, reciprocal_tau, checkpoints, gs, *others, neuron, options, wanted)
    return plan.run(x, v_init, reciprocal_tau, checkpoints, gs, *others)


def add_partials(partials: Tensor) -> Tensor:
    """[N, blocks, T] -> [T, N], contiguous, in a fixed order."""
    sums = partials.squeeze(1) if partials.shape[1] == 1 else partials.sum(1, dtype=partials.dtype)
    return sums.t().contiguous()
