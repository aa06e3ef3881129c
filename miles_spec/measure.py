"""What a call costs on its device: time, memory above the inputs, launches, host synchronisations.

Invariant: calls that are compared take turns, so that drifting clocks meet all alike, and none finds the last one's
data in the GPU's cache.
"""

from __future__ import annotations

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

WARM_UP = 1
TURNS = 10
MOST_TURNS = 100
LEAST_TURNS = 3
SHORT_S = 0.1
"""Below this total a call goes on taking turns after `TURNS`."""
LONG_S = 1.0
"""Above this total it stops before them."""
CACHE_BYTES = 256 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """Medians over turns."""

    ms: float
    """On a GPU between two events around the call, else wall clock."""
    host_ms: float | None
    """Wall clock until the call returned, whatever the GPU still had to do; None without one."""


class Meter:
    """Measures calls on `device`; with `group` on all its ranks at once, of which the slowest gives the times."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.device, self.group = device, group
        self.cuda = device.type == "cuda"
        self._cache = torch.empty(CACHE_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def times(self, calls: Mapping[str, Call]) -> dict[str, Time]:
        """Each call's time, by name; all ranks of a group must pass the same names in the same order."""
        for call in calls.values():
            for _ in range(WARM_UP):
                call()
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        while waiting := [name for name in calls if not self._enough(samples[name])]:
            for name in waiting:
                samples[name].append(self._turn(calls[name]))
        found = {}
        for name, turns in samples.items():
            ms, host = (self.largest(statistics.median(x)) for x in zip(*turns, strict=True))
            found[name] = Time(ms=ms, host_ms=host if self.cuda else None)
        return found

    def _enough(self, samples: list[tuple[float, float]]) -> bool:
        # the slowest rank's, so that all ranks take equally many turns
        turns, spent = len(samples), self.largest(sum(ms for ms, _ in samples) / 1e3)
        if turns >= TURNS:
            return spent >= SHORT_S or turns >= MOST_TURNS
        return turns >= LEAST_TURNS and spent >= LONG_S

    def _turn(self, call: Call) -> tuple[float, float]:
        if self.group is not None:
            dist.barrier(self.group)
        if not self.cuda:
            begun = time.perf_counter()
            call()
            spent = (time.perf_counter() - begun) * 1e3
            return spent, spent
        torch.cuda.synchronize()
        self._cache.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        begun = time.perf_counter()
        call()
        host = (time.perf_counter() - begun) * 1e3
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), host

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
