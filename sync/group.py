"""Processes, one rank each, that take what rank 0 broadcasts: over NCCL between GPUs, over gloo between CPUs.

Invariant: a broadcast has ended on return, or an error says why not; none waits for ever for a rank that is gone. No
default process group of the processes is touched.

Runs in the trainer's process and in the engines', so it imports torch only.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from threading import Event
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]  # public, but not in torch's `__all__`
    BroadcastOptions,
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
)

GROUP_FAILED = "the collective failed"
"""In every fault of a rank that could not finish a broadcast, so that the trainer tells it from a rank's own fault."""

NO_GROUP = "has not joined the collective"
"""In the fault of a rank that is asked to go on with a group that it does not know, as after a restart."""

CUMEM = "NCCL_CUMEM_ENABLE"
"""How NCCL allocates. SGLang sets it to 0 in its processes unless it is set, and ranks that differ in it wait for each
other for ever."""

POLL_S = 2e-4
"""Between looks at a broadcast that runs."""


@contextmanager
def _no_watchdog() -> Iterator[None]:
    """Groups made within do not end their process when a collective fails, as NCCL's would; we wait by the clock."""
    quiet = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    before = {name: os.environ.get(name) for name in quiet}
    os.environ.update(dict.fromkeys(quiet, "0"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Group:
    """Ranks that take what rank 0 broadcasts; apart from any default process group of the processes it spans."""

    def __init__(
        self, backend: str, store: Store, *, name: str, rank: int, world: int, device: torch.device, timeout_s: float
    ) -> None:
        """Returns when all ranks have joined. Raises `ConnectionError` or `TimeoutError` if one does not."""
        self._device, self._timeout_s = device, timeout_s
        store = PrefixStore(name, store)
        try:
            self._backend = self._make(backend, store, rank, world)
            self.broadcast(torch.zeros(1, dtype=torch.uint8, device=device))  # NCCL connects at the first collective
        except (ConnectionError, TimeoutError):
            raise
        except RuntimeError as error:
            raise ConnectionError(f"{GROUP_FAILED}: {_first_line(error)}") from error

    def _make(self, backend: str, store: Store, rank: int, world: int) -> Any:
        if backend == "gloo":
            return ProcessGroupGloo(store, rank, world, timedelta(seconds=self._timeout_s))
        from torch.distributed import ProcessGroupNCCL

        with _no_watchdog(), torch.cuda.device(self._device):
            return ProcessGroupNCCL(store, rank, world, ProcessGroupNCCL.Options())

    def broadcast(self, tensor: Tensor, given_up: Event | None = None) -> None:
        """Rank 0's `tensor` into that of all others; complete on return, also on a GPU.

        Raises `TimeoutError` when it takes too long, `ConnectionError` when a rank is gone or `given_up` is set.
        """
        options = BroadcastOptions()
        options.rootRank = 0
        deadline = time.monotonic() + self._timeout_s
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            try:
                work = self._backend.broadcast([tensor], options)
                while not work.is_completed():
                    if given_up is not None and given_up.is_set():
                        raise ConnectionError(f"{GROUP_FAILED}: given up since a rank is gone")
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{GROUP_FAILED}: a broadcast took longer than {self._timeout_s:g} s")
                    time.sleep(POLL_S)
                work.wait(timedelta(seconds=self._timeout_s))  # with a time, NCCL's raises what went wrong
            except RuntimeError as error:
                raise ConnectionError(f"{GROUP_FAILED}: {_first_line(error)}") from error

    def abort(self) -> None:
        """Lets go of the connections, whatever runs on them."""
        self._backend.abort()


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def make_store(host: str, timeout_s: float) -> TCPStore:
    """Where the ranks of a group find each other. It listens on `host` alone, not on every address of the machine."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
