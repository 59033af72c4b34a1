"""Launch configurations by measurement, where that is asked for; else the curated ones, which an H100 chose."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

C = TypeVar("C", bound=Hashable)  # a kernel's configuration

ROUNDS, REPEATS = 3, 5  # every configuration is timed REPEATS times in each round
ADVANTAGE = 0.98  # of the curated one's time, above which noise decides and the curated one stays


class Choice(NamedTuple):
    """What ``autotune`` found for a kernel at one shape and dtype: a configuration, its time and the curated one's."""

    kernel: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    configuration: Any
    seconds: float
    curated_seconds: float


_found: list[Choice] | None = None  # by the innermost autotune() that is open; None: none is
_at_the_start: list[Callable[[], None]] = []  # of autotune(): what makes kernels ask again


@contextmanager
def autotune() -> Iterator[list[Choice]]:
    """Choose the neurons' launch configurations by measuring, for the shapes that are run inside. [ours]

    ::

        with sadp_fast.autotune() as choices:
            train_step(x, y)  # forward and backward pass, at the shapes of the training
        print(*choices, sep="\\n")

    Where nothing is tuned, kernels are launched as was best on an H100. Inside, each of ``LIFNode``'s and
    ``BatchNormLIF``'s kernels that meets a shape for the first time is timed in some six configurations, on cold
    caches, and keeps the fastest for the rest of the process; the curated one, unless another takes 2 % less. That
    compiles a kernel for each: a second or so, once (Triton keeps them on disk). Spikes and gradients are the same
    bits in any configuration of ``LIFNode``; sums over elements (per-example statistics, batch statistics, the gradient
    of a learned time constant) are added in another order, so their last bits may differ between processes that chose
    differently.

    Nothing is measured on the CPU or while a CUDA graph is recorded: run a step before.

    Yields:
        the choices, in the order in which they are made: kernel, shape and dtype of x, configuration, seconds, and
        seconds of the curated one.
    """
    global _found
    outer, _found = _found, []
    for ask_again in _at_the_start:
        ask_again()
    try:
        yield _found
    finally:
        _found = outer


def at_the_start(ask_again: Callable[[], None]) -> None:
    """Call this when an ``autotune`` begins."""
    _at_the_start.append(ask_again)


class Choices(Generic[C]):
    """The measured configurations of one kernel, by what decides its speed."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self._measured: dict[Hashable, C] = {}

    def __call__(
        self,
        key: Hashable,
        x: Tensor,
        candidates: Callable[[], Sequence[C]],
        run: Callable[[C], Any],
    ) -> C:
        """The configuration for ``key``: what was measured to be the fastest, now or before, else the first candidate.

        Args:
            key: shape, layout, dtype, device and whatever else the kernel's speed depends on.
            x: the kernel's input.
            candidates: gives the configurations, the curated one first.
            run: launches the kernel in a configuration, again and again with the same results.
        """
        chosen = self._measured.get(key) if self._measured else None
        if chosen is not None:
            return chosen
        configurations = candidates()
        if _found is None or not _measurable(x):
            return configurations[0]
        seconds = _seconds(run, configurations, x.device)
        fastest = min(range(len(seconds)), key=seconds.__getitem__)
        if seconds[fastest] > ADVANTAGE * seconds[0]:
            fastest = 0
        chosen = self._measured[key] = configurations[fastest]
        _found.append(Choice(self.kernel, tuple(x.shape), x.dtype, chosen, seconds[fastest], seconds[0]))
        return chosen


def _measurable(x: Tensor) -> bool:
    return x.is_cuda and x.numel() > 0 and not torch.cuda.is_current_stream_capturing()


def _seconds(run: Callable[[C], Any], configurations: Sequence[C], device: torch.device) -> list[float]:
    """Device time of each configuration, the median of some, each on cold caches."""
    with torch.cuda.device(device):
        for configuration in configurations:
            run(configuration)  # compiles
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        cold = torch.empty(max(2 * cache, 2**25), dtype=torch.uint8, device=device)
        events: dict[C, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {c: [] for c in configurations}
        for _ in range(ROUNDS):
            for configuration in configurations:
                for _ in range(4):  # so that the device is busy while the host queues what is timed
                    cold.zero_()
                for _ in range(REPEATS):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    cold.zero_()
                    start.record()
                    run(configuration)
                    end.record()
                    events[configuration].append((start, end))
        torch.cuda.synchronize()
        return [statistics.median(start.elapsed_time(end) * 1e-3 for start, end in events[c]) for c in configurations]
