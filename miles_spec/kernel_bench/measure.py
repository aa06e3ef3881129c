"""What a call costs on its device: time, memory above the inputs, launches, host synchronisations.

Invariant: every time on a GPU has the same history. Before it the GPU runs the same load, matrix products at full
power, so that no call meets a cooler chip or a higher clock because of the one before it; then its cache is
overwritten. The order changes from round to round.

The GPU does not run dry between the load and the call: a call whose host is quicker than the GPU costs the GPU's time,
without the latency of its launches. So it is in training, where the GPU has a queue too, and it holds for our calls and
for others. But the host starts the call only when the last `AHEAD_MS` of the load run, since a call that keeps the host
busy for tens of milliseconds must not hide them behind a longer load. What the host needs is measured by itself.
"""

from __future__ import annotations

import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]

WARM_UP = 3
"""Calls whose time on the host is taken, with nothing queued before them."""
TURNS = 9
LONG_MS = 100.0
"""From this time on a call takes `LEAST_TURNS`."""
LEAST_TURNS = 3
ENDLESS_MS = 1000.0
"""From this time on one, after one warm-up."""
LOAD_MS = 40.0
AHEAD_MS = 3.0
"""The end of the load, which the host does not wait for."""
SIDE = 8192
"""Of the matrices of the load."""
CACHE_BYTES = 256 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """Over turns; of several ranks the largest of each."""

    ms: float
    """Median; on a GPU between two events around the call, else wall clock."""
    spread: float
    """Between the quartiles, in units of the median."""
    host_ms: float | None
    """Median wall clock until the call returned, whatever the GPU still had to do; None without one."""


class Meter:
    """Measures calls on `device`; with `group` on all its ranks at once, of which the slowest gives the times."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.device, self.group = device, group
        self.cuda = device.type == "cuda"
        if self.cuda:
            self._cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
            # random numbers, since zeros draw much less power
            self._factor = torch.randn(SIDE, SIDE, device=device).bfloat16()
            self._product = torch.empty_like(self._factor)
            self._meeting = torch.zeros((), device=device)
            self._multiply(3)
            product_ms = self._between_events(lambda: self._multiply(10)) / 10
            self._ahead = math.ceil(AHEAD_MS / product_ms)
            self._before = math.ceil(LOAD_MS / product_ms) - self._ahead

    def times(self, calls: Mapping[str, Call]) -> dict[str, Time]:
        """Each call's time, by name; all ranks of a group must pass the same names in the same order."""
        host: dict[str, float] = {}
        turns: dict[str, int] = {}
        for name, call in calls.items():
            alone = [self._alone(call)]
            # the slowest rank's, so that all ranks take equally many turns
            endless = self.largest(alone[0][1]) >= ENDLESS_MS
            alone += [self._alone(call) for _ in range(0 if endless else WARM_UP - 1)]
            host[name], done = (self.largest(statistics.median(x)) for x in zip(*alone, strict=True))
            turns[name] = 1 if endless else TURNS if done < LONG_MS else LEAST_TURNS
        samples: dict[str, list[float]] = {name: [] for name in calls}
        order = random.Random(0)
        while waiting := [name for name in calls if len(samples[name]) < turns[name]]:
            order.shuffle(waiting)
            for name in waiting:
                samples[name].append(self._turn(calls[name]))
        found = {}
        for name, taken in samples.items():
            low, ms, high = statistics.quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else taken * 3
            found[name] = Time(
                ms=self.largest(ms),
                spread=self.largest((high - low) / ms),
                host_ms=host[name] if self.cuda else None,
            )
        return found

    def _alone(self, call: Call) -> tuple[float, float]:
        """Milliseconds until the call returned, and until its device was done, on a device with nothing to do."""
        self._wait()
        begun = time.perf_counter()
        call()
        returned = time.perf_counter()
        self._wait_for_device()
        return (returned - begun) * 1e3, (time.perf_counter() - begun) * 1e3

    def _turn(self, call: Call) -> float:
        self._wait()
        if not self.cuda:
            begun = time.perf_counter()
            call()
            return (time.perf_counter() - begun) * 1e3
        self._multiply(self._before)
        reached = torch.cuda.Event()
        reached.record()
        self._multiply(self._ahead)
        reached.synchronize()
        self._cache.zero_()
        if self.group is not None:  # the GPUs leave it together, and no host waits for it
            dist.all_reduce(self._meeting, group=self.group)
        return self._between_events(call)

    def _between_events(self, call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _multiply(self, times: int) -> None:
        for _ in range(times):
            torch.mm(self._factor, self._factor, out=self._product)

    def _wait(self) -> None:
        """Until the device has nothing to do, and all ranks are here."""
        if self.group is not None:
            dist.barrier(self.group)
        self._wait_for_device()

    def _wait_for_device(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak_gib(self, call: Call) -> float | None:
        """The most memory that the call and its results took at once; None without a GPU."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / GIB

    def launches(self, call: Call) -> int | None:
        """Kernels, copies and fills that the call starts; None without a GPU, and where the profiler sees none."""
        if not self.cuda or _device_events(self._cache.zero_) != 1:
            return None
        return _device_events(call)

    def syncs(self, call: Call) -> int | None:
        """How often the host waits for the GPU in the call, as far as torch notices; None without a GPU."""
        if not self.cuda:
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        if self.group is None:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX, self.group)
        return float(shared)


def _device_events(call: Call) -> int:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    result = trace.profiler.kineto_results if trace.profiler is not None else None
    assert result is not None
    # torch's own form of the events takes a minute to build for a loop of a hundred thousand launches; a collective's
    # label is an event on the device too, but nothing that runs there
    return sum(e.device_type().name == "CUDA" and not e.is_user_annotation() for e in result.events())
