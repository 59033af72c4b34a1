"""How the benchmarks measure: cold caches, device time apart from host time, and copy bandwidth as the yardstick.

Device time (CUDA): events around a few calls, each on other buffers, with the L2 flushed before. A spin kernel holds
the device back until the host has queued all of them, so that gaps between launches are not counted; whether it did
is checked, not assumed. Wall time: pytest-benchmark's clock around one call and a synchronisation. On the CPU the two
are the same. With --benchmark-disable everything runs once and nothing is timed.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLD = 4  # rotated buffers together are this many times the last-level cache
DEVICE_BUDGET = 0.08  # seconds of repetitions per figure
WALL_BUDGET = {"cuda": 0.05, "cpu": 0.15}
SPIN_CLOCK = 2e9  # cycles per second, at least the device's: then the spin lasts at least as long as asked
LONGEST_SPIN = 0.05  # seconds
LATE = 6  # so many times the device may run dry before its time is taken as bound by the host

Prepare = Callable[[int], Any]
Call = Callable[[Any], Any]


class Device:
    """The device under test, its last-level cache, and the copy bandwidth that floors are computed from."""

    def __init__(self) -> None:
        self.type = "cuda" if torch.cuda.is_available() else "cpu"
        self.is_cuda = self.type == "cuda"
        self.cache_bytes = _l2_bytes() if self.is_cuda else _cpu_cache_bytes()
        self.copy_bytes = 2 * (2**30 if self.is_cuda else 2**27)  # read + written

    @cached_property
    def scratch(self) -> Tensor:
        """Read to flush the L2."""
        return torch.ones(COLD * self.cache_bytes // 4, device=self.type)

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes read plus bytes written per second by one large copy within the device; measured once in a run."""
        return self.copy_bytes / self.copy_seconds((self.copy_bytes,))

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.type).manual_seed(seed)

    def buffers(self, bytes_of_one: int) -> int:
        """How many buffers of this size to rotate, so that each is cold when its turn comes."""
        return max(2, math.ceil(COLD * self.cache_bytes / max(1, bytes_of_one)))

    def floor_seconds(self, moved_bytes: float) -> float:
        return moved_bytes / self.copy_bandwidth

    def copy_seconds(self, moved_bytes: Sequence[int]) -> float:
        """Device time of one copy after the other, each of so many bytes read plus written."""
        sizes = [max(1, moved // 8) for moved in moved_bytes]  # float32 elements
        count = 1 if sum(sizes) * 8 >= self.copy_bytes else self.buffers(sum(sizes) * 8)
        pairs = [
            # Both written once, so that no copy is the first to touch a page.
            [(torch.randn(n, device=self.type), torch.full((n,), 0.0, device=self.type)) for n in sizes]
            for _ in range(count)
        ]

        def copy(pair):
            for source, target in pair:
                target.copy_(source)

        if self.is_cuda:
            return self.device_seconds(lambda i: pairs[i], copy, count)["device_seconds"]
        times = []
        for i in range(8):
            start = time.perf_counter()
            copy(pairs[i % count])
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def release(self) -> None:
        """Leave nothing of earlier benchmarks on the device, so that the next one's peak of memory is its own."""
        self.__dict__.pop("scratch", None)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if self.is_cuda:
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------------ timing

    def measure(
        self, benchmark, prepare: Prepare, call: Call, *, buffers: int, waits: bool = False, warmup: int = 2
    ) -> dict[str, Any]:
        """Time ``call(prepare(i))`` for rotating i < buffers; only ``call`` is timed.

        Args:
            waits: the call itself waits for the device, so that only its wall time has a meaning.
            warmup: untimed calls before, which compile, tune and fill the allocator's pools.

        Returns:
            seconds, medians: ``wall_seconds``; ``device_seconds`` (the wall time on the CPU; left out if it waits); on
            CUDA also ``host_seconds``, until the call returns to the host. Empty where pytest-benchmark is disabled.
        """
        if benchmark.disabled:
            benchmark.pedantic(call, args=(prepare(0),))
            return {}
        for i in range(warmup):
            call(prepare(i % buffers))
        self.synchronize()
        figures = self.device_seconds(prepare, call, buffers) if self.is_cuda and not waits else {}
        figures["wall_seconds"] = self._wall_seconds(benchmark, prepare, call, buffers)
        if not self.is_cuda:
            figures["device_seconds"] = figures["wall_seconds"]
        return figures

    def _wall_seconds(self, benchmark, prepare: Prepare, call: Call, buffers: int) -> float:
        turn = iter(range(10**9))

        def setup():
            state = prepare(next(turn) % buffers)
            self.synchronize()
            return (state,), {}

        def timed(state):
            result = call(state)
            self.synchronize()
            return result

        (state,), _ = setup()
        start = time.perf_counter()
        timed(state)
        once = time.perf_counter() - start
        benchmark.pedantic(timed, setup=setup, rounds=min(50, max(5, int(WALL_BUDGET[self.type] / once))))
        return benchmark.stats.stats.median

    def host_seconds(self, prepare: Prepare, call: Call, buffers: int, least: int = 5, most: int = 30) -> float:
        """Median until the call returns, the device being idle when it starts."""
        times: list[float] = []
        deadline = time.perf_counter() + DEVICE_BUDGET / 4
        while len(times) < least or (len(times) < most and time.perf_counter() < deadline):
            state = prepare(len(times) % buffers)
            self.synchronize()
            start = time.perf_counter()
            result = call(state)
            times.append(time.perf_counter() - start)
            del result, state
        self.synchronize()
        return statistics.median(times)

    def device_seconds(self, prepare: Prepare, call: Call, buffers: int) -> dict[str, Any]:
        """CUDA: medians of device and host time of one call."""
        host = self.host_seconds(prepare, call, buffers)
        calls = min(buffers, max(1, int(2e-3 / host)))  # between two events; few enough for the launch queue
        spin = min(2 * calls * host + 2e-4, LONGEST_SPIN)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times: list[float] = []
        late, turn = 0, 0
        deadline = time.perf_counter() + DEVICE_BUDGET
        while len(times) < 5 or (len(times) < 30 and time.perf_counter() < deadline):
            states = [prepare((turn + k) % buffers) for k in range(calls)]
            turn += calls
            torch.cuda.synchronize()
            torch.cuda._sleep(int(spin * SPIN_CLOCK))
            self.scratch.sum()  # read, not written: what it leaves in the L2 need not be written back
            start.record()
            results = [call(state) for state in states]
            end.record()
            host_was_ahead = not start.query()
            end.synchronize()
            if host_was_ahead or late >= LATE:
                times.append(start.elapsed_time(end) / 1e3 / calls)
            else:  # the device ran dry: again with fewer calls and a longer spin
                late, times = late + 1, []
                calls, spin = max(1, calls // 2), min(2 * spin, LONGEST_SPIN)
            del results, states
        first, median, third = statistics.quantiles(times, n=4)
        figures = {"device_seconds": median, "device_seconds_quartiles": [first, third], "host_seconds": host}
        if late >= LATE:
            figures["bound_by_host"] = True
        return figures


def _l2_bytes() -> int:
    return getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0) or 64 * 2**20


def _cpu_cache_bytes() -> int:
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    found = [int(text[:-1]) * units[text[-1]] for text in (size.read_text().strip() for size in sizes)]
    return max(found, default=32 * 2**20)


def tensor_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
