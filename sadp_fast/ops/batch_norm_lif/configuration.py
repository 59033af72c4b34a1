"""How the BatchNorm + LIF kernels are launched, and what they are compiled for.

Reading order: configurations, how x is cut into tiles and programs (``Shape.grid``), and what a kernel gets as HOW.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common.equations import RelativeKind
from ..common.launch import multiprocessors
from .reference import Normalisation

# --------------------------------------------------------------------------------------------------- configurations


@dataclass(frozen=True)
class Configuration:
    """Launch configuration of a kernel."""

    elements: int  # of a tile, per thread
    warps: int  # of a program
    programs: int  # at a time on one multiprocessor, each with its share of the registers

    def for_tiles_of(self, steps: int, itemsize: int) -> Configuration:
        """Longer sequences and wider values need more registers, so fewer programs fit."""
        elements = self.elements if steps <= 8 else self.elements // 2
        programs = self.programs // (1 if steps <= 4 else 2 if steps <= 8 else 4)
        if steps > 4:
            programs = min(programs, _REGISTERS // (32 * self.warps * 144))  # with fewer registers eight steps spill
        return replace(self, elements=elements, programs=max(1, programs * 7 // 8 if itemsize == 4 else programs))

    @property
    def options(self) -> dict[str, int | bool]:
        """Of the compiler."""
        registers = _REGISTERS // (32 * self.warps * self.programs)
        return {"num_warps": self.warps, "maxnreg": min(255, registers // 8 * 8), "enable_fp_fusion": False}


_REGISTERS = 65536  # of one multiprocessor

# By kernel, for tiles of up to 4 steps of half-precision values: the curated configuration, chosen on an H100, and what
# an ``autotune`` measures beside it.
TUNING: dict[str, tuple[Configuration, ...]] = {
    kernel: tuple(Configuration(*numbers) for numbers in configurations)
    for kernel, configurations in {
        "statistics": ((16, 1, 16), (8, 1, 16), (8, 1, 24), (8, 4, 4), (16, 1, 12), (32, 1, 12)),
        "forward": ((8, 4, 5), (4, 1, 24), (8, 1, 16), (8, 2, 10), (8, 4, 6), (8, 8, 3)),
        "sums": ((4, 1, 24), (2, 1, 32), (4, 1, 28), (4, 2, 12), (4, 4, 6), (8, 1, 12)),
        "gradient": ((4, 1, 32), (2, 1, 32), (4, 1, 28), (4, 2, 16), (4, 8, 4), (8, 1, 14)),
    }.items()
}


def candidates(kernel: str, steps: int, itemsize: int) -> tuple[Configuration, ...]:
    """The curated configuration, and others that an ``autotune`` measures."""
    if kernel == "statistics":  # whose tiles are of one step at a time
        return TUNING[kernel]
    return tuple(dict.fromkeys(config.for_tiles_of(steps, itemsize) for config in TUNING[kernel]))


# --------------------------------------------------------------------------------------------------------- the grid


@dataclass(frozen=True)
class Grid:
    """How a tensor [T, N, C, pixels] is cut into tiles and programs."""

    rows: int
    columns: int
    tiles: int  # of one example and block of channels
    channel_blocks: int
    team: int  # programs that share an example, each with every team-th tile of it
    teams: int  # the t-th of them has the examples t, t + teams, ...
    masked: bool  # whether some tile lies partly outside

    @property
    def slots(self) -> int:
        """Programs that share a channel: as many partial sums."""
        return self.team * self.teams

    @property
    def parts(self) -> int:
        """Partial sums of one example."""
        return self.channel_blocks * self.team

    @property
    def programs(self) -> int:
        return self.slots * self.channel_blocks


@functools.lru_cache(maxsize=256)
def _grid(
    examples: int, channels: int, pixels: int, channels_last: bool, config: Configuration, processors: int
) -> Grid:
    tile = 32 * config.warps * config.elements
    inner, outer = (channels, pixels) if channels_last else (pixels, channels)
    columns = min(triton.next_power_of_2(inner), 128 if channels_last else 256, tile)
    rows = min(triton.next_power_of_2(outer), max(1, tile // columns))
    tile_pixels, tile_channels = (rows, columns) if channels_last else (columns, rows)
    tiles = triton.cdiv(pixels, tile_pixels)
    channel_blocks = triton.cdiv(channels, tile_channels)
    team, teams = _teams(examples, tiles, max(1, config.programs * processors // channel_blocks))
    masked = pixels % tile_pixels != 0 or channels % tile_channels != 0
    return Grid(rows, columns, tiles, channel_blocks, team, teams, masked)


def _teams(examples: int, tiles: int, programs: int) -> tuple[int, int]:
    """Size and number of teams of at most ``programs`` in all: the slowest program should not have much to do.

    Of those with the least, the smallest: a sum per example then takes few partial sums.
    """
    each = {}  # tiles of an example and examples that a program of a team of this size has at most
    for size in range(1, min(tiles, programs) + 1):
        each[size] = triton.cdiv(tiles, size), triton.cdiv(examples, min(examples, programs // size))
    least = min(math.prod(pair) for pair in each.values())
    tiles_each, examples_each = next(pair for pair in each.values() if math.prod(pair) == least)
    return triton.cdiv(tiles, tiles_each), triton.cdiv(examples, examples_each)


class Shape(NamedTuple):
    """x [T, N, C, *] as the kernels see it (T = 1 where all steps have one input), and all that their compilation and
    their grids depend on."""

    steps: int
    examples: int
    channels: int
    pixels: int
    stride_t: int
    stride_n: int
    channels_last: bool
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor, repeated: bool) -> Shape:
        """Of an x [T, N, C, *], or [N, C, *] if it is repeated."""
        x = x.unsqueeze(0) if repeated else x
        steps, examples, channels, *rest = x.shape
        pixels = math.prod(rest)
        channels_last = pixels == 1 or x.stride(2) == 1
        return cls(steps, examples, channels, pixels, x.stride(0), x.stride(1), channels_last, x.dtype, x.device)

    @property
    def elements(self) -> int:
        """Of one channel."""
        return self.steps * self.examples * self.pixels

    def grid(self, config: Configuration) -> Grid:
        processors = max(1, multiprocessors(self.device))
        return _grid(self.examples, self.channels, self.pixels, self.channels_last, config, processors)

    def numbers(self, grid: Grid, other_strides: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Those that every kernel over tiles begins with; the strides are those of its second tensor."""
        sizes = (self.examples, self.channels, self.pixels, self.stride_t, self.stride_n)
        return (*sizes, *other_strides, grid.channel_blocks, grid.tiles, grid.team, grid.teams)

    def cut(self, grid: Grid, steps: int, repeated: bool = False) -> Cut:
        return Cut(steps, grid.rows, grid.columns, self.channels_last, grid.masked, repeated)


# ------------------------------------------------------------------------------------------------- what a kernel gets


class Cut(NamedTuple):
    """The tiles that the kernels are compiled for."""

    steps: int  # T
    rows: int
    columns: int
    channels_last: bool  # whether a tile's columns are channels, else pixels
    masked: bool  # whether some tile lies partly outside
    repeated: bool  # whether all steps have one x


class Fires(NamedTuple):
    """What the forward kernel does beside the spikes."""

    residual: bool  # adds it to them
    v: bool  # writes the final potential
    energy: bool  # sums the squares of each example's output


class Does(NamedTuple):
    """What a pass of the backward kernel does.

    The first pass of training takes sums, the second writes; statistics that are constants need but one, which does
    both.
    """

    sums: bool  # of each channel, for the gradients of weight and bias and for the second pass
    norm: bool  # of each example's gradient, squared
    write: bool  # the gradient of x
    indirect: bool  # with what goes by way of the batch's statistics
    grad_tau: bool


class NormalisationKind(NamedTuple):
    """What a normalisation's kernels are compiled for."""

    use_batch: bool
    update: bool
    cumulative: bool
    affine: bool

    @classmethod
    def of(cls, norm: Normalisation, affine: bool) -> NormalisationKind:
        update = norm.use_batch and norm.update and norm.running_mean is not None
        return cls(norm.use_batch, update, update and norm.momentum is None, affine)


class StatisticsHow(NamedTuple):
    """HOW of the kernel for the statistics of the channels."""

    cut: Cut


class ConstantsHow(NamedTuple):
    """HOW of the kernel for the constants."""

    norm: NormalisationKind
    kind: RelativeKind


class ForwardHow(NamedTuple):
    """HOW of the forward kernel."""

    cut: Cut
    kind: RelativeKind
    does: Fires


class BackwardHow(NamedTuple):
    """HOW of the backward kernel."""

    cut: Cut
    kind: RelativeKind
    does: Does


class FinishHow(NamedTuple):
    """HOW of the kernel that ends the backward pass."""

    kind: RelativeKind
    affine: bool  # there are gradients of weight and bias
    scored: bool  # there are energies of the examples
