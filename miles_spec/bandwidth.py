"""Times of calls in turns, and what a device, two devices or a disk carry: what a push of weights is held against.

Invariant: a byte that is read in one place and written in another counts once, as it does for a push.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]  # public, but not in torch's `__all__`

from miles_spec.sync.group import Group

WARM_UPS = 2
TURNS = 5
LONG_S, LEAST_TURNS = 5.0, 3
"""A call that takes longer is timed fewer times."""
MOST_BYTES = 1 << 30
"""Of what a bandwidth is measured with."""


def times(calls: Sequence[Callable[[], object]], until: float) -> list[tuple[float, ...]]:
    """Seconds of each call's turns, taken in turns after `WARM_UPS`; of none if they would last beyond `until`, on the
    clock of `time.monotonic`. A GPU has nothing to do before a turn, and is waited for at its end."""
    taken: list[list[float]] = [[] for _ in calls]
    turns = WARM_UPS + TURNS
    done = 0
    while done < turns:
        for call, own in zip(calls, taken, strict=True):
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            own.append(time.perf_counter() - start)
        done += 1
        once = sum(own[-1] for own in taken)
        if once > LONG_S * len(calls):
            turns = WARM_UPS + LEAST_TURNS
        if time.monotonic() + (WARM_UPS + LEAST_TURNS - done) * once > until:
            return [() for _ in calls]
        if done >= WARM_UPS + LEAST_TURNS and time.monotonic() + once > until:
            break
    return [tuple(own[WARM_UPS:]) for own in taken]


def _wait() -> None:
    for i in range(min(2, torch.cuda.device_count())):  # the trainer's; any other would only get a context
        torch.cuda.synchronize(i)


def bandwidth(kind: str, size_bytes: int, device: torch.device, path: Path) -> float:
    """GB/s of `size_bytes`, at most `MOST_BYTES`: a copy within `device` (ipc), a broadcast from there (nccl, to GPU 0,
    or gloo), or a file that is written, synced and read again, from memory where the system still holds it (disk).

    `path` is used and removed. Raises `ConnectionError` or `TimeoutError` for a broadcast that fails.
    """
    size = min(size_bytes, MOST_BYTES)
    source = torch.ones(size, dtype=torch.uint8, device="cpu" if kind == "disk" else device)
    if kind in ("nccl", "gloo"):
        seconds = _broadcast_s(kind, source, path)
    elif kind == "disk":
        back = torch.ones_like(source)
        seconds = statistics.median(times([lambda: _write_and_read(source, back, path)], math.inf)[0])
        path.unlink()
    else:
        copy = torch.ones_like(source)
        seconds = statistics.median(times([lambda: copy.copy_(source)], math.inf)[0])
    return size / 1e9 / seconds


def _write_and_read(source: Tensor, back: Tensor, path: Path) -> None:
    with open(path, "wb") as file:
        file.write(source.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    with open(path, "rb") as file:
        file.readinto(back.numpy().data)


def _broadcast_s(kind: str, source: Tensor, path: Path) -> float:
    """Median seconds of a broadcast to a process that has the server's place."""
    other = str(torch.device("cuda", 0)) if kind == "nccl" else "cpu"
    listener = mp.get_context("spawn").Process(
        target=_listen, args=(kind, str(path), source.numel(), other), daemon=True
    )
    listener.start()
    try:
        group = Group(
            kind, FileStore(str(path), 2), name="bandwidth", rank=0, world=2, device=source.device, timeout_s=60.0
        )
        try:
            return statistics.median(times([lambda: group.broadcast(source)], math.inf)[0])
        finally:
            listener.join(10.0)  # it leaves after as many turns
            group.abort()
    finally:
        listener.kill()
        path.unlink(missing_ok=True)


def _listen(kind: str, path: str, size_bytes: int, device: str) -> None:
    """Runs in a process of its own: takes what `times` has broadcast."""
    at = torch.device(device)
    group = Group(kind, FileStore(path, 2), name="bandwidth", rank=1, world=2, device=at, timeout_s=60.0)
    buffer = torch.empty(size_bytes, dtype=torch.uint8, device=at)
    for _ in range(WARM_UPS + TURNS):
        group.broadcast(buffer)
    group.abort()
