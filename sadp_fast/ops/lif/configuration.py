"""How the LIF kernels are launched, and what they are compiled for.

Reading order: what was tuned, the configurations of a shape, what they make of it (``Grid`` and its ``Cut``), and what
a kernel gets as HOW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import triton
from torch import Tensor

from ..common.equations import Kind
from ..common.launch import early_launch, multiprocessors

# ------------------------------------------------------------------------------------------------------- the tuning

# By bytes of an element of x: the most steps of a chunk. One float32 potential a chunk is 1/16 of the input's bytes.
LONGEST_CHUNK = {4: 16, 2: 32}


@dataclass(frozen=True)
class Tuning:
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
_SEVERAL_FORWARD = Tuning(2, warps_per_multiprocessor=4, tile=True, call_ahead=3)
_SEVERAL_BACKWARD = replace(_SEVERAL_FORWARD, call_ahead=2)

# By direction and bytes of an element: (T up to, launch), ... of one chunk; the last is for more. Chosen on an H100.
# One chunk: the forward kernel wants wide accesses and few reductions, and prefers them to more than three or four
# warps a multiprocessor (at T = 4 and 65,536 neurons 30 % less time in float32, 37 % in bfloat16); the backward kernel,
# which holds a float32 for each element and step, wants registers for many warps before 16-byte accesses.
TUNING: dict[tuple[str, int], tuple[tuple[float, Tuning], ...]] = {
    ("forward", 4): (
        (8, Tuning(8, warps_per_multiprocessor=4)),
        (16, Tuning(4, warps_per_multiprocessor=4)),
        (math.inf, _SEVERAL_FORWARD),
    ),
    ("forward", 2): (
        (8, Tuning(8, warps_per_multiprocessor=3)),
        (32, Tuning(4, warps_per_multiprocessor=4)),
        (math.inf, _SEVERAL_FORWARD),
    ),
    ("backward", 4): ((4, Tuning(4)), (16, Tuning(2)), (math.inf, _SEVERAL_BACKWARD)),
    ("backward", 2): (
        (4, Tuning(8, warps_per_multiprocessor=4)),
        (8, Tuning(4)),
        (16, Tuning(2)),
        (32, Tuning(1)),  # at T = 32 14 to 19 % less time than with two
        (math.inf, _SEVERAL_BACKWARD),
    ),
}


@dataclass(frozen=True)
class Configuration:
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


def candidates(x: Tensor, direction: str) -> list[Configuration]:
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
        others = [replace(curated, elements=e, call_ahead=a) for e in (1, 2, 4) for a in (0, tuning.call_ahead)]
    else:
        others = [replace(curated, elements=e, warps=w) for e in (2, 4, 8) for w in (1, 4)]
    return list(dict.fromkeys([curated, *others]))


# --------------------------------------------------------------------------------------------------------- the grid


class Cut(NamedTuple):
    """How x [T, N, *] is cut into programs and chunks; all that follows from that is worked out here."""

    steps: int  # T
    chunk: int  # steps of a chunk
    lanes: int  # of a vector that has one for each step of a chunk
    block: int  # elements of a program
    elements: int  # of a step, that a thread holds
    tile: bool  # whether a chunk is loaded as a whole before it is walked
    call_ahead: int  # chunks before its time that an input is called into the cache; 0: it is not
    early: bool  # whether the kernel calls ``await_previous_kernel``
    neighbours: int  # of a thread's elements, to sum up all steps at once; 0: one by one
    even: bool  # no thread is beyond an example's end
    several: bool  # there are several chunks
    ragged: bool  # the last chunk has steps beyond T, in which nothing happens
    masked: bool  # some of a tile's elements or steps do not exist
    reversed_lanes: bool  # the lanes' order, see ``kernels._lane_steps``


@dataclass(frozen=True)
class Grid:
    """The programs of a kernel for x [T, N, *] with dense inner dimensions."""

    cut: Cut
    size: int  # elements of an example
    blocks: int  # programs of an example
    examples: int
    options: dict[str, Any]  # of the compiler

    @property
    def programs(self) -> int:
        return self.examples * self.blocks

    @property
    def partials(self) -> tuple[int, int, int]:
        """Shape of partial sums of examples and steps."""
        return self.examples, self.blocks, self.cut.steps

    @classmethod
    def of(cls, x: Tensor, configuration: Configuration, *, sums: bool = False) -> Grid:
        """sums: whether the kernel sums up a float32 of each element for every step."""
        how, (steps, examples) = configuration, x.shape[:2]
        size, chunk, lanes = math.prod(x.shape[2:]), chunk_steps(steps, x.element_size()), 32 * how.warps
        block = max(lanes, min(lanes * how.elements, triton.next_power_of_2(size)))
        # At once is where it pays: one warp, and 16 steps. Fewer have few exchanges to save, and 32 too many sums to
        # keep in registers meanwhile (on an H100, bfloat16 and T = 32, 9 % more time than one by one).
        at_once = sums and how.warps == 1 and not how.tile and 8 < chunk <= 16
        # 16 bytes of neighbours, or one where Triton does not know that all rows begin at a multiple.
        aligned = all(n % 16 == 0 for n in (size, *x.stride()[:2]))
        neighbours = min(block // lanes, 16 // x.element_size() if aligned else 1) if at_once else 0
        even, ragged, early = size % block == 0, steps % chunk != 0, early_launch(x.device)
        lanes_of_sums = 32 if at_once else triton.next_power_of_2(max(chunk, 2 if how.tile else 1))
        cut = Cut(
            steps=steps,
            chunk=chunk,
            lanes=lanes_of_sums,
            block=block,
            elements=block // lanes,
            tile=how.tile,
            call_ahead=how.call_ahead,
            early=early,
            neighbours=neighbours,
            even=even,
            several=steps > chunk,
            ragged=ragged,
            masked=not even or ragged or lanes_of_sums != chunk,
            reversed_lanes=how.tile or at_once,
        )
        options = {"num_warps": how.warps, "enable_fp_fusion": False, **({"launch_pdl": True} if early else {})}
        return cls(cut, size, triton.cdiv(size, block), examples, options)


# ------------------------------------------------------------------------------------------------- what a kernel gets


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


class Has(NamedTuple):
    """What a pass is given beside x and the gradient of the spikes."""

    v_init: bool
    reciprocal_tau: bool
    grad_v: bool = False
    grad_v_seq: bool = False
    channel_scale: bool = False


class ForwardHow(NamedTuple):
    """HOW of the forward kernel."""

    cut: Cut
    kind: Kind
    has: Has
    stores: Stores


class BackwardHow(NamedTuple):
    """HOW of the backward kernel."""

    cut: Cut
    kind: Kind
    has: Has
    wanted: Wanted
