"""How the benchmarks measure: cold caches, device time apart from host time, and copy bandwidth as the yardstick.

Device time (CUDA): events around a few calls, each on other buffers, with the L2 flushed before. A spin kernel holds
the device back until the host has queued all of them, so that gaps between launches are not counted; whether it did
is checked, not assumed. Wall time: pytest-benchmark's clock around one call and a synchronisation. On the CPU the two
are the same.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

COLD = 4  # rotated buffers together are this many times the last-level cache
DEVICE_BUDGET = 0.2  # seconds of repetitions per figure
WALL_BUDGET = {"cuda": 0.15, "cpu": 0.4}
SPIN_CLOCK = 2e9  # cycles per second, at least the device's: then the spin lasts at least as long as asked


class Device:
    """The device under test, its last-level cache, and the copy bandwidth that floors are computed from."""

    def __init__(self) -> None:
        self.type = "cuda" if torch.cuda.is_available() else "cpu"
        self.is_cuda = self.type == "cuda"
        self.cache_bytes = _l2_bytes() if self.is_cuda else _cpu_cache_bytes()
        if self.is_cuda:
            self.scratch = torch.ones(COLD * self.cache_bytes // 4, device="cuda")
        self.copy_bytes = 2 * (2**30 if self.is_cuda else 2**28)  # read + written
        self.copy_bandwidth = self._measure_copy()

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.type).manual_seed(seed)

    def buffers(self, bytes_of_one: int) -> int:
        """How many buffers of this size to rotate, so that each is cold when its turn comes."""
        return max(2, math.ceil(COLD * self.cache_bytes / bytes_of_one))

    def floor_seconds(self, moved_bytes: float) -> float:
        return moved_bytes / self.copy_bandwidth

    def _measure_copy(self) -> float:
        """Bytes read plus bytes written per second by one large copy within the device."""
        source = torch.randn(self.copy_bytes // 8, device=self.type)
        target = torch.empty_like(source)
        if self.is_cuda:
            figures = self.device_seconds(lambda _: None, lambda _: target.copy_(source), buffers=1)
            seconds = figures["device_seconds"]
        else:
            times = []
            for _ in range(7):
                start = time.perf_counter()
                target.copy_(source)
                times.append(time.perf_counter() - start)
            seconds = statistics.median(times)
        assert torch.equal(source, target)
        return self.copy_bytes / seconds

    # ------------------------------------------------------------------------------------------------ timing

    def measure(
        self,
        benchmark,
        prepare: Callable[[int], Any],
        call: Callable[[Any], Any],
        *,
        buffers: int,
        waits: bool = False,
    ) -> dict[str, Any]:
        """Time ``call(prepare(i))`` for rotating i < buffers; only ``call`` is timed.

        Args:
            waits: the call itself waits for the device, so that only its wall time has a meaning.

        Returns:
            seconds, medians: ``wall_seconds``; ``device_seconds`` (the wall time on the CPU; left out if it waits); on
            CUDA also ``host_seconds``, until the call returns to the host.
        """
        for i in range(2):  # compiles, tunes, fills the allocator's pools
            call(prepare(i % buffers))
        self.synchronize()
        figures = {}
        if self.is_cuda and not waits:
            figures = self.device_seconds(prepare, call, buffers)
        figures["wall_seconds"] = self._wall_seconds(benchmark, prepare, call, buffers)
        if not self.is_cuda:
            figures["device_seconds"] = figures["wall_seconds"]
        return figures

    def _wall_seconds(self, benchmark, prepare, call, buffers: int) -> float:
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
        rounds = min(50, max(5, int(WALL_BUDGET[self.type] / once)))
        benchmark.pedantic(timed, setup=setup, rounds=rounds)
        if benchmark.stats is None:
            pytest.skip("pytest-benchmark does not time in this run")
        return benchmark.stats.stats.median

    def _host_seconds(self, prepare, call, buffers: int) -> float:
        """Until the call returns, the device being idle when it starts."""
        times = []
        deadline = time.perf_counter() + DEVICE_BUDGET / 2
        while len(times) < 5 or (len(times) < 30 and time.perf_counter() < deadline):
            state = prepare(len(times) % buffers)
            torch.cuda.synchronize()
            start = time.perf_counter()
            result = call(state)
            times.append(time.perf_counter() - start)
            del result, state
        torch.cuda.synchronize()
        return statistics.median(times)

    def device_seconds(self, prepare, call, buffers: int) -> dict[str, Any]:
        """CUDA: medians of device and host time of one call."""
        host = self._host_seconds(prepare, call, buffers)
        calls = min(buffers, max(1, int(2e-3 / host)))  # between two events; few enough for the launch queue
        spin = 2 * calls * host + 2e-4
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
            if host_was_ahead or late >= 6:
                times.append(start.elapsed_time(end) / 1e3 / calls)
            else:  # the device ran dry: again with fewer calls and a longer spin
                late, times = late + 1, []
                calls, spin = max(1, calls // 2), min(2 * spin, 0.05)
            del results, states
        first, median, third = statistics.quantiles(times, n=4)
        figures = {"device_seconds": median, "device_seconds_quartiles": [first, third], "host_seconds": host}
        if late >= 6:
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
